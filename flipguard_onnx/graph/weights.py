"""Find the weights of a model: what each is, how its rows lie, and every place that reads it.

A weight is a constant float tensor that reaches the weight input of an operator of `ROLES`,
directly or through Identity, Transpose and Cast, in whatever graph, subgraph or model-local
function. What else is constant and float is listed with the reason why it is left alone.
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
from ..reports.scan import Skipped
from .operators import FLOATS, ROLES
from .scopes import GraphIndex, Scope, Use

QUANTIZED = (TensorProto.INT8, TensorProto.UINT8, TensorProto.INT4, TensorProto.UINT4)

SMALLEST = 64  # weights; the scales of a smaller tensor would outweigh what it saves


@dataclass(frozen=True)
class Weight:
    """A constant tensor that can be guarded. `name` is unique in the model.

    node: the Constant node that holds it, None for an initializer.
    op: the operator whose layout it has. rows: the stored axes that number its output channels.
    """

    name: str
    scope: Scope
    tensor: TensorProto
    node: NodeProto | None
    op: str
    rows: tuple[int, ...]
    uses: tuple[Use, ...]

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
    """All weights of the model and all float tensors that are left alone.

    include, exclude: shell patterns over tensor names; what fails them is skipped.
    Raises UnsupportedModelError when most of the model's weights are quantized already, unless it
    is `partly` quantized on purpose.
    """
    reader = GraphIndex(proto)
    weights: list[Weight] = []
    skipped: list[Skipped] = []
    quantized: dict[str, int] = defaultdict(int)
    seen: dict[str, int] = defaultdict(int)
    names: set[str] = set()
    for scope, plain_name, tensor, node in reader.constants():
        name = plain_name
        while name in names:
            seen[plain_name] += 1
            name = f"{plain_name}#{seen[plain_name] + 1}"
        names.add(name)
        shape = tuple(tensor.dims)
        uses = tuple(reader.uses(scope, plain_name, tuple(range(len(shape))), tensor.data_type))
        if tensor.data_type in QUANTIZED and prod(shape) >= SMALLEST and len(shape) > 1:
            operators = ", ".join(reader.operators(scope, plain_name)) or "nothing"
            quantized[operators] += prod(shape)
            kind = TensorProto.DataType.Name(tensor.data_type)
            skipped.append(Skipped(name, shape, f"already quantized ({kind}, feeds {operators})"))
        elif tensor.data_type in (*FLOATS, TensorProto.DOUBLE):
            roles = sorted((use for use in uses if use.op), key=_priority)
            reason = _why_not(tensor, uses, roles, reader.is_output(scope, plain_name))
            if not reason and include and not any(fnmatchcase(name, p) for p in include):
                reason = "not selected by --include"
            if not reason and any(fnmatchcase(name, p) for p in exclude):
                reason = "excluded by --exclude"
            if reason:
                skipped.append(Skipped(name, shape, reason))
            else:
                op, rows = roles[0].op, roles[0].output_axes()
                weights.append(Weight(name, scope, tensor, node, op, rows, uses))
    for name, op in reader.computed():
        skipped.append(Skipped(name, (), f"not constant (weight of {op})"))
    if not partly and sum(quantized.values()) > sum(weight.size for weight in weights):
        readers = ", ".join(sorted(quantized))
        raise UnsupportedModelError(
            f"already quantized: {sum(quantized.values()):,} weights are integers (read by "
            f"{readers}); allowed: a float model, so guard the one that this was made from"
        )
    return weights, skipped


def _priority(use: Use) -> tuple[bool, int]:
    return not use.direct, list(ROLES).index(use.op)


def _why_not(
    tensor: TensorProto, uses: tuple[Use, ...], roles: list[Use], is_output: bool
) -> str | None:
    rank, size = len(tensor.dims), prod(tensor.dims)
    if rank < 2:
        return "1-D" if rank else "scalar"
    if not roles:
        readers = sorted({use.node.op_type for use in uses})
        return f"feeds {', '.join(readers) or 'nothing'}, no weighted operator"
    if tensor.data_type not in FLOATS:
        return f"unsupported type {TensorProto.DataType.Name(tensor.data_type)}"
    if size < SMALLEST:
        return f"too small (fewer than {SMALLEST} weights)"
    if is_output:
        return "is a graph output"
    return None
