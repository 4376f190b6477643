"""Find the weights of a model: what each is, how its rows lie, and every place that reads it.

A weight is a constant float tensor that reaches a weight input of an operator of `OPERATORS`,
directly or through Identity, Transpose and Cast, in whatever graph, subgraph or model-local
function. Every other constant float tensor is listed with the reason why it is left alone.
"""

from collections import defaultdict
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod
from typing import Any

import numpy.typing as npt
from onnx import ModelProto, NodeProto, TensorProto, helper

from ..errors import UnsupportedModelError
from ..quantization.layout import Layout
from ..quantization.schemes import Blocks
from ..reports.scan import Skipped, SkipReason
from .operators import FLOATS, Operator, operator_of, priority
from .scopes import GraphIndex, Scope, Use

QUANTIZED = (TensorProto.INT8, TensorProto.UINT8, TensorProto.INT4, TensorProto.UINT4)

BIASES = {"Gemm": 2, "LSTM": 3, "GRU": 3, "RNN": 3}  # inputs that are biases of two axes

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
    """

    name: str
    scope: Scope
    tensor: TensorProto
    node: NodeProto | None
    operator: Operator
    rows: tuple[int, ...]
    uses: tuple[Use, ...]

    @property
    def op(self) -> str:
        """The operator's name."""
        return self.operator.name

    @property
    def tensor_name(self) -> str:
        """The name in the graph, where subgraphs may repeat it."""
        return self.node.output[0] if self.node else self.tensor.name

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


def find_weights(
    proto: ModelProto,
    include: tuple[str, ...] = (),
    exclude: tuple[str, ...] = (),
    partly: bool = False,
) -> tuple[list[Weight], list[Skipped]]:
    """All weights of a model, and all tensors that are left alone although they could be weights.

    Parameters
    ----------
    proto : the model
    include, exclude : shell patterns over tensor names; other tensors are skipped. An empty
        `include` selects all
    partly : accept a model most of whose weights are quantized already

    Raises
    ------
    UnsupportedModelError : most of the weights are quantized already
    """
    index = GraphIndex(proto)
    weights: list[Weight] = []
    skipped: list[Skipped] = []
    quantized: dict[str, int] = defaultdict(int)
    seen: dict[str, int] = defaultdict(int)
    names: set[str] = set()
    for scope, plain_name, tensor, node in index.constants():
        name = plain_name
        while name in names:
            seen[plain_name] += 1
            name = f"{plain_name}#{seen[plain_name] + 1}"
        names.add(name)
        shape = tuple(tensor.dims)
        uses = tuple(index.uses(scope, plain_name, tuple(range(len(shape))), tensor.data_type))
        if tensor.data_type in QUANTIZED and prod(shape) >= SMALLEST and len(shape) > 1:
            operators = ", ".join(index.operators(scope, plain_name)) or "nothing"
            quantized[operators] += prod(shape)
            kind = TensorProto.DataType.Name(tensor.data_type)
            detail = f"{kind}, feeds {operators}"
            skipped.append(Skipped(name, shape, SkipReason.QUANTIZED, detail))
        elif tensor.data_type in (*FLOATS, TensorProto.DOUBLE):
            first = _first_operator(uses)
            reason, detail = _why_not(tensor, uses, first, index.is_output(scope, plain_name))
            if not reason and include and not any(fnmatchcase(name, p) for p in include):
                reason = SkipReason.NOT_INCLUDED
            if not reason and any(fnmatchcase(name, p) for p in exclude):
                reason = SkipReason.EXCLUDED
            if reason:
                skipped.append(Skipped(name, shape, reason, detail))
            elif first and first.operator:
                rows, operator = first.output_axes(), first.operator
                weights.append(Weight(name, scope, tensor, node, operator, rows, uses))
    for name, op in index.computed():
        skipped.append(Skipped(name, (), SkipReason.NOT_CONSTANT, op))
    if not partly and sum(quantized.values()) > sum(weight.size for weight in weights):
        readers = ", ".join(sorted(quantized))
        raise UnsupportedModelError(
            "already quantized: {found}",
            found=f"{sum(quantized.values()):,} weights are integers (read by {readers})",
            allowed="a float model, so guard the one that this was made from",
        )
    return weights, skipped


def _what_reads(uses: tuple[Use, ...]) -> tuple[SkipReason, str]:
    """The reason for a tensor that is nobody's weight, with its readers."""
    weighted = [use for use in uses if operator_of(use.node)]
    loops = [use for use in uses if use.node.op_type in ("Loop", "Scan")]
    reason, shown = SkipReason.NO_OPERATOR, uses
    if weighted:
        biases = all(use.index == BIASES.get(use.node.op_type) for use in weighted)
        reason, shown = SkipReason.BIAS if biases else SkipReason.NO_WEIGHT, tuple(weighted)
    elif loops:
        reason, shown = SkipReason.NOT_FOLLOWED, tuple(loops)
    return reason, ", ".join(sorted({use.node.op_type for use in shown})) or "nothing"


def _first_operator(uses: tuple[Use, ...]) -> Use | None:
    """The use whose layout the tensor gets: a direct one, then by the order of `OPERATORS`."""

    def rank(use: Use) -> tuple[bool, int]:
        assert use.operator
        return not use.direct, priority(use.operator)

    return min((use for use in uses if use.operator), key=rank, default=None)


def _why_not(
    tensor: TensorProto, uses: tuple[Use, ...], first: Use | None, is_output: bool
) -> tuple[SkipReason | None, str]:
    """The reason why a tensor is left alone, with its detail; None and "" for a weight."""
    rank, size = len(tensor.dims), prod(tensor.dims)
    if rank < 2:
        return (SkipReason.ONE_AXIS if rank else SkipReason.SCALAR), ""
    if first is None:
        return _what_reads(uses)
    if tensor.data_type not in FLOATS:
        return SkipReason.TYPE, TensorProto.DataType.Name(tensor.data_type)
    if size < SMALLEST:
        return SkipReason.TOO_SMALL, str(SMALLEST)
    if is_output:
        return SkipReason.GRAPH_OUTPUT, ""
    return None, ""
