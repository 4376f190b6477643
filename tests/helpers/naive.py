"""A slow oracle: quantizers, margins and flips, one weight at a time, in plain Python.

Written from the description of the formats; shares no code with the package, on purpose.
All arithmetic is on np.float32 scalars, which round as the quantizers' C code does.
"""

import bisect
import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

F = np.float32


def c_float(decimals):
    """The float32 nearest to a decimal literal, as C reads it; Python goes through float64."""
    near = F(decimals)
    around = [np.nextafter(near, F(-9)), near, np.nextafter(near, F(9))]
    return min(around, key=lambda x: abs(Fraction(float(x)) - Fraction(decimals)))


NF4 = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453]
NF4 += [-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0]
NF4 += [0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224]
NF4 += [0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]
NF4_PIVOTS = [
    "-0.8480964004993439",
    "-0.6106329262256622",
    "-0.4599952697753906",
    "-0.33967943489551544",
    "-0.23460740596055984",
    "-0.13791173323988914",
    "-0.045525018125772476",
    "0.03979014977812767",
    "0.1202552504837513",
    "0.2035212516784668",
    "0.2920137718319893",
    "0.3893125355243683",
    "0.5016634166240692",
    "0.6427869200706482",
    "0.8614784181118011",
]
NF4_PIVOTS = [c_float(decimals) for decimals in NF4_PIVOTS]
FP4 = [0, 0.00520833333, 2 / 3, 1, 1 / 3, 0.5, 1 / 6, 0.25]  # the magnitude of codes 0 to 7
FP4_PIVOTS = [
    "0.00260417",
    "0.0859375",
    "0.20833333",
    "0.29166667",
    "0.4166667",
    "0.583333",
    "0.8333333",
]
FP4_PIVOTS = [c_float(decimals) for decimals in FP4_PIVOTS]
FP4_ORDER = [0, 1, 6, 7, 4, 5, 2, 3]  # codes by magnitude


@dataclass
class Quantized:
    """One block: the stored codes and scale, and where each weight stands.

    positions: weights in grid units; levels: the level of each weight in the same units;
    neighbours: the next level on the weight's own side, None where there is none.
    """

    scale: np.floating
    codes: list
    positions: list
    levels: list
    neighbours: list
    decoded: list

    def offset(self, i):
        """Share of the gap to the neighbour that weight i has gone: float32, signed."""
        if self.neighbours[i] is None:
            return F(0)
        return (self.positions[i] - self.levels[i]) / abs(self.neighbours[i] - self.levels[i])


def blocks_of(weights, size):
    """The rows of a 2-D array, each cut into blocks; the last may be short."""
    return [row[k : k + size] for row in weights for k in range(0, len(row), size)]


def quantize(scheme, weights, size):
    """Quantized of every block of `weights`, 2-D, in its storage type.

    scheme: a name of BLOCK; what follows a hyphen may be missing there
    """
    block_of = BLOCK.get(scheme) or BLOCK[scheme.split("-")[0]]
    if scheme == "nvfp4":
        absmax = max(abs(F(w)) for w in weights.flat)
        return [nvfp4_block(block, absmax) for block in blocks_of(weights, size)]
    with np.errstate(all="ignore"):
        return [block_of(block) for block in blocks_of(weights, size)]


def rounded(values, scheme, *contracted):
    """A tensor after plain rounding; contracted: the axes that are summed over.

    Each of its output channels has a scale of its own, or one for each block.
    """
    ends = range(-len(contracted), 0)
    moved = np.moveaxis(values, contracted, ends)
    channels = moved.reshape(-1, math.prod(values.shape[axis] for axis in contracted))
    is_codebook = scheme in ("nf4", "fp4")
    rows = channels.reshape(1, -1) if is_codebook else channels
    sizes = {"int8": rows.shape[1], "int4": 32}
    decoded = [block.decoded for block in quantize(scheme, rows, sizes.get(scheme, 64))]
    whole = np.concatenate(decoded).reshape(moved.shape)
    return np.moveaxis(whole, ends, contracted).astype(values.dtype)


def _integers(scale, positions, rounded, low, high):
    """A block on an integer grid; `rounded` are the positions as the quantizer rounds them."""
    levels, neighbours = [], []
    for x, r in zip(positions, rounded, strict=True):
        level = low if math.isnan(r) else min(max(r, low), high)
        side = 1 if x > level else -1
        none = math.isnan(x) or x == level or not low <= level + side <= high
        levels.append(F(level))
        neighbours.append(None if none else F(level + side))
    decoded = [level * F(scale) for level in levels]
    return Quantized(scale, [int(v) for v in levels], positions, levels, neighbours, decoded)


def int8_block(block, divisor=127, ends=(-127, 127)):
    """Symmetric: scale = absmax / divisor in float64, stored in the weights' type; w / scale."""
    absmax = max(abs(float(w)) for w in block)
    scale, too_small = _double_scale(2 * absmax / (2 * divisor), block.dtype)
    positions = [F(w) / F(scale) for w in block]
    # a coarse (float16 subnormal) scale may put the extremes past 127; onnxruntime clips at -128
    if np.rint(F(absmax) / F(scale)) > math.ceil(divisor) and not too_small:
        ends = (-128, 127)
    return _integers(scale, positions, [np.rint(x) for x in positions], *ends)


def uint8_symmetric_block(block):
    """The same for 128 as zero point, or 0 where the scale is given up."""
    scale, too_small = _double_scale(2 * max(abs(float(w)) for w in block) / 255, block.dtype)
    positions = [F(w) / F(scale) for w in block]
    rounded = [np.rint(x) for x in positions]
    return _shifted(scale, positions, rounded, 0 if too_small else 128, 255)


def uint8_block(block, steps=255):
    """Zero point = round(-low / scale), both from float64; rint(w / stored scale) + zero point."""
    low, high = (float(end) for end in _range_with_0(block))
    exact = (high - low) / steps
    scale, too_small = _double_scale(exact, block.dtype)
    zero = 0 if too_small else int(np.rint(-low / exact))
    positions = [F(w) / F(scale) for w in block]
    rounded = _shifted(scale, positions, [np.rint(x) for x in positions], zero, 255)
    return _without_ends(block, rounded)


def int4_block(block):
    """The weight of largest magnitude, sign and all, is -8 scales; w * (1 / stored scale)."""
    scale, positions = _from_extreme(block, -8)
    return _integers(scale, positions, [_roundf(x) for x in positions], -8, 7)


def int8_extreme_block(block, half=128):
    """The same at 8 bits, -128 scales; roundf(w * (1 / stored scale) + 128)."""
    scale, positions = _from_extreme(block, -half)
    return _rounded_from_0(scale, positions, half, 2 * half - 1)


def uint4_block(block):
    """Zero point = roundf(-low / scale) in float32; roundf(w * (1 / stored scale)) + zero point."""
    scale, zero, positions = _float_range(block, 15)
    rounded = _shifted(scale, positions, [_roundf(x) for x in positions], zero, 15)
    return _without_ends(block, rounded)


def uint8_range_block(block, steps=255):
    """The same at 8 bits, but roundf(w * (1 / stored scale) + zero point)."""
    scale, zero, positions = _float_range(block, steps)
    return _without_ends(block, _rounded_from_0(scale, positions, zero, steps))


def _without_ends(block, quantized):
    """The weights that set the scale and the zero point have no neighbours."""
    ends = _range_with_0(block)
    for i, w in enumerate(block):
        if F(w) in ends:
            quantized.neighbours[i] = None
    return quantized


def _range_with_0(block):
    return min([F(0), *map(F, block)]), max([F(0), *map(F, block)])


def _double_scale(exact, dtype):
    """A scale as it is stored, and whether onnxruntime gives up on it and takes 1."""
    scale = dtype.type(exact)
    too_small = scale == 0 if dtype == np.float16 else exact < np.finfo(np.float32).tiny
    return (dtype.type(1) if too_small else scale), too_small


def _from_extreme(block, level):
    extreme = F(0)
    for w in block:
        if abs(F(w)) > abs(extreme) or (abs(F(w)) == abs(extreme) and w < 0):
            extreme = F(w)
    scale = block.dtype.type(extreme / F(level))
    inverse = F(1) / F(scale) if scale != 0 else F(0)
    return scale, [F(w) * inverse for w in block]


def _float_range(block, steps):
    low, high = _range_with_0(block)
    exact = (high - low) / F(steps)
    zero = int(min(max(_roundf(-low / exact), 0), steps)) if exact != 0 else 0
    scale = block.dtype.type(exact)
    inverse = F(1) / F(scale) if scale != 0 else F(0)
    return scale, zero, [F(w) * inverse for w in block]


def _roundf(x):
    """C's roundf: halves away from zero, exactly."""
    whole = math.floor(Fraction(float(abs(x))) + Fraction(1, 2)) if np.isfinite(x) else abs(x)
    return whole if x > 0 else -whole


def _rounded_from_0(scale, positions, zero, steps):
    """A block whose positions are rounded once the lowest level has become 0."""
    rounded = [_roundf(x + F(zero)) - zero for x in positions]
    return _shifted(scale, [(x + F(zero)) - F(zero) for x in positions], rounded, zero, steps)


def _shifted(scale, positions, rounded, zero, steps):
    """A block on an integer grid from -zero to steps - zero; the codes are signed."""
    block = _integers(scale, positions, rounded, -zero, steps - zero)
    block.codes = [code + zero - (steps + 1) // 2 for code in block.codes]
    return block


def nf4_block(block):
    """Code = number of pivots strictly below w * (1 / absmax)."""
    absmax, positions = _normalized(block)
    codes = [sum(bool(x > p) for p in NF4_PIVOTS) for x in positions]
    return _codebook(absmax, codes, positions, [F(NF4[c]) for c in codes], sorted(map(F, NF4)))


def fp4_block(block):
    """Sign bit 8 for negative positions; magnitude by the pivots strictly below |position|."""
    absmax, positions = _normalized(block)
    codes = []
    for x in positions:
        magnitude = FP4_ORDER[sum(bool(abs(x) > p) for p in FP4_PIVOTS)]
        codes.append(magnitude + 8 if x < 0 else magnitude)
    levels = [F(FP4[c % 8]) * (F(-1) if c > 7 else F(1)) for c in codes]
    distinct = sorted({F(v) for v in FP4} | {-F(v) for v in FP4})
    return _codebook(absmax, codes, positions, levels, distinct)


def fp8_block(block):
    """The nearest float8 of w / scale, half to even; scale = absmax / 448 as int8's."""
    absmax = max(abs(float(w)) for w in block)
    scale, _ = _double_scale(absmax / 448, block.dtype)
    positions, numbers = [F(w) / F(scale) for w in block], []
    for x in positions:
        size = min(Fraction(float(abs(x))), 448)
        above = bisect.bisect_left(E4M3, size)
        near = min({max(above - 1, 0), above}, key=lambda k: (abs(E4M3[k] - size), k % 2))
        numbers.append(near if x > 0 else -near)
    levels = [F(E4M3[abs(k)]) * (F(-1) if k < 0 else F(1)) for k in numbers]
    distinct = sorted({F(v) for v in E4M3} | {-F(v) for v in E4M3})
    return _codebook(F(scale), numbers, positions, levels, distinct)


E4M3 = [Fraction(m, 512) for m in range(8)]
E4M3 += [Fraction(8 + m, 8) * Fraction(2) ** e for e in range(-6, 9) for m in range(8)][:-1]


def mxfp4_block(block):
    """The largest power of two that leaves the extreme 4 or more; half to the even code."""
    absmax = max(abs(float(w)) for w in block)
    scale = F(2.0) ** F(max(math.frexp(absmax)[1] - 3, -127) if absmax else -127)
    return _e2m1(block, scale, [abs(F(w)) / scale for w in block], even=True)


def mxfp4_ceil_block(block):
    """2 ** ceil(log2(absmax / 6)) in float32; half to the smaller magnitude."""
    absmax = max(abs(F(w)) for w in block)
    scale = F(2.0) ** F(max(np.ceil(np.log2(absmax / F(6))), -127))
    return _e2m1(block, scale, [abs(F(w)) / scale for w in block], even=False)


def nvfp4_block(block, tensor_absmax):
    """absmax / 6 in units of tensor_absmax / 2688, to the nearest float8e4m3fn from 2^-9 to 448.

    All in float32; zeros have the scale 1, and a tensor of zeros has units of 1. Weights that set
    the scale have no neighbours.
    """
    unit = tensor_absmax / F(2688) or F(1)
    absmax = max(abs(F(w)) for w in block)
    exact = Fraction(float(absmax / (F(6) * unit))) or 1
    near = min(range(1, 127), key=lambda k: (abs(E4M3[k] - exact), k % 2))
    scale = F(float(E4M3[near])) * unit
    quantized = _e2m1(block, scale, [abs(F(w)) / scale for w in block], even=True)
    for i, w in enumerate(block):
        if abs(F(w)) == absmax and exact > E4M3[1]:
            quantized.neighbours[i] = None
    return quantized


E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]


def _e2m1(block, scale, magnitudes, even):
    codes, levels, positions = [], [], []
    for w, exact in zip(block, magnitudes, strict=True):
        x = min(exact, F(6))
        near = min(range(8), key=lambda c: (abs(x - E2M1[c]), c % 2 if even else c))
        codes.append(near + 8 if w < 0 else near)
        levels.append(F(E2M1[near]) if w > 0 else -F(E2M1[near]))
        positions.append(exact if w > 0 else -exact)
    distinct = sorted({F(v) for v in E2M1} | {-F(v) for v in E2M1})
    return _codebook(scale, codes, positions, levels, distinct)


BLOCK = {
    "int8": int8_block,
    "int8-block": int8_extreme_block,
    "uint8": uint8_block,
    "uint8-block": uint8_range_block,
    "uint8-127.5": uint8_symmetric_block,
    "uint8-reduced": lambda block: uint8_block(block, 127),
    "int8-reduced": lambda block: int8_block(block, 64, (-64, 64)),
    "int4": int4_block,
    "int4-7.5": lambda block: int8_block(block, 7.5, (-8, 7)),
    "int4-7": lambda block: int8_block(block, 7, (-8, 7)),
    "uint4": uint4_block,
    "int2": lambda block: int8_extreme_block(block, 2),
    "uint2": lambda block: uint8_range_block(block, 3),
    "nf4": nf4_block,
    "fp4": fp4_block,
    "fp8": fp8_block,
    "mxfp4": mxfp4_block,
    "mxfp4-6": mxfp4_ceil_block,
    "nvfp4": nvfp4_block,
}


def _normalized(block):
    absmax = max((abs(F(w)) for w in block), default=F(0))
    inverse = F(1) / absmax if absmax != 0 else F(0)
    return block.dtype.type(absmax), [F(w) * inverse for w in block]


def _codebook(absmax, codes, positions, levels, distinct):
    neighbours = []
    for x, level in zip(positions, levels, strict=True):
        beyond = [v for v in distinct if (v > level if x > level else v < level)]
        none = math.isnan(x) or x == level or not beyond
        neighbours.append(None if none else (min(beyond) if x > level else max(beyond)))
    decoded = [level * F(absmax) for level in levels]
    return Quantized(absmax, codes, positions, levels, neighbours, decoded)


def topk(block, ratio):
    """Algorithm 1 of the paper on one quantized block: (flipped indices, new positions).

    The share `ratio` with the largest |position - level| goes just across the midpoint between its
    level and the next level on its own side.
    """
    errors = [0.0 if n is None else abs(float(x) - float(v)) for x, v, n in _standing(block)]
    ranked = sorted(range(len(errors)), key=lambda i: -errors[i])
    flipped = [i for i in ranked[: int(ratio * len(errors) + 1e-9)] if errors[i] > 0]
    moved = [float(x) for x in block.positions]
    for i in flipped:
        level, other = float(block.levels[i]), float(block.neighbours[i])
        moved[i] = (level + other) / 2 + math.copysign(1e-5, other - level)
    return sorted(flipped), moved


def chances(block):
    """Probability of each weight's neighbour that makes the expected level its position."""
    return [
        0.0 if n is None else (float(x) - float(v)) / (float(n) - float(v))
        for x, v, n in _standing(block)
    ]


def _standing(block):
    return zip(block.positions, block.levels, block.neighbours, strict=True)
