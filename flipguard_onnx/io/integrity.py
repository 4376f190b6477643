"""Checks of a model before anything in it is believed: it is taken for an attack.

Memory is allocated by what a file holds, never by what it claims. Every check raises ModelError,
or UnsupportedModelError for what is legal but not handled here; the caller adds the path to it.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from graphlib import CycleError, TopologicalSorter
from math import prod

import onnx
from google.protobuf.message import Message
from onnx import AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto, TensorProto

from ..errors import ModelError, UnsupportedModelError
from ..graph.operators import operator_of, signature_of
from ..graph.traversal import subgraphs
from .external_data import BITS, byte_size, element_count, entry

MAX_AXES = 32  # of a tensor; the limit of numpy 1

MAX_EXPANDED_NODES = 1_000_000  # when every call of a local function is expanded

MAX_CALL_DEPTH = 64  # of local functions that call each other

TYPED_FIELDS = (
    "float_data",
    "int32_data",
    "int64_data",
    "uint64_data",
    "double_data",
    "string_data",
)

ATTRIBUTE_FIELDS = {  # field of an attribute -> the type that it then has
    "t": AttributeProto.TENSOR,
    "g": AttributeProto.GRAPH,
    "sparse_tensor": AttributeProto.SPARSE_TENSOR,
    "tensors": AttributeProto.TENSORS,
    "graphs": AttributeProto.GRAPHS,
    "sparse_tensors": AttributeProto.SPARSE_TENSORS,
}

ATTRIBUTE_LABELS = {"name", "type", "doc_string", "ref_attr_name"}  # what is no value

SINGULAR_FIELDS = ("t", "g", "sparse_tensor")

COMPLEX = (TensorProto.COMPLEX64, TensorProto.COMPLEX128)


def require_sound(proto: ModelProto, inline_location: str) -> None:
    """Check all that can be checked without the external data.

    Parameters
    ----------
    proto : the model
    inline_location : location of the data of those tensors that have it in the model file itself

    Raises
    ------
    ModelError, UnsupportedModelError
        Naming the tensor or node, what was found, and what is allowed.
    """
    if not all(isinstance(text, str) for text in _strings(proto)):  # protobuf gives bytes instead
        raise ModelError("not an ONNX model (a name in it is not UTF-8)")
    if not proto.graph.node or not proto.opset_import:
        raise ModelError("not an ONNX model (no nodes, or no opset_import)")
    if proto.training_info:
        raise UnsupportedModelError("training information is not supported")
    _check_functions(proto.functions)
    _check_body(proto.graph, inline_location)
    for function in proto.functions:
        for attribute in function.attribute_proto:
            _check_attribute(function.name, attribute, inline_location)
            if attribute.t.data_location == TensorProto.EXTERNAL or subgraphs(attribute):
                raise UnsupportedModelError(
                    "the default of attribute {attribute!r} of function {function!r} is a graph or "
                    "has external data",
                    attribute=attribute.name,
                    function=function.name,
                )
        _check_body(function, inline_location)


def _check_body(body: GraphProto | FunctionProto, inline_location: str) -> None:
    if isinstance(body, GraphProto):
        if body.sparse_initializer:
            raise UnsupportedModelError("sparse initializers are not supported")
        for tensor in body.initializer:
            _check_tensor(tensor, inline_location)
    _check_names(body)
    _check_cycles(body)
    for node in body.node:
        _check_node(node)
        for attribute in node.attribute:
            _check_attribute(node.op_type, attribute, inline_location)


def _check_attribute(op_type: str, attribute: AttributeProto, inline_location: str) -> None:
    """An attribute must hold what its type says, and the tensors and graphs in it be sound.

    op_type: of its node, or the name of the function whose default it is
    """
    values = {field.name for field, _ in attribute.ListFields()} - ATTRIBUTE_LABELS
    if attribute.ref_attr_name and values:
        raise ModelError(
            "attribute {attribute!r} of {op_type} refers to one of its function and holds {found}",
            attribute=attribute.name,
            op_type=op_type,
            found=" and ".join(sorted(values)),
            allowed="one of the two",
        )
    for field, kind in ATTRIBUTE_FIELDS.items():
        singular = field in SINGULAR_FIELDS
        is_set = attribute.HasField(field) if singular else len(getattr(attribute, field)) > 0
        if is_set and attribute.type != kind:
            raise ModelError(
                "attribute {attribute!r} of {op_type} is {found}, but holds {field!r}",
                attribute=attribute.name,
                op_type=op_type,
                found=AttributeProto.AttributeType.Name(attribute.type),
                field=field,
            )
    if attribute.HasField("t"):
        _check_tensor(attribute.t, inline_location)
    sparse = list(attribute.sparse_tensors)
    if attribute.HasField("sparse_tensor"):
        sparse.append(attribute.sparse_tensor)
    for tensor in (*attribute.tensors, *(t for s in sparse for t in (s.values, s.indices))):
        _check_tensor(tensor, inline_location)
        is_external = tensor.data_location == TensorProto.EXTERNAL
        if is_external and entry(tensor, "location") != inline_location:
            raise UnsupportedModelError(
                "attribute {attribute!r} of {op_type} has external data",
                tensor=tensor.name,
                attribute=attribute.name,
                op_type=op_type,
                allowed="in initializers and single tensors",
            )
    for graph in subgraphs(attribute):
        _check_body(graph, inline_location)


def _check_tensor(tensor: TensorProto, inline_location: str) -> None:
    """The shape must be one that can exist, and the data that is in the file must fill it."""
    _check_type_and_shape(tensor)
    name = tensor.name
    if len({place.key for place in tensor.external_data}) < len(tensor.external_data):
        raise ModelError("tensor {tensor!r} says twice where its data is", tensor=name)
    type_name = TensorProto.DataType.Name(tensor.data_type)
    type_field = onnx.helper.tensor_dtype_to_field(tensor.data_type)
    is_detached = entry(tensor, "location") == inline_location
    raw_bytes = int(entry(tensor, "length")) if is_detached else len(tensor.raw_data)
    fields = [f for f in TYPED_FIELDS if len(getattr(tensor, f))] + ["raw_data"] * bool(raw_bytes)
    if is_detached and tensor.raw_data:
        raise ModelError("tensor {tensor!r} has its values twice", tensor=name)
    if tensor.data_location == TensorProto.EXTERNAL and not is_detached:
        if fields or type_field == "string_data":
            raise ModelError(
                "tensor {tensor!r} of {elem_type} has external data and {found}",
                tensor=name,
                elem_type=type_name,
                found=" and ".join(fields) or "strings",
            )
        return
    if len(fields) > 1 or fields not in ([], ["raw_data"], [type_field]):
        raise ModelError(
            "tensor {tensor!r} of {elem_type} has its values in {found}",
            elem_type=type_name,
            tensor=name,
            found=" and ".join(fields),
        )
    if fields == ["raw_data"]:
        needed, found, unit = byte_size(tensor), raw_bytes, "bytes"
        if type_field == "string_data":
            raise ModelError(
                "tensor {tensor!r} of {elem_type} has its values in {found}",
                elem_type=type_name,
                tensor=name,
                found="raw_data",
            )
    else:
        count = element_count(tensor)
        is_complex = tensor.data_type in COMPLEX
        needed = count * 2 if is_complex else (count * BITS.get(tensor.data_type, 8) + 7) // 8
        found, unit = len(getattr(tensor, type_field)), f"values in {type_field}"
    if needed != found:
        raise ModelError(
            "tensor {tensor!r} of {elem_type} and shape {shape} needs {needed} {unit}; "
            "found: {found}",
            tensor=name,
            elem_type=type_name,
            shape=tensor.dims[:8],
            needed=needed,
            unit=unit,
            found=found,
        )


def _check_type_and_shape(tensor: TensorProto) -> None:
    name, dims = tensor.name, list(tensor.dims)
    try:
        onnx.helper.tensor_dtype_to_field(tensor.data_type)
    except (ValueError, KeyError):
        raise ModelError(
            "tensor {tensor!r} has the type {found}, which does not exist",
            tensor=name,
            found=tensor.data_type,
        ) from None
    if any(dim < 0 for dim in dims):
        raise ModelError(
            "tensor {tensor!r} has the shape {found}",
            tensor=name,
            found=dims[:8],
            allowed="sizes from 0 on",
        )
    if len(dims) > MAX_AXES:
        raise ModelError(
            "tensor {tensor!r} has {found} axes",
            tensor=name,
            found=len(dims),
            allowed=f"up to {MAX_AXES}",
        )
    if prod(max(dim, 1) for dim in dims) >= 1 << 58:
        raise ModelError(
            "tensor {tensor!r} has the shape {found}, which no memory can hold",
            tensor=name,
            found=dims[:8],
        )


def _check_functions(functions: Sequence[FunctionProto]) -> None:
    """Local functions must not call themselves, nor expand to more than the limits."""
    calls = {(function.domain, function.name): Counter(_calls(function)) for function in functions}
    if len(calls) != len(functions):
        raise ModelError("two local functions have the same name")
    graph = {key: calls.keys() & called for key, called in calls.items()}
    try:
        order = list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        raise ModelError(
            "local functions call themselves: {found}",
            found=" -> ".join(name for _, name in error.args[1][:5]),
        ) from None
    nodes: dict[tuple[str, str], int] = {}
    depths: dict[tuple[str, str], int] = {}
    for key in order:
        called = [(callee, n) for callee, n in calls[key].items() if callee in calls]
        nodes[key] = sum(calls[key].values()) + sum(n * nodes[callee] for callee, n in called)
        depths[key] = 1 + max((depths[callee] for callee, _ in called), default=0)
        if nodes[key] > MAX_EXPANDED_NODES or depths[key] > MAX_CALL_DEPTH:
            raise UnsupportedModelError(
                "local function {function!r} expands to {found} nodes at a depth of {depth}",
                function=key[1],
                found=nodes[key],
                depth=depths[key],
                allowed=f"{MAX_EXPANDED_NODES}, {MAX_CALL_DEPTH}",
            )


def _check_names(body: GraphProto | FunctionProto) -> None:
    """Every value must be defined once."""
    if isinstance(body, GraphProto):
        constants = Counter(tensor.name for tensor in body.initializer)
        inputs = Counter(value.name for value in body.input)
    else:
        constants, inputs = Counter[str](), Counter(body.input)
    if "" in constants or "" in inputs:
        raise ModelError("an initializer or an input has no name")
    outputs = Counter(name for node in body.node for name in node.output if name)
    # an initializer may have the name of an input, whose default it then is
    for defined in (constants + outputs, inputs + outputs):
        if twice := [name for name, count in defined.items() if count > 1]:
            raise ModelError("value {tensor!r} is defined more than once", tensor=twice[0])


def _check_cycles(body: GraphProto | FunctionProto) -> None:
    """No value may depend on itself."""
    try:
        TopologicalSorter(needed_nodes(body)).prepare()
    except CycleError as error:
        node = body.node[error.args[1][0]]
        raise ModelError(
            "value {tensor!r} of {op_type} depends on itself",
            tensor=next(iter(node.output), ""),
            op_type=node.op_type,
        ) from None


def needed_nodes(body: GraphProto | FunctionProto) -> dict[int, set[int]]:
    """By the index of a node: the nodes whose values it needs, for the graphs inside it, too."""
    makers = {name: i for i, node in enumerate(body.node) for name in node.output if name}
    return {
        i: {makers[name] for name in _names_read(node) if name in makers}
        for i, node in enumerate(body.node)
    }


def _names_read(node: NodeProto) -> set[str]:
    """The values that a node needs, with those that the graphs inside it take from outside."""
    names = set(node.input)
    for attribute in node.attribute:
        for graph in subgraphs(attribute):
            inside = {value.name for value in graph.output}
            inside.update(*(_names_read(inner) for inner in graph.node))
            inside.difference_update(*(inner.output for inner in graph.node))
            inside -= {value.name for value in graph.input}
            names |= inside - {tensor.name for tensor in graph.initializer}
    return names


def _check_node(node: NodeProto) -> None:
    """A node that may read a weight must have the inputs and attributes that its operator needs."""
    where = {"node": node.name or next(iter(node.output), ""), "op_type": node.op_type}
    names = Counter(attribute.name for attribute in node.attribute)
    if twice := next((name for name, count in names.items() if count > 1), None):
        raise ModelError(
            "node {node!r} ({op_type}) has the attribute {found!r} more than once",
            found=twice,
            **where,
        )
    signature = signature_of(node)
    if signature is None:
        return
    has_output = any(node.output) if operator_of(node) else any(node.output[:1])
    if len(node.input) < signature.inputs or not has_output:
        raise ModelError(
            "node {node!r} ({op_type}) has {found} inputs and {outputs} outputs",
            found=len(node.input),
            outputs=len(node.output),
            allowed=f"at least {signature.inputs} and 1",
            **where,
        )
    for attribute in node.attribute:
        wanted = signature.attributes.get(attribute.name)
        if wanted is None:
            continue
        if attribute.ref_attr_name:
            raise UnsupportedModelError(
                "node {node!r} ({op_type}) takes {attribute!r} from an attribute of its function, "
                "which is not supported",
                attribute=attribute.name,
                **where,
            )
        if attribute.type != wanted:
            type_name = AttributeProto.AttributeType.Name
            raise ModelError(
                "node {node!r} ({op_type}) has the attribute {attribute!r} as {found}",
                attribute=attribute.name,
                found=type_name(attribute.type),
                allowed=type_name(wanted),
                **where,
            )
        if attribute.name == "perm" and sorted(attribute.ints) != list(range(len(attribute.ints))):
            raise ModelError(
                "node {node!r} ({op_type}) has the perm {found}, no permutation",
                found=list(attribute.ints)[:8],
                **where,
            )


def _strings(message: Message) -> Iterator[object]:
    """Every string in a message; of a tensor its name and what it says of external data."""
    if isinstance(message, TensorProto):
        yield message.name
        for pair in message.external_data:
            yield pair.key
            yield pair.value
        return
    for field, value in message.ListFields():
        values = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
        if field.type == field.TYPE_STRING:
            yield from values
        elif field.type == field.TYPE_MESSAGE:
            for inner in values:
                yield from _strings(inner)


def _calls(body: FunctionProto | GraphProto) -> Iterator[tuple[str, str]]:
    """Domain and operator of every node, also of those in subgraphs."""
    for node in body.node:
        yield node.domain, node.op_type
        for attribute in node.attribute:
            for graph in subgraphs(attribute):
                yield from _calls(graph)
