"""From torch to ONNX and back.

A layer is known by the values between which it stands in the float export. Whatever a quantizer
makes of it, its weight is what it does to unit vectors: so files in all forms are read alike.
"""

from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization.matmul_bnb4_quantizer import MatMulBnb4Quantizer
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
from onnxruntime.quantization.quantize import QuantFormat, QuantType, quantize_dynamic

from tools.attacks.measure import session
from tools.smollm.victim import EMBEDDING, HEAD, linears


@dataclass(frozen=True)
class Place:
    """A layer of a graph. width: how many unit vectors, or tokens, there are to feed."""

    given: str
    made: str
    initializer: str
    width: int


def places(export, model):
    """Where the layers of a torch model are in its float export, by name.

    Linear layers come in the same order in both. Head and embedding have one initializer.
    """
    graph = export.graph
    stored = {tensor.name for tensor in graph.initializer}
    found = [node for node in graph.node if node.op_type == "MatMul" and node.input[1] in stored]
    parts = linears(model)
    made = {
        name: Place(node.input[0], node.output[0], node.input[1], part.in_features)
        for (name, part), node in zip(parts.items(), found, strict=True)
    }
    logits = graph.output[0].name
    head = next(node for node in graph.node if logits in node.output)
    table = next(n for n in graph.node if n.op_type == "Gather" and n.input[0] in stored)
    tokens, width = model.model.embed_tokens.weight.shape
    return made | {
        HEAD: Place(head.input[0], logits, table.input[0], width),
        EMBEDDING: Place(table.input[1], table.output[0], table.input[0], tokens),
    }


def norms(written, model):
    """The initializers of the normalizations, by the names of their parameters."""
    names = [name for name, parameter in model.named_parameters() if parameter.ndim == 1]
    return {
        name: tensor
        for tensor in written.graph.initializer
        for name in names
        if tensor.name.endswith(name)
    }


def write(export, model, target):
    """A copy of a float export with the model's weights."""
    written = onnx.load(export)
    stored = {tensor.name: tensor for tensor in written.graph.initializer}
    found = places(written, model)
    for name, tensor in norms(written, model).items():
        values = model.get_parameter(name).detach().numpy()
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    for name, part in linears(model).items():
        tensor = stored[found[name].initializer]
        values = np.ascontiguousarray(part.weight.detach().numpy().T)
        if list(tensor.dims) != list(values.shape):
            raise ValueError(f"{tensor.name} has shape {list(tensor.dims)}, {name} {values.shape}")
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    save(written, target)


def save(model, target):
    """With its data in a file of its own."""
    target.parent.mkdir(parents=True, exist_ok=True)
    data = target.with_name(f"{target.name}.data")
    data.unlink(missing_ok=True)
    onnx.save(model, target, save_as_external_data=True, location=data.name)


def quantize(source, scheme, target):
    """What onnxruntime's own quantizer makes of a file, with its default options otherwise.

    The statistics of blocks are those of tools.attacks.quantizers.
    """
    if scheme == "int8":
        quantize_dynamic(
            source, target, weight_type=QuantType.QInt8, per_channel=True,
            op_types_to_quantize=["MatMul"], use_external_data_format=True,
        )  # fmt: skip
        return
    model = onnx.load(source)
    if scheme == "int4":
        worker = MatMulNBitsQuantizer(
            model, block_size=32, is_symmetric=True, quant_format=QuantFormat.QDQ
        )
    else:
        worker = MatMulBnb4Quantizer(model, quant_type=int(scheme == "nf4"), block_size=64)
    worker.process()
    save(worker.model.model, target)


def read(path, found, net):
    """Weights `[out, in]` by name, as a file computes with them, and those of the normalizations.

    found: `places` of the export, net: its model in torch
    """
    model = onnx.load(path)
    makers = {output: node for node in model.graph.node for output in node.output}
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    weights = {
        name: numpy_helper.to_array(tensor).copy() for name, tensor in norms(model, net).items()
    }
    for name, place in found.items():
        nodes, tensors = _between(place, makers, stored)
        if name == EMBEDDING:
            fed, kind = np.arange(place.width)[None], TensorProto.INT64
        else:
            fed, kind = np.eye(place.width, dtype=np.float32)[None], TensorProto.FLOAT
        graph = helper.make_graph(
            nodes,
            name,
            [helper.make_tensor_value_info(place.given, kind, fed.shape)],
            [helper.make_tensor_value_info(place.made, TensorProto.FLOAT, None)],
            tensors,
        )
        part = helper.make_model(
            graph, opset_imports=model.opset_import, ir_version=model.ir_version
        )
        (result,) = session(part).run(None, {place.given: fed})
        weights[name] = result[0] if name == EMBEDDING else np.ascontiguousarray(result[0].T)
    return weights


def _between(place, makers, stored):
    """The nodes that make one value of another and of constants, in order, and these constants."""
    nodes, tensors, waiting = {}, {}, [place.made]
    while waiting:
        name = waiting.pop()
        if name == place.given or not name:
            continue
        if name in stored:
            tensors[name] = stored[name]
        elif name in makers:
            node = makers[name]
            nodes[node.output[0]] = node
            waiting.extend(node.input)
        else:
            raise ValueError(f"{place.made} needs {name}, found between it and {place.given}")
    order = [node for key, node in makers.items() if key in nodes]
    return order, list(tensors.values())
