"""Single layers of a model that is too large to run, as a small model of their own.

A layer is an operator with a weight, and whatever leads from constants to it. It is cut out of the
original and out of what was written under the same names, so that the two run, and are compared,
as whole models are.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper

from ..emit.weight_forms import form_of
from ..errors import ValidationError
from ..graph.operators import DATA
from ..graph.scopes import Use
from ..graph.traversal import attribute
from ..graph.weights import Weight
from ..io.model import Model, open_model
from ..io.writer import Output
from ..quantization.schemes import Scheme

WEIGHTS = 1 << 26  # in all layers together; more only where the smallest of a kind is larger

EACH = 3  # layers of a kind

ROWS = 16  # of inputs for a layer

PLACES = 3  # beyond the reach of a convolution's kernel, along every axis

Origin = NodeProto | TensorProto


@dataclass(frozen=True)
class Layer:
    """What to cut out: from `input`, which is given values of that type and shape, to `output`."""

    input: str
    input_type: int
    shape: tuple[int, ...]
    output: str
    output_type: int
    output_rank: int


def sample(
    source: Model, weights: Sequence[Weight], schemes: Sequence[Scheme], standard_ops: bool
) -> list[Layer]:
    """Some layers of every kind (operator, scheme, form in which the codes are written).

    Raises ValidationError when no layer can be run alone.
    """
    kinds: dict[tuple[str, str, str], list[tuple[Weight, Layer]]] = defaultdict(list)
    origins = _origins(source.proto.graph)
    for weight, scheme in zip(weights, schemes, strict=True):
        layer = _layer(source.proto.graph, weight, origins)
        if layer:
            form = form_of(weight.uses[0], weight, scheme, standard_ops)
            kinds[weight.uses[0].op, scheme.name, form].append((weight, layer))
    chosen = {}
    for found in kinds.values():
        weight, layer = min(found, key=lambda pair: pair[0].size)
        chosen[weight.name] = weight.size, layer
    for found in kinds.values():
        for weight, layer in found[:: max(len(found) // EACH, 1)][:EACH]:
            if sum(size for size, _ in chosen.values()) + weight.size <= WEIGHTS:
                chosen[weight.name] = weight.size, layer
    if not chosen:
        raise ValidationError(
            f"{source.path}: too large to run whole, and no layer of it can be run alone; "
            "give it more with --max-memory, or --no-validate"
        )
    return [layer for _, layer in chosen.values()]


def cut_out(model: Model, layers: Iterable[Layer], folder: Path) -> Model:
    """A model of these layers side by side, written into a new folder.

    Raises ValidationError when the model does not have them.
    """
    proto = ModelProto()
    proto.CopyFrom(model.proto)
    graph, origins = proto.graph, _origins(model.proto.graph)
    nodes: dict[int, NodeProto] = {}
    constants: dict[str, TensorProto] = {}
    del graph.input[:], graph.output[:], graph.value_info[:]
    for number, layer in enumerate(layers):
        given = f"flipguard.input.{number}"
        graph.input.append(helper.make_tensor_value_info(given, layer.input_type, layer.shape))
        open_dims = [None] * layer.output_rank
        graph.output.append(
            helper.make_tensor_value_info(layer.output, layer.output_type, open_dims)
        )
        for part in _leading_to(layer.output, layer.input, origins):
            if isinstance(part, TensorProto):
                constants[part.name] = part
            elif isinstance(part, NodeProto):
                nodes[id(part)] = copy = NodeProto()
                copy.CopyFrom(part)
                copy.input[:] = [given if name == layer.input else name for name in part.input]
            else:
                raise ValidationError(f"{model.path}: value {part!r} is not there")
    ordered = [nodes[id(node)] for node in model.proto.graph.node if id(node) in nodes]
    graph.input.extend(value for value in model.proto.graph.input if value.name in constants)
    del graph.node[:], graph.initializer[:]
    graph.node.extend(ordered)
    graph.initializer.extend(constants.values())
    output = Output(folder, folder / "layers.onnx", external=True)
    output.save(proto, model)
    return open_model(output.path, digests=False)


def _layer(graph: GraphProto, weight: Weight, origins: dict[str, Origin]) -> Layer | None:
    """The layer of a weight with a single reader, where one input varies and no other is large."""
    use = weight.uses[0]
    if len(weight.uses) > 1 or not use.direct or use.op not in DATA or use.scope.body is not graph:
        return None
    if weight.name != weight.tensor_name:
        return None
    if use.elem_type == TensorProto.BFLOAT16:  # onnxruntime does not take it from numpy
        return None
    given = use.node.input[1 - use.index if use.op == "MatMul" else DATA[use.op]]
    for part in _leading_to(use.node.output[0], given, origins):
        if isinstance(part, str):
            return None
        if isinstance(part, TensorProto) and len(part.dims) > 1 and part is not weight.tensor:
            return None
    input_type = TensorProto.INT64 if use.op == "Gather" else use.elem_type
    shape, output = _shape(use, weight), use.node.output[0]
    rank = len(weight.shape) if use.op == "Gather" else len(shape)
    return Layer(given, input_type, shape, output, use.elem_type, rank)


def _shape(use: Use, weight: Weight) -> tuple[int, ...]:
    """That of an input for the operator."""
    dims = tuple(weight.shape[axis] for axis in use.perm)
    node = use.node
    if use.op == "Gather":
        return (ROWS,)
    if use.op == "MatMul":
        batch, last = dims[:-2], (ROWS, dims[-2]) if use.index else (dims[-1], ROWS)
        return (*batch, *last)
    if use.op == "Gemm":
        inner = dims[1] if attribute(node, "transB", 0) else dims[0]
        return (inner, ROWS) if attribute(node, "transA", 0) else (ROWS, inner)
    kernel = dims[2:]
    dilations = attribute(node, "dilations", (1,) * len(kernel))
    places = (d * (k - 1) + 1 + PLACES for d, k in zip(dilations, kernel, strict=True))
    channels = dims[0] if use.op == "ConvTranspose" else dims[1] * attribute(node, "group", 1)
    return (1, channels, *places)


def _origins(graph: GraphProto) -> dict[str, Origin]:
    """What every value of a graph comes from, its inputs aside."""
    origins: dict[str, Origin] = {tensor.name: tensor for tensor in graph.initializer}
    return origins | {name: node for node in graph.node for name in node.output}


def _leading_to(output: str, given: str, origins: dict[str, Origin]) -> Iterator[Origin | str]:
    """The nodes and constants from which `output` is computed, once `given` is there.

    A name stands for a value that is neither.
    """
    pending, seen = [output], {"", given}
    while pending:
        name = pending.pop()
        if name in seen:
            continue
        seen.add(name)
        origin = origins.get(name)
        yield name if origin is None else origin
        if isinstance(origin, NodeProto):
            seen.update(origin.output)
            pending.extend(origin.input)
