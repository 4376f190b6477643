"""Single layers of a model that is too large to run, as a small model of their own.

A layer is a node with a weight, and the nodes and constants that lead to it. It is cut out of the
original and, by the same names, out of each model that was written; the small models are then
run and compared as whole ones are.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper

from ..emit.weight_forms import Target, form_of
from ..errors import ValidationError
from ..graph.operands import Operand
from ..graph.operators import WeightForm
from ..graph.weights import Weight
from ..io.model import Model, open_model
from ..io.writer import Output
from ..quantization.schemes import Scheme

MAX_WEIGHTS = 1 << 26  # in all layers together, unless the smallest of each kind have more

LAYERS_PER_KIND = 3

Origin = NodeProto | TensorProto  # what a value comes from


@dataclass(frozen=True)
class Layer:
    """What to cut out: all that leads from the value `input` to the value `output`.

    Attributes
    ----------
    input, input_type, shape : the value that becomes the input of the small model
    output, output_type, output_rank : the value that becomes its output
    """

    input: str
    input_type: int
    shape: tuple[int, ...]
    output: str
    output_type: int
    output_rank: int


def sample(
    source: Model, weights: Sequence[Weight], schemes: Sequence[Scheme], target: Target
) -> list[Layer]:
    """Some layers of every kind (operator, scheme, form in which the codes are written).

    Parameters
    ----------
    source : the original
    weights, schemes : its weights, and the scheme of each
    target : what the models are written for

    Raises
    ------
    ValidationError : no layer can be run alone
    """
    kinds: dict[tuple[str, str, WeightForm], list[tuple[Weight, Layer]]] = defaultdict(list)
    origins = _origins(source.proto.graph)
    for weight, scheme in zip(weights, schemes, strict=True):
        layer = _layer(source.proto.graph, weight, origins)
        if layer:
            form = form_of(weight.uses[0], weight, scheme, target)
            kinds[weight.uses[0].op, scheme.name, form].append((weight, layer))
    chosen = {}
    for found in kinds.values():
        weight, layer = min(found, key=lambda pair: pair[0].size)
        chosen[weight.name] = weight.size, layer
    for found in kinds.values():
        for weight, layer in found[:: max(len(found) // LAYERS_PER_KIND, 1)][:LAYERS_PER_KIND]:
            if sum(size for size, _ in chosen.values()) + weight.size <= MAX_WEIGHTS:
                chosen[weight.name] = weight.size, layer
    if not chosen:
        raise ValidationError(
            "cannot be compared as a whole, and no layer of it can be run alone; "
            "give it more with --max-memory if it is too large, or --no-validate",
            path=source.path,
        )
    return [layer for _, layer in chosen.values()]


def cut_out(model: Model, layers: Iterable[Layer], folder: Path) -> Model:
    """A model of these layers side by side, written into a new folder.

    Raises
    ------
    ValidationError : the model does not have the values that a layer needs
    """
    proto = ModelProto()
    proto.CopyFrom(model.proto)
    graph, origins = proto.graph, _origins(model.proto.graph)
    nodes: dict[int, NodeProto] = {}
    constants: dict[str, TensorProto] = {}
    del graph.input[:], graph.output[:], graph.value_info[:]
    for number, layer in enumerate(layers):
        fed = f"flipguard.input.{number}"
        graph.input.append(helper.make_tensor_value_info(fed, layer.input_type, layer.shape))
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
                copy.input[:] = [fed if name == layer.input else name for name in part.input]
            else:
                raise ValidationError("value {found!r} is not there", found=part, path=model.path)
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
    if len(weight.uses) > 1 or not use.direct or not use.operator or use.scope.body is not graph:
        return None
    if weight.name != weight.tensor_name:
        return None
    if use.elem_type == TensorProto.BFLOAT16:  # onnxruntime does not take it from numpy
        return None
    operand = Operand(use.node, use.index, tuple(weight.shape[axis] for axis in use.perm))
    varying = use.operator.layer_input(operand)
    if varying is None:
        return None
    name, output = use.node.input[varying.index], use.node.output[0]
    for part in _leading_to(output, name, origins):
        if isinstance(part, str):
            return None
        if isinstance(part, TensorProto) and len(part.dims) > 1 and part is not weight.tensor:
            return None
    input_type = varying.elem_type or use.elem_type
    return Layer(name, input_type, varying.shape, output, use.elem_type, varying.output_rank)


def _origins(graph: GraphProto) -> dict[str, Origin]:
    """By name of a value: the node or initializer it comes from; graph inputs are left out."""
    origins: dict[str, Origin] = {tensor.name: tensor for tensor in graph.initializer}
    return origins | {name: node for node in graph.node for name in node.output}


def _leading_to(output: str, fed: str, origins: dict[str, Origin]) -> Iterator[Origin | str]:
    """The nodes and constants from which `output` is computed when the value `fed` is there.

    Yields the name of a value that is neither, a graph input.
    """
    pending, seen = [output], {"", fed}
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
