"""Codes into the graph: each reader of a weight gets them in the form that onnxruntime runs best.

dequantize  large at int4: DequantizeLinear -> MatMul or Gemm, which onnxruntime fuses into one
            kernel
bnb4        large at nf4, fp4: MatMulBnb4 in the place of MatMul
gather      an embedding: the codes of the wanted rows are gathered, then dequantized
folded      Cast and Mul by the scale (4 bits: after a codebook look-up and a Reshape): ordinary
            nodes over constants, which onnxruntime folds when it loads the file. Float speed and
            float memory, small file; DequantizeLinear here would run again at every inference,
            and the kernel that it fuses into at 8 bits takes up to 1.7 times as long as float32
            where many rows are multiplied at once (tools/latency.py)
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, NodeProto, TensorProto, helper

from ..graph.operators import FOUR_BIT_OPS
from ..graph.scopes import Use
from ..graph.weights import Weight
from ..io.writer import Output
from ..quantization.arrays import contiguous
from ..quantization.schemes import Codebook, Grid, Scheme
from .rewriter import CONTRIB, Rewriter, remove_named

PACKED = 1 << 20  # weights from which a matrix stays in 4 bits in memory, at the cost of time

PAIRS = 1 << 18  # of codes that are packed at a time, so that they stay in the cache

STRIP = 64  # rows, and their multiples: what a cache line holds of a turned matrix

Array = npt.NDArray[Any]


def form_of(use: Use, weight: Weight, scheme: Scheme, standard_ops: bool) -> str:
    """How this reader gets the weight: "dequantize", "bnb4", "gather" or "folded"."""
    rank = len(weight.shape)
    if not use.direct or use.output_axes() != weight.rows:
        return "folded"
    fits_kernel = rank == 2 and use.index == 1 and use.op in FOUR_BIT_OPS
    if fits_kernel and scheme.bits == 4 and weight.size >= PACKED:
        if not isinstance(scheme, Codebook):
            fuses = use.elem_type != TensorProto.BFLOAT16 and use.scope is weight.scope
            return "dequantize" if fuses else "folded"
        if use.op == "MatMul" and use.elem_type == TensorProto.FLOAT and not standard_ops:
            return "bnb4"
    if use.op == "Gather" and weight.rows == (0,) and use.perm == tuple(range(rank)):
        if scheme.bits == 8:
            return "gather"
        if not isinstance(scheme, Codebook) and rank == 2 and not standard_ops:
            return "gather"
    return "folded"


class Emitter:
    """Rewrites one model: `emit` every weight, then `finish`."""

    def __init__(self, proto: ModelProto, output: Output, standard_ops: bool) -> None:
        self._standard_ops = standard_ops
        self._rewriter = Rewriter(proto, output)
        self.finish = self._rewriter.finish

    def emit(
        self, weight: Weight, scheme: Scheme, grid: Grid, codes: npt.NDArray[np.int8]
    ) -> tuple[str, ...]:
        """Replace the weight at every reader; returns the forms that they got.

        codes: flat, in canonical order.
        """
        forms = _Forms(self._rewriter, weight, scheme, grid, codes)
        names = [form_of(use, weight, scheme, self._standard_ops) for use in weight.uses]
        for name, use in zip(names, weight.uses, strict=True):
            getattr(forms, name)(use)
        if weight.node is None:
            self._rewriter.remove_initializer(weight.scope, weight.tensor.name)
        return tuple(sorted(set(names)))


class _Forms:
    """The forms of one weight; what two readers can share is stored once."""

    def __init__(
        self, rewriter: Rewriter, weight: Weight, scheme: Scheme, grid: Grid, codes: Array
    ) -> None:
        self._rewriter = rewriter
        self._weight = weight
        self._scheme = scheme
        self._grid = grid
        self._blocks = grid.blocks
        self._values = codes
        self._shared: dict[tuple[Any, ...], Any] = {}

    def dequantize(self, use: Use) -> None:
        """DequantizeLinear, one per reader; a transposed Gemm operand is turned round."""
        inputs = self._once(("dequantize", use.elem_type), lambda: self._dequantized(use))
        use.node.input[use.index] = self._node(
            "DequantizeLinear", inputs, axis=0, block_size=self._blocks.size
        )
        if use.op == "Gemm":
            remove_named(use.node.attribute, "transB")

    def _dequantized(self, use: Use) -> list[str]:
        matrix = self._values.reshape([self._weight.shape[a] for a in self._weight.perm]).T
        scale: Array = self._grid.scale.reshape(self._blocks.rows, self._blocks.per_row).T
        scale = scale.astype(helper.tensor_dtype_to_np_dtype(use.elem_type))
        return [self._codes(matrix), self._constant("scale", scale)]

    def bnb4(self, use: Use) -> None:
        """MatMulBnb4."""
        scheme, node = self._scheme, use.node
        assert isinstance(scheme, Codebook)

        def stored() -> list[str]:
            codes = self._constant("quantized", pack(self._values, True, scheme.stored))
            return [codes, self._constant("scale", self._grid.scale)]

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

    def gather(self, use: Use) -> None:
        """Gather rows of codes and of scales, then dequantize only those."""
        table = self._once(
            ("gather",), lambda: self._codes(self._values.reshape(self._weight.shape))
        )
        nodes = self._gather_4_bits(use, table) if self._scheme.bits == 4 else None
        self._rewriter.replace(use.scope, use.node, nodes or self._gather_8_bits(use, table))

    def _gather_4_bits(self, use: Use, table: str) -> list[NodeProto]:
        dtype = helper.tensor_dtype_to_np_dtype(use.elem_type)
        scale = self._grid.scale.reshape(self._blocks.rows, self._blocks.per_row).astype(dtype)
        node = helper.make_node(
            "GatherBlockQuantized",
            [table, use.node.input[1], self._constant("scale", scale)],
            [use.node.output[0]],
            name=use.node.name,
            domain=CONTRIB,
            gather_axis=0,
            quantize_axis=1,
            block_size=self._blocks.size,
        )
        return [node]

    def _gather_8_bits(self, use: Use, table: str) -> list[NodeProto]:
        indices, result = use.node.input[1], use.node.output[0]
        rows, floats = (self._rewriter.fresh(f"{result}_{part}") for part in ("codes", "cast"))
        nodes = [
            helper.make_node("Gather", [table, indices], [rows], name=use.node.name, axis=0),
            helper.make_node("Cast", [rows], [floats], to=TensorProto.FLOAT),
        ]
        scale = self._once(("scale",), lambda: self._constant("scale", self._broadcast_scale()))
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

    def folded(self, use: Use) -> None:
        """Constants all the way to the operand."""

        def value() -> str:
            make = self._folded_8_bits if self._scheme.bits == 8 else self._folded_4_bits
            result = make(use)
            if use.elem_type != TensorProto.FLOAT:
                result = self._node("Cast", [result], to=use.elem_type)
            return result

        key = ("folded", use.perm, use.elem_type)
        use.node.input[use.index] = self._once(key, value)

    def _folded_8_bits(self, use: Use) -> str:
        codes = self._codes(self._weight.stored(self._values).transpose(use.perm))
        scale = self._broadcast_scale()
        if scale.ndim:
            scale = scale.transpose(use.perm)
        floats = self._node("Cast", [codes], to=TensorProto.FLOAT)
        return self._node("Mul", [floats, self._constant("scale", scale)])

    def _folded_4_bits(self, use: Use) -> str:
        blocks = self._blocks
        whole_blocks = (blocks.rows, blocks.per_row * blocks.size)
        padded = np.zeros(whole_blocks, np.int8)
        padded[:, : blocks.cols] = self._values.reshape(blocks.rows, blocks.cols)
        codes = self._codes(padded.reshape(blocks.count, blocks.size))
        if isinstance(self._scheme, Codebook):
            index = self._node("Cast", [codes], to=TensorProto.INT32)
            book = np.empty(16, np.float32)
            book[self._scheme.stored] = self._scheme.levels
            value = self._node("Gather", [self._constant("codebook", book), index])
        else:
            value = self._node("Cast", [codes], to=TensorProto.FLOAT)
        scale = self._constant("scale", self._grid.scale.reshape(-1, 1))
        value = self._node("Mul", [value, scale])
        if blocks.cols % blocks.size:
            value = self._node("Reshape", [value, self._integers("padded_shape", *whole_blocks)])
            limits = ("starts", 0), ("ends", blocks.cols), ("axes", 1)
            value = self._node("Slice", [value, *(self._integers(n, v) for n, v in limits)])
        shape = (self._weight.shape[axis] for axis in self._weight.perm)
        value = self._node("Reshape", [value, self._integers("shape", *shape)])
        order = [self._weight.perm.index(axis) for axis in use.perm]
        if order != sorted(order):
            value = self._node("Transpose", [value], perm=order)
        return value

    def _broadcast_scale(self) -> Array:
        """The scales of whole rows in a shape that broadcasts against the stored tensor."""
        if self._blocks.rows == 1:
            return self._grid.scale.reshape(())
        rows = [self._weight.shape[axis] for axis in self._weight.rows]
        ones = [1] * (len(self._weight.shape) - len(rows))
        return self._grid.scale.reshape(rows + ones).transpose(np.argsort(self._weight.perm))

    def _codes(self, codes: Array) -> str:
        """Integer codes: a byte each at 8 bits, two to a byte at 4."""
        if self._scheme.bits == 8:
            return self._constant("quantized", codes)
        data_type, names = TensorProto.INT4, None
        if isinstance(self._scheme, Codebook):
            data_type, names = TensorProto.UINT4, self._scheme.stored
        packed = pack(codes, False, names)
        name = f"{self._weight.tensor_name}_quantized"
        return self._rewriter.tensor(self._weight.scope, name, data_type, codes.shape, packed.data)

    def _constant(self, suffix: str, values: Array) -> str:
        name = f"{self._weight.tensor_name}_{suffix}"
        return self._rewriter.constant(self._weight.scope, name, values)

    def _integers(self, suffix: str, *values: int) -> str:
        return self._constant(suffix, np.array(values, np.int64))

    def _node(self, op: str, inputs: list[str], **attributes: Any) -> str:
        name = f"{self._weight.tensor_name}_{op}_Output"
        return self._rewriter.node(self._weight.scope, op, inputs, name, **attributes)

    def _once(self, key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        if key not in self._shared:
            self._shared[key] = make()
        return self._shared[key]


def pack(codes: Array, high_first: bool, names: Array | None = None) -> Array:
    """4-bit codes (int8, of any layout), two to a byte, in C order; uint8, flat.

    MatMulBnb4 wants the first in the high nibble, ONNX in the low. names: what to write for codes
    0 to 15; without it, a code is written as its low four bits.
    """
    nibbles = np.arange(256) & 15 if names is None else names[np.arange(256) & 15].astype(int)
    first, second = nibbles[None, :], nibbles[:, None]  # of a pair, whose second byte is the high
    bytes_of = ((first << 4 | second) if high_first else (first | second << 4)).astype(np.uint8)
    packed = np.empty(-(-codes.size // 2), np.uint8)
    each = codes.size // len(codes)
    step = max(PAIRS // each // STRIP, 1) * STRIP
    for start in range(0, len(codes), step):
        some = contiguous(codes[start : start + step]).reshape(-1)
        if some.size % 2:
            some = np.append(some, np.int8(0))
        begin = start * each // 2
        into = packed[begin : begin + some.size // 2]
        bytes_of.take(some.view("<u2"), out=into, mode="clip")  # the default copies
    return packed
