"""Who reads which value: name resolution across graphs, subgraphs and model-local functions."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from onnx import FunctionProto, GraphProto, ModelProto, NodeProto, TensorProto

from .operators import CHAIN, FLOATS, ROLES, STANDARD, VIEWS
from .traversal import attribute, output_names, subgraphs

Value = tuple[int, str]  # the id of the scope that defines it, and its name


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


class GraphIndex:
    """Who reads which value, across graphs, subgraphs and functions."""

    def __init__(self, proto: ModelProto) -> None:
        self.scopes: list[Scope] = []
        self.functions: dict[tuple[str, str], Scope] = {}
        self._edges: dict[Value, list[tuple[Scope, NodeProto, int]]] = defaultdict(list)
        self._outputs: set[Value] = set()
        for function in proto.functions:
            scope = self._enter(function, None)
            self.functions[function.domain, function.name] = scope
        self._enter(proto.graph, None)
        for scope in self.scopes:
            self._connect(scope)
        self._roles = self._reaching(self._weighted(), self._passed_on)
        self._leaving = self._reaching(((value, "") for value in self._outputs), self._renamed)

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
        return (id(scope), name) in self._leaving

    def uses(self, scope: Scope, name: str, perm: tuple[int, ...], elem_type: int) -> Iterator[Use]:
        """Where the value ends up, seen through Identity, Transpose and Cast."""
        pending = [(iter(self._edges[id(scope), name]), perm, elem_type)]
        while pending:
            edges, perm, elem_type = pending[-1]
            reader, node, index = next(edges, (scope, None, 0))
            if node is None:
                pending.pop()
            elif chained := self._chained(node, perm, elem_type):
                pending.append((iter(self._edges[id(reader), node.output[0]]), *chained))
            else:
                direct = node.domain in STANDARD and node.op_type not in VIEWS
                op = self._role(reader, node, index)
                yield Use(reader, node, index, op, perm, elem_type, direct)

    def _chained(
        self, node: NodeProto, perm: tuple[int, ...], elem_type: int
    ) -> tuple[tuple[int, ...], int] | None:
        """Order of axes and type behind a node that changes only these; None behind others."""
        if node.domain not in STANDARD:
            return None
        if node.op_type == "Identity":
            return perm, elem_type
        if node.op_type == "Transpose":
            order = attribute(node, "perm", list(reversed(range(len(perm)))))
            return (
                (tuple(perm[axis] for axis in order), elem_type)
                if len(order) == len(perm)
                else None
            )
        if node.op_type == "Cast" and attribute(node, "to", 0) in FLOATS:
            return perm, attribute(node, "to", 0)
        return None

    def _role(self, scope: Scope, node: NodeProto, index: int) -> str:
        """The weighted operator that this input serves, itself or behind views and functions."""
        if node.op_type in ROLES and node.domain in STANDARD:
            return node.op_type if index in ROLES[node.op_type] else ""
        behind = (self._roles.get(key, set()) for key in self._passed_on(scope, node, index))
        ops = set().union(*behind) - {"Gather"}
        return min(ops, key=list(ROLES).index, default="")

    def _passed_on(self, scope: Scope, node: NodeProto, index: int) -> list[Value]:
        """The values that hold what this input holds, or a part or another shape of it."""
        if function := self.functions.get((node.domain, node.op_type)):
            names = function.body.input
            return [(id(function), str(names[index]))] if index < len(names) else []
        if node.op_type in VIEWS and (index == 0 or node.op_type == "Concat"):
            return [(id(scope), name) for name in node.output]
        if node.op_type == "Cast" and attribute(node, "to", 0) not in FLOATS:
            return []
        return self._renamed(scope, node, index)

    def _renamed(self, scope: Scope, node: NodeProto, index: int) -> list[Value]:
        """The value that is this input under another name, type or order of axes."""
        is_chain = node.op_type in CHAIN and node.domain in STANDARD
        return [(id(scope), node.output[0])] if is_chain else []

    def _weighted(self) -> Iterator[tuple[Value, str]]:
        """Every value that an operator of ROLES reads as its weight, with that operator."""
        for value, edges in self._edges.items():
            for _, node, index in edges:
                if node.domain in STANDARD and index in ROLES.get(node.op_type, ()):
                    yield value, node.op_type

    def _reaching(
        self,
        goals: Iterable[tuple[Value, str]],
        passed_on: Callable[[Scope, NodeProto, int], list[Value]],
    ) -> dict[Value, set[str]]:
        """By value: the goals that it reaches; found backwards, each value once for each goal."""
        sources: dict[Value, list[Value]] = defaultdict(list)
        for value, edges in self._edges.items():
            for scope, node, index in edges:
                for target in passed_on(scope, node, index):
                    sources[target].append(value)
        reached: dict[Value, set[str]] = defaultdict(set)
        pending = list(goals)
        while pending:
            value, goal = pending.pop()
            if goal not in reached[value]:
                reached[value].add(goal)
                pending.extend((source, goal) for source in sources[value])
        return reached

    def computed(self) -> Iterator[tuple[str, str]]:
        """Weight inputs that no constant reaches, with their operators."""
        constant = {(id(scope), name) for scope, name, _, _ in self.constants()}
        makers = {
            (id(scope), name): (scope, node)
            for scope in self.scopes
            for node in scope.body.node
            for name in node.output
        }

        known = dict.fromkeys(constant, True)

        def is_constant(scope: Scope, name: str) -> bool:
            passed = []
            while (key := (id(scope.owner(name)), name)) not in known:
                passed.append(key)
                scope, maker = makers.get(key, (scope, None))
                if maker is None or maker.op_type not in (*VIEWS, *CHAIN) or not maker.input:
                    known[key] = False
                else:
                    name = maker.input[0]
            known.update(dict.fromkeys(passed, known[key]))
            return known[key]

        for scope in self.scopes:
            for node in scope.body.node:
                if node.op_type in ("MatMul", "Gather") or node.op_type not in ROLES:
                    continue
                if node.domain not in STANDARD:
                    continue
                for index in ROLES[node.op_type]:
                    if not is_constant(scope, node.input[index]):
                        yield node.input[index], node.op_type
