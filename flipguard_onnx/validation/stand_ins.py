"""Files with operators that onnxruntime has no kernel for, in a form that it runs."""

from functools import reduce
from operator import mul
from pathlib import Path

import numpy as np
from onnx import NodeProto, TensorProto, numpy_helper

from ..calibration.samples import Array
from ..graph.traversal import attribute, graphs
from ..io.model import Model, is_detached, open_model
from ..io.writer import Output
from ..quantization.arrays import raw_bytes


def stand_in(path: Path, folder: Path) -> Path:
    """A file that computes what the one at `path` does, and that onnxruntime runs.

    Weights that a DequantizeLinear decodes from 4-bit floats are decoded by onnx, and stored as
    float32. Without such weights it is the file itself; else one in the new `folder`.
    """
    model = open_model(path, digests=False)
    output = None
    for body in graphs(model.proto):
        constants = {tensor.name: tensor for tensor in body.initializer}
        makers = {name: node for node in body.node for name in node.output}
        for node in body.node:
            codes = constants.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
            if codes is None or not _is_float4(codes):
                continue
            output = output or Output(folder, folder / "stand-in.onnx", external=True)
            maker = makers.get(node.input[1])  # of scales that are codes themselves
            scales = [model.array(constants[x]) for x in (maker.input if maker else node.input[1:])]
            values = _decoded(model, node, codes, reduce(mul, scales))
            name, shape = codes.name, list(codes.dims)
            codes.CopyFrom(TensorProto(name=name, dims=shape, data_type=TensorProto.FLOAT))
            output.store(codes, raw_bytes(values))
            node.CopyFrom(NodeProto(op_type="Identity", name=node.name, output=node.output))
            node.input.append(name)
    if output is None:
        return path
    output.save(model.proto, model)
    return output.path


def _is_float4(tensor: TensorProto) -> bool:
    kind: int = tensor.data_type
    return kind == TensorProto.FLOAT4E2M1


def _decoded(model: Model, node: NodeProto, codes: TensorProto, scales: Array) -> Array:
    """What a DequantizeLinear in blocks yields for constants."""
    axis, size = attribute(node, "axis", 1), attribute(node, "block_size", 0)
    scales = np.repeat(scales, size, axis)
    scales = scales.take(range(codes.dims[axis]), axis)
    whole = codes
    if is_detached(codes):
        whole = TensorProto(dims=codes.dims, data_type=codes.data_type)
        whole.raw_data = bytes(model.raw(codes))
    return numpy_helper.to_array(whole).astype(np.float32) * scales
