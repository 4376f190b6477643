"""Weights behind constant expressions: which there are, and how a graph is rid of them.

A quantizer that folds constants, as onnxruntime's does, sees through Reshape(w, shape) and
Mul(w, 1), and rounds the result. So whatever constants alone determine and an operator reads as its
weight becomes an initializer:

    w, shape -> Reshape -> v -> MatMul(x, v)     becomes     v -> MatMul(x, v)

Left as they are: float weights behind Identity, Transpose and Cast; slices of whole rows of one,
which are guarded in the layout that they have; and integer codes with their scales.
This module looks and edits; `opening` has the expressions evaluated.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from .operators import CHAIN, FLOATS, VIEWS, Operator, operator_of
from .scopes import GraphIndex, Scope, Value
from .traversal import STANDARD, attribute, bodies, output_names, subgraphs
from .weights import QUANTIZED, SMALL_FLOATS, SMALLEST, Unfolded

RANDOM = (
    "RandomNormal",
    "RandomUniform",
    "RandomNormalLike",
    "RandomUniformLike",
    "Multinomial",
    "Bernoulli",
)

SCALES_SHARE = 8  # codes have at least so many elements for each of their scales

PARTS = tuple(op for op in VIEWS if op != "Concat")

LARGE = 64 * 64  # values of a constant that may become a weight at run time

ARITHMETIC = ("Add", "Sub", "Mul", "Div", "Max", "Min", "Sum")

MAX_LOOKS = 10_000_000  # at values behind others, so that no graph takes for ever

CONSTANT_IF = "an If with a constant condition returns it"

# Operators whose output has the values of their first input (Concat: of all), at other places.
MOVES = (*CHAIN, "CastLike", "Gather", *(op for op in VIEWS if op not in ("Reshape", "Flatten")))

Axes = tuple[int | None, ...]  # for each axis of a value that of the stored tensor; None is added

MULTIPLIED = "it is the data of {}, whose weights are computed"

OPEN_SIZE = "it depends on a size of an input, which is open"

# Operators that read a vector to calculate with it, as a bias or a gain.
CALCULATIONS = (
    *("Add", "Sub", "Mul", "Div", "Pow", "PRelu"),
    *("LayerNormalization", "BatchNormalization", "InstanceNormalization", "GroupNormalization"),
    *("SimplifiedLayerNormalization", "SkipLayerNormalization", "RMSNormalization"),
)

# Operators behind which a vector is one still.
VECTORS = ("Identity", "Cast", "CastLike", "Slice", "Split", "Unsqueeze", "Squeeze")


@dataclass(frozen=True)
class Layout:
    """How a value comes from a float constant. viewed: by more than Identity, Transpose, Cast."""

    axes: Axes
    rank: int
    viewed: bool = False


@dataclass(frozen=True)
class Expression:
    """A value of constants alone that is read as a weight: `name` in `scope`."""

    scope: Scope
    name: str

    @property
    def value(self) -> Value:
        """Where it is found."""
        return id(self.scope), self.name


@dataclass(frozen=True)
class Inferred:
    """What is known of a model's values before it runs.

    Attributes
    ----------
    shapes : of values of the main graph; None for what is open
    types : of all values, by names that mean one type everywhere
    """

    shapes: Mapping[str, Sequence[int | None]] = field(default_factory=dict)
    types: Mapping[str, int] = field(default_factory=dict)


class ConstantValues:
    """Which values of a model constants alone determine, and what they are made from.

    The model has no local functions. Of CastLike's second input only the type counts.
    """

    def __init__(
        self, proto: ModelProto, inferred: Inferred | None = None, fixed: bool = False
    ) -> None:
        """fixed: every size counts as known, as if no dimension of an input were open."""
        self._proto = proto
        self._inferred = inferred or Inferred()
        self._fixed = fixed
        self._index = GraphIndex(proto)
        self._scopes = {id(scope): scope for scope in self._index.scopes}
        self._nodes = [(scope, node) for scope in self._index.scopes for node in scope.body.node]
        self._tensors: dict[Value, TensorProto] = {}
        self._makers: dict[Value, NodeProto] = {}
        for scope in self._index.scopes:
            if isinstance(scope.body, GraphProto):
                for tensor in scope.body.initializer:
                    self._tensors[id(scope), tensor.name] = tensor
        for scope, node in self._nodes:
            self._makers.update(((id(scope), name), node) for name in node.output if name)
        self._needs, varying = self._needed()
        self._layouts: dict[Value, Layout] = {}
        self._known: set[Value] = set()
        self._order: dict[int, int] = {}  # by constant node: its place in an order to compute them
        self._looked_at = 0  # values, in search of what expressions are made from
        self._propagate(varying)

    def _needed(self) -> tuple[dict[int, set[Value]], set[int]]:
        """What each node reads, graphs inside it included; and the nodes with random numbers."""
        bodies_of = {id(scope.body): scope for scope in self._index.scopes}
        holders = {
            id(bodies_of[id(graph)]): node
            for _, node in self._nodes
            for attr in node.attribute
            for graph in subgraphs(attr)
        }
        needs: dict[int, set[Value]] = {id(node): set() for _, node in self._nodes}
        varying: set[int] = set()

        def read(scope: Scope, name: str) -> None:
            owner = scope.owner(name)
            value = (id(owner), name)  # of None where nothing defines it
            while scope is not owner and scope.parent:
                needs[id(holders[id(scope)])].add(value)
                scope = scope.parent

        for scope, node in self._nodes:
            if self._is_size(scope, node):
                continue
            read_of = node.input[:1] if _is(node, "CastLike") else node.input
            for name in filter(None, read_of):
                needs[id(node)].add((id(scope.owner(name)), name))
                read(scope, name)
            if node.op_type in RANDOM and node.domain in STANDARD:
                inside: Scope | None = scope
                varying.add(id(node))
                while inside and inside.parent:
                    varying.add(id(holders[id(inside)]))
                    inside = inside.parent
        for scope in self._index.scopes:
            for name in output_names(scope.body):
                read(scope, name)
        return needs, varying

    def _is_size(self, scope: Scope, node: NodeProto) -> bool:
        """Whether it yields sizes of a value that are known before the model runs."""
        if self._fixed and _is(node, "Shape", "Size"):
            return True
        sizes = self._sizes(scope, node)
        return sizes is not None and None not in sizes.reshape(-1).tolist()

    def _sizes(self, scope: Scope, node: NodeProto) -> npt.NDArray[Any] | None:
        """What Shape and Size yield, and what is picked from a Shape; None stands for open sizes.

        None where it is another node, or nothing is known.
        """
        owner = scope.owner(node.input[0]) if node.input else None
        if owner is None:
            return None
        if _is(node, "Gather", "Slice"):
            maker = self._makers.get((id(owner), node.input[0]))
            sizes = self._sizes(owner, maker) if maker and _is(maker, "Shape") else None
            return None if sizes is None else self._picked((id(scope), node.output[0]), node, sizes)
        shape = self._inferred.shapes.get(node.input[0])
        if shape is None or owner.body is not self._proto.graph:
            return None
        if _is(node, "Shape"):
            start, end = _integer(node, "start"), attribute(node, "end", None)
            return np.array(shape, object)[start:end]
        if _is(node, "Size"):
            return np.array(None if None in shape else prod(size or 0 for size in shape), object)
        return None

    def _picked(
        self, value: Value, node: NodeProto, sizes: npt.NDArray[Any]
    ) -> npt.NDArray[Any] | None:
        """What a Gather or Slice with constant places takes of a shape; None with others."""
        if node.op_type == "Gather":
            places = self._small(value, node, 1)
            if places is None or not ((-sizes.size <= places) & (places < sizes.size)).all():
                return None
            return np.asarray(sizes[places], object)
        starts, ends, steps = (
            self._integers(value, node, index, name)
            for index, name in ((1, "starts"), (2, "ends"), (4, "steps"))
        )
        stepless = len(node.input) < 5 or not node.input[4]
        if not starts or not ends or not (stepless or (steps and steps[0])):
            return None
        return sizes[starts[0] : ends[0] : steps[0] if steps else 1]

    def _propagate(self, varying: set[int]) -> None:
        """Find all constant values, each after those that it is made from."""
        readers: dict[Value, list[tuple[Scope, NodeProto]]] = defaultdict(list)
        left: dict[int, int] = {}
        pending: list[Value] = list(self._tensors)
        for scope, node in self._nodes:
            left[id(node)] = len(self._needs[id(node)])
            for value in self._needs[id(node)]:
                readers[value].append((scope, node))

        def compute(scope: Scope, node: NodeProto) -> None:
            if id(node) in varying:
                return
            self._order[id(node)] = len(self._order)
            for name in filter(None, node.output):
                pending.append((id(scope), name))

        for scope, node in self._nodes:
            if not left[id(node)]:
                compute(scope, node)
        while pending:
            value = pending.pop()
            if value in self._known:
                continue
            self._known.add(value)
            self._place(value)
            for scope, node in readers[value]:
                left[id(node)] -= 1
                if not left[id(node)]:
                    compute(scope, node)

    # How a value lies in the constant that it comes from.

    def _place(self, value: Value) -> None:
        """Note how the value comes from a float constant, if rows of it stay whole."""
        tensor = self.stored(value)
        if tensor is not None:
            if tensor.data_type in FLOATS:
                rank = len(tensor.dims)
                self._layouts[value] = Layout(tuple(range(rank)), rank)
        elif (node := self._makers.get(value)) and node.domain in STANDARD:
            sources = [self._layouts.get(self._resolved(value, name)) for name in node.input]
            if sources and (source := sources[0]):
                moved = self._moved(value, node, source, sources)
                if moved is not None:
                    self._layouts[value] = moved

    def _moved(
        self, value: Value, node: NodeProto, source: Layout, sources: Sequence[Layout | None]
    ) -> Layout | None:
        """The layout behind a node; None where rows do not stay whole."""
        axes, rank = source.axes, source.rank
        op, axis = node.op_type, _integer(node, "axis")
        of_rows = axes and axis is not None and axes[axis % len(axes)] == 0
        if op == "Identity" or (op == "Cast" and attribute(node, "to", 0) in FLOATS):
            return source
        if op == "Transpose":
            order = attribute(node, "perm", list(reversed(range(len(axes)))))
            fits = len(order) == len(axes)
            return Layout(tuple(axes[a] for a in order), rank, source.viewed) if fits else None
        if op == "Unsqueeze" and (added := self._integers(value, node, 1, "axes")):
            total = len(axes) + len(added)
            places = {place % total for place in added}
            old = iter(axes)
            if len(places) == len(added):
                made = tuple(None if place in places else next(old) for place in range(total))
                return Layout(made, rank, True)
        if op == "Squeeze" and axes and (dropped := self._integers(value, node, 1, "axes")):
            places = {place % len(axes) for place in dropped}
            if all(axes[place] is None for place in places):
                kept = tuple(old for place, old in enumerate(axes) if place not in places)
                return Layout(kept, rank, True)
        if op == "Slice" and axes and (starts := self._integers(value, node, 1, "starts")):
            cut = self._integers(value, node, 3, "axes") or range(len(starts))
            if all(axes[place % len(axes)] == 0 for place in cut):
                return Layout(axes, rank, True)
        alike = all(each and (each.axes, each.rank) == (axes, rank) for each in sources)
        if of_rows and (op == "Split" or (op == "Concat" and alike)):
            return Layout(axes, rank, True)
        return None

    def _integers(self, value: Value, node: NodeProto, index: int, name: str) -> list[int] | None:
        """An attribute with integers, or in later opsets an input; None where neither is there."""
        if index < len(node.input) and node.input[index]:
            values = self._small(value, node, index)
            return None if values is None else [int(each) for each in values.reshape(-1)]
        found = next((each for each in node.attribute if each.name == name), None)
        return list(found.ints) if found else None

    def _small(self, value: Value, node: NodeProto, index: int) -> npt.NDArray[Any] | None:
        """The constant with few numbers that is an input of a value's maker; None for another."""
        tensor = self.stored(self._resolved(value, node.input[index]))
        small = tensor is not None and prod(tensor.dims) <= SMALLEST
        if tensor is None or not small or tensor.data_location == TensorProto.EXTERNAL:
            return None
        return numpy_helper.to_array(tensor)

    # Expressions.

    @cached_property
    def expressions(self) -> list[Expression]:
        """The values to evaluate, each once."""
        found: dict[Value, Expression] = {}
        for value, operator, node, index in self._read_as_weights():
            if not self._stays(value, operator, node, index):
                first = self._behind_transposes(value)
                if self.stored(first) is None and self._holds_weights(first):
                    found[first] = Expression(self._scopes[first[0]], first[1])
        return list(found.values())

    def _read_as_weights(self) -> Iterator[tuple[Value, Operator | None, NodeProto, int]]:
        """Constant values where nodes that vary read them: as a weight, or to hand it on to one.

        The operator is None if there are nodes in between.
        """
        for value in self._index.values():
            if value not in self._known:
                continue
            for scope, node, index in self._index.readers(value):
                if id(node) in self._order:
                    continue
                operator = operator_of(node)
                if operator and index in operator.weights:
                    yield value, operator, node, index
                handed_on = (self._index.is_weight(scope, name) for name in node.output)
                if node.op_type in PARTS and index == 0 and any(handed_on):
                    yield value, None, node, index

    def _stays(self, value: Value, operator: Operator | None, node: NodeProto, index: int) -> bool:
        """Whether it is guarded as it is stored, in rows that are its operator's outputs."""
        layout = self._layouts.get(value)
        if layout is None:
            return False
        if not layout.viewed:
            return True
        if layout.rank < 2 or operator is None or not operator.behind_views:
            return False
        outputs = operator.output_axes(node, index, len(layout.axes))
        return {layout.axes[axis] for axis in outputs} - {None} == {0}

    def _behind_transposes(self, value: Value) -> Value:
        """The value before Identity and Transpose."""
        while node := self._makers.get(value):
            if node.domain not in STANDARD or node.op_type not in ("Identity", "Transpose"):
                break
            value = self._resolved(value, node.input[0])
        return value

    def _holds_weights(self, value: Value) -> bool:
        """Whether constants of some size are behind it, other than codes with their scales."""
        if self._looked_at > MAX_LOOKS:
            return True
        behind = self.behind([value])
        self._looked_at += len(behind)
        makers = filter(None, map(self._makers.get, behind))
        decodes = any(_is(maker, "DequantizeLinear") for maker in makers)
        kinds = (*QUANTIZED, *SMALL_FLOATS) if decodes else QUANTIZED
        sizes = [(t.data_type in kinds, _size(t)) for t in self._sources(behind)]
        codes = max((size for is_code, size in sizes if is_code), default=0)
        others = sum(size for _, size in sizes) - codes
        are_codes = codes >= SMALLEST and others * SCALES_SHARE <= codes
        return codes + others >= SMALLEST and not are_codes

    @property
    def asks_for_sizes(self) -> bool:
        """Whether a node reads the size of a value."""
        return any(_is(node, "Shape", "Size") for _, node in self._nodes)

    @property
    def asks_for_types(self) -> bool:
        """Whether the type of a value decides what an expression yields."""
        return any(_is(node, "CastLike") for _, node in self._nodes)

    def open_sized(self, fixed: "ConstantValues") -> list[Unfolded]:
        """What becomes a weight of constants alone once all sizes are known.

        fixed: the same model's values, as if they were
        """
        here = {id(scope.body): id(scope) for scope in fixed._index.scopes}
        known = {(here[id(self._scopes[scope].body)], name) for scope, name in self._known}
        found = []
        for expression in fixed.expressions:
            if expression.value in known:
                continue
            if loose := fixed.loose(expression.value, known):
                names = frozenset(tensor.name for tensor in loose)
                size = sum(map(_size, loose))
                found.append(Unfolded(expression.name, OPEN_SIZE, names, size))
        told = {each.name for each in self.unreachable()}
        return found + [
            replace(each, reason=OPEN_SIZE) for each in fixed.unreachable() if each.name not in told
        ]

    def loose(self, value: Value, known: set[Value]) -> list[TensorProto]:
        """The constants behind a value that may be weights, and are not guarded where they are.

        Guarded is what comes here moved only: its values are those of the constant, at other
        places. What an operator computes with a guarded weight is no weight but an activation. A
        vector that is read to calculate with is no matrix.

        known: the values that depend on no open size
        """
        found: dict[Value, list[TensorProto]] = {}
        pending, seen = [(value, True, False)], set[tuple[Value, bool, bool]]()
        while pending:
            value, moved, calculates = key = pending.pop()
            if key in seen:
                continue
            seen.add(key)
            self._looked_at += 1
            if self._looked_at > MAX_LOOKS:
                return [TensorProto(name=value[1], dims=[SMALLEST])]
            node = self._makers.get(value)
            if (tensor := self.stored(value)) is not None:
                if not (moved if len(tensor.dims) > 1 else calculates):
                    found[value] = [tensor]
            elif node and not self._has_weight(value, node, known):
                found[value] = list(_held(node, value[1]))
                moves = node.op_type in MOVES and node.domain in STANDARD
                names = node.input[: None if node.op_type == "Concat" else 1] if moves else ()
                calculates = node.op_type in CALCULATIONS or (
                    calculates and node.op_type in VECTORS
                )
                needed = (self._resolved(value, name) for name in names)
                for each in needed if moves else self._needs[id(node)]:
                    pending.append((each, moved and moves, calculates))
        return [each for some in found.values() for each in some if _size(each) >= SMALLEST]

    def _has_weight(self, value: Value, node: NodeProto, known: set[Value]) -> bool:
        """Whether the maker of a value is an operator with a weight that is guarded."""
        operator = operator_of(node)
        for index in operator.weights if operator and operator.behind_views else ():
            if index < len(node.input):
                read = self._resolved(value, node.input[index])
                tensor = self.stored(self._origin(read))
                inferred = self._inferred.shapes.get(read[1], ()) if read in known else ()
                for shape in (tensor.dims if tensor else (), inferred):
                    if len(shape) > 1 and prod(size or 0 for size in shape) >= SMALLEST:
                        return True
        return False

    def _origin(self, value: Value) -> Value:
        """What a value was before operators that move values of one tensor."""
        apart = {"Concat", "Gather"}
        while (maker := self._makers.get(value)) and _is(maker, *({*MOVES} - apart)):
            value = self._resolved(value, maker.input[0])
        return value

    def unreachable(self) -> list[Unfolded]:
        """Constants that are weights once an If with a constant condition is gone."""
        found = []
        for scope, node in self._nodes:
            condition = (id(scope.owner(node.input[0])), node.input[0]) if node.input else (0, "")
            if node.op_type != "If" or id(node) in self._order or condition not in self._known:
                continue
            for place, name in enumerate(node.output):
                if not self._index.is_weight(scope, name):
                    continue
                for attr in node.attribute:
                    for graph in subgraphs(attr):
                        inside = next(s for s in self._index.scopes if s.body is graph)
                        if place >= len(graph.output):
                            continue
                        inner = graph.output[place].name
                        value = (id(inside.owner(inner)), inner)
                        if value in self._known:
                            found.append(self.unfolded(value, CONSTANT_IF))
        return [each for each in found if each.size >= SMALLEST]

    def at_run_time(self, guess: bool = False) -> list[Unfolded]:
        """Large constants that arithmetic with a single number, Where or If make weights of.

        The number, or the condition, is known only at run time. Tables that are added to or
        multiplied with whole activations, as for positions, become no weights.

        guess: whether numbers of unknown shape count as single ones
        """
        returned: dict[Value, list[Value]] = defaultdict(list)  # by what a branch returns: the If's
        for scope, node in self._nodes:
            if _is(node, "If") and id(node) not in self._order:
                for attr in node.attribute:
                    for graph in subgraphs(attr):
                        inside = next(s for s in self._index.scopes if s.body is graph)
                        for name, output in zip(output_names(graph), node.output, strict=False):
                            returned[id(inside.owner(name)), name].append((id(scope), output))
        found = []
        for value in [*self._known]:
            tensor = self.stored(value)
            if tensor is None or tensor.data_type not in FLOATS or prod(tensor.dims) < LARGE:
                continue
            if through := self._joined(value, returned, guess):
                names, size = frozenset([value[1]]), prod(tensor.dims)
                found.append(Unfolded(value[1], through, names, size, at_run_time=True))
        return sorted(found, key=lambda each: each.name)

    def _joined(self, value: Value, returned: Mapping[Value, list[Value]], guess: bool) -> str:
        """The operator through which a constant becomes a weight at run time; "" for none."""
        pending, seen = [(value, "")], set[tuple[Value, str]]()
        while pending:
            value, through = key = pending.pop()
            if key in seen:
                continue
            seen.add(key)
            pending += [(output, "If") for output in returned.get(value, ())]
            for scope, node, index in self._index.readers(value):
                operator = operator_of(node)
                inputs = list(enumerate(node.input))
                if operator:
                    rivals = [n for i, n in inputs if i in operator.weights and i != index]
                    is_weight = operator.behind_views and index in operator.weights
                    if through and is_weight and all(self._varies(scope, n) for n in rivals):
                        return through
                    continue
                step = through
                if _is(node, "Where") and index:
                    others = [name for i, name in inputs if i and i != index]
                    if self._varies(scope, node.input[0]):
                        step = step or "Where"
                elif _is(node, *ARITHMETIC):
                    others = [name for i, name in inputs if i != index]
                elif _is(node, *CHAIN, *VIEWS) and index == 0 and node.op_type != "Concat":
                    others = []
                else:
                    continue
                varying = [name for name in others if self._varies(scope, name)]
                if all(self._is_one(scope, name, guess) for name in varying):
                    step = step or (node.op_type if varying else "")
                    pending += [((id(scope), name), step) for name in node.output if name]
        return ""

    def _varies(self, scope: Scope, name: str) -> bool:
        """Whether constants alone do not determine a value."""
        return (id(scope.owner(name)), name) not in self._known

    def _is_one(self, scope: Scope, name: str, guess: bool) -> bool:
        """Whether a value is a single number."""
        owner = scope.owner(name)
        main = owner is not None and owner.body is self._proto.graph
        shape = self._inferred.shapes.get(name) if main else None
        return guess if shape is None else all(size == 1 for size in shape)

    def multiplied(self) -> list[Unfolded]:
        """Constants that operators multiply with weights that are none, as a Conv its data.

        Such a constant is the matrix of a product; quantizers round it as they round weights.
        """
        found = []
        for value in self._index.values():
            for scope, node, index in self._index.readers(value) if value in self._known else ():
                operator = operator_of(node)
                if index != 0 or operator is None or 0 in operator.weights:
                    continue
                read = [node.input[i] for i in operator.weights if i < len(node.input)]
                if not any((id(scope.owner(name)), name) in self._known for name in read):
                    found.append(self.unfolded(value, MULTIPLIED.format(operator.name)))
        return [each for each in found if each.size >= SMALLEST]

    def unfolded(self, value: Value, reason: str) -> Unfolded:
        """What a report says of an expression that could not be evaluated."""
        behind = self.behind([value]) if self._looked_at <= MAX_LOOKS else set()
        self._looked_at += len(behind)
        sources = self._sources(behind)
        size = sum(map(_size, sources)) if behind else SMALLEST
        return Unfolded(value[1], reason, frozenset(t.name for t in sources), size)

    # What an expression is made from.

    def stored(self, value: Value) -> TensorProto | None:
        """The initializer, or the tensor of the Constant node, that the value is."""
        if value in self._tensors:
            return self._tensors[value]
        node = self._makers.get(value)
        if node is None or node.op_type != "Constant" or node.domain not in STANDARD:
            return None
        return next((a.t for a in node.attribute if a.name == "value" and a.HasField("t")), None)

    def _resolved(self, value: Value, name: str) -> Value:
        """The value that `name` is for the maker of `value`."""
        return id(self._scopes[value[0]].owner(name)), name

    def behind(self, values: Iterable[Value]) -> set[Value]:
        """The values from which these are computed, themselves included."""
        pending, seen = list(values), set[Value]()
        while pending:
            value = pending.pop()
            if value not in seen:
                seen.add(value)
                if value not in self._tensors and (node := self._makers.get(value)):
                    pending.extend(self._needs[id(node)])
        return seen

    def _sources(self, values: set[Value]) -> list[TensorProto]:
        """The constants among these values, and those inside the nodes that make them."""
        found: list[TensorProto] = []
        done: set[int] = set()
        for value in sorted(values, key=lambda value: value[1]):
            node = self._makers.get(value)
            if value in self._tensors:
                found.append(self._tensors[value])
            elif node is not None and id(node) not in done:
                done.add(id(node))
                found += _held(node, value[1])
        return found

    def model_of(self, expressions: Sequence[Expression]) -> ModelProto | str:
        """A model without inputs whose outputs are the expressions, all of one scope.

        Or what is in the way of one.
        """
        values = self.behind(expression.value for expression in expressions)
        if len({name for _, name in values}) < len(values):
            return "two values have the same name"
        names = {name for _, name in values}
        proto = ModelProto(ir_version=max(self._proto.ir_version, 8))
        proto.opset_import.extend(self._proto.opset_import)
        proto.graph.name = "constants"
        made = {
            id(node): (self._scopes[value[0]], node)
            for value in values
            if value not in self._tensors and (node := self._makers.get(value))
        }
        for scope, node in sorted(made.values(), key=lambda made: self._order[id(made[1])]):
            evaluable = self._evaluable(scope, node)
            if evaluable is None:
                return f"the type of {node.input[1]!r} is not known"
            proto.graph.node.append(evaluable)
        proto.graph.initializer.extend(self._tensors[v] for v in values if v in self._tensors)
        for number, expression in enumerate(expressions):
            output = _unused(f"output {number}", names)
            # Identity makes a dense tensor of a sparse one
            proto.graph.node.append(helper.make_node("Identity", [expression.name], [output]))
            proto.graph.output.add(name=output)
        return proto

    def _evaluable(self, scope: Scope, node: NodeProto) -> NodeProto | None:
        """The node, or one that yields the same without an input of the model.

        None for a CastLike to a type that is not known.
        """
        sizes = self._sizes(scope, node)
        if sizes is not None and self._is_size(scope, node):
            value = numpy_helper.from_array(sizes.astype(np.int64))
            return helper.make_node("Constant", [], node.output, value=value)
        if not _is(node, "CastLike"):
            return node
        like = self.stored((id(scope.owner(node.input[1])), node.input[1]))
        elem_type = like.data_type if like else self._inferred.types.get(node.input[1])
        if not elem_type:
            return None
        return helper.make_node("Cast", node.input[:1], node.output, to=elem_type)

    def replace(self, folded: dict[Value, TensorProto]) -> None:
        """Let these values be initializers, and drop what nothing reads any more."""
        behind = self.behind(folded)
        dropped = {id(node) for v in behind if (node := self._makers.get(v))}
        names = {name for body in bodies(self._proto) for node in body.node for name in node.output}
        for value, tensor in folded.items():
            node, body = self._makers[value], self._scopes[value[0]].body
            place = list(node.output).index(value[1])
            node.output[place] = _unused(f"{value[1]}_unfolded", names)
            assert isinstance(body, GraphProto)
            body.initializer.append(tensor)
        self._drop_unread(dropped, {name for _, name in behind - folded.keys()})
        self._proto.ir_version = max(self._proto.ir_version, 4)  # initializers are no inputs

    def _drop_unread(self, nodes: set[int], constants: set[str]) -> None:
        """Remove those of the nodes and initializers that nothing reads."""
        everywhere = bodies(self._proto)
        readers = Counter(name for body in everywhere for name in output_names(body))
        readers.update(name for body in everywhere for node in body.node for name in node.input)
        makers = {
            name: node for s, node in self._nodes if id(node) in nodes for name in node.output
        }
        pending = [node for _, node in self._nodes if id(node) in nodes]
        unread: dict[int, NodeProto] = {}
        while pending:
            node = pending.pop()
            if id(node) in unread or any(readers[name] for name in node.output):
                continue
            unread[id(node)] = node
            for name in _read_inside(node):
                readers[name] -= 1
                if name in makers:
                    pending.append(makers[name])
        for body in everywhere:
            kept = [node for node in body.node if id(node) not in unread]
            if len(kept) < len(body.node):
                del body.node[:]
                body.node.extend(kept)
            if isinstance(body, GraphProto):
                there = {tensor.name for tensor in body.initializer}
                gone = {name for name in constants & there if readers[name] <= 0}
                _remove_named(body.initializer, gone)
                _remove_named(body.input, gone)


def _is(node: NodeProto, *operators: str) -> bool:
    return node.op_type in operators and node.domain in STANDARD


def _size(tensor: TensorProto) -> int:
    """How many values it has; of strings the characters, which may be split."""
    is_text = tensor.data_type == TensorProto.STRING
    return sum(map(len, tensor.string_data)) if is_text else prod(tensor.dims)


def _unused(name: str, names: set[str]) -> str:
    """The name, or a longer one that is not among these; it is added to them."""
    while name in names:
        name += "_"
    names.add(name)
    return name


def _remove_named(fields: Any, names: set[str]) -> None:
    for place in reversed(range(len(fields))) if names else ():
        if fields[place].name in names:
            del fields[place]


def _integer(node: NodeProto, name: str) -> int | None:
    """An attribute that is a number, 0 unless it is given; None where its function gives it."""
    found = next((each for each in node.attribute if each.name == name), None)
    return 0 if found is None else None if found.ref_attr_name else found.i


def _held(node: NodeProto, name: str) -> Iterator[TensorProto]:
    """The tensors in a node's attributes, in those of the nodes inside it, and their initializers.

    Those that have no name of their own are given without their data, and with this name.
    """
    pending = [node]
    while pending:
        for attr in pending.pop().attribute:
            if attr.HasField("t"):
                strings = attr.t.string_data
                yield TensorProto(
                    name=name, data_type=attr.t.data_type, dims=attr.t.dims, string_data=strings
                )
            counts = len(attr.floats) + len(attr.ints) + sum(map(len, (attr.s, *attr.strings)))
            if attr.HasField("sparse_tensor"):
                counts += prod(attr.sparse_tensor.values.dims)
            if counts and attr.name.startswith(("value", "sparse_value")):
                yield TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[counts])
            for graph in subgraphs(attr):
                yield from graph.initializer
                pending.extend(graph.node)


def _read_inside(node: NodeProto) -> Iterator[str]:
    """What a node reads and what the graphs inside it read or return."""
    pending = [node]
    while pending:
        inner = pending.pop()
        yield from inner.input
        for attr in inner.attribute:
            for graph in subgraphs(attr):
                yield from output_names(graph)
                pending.extend(graph.node)
