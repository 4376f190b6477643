"""The quantizers that attacks aim at, in numpy, equal to onnxruntime's own code for code.

Every weight is seen as rows `[N, K]`: one row per output feature (or per vocabulary entry, or per
convolution filter), so a MatMul weight `[K, N]` is transposed first. A scheme cuts the rows into
groups that share one scale:

    int8          one group per row             levels -127..127, scale absmax/127
    int8_tensor   one group per tensor          the same levels
    int8_g32      32 weights along each row     levels -128..127, scale -extreme/128
    uint8_tensor  one group per tensor          256 levels with a zero point, scale range/255
    int4          32 weights along each row     levels -8..7, scale -extreme/8
    int4_g128     128 weights along each row    the same levels
    uint4_g128    128 weights along each row    16 levels with a zero point, scale range/15
    nf4, fp4      64 weights of the flat array  codebook times absmax
    mxfp4         32 weights along each row     E2M1 times a power of two; the extreme at 4 to 8
    nvfp4         16 weights along each row     E2M1 times a float8e4m3fn times absmax/2688 of all

Formulas: onnxruntime `quantization/quant_utils.py` (int8, uint8 per tensor), MLAS blockwise
quantization (integers in blocks), `blockwise_quant_block_bnb4.h` (nf4, fp4), the OCP Microscaling
Formats specification 1.0 (mxfp4) and nvidia-modelopt 0.47 (nvfp4), which onnxruntime has no
quantizers for. `tests` at the bottom compare with onnxruntime itself.
"""

from dataclasses import dataclass

import ml_dtypes
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


E2M1_POSITIVE = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
E2M1_PIVOTS = (E2M1_POSITIVE[1:] + E2M1_POSITIVE[:-1]) / 2
E2M1_PIVOTS[1::2] = np.nextafter(E2M1_PIVOTS[1::2], np.float32(0))  # ties go to even codes


@dataclass(frozen=True)
class Scheme:
    """Ascending `levels` and the `boundaries` between them, both in units of the scale.

    bits: of a code. block: weights in a group, None for all of a row (flat: of the tensor). flat:
    groups ignore where rows end. top: how far a group's weights reach, in units of the scale.
    """

    bits: int
    levels: np.ndarray
    boundaries: np.ndarray
    block: int | None
    flat: bool
    top: float

    def scale(self, groups):
        """One float32 scale per group `[G, 1]`: the unit of `levels` and `boundaries`."""
        raise NotImplementedError

    def nearest(self, groups, scale):
        """Positions in `levels` `[G, B]`."""
        raise NotImplementedError

    def ends(self, groups, scale):
        """Where the weights of a group may be while the scale stays: `low, high`, each `[G, 1]`."""
        reach = self.top * np.abs(scale.astype(np.float64))
        return -reach, reach

    def frozen(self, groups):
        """Which weights set the scale `[G, B]`."""
        return np.abs(groups) == np.abs(groups).max(1, keepdims=True)

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

    def encode(self, rows):
        """Codes (positions in `levels`) `[N, K]`, and the scales `[G, 1]`."""
        groups = self.group(np.ascontiguousarray(rows, np.float32))
        scale = self.scale(groups)
        return self.ungroup(self.nearest(groups, scale).astype(np.int16), rows.shape), scale

    def decode(self, codes, scale):
        """The float32 weights that codes stand for."""
        return self.ungroup(self.levels[self.group(codes)] * scale, codes.shape)

    def quantize(self, rows):
        """`decode(encode(rows))`."""
        return self.decode(*self.encode(rows))

    def cells(self, rows):
        """The interval in which every weight keeps its code while the scale stays.

        Returns `low, high, frozen`, each `[N, K]`: cells of the outermost levels end where the
        scale would change, and `frozen` marks the weights that set it.
        """
        codes, scale = self.encode(rows)
        groups = self.group(rows.astype(np.float64))
        edges = np.concatenate([[-self.top], self.boundaries.astype(np.float64), [self.top]])
        at = self.group(codes).astype(int)
        one, other = edges[at] * scale, edges[at + 1] * scale
        low, high = self.ends(groups, scale)
        parts = (
            np.maximum(np.minimum(one, other), low),
            np.minimum(np.maximum(one, other), high),
            self.frozen(groups),
        )
        return tuple(self.ungroup(part, rows.shape) for part in parts)


class Symmetric(Scheme):
    """scale = absmax / the highest level."""

    def scale(self, groups):
        largest = np.abs(groups).max(1, keepdims=True)
        scale = (2 * largest.astype(np.float64) / (2 * self.top)).astype(np.float32)
        return np.where(scale == 0, np.float32(1), scale)

    def nearest(self, groups, scale):
        return np.rint(groups / scale) - self.levels[0]


class SignedExtreme(Scheme):
    """The weight of the largest magnitude gets the lowest level; the scale may be negative."""

    def scale(self, groups):
        at = np.abs(groups).argmax(1)[:, None]
        return np.take_along_axis(groups, at, 1) / self.levels[0]

    def nearest(self, groups, scale):
        codes = np.floor(groups * _inverse(scale) - self.levels[0] + np.float32(0.5))
        return np.clip(codes, 0, len(self.levels) - 1)


class MinMax(Scheme):
    """The range of a group, widened to include 0, is that of the codes.

    Each group has a zero point. Levels are codes minus zero points, so there are more levels than
    codes. In float32, as MLAS has it.
    """

    @property
    def steps(self):
        """From the lowest to the highest code."""
        return (1 << self.bits) - 1

    def ends(self, groups, scale):
        return groups.min(1, keepdims=True).clip(max=0), groups.max(1, keepdims=True).clip(min=0)

    def frozen(self, groups):
        low, high = self.ends(groups, None)
        return (groups == low) | (groups == high)

    def scale(self, groups):
        low, high = self.ends(groups, None)
        return (high - low) / np.float32(self.steps)

    def zero(self, groups):
        """The code that stands for 0, per group `[G, 1]`."""
        scale = self.scale(groups)
        place = np.divide(-self.ends(groups, None)[0], scale, where=scale != 0, out=0 * scale)
        return np.floor(place + np.float32(0.5))

    def nearest(self, groups, scale):
        zero = self.zero(groups)
        codes = np.floor(groups * _inverse(scale) + zero + np.float32(0.5))
        return np.clip(codes, 0, self.steps) - zero + self.steps


class ExactMinMax(MinMax):
    """The same in float64, rounded half to even, as quant_utils has it."""

    def scale(self, groups):
        low, high = self.ends(groups.astype(np.float64), None)
        scale = ((high - low) / self.steps).astype(np.float32)
        return np.where(scale == 0, np.float32(1), scale)

    def zero(self, groups):
        low, high = self.ends(groups.astype(np.float64), None)
        exact = (high - low) / self.steps
        return np.rint(np.divide(-low, exact, where=exact != 0, out=0 * exact))

    def nearest(self, groups, scale):
        zero = self.zero(groups)
        return np.clip(np.rint(groups / scale) + zero, 0, self.steps) - zero + self.steps


class Codebook(Scheme):
    """scale = absmax."""

    def scale(self, groups):
        return np.abs(groups).max(1, keepdims=True)

    def nearest(self, groups, scale):
        return np.searchsorted(self.boundaries, groups * _inverse(scale), side="left")


class SignAndSize(Codebook):
    """A codebook whose levels come in pairs of opposite sign."""

    def steps(self, groups, scale):
        """The weights in units of the scale."""
        return groups * _inverse(scale)

    def nearest(self, groups, scale):
        x, middle = self.steps(groups, scale), len(self.levels) // 2
        size = np.searchsorted(self.boundaries[middle:], np.abs(x), side="left")
        return np.where(x < 0, middle - size, middle + size)


class Microscaled(SignAndSize):
    """The scale is a power of two: the extreme lies in 4 to 8, and the highest level is 6."""

    def scale(self, groups):
        _, exponent = np.frexp(super().scale(groups))
        return np.ldexp(np.float32(1), exponent - 3)


class TwiceScaled(SignAndSize):
    """Scales are floats of 8 bits, of which the tensor's extreme gets the largest, 448."""

    def scale(self, groups):
        largest = super().scale(groups)
        unit = largest.max() / np.float32(6 * 448) or np.float32(1)
        exact = np.clip(largest / (np.float32(6) * unit), np.float32(2.0**-9), np.float32(448))
        exact[largest == 0] = 1
        return exact.astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * unit

    def steps(self, groups, scale):
        return groups / scale

    def ends(self, groups, scale):
        reach = np.abs(groups).max(1, keepdims=True)
        return -reach, reach


def _inverse(scale):
    return np.divide(1, scale, where=scale != 0, out=np.zeros_like(scale))


def _integer(rule, bits, low, high, block, flat=False):
    levels = np.arange(low, high + 1, dtype=np.float32)
    return rule(bits, levels, levels[:-1] + np.float32(0.5), block, flat, float(-low))


def _mirrored(rule, levels, pivots, block, flat, top):
    levels = np.concatenate([-levels[:0:-1], levels])
    return rule(4, levels, np.concatenate([-pivots[::-1], pivots]), block, flat, top)


SCHEMES = {
    "int8": _integer(Symmetric, 8, -127, 127, None),
    "int8_tensor": _integer(Symmetric, 8, -127, 127, None, flat=True),
    "int4": _integer(SignedExtreme, 4, -8, 7, 32),
    "nf4": Codebook(4, NF4_LEVELS, NF4_PIVOTS, 64, True, 1.0),
    "fp4": _mirrored(SignAndSize, FP4_POSITIVE, FP4_PIVOTS, 64, True, 1.0),
    "int8_g32": _integer(SignedExtreme, 8, -128, 127, 32),
    "uint8_tensor": _integer(ExactMinMax, 8, -255, 255, None, flat=True),
    "int4_g128": _integer(SignedExtreme, 4, -8, 7, 128),
    "uint4_g128": _integer(MinMax, 4, -15, 15, 128),
    "mxfp4": _mirrored(Microscaled, E2M1_POSITIVE, E2M1_PIVOTS, 32, False, 8.0),
    "nvfp4": _mirrored(TwiceScaled, E2M1_POSITIVE, E2M1_PIVOTS, 16, False, 8.0),
}
