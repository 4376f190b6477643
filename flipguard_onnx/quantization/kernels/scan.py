"""The kernels of a scan, on the CPU: where weights stand, on one grid and its placebos.

Arguments as in `cpu`, but that weights are float32. Sums do not depend on the number of threads.
"""

from functools import cache

import numba
import numpy as np

from . import scalar
from .cpu import PIECE, _inline, _kernel, _margins, _pieces, _share, _span

CELLS = 1024

ONE, TWO = np.float32(1.0), np.float32(2.0)

_position = _inline(scalar.position)

_error = _inline(scalar.error)


@cache
def _segments(values, pivots):
    """The distance to the boundary as a function of the position, which is linear in segments.

    values, pivots: the bytes of a codebook's; none for integers, which need no segments.

    Their ends (levels and pivots, ascending), intercepts and slopes, and for each of CELLS equal
    cells of [-1, 1] the segment in which it begins. No cell has more than one end inside: the
    closest two, 0 and fp4's first pivot, are 0.0026 apart.
    """
    values, pivots = (np.frombuffer(table, np.float32) for table in (values, pivots))
    lowest, highest = np.float32(-1), np.float32(1)
    levels = scalar.Levels(scalar.COUNT_PIVOTS, lowest, highest, values, pivots, np.diff(values))
    ends = np.sort(np.concatenate([pivots, values]))
    intercepts, slopes = np.zeros((2, ends.size + 1), np.float32)
    for segment in range(1, ends.size):
        low, high = ends[segment - 1 : segment + 1].astype(np.float64)
        if high - low < 1e-6:  # between fp4's two zeros
            continue
        first, last = low + (high - low) / 4, high - (high - low) / 4
        near, far = (_distance(np.float32(place), levels) for place in (first, last))
        slopes[segment] = (far - near) / (last - first)
        intercepts[segment] = near - first * (far - near) / (last - first)
    cells = np.linspace(-1, 1, CELLS, endpoint=False, dtype=np.float32)
    return ends, intercepts, slopes, np.searchsorted(ends, cells, side="right").astype(np.int32)


def _distance(position, levels):
    code = scalar.code(position, levels.rule, levels)
    return 1.0 - 2.0 * abs(float(scalar.offset(position, code, levels.rule, levels)))


@_inline
def _bins(rule, positions, factor, segments, last, bins):
    """Number of the bin, 0 to `last`, of every position times the factor."""
    ends, intercepts, slopes, starts = segments
    scale = np.float32(last + 1)
    for i in range(positions.size):
        moved = positions[i] * factor
        if rule == scalar.COUNT_PIVOTS:
            segment = starts[np.int32((moved + ONE) * np.float32(CELLS / 2))]
            segment += np.int32(moved > ends[segment])
            distance = intercepts[segment] + slopes[segment] * moved
        else:
            distance = ONE - TWO * abs(moved - np.rint(moved))
        bins[i] = max(np.int32(0), min(np.int32(distance * scale), np.int32(last)))


def survey(judged, cut, operands, absmax, levels, limit, factors, counts):
    """Count weights by their distance to the nearest decision boundary, from 0 to 1 half-gap.

    judged: float32 [n]; those that are 0, or not below `limit` times their block's largest
    magnitude, are not counted. factors: float32 [grids, columns]; positions in block b are
    multiplied by number b of these, round and round: 1 in the grid itself, others in its placebos.
    counts: int32 [runs, grids, bins], one run after the other for every thread.
    """
    segments = _segments(levels.values.tobytes(), levels.pivots.tobytes())
    _survey(judged, cut, operands, absmax, levels, limit, factors, segments, counts)


@_kernel
def _survey(judged, cut, operands, absmax, levels, limit, factors, segments, counts):
    each, pieces, _ = _pieces(judged.size, cut)
    runs, grids, width = counts.shape
    for run in numba.prange(runs):
        kept = np.empty(PIECE, np.float32)
        bins = np.empty(PIECE, np.int32)
        for piece in range(pieces * run // runs, pieces * (run + 1) // runs):
            b, start, stop = _span(piece, cut, each)
            below = limit * absmax[b]
            count = 0
            for weight in judged[start:stop]:
                kept[count] = _position(weight, operands[b], levels.rule, levels)
                count += (weight != 0) & (abs(weight) < below)
            for grid in range(grids):
                given = kept[:count], factors[grid, b % factors.shape[1]], segments, width - 1, bins
                if levels.rule == scalar.COUNT_PIVOTS:
                    _bins(scalar.COUNT_PIVOTS, *given)
                else:
                    _bins(scalar.DIVIDE_HALF_EVEN, *given)
                into = counts[run, grid]
                for i in range(count):
                    into[bins[i]] += 1


@_inline
def _losses(rule, values, codes, scale, levels, errors):
    for i in range(values.size):
        errors[i] = abs(_error(values[i], codes[i], scale, rule, levels))


@numba.njit(forceinline=True, fastmath={"reassoc"})
def _sum(values):
    """In an order that depends on the processor, so that it is a sum of vectors."""
    total = 0.0
    for i in range(values.size):
        total += values[i]
    return total


@_kernel
def account(weights, cut, operands, scales, absmax, levels, limit, sums):
    """Add up rounding errors, where weights whose offset is above `limit` are drawn.

    sums: float64 [5], over all weights: how many are not 0; how many lose more than half of their
    magnitude; sum |e|; the part of it that no draw moves; sum Var e.
    """
    each, pieces, share = _pieces(weights.size, cut)
    shares = (pieces + share - 1) // share
    parts = np.empty((shares, 5), np.float64)
    for s in numba.prange(shares):
        own, start, stop = _share(s, share, pieces, cut, each)
        values = weights[start:stop]
        codes, offsets = np.empty(values.size, np.int8), np.empty_like(values)
        _margins(values, start, own, cut, each, operands, absmax, levels, codes, offsets)
        errors, variances = np.empty(values.size, np.float64), np.empty(values.size, np.float64)
        for piece in range(own[0], own[1]):
            b, first, last = _span(piece, cut, each)
            part = slice(first - start, last - start)
            given = values[part], codes[part], scales[b], levels, errors[part]
            if levels.rule == scalar.COUNT_PIVOTS:
                _losses(scalar.COUNT_PIVOTS, *given)
            else:
                _losses(scalar.DIVIDE_HALF_EVEN, *given)
        used, lost = 0, 0
        for i in range(values.size):
            used += values[i] != 0
            lost += errors[i] > np.float64(abs(values[i])) / 2
        total = _sum(errors)
        for i in range(values.size):
            error, chance = errors[i], np.float64(abs(offsets[i]))
            drawn = chance > limit
            variances[i] = error * (error / chance - error) if drawn else 0.0
            errors[i] = 0.0 if drawn else error
        stuck, variance = _sum(errors), _sum(variances)
        parts[s, 0], parts[s, 1] = used, lost
        parts[s, 2], parts[s, 3], parts[s, 4] = total, stuck, variance
    for column in range(5):  # plain loops: an array expression would wake all threads each time
        total = 0.0
        for s in range(shares):
            total += parts[s, column]
        sums[column] = total


@_kernel
def largest_two(weights, cut, first, second):
    """The two largest magnitudes of every block."""
    cols, block = cut
    per_row = (cols + block - 1) // block
    for b in numba.prange(first.size):
        start = (b // per_row) * cols + (b % per_row) * block
        stop = min(start + block, (b // per_row + 1) * cols)
        top = runner_up = scalar.ZERO
        for weight in weights[start:stop]:
            magnitude = abs(weight)
            runner_up = max(runner_up, min(top, magnitude))
            top = max(top, magnitude)
        first[b] = top
        second[b] = runner_up
