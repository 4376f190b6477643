"""What the package knows of operators: `OPERATORS` has one row for each operator with weights.

A row is plain data and functions of nodes and shapes; whoever needs to know something of an
operator asks its row. To support another operator, add a row and a test.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from math import prod

from onnx import AttributeProto, NodeProto, TensorProto

from .traversal import attribute

STANDARD = ("", "ai.onnx")  # names of the domain of the standard operators

CONTRIB = "com.microsoft"

FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)

CHAIN = ("Identity", "Transpose", "Cast")  # a weight is followed through these

VIEWS = ("Slice", "Split", "Concat", "Unsqueeze", "Squeeze", "Reshape", "Flatten")

SAMPLE_ROWS = 16  # inputs that a layer gets when it is run alone

SAMPLE_MARGIN = 3  # places beyond the reach of a convolution's kernel, along every axis

Axes = tuple[int, ...]

Shape = tuple[int, ...]


class WeightForm(StrEnum):
    """How a reader gets the codes of a weight; emit/weight_forms.py writes them.

    Every operator can read the form FOLDED, constants that become floats when the file is loaded.
    """

    FOLDED = "folded"
    DEQUANTIZE = "dequantize"
    BNB4 = "bnb4"
    GATHER = "gather"


class Arrangement(StrEnum):
    """Where the rows of an input are, one of which is multiplied with a row of the weight."""

    ROWS = "rows"  # along the last axis
    COLUMNS = "columns"  # along the last but one
    PATCHES = "patches"  # under the kernel of a convolution


@dataclass(frozen=True)
class Signature:
    """What is read of a node, and so must be there.

    Attributes
    ----------
    inputs : how many inputs it has at least
    attributes : the type of each attribute that is read, if the node has it
    """

    inputs: int
    attributes: Mapping[str, int] = field(default_factory=dict)


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
    """The input of a node that a weight is multiplied with, by its index."""

    index: int
    arrangement: Arrangement
    window: Window | None = None  # of PATCHES


@dataclass(frozen=True)
class LayerInput:
    """The one input that varies when a node is run alone, with a shape that fits the weight.

    elem_type: if it is not the weight's. output_rank: how many axes the result has.
    """

    index: int
    shape: Shape
    output_rank: int
    elem_type: int | None = None


@dataclass(frozen=True, eq=False)
class Operator:
    """One operator with weights.

    Attributes
    ----------
    name : its op_type, unique in the table
    domain : "" for the standard operators
    weights : indices of the inputs that are weights
    signature : what is read of its nodes
    output_axes : the axes of a weight that number output channels, given the node, the index of
        the input and the number of axes
    multiplied_input : what a weight is multiplied with, or the reason why that is not recorded
    layer_input : what varies when a node is run alone, or None if that is not done
    four_bits : whether its weights may get 4 bits; if not they get 8 under every scheme
    forms : the forms of weights that it reads other than FOLDED
    static : whether onnxruntime's static quantizer quantizes it
    convolution : whether it is a convolution
    requantized : whether onnxruntime, when it loads a QDQ graph, rounds float weights of it anew
    channels_per_group : whether the output channels of its weight are those of one group
    weight_may_vary : whether an activation is usual where a weight could be
    behind_views : whether it has weights behind nodes of VIEWS and behind calls of functions, too
    """

    name: str
    weights: tuple[int, ...]
    signature: Signature
    output_axes: Callable[[NodeProto, int, int], Axes]
    multiplied_input: Callable[[Operand], MultipliedInput | str]
    layer_input: Callable[[Operand], LayerInput | None]
    domain: str = ""
    four_bits: bool = False
    forms: tuple[WeightForm, ...] = ()
    static: bool = False
    convolution: bool = False
    requantized: bool = False
    channels_per_group: bool = False
    weight_may_vary: bool = False
    behind_views: bool = True

    def output_channels(self, node: NodeProto, shape: Shape) -> int:
        """How many output channels a node has whose (first) weight has this shape."""
        axes = self.output_axes(node, self.weights[0], len(shape))
        groups = int(attribute(node, "group", 1)) if self.channels_per_group else 1
        return prod(shape[axis] for axis in axes) * groups


# Which axes of a weight number output channels.


def _axes(*axes: int) -> Callable[[NodeProto, int, int], Axes]:
    """The same axes for every node."""
    return lambda node, index, rank: axes


def _all_but(contracted: int, rank: int) -> Axes:
    return tuple(axis for axis in range(rank) if axis != contracted)


def _matmul_axes(node: NodeProto, index: int, rank: int) -> Axes:
    """All but the last axis of a left operand, and the last but one of a right operand."""
    return _all_but(rank - 1 if index == 0 else max(rank - 2, 0), rank)


def _fused_matmul_axes(node: NodeProto, index: int, rank: int) -> Axes:
    """As MatMul, after transBatch moves the first axis to the last but one, and trans swaps these
    two."""
    side = "AB"[index]
    rows = 0 if attribute(node, f"transBatch{side}", 0) else max(rank - 2, 0)
    swapped = bool(attribute(node, f"trans{side}", 0))
    return _all_but(rank - 1 if (index == 0) != swapped else rows, rank)


def _gemm_axes(node: NodeProto, index: int, rank: int) -> Axes:
    return (0,) if attribute(node, "transB", 0) else (1,)


def _gather_axes(node: NodeProto, index: int, rank: int) -> Axes:
    return (attribute(node, "axis", 0) % rank,)


# What a weight is multiplied with.


def _not_recorded(operand: Operand) -> str:
    return f"inputs of {operand.node.op_type} are not recorded here"


def _matmul_input(operand: Operand) -> MultipliedInput | str:
    if len(operand.shape) != 2:
        return _not_recorded(operand)
    arrangement = Arrangement.ROWS if operand.index else Arrangement.COLUMNS
    return MultipliedInput(1 - operand.index, arrangement)


def _fused_matmul_input(operand: Operand) -> MultipliedInput | str:
    other = 1 - operand.index
    side = "AB"[other]
    if len(operand.shape) != 2 or operand.flag(f"transBatch{side}"):
        return _not_recorded(operand)
    by_row = (other == 0) != operand.flag(f"trans{side}")
    return MultipliedInput(other, Arrangement.ROWS if by_row else Arrangement.COLUMNS)


def _gemm_input(operand: Operand) -> MultipliedInput:
    by_column = operand.flag("transA")
    return MultipliedInput(0, Arrangement.COLUMNS if by_column else Arrangement.ROWS)


def _rows_of_first(operand: Operand) -> MultipliedInput:
    return MultipliedInput(0, Arrangement.ROWS)


def _conv_input(operand: Operand) -> MultipliedInput | str:
    node, kernel = operand.node, operand.shape[2:]
    pads = tuple(attribute(node, "pads", ()))
    if min(pads, default=0) < 0:
        return _not_recorded(operand)
    ones = (1,) * len(kernel)
    window = Window(
        kernel,
        tuple(attribute(node, "strides", ones)),
        tuple(attribute(node, "dilations", ones)),
        pads,
        attribute(node, "auto_pad", b"NOTSET").decode(),
        attribute(node, "group", 1),
    )
    return MultipliedInput(0, Arrangement.PATCHES, window)


def _recurrent_input(operand: Operand) -> MultipliedInput | str:
    if operand.index != 1:
        return f"recurrent: {operand.node.op_type} multiplies it with its own state"
    return _rows_of_first(operand)


def _gathered(operand: Operand) -> str:
    return "Gather picks rows: nothing is summed"


def _routed(operand: Operand) -> str:
    return "mixture of experts: a router decides which expert multiplies which input"


# What varies when a node is run alone.


def _no_layer(operand: Operand) -> None:
    """Such a node is not run alone."""


def _matmul_layer(operand: Operand) -> LayerInput:
    *batch, rows, columns = operand.shape
    matrix = (SAMPLE_ROWS, rows) if operand.index else (columns, SAMPLE_ROWS)
    return LayerInput(1 - operand.index, (*batch, *matrix), len(operand.shape))


def _fused_matmul_layer(operand: Operand) -> LayerInput | None:
    if len(operand.shape) != 2:
        return None
    other = 1 - operand.index
    (outputs,) = _fused_matmul_axes(operand.node, operand.index, 2)
    inner = operand.shape[1 - outputs]
    by_row = (other == 0) != operand.flag(f"trans{'AB'[other]}")
    return LayerInput(other, (SAMPLE_ROWS, inner) if by_row else (inner, SAMPLE_ROWS), 2)


def _gemm_layer(operand: Operand) -> LayerInput:
    inner = operand.shape[1 if operand.flag("transB") else 0]
    by_column = operand.flag("transA")
    return LayerInput(0, (inner, SAMPLE_ROWS) if by_column else (SAMPLE_ROWS, inner), 2)


def _conv_layer(operand: Operand, transposed: bool) -> LayerInput:
    first, second, *kernel = operand.shape
    dilations = attribute(operand.node, "dilations", (1,) * len(kernel))
    places = (d * (k - 1) + 1 + SAMPLE_MARGIN for d, k in zip(dilations, kernel, strict=True))
    channels = first if transposed else second * attribute(operand.node, "group", 1)
    shape = (1, channels, *places)
    return LayerInput(0, shape, len(shape))


def _gather_layer(operand: Operand) -> LayerInput:
    return LayerInput(1, (SAMPLE_ROWS,), len(operand.shape), TensorProto.INT64)


def _attention_layer(operand: Operand) -> LayerInput:
    return LayerInput(0, (1, SAMPLE_ROWS, operand.shape[0]), 3)


_CONV = Signature(
    2,
    {
        **dict.fromkeys(("strides", "dilations", "pads"), AttributeProto.INTS),
        "group": AttributeProto.INT,
        "auto_pad": AttributeProto.STRING,
    },
)

_GEMM = Signature(
    2,
    {
        **dict.fromkeys(("transA", "transB"), AttributeProto.INT),
        **dict.fromkeys(("alpha", "beta"), AttributeProto.FLOAT),
    },
)

_FUSED_MATMUL = Signature(
    2,
    dict.fromkeys(("transA", "transB", "transBatchA", "transBatchB"), AttributeProto.INT),
)

_recurrent = partial(
    Operator,
    weights=(1, 2),
    signature=Signature(3),
    output_axes=_axes(0, 1),
    multiplied_input=_recurrent_input,
    layer_input=_no_layer,
)

# A tensor that several operators read gets the layout of the one that comes first here.
OPERATORS = (
    Operator(
        "MatMul",
        weights=(1, 0),
        signature=Signature(2),
        output_axes=_matmul_axes,
        multiplied_input=_matmul_input,
        layer_input=_matmul_layer,
        four_bits=True,
        forms=(WeightForm.DEQUANTIZE, WeightForm.BNB4),
        static=True,
        weight_may_vary=True,
    ),
    Operator(
        "Gemm",
        weights=(1,),
        signature=_GEMM,
        output_axes=_gemm_axes,
        multiplied_input=_gemm_input,
        layer_input=_gemm_layer,
        four_bits=True,
        forms=(WeightForm.DEQUANTIZE,),
        static=True,
        requantized=True,
    ),
    Operator(
        "Conv",
        weights=(1,),
        signature=_CONV,
        output_axes=_axes(0),
        multiplied_input=_conv_input,
        layer_input=partial(_conv_layer, transposed=False),
        static=True,
        convolution=True,
        requantized=True,
    ),
    Operator(
        "ConvTranspose",
        weights=(1,),
        signature=_CONV,
        output_axes=_axes(1),
        multiplied_input=_not_recorded,
        layer_input=partial(_conv_layer, transposed=True),
        static=True,
        convolution=True,
        requantized=True,
        channels_per_group=True,
    ),
    _recurrent("LSTM"),
    _recurrent("GRU"),
    _recurrent("RNN"),
    Operator(
        "Gather",
        weights=(0,),
        signature=Signature(2, {"axis": AttributeProto.INT}),
        output_axes=_gather_axes,
        multiplied_input=_gathered,
        layer_input=_gather_layer,
        forms=(WeightForm.GATHER,),
        weight_may_vary=True,
        behind_views=False,
    ),
    Operator(
        "FusedMatMul",
        domain=CONTRIB,
        weights=(1, 0),
        signature=_FUSED_MATMUL,
        output_axes=_fused_matmul_axes,
        multiplied_input=_fused_matmul_input,
        layer_input=_fused_matmul_layer,
        four_bits=True,
        weight_may_vary=True,
    ),
    Operator(
        "Attention",  # the weight is that of Q, K and V side by side: [hidden, 3 * hidden]
        domain=CONTRIB,
        weights=(1,),
        signature=Signature(2),
        output_axes=_axes(1),
        multiplied_input=_rows_of_first,
        layer_input=_attention_layer,
    ),
    Operator(
        "MoE",  # [experts, outputs, inputs] each
        domain=CONTRIB,
        weights=(2, 4, 6),
        signature=Signature(5),
        output_axes=_axes(0, 1),
        multiplied_input=_routed,
        layer_input=_no_layer,
    ),
)

# Other standard operators of which something is read.
SIGNATURES = {
    **dict.fromkeys((*CHAIN, *VIEWS), Signature(1)),
    "Transpose": Signature(1, {"perm": AttributeProto.INTS}),
    "Cast": Signature(1, {"to": AttributeProto.INT}),
    "Constant": Signature(0, {"value": AttributeProto.TENSOR}),
    **dict.fromkeys(("Add", "Sub", "Mul", "Div"), Signature(2)),
    "BatchNormalization": Signature(5),
}

_BY_NAME = {(operator.domain, operator.name): operator for operator in OPERATORS}

_PRIORITY = {operator: place for place, operator in enumerate(OPERATORS)}


def operator_of(node: NodeProto) -> Operator | None:
    """The row of the node's operator, None where it is not in the table."""
    domain = "" if node.domain in STANDARD else node.domain
    return _BY_NAME.get((domain, node.op_type))


def priority(operator: Operator) -> int:
    """The row's place in the table."""
    return _PRIORITY[operator]


def signature_of(node: NodeProto) -> Signature | None:
    """What is read of the node, None for nothing."""
    if operator := operator_of(node):
        return operator.signature
    return SIGNATURES.get(node.op_type) if node.domain in STANDARD else None
