"""Microscaling with 4-bit floats (mxfp4): level = codebook[code] * a power of two for each block.

Elements are E2M1: a sign, two bits of exponent and one of mantissa; blocks have 32 of them.
Source: OCP Microscaling Formats (MX) Specification v1.0, sections 5.3.3 and 6.3.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ...formats import Choice
from ..kernels.protocol import Extremes, RandomDraw, Scales
from .blocks import Blocks, Floats, Values
from .codebook import Codebook, CodebookGrid, with_two_zeros
from .grid import Doubles, Integers, absmax_of, finite_reciprocal, largest, moved_beyond

MAGNITUDES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)

SMALLEST = -127  # exponent of a scale

OCP = 4.0  # the divisor of the specification; the other, 6, is modelopt's

LADDER = np.array([3.0, 4.0, 6.0, 8.0])  # levels that the largest of a block may get

SURE = 1e-6  # a chance that differs by no more from 0 or 1 is rounding


@dataclass(frozen=True)
class Microscaling(Codebook):
    """E2M1 codes, and scales that are powers of two."""

    def grid(self, extremes: Extremes, blocks: Blocks, storage: np.dtype[Any]) -> CodebookGrid:
        """scale = 2 ** (floor(log2(absmax)) - 2), by the specification, or 2 ** ceil(log2(absmax /
        6)), which clips no weight.

        Source of the latter: `MXFP4QTensor.quantize` of nvidia-modelopt 0.47, in float32.
        """
        absmax = absmax_of(extremes)
        if self.choice.divisor == OCP:
            end, exponent = 8, np.frexp(absmax)[1] - 3
        else:
            with np.errstate(divide="ignore"):
                end, exponent = 6, np.ceil(np.log2(absmax / np.float32(6)))
        scale = _powers(absmax, exponent)
        _, _, share = _between(absmax, scale)
        on_level = np.minimum(share, 1 - share) < SURE
        limits = np.minimum(end * scale.astype(np.float64), np.finfo(np.float32).max)
        return self._on(blocks, scale, np.where(on_level, absmax, limits))

    def unclipped(self, extremes: Extremes, blocks: Blocks, storage: np.dtype[Any]) -> CodebookGrid:
        """The smallest power of two that clips no weight; none sets it alone."""
        absmax = absmax_of(extremes)
        mantissa, exponent = np.frexp(absmax.astype(np.float64) / 6)
        free = np.where(absmax > 0, np.float32(np.inf), np.float32(0))
        return self._on(blocks, _powers(absmax, exponent - (mantissa == 0.5)), free)

    def _on(self, blocks: Blocks, scale: Floats, limits: npt.NDArray[Any]) -> CodebookGrid:
        """The grid with these scales, in which weights below these limits may move."""
        operand, _ = finite_reciprocal(scale)
        limits = limits.astype(np.float32)
        scales = Scales(operand, scale, np.zeros_like(scale), -limits, limits)
        return CodebookGrid(blocks, scales, self.table())

    def without_clipping(
        self, values: Values, blocks: Blocks, extremes: Extremes, random: RandomDraw
    ) -> tuple[Values, Extremes]:
        """In every block the extreme becomes a level, the next one below or above."""
        scale = self.grid(extremes, blocks, values.dtype).scale
        lower, upper, _ = _between(absmax_of(extremes), scale)
        return drawn_extremes(values, blocks, extremes, random, lower, upper)


def drawn_extremes(
    values: Values,
    blocks: Blocks,
    extremes: Extremes,
    random: RandomDraw,
    lower: Doubles,
    upper: Doubles,
) -> tuple[Values, Extremes]:
    """Weights of which the extreme of every block has one of two magnitudes, around its own.

    The extreme sets the scale, so that it cannot be drawn together with the others. It gets the
    upper magnitude with the probability p with which its mean stays. Weights beyond the lower one
    are then stretched, w to lower + (w - lower) / p; where it gets the lower one, they do, too.
    """
    absmax = absmax_of(extremes)
    with np.errstate(invalid="ignore"):  # of a tensor of zeros
        chance = (absmax - lower) / (upper - lower)
    wanted = (absmax > 0) & (chance > SURE) & (chance < 1 - SURE)
    wanted &= upper <= largest(values.dtype)
    if not wanted.any():
        return values, extremes
    chance = np.where(wanted, chance, 1)
    is_upper = random.uniform(blocks.first_weight(np.arange(blocks.count))) < chance

    def moved(weights: Doubles, block: Integers) -> Doubles:
        low, high = lower[block], upper[block]
        magnitude = np.abs(weights)
        stretched = np.minimum(low + (magnitude - low) / chance[block], high)
        stretched = np.where(magnitude == absmax[block], high, stretched)
        changed = np.where(is_upper[block], stretched, low)
        beyond = wanted[block] & (magnitude > low)
        return np.copysign(np.where(beyond, changed, magnitude), weights)

    return moved_beyond(values, blocks, extremes, lower.astype(np.float32), moved)


def _powers(absmax: Floats, exponent: npt.NDArray[Any]) -> Floats:
    """Scales with these exponents; the smallest for blocks of zeros."""
    exponent = np.where(absmax > 0, np.maximum(exponent, SMALLEST), SMALLEST)
    scale: Floats = np.ldexp(np.float32(1), exponent.astype(np.int32))
    return scale


def _between(absmax: Floats, scale: Floats) -> tuple[Doubles, Doubles, Doubles]:
    """The two levels around the extreme of every block, and its share of the way between them."""
    step = np.searchsorted(LADDER, absmax.astype(np.float64) / scale, side="right")
    step = np.clip(step, 1, len(LADDER) - 1)
    lower, upper = (LADDER[each] * scale.astype(np.float64) for each in (step - 1, step))
    return lower, upper, (absmax - lower) / (upper - lower)


def microscaling(choice: Choice) -> Microscaling:
    """The scheme of a choice with every default written out.

    The specification rounds half to the even of two codes, modelopt to the smaller magnitude.
    """
    return Microscaling(choice, 4, *e2m1(to_even=choice.divisor == OCP), None)


def e2m1(to_even: bool) -> tuple[Floats, Floats, npt.NDArray[np.uint8]]:
    """Levels, pivots and stored codes of E2M1.

    to_even: whether halves go to the even of two codes, not to the smaller magnitude
    """
    middles = (MAGNITUDES[1:] + MAGNITUDES[:-1]) / 2
    pivots = np.where((np.arange(7) % 2 == 1) & to_even, np.nextafter(middles, 0), middles)
    return with_two_zeros(MAGNITUDES, pivots.astype(np.float32), np.arange(8, dtype=np.uint8))
