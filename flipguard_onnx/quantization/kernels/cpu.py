"""The kernels on the CPU: njit loops over `scalar`, pieces of blocks shared out among the threads.

A tensor arrives as flat bit patterns, uint32 or uint16, of the float type `form`. `cut` is (cols,
block): rows of `cols` weights, every row cut into blocks of `block`, the last one possibly shorter.
Per-block arguments are flat, in the same order. A piece is what one thread does in one go: a block,
or PIECE weights of a longer one, so that the work divides even where a tensor is a single block.

Loops run over slices, from 0: numba then sees that no index is negative, and LLVM makes vectors.
"""

import numba
import numpy as np

from . import scalar

PIECE = 4096  # weights; a multiple of every block size that is not a whole row, and fits the cache

MAX_STEPS = 8  # values of the storage type that a flipped weight may be moved on to

# Python's error model would test every divisor for 0; inlined, a rule is a constant of the loop
_inline = numba.njit(error_model="numpy", forceinline=True)

_kernel = numba.njit(parallel=True, nogil=True, cache=True, error_model="numpy")

_value = _inline(scalar.value)

_pattern = _inline(scalar.pattern)

_next_pattern = _inline(scalar.next_pattern)

_ordered = _inline(scalar.ordered)

_position = _inline(scalar.position)

_code = _inline(scalar.code)

_offset = _inline(scalar.offset)

_edge = _inline(scalar.edge)

_lands = _inline(scalar.lands)

_just_past = _inline(scalar.just_past)

_state = _inline(scalar.state)

_uniform = _inline(scalar.uniform)

_step = _inline(scalar.step)

_error = _inline(scalar.error)

_fed = _inline(scalar.fed)


@_inline
def _pieces(size, cut):
    """Pieces of one block, pieces of the tensor, and how many of these make a thread's share."""
    cols, block = cut
    count = size // cols * ((cols + block - 1) // block)
    each = (block + PIECE - 1) // PIECE
    return each, count * each, max(1, PIECE // block)


@_inline
def _span(piece, cut, each):
    """The block of a piece, and the first and one-past-last position of its weights."""
    cols, block = cut
    per_row = (cols + block - 1) // block
    b = piece // each
    row = b // per_row
    start = row * cols + (b % per_row) * block
    stop = min(start + block, (row + 1) * cols)
    start = min(start + (piece % each) * PIECE, stop)
    return b, start, min(start + PIECE, stop)


@_inline
def _block_of(i, cut):
    """Number of the block that weight `i` belongs to."""
    cols, block = cut
    per_row = (cols + block - 1) // block
    return (i // cols) * per_row + (i % cols) // block


@_inline
def _share(s, share, pieces, cut, each):
    """Share number `s`: its pieces (first, one past last), and the same of its weights."""
    own = s * share, min((s + 1) * share, pieces)
    return own, _span(own[0], cut, each)[1], _span(own[1] - 1, cut, each)[2]


@_inline
def _floats(weights, form):
    """The float32 that the bit patterns stand for: a view, or a copy."""
    if form == scalar.FLOAT32:
        return weights.view(np.float32)
    values = np.empty(weights.size, np.float32)
    if form == scalar.FLOAT16:
        for i in range(values.size):
            values[i] = _value(weights[i], scalar.FLOAT16)
    else:
        for i in range(values.size):
            values[i] = _value(weights[i], scalar.BFLOAT16)
    return values


@_inline
def _extremes(values, start, share, cut, each, keys):
    """Smallest and largest value of every piece of a share, as integers in the same order."""
    words = values.view(np.int32)
    for piece in range(share[0], share[1]):
        _, first, stop = _span(piece, cut, each)
        part = words[first - start : stop - start]
        low, high = np.int32(2**31 - 1), np.int32(-(2**31))
        for i in range(part.size):
            key = _ordered(part[i])
            low = min(low, key)
            high = max(high, key)
        keys[piece, 0], keys[piece, 1] = low, high


@_inline
def _merge(keys, each, lowest, highest):
    """Extremes of the blocks from those of their pieces."""
    merged = keys.reshape(-1, each, 2)
    for b in range(lowest.size):
        low, high = merged[b, 0, 0], merged[b, 0, 1]
        for piece in range(1, each):
            low = min(low, merged[b, piece, 0])
            high = max(high, merged[b, piece, 1])
        lowest[b] = np.int32(_ordered(low)).view(np.float32)
        highest[b] = np.int32(_ordered(high)).view(np.float32)


@_inline
def _positions(rule, values, operand, absmax, levels, positions, free):
    for i in range(values.size):
        positions[i] = _position(values[i], operand, rule, levels)
        free[i] = abs(values[i]) < absmax


@_inline
def _round(rule, positions, free, levels, codes, offsets):
    for i in range(positions.size):
        code = _code(positions[i], rule, levels)
        offset = _offset(positions[i], code, rule, levels)
        codes[i] = code
        offsets[i] = offset if free[i] else scalar.ZERO


@_inline
def _margins(values, start, share, cut, each, operands, absmax, levels, codes, offsets):
    """Codes and offsets of one share of pieces; for every rule loops compiled for it alone."""
    positions = np.empty(values.size, np.float32)
    free = np.empty(values.size, np.bool_)
    for piece in range(share[0], share[1]):
        b, first, stop = _span(piece, cut, each)
        part = slice(first - start, stop - start)
        given = values[part], operands[b], absmax[b], levels, positions[part], free[part]
        if levels.rule == scalar.DIVIDE_HALF_EVEN:
            _positions(scalar.DIVIDE_HALF_EVEN, *given)
        else:
            _positions(scalar.MULTIPLY_HALF_AWAY, *given)
    if levels.rule == scalar.DIVIDE_HALF_EVEN:
        _round(scalar.DIVIDE_HALF_EVEN, positions, free, levels, codes, offsets)
    elif levels.rule == scalar.MULTIPLY_HALF_AWAY:
        _round(scalar.MULTIPLY_HALF_AWAY, positions, free, levels, codes, offsets)
    else:
        _round(scalar.COUNT_PIVOTS, positions, free, levels, codes, offsets)


@_kernel
def extremes(weights, form, cut, lowest, highest):
    """Smallest and largest weight of every block."""
    each, pieces, share = _pieces(weights.size, cut)
    keys = np.empty((pieces, 2), np.int32)
    for s in numba.prange((pieces + share - 1) // share):
        own, start, stop = _share(s, share, pieces, cut, each)
        _extremes(_floats(weights[start:stop], form), start, own, cut, each, keys)
    _merge(keys, each, lowest, highest)


@_kernel
def analyze(weights, form, cut, operands, absmax, levels, codes, offsets):
    """Codes and offsets; weights at the block's absmax set the scale, so their offset is 0."""
    each, pieces, share = _pieces(weights.size, cut)
    for s in numba.prange((pieces + share - 1) // share):
        own, start, stop = _share(s, share, pieces, cut, each)
        values = _floats(weights[start:stop], form)
        into = codes[start:stop], offsets[start:stop]
        _margins(values, start, own, cut, each, operands, absmax, levels, *into)


@_kernel
def draw(weights, form, cut, operands, absmax, levels, key, first, limit, plain, codes):
    """Codes of the nearest levels, and those drawn: see `scalar.step`.

    first: number of the first weight in the random stream `key`.
    """
    each, pieces, share = _pieces(weights.size, cut)
    for s in numba.prange((pieces + share - 1) // share):
        own, start, stop = _share(s, share, pieces, cut, each)
        values = _floats(weights[start:stop], form)
        nearest, drawn, offsets = plain[start:stop], codes[start:stop], np.empty_like(values)
        _margins(values, start, own, cut, each, operands, absmax, levels, nearest, offsets)
        state = _state(key, first + np.uint64(start))
        for i in range(drawn.size):
            drawn[i] = nearest[i] + _step(offsets[i], limit, _uniform(state))
            state += scalar.GAMMA


@_kernel
def place(form, cut, operands, scales, absmax, levels, plain, weights, codes):
    """Move every weight that is to change its code just across the edge of its new cell.

    It takes the value of its own type nearest past the edge, and never one short of it: a float16
    on the boundary itself would be rounded one way by some quantizers and the other way by others.
    Where no such value has the new code, the weight and its plain code stay.
    """
    each, pieces, share = _pieces(weights.size, cut)
    rule = levels.rule
    for s in numba.prange((pieces + share - 1) // share):
        chosen = np.empty(PIECE, np.int64)
        for piece in range(s * share, min((s + 1) * share, pieces)):
            b, start, stop = _span(piece, cut, each)
            count = 0
            for i in range(start, stop):  # a list, as no processor foresees who will be on it
                chosen[count] = i
                count += codes[i] != plain[i]
            for i in chosen[:count]:
                boundary, direction = _edge(plain[i], codes[i], rule, levels)
                target = _just_past(boundary, direction) * scales[b]
                upward = target > _value(weights[i], form)
                bits = _pattern(target, form)
                found = False
                for _ in range(MAX_STEPS):
                    value = _value(bits, form)
                    position = _position(value, operands[b], rule, levels)
                    right = _code(position, rule, levels) == codes[i]
                    found = right and _lands(value, target, upward, absmax[b])
                    if found:
                        break
                    bits = _next_pattern(bits, upward, form)
                if found:
                    weights[i] = bits
                else:
                    codes[i] = plain[i]


@_kernel
def check(
    before, after, form, cut, operands, absmax, levels, plain, codes, lowest, highest, faults
):
    """Read moved weights anew: their extremes, and how many are at fault.

    faults: int64 [2], weights whose code is not `codes`, and those that have changed although
    `codes` and `plain` agree.
    """
    each, pieces, share = _pieces(after.size, cut)
    keys = np.empty((pieces, 2), np.int32)
    wrong = np.int64(0)
    moved = np.int64(0)
    for s in numba.prange((pieces + share - 1) // share):
        own, start, stop = _share(s, share, pieces, cut, each)
        values = _floats(after[start:stop], form)
        _extremes(values, start, own, cut, each, keys)
        encoded, offsets = np.empty(values.size, np.int8), np.empty_like(values)
        _margins(values, start, own, cut, each, operands, absmax, levels, encoded, offsets)
        was, now = before[start:stop], after[start:stop]
        nearest, stated = plain[start:stop], codes[start:stop]
        for i in range(now.size):
            wrong += encoded[i] != stated[i]
            moved += (was[i] != now[i]) & (nearest[i] == stated[i])
    faults[0] = wrong
    faults[1] = moved
    _merge(keys, each, lowest, highest)


@_kernel
def feed(
    weights, form, cut, operands, scales, absmax, levels,
    carried, factors, order, first, key, limit, codes, errors,
):  # fmt: skip
    """Draw the codes of one panel of columns; see `flip.feedback.draw`.

    The rows of carried, codes and errors are rows of the weights, whatever `cut` says.
    """
    rows, length = codes.shape
    width = factors.shape[1]
    rule = levels.rule
    for row in numba.prange(rows):
        group = row // (rows // factors.shape[0])
        due = carried[row].astype(np.float64)
        for column in range(width):
            place = order[group, column]
            i = row * length + place
            b = _block_of(i, cut)
            weight = _value(weights[i], form)
            free = abs(weight) < absmax[b]
            target = weight + np.float32(due[column]) if free else weight
            position = _position(target, operands[b], rule, levels)
            code = _code(position, rule, levels)
            if free:
                offset = _offset(position, code, rule, levels)
                code += _step(offset, limit, _uniform(_state(key, np.uint64(i))))
            codes[row, place] = code
            error = _error(weight, code, scales[b], rule, levels)
            errors[row, first + column] = error
            later, weave = due[column + 1 :], factors[group, column, column + 1 :]
            for j in range(later.size):
                later[j] = _fed(later[j], error, weave[j])
