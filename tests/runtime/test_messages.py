"""Messages come out as they went in; what is no message is refused, whatever it claims."""

import ast
import json
import os
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from flipguard_onnx.runtime import messages
from flipguard_onnx.runtime.messages import (
    MAX_HEADER_BYTES,
    Channel,
    Message,
    MessageError,
    UnsendableError,
    encoded,
    outputs_message,
    outputs_of,
)

MODULES = ("messages.py", "session.py", "settings.py", "worker.py")


@contextmanager
def channels():
    """The two ends of a conversation."""
    a_reads, b_writes = os.pipe()
    b_reads, a_writes = os.pipe()
    first, second = Channel(a_reads, a_writes), Channel(b_reads, b_writes)
    try:
        yield first, second
    finally:
        first.close()
        second.close()


def sent(message, **limits):
    """What the other side receives of a message."""
    with channels() as (sender, receiver):
        thread = threading.Thread(target=sender.send, args=(message,))
        thread.start()
        received = receiver.receive(**limits)
        thread.join()
    return received


def received(content, **limits):
    """What is made of these bytes, after which the other side closes its end."""
    readable, writable = os.pipe()
    _, other = os.pipe()
    channel = Channel(readable, other)

    def write():
        with os.fdopen(writable, "wb") as stream:
            stream.write(content)

    thread = threading.Thread(target=write)
    thread.start()
    try:
        return channel.receive(**limits)
    finally:
        thread.join()
        channel.close()


def framed(header, *rest):
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    return b"".join([len(content).to_bytes(8, "little"), content, *rest])


def npy(header, data=b""):
    """An .npy file with any text as its header."""
    content = header.encode()
    return b"\x93NUMPY\x01\x00" + len(content).to_bytes(2, "little") + content + data


def described(descr="<f4", order=False, shape=(2,)):
    return repr({"descr": descr, "fortran_order": order, "shape": shape})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)
DTYPES = st.one_of(
    npst.boolean_dtypes(),
    npst.integer_dtypes(endianness="="),
    npst.unsigned_integer_dtypes(endianness="="),
    npst.floating_dtypes(endianness="=", sizes=(16, 32, 64)),
    npst.complex_number_dtypes(endianness="=", sizes=(64, 128)),
)
ARRAYS = npst.arrays(DTYPES, npst.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5))
LAYOUTS = {
    "as it is": lambda array: array,
    "fortran": np.asfortranarray,
    "transposed": lambda array: array.T,
    "reversed": lambda array: array[::-1] if array.ndim else array,
    "every second": lambda array: array[..., ::2] if array.ndim else array,
    "read-only": lambda array: (
        np.frombuffer(array.tobytes(), array.dtype).reshape(array.shape) if array.size else array
    ),
}


@given(
    st.dictionaries(st.text(), JSON, max_size=3),
    st.lists(st.tuples(ARRAYS, st.sampled_from(sorted(LAYOUTS))), max_size=3),
)
@settings(deadline=None, derandomize=True)
def test_what_is_sent_is_received(fields, arrays):
    arrays = [LAYOUTS[layout](array) for array, layout in arrays]
    message = sent(Message(fields, arrays), max_bytes=1 << 20)
    assert message.fields == fields
    assert len(message.arrays) == len(arrays)
    for found, wanted in zip(message.arrays, arrays, strict=True):
        assert found.dtype == wanted.dtype
        assert found.shape == wanted.shape
        assert found.tobytes() == wanted.tobytes()  # NaN and signed zeros, too
        found[...] = 0  # it can be written to


def test_more_than_a_pipe_holds():
    arrays = [np.random.default_rng(0).standard_normal((1 << 20, 3)), np.zeros(0, np.int8)]
    message = sent(Message({"x" * 100_000: 1}, [arrays[0], arrays[0].T, arrays[1]]))
    assert np.array_equal(message.arrays[0], arrays[0])
    assert np.array_equal(message.arrays[1], arrays[0].T)
    assert message.arrays[1].flags.f_contiguous


def test_arrays_in_order_are_not_copied():
    array = np.ones((300, 200), np.float16)
    for same in (array, array.T, np.asfortranarray(array)):
        data = encoded(Message({}, [same]))[-1]
        assert np.shares_memory(np.frombuffer(data, np.uint8), same)


def test_paths_that_are_not_utf_8_pass():
    assert sent(Message({"path": "a\udcff"})).fields == {"path": "a\udcff"}


@pytest.mark.parametrize(
    "array",
    [
        np.array([{}], object),
        np.array(["a"]),
        np.array([b"a"]),
        np.zeros(2, ml_dtypes.bfloat16),
        np.zeros(2, ml_dtypes.float8_e5m2),
        np.zeros(2, ml_dtypes.float8_e4m3fn),
        np.zeros(2, ml_dtypes.int4),
        np.zeros(2, "M8[s]"),
        np.zeros(2, [("a", "<f4")]),
    ],
    ids=lambda array: str(array.dtype),
)
def test_other_types_are_not_sent(array):
    with pytest.raises(UnsendableError, match="an array of "):
        encoded(Message({}, [array]))


def test_a_header_that_is_too_long_is_not_sent():
    with pytest.raises(UnsendableError, match="names and options of 16777"):
        encoded(Message({"names": "x" * MAX_HEADER_BYTES}))


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (b"", "not the JSON expected"),
        (b"cos\nsystem\n(S'touch pwned'\ntR.", "not the JSON expected"),
        (b"\xff\xfe", "not the JSON expected"),
        (b"[" * 100_000, "not the JSON expected"),
        (b"1" * 100_000, "not the JSON expected"),
        (b"null", "not the JSON expected"),
        ([], "not the JSON expected"),
        ({"fields": {}}, "not the JSON expected"),
        ({"fields": [], "arrays": []}, "not the JSON expected"),
        ({"fields": {}, "arrays": {}}, "not the JSON expected"),
        ({"fields": {}, "arrays": [-1]}, "lengths that are not numbers"),
        ({"fields": {}, "arrays": [1.5]}, "lengths that are not numbers"),
        ({"fields": {}, "arrays": [True]}, "lengths that are not numbers"),
        ({"fields": {}, "arrays": ["9"]}, "lengths that are not numbers"),
        ({"fields": {}, "arrays": [10**30]}, f"arrays of {10**30} bytes"),
        ({"fields": {}, "arrays": [600, 600]}, "arrays of 1200 bytes"),
        ({"fields": {}, "arrays": [9]}, "an array in 9 bytes"),
    ],
)
def test_headers_that_are_none(header, reason):
    with pytest.raises(MessageError, match=reason):
        received(framed(header), max_bytes=1000)


def test_a_length_that_is_none():
    with pytest.raises(MessageError, match="a header of 18446744073709551615 bytes"):
        received(b"\xff" * 100)


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        (b"\x80\x04pickle" * 10, "not an .npy file"),
        (b"\x93NUMPY\x02\x00" + bytes(100), "not an .npy file"),
        (b"\x93NUMPY\x01\x00\xff\xff", "not an .npy file"),
        (npy(""), "malformed header"),
        (npy("("), "malformed header"),
        (npy("(" * 9000), "malformed header"),
        (npy("-" * 9000 + "1"), "malformed header"),
        (npy("{" + " " * 20_000 + "}"), "malformed header"),
        (npy("__import__('os').system('touch pwned')"), "malformed header"),
        (npy("{'descr': '<f4'}"), "malformed header"),
        (npy(described(shape=(1 << 62, 1 << 62, 0))), "malformed header"),
        (npy(described(shape=(1,) * 100), bytes(4)), "malformed header"),
        (npy(described(shape=(-2,)), bytes(8)), "an array of float32"),
        (npy(described(shape=(-2, -1)), bytes(8)), "an array of float32"),
        (npy(described(shape=(1 << 40,)), bytes(8)), "an array of float32"),
        (npy(described(), bytes(7)), "an array of float32"),
        (npy(described(), bytes(9)), "an array of float32"),
        (npy(described("|O"), bytes(16)), "an array of object"),
        (npy(described("<U1"), bytes(8)), "an array of <U1"),
        (npy(described("|V4"), bytes(8)), r"an array of \|V4"),
        (npy(described([("a", "|O")]), bytes(16)), "an array of "),
    ],
)
def test_arrays_that_are_none(file, reason):
    with pytest.raises(MessageError, match=reason):
        received(framed({"fields": {}, "arrays": [len(file)]}, file))
    assert not Path("pwned").exists()


def test_what_is_cut_off():
    content = b"".join(encoded(Message({"a": 1}, [np.arange(5), np.ones((2, 2))])))
    assert received(content).fields == {"a": 1}
    for length in range(len(content)):
        with pytest.raises(EOFError):
            received(content[:length])


@given(st.binary(max_size=200))
@settings(deadline=None, derandomize=True)
def test_garbage(content):
    with pytest.raises((MessageError, EOFError)):
        received(content, max_bytes=1000)


@given(st.data())
@settings(deadline=None, derandomize=True)
def test_a_message_with_a_few_bytes_changed(data):
    content = bytearray(b"".join(encoded(Message({"a": [1]}, [np.arange(5, dtype=np.int16)]))))
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        message = received(bytes(content), max_bytes=1000)
    except (MessageError, EOFError):
        return
    assert type(message.fields) is dict
    assert all(array.nbytes < 1000 for array in message.arrays)


@pytest.mark.parametrize("length", [0, 4, 8, 20, 100])
def test_half_a_message_and_then_nothing(length):
    content = b"".join(encoded(Message({"a": 1}, [np.arange(5)])))[:length]
    readable, writable = os.pipe()
    _, other = os.pipe()
    channel = Channel(readable, other)
    os.write(writable, content)
    started = time.monotonic()
    with pytest.raises(TimeoutError):
        channel.receive(deadline=started + 0.2)
    assert 0.2 <= time.monotonic() - started < 5
    channel.close()
    os.close(writable)


def test_a_receiver_that_does_not_read():
    with channels() as (sender, _), pytest.raises(TimeoutError):
        sender.send(Message({}, [np.ones(1 << 22)]), deadline=time.monotonic() + 0.2)


# --- outputs


def test_outputs_of_numbers_and_strings():
    values = [
        np.float16([[1, 2]]),
        np.array([["a", "ß\0"], ["", "c" * 1000]], object),
        np.array(True),
        np.zeros((0, 3), object),
        np.array("word", object),
    ]
    message = sent(outputs_message(list("abcde"), values))
    found = outputs_of(message, 5)
    for array, wanted in zip(found, values, strict=True):
        assert array.dtype == wanted.dtype
        assert array.shape == wanted.shape
        assert np.array_equal(array, wanted)


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ([np.ones(2)], "is a sequence"),
        ([{1: 0.5}], "is a sequence"),
        ({1: 0.5}, "is a map"),
        (None, "is an absent optional"),
        (np.array([b"a", None], object), "holds object"),
        (np.zeros(2, ml_dtypes.bfloat16), "holds bfloat16"),
    ],
)
def test_outputs_that_are_no_tensors(value, found):
    with pytest.raises(UnsendableError, match=f"output 'y' {found}; allowed: "):
        outputs_message(["x", "y"], [np.ones(2), value])


@pytest.mark.parametrize(
    "strings",
    [
        None,
        [],
        {"0": {}},
        {"0": []},
        {"0": {"shape": [2], "values": ["a"]}},
        {"0": {"shape": [1], "values": [1]}},
        {"0": {"shape": ["x"], "values": ["a"]}},
        {"0": {"shape": [1], "values": 5}},
        {"7": {"shape": [1], "values": ["a"]}},
    ],
)
def test_outputs_that_are_malformed(strings):
    with pytest.raises(MessageError, match="outputs"):
        outputs_of(Message({"strings": strings}, [np.ones(1)]), 2)


def test_nothing_here_can_open_a_pickle():
    for module in MODULES:
        tree = ast.parse((Path(messages.__file__).parent / module).read_text())
        names = set()
        for found in ast.walk(tree):
            if isinstance(found, ast.Import):
                names |= {alias.name for alias in found.names}
            elif isinstance(found, ast.ImportFrom):
                names |= {found.module or "", *(f"{found.module}.{a.name}" for a in found.names)}
        roots = {name.split(".")[0] for name in names}
        assert not roots & {"pickle", "multiprocessing", "marshal", "shelve", "dill"}
        assert "load" not in {
            node.attr
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "np"
        }
