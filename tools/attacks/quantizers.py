"""The quantizers that the attacks aim at, in numpy, equal to onnxruntime's own code for code.

Every weight is seen as rows `[N, K]`: one row per output feature (or per vocabulary entry, or per
convolution filter), so a MatMul weight `[K, N]` is transposed first. A scheme cuts the rows into
groups that share one scale:

    int8         one group per row            levels -127..127, scale absmax/127
    int8_tensor  one group per tensor         the same levels
    int4         32 weights along each row    levels -8..7, scale -extreme/8
    nf4, fp4     64 weights of the flat array codebook times absmax

Formulas: onnxruntime `quantization/quant_utils.py` (int8), MLAS blockwise quantization (int4) and
`blockwise_quant_block_bnb4.h` (nf4, fp4). `tests` at the bottom compare with onnxruntime itself.
"""

from dataclasses import dataclass

import numpy as np

NF4_LEVELS = np.array(
    [-1, -.6961928009986877, -.5250730514526367, -.39491748809814453, -.28444138169288635,
     -.18477343022823334, -.09105003625154495, 0, .07958029955625534, .16093020141124725,
     .24611230194568634, .33791524171829224, .44070982933044434, .5626170039176941,
     .7229568362236023, 1], np.float32)  # fmt: skip
NF4_PIVOTS = np.array(
    [-.8480964004993439, -.6106329262256622, -.4599952697753906, -.33967943489551544,
     -.23460740596055984, -.13791173323988914, -.045525018125772476, .03979014977812767,
     .1202552504837513, .2035212516784668, .2920137718319893, .3893125355243683,
     .5016634166240692, .6427869200706482, .8614784181118011], np.float32)  # fmt: skip
FP4_PIVOTS = np.array(
    [0.00260417, 0.0859375, 0.20833333, 0.29166667, 0.4166667, 0.583333, 0.8333333], np.float32
)
FP4_CODES = np.array([0, 1, 6, 7, 4, 5, 2, 3], np.uint8)
FP4_BY_CODE = np.array([0, 0.00520833, 0.6666667, 1, 0.3333333, 0.5, 0.1666667, 0.25], np.float32)
FP4_POSITIVE = FP4_BY_CODE[FP4_CODES]


@dataclass(frozen=True)
class Scheme:
    """Ascending `levels` and the `boundaries` between them, both in units of the scale."""

    name: str
    levels: np.ndarray
    boundaries: np.ndarray
    block: int | None
    flat: bool
    top: float

    def group(self, rows):
        """Cut rows `[N, K]` into groups `[G, B]`, filled up with zeros."""
        if self.flat:
            width = self.block or rows.size
            flat = rows.reshape(-1)
            return np.pad(flat, (0, -flat.size % width)).reshape(-1, width)
        width = self.block or rows.shape[1]
        return np.pad(rows, ((0, 0), (0, -rows.shape[1] % width))).reshape(-1, width)

    def ungroup(self, groups, shape):
        """The inverse of `group`."""
        if self.flat:
            return groups.reshape(-1)[: shape[0] * shape[1]].reshape(shape)
        return groups.reshape(shape[0], -1)[:, : shape[1]]

    def scale(self, groups):
        """One float32 scale per group `[G, 1]`: the unit of `levels` and `boundaries`."""
        largest = np.abs(groups).max(1, keepdims=True)
        if self.name in ("nf4", "fp4"):
            return largest
        if self.name == "int4":
            at = np.abs(groups).argmax(1)[:, None]
            return np.take_along_axis(groups, at, 1) * np.float32(-1 / 8)
        scale = (2 * largest.astype(np.float64) / 254).astype(np.float32)
        return np.where(scale == 0, np.float32(1), scale)

    def encode(self, rows):
        """Codes (positions in `levels`) `[N, K]`, and the scales `[G, 1]`."""
        groups = self.group(np.ascontiguousarray(rows, np.float32))
        scale = self.scale(groups)
        if self.name.startswith("int8"):
            codes = np.rint(groups / scale) + 127
        else:
            inverse = np.divide(1, scale, where=scale != 0, out=np.zeros_like(scale))
            x = groups * inverse
            if self.name == "int4":
                codes = np.clip(np.floor(x + np.float32(8) + np.float32(0.5)), 0, 15)
            elif self.name == "nf4":
                codes = np.searchsorted(NF4_PIVOTS, x, side="left")
            else:
                size = np.searchsorted(FP4_PIVOTS, np.abs(x), side="left")
                codes = np.where(x < 0, 7 - size, 7 + size)
        return self.ungroup(codes.astype(np.int16), rows.shape), scale

    def decode(self, codes, scale):
        """The float32 weights that codes stand for."""
        return self.ungroup(self.levels[self.group(codes)] * scale, codes.shape)

    def quantize(self, rows):
        """`decode(encode(rows))`."""
        return self.decode(*self.encode(rows))

    def cells(self, rows):
        """The interval in which every weight keeps its code while the scale stays.

        Returns `low, high, frozen`, each `[N, K]`: cells of the outermost levels end at the
        scale-setting weight, and `frozen` marks that weight itself.
        """
        codes, scale = self.encode(rows)
        groups = self.group(rows.astype(np.float64))
        edges = np.concatenate([[-self.top], self.boundaries.astype(np.float64), [self.top]])
        at = self.group(codes).astype(int)
        one, other = edges[at] * scale, edges[at + 1] * scale
        frozen = np.abs(groups) == np.abs(groups).max(1, keepdims=True)
        parts = np.minimum(one, other), np.maximum(one, other), frozen
        return tuple(self.ungroup(part, rows.shape) for part in parts)


def _integer(name, low, high, block, flat, top):
    levels = np.arange(low, high + 1, dtype=np.float32)
    return Scheme(name, levels, levels[:-1] + np.float32(0.5), block, flat, top)


_FP4_LEVELS = np.concatenate([-FP4_POSITIVE[:0:-1], FP4_POSITIVE])
_FP4_BOUNDARIES = np.concatenate([-FP4_PIVOTS[::-1], FP4_PIVOTS])

SCHEMES = {
    "int8": _integer("int8", -127, 127, None, False, 127.0),
    "int8_tensor": _integer("int8_tensor", -127, 127, None, True, 127.0),
    "int4": _integer("int4", -8, 7, 32, False, 8.0),
    "nf4": Scheme("nf4", NF4_LEVELS, NF4_PIVOTS, 64, True, 1.0),
    "fp4": Scheme("fp4", _FP4_LEVELS, _FP4_BOUNDARIES, 64, True, 1.0),
}
