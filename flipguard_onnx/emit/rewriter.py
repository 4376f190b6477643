"""Edit a graph: add constants and nodes, replace nodes, and tidy up once at the end."""

from collections import Counter, defaultdict
from typing import Any

import numpy.typing as npt
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper

from ..graph.operators import CHAIN, CONTRIB
from ..graph.scopes import Scope
from ..graph.traversal import bodies, graphs, opset_of, output_names
from ..io.writer import Output
from ..quantization.arrays import raw_bytes

IR_VERSION = 4  # the first in which initializers need not be graph inputs

IR_VERSIONS: dict[int, int] = {  # the first with tensors of these types
    TensorProto.FLOAT8E4M3FN: 9,
    TensorProto.INT4: 10,
    TensorProto.UINT4: 10,
    TensorProto.FLOAT4E2M1: 11,
    TensorProto.INT2: 13,
    TensorProto.UINT2: 13,
}


class Rewriter:
    """Collects the edits of one model; `finish` carries them out.

    New nodes depend on constants only, and so they come first in their graph.

    Parameters
    ----------
    proto : the model, which is edited
    output : where the data of new constants is written
    """

    def __init__(self, proto: ModelProto, output: Output) -> None:
        self._proto = proto
        self._output = output
        self._names = _all_names(proto)
        self._scopes: dict[int, Scope] = {}  # that have edits, by graph
        self._first: dict[int, list[NodeProto]] = defaultdict(list)  # by graph
        self._instead: dict[int, list[NodeProto]] = {}  # by the node replaced
        self._removed: dict[int, set[str]] = defaultdict(set)  # initializers, by graph

    def fresh(self, name: str) -> str:
        """The name itself, or with a number where the model has it already."""
        unused, count = name, 1
        while unused in self._names:
            count += 1
            unused = f"{name}_{count}"
        self._names.add(unused)
        return unused

    def opset(self, scope: Scope) -> int:
        """The version of the standard operators in a graph or function."""
        while scope.parent:
            scope = scope.parent
        return opset_of(self._proto if isinstance(scope.body, GraphProto) else scope.body)

    def constant(self, scope: Scope, name: str, values: npt.NDArray[Any]) -> str:
        """Add an array as a constant; returns its name."""
        data_type = helper.np_dtype_to_tensor_dtype(values.dtype)
        return self.tensor(scope, name, data_type, values.shape, raw_bytes(values))

    def tensor(
        self,
        scope: Scope,
        name: str,
        data_type: int,
        shape: tuple[int, ...],
        raw: bytes | memoryview,
    ) -> str:
        """Add a constant from its bytes: an initializer, or a node where it is a function's."""
        name = self.fresh(name)
        tensor = TensorProto(name=name, data_type=data_type, dims=shape)
        if isinstance(scope.body, GraphProto):
            self._output.store(tensor, raw)
            scope.body.initializer.append(tensor)
        else:
            tensor.raw_data = bytes(raw)
            self.prepend(scope, helper.make_node("Constant", [], [name], value=tensor))
        return name

    def node(self, scope: Scope, op: str, inputs: list[str], output: str, **attributes: Any) -> str:
        """Add a node that depends on constants only; returns the name of its output."""
        output = self.fresh(output)
        name = output.removesuffix("_Output")
        self.prepend(scope, helper.make_node(op, inputs, [output], name=name, **attributes))
        return output

    def replace(self, scope: Scope, node: NodeProto, nodes: list[NodeProto]) -> None:
        """Put `nodes` where `node` stands; the last one yields its outputs."""
        self._scopes[id(scope.body)] = scope
        self._instead[id(node)] = nodes

    def remove_initializer(self, scope: Scope, name: str) -> None:
        """Drop an initializer, and the graph input that stands for it in old models."""
        if isinstance(scope.body, GraphProto):
            self._scopes[id(scope.body)] = scope
            self._removed[id(scope.body)].add(name)

    def finish(self) -> None:
        """Put the new nodes in place and drop the ones that nothing reads any more."""
        # innermost graphs first: rebuilding a graph copies the ones inside it
        for scope in sorted(self._scopes.values(), key=_depth, reverse=True):
            nodes = self._first.pop(id(scope.body), [])
            for node in scope.body.node:
                nodes.extend(self._instead.pop(id(node), [node]))
            del scope.body.node[:]
            scope.body.node.extend(nodes)
            if isinstance(scope.body, GraphProto):
                names = self._removed.pop(id(scope.body), set())
                remove_named(scope.body.initializer, *names)
                remove_named(scope.body.input, *names)
        _drop_unread_nodes(self._proto)
        _import_what_is_used(self._proto)

    def prepend(self, scope: Scope, node: NodeProto) -> None:
        """Add a node before all that were there, behind those added before."""
        self._scopes[id(scope.body)] = scope
        self._first[id(scope.body)].append(node)


def remove_named(fields: Any, *names: str) -> None:
    """Delete the entries of these names from a repeated protobuf field."""
    gone = set(names)
    for index in reversed(range(len(fields))):
        if fields[index].name in gone:
            del fields[index]


def drop_lost_defaults(proto: ModelProto, before: ModelProto) -> None:
    """Drop inputs that were initializers as well, of models of old, where these are gone."""
    defaults = {tensor.name for tensor in before.graph.initializer}
    kept = {tensor.name for tensor in proto.graph.initializer}
    remove_named(proto.graph.input, *(defaults - kept))


def _depth(scope: Scope) -> int:
    return 0 if scope.parent is None else 1 + _depth(scope.parent)


def _all_names(proto: ModelProto) -> set[str]:
    names: set[str] = set()
    for body in bodies(proto):
        for node in body.node:
            names.update(node.input, node.output)
        if isinstance(body, GraphProto):
            names.update(value.name for value in body.input)
            names.update(tensor.name for tensor in body.initializer)
    return names


def _drop_unread_nodes(proto: ModelProto) -> None:
    """Remove Identity, Transpose, Cast and Constant nodes whose results nothing reads."""
    readers = Counter(name for body in bodies(proto) for node in body.node for name in node.input)
    readers.update(name for body in bodies(proto) for name in output_names(body))
    makers: dict[str, list[NodeProto]] = defaultdict(list)
    for body in bodies(proto):
        for node in body.node:
            if node.op_type in (*CHAIN, "Constant"):
                for name in node.output:
                    makers[name].append(node)
    unread: dict[int, NodeProto] = {}
    pending = [node for nodes in makers.values() for node in nodes]
    while pending:
        node = pending.pop()
        if id(node) in unread or any(readers[name] for name in node.output):
            continue
        unread[id(node)] = node
        readers.subtract(node.input)
        for name in node.input:
            pending += makers[name]
    for body in bodies(proto):
        for index in reversed(range(len(body.node))):
            if id(body.node[index]) in unread:
                del body.node[index]


def _import_what_is_used(proto: ModelProto) -> None:
    """Import the contrib operators where they are used; raise the IR version to what is needed."""
    in_graphs = any(node.domain == CONTRIB for graph in graphs(proto) for node in graph.node)
    if in_graphs and all(entry.domain != CONTRIB for entry in proto.opset_import):
        proto.opset_import.add(domain=CONTRIB, version=1)
    for function in proto.functions:
        used = any(node.domain == CONTRIB for node in function.node)
        if used and all(entry.domain != CONTRIB for entry in function.opset_import):
            function.opset_import.add(domain=CONTRIB, version=1)
    types = {tensor.data_type for graph in graphs(proto) for tensor in graph.initializer}
    needed = max((IR_VERSIONS.get(each, IR_VERSION) for each in types), default=IR_VERSION)
    proto.ir_version = max(proto.ir_version, needed)
