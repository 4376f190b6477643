"""The child process: what it returns, how it ends, and what its answers cannot do."""

import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper

from flipguard_onnx import ModelError, ValidationError
from flipguard_onnx.errors import RunError
from flipguard_onnx.runtime import (
    Child,
    Limits,
    RemoteError,
    converted,
    open_session,
    require_openable,
)
from flipguard_onnx.runtime.messages import Message, encoded
from tests.helpers.hostile import MATRIX, inside_a_loop, written
from tests.helpers.samples import F, matmul, model, node, save, weights

X = {"x": np.ones((2, 64), np.float32)}


@pytest.fixture(scope="module")
def shared():
    child = Child()
    yield child
    child.close()


@pytest.fixture
def child(shared):
    shared.limits = Limits()
    return shared


@pytest.fixture(scope="module")
def shared_hijacked():
    child = Child(worker="tests.helpers.bad_worker")
    yield child
    child.close()


@pytest.fixture
def hijacked(shared_hijacked):
    shared_hijacked.limits = Limits()
    told(shared_hijacked, Message({"status": "done"}))  # it has started
    return shared_hijacked


def told(child, answer, then="", read=lambda answer: answer):
    """Ask for an answer: a message, or bytes."""
    content = answer if isinstance(answer, bytes) else b"".join(encoded(answer))
    return child.ask("x", {"answer": content.hex(), "then": then}, 0, read)


# --- results


@pytest.mark.parametrize(
    "kind",
    [
        *("FLOAT", "FLOAT16", "DOUBLE", "BOOL", "INT8", "INT16", "INT32", "INT64"),
        *("UINT8", "UINT16", "UINT32", "UINT64"),
    ],
)
@pytest.mark.parametrize("shape", [(), (0, 3), (2, 3)])
def test_inputs_and_outputs_of_every_type(tmp_path, child, kind, shape):
    elem_type = getattr(TensorProto, kind)
    dtype = helper.tensor_dtype_to_np_dtype(elem_type)
    proto = model([node("Identity", "x", "y")], {"x": (elem_type, None)}, {"y": (elem_type, None)})
    session = open_session(save(proto, tmp_path), True, 0, child)
    value = np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(dtype)
    for array in (value, np.array(value, order="F")):
        (found,) = session.run(None, {"x": array})
        assert found.dtype == dtype
        assert found.shape == shape
        assert np.array_equal(found, value)


def test_strings_are_returned(tmp_path, child):
    proto = model(
        [node("Identity", "s", "y")], {}, {"y": (TensorProto.STRING, None)}, {"c": weights(MATRIX)}
    )
    values = [b"a", "ß".encode()]
    proto.graph.initializer.append(helper.make_tensor("s", TensorProto.STRING, [2, 1], values))
    (found,) = open_session(save(proto, tmp_path), True, 0, child).run(None, {})
    assert found.tolist() == [["a"], ["ß"]]


def test_a_sequence_is_refused_by_name(tmp_path, child):
    proto = model([node("SequenceConstruct", "x", "y")], {"x": (F, [2])}, {"y": (F, None)})
    value = helper.make_tensor_sequence_value_info("y", F, None)
    proto.graph.output[0].CopyFrom(value)
    session = open_session(save(proto, tmp_path), True, 0, child)
    with pytest.raises(ValidationError, match="output 'y' is a sequence; allowed: tensors") as info:
        session.run(None, {"x": np.ones(2, np.float32)})
    assert not isinstance(info.value, RunError)
    assert session.outputs == ["y"]
    with pytest.raises(ValidationError, match="is a sequence"):  # the session is still there
        session.run(["y"], {"x": np.ones(2, np.float32)})


def test_a_feed_that_cannot_be_sent_costs_no_session(tmp_path, child):
    session = open_session(save(matmul(MATRIX), tmp_path), True, 0, child)
    with pytest.raises(ValidationError, match=r"model\.onnx: cannot be run: an array of object"):
        session.run(None, {"x": np.array([{}], object)})
    assert session.run(None, X)[0].shape == (2, 64)


def test_a_refusal_of_onnxruntime(tmp_path, child):
    session = open_session(save(matmul(MATRIX), tmp_path), True, 0, child)
    with pytest.raises(RunError, match="x"):
        session.run(None, {"x": np.ones((2, 63), np.float32)})
    with pytest.raises(RemoteError):
        converted(matmul(MATRIX), 9999)


def test_an_output_stays_to_be_the_input_of_the_next_run(tmp_path, child):
    shape = (F, ["n"])
    proto = model(
        [node("Add", "x before", "y"), node("Add", "y y", "after")],
        {"x": shape, "before": shape},
        {"y": shape, "after": shape},
    )
    session = open_session(save(proto, tmp_path), True, 0, child)

    def go_on(**feed):
        arrays = {name: np.array([value], np.float32) for name, value in feed.items()}
        (y,) = session.go_on(["y"], arrays, {"after": "before"})
        return y.tolist()

    assert go_on(x=1, before=3) == [4]
    assert go_on(x=1) == [9]
    assert go_on(x=1) == [19]
    assert go_on(x=1, before=0) == [1]
    session.run(None, {"x": np.ones(1, np.float32), "before": np.ones(1, np.float32)})
    with pytest.raises(RunError, match="before"):
        go_on(x=1)  # what was left is gone


def test_sessions_that_nobody_holds_are_forgotten(tmp_path):
    child = Child()
    path = save(matmul(MATRIX), tmp_path)
    first = open_session(path, True, 0, child)
    del first
    second = open_session(path, True, 0, child)
    assert child.forgotten == []
    del second
    assert child.forgotten == [(child.life, 1)], "the number of the first is free again"
    child.close()


def test_a_path_that_is_not_utf_8():
    with pytest.raises(ModelError, match="a\udcff: onnxruntime opens no path") as info:
        require_openable(Path("a\udcff"))
    assert info.value.allowed.startswith("another name")


# --- ends


def test_a_crash_is_one_line_and_the_next_model_runs(tmp_path, child):
    """The child is killed in the middle of its work, as a crash would do it."""
    session = open_session(written(inside_a_loop(1 << 62), tmp_path), True, 0, child)
    threading.Timer(0.3, os.kill, (child.pid, 11)).start()
    with pytest.raises(ValidationError, match=r"model\.onnx: crashes onnxruntime \(SIGSEGV\)"):
        session.run(None, X)
    with pytest.raises(ValidationError, match=r"model\.onnx: is gone"):
        session.run(None, X)
    path = save(matmul(MATRIX), tmp_path, "sound.onnx")
    assert open_session(path, True, 0, child).run(None, X)[0].shape == (2, 64)


def test_a_run_that_never_ends_is_stopped(tmp_path, child):
    session = open_session(written(inside_a_loop(1 << 62), tmp_path), True, 0, child)
    child.limits = Limits(seconds=0.5)
    started = time.monotonic()
    with pytest.raises(ValidationError, match=r"takes longer than 0 s; stopped") as info:
        session.run(None, X)
    assert time.monotonic() - started < 30
    assert info.value.path == "model.onnx"
    assert child.pid is None


def test_memory_is_limited_for_one_request_only(tmp_path, child):
    path = save(matmul(MATRIX), tmp_path)
    session = open_session(path, True, 0, child)
    child.limits = Limits(memory=1 << 20)
    with pytest.raises(ValidationError):
        session.run(None, {"x": np.ones((1 << 16, 64), np.float32)})
    child.limits = Limits()
    assert open_session(path, True, 0, child).run(None, X)[0].shape == (2, 64)


def test_time_and_memory_grow_with_the_model():
    limits = Limits(seconds=1, bytes_per_second=10, memory=100, memory_per_byte=3)
    assert limits.seconds_for(50) == 6
    assert limits.memory_for(50) == 250
    assert Limits(memory=1 << 60).memory_for(0) < 1 << 60, "no more than the machine has"


# --- answers of a hijacked child


@pytest.mark.parametrize(
    "answer",
    [
        b"\xff" * 100,
        b"\x80\x04\x95cos\nsystem\n(S'touch pwned'\ntR." + bytes(100),
        (4).to_bytes(8, "little") + b"null",
        Message({}),
        Message({"status": "fine"}),
        Message({"status": "failed"}),
        Message({"status": ["failed"], "problem": "x"}),
        Message({"status": "failed", "problem": {"x": 1}}),
    ],
)
def test_a_malformed_answer_ends_the_child(hijacked, answer):
    with pytest.raises(ValidationError, match="its process gave a malformed answer: ") as info:
        told(hijacked, answer)
    assert "\n" not in str(info.value)
    assert hijacked.pid is None
    assert told(hijacked, Message({"status": "done", "a": 1})).fields["a"] == 1, "a new one"


def test_an_answer_larger_than_the_memory_granted(hijacked):
    hijacked.limits = Limits(memory=1000)
    with pytest.raises(ValidationError, match="malformed answer: arrays of 1088 bytes"):
        told(hijacked, Message({"status": "done"}, [np.zeros(120)]))


@pytest.mark.parametrize("length", [0, 5, 20, 100])
def test_half_an_answer_and_then_nothing(hijacked, length):
    content = b"".join(encoded(Message({"status": "done"}, [np.ones(10)])))[:length]
    hijacked.limits = Limits(seconds=0.3)
    with pytest.raises(ValidationError, match="takes longer than 0 s; stopped"):
        told(hijacked, content, then="hang")
    assert hijacked.pid is None


@pytest.mark.parametrize("length", [0, 5, 20, 100])
def test_half_an_answer_and_then_the_end(hijacked, length):
    content = b"".join(encoded(Message({"status": "done"}, [np.ones(10)])))[:length]
    with pytest.raises(ValidationError, match=r"crashes onnxruntime \(exit code 3\)"):
        told(hijacked, content, then="exit")


def test_an_interrupt_leaves_no_answer_for_the_next_request(hijacked):
    def interrupted(answer):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        told(hijacked, Message({"status": "done"}), read=interrupted)
    assert hijacked.pid is None
