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


def extremes(weights, cols, block, lowest, highest):
    _launch(_extremes, [weights, cols, block], [lowest, highest])


def encode_affine(weights, cols, block, operands, rule, low, high, codes):
    _launch(_encode_affine, [weights, cols, block, operands, rule, low, high], [codes])


def analyze_affine(weights, cols, block, operands, absmax, rule, low, high, codes, offsets):
    given = [weights, cols, block, operands, absmax, rule, low, high]
    _launch(_analyze_affine, given, [codes, offsets])


def cross_affine(weights, cols, block, scales, codes, offsets, flips):
    _launch(_cross_affine, [cols, block, scales, codes, offsets, flips], [weights])


def encode_codebook(weights, cols, block, operands, pivots, codes):
    _launch(_encode_codebook, [weights, cols, block, operands, pivots], [codes])


def analyze_codebook(weights, cols, block, operands, absmax, pivots, levels, codes, offsets):
    given = [weights, cols, block, operands, absmax, pivots, levels]
    _launch(_analyze_codebook, given, [codes, offsets])


def cross_codebook(weights, cols, block, scales, pivots, codes, offsets, flips):
    _launch(_cross_codebook, [cols, block, scales, pivots, codes, offsets, flips], [weights])


def draw(offsets, key, limit, flips):
    _launch(_draw, [offsets, key, limit], [flips])


def _launch(kernel, given, filled):
    """Run `kernel`, one thread for every element of `filled`, the arrays it changes."""
    size = filled[0].size
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
def _cross_affine(cols, block, scales, codes, offsets, flips, weights):
    i = cuda.grid(1)
    if i < weights.size and flips[i]:
        half = scalar.HALF if offsets[i] > scalar.ZERO else -scalar.HALF
        target = _just_past(np.float32(codes[i]) + half, offsets[i])
        weights[i] = target * scales[_block_of(i, cols, block)]


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
def _cross_codebook(cols, block, scales, pivots, codes, offsets, flips, weights):
    i = cuda.grid(1)
    if i < weights.size and flips[i]:
        pivot = pivots[codes[i]] if offsets[i] > scalar.ZERO else pivots[codes[i] - 1]
        weights[i] = _just_past(pivot, offsets[i]) * scales[_block_of(i, cols, block)]


@cuda.jit
def _draw(offsets, key, limit, flips):
    i = cuda.grid(1)
    if i < flips.size:
        chance = abs(offsets[i])
        flips[i] = chance > limit and _uniform(key, np.uint64(i)) < chance
