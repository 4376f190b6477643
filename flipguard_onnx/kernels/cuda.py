"""The kernels on an NVIDIA GPU: the twin of `cpu`, with the same names, arguments and results.

Every function takes the same host arrays, copies them to the device, runs one thread per weight
(`extremes`: per block) and copies the results back into the arrays it was given to fill.

Equal bits need correctly rounded divisions (no `fastmath`) and no product fused with a following
sum. cuda.jit has no switch for the latter; the compiled code (sm_80, sm_90) has none, because every
product here is also used on its own.
"""

import numpy as np
from numba import cuda

from . import scalar

THREADS = 256  # per thread block; no kernel shares memory, so any multiple of 32 would do

_device = cuda.jit(device=True)

_affine_position = _device(scalar.affine_position)
_affine_code = _device(scalar.affine_code)
_affine_offset = _device(scalar.affine_offset)
_codebook_code = _device(scalar.codebook_code)
_codebook_offset = _device(scalar.codebook_offset)
_just_past = _device(scalar.just_past)
_uniform = _device(scalar.uniform)
_step = _device(scalar.step)
_fed = _device(scalar.fed)


def extremes(weights, cols, block, lowest, highest):
    _launch(_extremes, [weights, cols, block], [lowest, highest])


def encode_affine(weights, cols, block, operands, rule, low, high, codes):
    _launch(_encode_affine, [weights, cols, block, operands, rule, low, high], [codes])


def analyze_affine(weights, cols, block, operands, absmax, rule, low, high, codes, offsets):
    given = [weights, cols, block, operands, absmax, rule, low, high]
    _launch(_analyze_affine, given, [codes, offsets])


def cross_affine(weights, cols, block, scales, codes, wanted):
    _launch(_cross_affine, [cols, block, scales, codes, wanted], [weights])


def feed_affine(
    weights, cols, block, operands, scales, absmax, rule, low, high,
    length, carried, factors, order, first, key, limit, codes, errors,
):  # fmt: skip
    given = [weights, cols, block, operands, scales, absmax, rule, low, high]
    given += [length, carried, factors, order, first, key, limit]
    _launch(_feed_affine, given, [codes, errors], threads=len(errors))


def encode_codebook(weights, cols, block, operands, pivots, codes):
    _launch(_encode_codebook, [weights, cols, block, operands, pivots], [codes])


def analyze_codebook(weights, cols, block, operands, absmax, pivots, levels, codes, offsets):
    given = [weights, cols, block, operands, absmax, pivots, levels]
    _launch(_analyze_codebook, given, [codes, offsets])


def cross_codebook(weights, cols, block, scales, pivots, codes, wanted):
    _launch(_cross_codebook, [cols, block, scales, pivots, codes, wanted], [weights])


def feed_codebook(
    weights, cols, block, operands, scales, absmax, pivots, levels,
    length, carried, factors, order, first, key, limit, codes, errors,
):  # fmt: skip
    given = [weights, cols, block, operands, scales, absmax, pivots, levels]
    given += [length, carried, factors, order, first, key, limit]
    _launch(_feed_codebook, given, [codes, errors], threads=len(errors))


def draw(offsets, key, limit, flips):
    _launch(_draw, [offsets, key, limit], [flips])


def _launch(kernel, given, filled, threads=None):
    """Run `kernel`, by default a thread for every element of `filled`, the arrays it changes."""
    size = filled[0].size if threads is None else threads
    if size:
        inputs = [cuda.to_device(x) if isinstance(x, np.ndarray) else x for x in given]
        outputs = [cuda.to_device(x) for x in filled]
        kernel[(size + THREADS - 1) // THREADS, THREADS](*inputs, *outputs)
        for host, device in zip(filled, outputs, strict=True):
            device.copy_to_host(host)


@_device
def _block_of(i, cols, block):
    """Number of the block that weight `i` belongs to."""
    per_row = (cols + block - 1) // block
    return (i // cols) * per_row + (i % cols) // block


@cuda.jit
def _extremes(weights, cols, block, lowest, highest):
    b = cuda.grid(1)
    if b < lowest.size:
        per_row = (cols + block - 1) // block
        row = b // per_row
        start = row * cols + (b % per_row) * block
        low = high = weights[start]
        for i in range(start, min(start + block, (row + 1) * cols)):
            low = min(low, weights[i])
            high = max(high, weights[i])
        lowest[b] = low
        highest[b] = high


@cuda.jit
def _encode_affine(weights, cols, block, operands, rule, low, high, codes):
    i = cuda.grid(1)
    if i < codes.size:
        position = _affine_position(weights[i], operands[_block_of(i, cols, block)], rule)
        codes[i] = _affine_code(position, rule, low, high)


@cuda.jit
def _analyze_affine(weights, cols, block, operands, absmax, rule, low, high, codes, offsets):
    i = cuda.grid(1)
    if i < codes.size:
        b = _block_of(i, cols, block)
        position = _affine_position(weights[i], operands[b], rule)
        code = _affine_code(position, rule, low, high)
        codes[i] = code
        free = abs(weights[i]) < absmax[b]
        offsets[i] = _affine_offset(position, code, low, high) if free else scalar.ZERO


@cuda.jit
def _cross_affine(cols, block, scales, codes, wanted, weights):
    i = cuda.grid(1)
    if i < weights.size and wanted[i] != codes[i]:
        direction = np.float32(1.0 if wanted[i] > codes[i] else -1.0)
        edge = np.float32(wanted[i]) - direction * scalar.HALF
        weights[i] = _just_past(edge, direction) * scales[_block_of(i, cols, block)]


@cuda.jit
def _feed_affine(
    weights, cols, block, operands, scales, absmax, rule, low, high,
    length, carried, factors, order, first, key, limit, codes, errors,
):  # fmt: skip
    row = cuda.grid(1)
    rows = len(errors)
    if row < rows:
        group = row // (rows // factors.shape[0])
        weave = factors[group]
        for column in range(factors.shape[1]):
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


@cuda.jit
def _encode_codebook(weights, cols, block, operands, pivots, codes):
    i = cuda.grid(1)
    if i < codes.size:
        codes[i] = _codebook_code(weights[i] * operands[_block_of(i, cols, block)], pivots)


@cuda.jit
def _analyze_codebook(weights, cols, block, operands, absmax, pivots, levels, codes, offsets):
    i = cuda.grid(1)
    if i < codes.size:
        b = _block_of(i, cols, block)
        position = weights[i] * operands[b]
        code = _codebook_code(position, pivots)
        codes[i] = code
        free = abs(weights[i]) < absmax[b]
        offsets[i] = _codebook_offset(position, code, levels) if free else scalar.ZERO


@cuda.jit
def _cross_codebook(cols, block, scales, pivots, codes, wanted, weights):
    i = cuda.grid(1)
    if i < weights.size:
        scale = scales[_block_of(i, cols, block)]
        if wanted[i] > codes[i]:
            weights[i] = _just_past(pivots[wanted[i] - 1], scalar.ONE) * scale
        elif wanted[i] < codes[i]:
            weights[i] = _just_past(pivots[wanted[i]], -scalar.ONE) * scale


@cuda.jit
def _feed_codebook(
    weights, cols, block, operands, scales, absmax, pivots, levels,
    length, carried, factors, order, first, key, limit, codes, errors,
):  # fmt: skip
    row = cuda.grid(1)
    rows = len(errors)
    if row < rows:
        group = row // (rows // factors.shape[0])
        weave = factors[group]
        for column in range(factors.shape[1]):
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


@cuda.jit
def _draw(offsets, key, limit, flips):
    i = cuda.grid(1)
    if i < flips.size:
        flips[i] = _step(offsets[i], limit, _uniform(key, np.uint64(i))) != 0
