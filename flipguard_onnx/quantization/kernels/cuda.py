"""`protocol.Kernels` on an NVIDIA GPU, with the same results as `cpu`.

Host arrays go to the device tile by tile, so that a tensor may be larger than its memory, over two
streams: while one computes, the other copies. One thread takes one weight (`draw_with_feedback`:
one row).

Equal bits need correctly rounded divisions (no `fastmath`) and no product fused with a sum: in
`scalar` no float32 product is an operand of a sum.
"""

import itertools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from numba import cuda

from . import scalar
from .protocol import Extremes

STREAMS = 2

MAX_STEPS = 8  # as in `cpu`

_device = cuda.jit(device=True)

_value = _device(scalar.value)

_pattern = _device(scalar.pattern)

_next_pattern = _device(scalar.next_pattern)

_ordered = _device(scalar.ordered)

_position = _device(scalar.position)

_is_free = _device(scalar.is_free)

_ends = _device(scalar.ends)

_level = _device(scalar.level)

_offset = _device(scalar.offset)

_edge = _device(scalar.edge)

_at_an_edge = _device(scalar.at_an_edge)

_behind = _device(scalar.behind)

_lands = _device(scalar.lands)

_just_past = _device(scalar.just_past)

_state = _device(scalar.state)

_uniform = _device(scalar.uniform)

_step = _device(scalar.step)

_error = _device(scalar.error)

_within_grid = _device(scalar.within_grid)

_take_over = _device(scalar.take_over)


class SharedWeights(NamedTuple):
    """The part of `protocol.StoredWeights` that every tile needs."""

    form: int
    cols: int
    block_size: int


class SharedPanel(NamedTuple):
    """The part of a `protocol.Panel` that every tile needs. rows: of the whole tensor."""

    factors: npt.NDArray[np.float32]
    order: npt.NDArray[np.int64]
    first: int
    rows: int


@dataclass(frozen=True)
class CudaKernels:
    """The kernels; arguments as in `protocol.Kernels`.

    threads: per thread block; no kernel shares memory, so any multiple of 32 will do. tile: weights
    on the device at a time, in each stream.
    """

    threads: int = 256
    tile: int = 1 << 22

    device = "cuda"

    def extremes(self, weights, found):
        keys = _no_extremes(found.lowest.size)
        self._launch(extremes, [_shared(weights), keys], [weights.patterns])
        _read_extremes(keys, found)

    def analyze(self, weights, scales, levels, codes, offsets):
        shared = [_shared(weights), scales, levels]
        self._launch(analyze, shared, [weights.patterns], filled=[codes, offsets])

    def draw(self, weights, scales, levels, random, nearest, codes):
        shared = [_shared(weights), scales, levels, random]
        self._launch(draw, shared, [weights.patterns], filled=[nearest, codes])

    def move_weights(self, weights, scales, levels, nearest, offsets, codes):
        shared = [_shared(weights), scales, levels]
        self._launch(move_weights, shared, [nearest, offsets], changed=[weights.patterns, codes])

    def check(self, before, after, scales, levels, nearest, offsets, codes, found, faults):
        keys, counts = _no_extremes(found.lowest.size), cuda.to_device(np.zeros(2, np.int64))
        shared = [_shared(after), scales, levels, keys, counts]
        inputs = [before.patterns, after.patterns, nearest, offsets, codes]
        self._launch(check, shared, inputs)
        counts.copy_to_host(faults)
        _read_extremes(keys, found)

    def draw_with_feedback(self, weights, scales, levels, panel, random, codes, errors):
        shared_panel = SharedPanel(panel.factors, panel.order, panel.first, len(codes))
        shared = [_shared(weights), scales, levels, shared_panel, random]
        inputs = [weights.patterns.reshape(codes.shape), panel.carried]
        self._launch(draw_with_feedback, shared, inputs, changed=[codes, errors])

    def _launch(self, kernel, shared, inputs, changed=(), filled=()):
        """Run `kernel(start, *shared, *inputs, *changed, *filled)` over all tiles.

        Arrays in the last three, of the same length, are cut into tiles, one thread per first
        index; `start` is the tile's. changed: copied in and out; filled: out only.
        """
        count = len(inputs[0])
        size = min(count, max(1, self.tile * count // inputs[0].size))
        shared = [_on_device(x) for x in shared]
        tiles = range(0, count, size)
        lanes = [_Lane(size, self.threads, inputs, changed, filled) for _ in tiles[:STREAMS]]
        for start, lane in zip(tiles, itertools.cycle(lanes), strict=False):
            lane.finish()
            lane.begin(kernel, shared, start, min(start + size, count))
        for lane in lanes:
            lane.finish()


def _shared(weights):
    return SharedWeights(weights.form, weights.cols, weights.block_size)


def _no_extremes(count):
    """Keys that any weight replaces: of the smallest and of the largest of every block."""
    keys = (cuda.to_device(np.full(count, x, np.int32)) for x in (2**31 - 1, -(2**31)))
    return Extremes(*keys)


def _read_extremes(keys, found):
    for key, filled in zip(keys, found, strict=True):
        filled[:] = scalar.ordered(key.copy_to_host()).view(np.float32)


def _on_device(x):
    """The argument with its arrays, in a NamedTuple or not, on the device."""
    if isinstance(x, tuple):
        return type(x)(*map(_on_device, x))
    return cuda.to_device(x) if isinstance(x, np.ndarray) else x


class _Lane:
    """A stream with room for one tile: on the device, and in page-locked memory to copy from."""

    def __init__(self, size, threads, inputs, changed, filled):
        self._threads = threads
        self._stream = cuda.stream()
        self._hosts = [*inputs, *changed, *filled]
        shapes = [((size, *host.shape[1:]), host.dtype) for host in self._hosts]
        self._locked = [cuda.pinned_array(*shape) for shape in shapes]
        self._devices = [cuda.device_array(*shape) for shape in shapes]
        self._inputs = range(len(inputs) + len(changed))
        self._outputs = range(len(inputs), len(self._hosts))
        self._tile = slice(0)

    def begin(self, kernel, shared, start, stop):
        self._tile = slice(start, stop)
        count = stop - start
        devices = [device[:count] for device in self._devices]
        for i in self._inputs:
            self._locked[i][:count] = self._hosts[i][self._tile]
            devices[i].copy_to_device(self._locked[i][:count], stream=self._stream)
        blocks = (count + self._threads - 1) // self._threads
        kernel[blocks, self._threads, self._stream](start, *shared, *devices)
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
    blocks_per_row = (cut.cols + cut.block_size - 1) // cut.block_size
    return (i // cut.cols) * blocks_per_row + (i % cut.cols) // cut.block_size


@_device
def _note_extremes(value, b, keys):
    """Few weights are past what is known of their block, so few wait for each other."""
    key = _ordered(np.int32(np.float32(value).view(np.int32)))
    if key < keys.lowest[b]:
        cuda.atomic.min(keys.lowest, b, key)
    if key > keys.highest[b]:
        cuda.atomic.max(keys.highest, b, key)


@cuda.jit
def extremes(start, tensor, keys, patterns):
    i = cuda.grid(1)
    if i < patterns.size:
        _note_extremes(_value(patterns[i], tensor.form), _block_of(start + i, tensor), keys)


@cuda.jit
def analyze(start, tensor, scales, levels, patterns, codes, offsets):
    i = cuda.grid(1)
    if i < patterns.size:
        b = _block_of(start + i, tensor)
        value = _value(patterns[i], tensor.form)
        lowest, highest = _ends(scales.zero[b], levels)
        position = _position(value, scales.operand[b], levels.rule, lowest, highest)
        level = _level(position, levels.rule, lowest, levels)
        offset = _offset(position, level, levels.rule, levels)
        codes[i] = level + np.int32(scales.zero[b])
        offsets[i] = offset if _is_free(value, scales.low[b], scales.high[b]) else scalar.ZERO


@cuda.jit
def draw(start, tensor, scales, levels, random, patterns, nearest, codes):
    i = cuda.grid(1)
    if i < patterns.size:
        b = _block_of(start + i, tensor)
        value = _value(patterns[i], tensor.form)
        zero, (lowest, highest) = np.int32(scales.zero[b]), _ends(scales.zero[b], levels)
        position = _position(value, scales.operand[b], levels.rule, lowest, highest)
        level = _level(position, levels.rule, lowest, levels)
        nearest[i] = level + zero
        if _is_free(value, scales.low[b], scales.high[b]):
            noise = _uniform(_state(random.key, random.first + np.uint64(start + i)))
            level += _step(_offset(position, level, levels.rule, levels), random.limit, noise)
        codes[i] = level + zero


@cuda.jit
def move_weights(start, tensor, scales, levels, nearest, offsets, patterns, codes):
    i = cuda.grid(1)
    if i < patterns.size and (codes[i] != nearest[i] or _at_an_edge(offsets[i])):
        b = _block_of(start + i, tensor)
        rule = levels.rule
        zero, (lowest, highest) = np.int32(scales.zero[b]), _ends(scales.zero[b], levels)
        wanted = codes[i] - zero
        other = _behind(nearest[i] - zero, wanted, offsets[i])
        boundary, direction = _edge(other, wanted, rule, levels)
        target = _just_past(boundary, direction) * scales.scale[b]
        upward = (direction > scalar.ZERO) == (scales.scale[b] > scalar.ZERO)
        there = _value(patterns[i], tensor.form)
        if _lands(there, target, upward, scales.low[b], scales.high[b]):
            return
        bits = _pattern(target, tensor.form)
        found = False
        for _ in range(MAX_STEPS):
            value = _value(bits, tensor.form)
            position = _position(value, scales.operand[b], rule, lowest, highest)
            right = _level(position, rule, lowest, levels) == wanted
            found = right and _lands(value, target, upward, scales.low[b], scales.high[b])
            if found:
                break
            bits = _next_pattern(bits, upward, tensor.form)
        if found:
            patterns[i] = bits
        else:
            codes[i] = nearest[i]


@cuda.jit
def check(start, tensor, scales, levels, keys, faults, before, after, nearest, offsets, codes):
    i = cuda.grid(1)
    if i < after.size:
        b = _block_of(start + i, tensor)
        value = _value(after[i], tensor.form)
        _note_extremes(value, b, keys)
        lowest, highest = _ends(scales.zero[b], levels)
        position = _position(value, scales.operand[b], levels.rule, lowest, highest)
        level = _level(position, levels.rule, lowest, levels)
        if level + np.int32(scales.zero[b]) != codes[i]:
            cuda.atomic.add(faults, 0, 1)
        if before[i] != after[i] and nearest[i] == codes[i] and not _at_an_edge(offsets[i]):
            cuda.atomic.add(faults, 1, 1)


@cuda.jit
def draw_with_feedback(
    start, tensor, scales, levels, panel, random, patterns, carried, codes, errors
):
    row = cuda.grid(1)
    if row < len(codes):
        rule = levels.rule
        factors, first = panel.factors, panel.first
        group = (start + row) // (panel.rows // factors.shape[0])
        for k in range(factors.shape[1]):
            column = panel.order[group, k]
            i = (start + row) * codes.shape[1] + column
            b = _block_of(i, tensor)
            weight = _value(patterns[row, column], tensor.form)
            free = _is_free(weight, scales.low[b], scales.high[b])
            scale, operand = scales.scale[b], scales.operand[b]
            lowest, highest = _ends(scales.zero[b], levels)
            due = np.float64(carried[row, k])
            for j in range(k):
                due = _take_over(due, errors[row, first + j], factors[group, j, k])
            position = _position(weight, operand, rule, lowest, highest)
            if free:
                change = _within_grid(np.float32(due), position, scale, lowest, highest)
                position = _position(weight + change, operand, rule, lowest, highest)
            level = _level(position, rule, lowest, levels)
            if free:
                noise = _uniform(_state(random.key, random.first + np.uint64(i)))
                level += _step(_offset(position, level, rule, levels), random.limit, noise)
            codes[row, column] = level + np.int32(scales.zero[b])
            errors[row, first + k] = _error(weight, level, scale, rule, levels)
