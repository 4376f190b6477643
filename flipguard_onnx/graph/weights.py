"""Find the weights of a model: what each is, how its rows lie, and every place that reads it.

A weight is a constant float tensor that reaches a weight input of an operator of `OPERATORS`,
directly or through Identity, Transpose and Cast, in whatever graph, subgraph or model-local
function. A stack of matrices from which a Gather picks has the layout of the operator that
multiplies these. (Other expressions of constants have become such tensors when the model was
opened, see constants.py.) Every other constant float tensor is listed with the reason why it is
left alone.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod
from typing import Any

import numpy.typing as npt
from onnx import ModelProto, NodeProto, TensorProto, helper

from ..errors import UnsupportedModelError
from ..quantization.layout import Layout
from ..quantization.schemes import Blocks
from ..reports.scan import UNGUARDABLE, Skipped, SkipReason
from .operands import all_but
from .operators import FLOATS, Operator, operator_of, priority
from .scopes import GraphIndex, Scope, Use

QUANTIZED = (
    TensorProto.INT8,
    TensorProto.UINT8,
    TensorProto.INT4,
    TensorProto.UINT4,
    TensorProto.INT2,
    TensorProto.UINT2,
)

# These are codes if a DequantizeLinear reads them; behind a Cast they are weights in few bytes.
SMALL_FLOATS = (TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT8E5M2, TensorProto.FLOAT4E2M1)

OTHER_FLOATS = (
    TensorProto.DOUBLE,
    TensorProto.FLOAT8E4M3FN,
    TensorProto.FLOAT8E4M3FNUZ,
    TensorProto.FLOAT8E5M2,
    TensorProto.FLOAT8E5M2FNUZ,
    TensorProto.FLOAT4E2M1,
)

BIASES = {"Gemm": 2, "LSTM": 3, "GRU": 3, "RNN": 3}  # inputs that are biases of two axes

Place = tuple[tuple[str, ...], str]  # the path of a scope, and a name in it

SMALLEST = 64  # weights; the scales of a smaller tensor would take more than its codes save


@dataclass(frozen=True)
class Weight:
    """A constant tensor that can be guarded.

    Attributes
    ----------
    name : unique in the model
    scope : the graph or function that it is in
    tensor : its data
    node : the Constant node that holds it, None for an initializer
    operator : the operator whose layout it has
    rows : the stored axes that number its output channels
    uses : every place that reads it
    is_output : whether it is an output of its graph, too, itself or behind a chain
    is_input : whether it is the default of an input of its graph
    """

    name: str
    scope: Scope
    tensor: TensorProto
    node: NodeProto | None
    operator: Operator
    rows: tuple[int, ...]
    uses: tuple[Use, ...]
    is_output: bool = False
    is_input: bool = False

    @property
    def others(self) -> tuple[str, ...]:
        """What reads it besides weighted operators, and who may replace it, in words."""
        readers = {use.node.op_type for use in self.uses if use.operator is None}
        places = ["a graph output"] * self.is_output + ["a graph input"] * self.is_input
        return (*sorted(readers), *places)

    @property
    def op(self) -> str:
        """The operator's name."""
        return self.operator.name

    @property
    def tensor_name(self) -> str:
        """The name in the graph, where subgraphs may repeat it."""
        return self.node.output[0] if self.node else self.tensor.name

    @property
    def place(self) -> Place:
        """What tells it from all others, whatever the order of nodes and attributes."""
        return self.scope.path, self.tensor_name

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.dims)

    @property
    def size(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * helper.tensor_dtype_to_np_dtype(self.tensor.data_type).itemsize

    @property
    def layout(self) -> Layout:
        return Layout(self.shape, self.rows)

    @property
    def perm(self) -> tuple[int, ...]:
        """See `Layout.perm`."""
        return self.layout.perm

    def blocks(self, size: int | None, flat: bool) -> Blocks:
        """See `Layout.blocks`."""
        return self.layout.blocks(size, flat)

    def canonical(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """See `Layout.canonical`."""
        return self.layout.canonical(values)

    def stored(self, flat: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """See `Layout.stored`."""
        return self.layout.stored(flat)


@dataclass(frozen=True)
class Constant:
    """A float tensor that is no weight, but that arithmetic could make one while the model runs.

    readers: the types of the nodes that read it, in words.
    """

    name: str
    tensor: TensorProto
    readers: str

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.dims)

    @property
    def size(self) -> int:
        return prod(self.shape)

    @property
    def layouts(self) -> list[Layout]:
        """Those that it would have as a weight; axes of one entry are left out.

        Its rows lie along the first axis, or along all but the last or the last but one.
        """
        shape = tuple(size for size in self.shape if size > 1)
        if len(shape) < 2:
            return [Layout((1, self.size), (0,))]
        last = len(shape) - 1
        rows = dict.fromkeys(((0,), all_but(last - 1, last + 1), all_but(last, last + 1)))
        return [Layout(shape, axes) for axes in rows]


@dataclass(frozen=True)
class Unfolded:
    """A weight that constants alone determine, but that could not be evaluated.

    Or a constant that becomes a weight at run time, in which case the reason says through what.

    Attributes
    ----------
    name, reason : of the value, and why
    sources : names of the constants that it is made from
    size : how many values these have, or it has if that is more
    at_run_time : whether it is such a constant
    """

    name: str
    reason: str
    sources: frozenset[str]
    size: int
    at_run_time: bool = False


def find_weights(
    proto: ModelProto,
    include: tuple[str, ...] = (),
    exclude: tuple[str, ...] = (),
    partly: bool = False,
    unfolded: Sequence[Unfolded] = (),
) -> tuple[list[Weight], list[Skipped]]:
    """All weights of a model, and all tensors that are left alone although they could be weights.

    Parameters
    ----------
    proto : the model
    include, exclude : shell patterns over tensor names; other tensors are skipped. An empty
        `include` selects all
    partly : accept a model most of whose weights are quantized already
    unfolded : weights behind constant expressions that could not be evaluated; they are skipped,
        and what they are made from is not listed besides

    Raises
    ------
    UnsupportedModelError : most of the weights are quantized already
    """
    index = GraphIndex(proto)
    weights: list[Weight] = []
    skipped: list[Skipped] = []
    quantized: dict[str, int] = defaultdict(int)
    has_floats = False
    constants = list(index.constants())
    names = _unique_names([(scope.path, name) for scope, name, _, _ in constants])
    parts = frozenset().union(*(each.sources for each in unfolded))
    for name, (scope, plain_name, tensor, node) in zip(names, constants, strict=True):
        shape = tuple(tensor.dims)
        uses = tuple(index.uses(scope, plain_name, tuple(range(len(shape))), tensor.data_type))
        readers = index.operators(scope, plain_name)
        is_float_code = tensor.data_type in SMALL_FLOATS and "DequantizeLinear" in readers
        is_code = tensor.data_type in QUANTIZED or is_float_code
        has_floats |= is_float_code
        if is_code and prod(shape) >= SMALLEST and len(shape) > 1:
            operators = ", ".join(readers) or "nothing"
            quantized[operators] += prod(shape)
            kind = TensorProto.DataType.Name(tensor.data_type)
            detail = f"{kind}, feeds {operators}"
            skipped.append(Skipped(name, shape, SkipReason.QUANTIZED, detail))
        elif tensor.data_type in (*FLOATS, *OTHER_FLOATS):
            first, is_output = _first_operator(uses), index.is_output(scope, plain_name)
            reason, detail = _why_not(tensor, uses, first, index.returned_by(scope, plain_name))
            if reason in (None, *UNGUARDABLE) and not selected(name, include):
                reason = SkipReason.NOT_INCLUDED
            if reason in (None, *UNGUARDABLE) and any(fnmatchcase(name, p) for p in exclude):
                reason = SkipReason.EXCLUDED
            if reason and plain_name in parts:
                continue
            if reason:
                skipped.append(Skipped(name, shape, reason, detail))
            elif first and first.operator:
                rows, operator = first.output_axes(), first.operator
                is_input = node is None and index.is_input(scope, plain_name)
                weights.append(
                    Weight(name, scope, tensor, node, operator, rows, uses, is_output, is_input)
                )
    for name, tensor, operators in index.other_constants():
        if name not in parts:
            shape = tuple(tensor.dims)
            reason = SkipReason.NO_OPERATOR if len(shape) > 1 else SkipReason.ONE_AXIS
            skipped.append(Skipped(name, shape, reason, operators))
    for each in unfolded:
        reason = SkipReason.NOT_FOLDED if each.size >= SMALLEST else SkipReason.TOO_SMALL
        reason = SkipReason.AT_RUN_TIME if each.at_run_time else reason
        detail = each.reason if each.size >= SMALLEST else str(SMALLEST)
        if not selected(each.name, include):
            reason = SkipReason.NOT_INCLUDED
        if any(fnmatchcase(each.name, p) for p in exclude):
            reason = SkipReason.EXCLUDED
        skipped.append(Skipped(each.name, (each.size,), reason, detail))
    for name, op in dict.fromkeys(index.computed()):
        skipped.append(Skipped(name, (), SkipReason.NOT_CONSTANT, op))
    if not partly and sum(quantized.values()) > sum(weight.size for weight in weights):
        found = ", ".join(sorted(quantized))
        kinds = "integers or floats of 8 bits and fewer" if has_floats else "integers"
        raise UnsupportedModelError(
            "already quantized: {found}",
            found=f"{sum(quantized.values()):,} weights are {kinds} (read by {found})",
            allowed="a float model, so guard the one that this was made from",
        )
    return weights, skipped


def other_constants(
    proto: ModelProto, weights: Sequence[Weight], skipped: Sequence[Skipped]
) -> list[Constant]:
    """The float constants of some size that are no weights, save those that the user left out.

    weights, skipped : what `find_weights` found
    """
    index = GraphIndex(proto)
    left_out = {
        s.name for s in skipped if s.reason in (SkipReason.EXCLUDED, SkipReason.NOT_INCLUDED)
    }
    known = left_out | {weight.name for weight in weights}
    constants = list(index.constants())
    names = _unique_names([(scope.path, name) for scope, name, _, _ in constants])
    found = [
        Constant(name, tensor, ", ".join(index.readers_of(scope, plain_name)))
        for name, (scope, plain_name, tensor, _) in zip(names, constants, strict=True)
        if tensor.data_type in FLOATS
    ]
    found += [Constant(*each) for each in index.other_constants() if each[1].float_data]
    return [each for each in found if each.size >= SMALLEST and each.name not in known]


def _unique_names(places: Sequence[Place]) -> list[str]:
    """A name for each constant: its own, or with a number where one of an earlier path has it.

    The order of nodes and attributes, which tools change, does not matter.
    """
    names: dict[int, str] = {}
    taken: set[str] = set()
    counts: dict[str, int] = defaultdict(lambda: 1)
    for index in sorted(range(len(places)), key=lambda i: places[i][0]):
        name = plain_name = places[index][1]
        while name in taken:
            counts[plain_name] += 1
            name = f"{plain_name}#{counts[plain_name]}"
        taken.add(name)
        names[index] = name
    return [names[index] for index in range(len(places))]


def selected(name: str, include: tuple[str, ...]) -> bool:
    """Whether a pattern names the tensor, or there is none."""
    return not include or any(fnmatchcase(name, pattern) for pattern in include)


def _what_reads(uses: tuple[Use, ...], returned_by: set[str]) -> tuple[SkipReason, str]:
    """The reason for a tensor that is nobody's weight, with its readers.

    returned_by: as GraphIndex has it.
    """
    weighted = [use for use in uses if operator_of(use.node)]
    around = {use.node.op_type for use in uses} & {"Loop", "Scan"} | returned_by - {""}
    if around and not weighted:
        return SkipReason.NOT_FOLLOWED, ", ".join(sorted(around))
    reason, shown = SkipReason.NO_OPERATOR, uses
    if weighted:
        biases = all(use.index == BIASES.get(use.node.op_type) for use in weighted)
        reason, shown = SkipReason.BIAS if biases else SkipReason.NO_WEIGHT, tuple(weighted)
    readers = sorted({use.node.op_type for use in shown}) + ["a graph output"] * ("" in returned_by)
    return reason, ", ".join(readers) or "nothing"


def _first_operator(uses: tuple[Use, ...]) -> Use | None:
    """The use whose layout the tensor gets: a direct one, then by the order of `OPERATORS`."""

    def rank(use: Use) -> tuple[bool, int]:
        assert use.operator
        return not use.direct, priority(use.operator)

    return min((use for use in uses if use.operator), key=rank, default=None)


def _why_not(
    tensor: TensorProto, uses: tuple[Use, ...], first: Use | None, returned_by: set[str]
) -> tuple[SkipReason | None, str]:
    """The reason why a tensor is left alone, with its detail; None and "" for a weight."""
    rank, size = len(tensor.dims), prod(tensor.dims)
    if rank < 2:
        reshaped = first and first.node.op_type == "Reshape" and size >= SMALLEST
        if reshaped:
            return SkipReason.NOT_FOLDED, "1-D, and gets its shape when the model runs"
        return (SkipReason.ONE_AXIS if rank else SkipReason.SCALAR), ""
    if first is None:
        return _what_reads(uses, returned_by)
    if size < SMALLEST:
        return SkipReason.TOO_SMALL, str(SMALLEST)
    if tensor.data_type not in FLOATS:
        return SkipReason.TYPE, TensorProto.DataType.Name(tensor.data_type)
    return None, ""
