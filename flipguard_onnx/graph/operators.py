"""What the package knows of operators: `OPERATORS` has one row for each operator with weights.

A row is plain data and functions of nodes and shapes (operands.py); whoever needs to know something
of an operator asks its row. To support another operator, add a row and a test.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from math import prod

from onnx import AttributeProto, NodeProto, TensorProto

from . import operands
from .operands import Axes, LayerInput, MultipliedInput, Operand, Shape
from .traversal import STANDARD, attribute

CONTRIB = "com.microsoft"

FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)

CHAIN = ("Identity", "Transpose", "Cast")  # a weight is followed through these

VIEWS = (
    *("Slice", "Split", "Concat", "Unsqueeze", "Squeeze", "Reshape", "Flatten"),
    *("Expand", "Tile", "Pad"),
)


class WeightForm(StrEnum):
    """How a reader gets the codes of a weight; emit/weight_forms.py writes them.

    Every operator can read DEQUANTIZE and FOLDED, which yield a tensor of floats.
    """

    DEQUANTIZE = "dequantize"
    GATHER = "gather"
    FOLDED = "folded"
    NBITS = "nbits"
    BNB4 = "bnb4"
    GATHER_PACKED = "gather packed"


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
    forms : the forms that onnxruntime runs without making floats of the whole weight
    static : whether onnxruntime's static quantizer quantizes it
    convolution : whether it is a convolution
    requantized : whether onnxruntime, when it loads a QDQ graph, rounds float weights of it anew
    channels_per_group : whether the output channels of its weight are those of one group
    may_vary : those of `weights` that usually are activations
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
    may_vary: tuple[int, ...] = ()
    behind_views: bool = True

    def output_channels(self, node: NodeProto, shape: Shape) -> int:
        """How many output channels a node has whose (first) weight has this shape."""
        axes = self.output_axes(node, self.weights[0], len(shape))
        groups = int(attribute(node, "group", 1)) if self.channels_per_group else 1
        return prod(shape[axis] for axis in axes) * groups


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

_fused_matmul = partial(
    Operator,
    domain=CONTRIB,
    weights=(1, 0),
    signature=_FUSED_MATMUL,
    output_axes=operands.fused_matmul_axes,
    multiplied_input=operands.fused_matmul_input,
    layer_input=operands.fused_matmul_layer,
    four_bits=True,
    may_vary=(1, 0),
)

_recurrent = partial(
    Operator,
    weights=(1, 2),
    signature=Signature(3),
    output_axes=operands.fixed_axes(0, 1),
    multiplied_input=operands.recurrent_input,
    layer_input=operands.no_layer,
)

# A tensor that several operators read gets the layout of the one that comes first here.
OPERATORS = (
    Operator(
        "MatMul",
        weights=(1, 0),
        signature=Signature(2),
        output_axes=operands.matmul_axes,
        multiplied_input=operands.matmul_input,
        layer_input=operands.matmul_layer,
        four_bits=True,
        forms=(WeightForm.DEQUANTIZE, WeightForm.NBITS, WeightForm.BNB4),
        static=True,
        may_vary=(1, 0),
    ),
    Operator(
        "Gemm",
        weights=(1, 0),
        signature=_GEMM,
        output_axes=operands.gemm_axes,
        multiplied_input=operands.gemm_input,
        layer_input=operands.gemm_layer,
        four_bits=True,
        forms=(WeightForm.DEQUANTIZE, WeightForm.NBITS),
        static=True,
        requantized=True,
        may_vary=(0,),
    ),
    Operator(
        "Conv",
        weights=(1,),
        signature=_CONV,
        output_axes=operands.fixed_axes(0),
        multiplied_input=operands.conv_input,
        layer_input=partial(operands.conv_layer, transposed=False),
        static=True,
        convolution=True,
        requantized=True,
    ),
    Operator(
        "ConvTranspose",
        weights=(1,),
        signature=_CONV,
        output_axes=operands.fixed_axes(1),
        multiplied_input=operands.not_recorded,
        layer_input=partial(operands.conv_layer, transposed=True),
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
        output_axes=operands.gather_axes,
        multiplied_input=operands.gather_input,
        layer_input=operands.gather_layer,
        forms=(WeightForm.GATHER, WeightForm.GATHER_PACKED),
        may_vary=(0,),
        behind_views=False,
    ),
    Operator(
        "Einsum",
        weights=(1, 0, 2, 3),
        signature=Signature(1, {"equation": AttributeProto.STRING}),
        output_axes=operands.einsum_axes,
        multiplied_input=operands.einsum_input,
        layer_input=operands.no_layer,
        four_bits=True,
        may_vary=(1, 0, 2, 3),
    ),
    _fused_matmul("FusedMatMul"),
    _fused_matmul("TransposeMatMul"),  # its old name
    Operator(  # this and the next are what onnxruntime saves of an optimized graph
        "FusedGemm",
        domain=CONTRIB,
        weights=(1, 0),
        signature=_GEMM,
        output_axes=operands.gemm_axes,
        multiplied_input=operands.gemm_input,
        layer_input=operands.gemm_layer,
        may_vary=(0,),
    ),
    Operator(
        "FusedConv",
        domain=CONTRIB,
        weights=(1,),
        signature=_CONV,
        output_axes=operands.fixed_axes(0),
        multiplied_input=operands.conv_input,
        layer_input=partial(operands.conv_layer, transposed=False),
        convolution=True,
    ),
    Operator(
        "ConvTransposeWithDynamicPads",
        domain=CONTRIB,
        weights=(1,),
        signature=_CONV,
        output_axes=operands.fixed_axes(1),
        multiplied_input=operands.not_recorded,
        layer_input=partial(operands.conv_layer, transposed=True),
        convolution=True,
        channels_per_group=True,
    ),
    Operator(
        "CausalConvWithState",  # each channel has a kernel of its own: [channels, 1, kernel]
        domain=CONTRIB,
        weights=(1,),
        signature=Signature(2),
        output_axes=operands.fixed_axes(0),
        multiplied_input=operands.not_recorded,
        layer_input=operands.no_layer,
    ),
    Operator(
        "EmbedLayerNormalization",  # tables of words, positions and segments
        domain=CONTRIB,
        weights=(2, 3, 4),
        signature=Signature(2),
        output_axes=operands.fixed_axes(0),
        multiplied_input=operands.not_recorded,
        layer_input=operands.no_layer,
    ),
    Operator(
        "Attention",  # the weight is that of Q, K and V side by side: [hidden, 3 * hidden]
        domain=CONTRIB,
        weights=(1,),
        signature=Signature(2),
        output_axes=operands.fixed_axes(1),
        multiplied_input=operands.rows_of_first,
        layer_input=operands.attention_layer,
    ),
    Operator(
        "MoE",  # [experts, outputs, inputs] each
        domain=CONTRIB,
        weights=(2, 4, 6),
        signature=Signature(5),
        output_axes=operands.fixed_axes(0, 1),
        multiplied_input=operands.experts_input,
        layer_input=operands.no_layer,
    ),
)

# Other standard operators of which something is read.
SIGNATURES = {
    **dict.fromkeys((*CHAIN, *VIEWS), Signature(1)),
    "Transpose": Signature(1, {"perm": AttributeProto.INTS}),
    "Cast": Signature(1, {"to": AttributeProto.INT}),
    "Constant": Signature(0, {"value": AttributeProto.TENSOR}),
    "Scan": Signature(
        1, {"num_scan_inputs": AttributeProto.INT, "scan_input_axes": AttributeProto.INTS}
    ),
    **dict.fromkeys(("Add", "Sub", "Mul", "Div"), Signature(2)),
    "BatchNormalization": Signature(5),
}

_BY_NAME = {(operator.domain, operator.name): operator for operator in OPERATORS}

_PRIORITY = {operator: row for row, operator in enumerate(OPERATORS)}


def operator_of(node: NodeProto) -> Operator | None:
    """The row of the node's operator, None where it is not in the table."""
    domain = "" if node.domain in STANDARD else node.domain
    return _BY_NAME.get((domain, node.op_type))


def priority(operator: Operator) -> int:
    """The number of an operator's row in the table."""
    return _PRIORITY[operator]


def signature_of(node: NodeProto) -> Signature | None:
    """What is read of the node, None for nothing."""
    if operator := operator_of(node):
        return operator.signature
    return SIGNATURES.get(node.op_type) if node.domain in STANDARD else None
