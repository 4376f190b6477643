"""`protocol.Kernels` on the CPU: njit loops over `scalar`, shared out among the threads.

A piece is what is worked on at a time: a block, or PIECE weights of a longer one, so that the work
divides evenly even where a tensor is a single block. A share is the pieces of one turn of the
outermost loop, about PIECE weights; the shares of a tensor are divided among the threads.

Loops run over slices, from 0: numba then sees that no index is negative, and LLVM makes vectors.

Whoever installs the tool waits until the kernels are compiled. numba compiles each once for every
type of its arguments, hence one type for all cuts; a helper that is inlined is compiled by itself
as well; a wrapper that nobody calls and a view of an array take as long as a short loop.
"""

from typing import NamedTuple

import numba
import numpy as np
from numba.extending import overload

from . import scalar
from .threads import share_out

device = "cpu"

PIECE = 4096  # weights; a multiple of every block size that is not a whole row, and fits the cache

MAX_STEPS = 8  # values of the storage type that a flipped weight may be moved on to

# Python's error model would test every divisor for 0
BARE = {"error_model": "numpy", "no_cfunc_wrapper": True}

INLINE = {"forceinline": True, "no_cpython_wrapper": True, **BARE}  # a rule becomes a constant

inline = numba.njit(**INLINE)

kernel = numba.njit(nogil=True, cache=True, **BARE)

_value = inline(scalar.value)

_pattern = inline(scalar.pattern)

_next_pattern = inline(scalar.next_pattern)

_ordered = inline(scalar.ordered)

position_of = inline(scalar.position)

is_free = inline(scalar.is_free)

ends_of = inline(scalar.ends)

level_of = inline(scalar.level)

_offset = inline(scalar.offset)

_edge = inline(scalar.edge)

_at_an_edge = inline(scalar.at_an_edge)

_behind = inline(scalar.behind)

_lands = inline(scalar.lands)

_just_past = inline(scalar.just_past)

_state = inline(scalar.state)

_uniform = inline(scalar.uniform)

_step = inline(scalar.step)

error_of = inline(scalar.error)

_within_grid = inline(scalar.within_grid)

_take_over = inline(scalar.take_over)


class Cut(NamedTuple):
    """How a tensor is cut into blocks, as in StoredWeights, into pieces, and into shares.

    pieces: of the whole tensor.
    """

    cols: int
    block_size: int
    blocks_per_row: int
    pieces_per_block: int
    pieces_per_share: int
    pieces: int

    @property
    def shares(self) -> int:
        """Shares of the whole tensor."""
        return -(-self.pieces // self.pieces_per_share)


class Share(NamedTuple):
    """Pieces first_piece up to, but not including, stop_piece; start and stop of its weights."""

    first_piece: int
    stop_piece: int
    start: int
    stop: int


def cut_of(weights):
    """The cut of StoredWeights or FloatWeights."""
    cols, block_size = weights.cols, weights.block_size
    per_row, per_block = -(-cols // block_size), -(-block_size // PIECE)
    pieces = weights[0].size // cols * per_row * per_block
    return Cut(cols, block_size, per_row, per_block, max(1, PIECE // block_size), pieces)


def run(compiled, cut, *arguments):
    """compiled(first, stop, cut, *arguments) for all shares from `first` up to `stop`."""
    shares = cut.shares
    share_out(lambda *span: compiled(*span, cut, *arguments), shares, shares * PIECE)


@inline
def piece_span(piece, cut):
    """The block of a piece, and start and stop of its weights."""
    block = piece // cut.pieces_per_block
    row = block // cut.blocks_per_row
    start = row * cut.cols + (block % cut.blocks_per_row) * cut.block_size
    stop = min(start + cut.block_size, (row + 1) * cut.cols)
    start = min(start + (piece % cut.pieces_per_block) * PIECE, stop)
    return block, start, min(start + PIECE, stop)


@inline
def nth_share(number, cut):
    """The share of that number."""
    first = number * cut.pieces_per_share
    stop = min(first + cut.pieces_per_share, cut.pieces)
    return Share(first, stop, piece_span(first, cut)[1], piece_span(stop - 1, cut)[2])


def _stored(weights):
    """The arguments of `_read`: weights as float32 if that is their type, else as patterns."""
    is_float = weights.form == scalar.FLOAT32
    return weights.patterns.view(np.float32) if is_float else weights.patterns, weights.form


def _read(stored, form):
    """The float32 that patterns stand for, one or an array of them; float32 is itself."""
    raise NotImplementedError


@overload(_read, jit_options=INLINE)
def _read_type(stored, form):
    """`_read` for arguments of these types: models in float32 compile no other."""
    if numba.float32 in (stored, getattr(stored, "dtype", None)):
        return lambda stored, form: stored
    if isinstance(stored, numba.types.Array):
        return _read_all
    return lambda stored, form: _value(stored, form)


def _read_all(stored, form):
    values = np.empty(stored.size, np.float32)
    if form == scalar.FLOAT16:
        for i in range(values.size):
            values[i] = _value(stored[i], scalar.FLOAT16)
    else:
        for i in range(values.size):
            values[i] = _value(stored[i], scalar.BFLOAT16)
    return values


@inline
def _piece_extremes(values, share, cut, lowest, highest):
    """Smallest and largest value of every piece of a share, as integers in the same order."""
    for piece in range(share.first_piece, share.stop_piece):
        _, start, stop = piece_span(piece, cut)
        part = values[start - share.start : stop - share.start]
        low, high = np.int32(2**31 - 1), np.int32(-(2**31))
        for i in range(part.size):
            key = _ordered(np.float32(part[i]).view(np.int32))
            low = min(low, key)
            high = max(high, key)
        lowest[piece], highest[piece] = low, high


def _no_keys(cut):
    """Room for the extremes of every piece."""
    return np.empty(cut.pieces, np.int32), np.empty(cut.pieces, np.int32)


def _merge(keys, cut, found):
    """Extremes of the blocks from those of their pieces."""
    lowest, highest = (each.reshape(-1, cut.pieces_per_block) for each in keys)
    found.lowest[:] = scalar.ordered(lowest.min(axis=1)).view(np.float32)
    found.highest[:] = scalar.ordered(highest.max(axis=1)).view(np.float32)


@inline
def _one_by_one(rule, values, operand, ends, zero, limits, levels, codes, offsets):
    """Codes and offsets of the weights of one block. limits: low and high of `Scales`."""
    lowest, highest = ends
    for i in range(values.size):
        position = position_of(values[i], operand, rule, lowest, highest)
        level = level_of(position, rule, lowest, levels)
        offset = _offset(position, level, rule, levels)
        codes[i] = np.int32(level + zero)
        offsets[i] = offset if is_free(values[i], *limits) else scalar.ZERO


@inline
def _positions(rule, values, operand, limits, levels, positions, free):
    for i in range(values.size):
        positions[i] = position_of(values[i], operand, rule, levels.lowest, levels.highest)
        free[i] = is_free(values[i], *limits)


@inline
def _pivots(positions, free, levels, codes, offsets):
    for i in range(positions.size):
        level = level_of(positions[i], scalar.COUNT_PIVOTS, levels.lowest, levels)
        offset = _offset(positions[i], level, scalar.COUNT_PIVOTS, levels)
        codes[i] = level
        offsets[i] = offset if free[i] else scalar.ZERO


@inline
def share_margins(values, share, cut, scales, levels, codes, offsets):
    """Codes and offsets of one share; for every rule loops compiled for it alone."""
    if levels.rule >= scalar.COUNT_PIVOTS:
        positions = np.empty(values.size, np.float32)
        free = np.empty(values.size, np.bool_)
        for piece in range(share.first_piece, share.stop_piece):
            b, start, stop = piece_span(piece, cut)
            part = slice(start - share.start, stop - share.start)
            some, into, beside = values[part], positions[part], free[part]
            operand, limits = scales.operand[b], (scales.low[b], scales.high[b])
            if levels.rule == scalar.COUNT_PIVOTS:
                _positions(scalar.COUNT_PIVOTS, some, operand, limits, levels, into, beside)
            else:
                _positions(scalar.DIVIDE_AND_COUNT, some, operand, limits, levels, into, beside)
        _pivots(positions, free, levels, codes, offsets)
        return
    for piece in range(share.first_piece, share.stop_piece):
        b, start, stop = piece_span(piece, cut)
        part = slice(start - share.start, stop - share.start)
        some, into, beside = values[part], codes[part], offsets[part]
        operand, limits = scales.operand[b], (scales.low[b], scales.high[b])
        ends, zero = ends_of(scales.zero[b], levels), np.int32(scales.zero[b])
        if levels.rule == scalar.DIVIDE_HALF_EVEN:
            rule = scalar.DIVIDE_HALF_EVEN
            _one_by_one(rule, some, operand, ends, zero, limits, levels, into, beside)
        elif levels.rule == scalar.MULTIPLY_HALF_AWAY:
            rule = scalar.MULTIPLY_HALF_AWAY
            _one_by_one(rule, some, operand, ends, zero, limits, levels, into, beside)
        else:  # the rest shares one
            rule = levels.rule
            _one_by_one(rule, some, operand, ends, zero, limits, levels, into, beside)


def extremes(weights, found):
    cut = cut_of(weights)
    keys = _no_keys(cut)
    run(_extremes, cut, *_stored(weights), *keys)
    _merge(keys, cut, found)


@kernel
def _extremes(first, stop, cut, stored, form, lowest, highest):
    for number in range(first, stop):
        share = nth_share(number, cut)
        values = _read(stored[share.start : share.stop], form)
        _piece_extremes(values, share, cut, lowest, highest)


def analyze(weights, scales, levels, codes, offsets):
    run(_analyze, cut_of(weights), *_stored(weights), scales, levels, codes, offsets)


@kernel
def _analyze(first, stop, cut, stored, form, scales, levels, codes, offsets):
    for number in range(first, stop):
        share = nth_share(number, cut)
        here = slice(share.start, share.stop)
        values = _read(stored[here], form)
        share_margins(values, share, cut, scales, levels, codes[here], offsets[here])


def draw(weights, scales, levels, random, nearest, codes):
    run(_draw, cut_of(weights), *_stored(weights), scales, levels, random, nearest, codes)


@kernel
def _draw(first, stop, cut, stored, form, scales, levels, random, nearest, codes):
    for number in range(first, stop):
        share = nth_share(number, cut)
        here = slice(share.start, share.stop)
        values = _read(stored[here], form)
        rounded, drawn, offsets = nearest[here], codes[here], np.empty_like(values)
        share_margins(values, share, cut, scales, levels, rounded, offsets)
        state = _state(random.key, random.first + np.uint64(share.start))
        for i in range(drawn.size):
            drawn[i] = rounded[i] + _step(offsets[i], random.limit, _uniform(state))
            state += scalar.GAMMA


def move_weights(weights, scales, levels, nearest, offsets, codes):
    stored = weights.patterns, weights.form
    run(_move_weights, cut_of(weights), *stored, scales, levels, nearest, offsets, codes)


@kernel
def _move_weights(first, stop, cut, patterns, form, scales, levels, nearest, offsets, codes):
    rule = levels.rule
    chosen = np.empty(PIECE, np.int64)
    for number in range(first, stop):
        share = nth_share(number, cut)
        for piece in range(share.first_piece, share.stop_piece):
            b, start, end = piece_span(piece, cut)
            count = 0
            for i in range(start, end):  # a list, as no processor foresees who will be on it
                chosen[count] = i
                count += (codes[i] != nearest[i]) | _at_an_edge(offsets[i])
            zero, (lowest, highest) = np.int32(scales.zero[b]), ends_of(scales.zero[b], levels)
            for i in chosen[:count]:
                wanted = codes[i] - zero
                other = _behind(nearest[i] - zero, wanted, offsets[i])
                boundary, direction = _edge(other, wanted, rule, levels)
                target = _just_past(boundary, direction) * scales.scale[b]
                upward = (direction > scalar.ZERO) == (scales.scale[b] > scalar.ZERO)
                there = _value(patterns[i], form)
                if _lands(there, target, upward, scales.low[b], scales.high[b]):
                    continue
                bits = _pattern(target, form)
                found = False
                for _ in range(MAX_STEPS):
                    value = _value(bits, form)
                    position = position_of(value, scales.operand[b], rule, lowest, highest)
                    right = level_of(position, rule, lowest, levels) == wanted
                    found = right and _lands(value, target, upward, scales.low[b], scales.high[b])
                    if found:
                        break
                    bits = _next_pattern(bits, upward, form)
                if found:
                    patterns[i] = bits
                else:
                    codes[i] = nearest[i]


def check(before, after, scales, levels, nearest, offsets, codes, found, faults):
    cut = cut_of(after)
    keys, counts = _no_keys(cut), np.empty((cut.shares, 2), np.int64)
    patterns = before.patterns, after.patterns
    grid = scales, levels
    run(_check, cut, *patterns, *_stored(after), *grid, nearest, offsets, codes, *keys, counts)
    faults[:] = counts.sum(axis=0)
    _merge(keys, cut, found)


@kernel
def _check(
    first,
    stop,
    cut,
    earlier,
    patterns,
    stored,
    form,
    scales,
    levels,
    nearest,
    offsets,
    codes,
    low,
    high,
    counts,
):
    for number in range(first, stop):
        share = nth_share(number, cut)
        here = slice(share.start, share.stop)
        values = _read(stored[here], form)
        _piece_extremes(values, share, cut, low, high)
        encoded, margins = np.empty(values.size, np.int8), np.empty_like(values)
        share_margins(values, share, cut, scales, levels, encoded, margins)
        was, now = earlier[here], patterns[here]
        rounded, stood, stated = nearest[here], offsets[here], codes[here]
        wrong, moved = 0, 0
        for i in range(now.size):
            wrong += encoded[i] != stated[i]
            keeps = (rounded[i] == stated[i]) & (not _at_an_edge(stood[i]))
            moved += (was[i] != now[i]) & keeps
        counts[number, 0], counts[number, 1] = wrong, moved


def draw_with_feedback(weights, scales, levels, panel, random, codes, errors):
    arguments = cut_of(weights), *_stored(weights), scales, levels, panel, random, codes, errors
    rows, width = panel.carried.shape
    share_out(lambda *span: _draw_with_feedback(*span, *arguments), rows, rows * width * width)


@kernel
def _draw_with_feedback(
    first_row, stop_row, cut, stored, form, scales, levels, panel, random, codes, errors
):
    carried, factors, order, first = panel
    rows, length = codes.shape
    width = factors.shape[1]
    rule = levels.rule
    for row in range(first_row, stop_row):
        group = row // (rows // factors.shape[0])
        due = carried[row].astype(np.float64)
        for k in range(width):
            column = order[group, k]
            i = row * length + column
            b = (i // cut.cols) * cut.blocks_per_row + (i % cut.cols) // cut.block_size
            weight = _read(stored[i], form)
            free = is_free(weight, scales.low[b], scales.high[b])
            scale, operand = scales.scale[b], scales.operand[b]
            lowest, highest = ends_of(scales.zero[b], levels)
            position = position_of(weight, operand, rule, lowest, highest)
            if free:
                change = _within_grid(np.float32(due[k]), position, scale, lowest, highest)
                position = position_of(weight + change, operand, rule, lowest, highest)
            level = level_of(position, rule, lowest, levels)
            if free:
                offset = _offset(position, level, rule, levels)
                noise = _uniform(_state(random.key, random.first + np.uint64(i)))
                level += _step(offset, random.limit, noise)
            codes[row, column] = level + np.int32(scales.zero[b])
            error = error_of(weight, level, scale, rule, levels)
            errors[row, first + k] = error
            later, factor = due[k + 1 :], factors[group, k, k + 1 :]
            for j in range(later.size):
                later[j] = _take_over(later[j], error, factor[j])
