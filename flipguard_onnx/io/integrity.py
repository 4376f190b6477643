"""What a file must be before anything in it is believed: the model is taken for an attack.

Nothing here allocates by what the file says, only by what it holds. Every check is a function that
raises ModelError (UnsupportedModelError for what is legal but not handled here) with one line; the
caller puts the path before it.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from graphlib import CycleError, TopologicalSorter
from math import prod

import onnx
from google.protobuf.message import Message
from onnx import AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto, TensorProto

from ..errors import ModelError, UnsupportedModelError
from ..graph.operators import signature_of
from ..graph.traversal import subgraphs
from .external_data import PACKED, byte_size, elements, entry

MOST_RANK = 32  # axes; what numpy 1 can hold

MOST_EXPANDED = 1_000_000  # nodes when every call of a local function is expanded

DEEPEST_CALLS = 64  # local functions in one another

TYPED_DATA = ("float_data", "int32_data", "int64_data", "uint64_data", "double_data", "string_data")

HELD = {  # fields of an attribute, and the type that it then is
    "t": AttributeProto.TENSOR,
    "g": AttributeProto.GRAPH,
    "sparse_tensor": AttributeProto.SPARSE_TENSOR,
    "tensors": AttributeProto.TENSORS,
    "graphs": AttributeProto.GRAPHS,
    "sparse_tensors": AttributeProto.SPARSE_TENSORS,
}

SINGLE = ("t", "g", "sparse_tensor")

COMPLEX = (TensorProto.COMPLEX64, TensorProto.COMPLEX128)


def admit(proto: ModelProto, itself: str) -> None:
    """All that can be checked without the external data.

    itself: the location at which a tensor in `proto` has its raw_data, if it was taken out.
    """
    if not all(isinstance(text, str) for text in _texts(proto)):  # protobuf gives bytes instead
        raise ModelError("not an ONNX model (a name in it is not UTF-8)")
    if not proto.graph.node or not proto.opset_import:
        raise ModelError("not an ONNX model (no nodes, or no opset_import)")
    if proto.training_info:
        raise UnsupportedModelError("training information is not supported")
    _functions(proto.functions)
    _body(proto.graph, itself)
    for function in proto.functions:
        _body(function, itself)


def _body(body: GraphProto | FunctionProto, itself: str) -> None:
    if isinstance(body, GraphProto):
        if body.sparse_initializer:
            raise UnsupportedModelError("sparse initializers are not supported")
        for tensor in body.initializer:
            _tensor(tensor, itself)
    _defined_once(body)
    _acyclic(body)
    for node in body.node:
        _read(node)
        for attribute in node.attribute:
            _attribute(node, attribute, itself)


def _attribute(node: NodeProto, attribute: AttributeProto, itself: str) -> None:
    """What an attribute holds must be what it says it is, and stand these checks itself."""
    for field, kind in HELD.items():
        present = attribute.HasField(field) if field in SINGLE else len(getattr(attribute, field))
        if present and attribute.type != kind:
            says = AttributeProto.AttributeType.Name(attribute.type)
            raise ModelError(
                f"attribute {attribute.name!r} of {node.op_type} is {says}, but holds {field!r}"
            )
    if attribute.HasField("t"):
        _tensor(attribute.t, itself)
    sparse = list(attribute.sparse_tensors)
    if attribute.HasField("sparse_tensor"):
        sparse.append(attribute.sparse_tensor)
    for tensor in (*attribute.tensors, *(t for s in sparse for t in (s.values, s.indices))):
        _tensor(tensor, itself)
        if tensor.data_location == TensorProto.EXTERNAL and entry(tensor, "location") != itself:
            raise UnsupportedModelError(
                f"attribute {attribute.name!r} of {node.op_type} has external data; "
                "allowed: in initializers and single tensors"
            )
    for graph in subgraphs(attribute):
        _body(graph, itself)


def _tensor(tensor: TensorProto, itself: str) -> None:
    """The shape must be one that exists, and the data that is in the file must fill it."""
    name, dims = tensor.name, list(tensor.dims)
    try:
        kind = TensorProto.DataType.Name(tensor.data_type)
        field = onnx.helper.tensor_dtype_to_field(tensor.data_type)
    except (ValueError, KeyError):
        raise ModelError(
            f"tensor {name!r} has the type {tensor.data_type}, which does not exist"
        ) from None
    shown = dims[:8]
    if any(dim < 0 for dim in dims):
        raise ModelError(f"tensor {name!r} has the shape {shown}; allowed: sizes from 0 on")
    if len(dims) > MOST_RANK:
        raise ModelError(f"tensor {name!r} has {len(dims)} axes; allowed: up to {MOST_RANK}")
    if prod(max(dim, 1) for dim in dims) >= 1 << 58:
        raise ModelError(f"tensor {name!r} has the shape {shown}, which no memory can hold")
    if len({place.key for place in tensor.external_data}) < len(tensor.external_data):
        raise ModelError(f"tensor {name!r} says twice where its data is")
    taken_out = entry(tensor, "location") == itself
    raw = int(entry(tensor, "length")) if taken_out else len(tensor.raw_data)
    held = [f for f in TYPED_DATA if len(getattr(tensor, f))] + ["raw_data"] * bool(raw)
    if taken_out and tensor.raw_data:
        raise ModelError(f"tensor {name!r} has its values twice")
    if tensor.data_location == TensorProto.EXTERNAL and not taken_out:
        if held or field == "string_data":
            raise ModelError(f"tensor {name!r} of {kind} has external data and {held or 'strings'}")
        return
    if len(held) > 1 or held not in ([], ["raw_data"], [field]):
        raise ModelError(f"tensor {name!r} of {kind} has its values in {' and '.join(held)}")
    count = elements(tensor)
    if held == ["raw_data"]:
        needed, found, unit = byte_size(tensor), raw, "bytes"
        if field == "string_data":
            raise ModelError(f"tensor {name!r} of {kind} has its values in raw_data")
    else:
        bits = PACKED.get(tensor.data_type, 8)
        needed = count * 2 if tensor.data_type in COMPLEX else (count * bits + 7) // 8
        found, unit = len(getattr(tensor, field)), f"values in {field}"
    if needed != found:
        raise ModelError(
            f"tensor {name!r} of {kind} and shape {shown} needs {needed} {unit}; found: {found}"
        )


def _functions(functions: Sequence[FunctionProto]) -> None:
    """Local functions must not call themselves, nor grow beyond bounds when they are expanded."""
    calls = {(function.domain, function.name): Counter(_calls(function)) for function in functions}
    if len(calls) != len(functions):
        raise ModelError("two local functions have the same name")
    graph = {key: calls.keys() & called for key, called in calls.items()}
    try:
        order = list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        names = " -> ".join(name for _, name in error.args[1][:5])
        raise ModelError(f"local functions call themselves: {names}") from None
    size: dict[tuple[str, str], int] = {}
    depth: dict[tuple[str, str], int] = {}
    for key in order:
        called = [(callee, n) for callee, n in calls[key].items() if callee in calls]
        size[key] = sum(calls[key].values()) + sum(n * size[callee] for callee, n in called)
        depth[key] = 1 + max((depth[callee] for callee, _ in called), default=0)
        if size[key] > MOST_EXPANDED or depth[key] > DEEPEST_CALLS:
            raise UnsupportedModelError(
                f"local function {key[1]!r} expands to {size[key]} nodes at a depth of "
                f"{depth[key]}; allowed: {MOST_EXPANDED}, {DEEPEST_CALLS}"
            )


def _defined_once(body: GraphProto | FunctionProto) -> None:
    if isinstance(body, GraphProto):
        constants = Counter(tensor.name for tensor in body.initializer)
        inputs = Counter(value.name for value in body.input)
    else:
        constants, inputs = Counter[str](), Counter(body.input)
    if "" in constants or "" in inputs:
        raise ModelError("an initializer or an input has no name")
    made = Counter(name for node in body.node for name in node.output if name)
    # an initializer may stand beside the input of its name, as its default
    for defined in (constants + made, inputs + made):
        if twice := [name for name, count in defined.items() if count > 1]:
            raise ModelError(f"value {twice[0]!r} is defined more than once")


def _acyclic(body: GraphProto | FunctionProto) -> None:
    makers = {name: i for i, node in enumerate(body.node) for name in node.output if name}
    needs = {
        i: {makers[name] for name in _names_read(node) if name in makers}
        for i, node in enumerate(body.node)
    }
    try:
        TopologicalSorter(needs).prepare()
    except CycleError as error:
        node = body.node[error.args[1][0]]
        output = next(iter(node.output), "")
        raise ModelError(f"value {output!r} of {node.op_type} depends on itself") from None


def _names_read(node: NodeProto) -> set[str]:
    """What a node needs, and the graphs inside it need from around them."""
    names = set(node.input)
    for attribute in node.attribute:
        for graph in subgraphs(attribute):
            inside = {value.name for value in graph.output}
            inside.update(*(_names_read(inner) for inner in graph.node))
            inside.difference_update(*(inner.output for inner in graph.node))
            inside -= {value.name for value in graph.input}
            names |= inside - {tensor.name for tensor in graph.initializer}
    return names


def _read(node: NodeProto) -> None:
    """The inputs and attributes that are read of it must be there, and be of their types."""
    where = f"node {node.name or next(iter(node.output), '')!r} ({node.op_type})"
    names = Counter(attribute.name for attribute in node.attribute)
    if twice := next((name for name, count in names.items() if count > 1), None):
        raise ModelError(f"{where} has the attribute {twice!r} more than once")
    signature = signature_of(node)
    if signature is None:
        return
    if len(node.input) < signature.inputs or not node.output or not node.output[0]:
        raise ModelError(
            f"{where} has {len(node.input)} inputs and {len(node.output)} outputs; "
            f"allowed: at least {signature.inputs} and 1"
        )
    for attribute in node.attribute:
        wanted = signature.attributes.get(attribute.name)
        if wanted is None:
            continue
        if attribute.ref_attr_name:
            raise UnsupportedModelError(
                f"{where} takes {attribute.name!r} from an attribute of its function, "
                "which is not supported"
            )
        if attribute.type != wanted:
            kind = AttributeProto.AttributeType.Name
            raise ModelError(
                f"{where} has the attribute {attribute.name!r} as {kind(attribute.type)}; "
                f"allowed: {kind(wanted)}"
            )
        if attribute.name == "perm" and sorted(attribute.ints) != list(range(len(attribute.ints))):
            raise ModelError(f"{where} has the perm {list(attribute.ints)[:8]}, no permutation")


def _texts(message: Message) -> Iterator[object]:
    """Every string in a message, those inside tensors but their names and places aside."""
    if isinstance(message, TensorProto):
        yield message.name
        for place in message.external_data:
            yield place.key
            yield place.value
        return
    for field, value in message.ListFields():
        values = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
        if field.type == field.TYPE_STRING:
            yield from values
        elif field.type == field.TYPE_MESSAGE:
            for inner in values:
                yield from _texts(inner)


def _calls(body: FunctionProto | GraphProto) -> Iterator[tuple[str, str]]:
    """Domain and operator of every node, those of the graphs inside included."""
    for node in body.node:
        yield node.domain, node.op_type
        for attribute in node.attribute:
            for graph in subgraphs(attribute):
                yield from _calls(graph)
