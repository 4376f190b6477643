"""A Grid is the levels of one tensor; a Scheme fits one to its extremes."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import ml_dtypes
import numpy as np
import numpy.typing as npt

from ...formats import FORMATS, Choice
from ..kernels import scalar
from ..kernels.protocol import Extremes, Kernels, Panel, RandomDraw, Scales, ScanKernels
from .blocks import Blocks, Codes, Floats, Values, as_bits

Doubles = npt.NDArray[np.float64]

Integers = npt.NDArray[np.int64]

ONE = np.float32(1)


@dataclass(frozen=True)
class Margins:
    """Where every weight stands.

    codes: int8 [n], the number of the nearest level: the integer itself, or an index into the
    codebook. offsets: float32 [n], signed distance to that level as a share of the gap to the next
    level on that side; 0 for weights that cannot move, since they set the scale or have no level
    on that side.
    """

    codes: Codes
    offsets: Floats

    @property
    def neighbours(self) -> Codes:
        """The code on the other side of every weight's nearest boundary."""
        return self.codes + np.sign(self.offsets).astype(np.int8)


@dataclass(frozen=True)
class Checked:
    """What is found when moved weights are read again.

    extremes: of every block. wrong: how many weights have another code than stated. moved: how many
    have changed although their stated code is the nearest one and they were not on an edge.
    """

    extremes: Extremes
    wrong: int
    moved: int


@dataclass(frozen=True)
class Grid(ABC):
    """The levels of one tensor under one scheme. Arrays are flat, with one value per block.

    Weights [n] are flat float32, float16 or bfloat16, n = blocks.rows * blocks.cols; codes are
    int8 [n].

    Parameters
    ----------
    blocks : how the tensor is cut
    scales : of every block; rounded to the weights' own type. In `unclipped` grids no weight sets
        one, so these do not depend on where the weights end up
    levels : the levels in units of the scale, and how a weight is rounded to one
    tensor_scale : of which files hold the scales as multiples, where the scheme `scales_tensor`
    """

    blocks: Blocks
    scales: Scales
    levels: scalar.Levels
    tensor_scale: np.float32 = ONE

    @property
    def scale(self) -> Floats:
        """The scales as they are stored."""
        return self.scales.scale

    @property
    def zero(self) -> Floats:
        """The codes that stand for 0."""
        return self.scales.zero

    def part(self, numbers: slice, blocks: Blocks) -> Self:
        """The grid over the blocks with these numbers, cut like `blocks`; its arrays are views."""
        scales = Scales(*(each[numbers] for each in self.scales))
        return replace(self, blocks=blocks, scales=scales)

    @classmethod
    def joined(cls, grids: Sequence["Grid"], blocks: Blocks) -> "Grid":
        """The grid over all blocks, of which each of the grids has some, in order."""
        scales = Scales(*map(np.concatenate, zip(*(grid.scales for grid in grids), strict=True)))
        return replace(grids[0], blocks=blocks, scales=scales)

    def encode(self, values: Values, kernels: Kernels) -> Codes:
        """The codes that the downstream quantizer would choose."""
        return self.analyze(values, kernels).codes

    def analyze(self, values: Values, kernels: Kernels) -> Margins:
        """Codes and offsets."""
        codes, offsets = np.empty(values.size, np.int8), np.empty(values.size, np.float32)
        kernels.analyze(self.blocks.weights(values), self.scales, self.levels, codes, offsets)
        return Margins(codes, offsets)

    def draw(self, values: Values, random: RandomDraw, kernels: Kernels) -> tuple[Codes, Codes]:
        """Codes of the nearest levels, and codes drawn so that their expectation is the weight."""
        nearest, codes = np.empty(values.size, np.int8), np.empty(values.size, np.int8)
        kernels.draw(self.blocks.weights(values), self.scales, self.levels, random, nearest, codes)
        return nearest, codes

    def move_weights(
        self, values: Values, margins: Margins, wanted: Codes, kernels: Kernels
    ) -> tuple[Values, Codes]:
        """Move weights, which have these margins, so that their codes become `wanted`.

        A weight that moves stands just inside the wanted cell, at the edge closest to where it was.
        Where its type is too coarse for that, it stays. So do weights that have their code already,
        but for those on the very edge of their cell, which tools round one way or the other.

        Returns
        -------
        The moved copy of the weights, and its codes.
        """
        moved, codes = values.copy(), wanted.copy()
        stored = self.blocks.weights(values)._replace(patterns=as_bits(moved))
        kernels.move_weights(
            stored, self.scales, self.levels, margins.codes, margins.offsets, codes
        )
        return moved, codes

    def check(
        self, before: Values, after: Values, margins: Margins, codes: Codes, kernels: Kernels
    ) -> Checked:
        """Read weights that were moved as the quantizer will; `codes` are those stated for them.

        margins: of the weights before.
        """
        found, faults = self.blocks.no_extremes(), np.zeros(2, np.int64)
        kernels.check(
            self.blocks.weights(before),
            self.blocks.weights(after),
            self.scales,
            self.levels,
            margins.codes,
            margins.offsets,
            codes,
            found,
            faults,
        )
        wrong, moved = faults.tolist()
        return Checked(found, wrong, moved)

    def draw_with_feedback(
        self,
        values: Values,
        panel: Panel,
        random: RandomDraw,
        codes: Codes,
        errors: Floats,
        kernels: Kernels,
    ) -> None:
        """Draw one panel of columns of the weights, whose rows are those of `codes`.

        See `Kernels.draw_with_feedback`.
        """
        weights = self.blocks.weights(values)
        kernels.draw_with_feedback(weights, self.scales, self.levels, panel, random, codes, errors)

    @property
    def surveyed(self) -> Scales:
        """The scales, with the limits of what a survey counts."""
        return self.scales

    def survey(
        self,
        weights: Floats,
        limit: np.float32,
        factors: Floats,
        counts: npt.NDArray[np.int32],
        kernels: ScanKernels,
    ) -> None:
        """Count the weights by their distance to a boundary; see `ScanKernels.survey`."""
        values = self.blocks.float_weights(weights)
        kernels.survey(values, self.surveyed, self.levels, limit, factors, counts)

    def rounding_error_sums(
        self, weights: Floats, limit: np.float32, kernels: ScanKernels, count: int = 10
    ) -> npt.NDArray[np.float64]:
        """Sums over the rounding errors, [count]; see `ScanKernels.rounding_error_sums`."""
        sums = np.empty(count)
        values = self.blocks.float_weights(weights)
        kernels.rounding_error_sums(values, self.scales, self.levels, limit, sums)
        return sums

    @abstractmethod
    def decode(self, codes: Codes) -> Floats:
        """The values that the codes stand for, float32 [n]."""

    @abstractmethod
    def errors(self, margins: Margins) -> Floats:
        """|weight - nearest level| / scale, by which FlipGuard (arXiv 2606.28962) ranks weights."""

    @property
    def loses_blocks(self) -> bool:
        """Whether there are blocks so small that their weights all become 0."""
        return False

    def same_as(self, other: "Grid") -> bool:
        """Whether both grids have every level in the same place, bit for bit."""
        pairs = zip(self.scales[:3], other.scales[:3], strict=True)  # all but low and high
        same = all(np.array_equal(mine, others) for mine, others in pairs)
        return same and self.tensor_scale == other.tensor_scale


@dataclass(frozen=True)
class Scheme(ABC):
    """A number format.

    Parameters
    ----------
    choice : what it was made from, with every default written out
    bits : of a code

    Attributes
    ----------
    grid_type : the class of its grids
    """

    grid_type: ClassVar[type[Grid]]

    choice: Choice
    bits: int

    @property
    def name(self) -> str:
        """As the user writes it."""
        return self.choice.name

    @property
    def in_blocks(self) -> bool:
        """Whether there is a scale for every block, not for a whole row or tensor."""
        return self.choice.granularity == "block"

    @property
    def has_zeros(self) -> bool:
        """Whether codes are stored from 0 on, with the one that stands for 0."""
        return FORMATS[self.name].has_zeros

    @property
    def block_size(self) -> int | None:
        """Weights per scale; None for a whole row or tensor."""
        return self.choice.block_size

    @property
    def flat(self) -> bool:
        """Whether blocks run on from one row to the next."""
        return self.choice.granularity == "tensor"

    @property
    def scales_tensor(self) -> bool:
        """Whether there is a scale for the tensor as well, which its largest magnitude sets."""
        return False

    def within(self, whole: Extremes) -> Self:
        """The same scheme for some blocks of a tensor with these extremes."""
        return self

    def fit(self, values: Values, blocks: Blocks, storage: np.dtype[Any], kernels: Kernels) -> Grid:
        """The grid that the quantizer would lay over the weights.

        Parameters
        ----------
        values : flat weights [blocks.rows * blocks.cols]
        storage : the type in which the file holds the weights, and so their scales
        """
        return self.over(values, blocks.extremes(values, kernels), blocks, storage)

    def over(
        self, values: Values, extremes: Extremes, blocks: Blocks, storage: np.dtype[Any]
    ) -> Grid:
        """The same where the extremes are known, at which most quantizers look alone."""
        return self.grid(extremes, blocks, storage)

    @abstractmethod
    def grid(self, extremes: Extremes, blocks: Blocks, storage: np.dtype[Any]) -> Grid:
        """The grid that the quantizer would lay over weights with these extremes in every block."""

    def unclipped(self, extremes: Extremes, blocks: Blocks, storage: np.dtype[Any]) -> Grid:
        """The grid nearest to that on which every weight is a level or between two.

        Only then can the mean of a draw be the weight, whatever the weight is.
        """
        return self.grid(extremes, blocks, storage)

    def without_clipping(
        self, values: Values, blocks: Blocks, extremes: Extremes, random: RandomDraw
    ) -> tuple[Values, Extremes]:
        """Weights none of which the quantizer's own grid clips, with the given ones as their mean.

        For weights that are quantized again elsewhere, where the grid cannot be chosen.

        Parameters
        ----------
        extremes : of every block, of which the weights may be only a part
        random : the stream, of which every block uses the number of its first weight

        Returns
        -------
        The weights, the same array where there is nothing to do; the extremes of their blocks.
        """
        return values, extremes


def moved_beyond(
    values: Values,
    blocks: Blocks,
    extremes: Extremes,
    limits: Floats,
    moved: Callable[[Doubles, Integers], Doubles],
) -> tuple[Values, Extremes]:
    """Weights of which those beyond a magnitude are moved, and the extremes after that.

    Parameters
    ----------
    limits : the magnitude, of every block
    moved : takes weights or extremes, and the numbers of their blocks
    """
    changed = values.copy()
    beyond = np.flatnonzero(np.abs(values.astype(np.float32)) > blocks.spread(limits))
    changed[beyond] = moved(values[beyond].astype(np.float64), blocks.number_of(beyond))
    numbers = np.arange(blocks.count)
    found = (
        moved(each.astype(np.float64), numbers).astype(values.dtype).astype(np.float32)
        for each in extremes
    )
    return changed, Extremes(*found)


def not_below(exact: npt.NDArray[np.float64], storage: np.dtype[Any]) -> Floats:
    """Magnitudes rounded to a type; upwards, where its values are so coarse that it shows.

    Those of float32 that are not subnormal are fine enough: a position beyond the last level by
    1e-4 of a step counts as on it.
    """
    rounded = exact.astype(storage)
    above = np.nextafter(rounded, storage.type(np.inf))
    short = rounded.astype(np.float64) * (1 + 2.0**-20) < exact
    return np.where(short, above, rounded).astype(np.float32)


def finite_reciprocal(values: Floats) -> tuple[Floats, npt.NDArray[np.bool_]]:
    """1 / value in float32, but 0 for the value 0; and whether that is finite and not 0."""
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.where(values != 0, np.float32(1) / values, np.float32(0))
    return inverse, np.isfinite(inverse) & (inverse != 0)


def absmax_of(extremes: Extremes) -> Floats:
    """The largest magnitude of every block."""
    found: Floats = np.maximum(np.abs(extremes.lowest), np.abs(extremes.highest))
    return found


def largest(storage: np.dtype[Any]) -> float:
    """The largest number of a type."""
    return float(ml_dtypes.finfo(storage).max)  # type: ignore[no-untyped-call]
