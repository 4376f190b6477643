"""What a file must be before anything in it is believed: the model is taken for an attack.

Nothing here allocates by what the file says, only by what it holds. Every check is a function that
raises ModelError (UnsupportedModelError for what is legal but not handled here) with one line; the
caller puts the path before it.
"""

import errno
import os
import stat
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from graphlib import CycleError, TopologicalSorter
from math import prod
from pathlib import Path

import onnx
from google.protobuf.message import Message
from onnx import AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto, TensorProto

from .errors import ModelError, UnsupportedModelError
from .wire import Region

LARGEST_FILE = (1 << 31) - 1  # bytes; where protobuf ends
MOST_RANK = 32  # axes; what numpy 1 can hold
MOST_SHARING = 4  # times its own size that an external data file may be referred to
MOST_EXPANDED = 1_000_000  # nodes when every call of a local function is expanded
DEEPEST_CALLS = 64  # local functions in one another
TYPED_DATA = (
    "float_data",
    "int32_data",
    "int64_data",
    "uint64_data",
    "double_data",
    "string_data",
)
PACKED = {  # bits of a value, where several share a byte
    TensorProto.INT4: 4,
    TensorProto.UINT4: 4,
    TensorProto.FLOAT4E2M1: 4,
    **{getattr(TensorProto, name): 2 for name in ("INT2", "UINT2") if hasattr(TensorProto, name)},
}
COMPLEX = (TensorProto.COMPLEX64, TensorProto.COMPLEX128)

# What is read of the standard operators: at least so many inputs, and attributes of these types.
INPUTS = {
    "MatMul": 2,
    "Gemm": 2,
    "Conv": 2,
    "ConvTranspose": 2,
    "LSTM": 3,
    "GRU": 3,
    "RNN": 3,
    "Gather": 2,
    "BatchNormalization": 5,
    **dict.fromkeys(("Identity", "Transpose", "Cast", "Slice", "Split", "Concat"), 1),
    **dict.fromkeys(("Unsqueeze", "Squeeze", "Reshape", "Flatten"), 1),
    **dict.fromkeys(("Add", "Sub", "Mul", "Div"), 2),
    "Constant": 0,
}
ATTRIBUTES = {
    **dict.fromkeys(("perm", "strides", "dilations", "pads"), AttributeProto.INTS),
    **dict.fromkeys(("axis", "to", "transA", "transB", "group"), AttributeProto.INT),
    **dict.fromkeys(("alpha", "beta"), AttributeProto.FLOAT),
    "auto_pad": AttributeProto.STRING,
    "value": AttributeProto.TENSOR,
}
HOLDERS = {"alpha": ("Gemm",), "beta": ("Gemm",), "axis": ("Gather",), "value": ("Constant",)}


def regular(path: Path) -> None:
    """What a model is read from must be a regular file that protobuf can hold."""
    try:
        status = path.stat()
    except OSError as error:
        raise ModelError(f"cannot be read: {error.strerror}") from None
    except ValueError as error:  # a null character in the path
        raise ModelError(f"cannot be read: {error}") from None
    if stat.S_ISDIR(status.st_mode):
        raise ModelError(f"cannot be read: {os.strerror(errno.EISDIR)}")
    if not stat.S_ISREG(status.st_mode):
        raise ModelError("cannot be read: not a regular file")
    if status.st_size > LARGEST_FILE:
        raise ModelError(
            f"has {status.st_size} bytes; allowed: up to {LARGEST_FILE}, what protobuf can "
            "hold (larger models keep their weights in an external data file)"
        )


def admit(proto: ModelProto, itself: str) -> None:
    """All that can be checked without the external data.

    itself: the location at which a tensor in `proto` has its raw_data, if it was taken out.
    """
    if not all(isinstance(text, str) for text in _texts(proto)):  # protobuf gives bytes instead
        raise ModelError("not an ONNX model (a name in it is not UTF-8)")
    _handled(proto)
    for tensor in _all_tensors(proto):
        _declared(tensor, itself)
    _functions(proto.functions)
    for body in (proto.graph, *proto.functions):
        _body(body)


def elements(tensor: TensorProto) -> int:
    """How many values the shape declares."""
    return prod(tensor.dims)


def byte_size(tensor: TensorProto) -> int:
    """How many bytes the values take, 4-bit ones packed."""
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    bits = PACKED.get(tensor.data_type, 8 * dtype.itemsize)
    return (elements(tensor) * bits + 7) // 8


def entry(tensor: TensorProto, key: str) -> str:
    """What the tensor says of its external data: "location", "offset" or "length"."""
    return next((e.value for e in tensor.external_data if e.key == key), "")


def data_file(model: Path, tensor: TensorProto) -> Path:
    """The external data file: a regular one under the model's folder or that of its real path.

    Symbolic links may lead there (the cache of a model hub is made of them), not elsewhere. A hard
    link is the file itself: whoever made it could read it.
    """
    name, location = tensor.name, entry(tensor, "location")
    refusal = f"tensor {name!r} has its data at {location!r}; allowed: "
    if not location or Path(location).is_absolute() or ".." in Path(location).parts:
        raise ModelError(f"{refusal}a file under the model's folder")
    file = model.parent / location
    try:
        roots = {model.parent.resolve(), model.resolve().parent}
        if not any(file.resolve().is_relative_to(root) for root in roots):
            raise ModelError(f"{refusal}a file under the model's folder")
        mode = file.stat().st_mode
    except FileNotFoundError:
        raise ModelError(f"tensor {name!r} needs the data file {location!r}, not there") from None
    except (OSError, ValueError, RuntimeError) as error:  # name too long, null, links in a circle
        raise ModelError(f"{refusal}a file under the model's folder ({error})") from None
    if not stat.S_ISREG(mode):
        raise ModelError(f"{refusal}a regular file")
    if not os.access(file, os.R_OK):
        raise ModelError(f"tensor {name!r} needs the data file {location!r}: not readable")
    return file


def region(tensor: TensorProto, file: Path) -> Region:
    """Where the tensor's data lies; it must be as long as its shape says, and inside the file."""
    size, needed = file.stat().st_size, byte_size(tensor)
    offset, length = _number(tensor, "offset", 0), _number(tensor, "length", needed)
    if length != needed or offset + length > size:
        raise ModelError(
            f"tensor {tensor.name!r} needs {needed} bytes but refers to {length} bytes "
            f"at {offset} of {file.name!r}, which has {size}"
        )
    return Region(file, offset, length)


def shared_regions(regions: Iterable[tuple[TensorProto, Region]]) -> None:
    """Tensors may share a region whole, as the same type, and not many times over."""
    by_file: dict[Path, list[tuple[int, int, int, str]]] = defaultdict(list)
    for tensor, where in regions:
        if where.length:
            by_file[where.file].append((where.offset, where.length, tensor.data_type, tensor.name))
    for file, found in by_file.items():
        found.sort()
        for before, after in zip(found, found[1:], strict=False):
            if before[:3] != after[:3] and before[0] + before[1] > after[0]:
                raise ModelError(
                    f"tensors {before[3]!r} and {after[3]!r} overlap in {file.name!r}, at "
                    f"{after[0]}; allowed: the same bytes as the same type, or none in common"
                )
        size, referred = file.stat().st_size, sum(length for _, length, _, _ in found)
        if referred > MOST_SHARING * size:
            raise ModelError(
                f"tensors refer to {referred} bytes of {file.name!r}, which has {size}; "
                f"allowed: {MOST_SHARING} times its size"
            )


def _number(tensor: TensorProto, key: str, default: int) -> int:
    text = entry(tensor, key)
    if not text:
        return default
    if not (text.isascii() and text.isdecimal() and len(text) < 20):
        raise ModelError(
            f"tensor {tensor.name!r} has the {key} {text[:30]!r}; allowed: a number from 0 on"
        )
    return int(text)


def _handled(proto: ModelProto) -> None:
    if not proto.graph.node or not proto.opset_import:
        raise ModelError("not an ONNX model (no nodes, or no opset_import)")
    if proto.training_info:
        raise UnsupportedModelError("training information is not supported")
    for node, _ in _nodes(proto):
        for attribute in node.attribute:
            if any(graph.sparse_initializer for graph in _graphs_of(attribute)):
                raise UnsupportedModelError("sparse initializers are not supported")
    if proto.graph.sparse_initializer:
        raise UnsupportedModelError("sparse initializers are not supported")


def _declared(tensor: TensorProto, itself: str) -> None:
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
    held = [f for f in TYPED_DATA if len(getattr(tensor, f))]
    taken_out = entry(tensor, "location") == itself
    raw = int(entry(tensor, "length")) if taken_out else len(tensor.raw_data)
    held += ["raw_data"] * bool(raw)
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


def _functions(functions: Iterable[FunctionProto]) -> None:
    """Local functions must not call themselves, nor grow beyond bounds when they are expanded."""
    by_name = {(f.domain, f.name): f for f in functions}
    calls = {
        key: Counter((n.domain, n.op_type) for n, _ in _nodes(function))
        for key, function in by_name.items()
    }
    if len(by_name) != len(list(functions)):
        raise ModelError("two local functions have the same name")
    try:
        order = list(
            TopologicalSorter({k: set(c) & set(calls) for k, c in calls.items()}).static_order()
        )
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


def _body(body: GraphProto | FunctionProto) -> None:
    """Names are defined once, nothing depends on itself, and nodes have what is read of them."""
    if isinstance(body, GraphProto):
        names = Counter(tensor.name for tensor in body.initializer)
        inputs = Counter(value.name for value in body.input)
    else:
        names, inputs = Counter[str](), Counter(body.input)
    made = Counter(name for node in body.node for name in node.output if name)
    # an initializer may stand beside the input of its name, as its default
    for defined in (names + made, inputs + made):
        twice = next((name for name, count in defined.items() if count > 1), None)
        if twice is not None:
            raise ModelError(f"value {twice!r} is defined more than once")
    if "" in names or "" in inputs:
        raise ModelError("an initializer or an input has no name")
    for node in body.node:
        _node(node)
        for attribute in node.attribute:
            for graph in _graphs_of(attribute):
                _body(graph)
    _acyclic(body)


def _acyclic(body: GraphProto | FunctionProto) -> None:
    makers = {name: i for i, node in enumerate(body.node) for name in node.output if name}
    needs = {
        i: {
            makers[name]
            for inner, _ in _nodes_below(node)
            for name in inner.input
            if name in makers
        }
        for i, node in enumerate(body.node)
    }
    try:
        TopologicalSorter(needs).prepare()
    except CycleError as error:
        node = body.node[error.args[1][0]]
        output = next(iter(node.output), "")
        raise ModelError(f"value {output!r} of {node.op_type} depends on itself") from None


def _node(node: NodeProto) -> None:
    where = f"node {node.name or next(iter(node.output), '')!r} ({node.op_type})"
    names = Counter(attribute.name for attribute in node.attribute)
    if twice := next((name for name, count in names.items() if count > 1), None):
        raise ModelError(f"{where} has the attribute {twice!r} more than once")
    if node.domain not in ("", "ai.onnx") or node.op_type not in INPUTS:
        return
    if len(node.input) < INPUTS[node.op_type] or not node.output or not node.output[0]:
        raise ModelError(
            f"{where} has {len(node.input)} inputs and {len(node.output)} outputs; "
            f"allowed: at least {INPUTS[node.op_type]} and 1"
        )
    for attribute in node.attribute:
        wanted = ATTRIBUTES.get(attribute.name)
        if wanted is None or node.op_type not in HOLDERS.get(attribute.name, INPUTS):
            continue
        if attribute.type != wanted or attribute.ref_attr_name:
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


def _nodes(within: ModelProto | FunctionProto) -> Iterator[tuple[NodeProto, int]]:
    bodies = (within.graph, *within.functions) if isinstance(within, ModelProto) else (within,)
    for body in bodies:
        for node in body.node:
            yield from _nodes_below(node)


def _nodes_below(node: NodeProto, depth: int = 0) -> Iterator[tuple[NodeProto, int]]:
    """The node and those of the graphs inside it."""
    yield node, depth
    for attribute in node.attribute:
        for graph in _graphs_of(attribute):
            for inner in graph.node:
                yield from _nodes_below(inner, depth + 1)


def _graphs_of(attribute: AttributeProto) -> list[GraphProto]:
    return [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]


def _all_tensors(proto: ModelProto) -> Iterator[TensorProto]:
    yield from proto.graph.initializer
    for node, _ in _nodes(proto):
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            others = list(attribute.tensors)
            for sparse in [attribute.sparse_tensor] if attribute.HasField("sparse_tensor") else []:
                others += [sparse.values, sparse.indices]
            for sparse in attribute.sparse_tensors:
                others += [sparse.values, sparse.indices]
            if any(tensor.data_location == TensorProto.EXTERNAL for tensor in others):
                raise UnsupportedModelError(
                    f"attribute {attribute.name!r} of {node.op_type} has external data; "
                    "allowed: in initializers and single tensors"
                )
            yield from others
            for graph in _graphs_of(attribute):
                yield from graph.initializer
