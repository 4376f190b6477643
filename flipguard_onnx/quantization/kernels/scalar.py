"""Every formula of the kernels, once: plain functions of float32 scalars.

`cpu` compiles them with numba.njit, `cuda` with cuda.jit(device=True). All constants are float32:
a bare Python literal would make numba compute in float64 and the two devices disagree.

Weights come as bit patterns of their storage type. Positions are weights in units of the grid:
`weight / scale` for integers, `weight / absmax` for codebooks, clipped to the outermost levels. The
clip also stands between every product and what is subtracted from it, so that no compiler fuses
the two. An offset is the signed distance from a weight to its nearest level, as a fraction of the
gap to the neighbouring level on that side: 0 on the level, about 0.5 on the boundary.

Choices are written as conditional expressions and counted loops, which compile to vectors.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

FLOAT32, FLOAT16, BFLOAT16 = range(3)  # forms: how bit patterns are read

DIVIDE_HALF_EVEN = 0  # onnxruntime's int8: float32 division, numpy.round

MULTIPLY_HALF_AWAY = 1  # onnxruntime's 4-bit QDQ: multiply by the reciprocal, C roundf

MULTIPLY_HALF_UP = 2  # its 2-bit and 8-bit blocks: the same once the lowest level has become 0

FLOAT8 = 3  # ONNX's float8e4m3fn: float32 division, nearest, half to even

COUNT_PIVOTS = 4  # onnxruntime's nf4 and fp4: multiply by the reciprocal, compare

DIVIDE_AND_COUNT = 5  # modelopt's nvfp4: float32 division, compare; from COUNT_PIVOTS on, codebooks


class Levels(NamedTuple):
    """The levels of a grid, in its own units, and how a position is rounded to one.

    rule: one of the six above. lowest, highest: float32, the outermost levels; of integers, their
    codes.
    Codebooks and FLOAT8 only, else empty, all float32. Of codebooks, values [16], ascending; pivots
    [15] between them; gaps [15], from each value to the next. Of FLOAT8 the same of all levels and
    one more at either end; level 0 is the number MIDDLE of the values.
    """

    rule: int
    lowest: np.float32
    highest: np.float32
    values: npt.NDArray[np.float32]
    pivots: npt.NDArray[np.float32]
    gaps: npt.NDArray[np.float32]


ZERO = np.float32(0.0)

HALF = np.float32(0.5)

ROUND_TO_EVEN = np.float32(12582912.0)  # 1.5 * 2**23: adding it drops the fraction, half to even

EPSILON = np.float32(1e-5)  # how far past a boundary a flipped weight is put, in grid units

RELATIVE_EPSILON = np.float32(2.0**-19)  # ... and at least this share of the boundary's position

AT_AN_EDGE = np.float32(0.499)  # of an offset: the weight may stand on a boundary, about 0.5

MIDDLE = np.int32(127)

FLOAT8_NORMAL = np.float32(2.0**-6)  # the smallest number that is not subnormal

FLOAT8_EXPONENT = np.uint32(121 << 23)  # its bits

FLOAT8_SUBNORMALS = np.float32(512.0)  # of them to 1

FLOAT8_FIRST = np.int32(120 << 3)  # what the upper bits of a float32 are before its first normal

FLOAT8_ROUNDS = np.uint32(20 << 23)  # to an exponent: adding that power of two drops the fraction

LAST_BITS = np.uint32(20)  # that a float32 has more

UNIFORM = np.float32(2.0**-24)

REBIAS, UNBIAS = np.float32(2.0**112), np.float32(2.0**-112)  # float32's exponents to float16's

WORD, HALF_WORD = np.uint32(1 << 31), np.uint32(1 << 15)  # sign bits

REST = np.uint32(0x7FFF)

INFINITE, INFINITE_HALF = np.uint32(0x7F800000), np.uint32(0x7C00)

ONE_BIT, MANTISSAS, UPPER = np.uint32(1), np.uint32(13), np.uint32(16)  # shifts between the types

SIGNS, MAGNITUDE = np.int32(31), np.int32(0x7FFFFFFF)

# SplitMix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number generators", 2014)
GAMMA = np.uint64(0x9E3779B97F4A7C15)

MIX_1 = np.uint64(0xBF58476D1CE4E5B9)

MIX_2 = np.uint64(0x94D049BB133111EB)

SHIFT_30, SHIFT_27, SHIFT_31, SHIFT_40 = (np.uint64(n) for n in (30, 27, 31, 40))


def value(bits, form):
    """The float32 that a bit pattern stands for; exact, infinities and NaN included."""
    word = np.uint32(bits)
    if form == FLOAT32:
        return word.view(np.float32)
    if form == BFLOAT16:
        return np.uint32(word << UPPER).view(np.float32)
    magnitude = np.uint32(np.uint32(word & REST) << MANTISSAS)
    scaled = np.float32(magnitude.view(np.float32) * REBIAS)  # normalizes subnormals as well
    special = np.uint32(word & INFINITE_HALF) == INFINITE_HALF
    finite = np.uint32(scaled.view(np.uint32))
    magnitude = np.uint32(magnitude | INFINITE) if special else finite
    return np.uint32(magnitude | np.uint32(np.uint32(word & HALF_WORD) << UPPER)).view(np.float32)


def pattern(number, form):
    """Bit pattern, in a uint32, of one of the two values of the type around a float32."""
    word = np.uint32(np.float32(number).view(np.uint32))
    if form == FLOAT32:
        return word
    if form == BFLOAT16:
        return np.uint32(word >> UPPER)
    scaled = np.float32(abs(number) * UNBIAS)
    magnitude = np.uint32(np.uint32(scaled.view(np.uint32)) >> MANTISSAS)
    return np.uint32(
        min(magnitude, INFINITE_HALF) | np.uint32(np.uint32(word >> UPPER) & HALF_WORD)
    )


def next_pattern(bits, upward, form):
    """Bit pattern, in a uint32, of the next value of the type; as numpy.nextafter."""
    sign = WORD if form == FLOAT32 else HALF_WORD
    zero = np.uint32(bits & ~sign) == 0
    if zero:
        return ONE_BIT if upward else np.uint32(sign | ONE_BIT)
    negative = np.uint32(bits & sign) != 0
    return np.uint32(bits - ONE_BIT) if negative == upward else np.uint32(bits + ONE_BIT)


def ordered(word):
    """int32 that sorts as the float32 whose bit pattern `word` (int32) is; its own inverse."""
    return np.int32(word ^ np.int32(np.int32(word >> SIGNS) & MAGNITUDE))


def is_free(weight, low, high):
    """Whether a weight may move: those that are not between `low` and `high` set the scale."""
    return (low < weight) & (weight < high)


def ends(zero, levels):
    """The outermost levels of a block; `zero` is the code that stands for 0."""
    return levels.lowest - zero, levels.highest - zero


def position(weight, operand, rule, lowest, highest):
    """Weight in units of the grid; `operand` is the scale (divide) or its reciprocal.

    lowest, highest: the outermost levels of the block. NaN (0 times an infinite reciprocal) becomes
    the lowest level.
    """
    divides = (rule == DIVIDE_HALF_EVEN) | (rule == FLOAT8) | (rule == DIVIDE_AND_COUNT)
    exact = weight / operand if divides else weight * operand
    above = exact if exact > lowest else lowest
    inner = above if above < highest else highest
    return (inner - lowest) + lowest if rule == MULTIPLY_HALF_UP else inner


def level(position, rule, lowest, levels):
    """The nearest level: an integer, the number of pivots that lie strictly below, or of FLOAT8 the
    number of levels from 0 on, with the sign of the position."""
    if rule >= COUNT_PIVOTS:
        count = np.int32(0)
        for i in range(15):
            count += np.int32(position > levels.pivots[i])
        return count
    if rule == DIVIDE_HALF_EVEN:
        return np.int32((position + ROUND_TO_EVEN) - ROUND_TO_EVEN)
    if rule == FLOAT8:
        size = np.float32(abs(position))
        exponent = max(np.uint32(np.uint32(size.view(np.uint32)) & INFINITE), FLOAT8_EXPONENT)
        large = np.uint32(exponent + FLOAT8_ROUNDS).view(np.float32)
        rounded = np.float32((size + large) - large)
        upper = np.uint32(np.uint32(rounded.view(np.uint32)) >> LAST_BITS)
        normal = rounded >= FLOAT8_NORMAL
        subnormal = np.int32(rounded * FLOAT8_SUBNORMALS)
        number = np.int32(np.int32(upper) - FLOAT8_FIRST) if normal else subnormal
        return number if position > ZERO else np.int32(-number)
    above = position - lowest if rule == MULTIPLY_HALF_UP else position
    magnitude = abs(above)
    whole = np.int32(magnitude)
    whole = np.int32(whole + np.int32(magnitude - np.float32(whole) >= HALF))
    if rule == MULTIPLY_HALF_UP:
        return np.int32(whole + np.int32(lowest))
    return whole if position > ZERO else np.int32(-whole)


def offset(position, level, rule, levels):
    """Signed distance to the level in gaps to the neighbour on that side; 0 where there is none."""
    if rule == FLOAT8:
        value, near = levels.values[level + MIDDLE], level + MIDDLE
        return (position - value) / levels.gaps[near if position > value else near - 1]
    if rule < COUNT_PIVOTS:
        return position - np.float32(level)
    value, gap = levels.values[0], levels.gaps[0]
    for i in range(14):  # levels.values[level] would need a gather, which is slower
        following, width = levels.values[i + 1], levels.gaps[i + 1]
        value = following if position > levels.pivots[i] else value
        gap = width if position > following else gap
    last = levels.values[15]
    value = last if position > levels.pivots[14] else value
    return (position - value) / gap


def edge(level, wanted, rule, levels):
    """The boundary of the wanted cell on the side of another level, and 1 or -1: the way in."""
    direction = np.float32(1.0 if wanted > level else -1.0)
    if rule >= COUNT_PIVOTS:
        return levels.pivots[wanted - 1 if wanted > level else wanted], direction
    if rule == FLOAT8:
        place = wanted + MIDDLE
        return levels.pivots[place - 1 if wanted > level else place], direction
    return np.float32(wanted) - direction * HALF, direction


def just_past(boundary, direction):
    """Grid position a little further than the boundary."""
    step = max(EPSILON, abs(boundary) * RELATIVE_EPSILON)
    return boundary + step if direction > ZERO else boundary - step


def at_an_edge(offset):
    """Whether a weight is so near to a boundary that it may have to move to keep its code."""
    return abs(offset) > AT_AN_EDGE


def behind(level, wanted, offset):
    """The level whose cell a weight is to leave behind: its own, or that beyond the near edge."""
    beyond = level + np.int32(1) if offset > ZERO else level - np.int32(1)
    return beyond if level == wanted else level


def lands(value, target, upward, low, high):
    """Whether a value of the storage type may stand for the target: not short of it, nor a new
    extreme of its block."""
    short = value < target if upward else value > target
    return not short and low <= value <= high


def state(key, index):
    """State number `index` of the stream `key`; every next one is larger by GAMMA."""
    return key + (index + np.uint64(1)) * GAMMA


def uniform(state):
    """The number that a state yields, uniform on [0, 1) in steps of 2**-24."""
    z = (state ^ (state >> SHIFT_30)) * MIX_1
    z = (z ^ (z >> SHIFT_27)) * MIX_2
    z = z ^ (z >> SHIFT_31)
    return np.float32(np.int32(z >> SHIFT_40)) * UNIFORM


def step(offset, limit, noise):
    """-1, 0 or 1: to the neighbouring level with probability |offset|, where above `limit`."""
    chance = abs(offset)
    crosses = (chance > limit) & (noise < chance)
    side = np.int32(1) if offset > ZERO else np.int32(-1)
    return side if crosses else np.int32(0)


def error(weight, level, scale, rule, levels):
    """Weight - decoded; in float64, where the product is exact and may be fused, rounded once."""
    value = np.float32(level)
    if rule >= COUNT_PIVOTS:
        value = levels.values[level]
    if rule == FLOAT8:
        value = levels.values[level + MIDDLE]
    return np.float32(np.float64(weight) - np.float64(value) * np.float64(scale))


def within_grid(due, position, scale, lowest, highest):
    """What a weight makes up for of the errors before it: at most its distance from the nearer end
    of the grid. Beyond an end there is no level, and the mean of the draw would not be the target.
    """
    room = min(position - lowest, highest - position) * abs(scale)
    return min(max(due, -room), room)


def take_over(total, error, factor):
    """What a later column takes over: `total` from the columns before, plus the share `factor` of
    this one's error; float64.

    The product is exact, so that a fused multiply-add changes nothing.
    """
    return total + np.float64(error) * np.float64(factor)
