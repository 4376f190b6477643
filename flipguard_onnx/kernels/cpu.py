"""The kernels on the CPU: njit loops over `scalar`, the blocks shared out among the threads.

A tensor arrives as a flat float32 array of rows of `cols` weights; every row is cut into blocks of
`block` weights, the last one possibly shorter. Per-block arguments are flat, in the same order.
"""

import numba
import numpy as np

from . import scalar

_kernel = numba.njit(parallel=True, cache=True)

_affine_position = numba.njit(scalar.affine_position)
_affine_code = numba.njit(scalar.affine_code)
_affine_offset = numba.njit(scalar.affine_offset)
_codebook_code = numba.njit(scalar.codebook_code)
_codebook_offset = numba.njit(scalar.codebook_offset)
_just_past = numba.njit(scalar.just_past)
_uniform = numba.njit(scalar.uniform)


@numba.njit
def _span(index, cols, block):
    """First and one-past-last position of block number `index`."""
    per_row = (cols + block - 1) // block
    row = index // per_row
    start = row * cols + (index % per_row) * block
    return start, min(start + block, (row + 1) * cols)


@_kernel
def extremes(weights, cols, block, lowest, highest):
    """Smallest and largest weight of every block."""
    for b in numba.prange(lowest.size):
        start, stop = _span(b, cols, block)
        low = high = weights[start]
        for i in range(start, stop):
            low = min(low, weights[i])
            high = max(high, weights[i])
        lowest[b] = low
        highest[b] = high


@_kernel
def encode_affine(weights, cols, block, operands, rule, low, high, codes):
    """Codes of all weights under the given scales (or reciprocals)."""
    for b in numba.prange(operands.size):
        start, stop = _span(b, cols, block)
        for i in range(start, stop):
            position = _affine_position(weights[i], operands[b], rule)
            codes[i] = _affine_code(position, rule, low, high)


@_kernel
def analyze_affine(weights, cols, block, operands, absmax, rule, low, high, codes, offsets):
    """Codes and offsets; weights at the block's absmax set the scale, so their offset is 0."""
    for b in numba.prange(operands.size):
        start, stop = _span(b, cols, block)
        for i in range(start, stop):
            position = _affine_position(weights[i], operands[b], rule)
            code = _affine_code(position, rule, low, high)
            codes[i] = code
            free = abs(weights[i]) < absmax[b]
            offsets[i] = _affine_offset(position, code, low, high) if free else scalar.ZERO


@_kernel
def cross_affine(weights, cols, block, scales, codes, offsets, flips):
    """Move every flipped weight just past its nearest boundary, in place."""
    for b in numba.prange(scales.size):
        start, stop = _span(b, cols, block)
        for i in range(start, stop):
            if flips[i]:
                half = scalar.HALF if offsets[i] > scalar.ZERO else -scalar.HALF
                target = _just_past(np.float32(codes[i]) + half, offsets[i])
                weights[i] = target * scales[b]


@_kernel
def encode_codebook(weights, cols, block, operands, pivots, codes):
    """Level indices of all weights; `operands` are the reciprocals of the block maxima."""
    for b in numba.prange(operands.size):
        start, stop = _span(b, cols, block)
        for i in range(start, stop):
            codes[i] = _codebook_code(weights[i] * operands[b], pivots)


@_kernel
def analyze_codebook(weights, cols, block, operands, absmax, pivots, levels, codes, offsets):
    """Level indices and offsets; weights at the block's absmax set the scale: offset 0."""
    for b in numba.prange(operands.size):
        start, stop = _span(b, cols, block)
        for i in range(start, stop):
            position = weights[i] * operands[b]
            code = _codebook_code(position, pivots)
            codes[i] = code
            free = abs(weights[i]) < absmax[b]
            offsets[i] = _codebook_offset(position, code, levels) if free else scalar.ZERO


@_kernel
def cross_codebook(weights, cols, block, scales, pivots, codes, offsets, flips):
    """Move every flipped weight just past the pivot on its offset's side, in place."""
    for b in numba.prange(scales.size):
        start, stop = _span(b, cols, block)
        for i in range(start, stop):
            if flips[i]:
                pivot = pivots[codes[i]] if offsets[i] > scalar.ZERO else pivots[codes[i] - 1]
                weights[i] = _just_past(pivot, offsets[i]) * scales[b]


@_kernel
def draw(offsets, key, limit, flips):
    """Flip weight i with probability |offset|, where that exceeds `limit`; stream `key`."""
    for i in numba.prange(offsets.size):
        chance = abs(offsets[i])
        flips[i] = chance > limit and _uniform(key, np.uint64(i)) < chance
