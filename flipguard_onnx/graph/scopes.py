"""Who reads which value: name resolution across graphs, subgraphs and model-local functions."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from typing import TypeVar

from onnx import FunctionProto, GraphProto, ModelProto, NodeProto, TensorProto, numpy_helper

from .operands import gather_axes
from .operators import (
    CHAIN,
    FLOATS,
    VIEWS,
    Operator,
    WeightForm,
    operator_of,
    priority,
)
from .traversal import STANDARD, attribute, output_names, subgraphs

Value = tuple[int, str]  # the id of the scope that defines it, and its name

Goal = TypeVar("Goal")

MAX_LOOKS = 100  # at nodes behind another, in search of the operator that reads its weight there

WHOLE = (*CHAIN, "Squeeze", "Unsqueeze", "Gather")  # pass on whole matrices of a stack


@dataclass(frozen=True)
class Scope:
    """A graph or the body of a model-local function; names resolve through its parents.

    path: the names that lead to it, from outside: those of a function, then what each node around
    yields and its attribute. They do not depend on the order of nodes or attributes.
    """

    body: GraphProto | FunctionProto
    parent: "Scope | None" = None
    defined: set[str] = field(default_factory=set)
    path: tuple[str, ...] = ()

    def owner(self, name: str) -> "Scope | None":
        """The innermost scope from here outwards that defines the name."""
        scope: Scope | None = self
        while scope and name not in scope.defined:
            scope = scope.parent
        return scope


@dataclass(frozen=True)
class Use:
    """One place that reads a weight: input `index` of `node`.

    Attributes
    ----------
    operator : the operator whose weight this is, which may come behind the node; None for any
        other reader, which gets the dequantized tensor
    perm : for each axis of the operand the axis of the stored tensor that it is
    elem_type : the operand's type
    direct : whether the node itself is that operator, and not one that slices or reshapes the
        weight, picks entries of a stack, or hands it to a function
    behind : where the operator reads what comes of the weight, if that is known; its `perm` are
        the last axes of that operand
    whole : of such a place, whether matrices of a stack reach it whole
    """

    scope: Scope
    node: NodeProto
    index: int
    operator: Operator | None
    perm: tuple[int, ...]
    elem_type: int
    direct: bool = True
    behind: "Use | None" = None
    whole: bool = True

    @property
    def op(self) -> str:
        """The operator's name, "" without one."""
        return self.operator.name if self.operator else ""

    def reads(self, form: WeightForm) -> bool:
        """Whether the node itself reads this form without making floats of the whole weight."""
        return self.direct and self.operator is not None and form in self.operator.forms

    @property
    def picks(self) -> bool:
        """Whether the node is a Gather, which picks entries of the weight along an axis."""
        operator = operator_of(self.node)
        return operator is not None and operator.name == "Gather" and self.index == 0

    def output_axes(self) -> tuple[int, ...]:
        """The stored tensor's axes that number output channels, in the order of the operand.

        Where matrices of a stack are read one by one, the axes that number these come first.
        """
        reader = self if self.direct else self.behind
        if reader is None or reader.operator is None:
            return (0,)
        rank = len(reader.perm)
        axes = reader.operator.output_axes(reader.node, reader.index, rank)
        outputs = tuple(reader.perm[axis] for axis in axes if axis < rank)
        rows = tuple(axis for axis in self.perm if axis not in reader.perm) + outputs
        return rows if len(rows) < len(self.perm) else (0,)


class GraphIndex:
    """Who reads which value, across graphs, subgraphs and functions."""

    def __init__(self, proto: ModelProto) -> None:
        self.scopes: list[Scope] = []
        self._around: dict[int, str] = {}  # the type of the node that holds a graph, by the latter
        self._inner: dict[int, Scope] = {}  # by their graph or function
        self.functions: dict[tuple[str, str], Scope] = {}
        self._edges: dict[Value, list[tuple[Scope, NodeProto, int]]] = defaultdict(list)
        self._outputs: set[tuple[Value, str]] = set()  # each with the node around its graph
        for function in proto.functions:
            scope = self._enter(function, None, (function.domain, function.name))
            self.functions[function.domain, function.name] = scope
        self._enter(proto.graph, None)
        for scope in self.scopes:
            self._connect(scope)
        self._weight_of = self._reaching(self._weight_inputs(), self._passed_on)
        self._leaving = self._reaching(self._outputs, self._renamed)

    def _enter(
        self,
        body: GraphProto | FunctionProto,
        parent: Scope | None,
        path: tuple[str, ...] = (),
        around: str = "",
    ) -> Scope:
        scope = Scope(body, parent, path=path)
        self._around[id(body)] = around
        self.scopes.append(scope)
        self._inner[id(body)] = scope
        if isinstance(body, GraphProto):
            scope.defined.update(value.name for value in body.input)
            scope.defined.update(tensor.name for tensor in body.initializer)
        else:
            scope.defined.update(body.input)
        for node in body.node:
            scope.defined.update(node.output)
            for attr in node.attribute:
                for graph in subgraphs(attr):
                    inner = next(filter(None, node.output), ""), attr.name
                    self._enter(graph, scope, (*path, *inner), node.op_type)
        return scope

    def _connect(self, scope: Scope) -> None:
        for node in scope.body.node:
            for index, name in enumerate(node.input):
                if owner := scope.owner(name):
                    self._edges[id(owner), name].append((scope, node, index))
        for name in output_names(scope.body):
            if owner := scope.owner(name):
                self._outputs.add(((id(owner), name), self._around[id(scope.body)]))

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

    def values(self) -> list[Value]:
        """Every value that a node reads."""
        return list(self._edges)

    def readers(self, value: Value) -> list[tuple[Scope, NodeProto, int]]:
        """The nodes that read a value, each with its scope and the index of the input."""
        return self._edges.get(value, [])

    def makers(self) -> dict[Value, tuple[Scope, NodeProto]]:
        """By value: the node that yields it, with its scope."""
        return {
            (id(scope), name): (scope, node)
            for scope in self.scopes
            for node in scope.body.node
            for name in node.output
        }

    def is_weight(self, scope: Scope, name: str) -> bool:
        """Whether a value is read as a weight, itself or behind chains, views and calls."""
        behind = self._weight_of.get((id(scope), name), set())
        return any(operator.behind_views for operator in behind)

    def other_constants(self) -> Iterator[tuple[str, TensorProto, str]]:
        """Constant nodes with floats in another attribute: name, tensor, and types of readers.

        Of a sparse one the tensor has no data.
        """
        for scope in self.scopes:
            for node in scope.body.node:
                for attr in node.attribute if node.op_type == "Constant" else ():
                    shape = (len(attr.floats),) if attr.floats else tuple(attr.sparse_tensor.dims)
                    if shape and attr.name in ("value_floats", "sparse_value"):
                        name = node.output[0]
                        readers = ", ".join(self.operators(scope, name)) or "nothing"
                        tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=shape)
                        tensor.float_data.extend(attr.floats)
                        yield name, tensor, readers

    def is_input(self, scope: Scope, name: str) -> bool:
        """Whether a value has the name of an input of its graph."""
        body = scope.body
        return isinstance(body, GraphProto) and any(each.name == name for each in body.input)

    def operators(self, scope: Scope, name: str) -> list[str]:
        """The types of the nodes that read a value, in alphabetical order, each once."""
        return sorted({node.op_type for _, node, _ in self._edges[id(scope), name]})

    def readers_of(self, scope: Scope, name: str) -> list[str]:
        """As `operators`, with the types of the nodes whose graphs return the value."""
        around = filter(None, self.returned_by(scope, name))
        return sorted({*self.operators(scope, name), *around})

    def is_output(self, scope: Scope, name: str) -> bool:
        """Whether a value is an output of its graph, itself or behind Identity, Transpose, Cast."""
        return (id(scope), name) in self._leaving

    def returned_by(self, scope: Scope, name: str) -> set[str]:
        """The types of the nodes with graphs whose output the value is; "" for the main graph."""
        return self._leaving.get((id(scope), name), set())

    def uses(self, scope: Scope, name: str, perm: tuple[int, ...], elem_type: int) -> Iterator[Use]:
        """The readers of a value; Identity, Transpose and Cast are followed to theirs.

        Parameters
        ----------
        scope, name : the value
        perm, elem_type : the order of its axes, and its type
        """
        pending = [(iter(self._edges[id(scope), name]), perm, elem_type)]
        while pending:
            edges, perm, elem_type = pending[-1]
            reader, node, index = next(edges, (scope, None, 0))
            if node is None:
                pending.pop()
            elif chained := self._chained(node, perm, elem_type):
                pending.append((iter(self._edges[id(reader), node.output[0]]), *chained))
            else:
                use = Use(reader, node, index, None, perm, elem_type)
                behind = self._behind(use)
                operator = behind.operator if behind else self._operator(reader, node, index)
                direct = behind is None and operator_of(node) is not None
                yield replace(use, operator=operator, direct=direct, behind=behind)

    def _chained(
        self, node: NodeProto, perm: tuple[int, ...], elem_type: int
    ) -> tuple[tuple[int, ...], int] | None:
        """The order of axes and the type behind Identity, Transpose or Cast; else None.

        If an operand has more axes than `perm`, which are its last then, these must stay the last.
        """
        if node.domain not in STANDARD:
            return None
        if node.op_type == "Identity":
            return perm, elem_type
        if node.op_type == "Transpose":
            order = attribute(node, "perm", list(reversed(range(len(perm)))))
            more = len(order) - len(perm)
            if more < 0 or min(order[more:], default=0) < more:
                return None
            return tuple(perm[axis - more] for axis in order[more:]), elem_type
        if node.op_type == "Cast" and attribute(node, "to", 0) in FLOATS:
            return perm, attribute(node, "to", 0)
        return None

    def _behind(self, use: Use) -> Use | None:
        """Where an operator behind the node reads its weight; of several, that of the first row.

        A Gather is passed through where it picks matrices of a stack that are multiplied with what
        is no constant. None where nothing is found.
        """
        found: list[tuple[int, Use]] = []
        pending = list(islice(self._onwards(use), MAX_LOOKS))
        for place in pending:
            operator = operator_of(place.node)
            if operator is None or place.picks:
                pending += islice(self._onwards(place), MAX_LOOKS - len(pending))
            elif place.index in operator.weights and not self._multiplies_constant(place, operator):
                found.append((priority(operator), replace(place, operator=operator)))
        return min(found, key=lambda pair: pair[0], default=(0, None))[1]

    def _onwards(self, use: Use) -> Iterator[Use]:
        """The readers of what a node makes of a weight; none of what an operator computes.

        Of Reshape and the like it is assumed that the last axes stay what they are.
        """
        node, perm, elem_type = use.node, use.perm, use.elem_type
        values = self._passed_on(use.scope, node, use.index)
        if chained := self._chained(node, perm, elem_type):
            perm, elem_type = chained
        elif use.picks:
            perm = perm[gather_axes(node, 0, len(perm))[0] + 1 :] if len(perm) > 2 else ()
            values = [(id(use.scope), node.output[0])] if len(perm) > 1 else []
        elif operator_of(node) or (node.op_type in CHAIN and node.domain in STANDARD):
            values = []
        elif node.op_type == "Scan" and values:
            scanned = use.index - len(node.input) + attribute(node, "num_scan_inputs", 0)
            axes = dict(enumerate(attribute(node, "scan_input_axes", ())))
            axis = axes.get(scanned, 0) % max(len(perm), 1)
            perm = perm[:axis] + perm[axis + 1 :]
        whole = use.whole and node.op_type in WHOLE and self._keeps_matrices(use)
        for value in values:
            for scope, reader, index in self._edges[value]:
                yield Use(scope, reader, index, None, perm, elem_type, whole=whole)

    def _keeps_matrices(self, use: Use) -> bool:
        """Whether a Squeeze or Unsqueeze is known to touch the first axis only."""
        node = use.node
        if node.op_type not in ("Squeeze", "Unsqueeze"):
            return True
        axes = list(attribute(node, "axes", ()))
        if len(node.input) > 1 and (owner := use.scope.owner(node.input[1])):
            tensor = self._tensors.get((id(owner), node.input[1]))
            inline = tensor is not None and tensor.data_location != TensorProto.EXTERNAL
            axes = numpy_helper.to_array(tensor).ravel().tolist() if tensor and inline else []
        return axes == [0]

    @cached_property
    def _tensors(self) -> dict[Value, TensorProto]:
        """The constants by value."""
        return {(id(scope), name): tensor for scope, name, tensor, _ in self.constants()}

    def _multiplies_constant(self, use: Use, operator: Operator) -> bool:
        """Whether what the node multiplies is an activation, as its other operand is constant."""
        if use.index not in operator.may_vary:
            return False
        inputs = enumerate(use.node.input)
        others = [name for i, name in inputs if i in operator.weights and i != use.index]
        return any((id(use.scope.owner(name)), name) in self._constant for name in others)

    @cached_property
    def _constant(self) -> set[Value]:
        """The constants, and what Identity, Transpose and Cast make of them."""
        found: set[Value] = set()
        pending = [(id(scope), name) for scope, name, _, _ in self.constants()]
        while pending:
            value = pending.pop()
            if value not in found:
                found.add(value)
                for reader in self._edges.get(value, []):
                    pending += self._renamed(*reader)
        return found

    def _operator(self, scope: Scope, node: NodeProto, index: int) -> Operator | None:
        """The operator whose weight this input is: the node's, or one behind views and calls."""
        if operator := operator_of(node):
            return operator if index in operator.weights else None
        behind = (self._weight_of.get(key, set()) for key in self._passed_on(scope, node, index))
        found = (operator for operator in set().union(*behind) if operator.behind_views)
        return min(found, key=priority, default=None)

    def _passed_on(self, scope: Scope, node: NodeProto, index: int) -> list[Value]:
        """The values that hold this input, a part of it, or it in another shape."""
        if function := self.functions.get((node.domain, node.op_type)):
            names = function.body.input
            return [(id(function), str(names[index]))] if index < len(names) else []
        if node.op_type == "Scan" and node.domain in STANDARD:
            return self._scanned(node, index)
        if node.op_type in VIEWS and (index == 0 or node.op_type == "Concat"):
            return [(id(scope), name) for name in node.output]
        if node.op_type == "Cast" and attribute(node, "to", 0) not in FLOATS:
            return []
        return self._renamed(scope, node, index)

    def _scanned(self, node: NodeProto, index: int) -> list[Value]:
        """What a Scan passes on, slice by slice, of an input that it scans over."""
        body = attribute(node, "body", None)
        first = len(node.input) - attribute(node, "num_scan_inputs", 0)
        if body is None or index < first or len(body.input) != len(node.input):
            return []
        return [(id(self._inner[id(body)]), body.input[index].name)]

    def _renamed(self, scope: Scope, node: NodeProto, index: int) -> list[Value]:
        """The value that is this input under another name, type or order of axes."""
        is_chain = node.op_type in CHAIN and node.domain in STANDARD
        return [(id(scope), node.output[0])] if is_chain else []

    def _weight_inputs(self) -> Iterator[tuple[Value, Operator]]:
        """Every value that an operator reads as its weight, with that operator."""
        for value, edges in self._edges.items():
            for _, node, index in edges:
                operator = operator_of(node)
                if operator and index in operator.weights:
                    yield value, operator

    def _reaching(
        self,
        goals: Iterable[tuple[Value, Goal]],
        passed_on: Callable[[Scope, NodeProto, int], list[Value]],
    ) -> dict[Value, set[Goal]]:
        """By value: the goals that it reaches.

        goals: values with what is reached there. passed_on: the values to which a node passes on
        an input. The search goes backwards from the goals, once through each value for each goal.
        """
        sources: dict[Value, list[Value]] = defaultdict(list)
        for value, edges in self._edges.items():
            for scope, node, index in edges:
                for target in passed_on(scope, node, index):
                    sources[target].append(value)
        reached: dict[Value, set[Goal]] = defaultdict(set)
        pending = list(goals)
        while pending:
            value, goal = pending.pop()
            if goal not in reached[value]:
                reached[value].add(goal)
                pending.extend((source, goal) for source in sources[value])
        return reached

    def computed(self) -> Iterator[tuple[str, str]]:
        """Weights that no constant reaches, by name, with the names of their operators.

        What an operator multiplies with a constant weight is none, on whichever side.
        """
        constant = {(id(scope), name) for scope, name, _, _ in self.constants()}
        makers = self.makers()
        known = dict.fromkeys(constant, True)

        def is_constant(scope: Scope, name: str) -> bool:
            passed = []
            while (key := (id(scope.owner(name)), name)) not in known:
                passed.append(key)
                scope, maker = makers.get(key, (scope, None))
                if (
                    maker is None
                    or maker.op_type not in (*VIEWS, *CHAIN, "Gather")
                    or not maker.input
                ):
                    known[key] = False
                else:
                    name = maker.input[0]
            known.update(dict.fromkeys(passed, known[key]))
            return known[key]

        for scope in self.scopes:
            for node in scope.body.node:
                operator = operator_of(node)
                if operator is None:
                    continue
                names = {i: n for i, n in enumerate(node.input) if n and i in operator.weights}
                varying = {i: n for i, n in names.items() if not is_constant(scope, n)}
                if operator.may_vary and len(varying) < len(names):
                    continue
                for index, name in varying.items():
                    if index not in operator.may_vary:
                        yield name, operator.name
