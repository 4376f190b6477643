"""What is in a written graph: the codes of a weight, and what they stand for."""

import numpy as np
import onnx
import onnxruntime
from onnx import numpy_helper

from flipguard_onnx.graph.traversal import attribute
from tests.helpers import naive


def initializers(path):
    """Every initializer of a file's main graph by name."""
    return {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}


def decoded(path, weight):
    """What the codes of a weight stand for, as the weight was stored.

    Computed from the initializers here, not by the nodes over them; but a DequantizeLinear says
    along which axis its scales go.
    """
    constants = initializers(path)
    codes, scales = constants[f"{weight.name}_quantized"], constants[f"{weight.name}_scale"]
    scales = scales.astype(np.float32)
    node = next((n for n in onnx.load(path).graph.node if codes_of(n, weight)), None)
    if node is None and codes.dtype == np.int8:
        return codes.astype(np.float32) * scales
    book = constants.get(f"{weight.name}_codebook")
    values = codes.astype(np.float32) if book is None else book[codes.astype(int)]
    if node:
        axis = attribute(node, "axis", 1)
        if size := attribute(node, "block_size", 0):
            scales = np.repeat(scales, size, axis)
        elif scales.ndim:
            scales = np.expand_dims(scales, [a for a in range(codes.ndim) if a != axis])
        if codes.shape == weight.shape:
            return values * scales
    whole = weight.blocks(None, flat=book is not None)
    rows = (values * scales).reshape(whole.rows, -1)[:, : whole.cols]
    return weight.stored(np.ascontiguousarray(rows).reshape(-1))


def codes_of(node, weight):
    """Whether a node is a DequantizeLinear over the codes of this weight."""
    return node.op_type == "DequantizeLinear" and node.input[0] == f"{weight.name}_quantized"


def run(model, feed):
    """The first output of a model or a file."""
    content = model.SerializeToString() if isinstance(model, onnx.ModelProto) else str(model)
    return onnxruntime.InferenceSession(content).run(None, feed)[0]


def require_rounded(path, proto, feed, scheme, contracted, close, control):
    """What was written computes what the model does once its constant "w" is rounded plainly.

    contracted: as in naive.rounded. close: of the largest output, the largest difference; by more
    than `control` rounding changes something.
    """
    before = run(proto, feed)
    (w,) = (each for each in proto.graph.initializer if each.name == "w")
    decoded = naive.rounded(numpy_helper.to_array(w), scheme, *contracted)
    w.CopyFrom(numpy_helper.from_array(decoded, "w"))
    wanted = run(proto, feed)
    scale = np.abs(wanted).max()
    assert np.abs(run(path, feed) - wanted).max() < close * scale
    assert np.abs(before - wanted).max() > control * scale
