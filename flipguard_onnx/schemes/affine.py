"""Affine grids, symmetric: level = code * scale, one scale per block."""

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from ..kernels import scalar
from .blocks import Blocks, Codes, Floats, Grid, Margins, finite_reciprocal


@dataclass(frozen=True)
class AffineGrid(Grid):
    """Integer codes from `lowest` to `highest`, rounded by `rule` (see `kernels.scalar`)."""

    lowest: int
    highest: int
    rule: int

    family = "affine"

    def levels_for(self, kernel: str) -> tuple[Any, ...]:
        if kernel == "cross":
            return ()
        return self.rule, np.float32(self.lowest), np.float32(self.highest)

    def decode(self, codes: Codes) -> Floats:
        return codes.astype(np.float32) * self.blocks.spread(self.scale)

    def errors(self, margins: Margins) -> Floats:
        return np.abs(margins.offsets)


@dataclass(frozen=True)
class Int8:
    """Signed 8 bits, -127..127: onnxruntime's symmetric QInt8, bit for bit."""

    name: str = "int8"
    bits: int = 8
    block_size: int | None = None  # a whole row (granularity "channel") or tensor

    def fit(
        self, weights: Floats, blocks: Blocks, storage: np.dtype[Any], backend: ModuleType
    ) -> AffineGrid:
        """scale = 2 * absmax / 254 in float64, then cast to the weights' own type.

        Source: `compute_scale_zp` in onnxruntime.quantization.quant_utils.
        """
        low, high = blocks.extremes(weights, backend)
        absmax = np.maximum(np.abs(low), np.abs(high))
        exact = 2 * absmax.astype(np.float64) / 254
        scale = exact.astype(storage).astype(np.float32)
        # onnxruntime uses float16's subnormal scales, but not float32's
        degenerate = scale == 0 if storage == np.float16 else exact < np.finfo(np.float32).tiny
        scale[degenerate] = 1.0
        absmax[degenerate] = 0.0  # such a scale says nothing of its weights: all stay
        # a subnormal scale may be rounded so far down that its extremes lie past 127
        past_127 = np.any(np.rint(absmax / scale) > 127)
        return AffineGrid(
            blocks,
            scale=scale,
            operand=scale,
            absmax=absmax,
            lowest=-128 if past_127 else -127,  # onnxruntime clips codes to -128..127
            highest=127,
            rule=scalar.DIVIDE_HALF_EVEN,
        )


@dataclass(frozen=True)
class Int4:
    """Signed 4 bits, -8..7, the extreme of each block on -8: onnxruntime's 4-bit QDQ form."""

    name: str = "int4"
    bits: int = 4
    block_size: int | None = 32

    def fit(
        self, weights: Floats, blocks: Blocks, storage: np.dtype[Any], backend: ModuleType
    ) -> AffineGrid:
        """scale = -extreme / 8, where the extreme keeps its sign; a tie goes to the negative one.

        The reciprocal is taken of the scale as it is stored, in the weights' own type.
        """
        low, high = blocks.extremes(weights, backend)
        extreme = np.where(np.abs(high) > np.abs(low), high, low)
        scale = np.divide(extreme, -8, dtype=np.float32).astype(storage).astype(np.float32)
        operand, usable = finite_reciprocal(scale)
        absmax = np.where(usable, np.abs(extreme), np.float32(0))
        return AffineGrid(
            blocks,
            scale=scale,
            operand=operand,
            absmax=absmax,
            lowest=-8,
            highest=7,
            rule=scalar.MULTIPLY_HALF_AWAY,
        )
