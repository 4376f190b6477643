"""How operators read their weights: axes, what a weight is multiplied with, and a node run alone.

The functions are those that the rows of `OPERATORS` hold (operators.py, which says what each kind
of function is for).
"""

from collections.abc import Callable
from dataclasses import dataclass

from onnx import NodeProto, TensorProto

from .traversal import attribute

SAMPLE_ROWS = 16  # inputs that a layer gets when it is run alone

SAMPLE_MARGIN = 3  # places beyond the reach of a convolution's kernel, along every axis

Axes = tuple[int, ...]

BY_ROW, BY_COLUMN = (-1,), (-2,)  # the axis of a matrix that is summed over

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Operand:
    """A weight as an operator reads it: input `index` of `node`.

    shape: behind the Transpose nodes that lead there.
    """

    node: NodeProto
    index: int
    shape: Shape

    def flag(self, name: str) -> bool:
        """The value of an attribute that is 0 unless it is given."""
        return bool(attribute(self.node, name, 0))


@dataclass(frozen=True)
class Window:
    """How the kernel of a convolution moves over its input; all tuples have one entry per axis.

    pads: before the input along each axis, then behind it; empty for none.
    """

    kernel: Shape
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[int, ...]
    auto_pad: str
    groups: int


@dataclass(frozen=True)
class MultipliedInput:
    """The input of a node that a weight is multiplied with.

    index: which one. axes: those over which its products with the weight are summed, in the order
    of the weight's, counted from the last; window: of a convolution, instead of them.
    """

    index: int
    axes: Axes = BY_ROW
    window: Window | None = None


@dataclass(frozen=True)
class LayerInput:
    """The one input that varies when a node is run alone, with a shape that fits the weight.

    elem_type: if it is not the weight's. output_rank: how many axes the result has.
    """

    index: int
    shape: Shape
    output_rank: int
    elem_type: int | None = None


# Which axes of a weight number output channels.


def fixed_axes(*axes: int) -> Callable[[NodeProto, int, int], Axes]:
    """The same axes for every node."""
    return lambda node, index, rank: axes


def all_but(contracted: int, rank: int) -> Axes:
    """Every axis except the one that is summed over."""
    return tuple(axis for axis in range(rank) if axis != contracted)


def matmul_axes(node: NodeProto, index: int, rank: int) -> Axes:
    """All but the last axis of a left operand, and the last but one of a right operand."""
    return all_but(rank - 1 if index == 0 else max(rank - 2, 0), rank)


def fused_matmul_axes(node: NodeProto, index: int, rank: int) -> Axes:
    """As MatMul, after transBatch moves the first axis to the last but one, and trans swaps these
    two."""
    side = "AB"[index]
    rows = 0 if attribute(node, f"transBatch{side}", 0) else max(rank - 2, 0)
    swapped = bool(attribute(node, f"trans{side}", 0))
    return all_but(rank - 1 if (index == 0) != swapped else rows, rank)


def gemm_axes(node: NodeProto, index: int, rank: int) -> Axes:
    """[outputs, inputs] for a second input with transB or a first one without transA."""
    by_row = bool(attribute(node, "transB", 0)) if index else not attribute(node, "transA", 0)
    return (0,) if by_row else (1,)


def einsum_axes(node: NodeProto, index: int, rank: int) -> Axes:
    """Those that the result has, too; but at least one axis is left to be one row."""
    terms, result = _equation(node)
    term = (terms[index : index + 1] or [""])[0]
    before, dots, behind = term.partition("...")
    inside = "." * (rank - len(before) - len(behind)) if dots else ""
    labels = (before + inside + behind)[-rank:]  # a rank may leave out axes that are picked
    found = [axis for axis, label in enumerate(labels) if label in result]
    return tuple(found[: rank - 1]) or (0,)


def _equation(node: NodeProto) -> tuple[list[str], str]:
    """The labels of each operand of an Einsum, and those of its result."""
    equation = attribute(node, "equation", b"").decode(errors="replace").replace(" ", "")
    terms, arrow, result = equation.partition("->")
    if not arrow:
        result = "." + "".join(label for label in terms if terms.count(label) == 1)
    return terms.split(","), result


def gather_axes(node: NodeProto, index: int, rank: int) -> Axes:
    """The axis along which entries are picked."""
    return (attribute(node, "axis", 0) % rank,)


# What a weight is multiplied with.


def not_recorded(operand: Operand) -> str:
    """The reason for operators and shapes whose inputs nobody turns into rows."""
    return f"inputs of {operand.node.op_type} are not recorded here"


def matmul_input(operand: Operand) -> MultipliedInput | str:
    """The other operand, of a matrix."""
    if len(operand.shape) != 2:
        return not_recorded(operand)
    return MultipliedInput(1 - operand.index, BY_ROW if operand.index else BY_COLUMN)


def fused_matmul_input(operand: Operand) -> MultipliedInput | str:
    """As Gemm, of a matrix."""
    side = "BA"[operand.index]
    if len(operand.shape) != 2 or operand.flag(f"transBatch{side}"):
        return not_recorded(operand)
    return gemm_input(operand)


def gemm_input(operand: Operand) -> MultipliedInput:
    """As MatMul; with trans, the other operand's rows and columns change places."""
    other = 1 - operand.index
    by_row = (other == 0) != operand.flag(f"trans{'AB'[other]}")
    return MultipliedInput(other, BY_ROW if by_row else BY_COLUMN)


def einsum_input(operand: Operand) -> MultipliedInput | str:
    """The other one of two operands, if they share the labels that are summed over and no more."""
    terms, result = _equation(operand.node)
    if len(terms) != 2 or "." in terms[operand.index]:
        return not_recorded(operand)
    labels, others = terms[operand.index], terms[1 - operand.index]
    summed = [label for label in labels if label not in result]
    last = others.rpartition(".")[2]  # labels of axes that can be counted from the last
    is_product = {*labels} & {*others} == {*summed} <= {*last} and {*others} <= {*result, *summed}
    is_diagonal = any(term.count(label) > 1 for term in (labels, last) for label in term)
    if not summed or not is_product or is_diagonal:
        return not_recorded(operand)
    axes = tuple(last.index(label) - len(last) for label in summed)
    return MultipliedInput(1 - operand.index, axes)


def rows_of_first(operand: Operand) -> MultipliedInput:
    """The first input, [..., inputs]."""
    return MultipliedInput(0)


def conv_input(operand: Operand) -> MultipliedInput | str:
    """What lies under the kernel; negative pads, which cut the input, are not handled."""
    node, kernel = operand.node, operand.shape[2:]
    pads = tuple(attribute(node, "pads", ()))
    if min(pads, default=0) < 0:
        return not_recorded(operand)
    ones = (1,) * len(kernel)
    window = Window(
        kernel,
        tuple(attribute(node, "strides", ones)),
        tuple(attribute(node, "dilations", ones)),
        pads,
        attribute(node, "auto_pad", b"NOTSET").decode(),
        attribute(node, "group", 1),
    )
    return MultipliedInput(0, (), window)


def recurrent_input(operand: Operand) -> MultipliedInput | str:
    """The first input for W (index 1); R is multiplied with the state, inside the node."""
    if operand.index != 1:
        return f"recurrent: {operand.node.op_type} multiplies it with its own state"
    return rows_of_first(operand)


def gather_input(operand: Operand) -> str:
    """None: rows are copied."""
    return "Gather picks rows: nothing is summed"


def experts_input(operand: Operand) -> str:
    """None: which rows an expert gets is decided inside the node."""
    return "mixture of experts: a router decides which expert multiplies which input"


# What varies when a node is run alone.


def no_layer(operand: Operand) -> None:
    """Such a node is not run alone."""


def matmul_layer(operand: Operand) -> LayerInput:
    """The other operand, with the weight's batch axes."""
    *batch, rows, columns = operand.shape
    matrix = (SAMPLE_ROWS, rows) if operand.index else (columns, SAMPLE_ROWS)
    return LayerInput(1 - operand.index, (*batch, *matrix), len(operand.shape))


def fused_matmul_layer(operand: Operand) -> LayerInput | None:
    """The other operand, of a matrix."""
    if len(operand.shape) != 2:
        return None
    other = 1 - operand.index
    (outputs,) = fused_matmul_axes(operand.node, operand.index, 2)
    inner = operand.shape[1 - outputs]
    by_row = (other == 0) != operand.flag(f"trans{'AB'[other]}")
    return LayerInput(other, (SAMPLE_ROWS, inner) if by_row else (inner, SAMPLE_ROWS), 2)


def gemm_layer(operand: Operand) -> LayerInput | None:
    """The first input, [rows, inputs] or with transA [inputs, rows]."""
    if operand.index == 0:
        return None
    inner = operand.shape[1 if operand.flag("transB") else 0]
    by_column = operand.flag("transA")
    return LayerInput(0, (inner, SAMPLE_ROWS) if by_column else (SAMPLE_ROWS, inner), 2)


def conv_layer(operand: Operand, transposed: bool) -> LayerInput:
    """One sample, a little larger than the kernel's reach. transposed: for ConvTranspose."""
    first, second, *kernel = operand.shape
    dilations = attribute(operand.node, "dilations", (1,) * len(kernel))
    places = (d * (k - 1) + 1 + SAMPLE_MARGIN for d, k in zip(dilations, kernel, strict=True))
    channels = first if transposed else second * attribute(operand.node, "group", 1)
    shape = (1, channels, *places)
    return LayerInput(0, shape, len(shape))


def gather_layer(operand: Operand) -> LayerInput:
    """Some indices."""
    return LayerInput(1, (SAMPLE_ROWS,), len(operand.shape), TensorProto.INT64)


def attention_layer(operand: Operand) -> LayerInput:
    """One sequence, [1, rows, inputs]."""
    return LayerInput(0, (1, SAMPLE_ROWS, operand.shape[0]), 3)
