"""`protocol.Kernels` on the CPU: njit loops over `scalar`, shared out among the threads.

A piece is what is worked on at a time: a block, or PIECE weights of a longer one, so that the work
divides evenly even where a tensor is a single block. A share is the pieces of one turn of a
parallel loop.

Loops run over slices, from 0: numba then sees that no index is negative, and LLVM makes vectors.
A parallel loop of numba takes only NamedTuples that are arguments of the kernel, and not nested.
"""

from typing import NamedTuple

import numba
import numpy as np

from . import scalar

device = "cpu"

PIECE = 4096  # weights; a multiple of every block size that is not a whole row, and fits the cache

MAX_STEPS = 8  # values of the storage type that a flipped weight may be moved on to

# Python's error model would test every divisor for 0; inlined, a rule is a constant of the loop
inline = numba.njit(error_model="numpy", forceinline=True)

kernel = numba.njit(parallel=True, nogil=True, cache=True, error_model="numpy")

_value = inline(scalar.value)

_pattern = inline(scalar.pattern)

_next_pattern = inline(scalar.next_pattern)

_ordered = inline(scalar.ordered)

_position = inline(scalar.position)

_code = inline(scalar.code)

_offset = inline(scalar.offset)

_edge = inline(scalar.edge)

_lands = inline(scalar.lands)

_just_past = inline(scalar.just_past)

_state = inline(scalar.state)

_uniform = inline(scalar.uniform)

_step = inline(scalar.step)

_error = inline(scalar.error)

_within_grid = inline(scalar.within_grid)

_take_over = inline(scalar.take_over)


class Share(NamedTuple):
    """Pieces first_piece up to, but not including, stop_piece; start and stop of its weights."""

    first_piece: int
    stop_piece: int
    start: int
    stop: int


@inline
def _blocks_per_row(cut):
    return (cut.cols + cut.block_size - 1) // cut.block_size


@inline
def _pieces_per_block(cut):
    return (cut.block_size + PIECE - 1) // PIECE


@inline
def _pieces_per_share(cut):
    return max(1, PIECE // cut.block_size)


@inline
def piece_count(size, cut):
    """Pieces of a tensor of `size` weights; `cut` is anything with `cols` and `block_size`."""
    return size // cut.cols * _blocks_per_row(cut) * _pieces_per_block(cut)


@inline
def share_count(size, cut):
    """Shares of a tensor."""
    per_share = _pieces_per_share(cut)
    return (piece_count(size, cut) + per_share - 1) // per_share


@inline
def piece_span(piece, cut):
    """The block of a piece, and start and stop of its weights."""
    per_block, per_row = _pieces_per_block(cut), _blocks_per_row(cut)
    block = piece // per_block
    row = block // per_row
    start = row * cut.cols + (block % per_row) * cut.block_size
    stop = min(start + cut.block_size, (row + 1) * cut.cols)
    start = min(start + (piece % per_block) * PIECE, stop)
    return block, start, min(start + PIECE, stop)


@inline
def _block_of(i, cut):
    """Number of the block that weight `i` belongs to."""
    return (i // cut.cols) * _blocks_per_row(cut) + (i % cut.cols) // cut.block_size


@inline
def nth_share(number, size, cut):
    """The share of that number."""
    first = number * _pieces_per_share(cut)
    stop = min(first + _pieces_per_share(cut), piece_count(size, cut))
    return Share(first, stop, piece_span(first, cut)[1], piece_span(stop - 1, cut)[2])


@inline
def _floats(patterns, form):
    """The float32 that the bit patterns stand for: a view, or a copy."""
    if form == scalar.FLOAT32:
        return patterns.view(np.float32)
    values = np.empty(patterns.size, np.float32)
    if form == scalar.FLOAT16:
        for i in range(values.size):
            values[i] = _value(patterns[i], scalar.FLOAT16)
    else:
        for i in range(values.size):
            values[i] = _value(patterns[i], scalar.BFLOAT16)
    return values


@inline
def _piece_extremes(values, share, cut, keys):
    """Smallest and largest value of every piece of a share, as integers in the same order."""
    words = values.view(np.int32)
    for piece in range(share.first_piece, share.stop_piece):
        _, start, stop = piece_span(piece, cut)
        part = words[start - share.start : stop - share.start]
        low, high = np.int32(2**31 - 1), np.int32(-(2**31))
        for i in range(part.size):
            key = _ordered(part[i])
            low = min(low, key)
            high = max(high, key)
        keys[piece, 0], keys[piece, 1] = low, high


@inline
def _merge(keys, per_block, found):
    """Extremes of the blocks from those of their pieces."""
    merged = keys.reshape(-1, per_block, 2)
    for b in range(found.lowest.size):
        low, high = merged[b, 0, 0], merged[b, 0, 1]
        for piece in range(1, per_block):
            low = min(low, merged[b, piece, 0])
            high = max(high, merged[b, piece, 1])
        found.lowest[b] = np.int32(_ordered(low)).view(np.float32)
        found.highest[b] = np.int32(_ordered(high)).view(np.float32)


@inline
def _positions(rule, values, operand, absmax, levels, positions, free):
    for i in range(values.size):
        positions[i] = _position(values[i], operand, rule, levels)
        free[i] = abs(values[i]) < absmax


@inline
def _round(rule, positions, free, levels, codes, offsets):
    for i in range(positions.size):
        code = _code(positions[i], rule, levels)
        offset = _offset(positions[i], code, rule, levels)
        codes[i] = code
        offsets[i] = offset if free[i] else scalar.ZERO


@inline
def share_margins(values, share, cut, scales, levels, codes, offsets):
    """Codes and offsets of one share; for every rule loops compiled for it alone."""
    positions = np.empty(values.size, np.float32)
    free = np.empty(values.size, np.bool_)
    for piece in range(share.first_piece, share.stop_piece):
        b, start, stop = piece_span(piece, cut)
        part = slice(start - share.start, stop - share.start)
        some, into, inner = values[part], positions[part], free[part]
        operand, absmax = scales.operand[b], scales.absmax[b]
        if levels.rule == scalar.DIVIDE_HALF_EVEN:
            _positions(scalar.DIVIDE_HALF_EVEN, some, operand, absmax, levels, into, inner)
        else:
            _positions(scalar.MULTIPLY_HALF_AWAY, some, operand, absmax, levels, into, inner)
    if levels.rule == scalar.DIVIDE_HALF_EVEN:
        _round(scalar.DIVIDE_HALF_EVEN, positions, free, levels, codes, offsets)
    elif levels.rule == scalar.MULTIPLY_HALF_AWAY:
        _round(scalar.MULTIPLY_HALF_AWAY, positions, free, levels, codes, offsets)
    else:
        _round(scalar.COUNT_PIVOTS, positions, free, levels, codes, offsets)


@kernel
def extremes(weights, found):
    patterns = weights.patterns
    keys = np.empty((piece_count(patterns.size, weights), 2), np.int32)
    for s in numba.prange(share_count(patterns.size, weights)):
        share = nth_share(s, patterns.size, weights)
        values = _floats(patterns[share.start : share.stop], weights.form)
        _piece_extremes(values, share, weights, keys)
    _merge(keys, _pieces_per_block(weights), found)


@kernel
def analyze(weights, scales, levels, codes, offsets):
    patterns = weights.patterns
    for s in numba.prange(share_count(patterns.size, weights)):
        share = nth_share(s, patterns.size, weights)
        here = slice(share.start, share.stop)
        values = _floats(patterns[here], weights.form)
        share_margins(values, share, weights, scales, levels, codes[here], offsets[here])


@kernel
def draw(weights, scales, levels, random, nearest, codes):
    patterns = weights.patterns
    for s in numba.prange(share_count(patterns.size, weights)):
        share = nth_share(s, patterns.size, weights)
        here = slice(share.start, share.stop)
        values = _floats(patterns[here], weights.form)
        rounded, drawn, offsets = nearest[here], codes[here], np.empty_like(values)
        share_margins(values, share, weights, scales, levels, rounded, offsets)
        state = _state(random.key, random.first + np.uint64(share.start))
        for i in range(drawn.size):
            drawn[i] = rounded[i] + _step(offsets[i], random.limit, _uniform(state))
            state += scalar.GAMMA


@kernel
def move_weights(weights, scales, levels, nearest, codes):
    patterns = weights.patterns
    operand, scale, absmax = scales
    rule = levels.rule
    for s in numba.prange(share_count(patterns.size, weights)):
        chosen = np.empty(PIECE, np.int64)
        share = nth_share(s, patterns.size, weights)
        for piece in range(share.first_piece, share.stop_piece):
            b, start, stop = piece_span(piece, weights)
            count = 0
            for i in range(start, stop):  # a list, as no processor foresees who will be on it
                chosen[count] = i
                count += codes[i] != nearest[i]
            for i in chosen[:count]:
                boundary, direction = _edge(nearest[i], codes[i], rule, levels)
                target = _just_past(boundary, direction) * scale[b]
                upward = target > _value(patterns[i], weights.form)
                bits = _pattern(target, weights.form)
                found = False
                for _ in range(MAX_STEPS):
                    value = _value(bits, weights.form)
                    position = _position(value, operand[b], rule, levels)
                    right = _code(position, rule, levels) == codes[i]
                    found = right and _lands(value, target, upward, absmax[b])
                    if found:
                        break
                    bits = _next_pattern(bits, upward, weights.form)
                if found:
                    patterns[i] = bits
                else:
                    codes[i] = nearest[i]


@kernel
def check(before, after, scales, levels, nearest, codes, found, faults):
    earlier = before.patterns
    patterns = after.patterns
    keys = np.empty((piece_count(patterns.size, after), 2), np.int32)
    wrong = np.int64(0)
    moved = np.int64(0)
    for s in numba.prange(share_count(patterns.size, after)):
        share = nth_share(s, patterns.size, after)
        here = slice(share.start, share.stop)
        values = _floats(patterns[here], after.form)
        _piece_extremes(values, share, after, keys)
        encoded, offsets = np.empty(values.size, np.int8), np.empty_like(values)
        share_margins(values, share, after, scales, levels, encoded, offsets)
        was, now = earlier[here], patterns[here]
        rounded, stated = nearest[here], codes[here]
        for i in range(now.size):
            wrong += encoded[i] != stated[i]
            moved += (was[i] != now[i]) & (rounded[i] == stated[i])
    faults[0] = wrong
    faults[1] = moved
    _merge(keys, _pieces_per_block(after), found)


@kernel
def draw_with_feedback(weights, scales, levels, panel, random, codes, errors):
    patterns = weights.patterns
    operand, scale, absmax = scales
    carried, factors, order, first = panel
    rows, length = codes.shape
    width = factors.shape[1]
    rule = levels.rule
    for row in numba.prange(rows):
        group = row // (rows // factors.shape[0])
        due = carried[row].astype(np.float64)
        for k in range(width):
            column = order[group, k]
            i = row * length + column
            b = _block_of(i, weights)
            weight = _value(patterns[i], weights.form)
            free = abs(weight) < absmax[b]
            position = _position(weight, operand[b], rule, levels)
            if free:
                change = _within_grid(np.float32(due[k]), position, scale[b], levels)
                position = _position(weight + change, operand[b], rule, levels)
            code = _code(position, rule, levels)
            if free:
                offset = _offset(position, code, rule, levels)
                noise = _uniform(_state(random.key, random.first + np.uint64(i)))
                code += _step(offset, random.limit, noise)
            codes[row, column] = code
            error = _error(weight, code, scale[b], rule, levels)
            errors[row, first + k] = error
            later, factor = due[k + 1 :], factors[group, k, k + 1 :]
            for j in range(later.size):
                later[j] = _take_over(later[j], error, factor[j])
