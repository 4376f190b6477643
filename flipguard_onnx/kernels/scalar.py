"""Every formula of the kernels, once: plain functions of float32 scalars.

`cpu` compiles them with numba.njit, `cuda` with cuda.jit(device=True). All constants are float32:
a bare Python literal would make numba compute in float64 and the two devices disagree.

Positions are weights in units of the grid: `weight / scale` for affine grids, `weight / absmax`
for codebooks. An offset is the signed distance from a weight to its nearest level, as a fraction
of the gap to the neighbouring level on that side: 0 on the level, about 0.5 on the boundary.
"""

import numpy as np

DIVIDE_HALF_EVEN = 0  # onnxruntime's int8: float32 division, numpy.round
MULTIPLY_HALF_AWAY = 1  # onnxruntime's 4-bit QDQ: multiply by the reciprocal, C roundf

ZERO = np.float32(0.0)
HALF = np.float32(0.5)
ONE = np.float32(1.0)
ROUND_TO_EVEN = np.float32(12582912.0)  # 1.5 * 2**23: adding it drops the fraction, half to even
EPSILON = np.float32(1e-5)  # how far past a boundary a flipped weight is put, in grid units
RELATIVE_EPSILON = np.float32(2.0**-19)  # ... and at least this share of the boundary's position
UNIFORM = np.float32(2.0**-24)

# SplitMix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number generators", 2014)
GAMMA = np.uint64(0x9E3779B97F4A7C15)
MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
MIX_2 = np.uint64(0x94D049BB133111EB)
SHIFT_30, SHIFT_27, SHIFT_31, SHIFT_40 = (np.uint64(n) for n in (30, 27, 31, 40))


def affine_position(weight, operand, rule):
    """Weight in units of the scale; `operand` is the scale (divide) or its reciprocal."""
    if rule == DIVIDE_HALF_EVEN:
        return weight / operand
    return weight * operand


def affine_code(position, rule, lowest, highest):
    """Nearest integer in [lowest, highest]; NaN (0 times an infinite reciprocal) gives lowest."""
    if not position > lowest:
        return np.int32(lowest)
    if position > highest:
        return np.int32(highest)
    if rule == DIVIDE_HALF_EVEN:
        return np.int32((position + ROUND_TO_EVEN) - ROUND_TO_EVEN)
    magnitude = abs(position)
    whole = np.int32(magnitude)
    if magnitude - np.float32(whole) >= HALF:
        whole += np.int32(1)
    return whole if position > ZERO else -whole


def affine_offset(position, code, lowest, highest):
    """Signed distance to the level in gaps; 0 where there is no neighbour on that side."""
    offset = position - np.float32(code)
    if offset > ZERO:
        return offset if code < highest else ZERO
    if offset < ZERO:
        return offset if code > lowest else ZERO
    return ZERO


def codebook_code(position, pivots):
    """Index of the level: how many of the 15 ascending pivots lie strictly below the position."""
    code = np.int32(0)
    for i in range(15):
        code += np.int32(position > pivots[i])
    return code


def codebook_offset(position, code, levels):
    """Signed distance to the level as a share of the gap to the neighbour on that side."""
    distance = position - levels[code]
    if distance > ZERO and code < 15:
        return distance / (levels[code + 1] - levels[code])
    if distance < ZERO and code > 0:
        return distance / (levels[code] - levels[code - 1])
    return ZERO


def just_past(boundary, offset):
    """Grid position on the other side of the boundary that lies on the offset's side."""
    step = max(EPSILON, abs(boundary) * RELATIVE_EPSILON)
    return boundary + step if offset > ZERO else boundary - step


def uniform(key, index):
    """Number `index` of the stream `key`, uniform on [0, 1) in steps of 2**-24."""
    z = key + (index + np.uint64(1)) * GAMMA
    z = (z ^ (z >> SHIFT_30)) * MIX_1
    z = (z ^ (z >> SHIFT_27)) * MIX_2
    z = z ^ (z >> SHIFT_31)
    return np.float32(z >> SHIFT_40) * UNIFORM


def step(offset, limit, noise):
    """-1, 0 or 1: to the neighbouring level with probability |offset|, where above `limit`."""
    chance = abs(offset)
    if chance > limit and noise < chance:
        return np.int32(1) if offset > ZERO else np.int32(-1)
    return np.int32(0)


def fed(carried, errors, factors, count):
    """What the rounding errors of the columns before this one ask of it.

    carried: the share of earlier panels; errors, factors: of the `count` columns of this panel.
    Summed in float64, where the products are exact, so that a fused multiply-add changes nothing.
    """
    total = np.float64(carried)
    for j in range(count):
        total += np.float64(errors[j]) * np.float64(factors[j])
    return np.float32(total)
