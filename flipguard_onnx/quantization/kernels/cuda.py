"""The kernels on an NVIDIA GPU: the twin of `cpu`, with the same names, arguments and results.

Host arrays go to the device tile by tile, so that a tensor may be larger than its memory, over two
streams: while one computes, the other copies. One thread takes one weight (`feed`: one row).

Equal bits need correctly rounded divisions (no `fastmath`) and no product fused with a following
sum: `scalar` has no sum of float32 that such a product goes into.
"""

import itertools

import numpy as np
from numba import cuda

from . import scalar

THREADS = 256  # per thread block; no kernel shares memory, so any multiple of 32 would do

TILE = 1 << 22  # weights on the device at a time, in each stream

STREAMS = 2

MAX_STEPS = 8  # as in `cpu`

_device = cuda.jit(device=True)

_value = _device(scalar.value)

_pattern = _device(scalar.pattern)

_next_pattern = _device(scalar.next_pattern)

_ordered = _device(scalar.ordered)

_position = _device(scalar.position)

_code = _device(scalar.code)

_offset = _device(scalar.offset)

_edge = _device(scalar.edge)

_lands = _device(scalar.lands)

_just_past = _device(scalar.just_past)

_state = _device(scalar.state)

_uniform = _device(scalar.uniform)

_step = _device(scalar.step)

_error = _device(scalar.error)

_fed = _device(scalar.fed)


def extremes(weights, form, cut, lowest, highest):
    keys = _no_extremes(lowest.size)
    _launch(_extremes, [form, cut, *keys], [weights])
    _read_extremes(keys, lowest, highest)


def analyze(weights, form, cut, operands, absmax, levels, codes, offsets):
    shared = [form, cut, operands, absmax, levels]
    _launch(_analyze, shared, [weights], filled=[codes, offsets])


def draw(weights, form, cut, operands, absmax, levels, key, first, limit, plain, codes):
    shared = [form, cut, operands, absmax, levels, key, first, limit]
    _launch(_draw, shared, [weights], filled=[plain, codes])


def place(form, cut, operands, scales, absmax, levels, plain, weights, codes):
    shared = [form, cut, operands, scales, absmax, levels]
    _launch(_place, shared, [plain], changed=[weights, codes])


def check(
    before, after, form, cut, operands, absmax, levels, plain, codes, lowest, highest, faults
):
    keys, counts = _no_extremes(lowest.size), cuda.to_device(np.zeros(2, np.int64))
    shared = [form, cut, operands, absmax, levels, *keys, counts]
    _launch(_check, shared, [before, after, plain, codes])
    counts.copy_to_host(faults)
    _read_extremes(keys, lowest, highest)


def feed(
    weights, form, cut, operands, scales, absmax, levels,
    carried, factors, order, first, key, limit, codes, errors,
):  # fmt: skip
    shared = [form, cut, operands, scales, absmax, levels]
    shared += [len(codes), factors, order, first, key, limit]
    given = [weights.reshape(codes.shape), carried]
    _launch(_feed, shared, given, changed=[codes, errors])


def _no_extremes(count):
    """Keys that any weight replaces: of the smallest and of the largest of every block."""
    return [cuda.to_device(np.full(count, x, np.int32)) for x in (2**31 - 1, -(2**31))]


def _read_extremes(keys, lowest, highest):
    for key, filled in zip(keys, (lowest, highest), strict=True):
        filled[:] = scalar.ordered(key.copy_to_host()).view(np.float32)


def _launch(kernel, shared, given, changed=(), filled=()):
    """Run `kernel(start, *shared, *given, *changed, *filled)` over all tiles.

    Arrays in the last three, of the same length, are cut into tiles, one thread per first index;
    `start` is the tile's. changed: copied in and out; filled: out only.
    """
    count = len(given[0])
    size = min(count, max(1, TILE * count // given[0].size))
    shared = [_on_device(x) for x in shared]
    tiles = range(0, count, size)
    lanes = [_Lane(size, given, changed, filled) for _ in tiles[:STREAMS]]
    for start, lane in zip(tiles, itertools.cycle(lanes), strict=False):
        lane.finish()
        lane.begin(kernel, shared, start, min(start + size, count))
    for lane in lanes:
        lane.finish()


def _on_device(x):
    if isinstance(x, scalar.Levels):
        return scalar.Levels(*map(_on_device, x))
    return cuda.to_device(x) if isinstance(x, np.ndarray) else x


class _Lane:
    """A stream with room for one tile: on the device, and in page-locked memory to copy from."""

    def __init__(self, size, given, changed, filled):
        self._stream = cuda.stream()
        self._hosts = [*given, *changed, *filled]
        shapes = [((size, *host.shape[1:]), host.dtype) for host in self._hosts]
        self._locked = [cuda.pinned_array(*shape) for shape in shapes]
        self._devices = [cuda.device_array(*shape) for shape in shapes]
        self._inputs = range(len(given) + len(changed))
        self._outputs = range(len(given), len(self._hosts))
        self._tile = slice(0)

    def begin(self, kernel, shared, start, stop):
        self._tile = slice(start, stop)
        count = stop - start
        devices = [device[:count] for device in self._devices]
        for i in self._inputs:
            self._locked[i][:count] = self._hosts[i][self._tile]
            devices[i].copy_to_device(self._locked[i][:count], stream=self._stream)
        blocks = (count + THREADS - 1) // THREADS
        kernel[blocks, THREADS, self._stream](start, *shared, *devices)
        for i in self._outputs:
            devices[i].copy_to_host(self._locked[i][:count], stream=self._stream)

    def finish(self):
        self._stream.synchronize()
        count = self._tile.stop - (self._tile.start or 0)
        for i in self._outputs:
            self._hosts[i][self._tile] = self._locked[i][:count]


@_device
def _block_of(i, cut):
    """Number of the block that weight `i` belongs to."""
    cols, block = cut
    per_row = (cols + block - 1) // block
    return (i // cols) * per_row + (i % cols) // block


@_device
def _note_extremes(value, b, lowest, highest):
    """Few weights are past what is known of their block, so few wait for each other."""
    key = _ordered(np.int32(np.float32(value).view(np.int32)))
    if key < lowest[b]:
        cuda.atomic.min(lowest, b, key)
    if key > highest[b]:
        cuda.atomic.max(highest, b, key)


@cuda.jit
def _extremes(start, form, cut, lowest, highest, weights):
    i = cuda.grid(1)
    if i < weights.size:
        _note_extremes(_value(weights[i], form), _block_of(start + i, cut), lowest, highest)


@cuda.jit
def _analyze(start, form, cut, operands, absmax, levels, weights, codes, offsets):
    i = cuda.grid(1)
    if i < weights.size:
        b = _block_of(start + i, cut)
        value = _value(weights[i], form)
        position = _position(value, operands[b], levels.rule, levels)
        code = _code(position, levels.rule, levels)
        offset = _offset(position, code, levels.rule, levels)
        codes[i] = code
        offsets[i] = offset if abs(value) < absmax[b] else scalar.ZERO


@cuda.jit
def _draw(start, form, cut, operands, absmax, levels, key, first, limit, weights, plain, codes):
    i = cuda.grid(1)
    if i < weights.size:
        b = _block_of(start + i, cut)
        value = _value(weights[i], form)
        position = _position(value, operands[b], levels.rule, levels)
        code = _code(position, levels.rule, levels)
        plain[i] = code
        if abs(value) < absmax[b]:
            noise = _uniform(_state(key, first + np.uint64(start + i)))
            code += _step(_offset(position, code, levels.rule, levels), limit, noise)
        codes[i] = code


@cuda.jit
def _place(start, form, cut, operands, scales, absmax, levels, plain, weights, codes):
    i = cuda.grid(1)
    if i < weights.size and codes[i] != plain[i]:
        b = _block_of(start + i, cut)
        rule = levels.rule
        boundary, direction = _edge(plain[i], codes[i], rule, levels)
        target = _just_past(boundary, direction) * scales[b]
        upward = target > _value(weights[i], form)
        bits = _pattern(target, form)
        found = False
        for _ in range(MAX_STEPS):
            value = _value(bits, form)
            right = _code(_position(value, operands[b], rule, levels), rule, levels) == codes[i]
            found = right and _lands(value, target, upward, absmax[b])
            if found:
                break
            bits = _next_pattern(bits, upward, form)
        if found:
            weights[i] = bits
        else:
            codes[i] = plain[i]


@cuda.jit
def _check(
    start, form, cut, operands, absmax, levels, lowest, highest, faults,
    before, after, plain, codes,
):  # fmt: skip
    i = cuda.grid(1)
    if i < after.size:
        b = _block_of(start + i, cut)
        value = _value(after[i], form)
        _note_extremes(value, b, lowest, highest)
        position = _position(value, operands[b], levels.rule, levels)
        if _code(position, levels.rule, levels) != codes[i]:
            cuda.atomic.add(faults, 0, 1)
        if before[i] != after[i] and plain[i] == codes[i]:
            cuda.atomic.add(faults, 1, 1)


@cuda.jit
def _feed(
    start, form, cut, operands, scales, absmax, levels,
    rows, factors, order, first, key, limit, weights, carried, codes, errors,
):  # fmt: skip
    row = cuda.grid(1)
    if row < len(codes):
        rule = levels.rule
        group = (start + row) // (rows // factors.shape[0])
        for column in range(factors.shape[1]):
            place = order[group, column]
            i = (start + row) * codes.shape[1] + place
            b = _block_of(i, cut)
            weight = _value(weights[row, place], form)
            free = abs(weight) < absmax[b]
            due = np.float64(carried[row, column])
            for j in range(column):
                due = _fed(due, errors[row, first + j], factors[group, j, column])
            target = weight + np.float32(due) if free else weight
            position = _position(target, operands[b], rule, levels)
            code = _code(position, rule, levels)
            if free:
                noise = _uniform(_state(key, np.uint64(i)))
                code += _step(_offset(position, code, rule, levels), limit, noise)
            codes[row, place] = code
            errors[row, first + column] = _error(weight, code, scales[b], rule, levels)
