"""8-bit floats (fp8): level = float8e4m3fn * scale.

Levels are signed by magnitude: code k is the k-th float from 0 on, and -k its negative. They reach
448, with 3 bits of mantissa, so that gaps grow with the weights.
Source: "FP8 Formats for Deep Learning" (arXiv 2209.05433), and ONNX's QuantizeLinear.
"""

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from ...formats import Choice
from ..kernels import scalar
from ..kernels.protocol import Extremes, Scales
from .affine import free_scales, stored_scales
from .blocks import Blocks, Codes, Floats
from .grid import Grid, Margins, Scheme, absmax_of

LARGEST = 448

LEVELS = np.arange(127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)


class Float8Grid(Grid):
    """Codes are numbers of levels, from -126 to 126."""

    def decode(self, codes: Codes) -> Floats:
        levels = self.levels.values[codes.astype(np.int16) + scalar.MIDDLE]
        return self.blocks.scaled(levels, self.scale)

    def errors(self, margins: Margins) -> Floats:
        values = self.levels.values
        here, there = (
            values[codes.astype(np.int16) + scalar.MIDDLE]
            for codes in (margins.codes, margins.neighbours)
        )
        found: Floats = np.abs(margins.offsets) * np.abs(there - here)
        return found


@dataclass(frozen=True)
class Float8(Scheme):
    """scale = absmax / 448 in float64, then cast to the weights' own type."""

    grid_type = Float8Grid

    def grid(self, extremes: Extremes, blocks: Blocks, storage: np.dtype[Any]) -> Float8Grid:
        """Source: `FP8QTensor` of nvidia-modelopt 0.47, but for the rounding of the scale."""
        absmax = absmax_of(extremes)
        scale, degenerate = stored_scales(absmax.astype(np.float64) / LARGEST, storage)
        absmax[degenerate] = 0
        scales = Scales(scale, scale, np.zeros_like(scale), -absmax, absmax)
        return Float8Grid(blocks, scales, _table())

    def unclipped(self, extremes: Extremes, blocks: Blocks, storage: np.dtype[Any]) -> Float8Grid:
        exact = absmax_of(extremes).astype(np.float64) / LARGEST
        return Float8Grid(blocks, free_scales(exact, np.zeros_like(exact), storage), _table())

    def stored(self, codes: Codes) -> npt.NDArray[np.uint8]:
        """The bytes of the floats."""
        sign = np.where(codes < 0, np.uint8(128), np.uint8(0))
        return np.abs(codes).astype(np.uint8) | sign


def _table() -> scalar.Levels:
    """The levels, and one more at either end, which no weight reaches."""
    values = np.append(LEVELS, np.float32(2 * LARGEST))
    values = np.concatenate([-values[:0:-1], values])
    pivots = (values[1:] + values[:-1]) / 2
    ends = np.float32(-LARGEST), np.float32(LARGEST)
    return scalar.Levels(scalar.FLOAT8, *ends, values, pivots, np.diff(values))


def float8(choice: Choice) -> Float8:
    """The scheme of a choice with every default written out."""
    return Float8(choice, 8)
