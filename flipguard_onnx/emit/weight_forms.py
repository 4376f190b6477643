"""Codes into the graph: each reader of a weight gets them in the form that onnxruntime runs best.

Before, a reader takes the float weight w. After, with s for the scales (one axis for whole rows of
the weight, two for blocks of them):

FOLDED      MatMul(x, w) -> MatMul(x, Mul(Cast(codes), s)), and at 4 bits
                            MatMul(x, Reshape(Mul(Cast(blocks of codes), s)))
            Ordinary nodes over constants, which onnxruntime computes once, when it loads the file:
            a small file that runs at the speed and in the memory of floats. DequantizeLinear in
            their place would run again at every inference, and the kernel that it fuses into at
            8 bits takes up to 1.7 times as long as float32 where many rows are multiplied at once
            (tools/latency.py).
DEQUANTIZE  MatMul(x, w) -> MatMul(x, DequantizeLinear(codes, s))
            Large matrices at int4, read by MatMul or Gemm: onnxruntime fuses the two into one
            kernel, so the weight stays in 4 bits in memory.
BNB4        MatMul(x, w) -> MatMulBnb4(x, codes, s)
            Large matrices at nf4 and fp4, likewise.
GATHER      Gather(w, i) -> Mul(Cast(Gather(codes, i)), Gather(s, i)), and at 4 bits
                            GatherBlockQuantized(codes, i, s)
            Embeddings: only the rows that are looked up are dequantized.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, NodeProto, TensorProto, helper

from ..graph.operators import CONTRIB, WeightForm
from ..graph.scopes import Use
from ..graph.weights import Weight
from ..io.writer import Output
from ..quantization.arrays import contiguous
from ..quantization.schemes import Codebook, Grid, Scheme
from .rewriter import Rewriter, remove_named

MIN_PACKED = 1 << 20  # weights from which a matrix stays in 4 bits in memory, at the cost of time

PAIRS = 1 << 18  # of codes that are packed at a time, so that they stay in the cache

STRIP = 64  # rows, and their multiples: what a cache line holds of a transposed matrix

Array = npt.NDArray[Any]


def form_of(use: Use, weight: Weight, scheme: Scheme, standard_ops: bool) -> WeightForm:
    """The form in which this reader gets the weight.

    Parameters
    ----------
    use, weight : one of the weight's readers
    scheme : that of the weight
    standard_ops : whether to do without contrib operators
    """
    if not use.direct or use.operator is None or use.output_axes() != weight.rows:
        return WeightForm.FOLDED
    rank, forms = len(weight.shape), use.operator.forms
    is_book = isinstance(scheme, Codebook)
    if scheme.bits == 4 and weight.size >= MIN_PACKED and rank == 2 and use.index == 1:
        if WeightForm.DEQUANTIZE in forms and not is_book:
            fuses = use.elem_type != TensorProto.BFLOAT16 and use.scope is weight.scope
            return WeightForm.DEQUANTIZE if fuses else WeightForm.FOLDED
        is_float = use.elem_type == TensorProto.FLOAT
        if WeightForm.BNB4 in forms and is_book and is_float and not standard_ops:
            return WeightForm.BNB4
    by_row = weight.rows == (0,) and use.perm == tuple(range(rank))
    if WeightForm.GATHER in forms and by_row:
        block_quantized = not is_book and rank == 2 and not standard_ops
        if scheme.bits == 8 or block_quantized:
            return WeightForm.GATHER
    return WeightForm.FOLDED


class Emitter:
    """Rewrites one model: `emit` every weight, then `finish`."""

    def __init__(self, proto: ModelProto, output: Output, standard_ops: bool) -> None:
        self._standard_ops = standard_ops
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
        codes_of = _WeightCodes(self._rewriter, weight, scheme, grid, codes)
        forms = [form_of(use, weight, scheme, self._standard_ops) for use in weight.uses]
        for form, use in zip(forms, weight.uses, strict=True):
            codes_of.write(form, use)
        if weight.node is None:
            self._rewriter.remove_initializer(weight.scope, weight.tensor.name)
        if weight.is_output:
            codes_of.write_under_its_name()
        return tuple(sorted({form.value for form in forms}))


class _WeightCodes:
    """Writes the codes of one weight, in several forms; what readers can share is stored once."""

    def __init__(
        self, rewriter: Rewriter, weight: Weight, scheme: Scheme, grid: Grid, codes: Array
    ) -> None:
        self._rewriter = rewriter
        self._weight = weight
        self._scheme = scheme
        self._grid = grid
        self._blocks = grid.blocks
        self._codes = codes
        self._shared: dict[tuple[Any, ...], Any] = {}
        self._writers: dict[WeightForm, Callable[[Use], None]] = {
            WeightForm.FOLDED: self._write_folded,
            WeightForm.DEQUANTIZE: self._write_dequantize,
            WeightForm.BNB4: self._write_bnb4,
            WeightForm.GATHER: self._write_gather,
        }

    def write(self, form: WeightForm, use: Use) -> None:
        """Let one reader read the codes in this form."""
        self._writers[form](use)

    def write_under_its_name(self) -> None:
        """Let what the codes stand for have the weight's name, which an output of the graph has."""
        weight = self._weight
        perm = tuple(range(len(weight.shape)))
        value = self._decoded(perm, weight.tensor.data_type)
        named = helper.make_node("Identity", [value], [weight.tensor_name])
        if weight.node is None:
            self._rewriter.prepend(weight.scope, named)
        else:
            self._rewriter.replace(weight.scope, weight.node, [named])

    def _write_dequantize(self, use: Use) -> None:
        """MatMul(x, w) -> MatMul(x, DequantizeLinear(codes, scales)), Gemm likewise.

        codes: [inputs, outputs], scales: [blocks, outputs]; a Gemm with transB = 1 loses that.
        The DequantizeLinear is the reader's own, since onnxruntime fuses one with each reader.
        """
        inputs = self._once(("dequantize", use.elem_type), lambda: self._matrix_and_scales(use))
        use.node.input[use.index] = self._add_node(
            "DequantizeLinear", inputs, axis=0, block_size=self._blocks.size
        )
        remove_named(use.node.attribute, "transB")

    def _matrix_and_scales(self, use: Use) -> list[str]:
        matrix = self._codes.reshape([self._weight.shape[a] for a in self._weight.perm]).T
        scales = self._block_scales().T.astype(helper.tensor_dtype_to_np_dtype(use.elem_type))
        return [self._add_codes(matrix), self._add_constant("scale", scales)]

    def _write_bnb4(self, use: Use) -> None:
        """MatMul(x, w) -> MatMulBnb4(x, codes, scales).

        codes: packed, flat, by output; scales: flat, one per block.
        """
        scheme, node = self._scheme, use.node
        assert isinstance(scheme, Codebook)

        def stored() -> list[str]:
            codes = self._add_constant("quantized", pack(self._codes, True, scheme.stored))
            return [codes, self._add_constant("scale", self._grid.scale)]

        outputs, contracted = (self._weight.shape[axis] for axis in self._weight.perm)
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
        """Gather(w, i) -> the looked up rows of codes, times their scales."""
        table = self._once(
            ("gather",), lambda: self._add_codes(self._codes.reshape(self._weight.shape))
        )
        four_bits = self._scheme.bits == 4
        nodes = self._gather_4_bits(use, table) if four_bits else self._gather_8_bits(use, table)
        self._rewriter.replace(use.scope, use.node, nodes)

    def _gather_4_bits(self, use: Use, table: str) -> list[NodeProto]:
        """Gather(w, i) -> GatherBlockQuantized(codes, i, scales); scales: [rows, blocks]."""
        scales = self._block_scales().astype(helper.tensor_dtype_to_np_dtype(use.elem_type))
        node = helper.make_node(
            "GatherBlockQuantized",
            [table, use.node.input[1], self._add_constant("scale", scales)],
            [use.node.output[0]],
            name=use.node.name,
            domain=CONTRIB,
            gather_axis=0,
            quantize_axis=1,
            block_size=self._blocks.size,
        )
        return [node]

    def _gather_8_bits(self, use: Use, table: str) -> list[NodeProto]:
        """Gather(w, i) -> Mul(Cast(Gather(codes, i)), Gather(scales, i)).

        One scale for the whole tensor is not gathered. In 16 bits, a Cast follows.
        """
        indices, result = use.node.input[1], use.node.output[0]
        rows, floats = (self._rewriter.fresh(f"{result}_{part}") for part in ("codes", "cast"))
        nodes = [
            helper.make_node("Gather", [table, indices], [rows], name=use.node.name, axis=0),
            helper.make_node("Cast", [rows], [floats], to=TensorProto.FLOAT),
        ]
        scale = self._once(
            ("scale",), lambda: self._add_constant("scale", self._broadcast_scales())
        )
        if self._blocks.rows > 1:
            row_scale = self._rewriter.fresh(f"{result}_scale")
            nodes.append(helper.make_node("Gather", [scale, indices], [row_scale], axis=0))
            scale = row_scale
        is_float = use.elem_type == TensorProto.FLOAT
        product = result if is_float else self._rewriter.fresh(f"{result}_float")
        nodes.append(helper.make_node("Mul", [floats, scale], [product]))
        if not is_float:
            nodes.append(helper.make_node("Cast", [product], [result], to=use.elem_type))
        return nodes

    def _write_folded(self, use: Use) -> None:
        """Reader(w) -> Reader(constants and nodes that yield what the codes stand for)."""
        use.node.input[use.index] = self._decoded(use.perm, use.elem_type)

    def _decoded(self, perm: tuple[int, ...], elem_type: int) -> str:
        """The value of constants and nodes that yield what the codes stand for.

        perm, elem_type: as in Use
        """

        def decoded() -> str:
            fold = self._fold_8_bits if self._scheme.bits == 8 else self._fold_4_bits
            value = fold(perm)
            if elem_type != TensorProto.FLOAT:
                value = self._add_node("Cast", [value], to=elem_type)
            return value

        name: str = self._once(("folded", perm, elem_type), decoded)
        return name

    def _fold_8_bits(self, perm: tuple[int, ...]) -> str:
        """w -> Mul(Cast(codes), scales), both with the operand's axes."""
        codes = self._add_codes(self._weight.stored(self._codes).transpose(perm))
        scales = self._broadcast_scales()
        if scales.ndim:
            scales = scales.transpose(perm)
        floats = self._add_node("Cast", [codes], to=TensorProto.FLOAT)
        return self._add_node("Mul", [floats, self._add_constant("scale", scales)])

    def _fold_4_bits(self, perm: tuple[int, ...]) -> str:
        """w -> Transpose(Reshape(Slice(Reshape(Mul(value(codes), scales))))).

        codes: [blocks, block_size], scales: [blocks, 1]; value: Cast to float, or for a codebook
        Gather(codebook, codes). The inner Reshape and the Slice, which drop the padding of each
        row's last block, and the Transpose are there only if they change something.
        """
        blocks = self._blocks
        whole_blocks = (blocks.rows, blocks.per_row * blocks.size)
        padded = np.zeros(whole_blocks, np.int8)
        padded[:, : blocks.cols] = self._codes.reshape(blocks.rows, blocks.cols)
        codes = self._add_codes(padded.reshape(blocks.count, blocks.size))
        if isinstance(self._scheme, Codebook):
            index = self._add_node("Cast", [codes], to=TensorProto.INT32)
            book = np.empty(16, np.float32)
            book[self._scheme.stored] = self._scheme.levels
            value = self._add_node("Gather", [self._add_constant("codebook", book), index])
        else:
            value = self._add_node("Cast", [codes], to=TensorProto.FLOAT)
        scales = self._add_constant("scale", self._grid.scale.reshape(-1, 1))
        value = self._add_node("Mul", [value, scales])
        if blocks.cols % blocks.size:
            padded_shape = self._add_integers("padded_shape", *whole_blocks)
            value = self._add_node("Reshape", [value, padded_shape])
            limits = {"starts": 0, "ends": blocks.cols, "axes": 1}
            added = [self._add_integers(name, limit) for name, limit in limits.items()]
            value = self._add_node("Slice", [value, *added])
        shape = (self._weight.shape[axis] for axis in self._weight.perm)
        value = self._add_node("Reshape", [value, self._add_integers("shape", *shape)])
        order = [self._weight.perm.index(axis) for axis in perm]
        if order != sorted(order):
            value = self._add_node("Transpose", [value], perm=order)
        return value

    def _block_scales(self) -> Array:
        """The scales, [rows, blocks of a row]."""
        return self._grid.scale.reshape(self._blocks.rows, self._blocks.per_row)

    def _broadcast_scales(self) -> Array:
        """The scales of whole rows in a shape that broadcasts against the stored tensor."""
        if self._blocks.rows == 1:
            return self._grid.scale.reshape(())
        rows = [self._weight.shape[axis] for axis in self._weight.rows]
        ones = [1] * (len(self._weight.shape) - len(rows))
        return self._grid.scale.reshape(rows + ones).transpose(np.argsort(self._weight.perm))

    def _add_codes(self, codes: Array) -> str:
        """Add integer codes: a byte each at 8 bits, two to a byte at 4."""
        if self._scheme.bits == 8:
            return self._add_constant("quantized", codes)
        data_type, stored_codes = TensorProto.INT4, None
        if isinstance(self._scheme, Codebook):
            data_type, stored_codes = TensorProto.UINT4, self._scheme.stored
        packed = pack(codes, False, stored_codes)
        name = f"{self._weight.tensor_name}_quantized"
        return self._rewriter.tensor(self._weight.scope, name, data_type, codes.shape, packed.data)

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


def pack(codes: Array, high_first: bool, stored_codes: Array | None = None) -> Array:
    """Put 4-bit codes two to a byte, in C order.

    Parameters
    ----------
    codes : int8, in any memory layout
    high_first : whether the first of two is in the high four bits, which MatMulBnb4 wants; ONNX
        wants it in the low
    stored_codes : what to write for codes 0 to 15; without it, a code is written as its low four
        bits

    Returns
    -------
    uint8, flat
    """
    nibbles = np.arange(256) & 15
    if stored_codes is not None:
        nibbles = stored_codes[nibbles].astype(int)
    first, second = nibbles[None, :], nibbles[:, None]  # of a pair, whose second byte is the high
    bytes_of = ((first << 4 | second) if high_first else (first | second << 4)).astype(np.uint8)
    packed = np.empty(-(-codes.size // 2), np.uint8)
    row_size = codes.size // len(codes)
    step = max(PAIRS // row_size // STRIP, 1) * STRIP
    for start in range(0, len(codes), step):
        strip = contiguous(codes[start : start + step]).reshape(-1)
        if strip.size % 2:
            strip = np.append(strip, np.int8(0))
        begin = start * row_size // 2
        target = packed[begin : begin + strip.size // 2]
        bytes_of.take(strip.view("<u2"), out=target, mode="clip")  # the default copies
    return packed
