"""Who reads which value: name resolution across graphs, subgraphs and model-local functions."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from onnx import FunctionProto, GraphProto, ModelProto, NodeProto, TensorProto, helper

from .model import output_names, subgraphs

# Weight inputs by operator; the order decides whose layout a shared tensor gets.
ROLES = {
    "MatMul": (1, 0),
    "Gemm": (1,),
    "Conv": (1,),
    "ConvTranspose": (1,),
    "LSTM": (1, 2),
    "GRU": (1, 2),
    "RNN": (1, 2),
    "Gather": (0,),
}
CHAIN = ("Identity", "Transpose", "Cast")  # a weight is followed through these
VIEWS = ("Slice", "Split", "Concat", "Unsqueeze", "Squeeze", "Reshape", "Flatten")
FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)


@dataclass(frozen=True)
class Scope:
    """A graph or the body of a model-local function; names resolve through its parents."""

    body: GraphProto | FunctionProto
    parent: "Scope | None" = None
    defined: set[str] = field(default_factory=set)

    def owner(self, name: str) -> "Scope | None":
        """The innermost scope from here outwards that defines the name."""
        scope: Scope | None = self
        while scope and name not in scope.defined:
            scope = scope.parent
        return scope


@dataclass(frozen=True)
class Use:
    """One place that reads a weight: input `index` of `node`, an operator of kind `op`.

    perm: the operand's axes in terms of the stored tensor's. elem_type: the operand's type.
    direct: the operand is the weight itself, not a slice or reshaping of it, nor the argument of a
    function. op "" is any other reader, which is handed the dequantized tensor.
    """

    scope: Scope
    node: NodeProto
    index: int
    op: str
    perm: tuple[int, ...]
    elem_type: int
    direct: bool = True

    def output_axes(self) -> tuple[int, ...]:
        """The stored tensor's axes that number output channels, in the order of the operand."""
        rank = len(self.perm)
        if not self.direct:
            return (0,)
        if self.op == "MatMul":
            contracted = rank - 1 if self.index == 0 else max(rank - 2, 0)
            axes: tuple[int, ...] = tuple(a for a in range(rank) if a != contracted)
        elif self.op == "Gemm":
            axes = (0,) if attribute(self.node, "transB", 0) else (1,)
        elif self.op == "ConvTranspose":
            axes = (1,)
        elif self.op in ("LSTM", "GRU", "RNN"):
            axes = (0, 1)
        elif self.op == "Gather":
            axes = (attribute(self.node, "axis", 0) % rank,)
        else:
            axes = (0,)
        return tuple(self.perm[a] for a in axes)


class Readers:
    """Who reads which value, across graphs, subgraphs and functions."""

    def __init__(self, proto: ModelProto) -> None:
        self.scopes: list[Scope] = []
        self.functions: dict[tuple[str, str], Scope] = {}
        self._edges: dict[tuple[int, str], list[tuple[Scope, NodeProto, int]]] = defaultdict(list)
        self._outputs: set[tuple[int, str]] = set()
        for function in proto.functions:
            scope = self._enter(function, None)
            self.functions[function.domain, function.name] = scope
        self._enter(proto.graph, None)
        for scope in self.scopes:
            self._connect(scope)

    def _enter(self, body: GraphProto | FunctionProto, parent: Scope | None) -> Scope:
        scope = Scope(body, parent)
        self.scopes.append(scope)
        if isinstance(body, GraphProto):
            scope.defined.update(value.name for value in body.input)
            scope.defined.update(tensor.name for tensor in body.initializer)
        else:
            scope.defined.update(body.input)
        for node in body.node:
            scope.defined.update(node.output)
            for attr in node.attribute:
                for graph in subgraphs(attr):
                    self._enter(graph, scope)
        return scope

    def _connect(self, scope: Scope) -> None:
        for node in scope.body.node:
            for index, name in enumerate(node.input):
                if owner := scope.owner(name):
                    self._edges[id(owner), name].append((scope, node, index))
        for name in output_names(scope.body):
            if owner := scope.owner(name):
                self._outputs.add((id(owner), name))

    def constants(self) -> Iterator[tuple[Scope, str, TensorProto, NodeProto | None]]:
        """Every initializer and every Constant node's tensor."""
        for scope in self.scopes:
            if isinstance(scope.body, GraphProto):
                for tensor in scope.body.initializer:
                    yield scope, tensor.name, tensor, None
            for node in scope.body.node:
                for attr in node.attribute:
                    if node.op_type == "Constant" and attr.name == "value":
                        yield scope, node.output[0], attr.t, node

    def operators(self, scope: Scope, name: str) -> list[str]:
        """The types of the nodes that read the value itself."""
        return sorted({node.op_type for _, node, _ in self._edges[id(scope), name]})

    def is_output(self, scope: Scope, name: str) -> bool:
        """Whether the value, or one that merely renames or casts it, leaves its graph."""
        if (id(scope), name) in self._outputs:
            return True
        return any(
            node.op_type in CHAIN and self.is_output(reader, node.output[0])
            for reader, node, _ in self._edges[id(scope), name]
        )

    def uses(self, scope: Scope, name: str, perm: tuple[int, ...], elem_type: int) -> Iterator[Use]:
        """Where the value ends up, seen through Identity, Transpose and Cast."""
        for reader, node, index in self._edges[id(scope), name]:
            if node.domain not in ("", "ai.onnx"):
                op = self._role(reader, node, index)
                yield Use(reader, node, index, op, perm, elem_type, direct=False)
            elif node.op_type == "Identity":
                yield from self.uses(reader, node.output[0], perm, elem_type)
            elif node.op_type == "Transpose":
                order = attribute(node, "perm", list(reversed(range(len(perm)))))
                turned = tuple(perm[axis] for axis in order)
                yield from self.uses(reader, node.output[0], turned, elem_type)
            elif node.op_type == "Cast" and attribute(node, "to", 0) in FLOATS:
                yield from self.uses(reader, node.output[0], perm, attribute(node, "to", 0))
            else:
                op = self._role(reader, node, index)
                direct = node.op_type not in VIEWS
                yield Use(reader, node, index, op, perm, elem_type, direct)

    def _role(self, scope: Scope, node: NodeProto, index: int) -> str:
        """The weighted operator that this input serves, itself or behind views and functions."""
        if node.op_type in ROLES and node.domain in ("", "ai.onnx"):
            return node.op_type if index in ROLES[node.op_type] else ""
        if function := self.functions.get((node.domain, node.op_type)):
            behind = [(function, str(function.body.input[index]))]
        elif node.op_type in VIEWS and (index == 0 or node.op_type == "Concat"):
            behind = [(scope, name) for name in node.output]
        else:
            return ""
        axes = tuple(range(8))  # only the operators matter here
        uses = (use for inner, name in behind for use in self.uses(inner, name, axes, 0))
        ops = [use.op for use in uses if use.op not in ("", "Gather")]
        return min(ops, key=list(ROLES).index, default="")

    def computed(self) -> Iterator[tuple[str, str]]:
        """Weight inputs that no constant reaches, with their operators."""
        constant = {(id(scope), name) for scope, name, _, _ in self.constants()}
        makers = {
            (id(scope), name): (scope, node)
            for scope in self.scopes
            for node in scope.body.node
            for name in node.output
        }

        def is_constant(scope: Scope, name: str) -> bool:
            key = (id(scope.owner(name)), name)
            if key in constant or key not in makers:
                return key in constant
            maker_scope, maker = makers[key]
            if maker.op_type not in (*VIEWS, *CHAIN):
                return False
            return is_constant(maker_scope, maker.input[0])

        for scope in self.scopes:
            for node in scope.body.node:
                if node.op_type in ("MatMul", "Gather") or node.op_type not in ROLES:
                    continue
                for index in ROLES[node.op_type]:
                    if not is_constant(scope, node.input[index]):
                        yield node.input[index], node.op_type


def attribute(node: NodeProto, name: str, default: Any) -> Any:
    """The value of a node's attribute, or the default."""
    for candidate in node.attribute:
        if candidate.name == name:
            return helper.get_attribute_value(candidate)
    return default
