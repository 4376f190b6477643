"""What is in a written graph: the codes of a weight, and what they stand for."""

import numpy as np
import onnx
from onnx import numpy_helper

from flipguard_onnx.graph.traversal import attribute


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
