"""Affine grids, symmetric: level = code * scale, one scale per block."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..kernels import scalar
from ..kernels.protocol import Extremes
from .blocks import Blocks, Codes, Floats
from .grid import Grid, Margins, Scheme, finite_reciprocal

NO_TABLE = np.empty(0, np.float32)


def integers(rule: int, lowest: int, highest: int) -> scalar.Levels:
    """The integers from `lowest` to `highest` as levels."""
    ends = np.float32(lowest), np.float32(highest)
    return scalar.Levels(rule, *ends, NO_TABLE, NO_TABLE, NO_TABLE)


@dataclass(frozen=True)
class AffineGrid(Grid):
    """Codes are the integers that are the levels."""

    def decode(self, codes: Codes) -> Floats:
        return self.blocks.scaled(codes.astype(np.float32), self.scale)

    def errors(self, margins: Margins) -> Floats:
        return np.abs(margins.offsets)


@dataclass(frozen=True)
class Int8(Scheme):
    """Signed 8 bits, -127..127: onnxruntime's symmetric QInt8, bit for bit."""

    name: str = "int8"
    bits: int = 8
    block_size: int | None = None  # a whole row (granularity "channel") or tensor

    def grid(self, extremes: Extremes, blocks: Blocks, storage: np.dtype[Any]) -> AffineGrid:
        """scale = 2 * absmax / 254 in float64, then cast to the weights' own type.

        Source: `compute_scale_zp` in onnxruntime.quantization.quant_utils.
        """
        absmax = np.maximum(np.abs(extremes.lowest), np.abs(extremes.highest))
        exact = 2 * absmax.astype(np.float64) / 254
        scale = exact.astype(storage).astype(np.float32)
        # onnxruntime uses float16's subnormal scales, but not float32's
        degenerate = scale == 0 if storage == np.float16 else exact < np.finfo(np.float32).tiny
        scale[degenerate] = 1.0
        absmax[degenerate] = 0.0  # that scale is not made from the weights, so none may move
        # a subnormal scale may be rounded so far down that its extremes lie past 127
        past_127 = np.any(np.rint(absmax / scale) > 127)
        lowest = -128 if past_127 else -127  # onnxruntime clips codes to -128..127
        levels = integers(scalar.DIVIDE_HALF_EVEN, lowest, 127)
        return AffineGrid(blocks, scale=scale, operand=scale, absmax=absmax, levels=levels)


@dataclass(frozen=True)
class Int4(Scheme):
    """Signed 4 bits, -8..7, the extreme of each block on -8: onnxruntime's 4-bit QDQ form."""

    name: str = "int4"
    bits: int = 4
    block_size: int | None = 32

    def grid(self, extremes: Extremes, blocks: Blocks, storage: np.dtype[Any]) -> AffineGrid:
        """scale = -extreme / 8, where the extreme keeps its sign; of two, the negative one counts.

        The reciprocal is that of the scale as it is stored, in the weights' own type.
        Source: `BlockwiseQDQQuantizer` in onnxruntime's `mlas/lib/q4_dq.cpp`.
        """
        low, high = extremes
        extreme = np.where(np.abs(high) > np.abs(low), high, low)
        scale = np.divide(extreme, -8, dtype=np.float32).astype(storage).astype(np.float32)
        operand, usable = finite_reciprocal(scale)
        absmax = np.where(usable, np.abs(extreme), np.float32(0))
        levels = integers(scalar.MULTIPLY_HALF_AWAY, -8, 7)
        return AffineGrid(blocks, scale=scale, operand=operand, absmax=absmax, levels=levels)
