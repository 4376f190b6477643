"""Affine grids: level = (code - zero) * scale, one scale and one zero per block.

Three rules make them. `Symmetric` (zero is 0) maps the largest magnitude to a level that is the
same for all blocks. `SignedExtreme` (zero is 0, the scale may be negative) maps the weight of the
largest magnitude to the lowest level. `MinMax` maps the range of the weights to all levels.
"""

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from ...formats import FORMATS, Choice
from ..kernels import scalar
from ..kernels.protocol import Extremes, RandomDraw, Scales
from .blocks import Blocks, Codes, Floats, Values
from .grid import (
    Doubles,
    Grid,
    Integers,
    Margins,
    Scheme,
    absmax_of,
    finite_reciprocal,
    largest,
    moved_beyond,
    not_below,
)

NO_TABLE = np.empty(0, np.float32)

IN_BLOCKS = {  # the rule of onnxruntime's blocks, by bits
    2: scalar.MULTIPLY_HALF_UP,
    4: scalar.MULTIPLY_HALF_AWAY,
    8: scalar.MULTIPLY_HALF_UP,
}

REACH = np.float32(1.18)  # of the last level: 0.75 of that, as a survey counts, no placebo clips

SURE = 1e-6  # a chance that differs by no more from 0 or 1 is rounding


@dataclass(frozen=True)
class AffineGrid(Grid):
    """Codes are integers."""

    def decode(self, codes: Codes) -> Floats:
        levels = codes.astype(np.float32)
        if self.zero.any():
            levels -= self.blocks.spread(self.zero)
        return self.blocks.scaled(levels, self.scale)

    @property
    def surveyed(self) -> Scales:
        """Of four levels, the weights are not counted that the grid or a placebo clips: many."""
        lowest, highest = self.levels.lowest, self.levels.highest
        if highest - lowest > 3:
            return self.scales
        with np.errstate(over="ignore", invalid="ignore"):
            ends = [(end - self.zero) * self.scale * REACH for end in (lowest, highest)]
        return self.scales._replace(
            low=np.maximum(self.scales.low, np.minimum(*ends)),
            high=np.minimum(self.scales.high, np.maximum(*ends)),
        )

    def errors(self, margins: Margins) -> Floats:
        return np.abs(margins.offsets)


@dataclass(frozen=True)
class Affine(Scheme):
    """An affine scheme.

    Parameters
    ----------
    lowest, highest : the codes
    rule : how weights are rounded, see `kernels.scalar`
    """

    grid_type = AffineGrid

    lowest: int
    highest: int
    rule: int

    def levels(self, rule: int, *, full: bool = False) -> scalar.Levels:
        """The codes as levels. full: all that the type has."""
        half = 1 << self.bits - 1
        lowest, highest = (-half, half - 1) if full else (self.lowest, self.highest)
        ends = np.float32(lowest), np.float32(highest)
        return scalar.Levels(rule, *ends, NO_TABLE, NO_TABLE, NO_TABLE)

    def free_grid(
        self, blocks: Blocks, exact: Doubles, zero: Doubles, storage: np.dtype[Any]
    ) -> AffineGrid:
        """A grid with these scales; see `free_scales`."""
        scales = free_scales(exact, zero, storage)
        return AffineGrid(blocks, scales, self.levels(scalar.DIVIDE_HALF_EVEN))


@dataclass(frozen=True)
class Symmetric(Affine):
    """scale = absmax / divisor: onnxruntime's symmetric QInt8, QUInt8 and QInt4, bit for bit."""

    divisor: float = 127

    def grid(self, extremes: Extremes, blocks: Blocks, storage: np.dtype[Any]) -> AffineGrid:
        """In float64, then cast to the weights' own type.

        Source: `compute_scale_zp` in onnxruntime.quantization.quant_utils.
        """
        absmax = absmax_of(extremes)
        exact = 2 * absmax.astype(np.float64) / (2 * self.divisor)
        scale, degenerate = stored_scales(exact, storage)
        absmax[degenerate] = 0.0  # that scale is not made from the weights, so none may move
        # a subnormal scale may be rounded so far down that its extremes lie past the last code,
        # but onnxruntime clips at the ends of the type
        full = bool(np.any(np.rint(absmax / scale) > np.ceil(self.divisor)))
        zero = np.where(degenerate & self.has_zeros, np.float32(self.lowest), np.float32(0))
        scales = Scales(scale, scale, zero, -absmax, absmax)
        return AffineGrid(blocks, scales, self.levels(self.rule, full=full))

    def unclipped(self, extremes: Extremes, blocks: Blocks, storage: np.dtype[Any]) -> AffineGrid:
        """The quantizer rounds its scale, also downwards, and gives up on rows below 1.5e-36."""
        longer, _, _ = _ends(extremes)
        return self.free_grid(blocks, longer / self.highest, np.zeros_like(longer), storage)


@dataclass(frozen=True)
class SignedExtreme(Affine):
    """The extreme of each block gets the lowest code: onnxruntime's blocks of 2, 4 and 8 bits."""

    def grid(self, extremes: Extremes, blocks: Blocks, storage: np.dtype[Any]) -> AffineGrid:
        """scale = -extreme / 8, where the extreme keeps its sign; of two, the negative one counts.

        At 8 bits, 128; at 2 bits, 2. The reciprocal is that of the scale as it is stored, in the
        weights' own type.
        Source: `BlockwiseQDQQuantizer` and `BlockwiseQuantizer` in onnxruntime's
        `mlas/lib/q4_dq.cpp`.
        """
        low, high = extremes
        extreme = np.where(np.abs(high) > np.abs(low), high, low)
        scale = np.divide(extreme, self.lowest, dtype=np.float32).astype(storage).astype(np.float32)
        operand, usable = finite_reciprocal(scale)
        absmax = np.where(usable, np.abs(extreme), np.float32(0))
        scales = Scales(operand, scale, np.zeros_like(scale), -absmax, absmax)
        return AffineGrid(blocks, scales, self.levels(self.rule))

    def unclipped(self, extremes: Extremes, blocks: Blocks, storage: np.dtype[Any]) -> AffineGrid:
        """The quantizer's grid clips what lies beyond 7 steps opposite to the extreme.

        scale = -sign(extreme) * max(abs(extreme) / 8, abs(opposite extreme) / 7).
        """
        longer, shorter, sign = _ends(extremes)
        exact = np.maximum(longer / -self.lowest, shorter / self.highest)
        exact = np.minimum(exact, largest(storage) / -self.lowest)
        return self.free_grid(blocks, -sign * exact, np.zeros_like(exact), storage)

    def without_clipping(
        self, values: Values, blocks: Blocks, extremes: Extremes, random: RandomDraw
    ) -> tuple[Values, Extremes]:
        """In blocks that the quantizer's grid would clip, which end gets the lowest code is drawn.

        See `_DrawnEnds`: the end of the extreme is the long one, or the other, to which then the
        extreme changes.
        """
        longer, shorter, sign = _ends(extremes)
        usable = self.grid(extremes, blocks, values.dtype).scales.high > 0
        clipped = (shorter > longer * self.highest / -self.lowest) & usable
        step = (longer + shorter) / (self.highest - self.lowest)
        step = np.minimum(step, largest(values.dtype) / -self.lowest)
        step = not_below(step, values.dtype).astype(np.float64)
        short = np.full(blocks.count, float(self.highest))
        return _moved(values, blocks, extremes, random, clipped, sign, step, short, short)


@dataclass(frozen=True)
class MinMax(Affine):
    """The range of the weights, widened to include 0, is that of the codes.

    exactly: float64 and numpy.round, as onnxruntime.quantization does it, for QUInt8; else float32
    and C's roundf, as its blocks. steps: from the lowest to the highest code that the range is
    divided into; 127 of 255 with reduce_range.
    """

    exactly: bool = True
    steps: int = 255

    def grid(self, extremes: Extremes, blocks: Blocks, storage: np.dtype[Any]) -> AffineGrid:
        """scale = range / steps, and the lowest code + round(-lowest weight / scale) stands for 0.

        Source: `compute_scale_zp` in onnxruntime.quantization.quant_utils, and `range2scalezp` in
        onnxruntime's `mlas/lib/q4_dq.cpp`.
        """
        low, high = np.minimum(extremes.lowest, 0), np.maximum(extremes.highest, 0)
        if self.exactly:
            exact = (high.astype(np.float64) - low) / self.steps
            scale, degenerate = stored_scales(exact, storage)
            operand = scale
        else:
            with np.errstate(over="ignore"):
                exact = (high - low) / np.float32(self.steps)
                scale = exact.astype(storage).astype(np.float32)
            operand, usable = finite_reciprocal(scale)
            degenerate = ~usable
        with np.errstate(divide="ignore", invalid="ignore"):
            place = -low / exact
        whole = np.trunc(place)
        place = np.rint(place) if self.exactly else whole + (place - whole >= 0.5)  # C's roundf
        unknown = degenerate if self.exactly else exact == 0
        zero = np.where(unknown, 0, np.clip(place, 0, self.steps)) + self.lowest
        limits = (np.where(degenerate, np.float32(0), each) for each in (low, high))
        scales = Scales(operand, scale, zero.astype(np.float32), *limits)
        return AffineGrid(blocks, scales, self.levels(self.rule))

    def unclipped(self, extremes: Extremes, blocks: Blocks, storage: np.dtype[Any]) -> AffineGrid:
        """The smallest scale for which 0 is a level and the range lies within the codes."""
        below, above = _sides(extremes)
        width = below + above
        share = np.divide(below, width, out=np.zeros_like(width), where=width > 0) * self.steps
        found, zero = np.full_like(width, np.inf), np.zeros_like(width)
        for step in (-1, 0, 1):  # -1: where rounding has made a whole number of the share
            place = np.clip(np.floor(share) + step, 0, self.steps)
            with np.errstate(divide="ignore", invalid="ignore"):
                sides = below / place, above / (self.steps - place)
            scale = np.maximum(*(np.where(np.isnan(side), 0, side) for side in sides))
            better = scale < found
            found, zero = np.where(better, scale, found), np.where(better, place, zero)
        return self.free_grid(blocks, found, zero + self.lowest, storage)

    def without_clipping(
        self, values: Values, blocks: Blocks, extremes: Extremes, random: RandomDraw
    ) -> tuple[Values, Extremes]:
        """Where 0 would lie between two codes, which of them it gets is drawn, see `_DrawnEnds`.

        The quantizer rounds it to one, so that one end of the range is clipped.
        """
        below, above = _sides(extremes)
        scales = self.grid(extremes, blocks, values.dtype).scales
        step = (below + above) / self.steps
        share = np.divide(below, step, out=np.zeros_like(step), where=step > 0)
        between = np.abs(share - np.rint(share)) > SURE
        between &= (scales.low < 0) & (scales.high > 0)
        short = np.floor(share)
        ends = short, self.steps - 1 - short
        sign = np.full(blocks.count, -1.0)
        return _moved(values, blocks, extremes, random, between, sign, step, *ends)


@dataclass(frozen=True)
class _DrawnEnds:
    """Ends of blocks that are longer or shorter by one step, at random, with the given as the mean.

    Both ends of a block together have one step more than the two `short` lengths. The end `near`
    is the long one with the probability with which its mean length is the magnitude of its extreme
    weight; else the end `far` is. Of the weights beyond the short length, those at a short end get
    it, and those at a long one are stretched, w to short + (w - short) / (probability of that), so
    that their mean is w; the extreme of a long end becomes its length.

    sign: of the weights at the end `near`. step: a scale. lengths: in steps, of the ends near and
    far while they are short. magnitudes: of their extreme weights. chance: that `near` is the long
    one; is_near: whether it is. Arrays have one value per block.
    """

    sign: Doubles
    step: Doubles
    lengths: tuple[Doubles, Doubles]
    magnitudes: tuple[Doubles, Doubles]
    chance: Doubles
    is_near: npt.NDArray[np.bool_]

    def moved(self, weights: Doubles, block: Integers) -> Doubles:
        """Weights in the blocks with these numbers, moved if they are beyond the short length."""
        step, chance, is_near = self.step[block], self.chance[block], self.is_near[block]
        near = np.sign(weights) == self.sign[block]
        length = np.where(near, *(each[block] for each in self.lengths)) * step
        extreme = np.where(near, *(each[block] for each in self.magnitudes))
        chance = np.where(near, chance, 1 - chance)
        magnitude = np.abs(weights)
        with np.errstate(divide="ignore"):  # an end that is never the long one
            stretched = np.minimum(length + (magnitude - length) / chance, length + step)
        long = np.where(magnitude == extreme, length + step, stretched)
        changed = np.where(near == is_near, long, length)
        return np.sign(weights) * np.where(magnitude > length, changed, magnitude)


def _moved(
    values: Values,
    blocks: Blocks,
    extremes: Extremes,
    random: RandomDraw,
    wanted: npt.NDArray[np.bool_],
    sign: Doubles,
    step: Doubles,
    near: Doubles,
    far: Doubles,
) -> tuple[Values, Extremes]:
    """Weights with drawn ends in the blocks where that is wanted, and their extremes.

    sign, step, near, far: see `_DrawnEnds`.
    """
    if not wanted.any():
        return values, extremes
    step = np.where(wanted, step, 1.0)
    below, above = _sides(extremes)
    magnitudes = np.where(sign < 0, below, above), np.where(sign < 0, above, below)
    chance = np.where(wanted, magnitudes[0] / step - near, 0)
    numbers = np.arange(blocks.count)
    is_near = random.uniform(blocks.first_weight(numbers)) < chance
    drawn = _DrawnEnds(sign, step, (near, far), magnitudes, chance, is_near)
    shorter = np.where(wanted, np.minimum(near, far) * step, np.inf).astype(np.float32)

    def moved(weights: Doubles, block: Integers) -> Doubles:
        return np.where(wanted[block], drawn.moved(weights, block), weights)

    return moved_beyond(values, blocks, extremes, shorter, moved)


def free_scales(exact: Doubles, zero: Doubles, storage: np.dtype[Any]) -> Scales:
    """Scales rounded so that no weight is clipped; none sets its scale.

    No scale is so small that it would be 0, but for blocks of zeros: a quantizer that rounds small
    weights to 0 lets an attacker choose what goes.
    """
    smallest = float(ml_dtypes.finfo(storage).smallest_subnormal)  # type: ignore[no-untyped-call]
    magnitudes = not_below(np.maximum(np.abs(exact), smallest), storage)
    used = exact != 0
    scale = np.where(used, np.copysign(magnitudes, exact), 1).astype(np.float32)
    free = np.where(used, np.float32(np.inf), np.float32(0))
    return Scales(scale, scale, zero.astype(np.float32), -free, free)


def stored_scales(exact: Doubles, storage: np.dtype[Any]) -> tuple[Floats, npt.NDArray[np.bool_]]:
    """Scales as onnxruntime.quantization stores them, and where it gives up, which are 1."""
    scale = exact.astype(storage).astype(np.float32)
    # it uses float16's subnormal scales, but not float32's
    degenerate = scale == 0 if storage == np.float16 else exact < np.finfo(np.float32).tiny
    scale[degenerate] = 1.0
    return scale, degenerate


def _ends(extremes: Extremes) -> tuple[Doubles, Doubles, Doubles]:
    """Of every block: magnitude of the extreme, of the largest weight opposite, the extreme's sign.

    Of two extremes, the negative one counts.
    """
    below, above = _sides(extremes)
    sign = np.where(above > below, 1.0, -1.0)
    return np.maximum(below, above), np.minimum(below, above), sign


def _sides(extremes: Extremes) -> tuple[Doubles, Doubles]:
    """Of every block: how far it reaches below 0, and above."""
    low, high = (each.astype(np.float64) for each in extremes)
    return -np.minimum(low, 0), np.maximum(high, 0)


def affine(choice: Choice) -> Affine:
    """The affine scheme of a choice with every default written out."""
    known = FORMATS[choice.name]
    bits = known.bits
    half = 1 << bits - 1
    if known.has_zeros and choice.divisor is None:
        exactly = bits == 8 and choice.granularity != "block"
        rule = scalar.DIVIDE_HALF_EVEN if exactly else IN_BLOCKS[bits]
        steps = 127 if choice.reduced else 2 * half - 1
        return MinMax(choice, bits, -half, half - 1, rule, exactly, steps)
    divisor = 64 if choice.reduced else choice.divisor
    assert divisor is not None
    assert not isinstance(divisor, str)
    if divisor == half:
        return SignedExtreme(choice, bits, -half, half - 1, IN_BLOCKS[bits])
    highest = 64 if choice.reduced else half - 1
    lowest = -half if bits == 4 or known.has_zeros else -highest
    return Symmetric(choice, bits, lowest, highest, scalar.DIVIDE_HALF_EVEN, divisor)
