"""Codebook grids: level = codebook[code] * absmax of the block.

NF4 is from QLoRA (arXiv 2305.14314): the levels are quantiles of a normal distribution, scaled to
[-1, 1], one of them 0. FP4 is from bitsandbytes, `csrc/kernels.cu`: a sign, two bits of exponent
and one of mantissa. Both are rounded as onnxruntime does it for MatMulBnb4.

Levels and pivots are ascending; `stored` maps the index of a level to the 4-bit code in the file.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ...formats import Choice
from ..kernels import scalar
from ..kernels.protocol import Extremes, Scales
from .blocks import Blocks, Codes, Floats
from .grid import Grid, Margins, Scheme, absmax_of, finite_reciprocal


@dataclass(frozen=True)
class CodebookGrid(Grid):
    """Codes are indices into the 16 levels."""

    def decode(self, codes: Codes) -> Floats:
        return self.blocks.scaled(self.levels.values[codes], self.scale)

    @property
    def loses_blocks(self) -> bool:
        """Those whose 1 / absmax overflows: an absmax below 2.9e-39."""
        return not np.isfinite(self.scales.operand).all()

    @property
    def surveyed(self) -> Scales:
        """Weights beyond the levels are not counted."""
        with np.errstate(over="ignore"):
            end = self.levels.highest * self.scale
        return self.scales._replace(
            low=np.maximum(self.scales.low, -end), high=np.minimum(self.scales.high, end)
        )

    def errors(self, margins: Margins) -> Floats:
        values = self.levels.values
        gaps: Floats = np.abs(values[margins.neighbours] - values[margins.codes])
        return np.abs(margins.offsets) * gaps


@dataclass(frozen=True)
class Codebook(Scheme):
    """A 4-bit codebook scheme; scale = absmax.

    Parameters
    ----------
    levels : float32 [16], ascending, in units of the scale
    pivots : float32 [15], the boundaries between them
    stored : the code that the file holds for every level, [16]
    bnb4_type : the attribute quant_type of onnxruntime's MatMulBnb4; None if it has none
    """

    grid_type = CodebookGrid

    levels: Floats
    pivots: Floats
    stored: npt.NDArray[np.uint8]
    bnb4_type: int | None

    @property
    def flat(self) -> bool:
        """In MatMulBnb4 blocks run on from one row to the next."""
        return self.bnb4_type is not None

    def grid(self, extremes: Extremes, blocks: Blocks, storage: np.dtype[Any]) -> CodebookGrid:
        """absmax per block; a weight's position is weight * (1 / absmax), all in float32."""
        absmax = absmax_of(extremes)
        operand, usable = finite_reciprocal(absmax)
        movable = np.where(usable, absmax, np.float32(0))
        scales = Scales(operand, absmax, np.zeros_like(absmax), -movable, movable)
        return CodebookGrid(blocks, scales, self.table())

    def table(self) -> scalar.Levels:
        """The levels as kernels take them."""
        ends, gaps = (self.levels[0], self.levels[-1]), np.diff(self.levels)
        return scalar.Levels(scalar.COUNT_PIVOTS, *ends, self.levels, self.pivots, gaps)


def _float32(*values: float) -> Floats:
    return np.array(values, np.float32)


NF4 = Codebook(
    choice=Choice("nf4").filled,
    bits=4,
    levels=_float32(
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ),
    pivots=_float32(  # onnxruntime's, each the float32 that the C compiler makes of its decimals
        -0.84809643,
        -0.6106329262256622,
        -0.4599952697753906,
        -0.33967943489551544,
        -0.23460740596055984,
        -0.13791173323988914,
        -0.045525018125772476,
        0.03979014977812767,
        0.120255254,
        0.2035212516784668,
        0.2920137718319893,
        0.3893125355243683,
        0.5016634,
        0.6427869200706482,
        0.8614784,
    ),
    stored=np.arange(16, dtype=np.uint8),
    bnb4_type=1,
)


def with_two_zeros(
    magnitudes: Floats, pivots: Floats, codes: npt.NDArray[np.uint8]
) -> tuple[Floats, Floats, npt.NDArray[np.uint8]]:
    """Levels, pivots and stored codes of sign and magnitude, with two codes for zero.

    A magnitude is above a pivot p if |position| > p, and negative positions have the sign bit set.
    In one ascending list, compared with `position > pivot`, the negative twin of p becomes the
    float just below -p, and the pivot between the two zeros the negative float nearest to 0.

    Parameters
    ----------
    magnitudes : float32 [8], ascending
    pivots : float32 [7], between them
    codes : of the magnitudes, [8]
    """
    below = np.nextafter(-pivots[::-1], np.float32(-np.inf))
    minus_zero = np.nextafter(np.float32(0), np.float32(-1))
    return (
        np.concatenate([-magnitudes[::-1], magnitudes]),
        np.concatenate([below, [minus_zero], pivots]).astype(np.float32),
        np.concatenate([codes[::-1] + np.uint8(8), codes]),
    )


FP4 = Codebook(
    Choice("fp4").filled,
    4,
    *with_two_zeros(
        _float32(0.0, 0.00520833333, 1 / 6, 0.25, 1 / 3, 0.5, 2 / 3, 1.0),
        _float32(0.00260417, 0.0859375, 0.20833333, 0.29166667, 0.4166667, 0.583333, 0.8333333),
        np.array([0, 1, 6, 7, 4, 5, 2, 3], np.uint8),
    ),
    bnb4_type=0,
)
