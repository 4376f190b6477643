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
_step = numba.njit(scalar.step)
_fed = numba.njit(scalar.fed)


@numba.njit
def _span(index, cols, block):
    """First and one-past-last position of block number `index`."""
    per_row = (cols + block - 1) // block
    row = index // per_row
    start = row * cols + (index % per_row) * block
    return start, min(start + block, (row + 1) * cols)


@numba.njit
def _block_of(i, cols, block):
    """Number of the block that weight `i` belongs to."""
    per_row = (cols + block - 1) // block
    return (i // cols) * per_row + (i % cols) // block


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
def cross_affine(weights, cols, block, scales, codes, wanted):
    """Move every weight whose code is not the wanted one just across the wanted cell's edge."""
    for b in numba.prange(scales.size):
        start, stop = _span(b, cols, block)
        for i in range(start, stop):
            if wanted[i] != codes[i]:
                direction = np.float32(1.0 if wanted[i] > codes[i] else -1.0)
                edge = np.float32(wanted[i]) - direction * scalar.HALF
                weights[i] = _just_past(edge, direction) * scales[b]


@_kernel
def feed_affine(
    weights, cols, block, operands, scales, absmax, rule, low, high,
    length, carried, factors, order, first, key, limit, codes, errors,
):  # fmt: skip
    """Draw the codes of one panel of columns; see `flip.feedback.draw`."""
    rows = len(errors)
    width = factors.shape[1]
    for row in numba.prange(rows):
        group = row // (rows // factors.shape[0])
        weave = factors[group]
        for column in range(width):
            i = row * length + order[group, column]
            b = _block_of(i, cols, block)
            free = abs(weights[i]) < absmax[b]
            target = weights[i]
            if free:
                target += _fed(carried[row, column], errors[row, first:], weave[column], column)
            position = _affine_position(target, operands[b], rule)
            code = _affine_code(position, rule, low, high)
            if free:
                offset = _affine_offset(position, code, low, high)
                code += _step(offset, limit, _uniform(key, np.uint64(i)))
            codes[i] = code
            errors[row, first + column] = weights[i] - np.float32(code) * scales[b]


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
def cross_codebook(weights, cols, block, scales, pivots, codes, wanted):
    """Move every weight whose code is not the wanted one just across the wanted cell's edge."""
    for b in numba.prange(scales.size):
        start, stop = _span(b, cols, block)
        for i in range(start, stop):
            if wanted[i] > codes[i]:
                weights[i] = _just_past(pivots[wanted[i] - 1], scalar.ONE) * scales[b]
            elif wanted[i] < codes[i]:
                weights[i] = _just_past(pivots[wanted[i]], -scalar.ONE) * scales[b]


@_kernel
def feed_codebook(
    weights, cols, block, operands, scales, absmax, pivots, levels,
    length, carried, factors, order, first, key, limit, codes, errors,
):  # fmt: skip
    """Draw the codes of one panel of columns; see `flip.feedback.draw`."""
    rows = len(errors)
    width = factors.shape[1]
    for row in numba.prange(rows):
        group = row // (rows // factors.shape[0])
        weave = factors[group]
        for column in range(width):
            i = row * length + order[group, column]
            b = _block_of(i, cols, block)
            free = abs(weights[i]) < absmax[b]
            target = weights[i]
            if free:
                target += _fed(carried[row, column], errors[row, first:], weave[column], column)
            position = target * operands[b]
            code = _codebook_code(position, pivots)
            if free:
                offset = _codebook_offset(position, code, levels)
                code += _step(offset, limit, _uniform(key, np.uint64(i)))
            codes[i] = code
            errors[row, first + column] = weights[i] - levels[code] * scales[b]


@_kernel
def draw(offsets, key, limit, flips):
    """Which weights cross: number i with probability |offset|, where that is above `limit`."""
    for i in numba.prange(offsets.size):
        flips[i] = _step(offsets[i], limit, _uniform(key, np.uint64(i))) != 0
