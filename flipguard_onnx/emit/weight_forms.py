"""Codes into the graph: each reader of a weight gets them in the form that the target runs best.

Before, a reader takes the float weight w. After, with s for the scales (one axis for whole rows of
the weight, two for blocks of them):

DEQUANTIZE  MatMul(x, w) -> MatMul(x, DequantizeLinear(codes, s))
            int8, int4, int2 and mxfp4 for every runtime: compilers look for this operator, and keep
            such a weight in its codes. onnxruntime's CPU provider fuses it with MatMul and Gemm and
            runs it again at every inference elsewhere, unless it is told to fold it. A reader whose
            output channels are not those with the scales, and a Gather, has a Max with the lowest
            float in between: OpenVINO 2026.4 would take the scales for those of other channels. So
            has an LSTM, GRU or RNN where activations are integers: there it would keep the codes,
            which it cannot give to these; and every reader of 2-bit codes, which onnxruntime 1.32
            mixes up where it fuses.
GATHER      Gather(w, i) -> Mul(DequantizeLinear(Gather(codes, i)), Gather(s, i))
            Embeddings, and stacks of matrices as in a mixture of experts: only what is picked is
            dequantized.
FOLDED      MatMul(x, w) -> MatMul(x, Mul(Cast(codes), s)), and in blocks
                            MatMul(x, Reshape(Mul(Cast(blocks of codes), s)))
            Ordinary nodes over constants, which runtimes compute once, when they load the file: a
            small file that runs at the speed and in the memory of floats. ONNX has no type for
            the codes of nf4 and fp4, so that this is their only form of standard operators.
NBITS       MatMul(x, w) -> MatMulNBits(x, codes, s)
            For onnxruntime alone, whose memory holds the codes as the file does: matrices of a
            decoder, and large ones of other models at int4. It rounds x to 8 bits, in blocks.
BNB4        MatMul(x, w) -> MatMulBnb4(x, codes, s)
            The same at nf4 and fp4; x stays float.
GATHER_PACKED  Gather(w, i) -> GatherBlockQuantized(codes, i, s)
            Embeddings that share such a matrix: both read the same codes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
from onnx import ModelProto, NodeProto, TensorProto, helper

from ..calibration.inputs import signature
from ..errors import UnsupportedModelError
from ..formats import FLOAT4
from ..graph.operands import gather_axes
from ..graph.operators import CONTRIB, WeightForm
from ..graph.scopes import Use
from ..graph.traversal import attribute
from ..graph.weights import Weight
from ..io.writer import Output
from ..quantization.arrays import contiguous
from ..quantization.schemes import Codebook, Float8, Grid, Scheme
from .rewriter import Rewriter, remove_named

MIN_PACKED = 1 << 20  # weights from which a matrix stays in 4 bits in memory where speed counts

PACKED_TYPES = (TensorProto.FLOAT, TensorProto.FLOAT16)  # that MatMulNBits multiplies

ROUNDED_TO_8_BITS = 4  # the accuracy level of MatMulNBits; all others are slow at 8 bits

BLOCKS_OF_A_ROW = (128, 64, 32)  # that a row with one scale is cut into, the larger the better

FLOAT16_OPSET = 19  # the first whose DequantizeLinear yields float16

RECURRENT = ("GRU", "LSTM", "RNN")

PAIRS = 1 << 18  # of codes that are packed at a time, so that they stay in the cache

UNSIGNED = {bits: np.arange(1 << bits) ^ (1 << bits - 1) for bits in (2, 4)}  # see `pack`

STRIP = 64  # rows, and their multiples: what a cache line holds of a transposed matrix

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Target:
    """What a graph is written for.

    Attributes
    ----------
    name : as in GuardOptions
    decodes : whether the model yields token after token, and so multiplies a row at a time: what
        it reads from memory is what takes time then
    integers : whether some activations are integers
    """

    name: str
    decodes: bool = False
    integers: bool = False

    @classmethod
    def of(cls, proto: ModelProto, name: str) -> "Target":
        """The target of this name, for this model."""
        integers = any(node.op_type == "QuantizeLinear" for node in proto.graph.node)
        return cls(name, decodes(proto), integers)


def decodes(proto: ModelProto) -> bool:
    """Whether a model is a decoder: it takes a cache of the tokens before, or yields logits.

    Logits are an output with a value for every row of the table that token ids index.
    """
    try:
        inputs = signature(proto)
    except UnsupportedModelError:
        return False
    if any(i.name.startswith("past") and i.dtype.kind == "f" for i in inputs):
        return True
    tables = {i.table_rows for i in inputs if i.table_rows and len(i.dims) == 2}
    shapes = [value.type.tensor_type.shape.dim for value in proto.graph.output]
    return any(len(dims) == 3 and dims[2].dim_value in tables for dims in shapes)


def form_of(use: Use, weight: Weight, scheme: Scheme, target: Target) -> WeightForm:
    """The form in which this reader gets the weight.

    Parameters
    ----------
    use, weight : one of the weight's readers
    scheme : that of the weight
    target : what the graph is written for
    """
    is_matrix = len(weight.shape) == 2
    picks_rows = use.picks and use.perm[_picked_axis(use)] in weight.rows
    if target.name == "onnxruntime" and is_matrix:
        if picks_rows and _shares_packed(use, weight, scheme, target):
            return WeightForm.GATHER_PACKED
        if packed := _packed_form(use, weight, scheme, target):
            return packed
    decodable = not scheme.in_blocks or len(weight.rows) == len(weight.shape) - 1
    if picks_rows and decodable and not isinstance(scheme, Codebook | Float8):
        return WeightForm.GATHER
    return _decoded_form(scheme, target)


def _picked_axis(use: Use) -> int:
    """The axis of a Gather's operand along which it picks."""
    return gather_axes(use.node, use.index, len(use.perm))[0]


def _shares_packed(use: Use, weight: Weight, scheme: Scheme, target: Target) -> bool:
    """Whether the rows that a Gather picks can be read from the packed codes of a matrix."""
    fits = use.perm == weight.perm and use.elem_type in PACKED_TYPES and not scheme.has_zeros
    forms = (_packed_form(each, weight, scheme, target) for each in weight.uses)
    return fits and WeightForm.NBITS in forms


def _packed_form(use: Use, weight: Weight, scheme: Scheme, target: Target) -> WeightForm | None:
    """The form in which the matrix stays packed in onnxruntime's memory, if there is one."""
    large = scheme.bits < 8 and weight.size >= MIN_PACKED
    if not (large or target.decodes) or use.index != 1 or use.output_axes() != weight.rows:
        return None
    if isinstance(scheme, Codebook):
        is_float = use.elem_type == TensorProto.FLOAT and scheme.bnb4_type is not None
        return WeightForm.BNB4 if use.reads(WeightForm.BNB4) and is_float else None
    plain = all(attribute(use.node, name, 1) == 1 for name in ("alpha", "beta"))
    plain = plain and not attribute(use.node, "transA", 0)
    plain = plain and not isinstance(scheme, Float8)
    fits = use.reads(WeightForm.NBITS) and use.elem_type in PACKED_TYPES and plain
    return WeightForm.NBITS if fits else None


def _decoded_form(scheme: Scheme, target: Target) -> WeightForm:
    """The form in which any reader can take the weight."""
    has_no_type = isinstance(scheme, Codebook) and scheme.name not in FLOAT4
    folds = has_no_type or target.name == "onnxruntime"
    return WeightForm.FOLDED if folds else WeightForm.DEQUANTIZE


class Emitter:
    """Rewrites one model: `emit` every weight, then `finish`."""

    def __init__(self, proto: ModelProto, output: Output, target: Target) -> None:
        self._target = target
        self._rewriter = Rewriter(proto, output)
        self.finish = self._rewriter.finish

    def emit(
        self, weight: Weight, scheme: Scheme, grid: Grid, codes: npt.NDArray[np.int8]
    ) -> tuple[str, ...]:
        """Replace the weight at every reader.

        Parameters
        ----------
        weight, scheme, grid : the weight, its scheme, and its scales in blocks
        codes : flat, in canonical order

        Returns
        -------
        The names of the forms that the readers got, each once.
        """
        codes_of = _WeightCodes(self._rewriter, weight, scheme, grid, codes, self._target)
        forms = [form_of(use, weight, scheme, self._target) for use in weight.uses]
        for form, use in zip(forms, weight.uses, strict=True):
            codes_of.write(form, use)
        if weight.node is None:
            self._rewriter.remove_initializer(weight.scope, weight.tensor.name)
        if weight.is_output:
            codes_of.write_under_its_name(_decoded_form(scheme, self._target))
        return tuple(sorted({form.value for form in forms}))


class _WeightCodes:
    """Writes the codes of one weight, in several forms; what readers can share is stored once."""

    def __init__(
        self,
        rewriter: Rewriter,
        weight: Weight,
        scheme: Scheme,
        grid: Grid,
        codes: Array,
        target: Target,
    ) -> None:
        self._rewriter = rewriter
        self._weight = weight
        self._scheme = scheme
        self._grid = grid
        self._blocks = grid.blocks
        self._codes = codes
        self._in_blocks = scheme.in_blocks
        self._has_zeros = scheme.has_zeros
        self._fuses_one_way = scheme.in_blocks or scheme.bits < 8
        self._pads = target.name != "onnxruntime"
        self._integers = target.integers
        self._shared: dict[tuple[Any, ...], Any] = {}
        self._writers: dict[WeightForm, Callable[[Use], None]] = {
            WeightForm.FOLDED: self._write_folded,
            WeightForm.DEQUANTIZE: self._write_dequantize,
            WeightForm.NBITS: self._write_nbits,
            WeightForm.BNB4: self._write_bnb4,
            WeightForm.GATHER: self._write_gather,
            WeightForm.GATHER_PACKED: self._write_gather_packed,
        }

    def write(self, form: WeightForm, use: Use) -> None:
        """Let one reader read the codes in this form."""
        self._writers[form](use)

    def write_under_its_name(self, form: WeightForm) -> None:
        """Let what the codes stand for have the weight's name, which an output of the graph has."""
        weight = self._weight
        decode = self._folded if form is WeightForm.FOLDED else self._dequantized
        value = decode(tuple(range(len(weight.shape))), weight.tensor.data_type)
        named = helper.make_node("Identity", [value], [weight.tensor_name])
        if weight.node is None:
            self._rewriter.prepend(weight.scope, named)
        else:
            self._rewriter.replace(weight.scope, weight.node, [named])

    def _write_dequantize(self, use: Use) -> None:
        """MatMul(x, w) -> MatMul(x, DequantizeLinear(codes, scales)).

        The DequantizeLinear is the reader's own, since onnxruntime fuses one with each reader. At
        4 bits and fewer a Gemm with transB = 1 gets the matrix the other way round, since it fuses
        no other.
        """
        perm = use.perm
        summed = use.direct and use.operator and use.output_axes() != self._weight.rows
        is_gemm = use.index == 1 and use.reads(WeightForm.DEQUANTIZE)
        if self._fuses_one_way and is_gemm and attribute(use.node, "transB", 0):
            perm = perm[::-1]
            remove_named(use.node.attribute, "transB")
        in_vain = self._integers and use.node.op_type in RECURRENT
        apart = bool(summed) or use.picks or in_vain or self._scheme.bits == 2
        use.node.input[use.index] = self._dequantized(perm, use.elem_type, apart)

    def _dequantized(self, perm: tuple[int, ...], elem_type: int, apart: bool = False) -> str:
        """The value of a DequantizeLinear over the codes, and of the nodes that it needs behind it.

        These are a Cast where it cannot yield the reader's type, and a Reshape where its scales
        differ along more axes than it takes: then it yields rows of output channels.

        perm, elem_type: as in Use. apart: whether the reader must not see that these are codes
        """
        opset = self._rewriter.opset(self._weight.scope)
        in_16_bits = elem_type == TensorProto.FLOAT16 and opset >= FLOAT16_OPSET
        in_16_bits = in_16_bits and self._scheme.name not in FLOAT4  # its scales reach further down
        scale_type = TensorProto.FLOAT16 if in_16_bits else TensorProto.FLOAT
        axis = self._axis_of_scales()
        key = None if axis is None else perm
        inputs, attributes = self._once(
            ("dequantize", key, scale_type), lambda: self._operands(perm, axis, scale_type)
        )
        value = self._add_node("DequantizeLinear", inputs, **attributes)
        if axis is None:
            value = self._in_shape(value, perm)
        if apart:
            lowest = np.array(np.finfo(_dtype(scale_type)).min)
            value = self._add_node("Max", [value, self._add_constant("lowest", lowest)])
        if elem_type != scale_type:
            value = self._add_node("Cast", [value], to=elem_type)
        return value

    def _axis_of_scales(self) -> int | None:
        """The stored axis with the blocks, or with the scales of rows; None if it is not one.

        Axes of length 1 do not count.
        """
        rows = self._weight.rows
        summed = self._weight.perm[len(rows) :]
        is_ragged = self._blocks.cols % self._blocks.size > 0
        is_stack_of_one = self._weight.shape[:2] == (1, 1) and len(self._weight.shape) > 3
        if self._pads and (is_ragged or is_stack_of_one):
            return None  # the standard allows both, but OpenVINO does not load them
        axes = summed if self._in_blocks else rows
        if self._blocks.rows == 1 and not self._in_blocks:
            return axes[0]
        long = [axis for axis in axes if self._weight.shape[axis] > 1] or axes[:1]
        return long[0] if len(long) == 1 else None

    def _operands(
        self, perm: tuple[int, ...], axis: int | None, scale_type: int
    ) -> tuple[list[str], dict[str, int]]:
        """Inputs and attributes of a DequantizeLinear.

        For int8 without blocks the zero points, all 0, are there as onnxruntime's own quantizer
        writes them.

        perm: as in Use; axis: as `_axis_of_scales` returns it. Without it codes: [rows, weights of
        a row], scales: [rows] or [rows, blocks of a row].
        """
        weight, blocks = self._weight, self._blocks

        def shaped(per_block: Array) -> Array:
            if axis is None:
                return self._by_row(per_block) if self._in_blocks else per_block
            if not self._in_blocks:
                return per_block
            shape = [blocks.per_row if a == axis else weight.shape[a] for a in weight.perm]
            return per_block.reshape(shape).transpose([weight.perm.index(a) for a in perm])

        if axis is None:
            codes, place = self._whole_blocks(), 1 if self._in_blocks else 0
        else:
            codes, place = weight.stored(self._codes).transpose(perm), perm.index(axis)
        one_scale = blocks.rows == 1 and not self._in_blocks
        scales, zeros = (
            each.reshape(()) if one_scale else shaped(each)
            for each in (self._grid.scale, self._grid.zero.astype(np.int8))
        )
        attributes = {} if one_scale else {"axis": place}
        if self._in_blocks:
            attributes["block_size"] = blocks.size
        inputs = [
            self._add_codes("quantized", codes, self._has_zeros, self._scheme.name in FLOAT4),
            self._add_scales(scales.astype(_dtype(scale_type)), folded=False),
        ]
        by_rows = self._scheme.name == "int8" and not self._in_blocks
        if self._has_zeros or by_rows:
            inputs.append(self._add_codes("zero_point", zeros, self._has_zeros))
        return inputs, attributes

    def _write_nbits(self, use: Use) -> None:
        """MatMul(x, w) -> MatMulNBits(x, codes, scales); the bias of a Gemm is added behind."""
        node = use.node
        outputs, contracted = self._matrix_shape()
        codes, scale, size = self._packed(use.elem_type)
        zeros = []
        if self._has_zeros:
            zeros = [self._once(("packed zeros",), lambda: self._packed_zeros(size))]
        bias = [name for name in node.input[2:] if name]
        result = node.output[0]
        product = self._rewriter.fresh(f"{result}_MatMulNBits_Output") if bias else result
        nodes = [
            helper.make_node(
                "MatMulNBits",
                [node.input[0], codes, scale, *zeros],
                [product],
                name=node.name,
                domain=CONTRIB,
                K=contracted,
                N=outputs,
                bits=self._scheme.bits,
                block_size=size,
                accuracy_level=ROUNDED_TO_8_BITS,
            )
        ]
        if bias:
            nodes.append(helper.make_node("Add", [product, *bias], [result]))
        self._rewriter.replace(use.scope, node, nodes)

    def _write_gather_packed(self, use: Use) -> None:
        """Gather(w, i) -> GatherBlockQuantized(codes, i, scales), of the codes of MatMulNBits.

        These have an axis for the blocks of a row, which a Reshape joins with that of the codes.
        Rows that are no whole number of blocks are cut.
        """
        indices, result = use.node.input[1], use.node.output[0]
        outputs, contracted = self._matrix_shape()
        codes, scale, size = self._packed(use.elem_type)
        shape = self._add_integers("table_shape", outputs, -1)
        table = self._add_node("Reshape", [codes, shape])
        ragged = contracted % size > 0
        whole = self._rewriter.fresh(f"{result}_GatherBlockQuantized_Output") if ragged else result
        nodes = [
            helper.make_node(
                "GatherBlockQuantized",
                [table, indices, scale],
                [whole],
                name=use.node.name,
                domain=CONTRIB,
                bits=self._scheme.bits,
                gather_axis=0,
                quantize_axis=1,
                block_size=size,
            )
        ]
        if ragged:
            limits = [self._add_integers("row", limit) for limit in (0, contracted, -1)]
            nodes.append(helper.make_node("Slice", [whole, *limits], [result]))
        self._rewriter.replace(use.scope, use.node, nodes)

    def _matrix_shape(self) -> tuple[int, int]:
        """Output channels of a matrix, and weights of each."""
        outputs, contracted = (self._weight.shape[axis] for axis in self._weight.perm)
        return outputs, contracted

    def _packed(self, elem_type: int) -> tuple[str, str, int]:
        """Codes as MatMulNBits reads them, their scales in a type, and the size of a block.

        Codes: [outputs, blocks of a row, bytes of a block], without a sign: 0 stands for the lowest
        level, and fills the last block of a row. Scales: [outputs, blocks of a row].
        """
        outputs, contracted = self._matrix_shape()
        size = self._blocks.size
        if self._blocks.per_row == 1:
            fitting = (block for block in BLOCKS_OF_A_ROW if contracted % block == 0)
            size = next(fitting, BLOCKS_OF_A_ROW[-1])
        per_row = -(-contracted // size)

        def codes() -> str:
            codes = self._codes.reshape(outputs, contracted)
            lowest = -(1 << self._scheme.bits - 1)
            missing = per_row * size - contracted
            codes = np.pad(codes, ((0, 0), (0, missing)), constant_values=lowest)
            unsigned = self._unsigned(codes)
            return self._add_constant("quantized", unsigned.reshape(outputs, per_row, -1))

        def scales() -> str:
            scales = self._of_packed(self._grid.scale, per_row).astype(_dtype(elem_type))
            return self._add_constant("scale", scales)

        return self._once(("packed",), codes), self._once(("packed", elem_type), scales), size

    def _packed_zeros(self, size: int) -> str:
        """The zero points of MatMulNBits, in blocks of this size; a row is whole bytes."""
        zeros = self._of_packed(self._grid.zero, -(-self._matrix_shape()[1] // size))
        zeros = np.pad(zeros, ((0, 0), (0, -zeros.shape[1] % (8 // self._scheme.bits))))
        unsigned = self._unsigned(np.ascontiguousarray(zeros, np.int8))
        return self._add_constant("zero_point", unsigned.reshape(len(zeros), -1))

    def _of_packed(self, per_block: Array, per_row: int) -> Array:
        """Values of the blocks, for as many blocks of a row, [outputs, per_row]."""
        return np.broadcast_to(self._by_row(per_block), (self._matrix_shape()[0], per_row))

    def _unsigned(self, codes: Array) -> Array:
        """Codes from 0 on; those of fewer bits than 8 two or four to a byte."""
        bits = self._scheme.bits
        if bits == 8:
            return codes.view(np.uint8) ^ np.uint8(128)
        return pack(codes, bits, UNSIGNED[bits])

    def _write_bnb4(self, use: Use) -> None:
        """MatMul(x, w) -> MatMulBnb4(x, codes, scales).

        codes: packed, flat, by output; scales: flat, one per block.
        """
        scheme, node = self._scheme, use.node
        assert isinstance(scheme, Codebook)

        def stored() -> list[str]:
            packed = pack(self._codes, 4, scheme.stored, high_first=True)
            codes = self._add_constant("quantized", packed)
            return [codes, self._add_constant("scale", self._grid.scale)]

        outputs, contracted = self._matrix_shape()
        product = helper.make_node(
            "MatMulBnb4",
            [node.input[0], *self._once(("bnb4",), stored)],
            [node.output[0]],
            name=node.name,
            domain=CONTRIB,
            K=contracted,
            N=outputs,
            block_size=self._blocks.size,
            quant_type=scheme.bnb4_type,
            training_mode=0,
        )
        self._rewriter.replace(use.scope, node, [product])

    def _write_gather(self, use: Use) -> None:
        """Gather(w, i) -> the rows, or matrices of a stack, that are looked up, dequantized.

        Mul(DequantizeLinear(Gather(codes, i), 1), Gather(scales, i)), since compilers want a
        DequantizeLinear to have constant scales; with one scale for the whole tensor
        DequantizeLinear(Gather(codes, i), scale). Zero points of rows are subtracted before the
        Mul. The inputs of a channel in blocks have two axes, blocks and places in a block, until
        they are multiplied. In 16 bits, a Cast follows.
        """
        indices, result = use.node.input[1], use.node.output[0]
        nodes: list[NodeProto] = []

        def step(op: str, inputs: list[str], **attributes: Any) -> str:
            name = self._rewriter.fresh(f"{result}_{op}_Output")
            node_name = name.removesuffix("_Output")
            nodes.append(helper.make_node(op, inputs, [name], name=node_name, **attributes))
            return name

        blocks = self._blocks
        perm = use.perm
        table, decoder, of_rows = self._once(("gather", perm), lambda: self._gathered(perm))
        axis = place = _picked_axis(use)
        contracted = perm.index(self._weight.perm[-1])
        if self._in_blocks and contracted < axis:
            place += 1
        picked = step("Gather", [table, indices], axis=place)
        value = step("DequantizeLinear", [picked, *decoder])
        nodes[0].name = use.node.name
        for op, values in of_rows.items():
            value = step(op, [value, step("Gather", [values, indices], axis=place)])
        if self._in_blocks:
            lengths = [self._weight.shape[a] for a in perm]
            lengths[contracted] = blocks.per_row * blocks.size
            before, behind = (
                [self._add_integers("row", *part)] if part else []
                for part in (lengths[:axis], lengths[axis + 1 :])
            )
            shape = step("Concat", [*before, step("Shape", [indices]), *behind], axis=0)
            value = step("Reshape", [value, shape])
            if blocks.cols % blocks.size:
                of_row = contracted if contracted < axis else contracted - len(perm)
                value = step("Slice", [value, *self._within_row(of_row)])
        if use.elem_type != TensorProto.FLOAT:
            value = step("Cast", [value], to=use.elem_type)
        nodes[-1].output[0] = result
        self._rewriter.replace(use.scope, use.node, nodes)

    def _gathered(self, perm: tuple[int, ...]) -> tuple[str, list[str], dict[str, str]]:
        """The codes that a Gather picks from; the scale and zero point of the DequantizeLinear.

        The third: what follows for every row, the operator and the tensor that it picks from.
        Gather reads no integers of less than a byte. So the codes of an embedding take a byte each;
        those of a stack of matrices, which may be most of a model, are packed in the file, and are
        cast.
        perm: as in Use
        """
        blocks, weight = self._blocks, self._weight
        split = [weight.shape[a] for a in weight.rows] + [blocks.per_row, blocks.size]
        order = [weight.perm.index(axis) for axis in perm]
        if self._in_blocks:
            contracted = order.index(len(order) - 1)
            order.insert(contracted + 1, len(order))
            table = self._whole_blocks().reshape(split).transpose(order)
        else:
            table = weight.stored(self._codes).transpose(perm)
        if self._scheme.bits < 8 and len(perm) > 2:
            packed = self._add_codes("quantized", table)
            codes = self._add_node("Cast", [packed], to=TensorProto.INT8)
        else:
            codes = self._add_constant("quantized", table)
        if blocks.count == 1 and not self._in_blocks:
            zero = self._grid.zero.astype(np.int8).reshape(())
            return codes, self._decoder(self._grid.scale.reshape(()), zero), {}

        def of_rows(suffix: str, per_block: Array) -> str:
            if self._in_blocks:
                return self._add_constant(
                    suffix, per_block.reshape(*split[:-1], 1).transpose(order)
                )
            return self._add_constant(suffix, self._broadcast(per_block, perm))

        steps = {"Sub": of_rows("zero", self._grid.zero)} if self._has_zeros else {}
        steps |= {"Mul": of_rows("scale", self._grid.scale)}
        return codes, self._decoder(np.ones((), np.float32), np.zeros((), np.int8)), steps

    def _decoder(self, scale: Array, zero: Array) -> list[str]:
        """The scale and the zero point of a Gather's DequantizeLinear, scalars.

        The zero point is there even if it is 0: before a Reshape or Transpose, onnxruntime adds
        a QuantizeLinear and another DequantizeLinear behind it, whose codes would be unsigned.
        """
        suffix = "one" if scale == 1 else "scale"
        return [self._add_constant(suffix, scale), self._add_constant("zero_point", zero)]

    def _write_folded(self, use: Use) -> None:
        """Reader(w) -> Reader(constants and nodes that yield what the codes stand for)."""
        use.node.input[use.index] = self._folded(use.perm, use.elem_type)

    def _folded(self, perm: tuple[int, ...], elem_type: int) -> str:
        """The value of constants and nodes that yield what the codes stand for.

        perm, elem_type: as in Use
        """

        def folded() -> str:
            fold = self._fold_blocks if self._in_blocks else self._fold_rows
            value = fold(perm)
            if elem_type != TensorProto.FLOAT:
                value = self._add_node("Cast", [value], to=elem_type)
            return value

        name: str = self._once(("folded", perm, elem_type), folded)
        return name

    def _fold_rows(self, perm: tuple[int, ...]) -> str:
        """w -> Mul(Cast(codes), scales), all with the operand's axes; a Sub of zeros in between."""
        codes = self._add_codes("quantized", self._weight.stored(self._codes).transpose(perm))
        value = self._add_node("Cast", [codes], to=TensorProto.FLOAT)
        if self._has_zeros:
            zeros = self._add_constant("zero", self._broadcast(self._grid.zero, perm))
            value = self._add_node("Sub", [value, zeros])
        scales = self._add_constant("scale", self._broadcast(self._grid.scale, perm))
        return self._add_node("Mul", [value, scales])

    def _fold_blocks(self, perm: tuple[int, ...]) -> str:
        """w -> Transpose(Reshape(Slice(Reshape(Mul(value(codes), scales))))).

        codes: [blocks, block_size], scales: [blocks, 1]; value: Cast to float, and Sub of zeros,
        or for a codebook Gather(codebook, codes). The inner Reshape and the Slice are there only if
        the last block of a row is shorter, the Transpose if it changes something.
        """
        blocks = self._blocks
        whole = self._whole_blocks().reshape(blocks.count, blocks.size)
        codes = self._add_codes("quantized", whole)
        if isinstance(self._scheme, Codebook):
            index = self._add_node("Cast", [codes], to=TensorProto.INT32)
            book = np.empty(16, np.float32)
            book[self._scheme.stored] = self._scheme.levels
            value = self._add_node("Gather", [self._add_constant("codebook", book), index])
        else:
            value = self._add_node("Cast", [codes], to=TensorProto.FLOAT)
        if self._has_zeros:
            zeros = self._add_constant("zero", self._grid.zero.reshape(-1, 1))
            value = self._add_node("Sub", [value, zeros])
        scales = self._add_scales(self._grid.scale.reshape(-1, 1), folded=True)
        value = self._add_node("Mul", [value, scales])
        if blocks.cols % blocks.size:
            shape = (blocks.rows, blocks.per_row * blocks.size)
            padded_shape = self._add_integers("padded_shape", *shape)
            value = self._add_node("Reshape", [value, padded_shape])
        return self._in_shape(value, perm)

    def _whole_blocks(self) -> Array:
        """The codes, [rows, weights of a row], each row padded with 0 to whole blocks."""
        blocks = self._blocks
        codes = self._codes.reshape(blocks.rows, blocks.cols)
        if missing := -blocks.cols % blocks.size:
            codes = np.pad(codes, ((0, 0), (0, missing)))
        return codes

    def _within_row(self, axis: int) -> list[str]:
        """Inputs of a Slice that drops the padding of each row."""
        limits = {"starts": 0, "ends": self._blocks.cols, "axes": axis}
        return [self._add_integers(name, limit) for name, limit in limits.items()]

    def _in_shape(self, value: str, perm: tuple[int, ...]) -> str:
        """Rows of output channels, padded or not, with the operand's axes."""
        if self._blocks.cols % self._blocks.size:
            value = self._add_node("Slice", [value, *self._within_row(axis=1)])
        canonical = self._weight.layout.canonical_shape
        value = self._add_node("Reshape", [value, self._add_integers("shape", *canonical)])
        order = [self._weight.perm.index(axis) for axis in perm]
        if order != sorted(order):
            value = self._add_node("Transpose", [value], perm=order)
        return value

    def _by_row(self, per_block: Array) -> Array:
        """Values of the blocks, [rows, blocks of a row]; one for the tensor: [1, 1]."""
        return per_block.reshape(self._blocks.rows, self._blocks.per_row)

    def _broadcast(self, per_row: Array, perm: tuple[int, ...]) -> Array:
        """Values of whole rows in a shape that broadcasts against the operand; perm: as in Use."""
        if self._blocks.rows == 1:
            return per_row.reshape(())
        rows = [self._weight.shape[axis] for axis in self._weight.rows]
        ones = [1] * (len(self._weight.shape) - len(rows))
        return per_row.reshape(rows + ones).transpose(np.argsort(self._weight.perm)).transpose(perm)

    def _add_codes(
        self, suffix: str, codes: Array, unsigned: bool = False, float4: bool = False
    ) -> str:
        """Add codes, or zero points: a byte each at 8 bits, two to a byte at 4, four at 2.

        unsigned: counted from 0 on; float4: as floats of 4 bits
        """
        if isinstance(self._scheme, Float8):
            floats = self._scheme.stored(codes).view(ml_dtypes.float8_e4m3fn)
            return self._add_constant(suffix, floats)
        bits = self._scheme.bits
        if bits == 8:
            return self._add_constant(suffix, self._unsigned(codes) if unsigned else codes)
        data_type: int = TensorProto.INT4 if bits == 4 else TensorProto.INT2
        stored_codes: Array | None = None
        if isinstance(self._scheme, Codebook):
            data_type = TensorProto.FLOAT4E2M1 if float4 else TensorProto.UINT4
            stored_codes = self._scheme.stored
        elif unsigned:
            data_type = TensorProto.UINT4 if bits == 4 else TensorProto.UINT2
            stored_codes = UNSIGNED[bits]
        packed = pack(codes, bits, stored_codes)
        name = f"{self._weight.tensor_name}_{suffix}"
        return self._rewriter.tensor(self._weight.scope, name, data_type, codes.shape, packed.data)

    def _add_scales(self, scales: Array, folded: bool) -> str:
        """Add scales of blocks; those that are multiples of the tensor's as 8-bit floats and that.

        folded: whether they are decoded by ordinary nodes, not by a DequantizeLinear
        """
        if not self._scheme.scales_tensor:
            return self._add_constant("scale", scales)
        multiples = (scales / self._grid.tensor_scale).astype(ml_dtypes.float8_e4m3fn)
        floats = self._add_constant("scale", multiples)
        whole = self._add_constant("tensor_scale", np.array(self._grid.tensor_scale))
        if not folded:
            return self._add_node("DequantizeLinear", [floats, whole])
        cast = self._add_node("Cast", [floats], to=TensorProto.FLOAT)
        return self._add_node("Mul", [cast, whole])

    def _add_constant(self, suffix: str, values: Array) -> str:
        name = f"{self._weight.tensor_name}_{suffix}"
        return self._rewriter.constant(self._weight.scope, name, values)

    def _add_integers(self, suffix: str, *values: int) -> str:
        return self._add_constant(suffix, np.array(values, np.int64))

    def _add_node(self, op: str, inputs: list[str], **attributes: Any) -> str:
        name = f"{self._weight.tensor_name}_{op}_Output"
        return self._rewriter.node(self._weight.scope, op, inputs, name, **attributes)

    def _once(self, key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        """What `make` returns, made at the first call with this key."""
        if key not in self._shared:
            self._shared[key] = make()
        return self._shared[key]


def _dtype(elem_type: int) -> Any:
    """numpy's type for one of ONNX."""
    return helper.tensor_dtype_to_np_dtype(elem_type)


def pack(
    codes: Array, bits: int, stored_codes: Array | None = None, high_first: bool = False
) -> Array:
    """Put codes of 4 bits two to a byte, of 2 bits four, in C order.

    Parameters
    ----------
    codes : int8, in any memory layout
    stored_codes : what to write for a code, by its low bits; without it, these bits
    high_first : whether the first of two is in the high bits, which MatMulBnb4 wants; ONNX wants it
        in the low

    Returns
    -------
    uint8, flat
    """
    low_bits = np.arange(256) & ((1 << bits) - 1)
    if stored_codes is not None:
        low_bits = stored_codes[low_bits].astype(int)
    first, second = low_bits[None, :], low_bits[:, None]  # of a pair, whose second byte is the high
    pairs = first << bits | second if high_first else first | second << bits
    pairs = pairs.astype(np.uint8)
    packed = np.empty(-(-codes.size // 2), np.uint8)
    row_size = codes.size // len(codes)
    step = max(PAIRS // row_size // STRIP, 1) * STRIP
    for start in range(0, len(codes), step):
        strip = contiguous(codes[start : start + step]).reshape(-1)
        if strip.size % 2:
            strip = np.append(strip, np.int8(0))
        begin = start * row_size // 2
        target = packed[begin : begin + strip.size // 2]
        pairs.take(strip.view("<u2"), out=target, mode="clip")  # the default copies
    return packed if bits == 4 else pack(packed.view(np.int8), 2 * bits)
