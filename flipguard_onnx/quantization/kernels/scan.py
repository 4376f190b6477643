"""`protocol.ScanKernels`: where weights stand on one grid and on its placebos. On the CPU only."""

from functools import cache

import numba
import numpy as np

from . import scalar
from .cpu import (
    INLINE,
    PIECE,
    cut_of,
    ends_of,
    error_of,
    inline,
    is_free,
    kernel,
    nth_share,
    piece_span,
    position_of,
    run,
    share_margins,
)
from .threads import share_out

CELLS = 1024

FLOAT8_GAPS = np.uint32(257 << 23)  # minus an exponent's bits: gaps of fp8 to that power of two

RUN = 32  # weights whose losses are judged together, at most

LARGEST = 8  # the largest 1 / LARGEST of a run count as its outliers

EMPTY = np.empty(0, np.float32)

ONE, TWO = np.float32(1.0), np.float32(2.0)


@cache
def _segments(values, pivots):
    """The distance to the nearest boundary as a piecewise linear function of the position.

    values, pivots: the bytes of a codebook's; empty for integers, which need no segments.

    The range from the lowest level to the highest is divided into CELLS equal cells. No cell has
    more than one end of a segment (a level or a pivot) inside: the closest two, 0 and fp4's first
    pivot, are 0.0026 of the highest level apart. Returns for each cell the first end behind where
    it begins; intercepts and slopes of the segments before and behind that end, of all cells one
    pair after another; and cells per unit.
    """
    values, pivots = (np.frombuffer(table, np.float32) for table in (values, pivots))
    lowest, highest = (values[0], values[-1]) if values.size else (-ONE, ONE)
    levels = scalar.Levels(scalar.COUNT_PIVOTS, lowest, highest, values, pivots, np.diff(values))
    ends = np.sort(np.concatenate([pivots, values]))
    intercepts, slopes = np.zeros((2, ends.size + 1), np.float32)
    for segment in range(1, ends.size):
        low, high = ends[segment - 1 : segment + 1].astype(np.float64)
        if high - low < 1e-6:  # between fp4's two zeros
            continue
        first, last = low + (high - low) / 4, high - (high - low) / 4
        near, far = (_distance(np.float32(position), levels) for position in (first, last))
        slopes[segment] = (far - near) / (last - first)
        intercepts[segment] = near - first * (far - near) / (last - first)
    cells = np.linspace(lowest, highest, CELLS, endpoint=False, dtype=np.float32)
    begins = np.searchsorted(ends, cells, side="right")
    inside = np.append(ends, np.inf).astype(np.float32)[begins]
    both = np.stack([begins, np.minimum(begins + 1, ends.size)], axis=1).reshape(-1)
    return inside, intercepts[both], slopes[both], np.float32(CELLS / 2) / highest


def _distance(position, levels):
    """Distance to the nearest boundary in half-gaps: 0 on the boundary, 1 on the level."""
    level = scalar.level(position, levels.rule, levels.lowest, levels)
    return 1.0 - 2.0 * abs(float(scalar.offset(position, level, levels.rule, levels)))


@inline
def _distances(rule, positions, segments, cells):
    """Put the distances to the nearest boundary in the place of the positions.

    cells: room for as many numbers
    """
    ends, intercepts, slopes, per_unit = segments
    if rule == scalar.COUNT_PIVOTS:
        for i in range(positions.size):
            cells[i] = np.int32(positions[i] * per_unit + np.float32(CELLS / 2))
        for i in range(positions.size):
            segment = np.uint64(2) * cells[i] + np.uint64(positions[i] > ends[cells[i]])
            positions[i] = intercepts[segment] + slopes[segment] * positions[i]
    elif rule == scalar.FLOAT8:
        for i in range(positions.size):
            size = np.float32(abs(positions[i]))
            exponent = np.uint32(np.uint32(size.view(np.uint32)) & scalar.INFINITE)
            exponent = max(exponent, scalar.FLOAT8_EXPONENT)
            gaps = size * np.uint32(FLOAT8_GAPS - exponent).view(np.float32)
            positions[i] = ONE - TWO * abs(gaps - np.rint(gaps))
    else:
        for i in range(positions.size):
            positions[i] = ONE - TWO * abs(positions[i] - np.rint(positions[i]))


def survey(weights, scales, levels, limit, factors, counts):
    is_codebook = levels.rule >= scalar.COUNT_PIVOTS
    tables = (levels.values, levels.pivots) if is_codebook else (EMPTY, EMPTY)
    segments = _segments(*(table.tobytes() for table in tables))
    values, (runs, grids, _) = weights.values, counts.shape
    arguments = cut_of(weights), values, scales, levels, limit, factors, segments, counts
    share_out(lambda *span: _survey(*span, *arguments), runs, grids * values.size)


@kernel
def _survey(first_run, stop_run, cut, values, scales, levels, limit, factors, segments, counts):
    runs, grids, width = counts.shape
    rule, last = levels.rule, np.int32(width - 1)
    positions, counted = np.empty(PIECE, np.float32), np.empty(PIECE, np.bool_)
    distances, bins = np.empty(PIECE, np.float32), np.empty(PIECE, np.uint32)
    found = np.empty(width + 1, np.int32)  # the last bin is for weights that are not counted
    stops, columns = np.empty((2, cut.pieces_per_share), np.int64)  # of the pieces of a share
    shares = -(-cut.pieces // cut.pieces_per_share)
    for number in range(first_run, stop_run):
        for turn in range(shares * number // runs, shares * (number + 1) // runs):
            share = nth_share(turn, cut)
            size, pieces = share.stop - share.start, share.stop_piece - share.first_piece
            for piece in range(pieces):
                b, start, stop = piece_span(share.first_piece + piece, cut)
                here = slice(start - share.start, stop - share.start)
                stops[piece], columns[piece] = here.stop, b % factors.shape[1]
                some, into, flags = values[start:stop], positions[here], counted[here]
                low, high = limit * scales.low[b], limit * scales.high[b]
                operand, (lowest, highest) = scales.operand[b], ends_of(scales.zero[b], levels)
                for i in range(some.size):
                    flags[i] = (some[i] != 0) & is_free(some[i], low, high)
                    position = position_of(some[i], operand, rule, lowest, highest)
                    into[i] = position if flags[i] else scalar.ZERO
            for grid in range(grids):
                start = 0
                for piece in range(pieces):
                    stop, factor = stops[piece], factors[grid, columns[piece]]
                    some, into = positions[start:stop], distances[start:stop]
                    for i in range(some.size):
                        into[i] = some[i] * factor
                    start = stop
                some = distances[:size]
                if rule >= scalar.COUNT_PIVOTS:
                    _distances(scalar.COUNT_PIVOTS, some, segments, bins)
                elif rule == scalar.FLOAT8:
                    _distances(scalar.FLOAT8, some, segments, bins)
                else:
                    _distances(scalar.DIVIDE_HALF_EVEN, some, segments, bins)
                for i in range(size):
                    bin = max(np.int32(0), min(np.int32(distances[i] * np.float32(width)), last))
                    bins[i] = bin if counted[i] else width
                for bin in range(width + 1):
                    found[bin] = 0
                for bin in bins[:size]:
                    found[bin] += 1
                for bin in range(width):
                    counts[number, grid, bin] += found[bin]


@inline
def _absolute_errors(rule, values, codes, zero, scale, levels, errors):
    for i in range(values.size):
        errors[i] = abs(error_of(values[i], codes[i] - zero, scale, rule, levels))


@numba.njit(fastmath={"reassoc"}, **INLINE)
def _sum(values):
    """In an order that depends on the processor, so that it is a sum of vectors."""
    total = 0.0
    for i in range(values.size):
        total += values[i]
    return total


@inline
def _outlier(values):
    """The smallest of the largest 1 / LARGEST of a run's magnitudes; infinite if these are none.

    Of RUN weights that is the fourth. No branch depends on the weights.
    """
    first = second = third = fourth = scalar.ZERO
    for value in values:
        magnitude = abs(value)
        fourth = max(fourth, min(third, magnitude))
        third = max(third, min(second, magnitude))
        second = max(second, min(first, magnitude))
        first = max(first, magnitude)
    count = values.size // LARGEST
    low = third if count == 3 else fourth
    high = first if count == 1 else second
    return np.float32(np.inf) if count == 0 else high if count < 3 else low


@inline
def _loss(values, errors):
    """Relative L2 error of a run without its largest; -1 where nothing but 0 is left."""
    limit = _outlier(values)
    lost, power = 0.0, 0.0
    for i in range(values.size):
        weight, error = np.float64(values[i]), errors[i]
        small = abs(values[i]) < limit
        power += weight * weight if small else 0.0
        lost += error * error if small else 0.0
    return np.sqrt(lost / power) if power > 0 else -1.0


@inline
def _clipped(values, scale, limits, ends):
    """How many weights neither are 0 nor set the scale; lie above the highest level; as far below.

    On a grid that reaches as far on either side none are counted: it may clip both, as mxfp4 does.

    limits: low and high of `Scales`; ends: the outermost levels.
    """
    inverse = ONE / scale
    lowest, highest = max(ends[0], -ends[1]), ends[1]
    free, above, below = 0, 0, 0
    for i in range(values.size):
        inner = (values[i] != 0) & is_free(values[i], *limits)
        position = values[i] * inverse
        free += inner
        above += inner & (position > highest)
        below += inner & (position < lowest)
    one_sided = ends[0] != -ends[1]
    return free, above * one_sided, below * one_sided


def rounding_error_sums(weights, scales, levels, limit, sums):
    cut = cut_of(weights)
    parts = np.empty((cut.shares, sums.size))
    run(_rounding_error_sums, cut, weights.values, scales, levels, limit, parts)
    sums[:] = 0
    for part in parts:  # in order, whatever the number of threads
        sums += part


@kernel
def _rounding_error_sums(first_share, stop_share, cut, weights, scales, levels, limit, parts):
    scale = scales.scale
    for number in range(first_share, stop_share):
        share = nth_share(number, cut)
        values = weights[share.start : share.stop]
        codes, offsets = np.empty(values.size, np.int8), np.empty_like(values)
        share_margins(values, share, cut, scales, levels, codes, offsets)
        errors, variances = np.empty(values.size, np.float64), np.empty(values.size, np.float64)
        for piece in range(share.first_piece, share.stop_piece):
            b, start, stop = piece_span(piece, cut)
            part = slice(start - share.start, stop - share.start)
            some, chosen, into = values[part], codes[part], errors[part]
            zero = np.int32(scales.zero[b])
            if levels.rule >= scalar.COUNT_PIVOTS:
                _absolute_errors(scalar.COUNT_PIVOTS, some, chosen, zero, scale[b], levels, into)
            elif levels.rule == scalar.FLOAT8:
                _absolute_errors(scalar.FLOAT8, some, chosen, zero, scale[b], levels, into)
            else:
                rule = scalar.DIVIDE_HALF_EVEN
                _absolute_errors(rule, some, chosen, zero, scale[b], levels, into)
        if parts.shape[1] > 5:
            runs, losses, free, above, below = 0, 0.0, 0, 0, 0
            for piece in range(share.first_piece, share.stop_piece):
                b, start, stop = piece_span(piece, cut)
                start, stop = start - share.start, stop - share.start
                if scale[b] != 0:
                    limits, ends = (scales.low[b], scales.high[b]), ends_of(scales.zero[b], levels)
                    found = _clipped(values[start:stop], scale[b], limits, ends)
                    free, above, below = free + found[0], above + found[1], below + found[2]
                for first in range(start, stop, RUN):
                    here = slice(first, min(first + RUN, stop))
                    loss = _loss(values[here], errors[here])
                    runs += loss >= 0
                    losses += loss if loss >= 0 else 0.0
            parts[number, 5], parts[number, 6] = runs, losses
            parts[number, 7], parts[number, 8], parts[number, 9] = free, above, below
        used, lost = 0, 0
        for i in range(values.size):
            used += values[i] != 0
            lost += errors[i] > np.float64(abs(values[i])) / 2
        total = _sum(errors)
        for i in range(values.size):
            error, chance = errors[i], np.float64(abs(offsets[i]))
            drawn = chance > limit
            # of two levels that are a gap, error / chance, apart: the variance is chance *
            # (1 - chance) * gap^2
            variances[i] = error * (error / chance - error) if drawn else 0.0
            errors[i] = 0.0 if drawn else error
        stuck, variance = _sum(errors), _sum(variances)
        parts[number, 0], parts[number, 1] = used, lost
        parts[number, 2], parts[number, 3], parts[number, 4] = total, stuck, variance


def largest_two(weights, first, second):
    arguments = cut_of(weights), weights.values, first, second
    share_out(lambda *span: _largest_two(*span, *arguments), first.size, weights.values.size)


@kernel
def _largest_two(first_block, stop_block, cut, values, first, second):
    for b in range(first_block, stop_block):
        row = b // cut.blocks_per_row
        start = row * cut.cols + (b % cut.blocks_per_row) * cut.block_size
        stop = min(start + cut.block_size, (row + 1) * cut.cols)
        top = runner_up = scalar.ZERO
        for weight in values[start:stop]:
            magnitude = abs(weight)
            runner_up = max(runner_up, min(top, magnitude))
            top = max(top, magnitude)
        first[b] = top
        second[b] = runner_up
