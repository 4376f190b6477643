"""Weights to quantize: named corner cases, and a hypothesis strategy for any."""

import ml_dtypes
import numpy as np
from hypothesis import strategies as st

from flipguard_onnx.quantization.rounding import largest_sound
from tests.helpers import naive

FLOATS = [np.float32, np.float16]
ALL_FLOATS = [*FLOATS, ml_dtypes.bfloat16]


def random(rows, cols, scale=0.05, seed=0):
    return scale * np.random.default_rng(seed).standard_normal((rows, cols))


def denormals(rows, cols):
    """So small that 1 / absmax overflows; none is zero, for 0 * inf is not a number."""
    w = random(rows, cols, 1e-40)
    return w + np.copysign(1e-40, w)


def with_values(values, rows=2, cols=64):
    """A random tensor whose first weights are `values`."""
    w = random(rows, cols)
    w.flat[: len(values)] = values
    return w


def halves():
    """Exact half steps of int8 (row 0: scale 1/128) and int4 (row 1: scale 1/4 in each block)."""
    w = np.zeros((2, 256))
    w[0] = np.append((np.arange(-127, 127) + 0.5) / 128, [127 / 128, 0])
    w[1] = np.tile(np.append([-2.0], (np.arange(-7, 8) + 0.5) / 4), 16)
    return w


def near_halves():
    """The floats nearest to half steps of int8, under scales that are no power of two."""
    steps = np.append((np.arange(-127, 127) + 0.5), [127, 0])
    return np.outer(0.01 * np.arange(1, 9) ** 0.7, steps)


def pivots():
    """Every pivot of both codebooks, both signs, and the float16 and float32 beside it."""
    p = np.array(naive.NF4_PIVOTS + naive.FP4_PIVOTS, np.float32)
    p = np.concatenate([np.nextafter(p, -9), p, np.nextafter(p, 9)])
    p = np.concatenate([p, -p, p.astype(np.float16).astype(np.float32)])
    w = np.zeros((-(-p.size // 63), 64), np.float32)
    w[:, 0] = 1
    w[:, 1:].flat[: p.size] = p
    return w


TENSORS = {
    "random": lambda: random(16, 128),
    "odd sizes": lambda: random(7, 45),
    "ragged last block": lambda: random(3, 70),
    "several pieces": lambda: random(2, 9001),
    "single row": lambda: random(1, 130),
    "single weight": lambda: random(1, 1),
    "single column": lambda: random(33, 1),
    "all zero": lambda: np.zeros((2, 64)),
    "all-zero block": lambda: np.concatenate([random(1, 128), np.zeros((1, 128))]),
    "denormal block": lambda: np.concatenate([random(2, 64), denormals(2, 64)]),
    "float16 denormals": lambda: random(4, 64, 4e-7),
    "coarse float16 scales": lambda: random(4, 64, 4e-6),
    "smallest positive": lambda: with_values([1e-45, -1e-45, 6e-8, -6e-8], 1, 4),
    "huge outlier": lambda: with_values([3e38, 1e-30, -1.0]),
    "large": lambda: random(2, 64, 9e3),
    "half steps": halves,
    "near half steps": near_halves,
    "both extremes tie": lambda: with_values([0.75, -0.75]),
    "negative zero": lambda: with_values([-0.0, 0.0, -1e-9, 1e-9]),
    "pivots": pivots,
}


def clipped(weights, dtype):
    limit = float(ml_dtypes.finfo(dtype).max)
    return np.clip(weights, -limit, limit).astype(dtype)


def tensor(name, dtype):
    return clipped(TENSORS[name](), dtype)


@st.composite
def tensors(draw):
    """Random weights of any magnitude, some replaced by ties, exact half steps and wild values."""
    dtype = draw(st.sampled_from(FLOATS))
    wide = dtype == np.float32
    rows, cols = draw(st.integers(1, 3)), draw(st.integers(1, 70))
    scale = 10.0 ** draw(st.integers(-36, 36) if wide else st.integers(-8, 4))
    weights = random(rows, cols, scale, seed=draw(st.integers(0, 9)))
    tame = st.integers(-254, 254).map(lambda n: n / 256 * scale)
    limits = {"width": 32 if wide else 16, "allow_subnormal": not wide}
    wild = st.floats(allow_nan=False, allow_infinity=False, **limits)
    chosen = draw(st.lists(st.one_of(tame, wild), max_size=min(20, weights.size)))
    weights.flat[: len(chosen)] = chosen
    limit = float(largest_sound(np.dtype(dtype)))
    return np.clip(weights, -limit, limit).astype(dtype)
