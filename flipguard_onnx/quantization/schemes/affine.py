"""Affine grids, symmetric: level = code * scale, one scale per block."""

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from ..kernels import scalar
from ..kernels.protocol import Extremes, RandomDraw
from .blocks import Blocks, Codes, Floats, Values
from .grid import Grid, Margins, Scheme, finite_reciprocal, not_below

Doubles = npt.NDArray[np.float64]

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

    def unclipped(self, extremes: Extremes, blocks: Blocks, storage: np.dtype[Any]) -> AffineGrid:
        """The quantizer rounds its scale, also downwards, and gives up on rows below 1.5e-36."""
        return _unclipped(blocks, _absmax(extremes) / 127, storage, -127, 127)


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

    def unclipped(self, extremes: Extremes, blocks: Blocks, storage: np.dtype[Any]) -> AffineGrid:
        """The quantizer's grid clips what lies beyond 7 steps opposite to the extreme.

        scale = -sign(extreme) * max(abs(extreme) / 8, abs(opposite extreme) / 7).
        """
        longer, shorter, sign = _ends(extremes)
        exact = np.minimum(np.maximum(longer / 8, shorter / 7), _largest(storage) / 8)
        return _unclipped(blocks, -sign * exact, storage, -8, 7)

    def without_clipping(
        self, values: Values, blocks: Blocks, extremes: Extremes, random: RandomDraw
    ) -> Values:
        """In blocks that the quantizer's grid would clip, which end is the one at -8 is drawn.

        Let E and O be the magnitudes of the extreme and of the opposite one, O > 7/8 E. With the
        step s = (E + O) / 15, the end with E is the long one, 8 steps, with the probability
        p = E / s - 7, and the end with O else; the other end is 7 steps. Of the weights beyond 7
        steps those at the short end become 7 steps, and those at the long one, w, 7 s + (w - 7 s)
        / (probability of that end), so that their mean over the ends is w; E or O becomes 8 s and
        so sets the scale.
        """
        longer, shorter, sign = _ends(extremes)
        clipped = (shorter > longer * 7 / 8) & (
            self.grid(extremes, blocks, values.dtype).absmax > 0
        )
        if not clipped.any():
            return values
        exact = np.minimum((longer + shorter) / 15, _largest(values.dtype) / 8)
        step = np.where(clipped, not_below(exact, values.dtype), np.inf)
        weights = values.astype(np.float64)
        beyond = np.flatnonzero(np.abs(weights) > 7 * blocks.spread(step.astype(np.float32)))
        block = blocks.number_of(beyond)
        step, chance = step[block], np.where(clipped, longer / step - 7, 0)[block]
        long_at_extreme = random.uniform(blocks.first_weight(block)) < chance
        at_extreme = np.sign(weights[beyond]) == sign[block]
        chance = np.where(at_extreme, chance, 1 - chance)
        magnitude = np.abs(weights[beyond])
        with np.errstate(divide="ignore"):  # an end that is never the long one
            stretched = np.minimum(7 * step + (magnitude - 7 * step) / chance, 8 * step)
        is_end = magnitude == np.where(at_extreme, longer[block], shorter[block])
        magnitude = np.where(
            at_extreme == long_at_extreme, np.where(is_end, 8 * step, stretched), 7 * step
        )
        moved = values.copy()
        moved[beyond] = np.sign(weights[beyond]) * magnitude
        return moved


def _ends(extremes: Extremes) -> tuple[Doubles, Doubles, Doubles]:
    """Of every block: magnitude of the extreme, of the largest weight opposite, the extreme's sign.

    Of two extremes, the negative one counts.
    """
    negative = -np.minimum(extremes.lowest, 0).astype(np.float64)
    positive = np.maximum(extremes.highest, 0).astype(np.float64)
    sign = np.where(positive > negative, 1.0, -1.0)
    return np.maximum(negative, positive), np.minimum(negative, positive), sign


def _largest(storage: np.dtype[Any]) -> float:
    """The largest number of a type."""
    return float(ml_dtypes.finfo(storage).max)  # type: ignore[no-untyped-call]


def _absmax(extremes: Extremes) -> Doubles:
    """The largest magnitude of every block."""
    return _ends(extremes)[0]


def _unclipped(
    blocks: Blocks, exact: Doubles, storage: np.dtype[Any], lowest: int, highest: int
) -> AffineGrid:
    """A grid with these scales, rounded so that no weight is clipped; none sets its scale.

    No scale is so small that it would be 0, but for blocks of zeros: a quantizer that rounds small
    weights to 0 lets an attacker choose what goes.
    """
    smallest = float(ml_dtypes.finfo(storage).smallest_subnormal)  # type: ignore[no-untyped-call]
    magnitudes = not_below(np.maximum(np.abs(exact), smallest), storage)
    used = exact != 0
    scale = np.where(used, np.copysign(magnitudes, exact), 1).astype(np.float32)
    free = np.where(used, np.float32(np.inf), np.float32(0))
    levels = integers(scalar.DIVIDE_HALF_EVEN, lowest, highest)
    return AffineGrid(blocks, scale=scale, operand=scale, absmax=free, levels=levels)
