"""The kernels of a scan, on the CPU: one pass over a tensor for one grid and its placebos.

Arguments as in `cpu`. The weights are shared out among the threads in as many runs as `counts` has
rows, and every run adds up on its own, so that sums do not depend on the number of threads.

judged: float32 [n], the weights that are counted; 0 where one is not.
factors: float32 [grids, columns]; positions in block b are multiplied by number b of these, round
and round: 1 in the grid itself, others in its placebos.
counts: int32 [runs, grids, bins], judged weights by their distance to the nearest decision
boundary, from 0 to 1 half-gap; only those whose magnitude is below `limit` times the block's
largest.
sums: float64 [runs, 5], over all `weights` other than 0, on the grid itself: how many; how many
lose more than half of their magnitude; sum |e|; the part of it that no draw can move; sum Var e.
"""

import numba
import numpy as np

from . import scalar

CELLS = 1024
ONE = np.float32(1.0)

_kernel = numba.njit(parallel=True, cache=True, error_model="numpy")

_position = numba.njit(scalar.position)
_code = numba.njit(scalar.code)
_offset = numba.njit(scalar.offset)
_error = numba.njit(scalar.error)


@numba.njit
def _block_span(i, cut):
    """Number of the block that weight `i` belongs to, and one past the block's last weight."""
    cols, block = cut
    row = i // cols
    inside = (i - row * cols) // block
    stop = min((inside + 1) * block, cols) + row * cols
    return row * ((cols + block - 1) // block) + inside, stop


@numba.njit
def _pieces(levels):
    """The distance to the boundary as a function of the position, which is linear in pieces.

    Their ends (levels and pivots, ascending), intercepts and slopes, and for each of CELLS equal
    cells of [-1, 1] the piece in which it begins. No cell has more than one end inside: the
    closest two, 0 and fp4's first pivot, are 0.0026 apart.
    """
    ends = np.sort(np.concatenate((levels.pivots, levels.values)))
    intercepts = np.zeros(ends.size + 1, np.float32)
    slopes = np.zeros(ends.size + 1, np.float32)
    for piece in range(1, ends.size):
        low, high = np.float64(ends[piece - 1]), np.float64(ends[piece])
        if high - low < 1e-6:  # between fp4's two zeros
            continue
        first, last = low + (high - low) / 4, high - (high - low) / 4
        near = _distance(np.float32(first), levels)
        far = _distance(np.float32(last), levels)
        slopes[piece] = (far - near) / (last - first)
        intercepts[piece] = near - first * (far - near) / (last - first)
    starts = np.empty(CELLS, np.int32)
    for cell in range(CELLS):
        starts[cell] = np.searchsorted(ends, np.float32(2 * cell / CELLS - 1), side="right")
    return ends, intercepts, slopes, starts


@numba.njit
def _distance(position, levels):
    offset = _offset(position, _code(position, levels.rule, levels), levels.rule, levels)
    return 1.0 - 2.0 * abs(np.float64(offset))


@numba.njit
def _bin(distance, bins):
    return max(np.int32(0), min(np.int32(distance * np.float32(bins)), np.int32(bins - 1)))


@numba.njit
def _account(sums, weight, error, gap, free):
    """Add one weight, whose nearest level is `error` away and the next one a `gap` from that."""
    sums[0] += 1.0
    if error > abs(weight) / 2:
        sums[1] += 1.0
    sums[2] += error
    if free:
        sums[4] += error * (gap - error)
    else:
        sums[3] += error


@_kernel
def survey(weights, cut, operands, scales, absmax, levels, judged, limit, factors, counts, sums):
    rule = levels.rule
    ends, intercepts, slopes, starts = _pieces(levels)
    for run in numba.prange(counts.shape[0]):
        i = weights.size * run // counts.shape[0]
        stop = weights.size * (run + 1) // counts.shape[0]
        while i < stop:
            b, end = _block_span(i, cut)
            for j in range(i, min(end, stop)):
                weight = weights[j]
                if weight == 0:
                    continue
                position = _position(weight, operands[b], rule, levels)
                code = _code(position, rule, levels)
                offset = abs(_offset(position, code, rule, levels))
                error = abs(np.float64(_error(weight, code, scales[b], rule, levels)))
                free = offset > 0 and abs(weight) < absmax[b]
                _account(sums[run], weight, error, error / offset if free else 0.0, free)
                if judged[j] != 0 and abs(judged[j]) < limit * absmax[b]:
                    position = _position(judged[j], operands[b], rule, levels)
                    for f in range(factors.shape[0]):
                        moved = position * factors[f, b % factors.shape[1]]
                        if rule == scalar.COUNT_PIVOTS:
                            piece = starts[np.int32((moved + ONE) * np.float32(CELLS / 2))]
                            piece += np.int32(moved > ends[piece])
                            distance = intercepts[piece] + slopes[piece] * moved
                        else:
                            distance = ONE - 2 * abs(moved - np.rint(moved))
                        counts[run, f, _bin(distance, counts.shape[2])] += 1
            i = end


@_kernel
def largest_two(weights, cut, first, second):
    """The two largest magnitudes of every block."""
    cols, block = cut
    for b in numba.prange(first.size):
        per_row = (cols + block - 1) // block
        start = (b // per_row) * cols + (b % per_row) * block
        stop = min(start + block, (b // per_row + 1) * cols)
        top = runner_up = scalar.ZERO
        for i in range(start, stop):
            magnitude = abs(weights[i])
            runner_up = max(runner_up, min(top, magnitude))
            top = max(top, magnitude)
        first[b] = top
        second[b] = runner_up
