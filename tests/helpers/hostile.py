"""Models that are wrong in one way, and what the command line must do with them."""

import numpy as np
import onnx
from onnx import TensorProto, helper

from tests.helpers.command import call
from tests.helpers.samples import SAMPLES, F, matmul, model, node, save, weights

MATRIX = (64, 64)


def refused(path, *arguments, code=2):
    """The message of a run that is refused; nothing but the input may be left in its folder."""
    before = files(path.parent)
    result = call(path, *arguments)
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code == code, result.output
    assert files(path.parent) == before
    return one_line(result)


def files(folder):
    found = ((path, path.lstat()) for path in folder.rglob("*"))
    return {path: (s.st_ino, s.st_mode, s.st_size, s.st_mtime_ns) for path, s in found}


def one_line(result):
    """The one line of an error, stages of progress aside."""
    lines = [line for line in result.stderr.splitlines() if not line.endswith(" ...")]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("flipguard-onnx: ")
    assert lines[0].isprintable()
    return lines[0]


def written(proto, folder):
    path = folder / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    return path


def external(folder, **entries):
    """A model whose weight is in model.onnx.data, with entries of its reference replaced."""
    path = save(matmul(MATRIX), folder, external=True)
    proto = onnx.load(path, load_external_data=False)
    tensor = proto.graph.initializer[0]
    kept = {e.key: e.value for e in tensor.external_data} | entries
    del tensor.external_data[:]
    for key, value in kept.items():
        tensor.external_data.add(key=key, value=value)
    path.write_bytes(proto.SerializeToString())
    return path


def changed(change, proto=None):
    proto = proto or SAMPLES["nested"]()
    change(proto)
    return proto


def shape(*dims):
    def change(proto):
        tensor = proto.graph.initializer[0]
        del tensor.dims[:]
        tensor.dims.extend(dims)

    return change


def emptied(*dims):
    def change(proto):
        shape(*dims)(proto)
        proto.graph.initializer[0].ClearField("raw_data")

    return change


def inside_a_loop(times, body_nodes=()):
    """A MatMul, and a Loop of so many rounds beside it."""
    body = helper.make_graph(
        [node("Identity", "go_in", "go"), *body_nodes, node("Identity", "v_in", "v")],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("go_in", TensorProto.BOOL, []),
            helper.make_tensor_value_info("v_in", F, None),
        ],
        [
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("v", F, None),
        ],
    )
    return model(
        [node("MatMul", "x w", "h"), node("Loop", "times yes h", "y", body=body)],
        {"x": (F, [2, 64])},
        {"y": (F, [2, 64])},
        {"w": weights(MATRIX), "times": np.array(times), "yes": np.array(True)},
    )


def length_prefixed(number, content):
    """A protobuf field that holds bytes or a message."""
    size, prefix = len(content), bytearray([number << 3 | 2])
    while size > 127:
        prefix.append(size & 127 | 128)
        size >>= 7
    return bytes(prefix) + bytes([size]) + content
