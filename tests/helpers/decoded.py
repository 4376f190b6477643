"""Weights as they come out of quantized formats: every block on a grid, decoded to float32.

Formats of GGUF after ggml's `ggml-quants.c` (blocks of 32; of the K-quants, super-blocks of 256),
with plain rounding instead of its searches; GPTQ and AWQ store groups with zero points.
"""

import numpy as np


def symmetric(weights, block, levels, scales=np.float16):
    """Q8_0 (levels 255), Q6_K's blocks (64): scale = absmax / (levels / 2)."""
    blocks = weights.reshape(-1, block)
    half = (levels - 1) // 2
    step = _stored(np.abs(blocks).max(axis=1, keepdims=True) / half, scales)
    return (_codes(blocks, step, -half, half) * step).reshape(weights.shape)


def extreme(weights, block, levels, scales=np.float16):
    """Q4_0 (levels 16), Q5_0 (32): the extreme of a block on the lowest code."""
    blocks = weights.reshape(-1, block)
    place = np.abs(blocks).argmax(axis=1)[:, None]
    step = _stored(np.take_along_axis(blocks, place, axis=1) / -(levels // 2), scales)
    return (_codes(blocks, step, -(levels // 2), levels // 2 - 1) * step).reshape(weights.shape)


def offset(weights, block, levels, scales=np.float16):
    """Q4_1 (levels 16), Q5_1 (32): from the smallest weight of a block to the largest."""
    blocks = weights.reshape(-1, block)
    lowest = blocks.min(axis=1, keepdims=True)
    step = _stored((blocks.max(axis=1, keepdims=True) - lowest) / (levels - 1), scales)
    lowest = _stored(lowest, scales)
    return (_codes(blocks - lowest, step, 0, levels - 1) * step + lowest).reshape(weights.shape)


def zero_point(weights, block, levels, scales=np.float16):
    """GPTQ, AWQ: a scale and an integer zero point per group."""
    blocks = weights.reshape(-1, block)
    low = np.minimum(blocks.min(axis=1, keepdims=True), 0)
    step = _stored((np.maximum(blocks.max(axis=1, keepdims=True), 0) - low) / (levels - 1), scales)
    zero = np.rint(-low / step)
    return ((_codes(blocks, step, -zero, levels - 1 - zero)) * step).reshape(weights.shape)


def k_quant(weights, block, levels, with_minimum):
    """Q4_K (32, 16, with a minimum), Q6_K (16, 64): the blocks' scales are quantized as well."""
    blocks = weights.reshape(-1, 256 // block, block)
    if not with_minimum:
        steps = np.abs(blocks).max(axis=2, keepdims=True) / (levels // 2)
        unit = _stored(steps.max(axis=1, keepdims=True) / 127, np.float16)
        step = np.maximum(np.rint(steps / unit), 1) * unit
        return (_codes(blocks, step, -(levels // 2), levels // 2 - 1) * step).reshape(weights.shape)
    lowest = -np.minimum(blocks.min(axis=2, keepdims=True), 0)
    steps = (blocks.max(axis=2, keepdims=True) + lowest) / (levels - 1)
    units = [_stored(x.max(axis=1, keepdims=True) / 63, np.float16) for x in (steps, lowest)]
    step, low = (
        np.maximum(np.rint(x / u), 1) * u for x, u in zip((steps, lowest), units, strict=True)
    )
    return (_codes(blocks + low, step, 0, levels - 1) * step - low).reshape(weights.shape)


def _stored(values, scales):
    stored = values.astype(scales).astype(np.float32)
    return np.where(stored == 0, np.float32(1), stored)


def _codes(values, step, low, high):
    return np.clip(np.rint(values / step), low, high).astype(np.float32)


FORMATS = {  # name -> weights that a row is divided into, and the format
    "Q4_0": (32, lambda w: extreme(w, 32, 16)),
    "Q4_1": (32, lambda w: offset(w, 32, 16)),
    "Q5_0": (32, lambda w: extreme(w, 32, 32)),
    "Q5_1": (32, lambda w: offset(w, 32, 32)),
    "Q8_0": (32, lambda w: symmetric(w, 32, 255)),
    "Q4_K": (256, lambda w: k_quant(w, 32, 16, True)),
    "Q6_K": (256, lambda w: k_quant(w, 16, 64, False)),
    "GPTQ 64": (64, lambda w: zero_point(w, 64, 16)),
    "GPTQ 128": (128, lambda w: zero_point(w, 128, 16)),
    "AWQ 128": (128, lambda w: zero_point(w, 128, 16, np.float32)),
    "GPTQ 256": (256, lambda w: zero_point(w, 256, 16)),
    "8 bits, 128": (128, lambda w: zero_point(w, 128, 256, np.float32)),
    "int8 row": (1, lambda w: symmetric(w, w.shape[-1], 255, np.float32)),
}
