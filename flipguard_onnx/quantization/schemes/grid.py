"""A Grid is the levels of one tensor; a Scheme fits one to its extremes."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from ..kernels import scalar
from .blocks import Blocks, Codes, Floats, Values, as_bits, read_only


@dataclass(frozen=True)
class Margins:
    """Where every weight stands.

    codes: int8 [n], the nearest level's number (an integer code, or an index into the codebook).
    offsets: float32 [n], signed distance to that level as a fraction of the gap to the level on
    that side; 0 for weights that cannot move (they set the scale, or have no neighbour there).
    """

    codes: Codes
    offsets: Floats

    @property
    def neighbours(self) -> Codes:
        """The code on the other side of every weight's nearest boundary."""
        return self.codes + np.sign(self.offsets).astype(np.int8)


@dataclass(frozen=True)
class Checked:
    """What is found where moved weights are read anew.

    low, high: smallest and largest weight of every block. wrong: weights whose code is another than
    stated. moved: weights that are not what they were, although their code is stated to be.
    """

    low: Floats
    high: Floats
    wrong: int
    moved: int


@dataclass(frozen=True)
class Grid(ABC):
    """The levels of one tensor under one scheme. Arrays are flat, one value per block.

    scale: float32, as it is stored (already rounded to the weights' own type).
    operand: float32, what the quantizer divides or multiplies by.
    absmax: float32; weights of that magnitude set the scale and never move.

    Weights, [n], may be float32, float16 or bfloat16, and codes are int8 [n].
    """

    blocks: Blocks
    scale: Floats
    operand: Floats
    absmax: Floats
    levels: scalar.Levels

    def encode(self, values: Values, backend: ModuleType) -> Codes:
        """Codes, as the downstream quantizer would choose them."""
        return self.analyze(values, backend).codes

    def analyze(self, values: Values, backend: ModuleType) -> Margins:
        """Codes and offsets."""
        codes, offsets = np.empty(values.size, np.int8), np.empty(values.size, np.float32)
        backend.analyze(
            *self.blocks.read(values), self.operand, self.absmax, self.levels, codes, offsets
        )
        return Margins(codes, offsets)

    def draw(
        self,
        values: Values,
        key: np.uint64,
        limit: np.float32,
        backend: ModuleType,
        first: int = 0,
    ) -> tuple[Codes, Codes]:
        """Codes of the nearest levels, and codes drawn so that their expectation is the weight.

        Only weights whose offset is above `limit` are drawn. first: number of the first weight in
        its tensor, and so in the random stream `key`.
        """
        plain, codes = np.empty(values.size, np.int8), np.empty(values.size, np.int8)
        given = self.operand, self.absmax, self.levels, key, np.uint64(first), limit
        backend.draw(*self.blocks.read(values), *given, plain, codes)
        return plain, codes

    def place(
        self, values: Values, plain: Codes, wanted: Codes, backend: ModuleType
    ) -> tuple[Values, Codes]:
        """A copy of the weights, whose codes are `plain`, moved so that they become `wanted`.

        A weight that moves stands just inside the wanted cell, at the edge nearest to where it was.
        Where its type is too coarse for that it stays; so the codes are returned, too.
        """
        moved, codes = values.copy(), wanted.copy()
        _, *cut = self.blocks.read(values)
        given = self.operand, self.scale, self.absmax, self.levels, plain
        backend.place(*cut, *given, as_bits(moved), codes)
        return moved, codes

    def check(
        self, before: Values, after: Values, plain: Codes, codes: Codes, backend: ModuleType
    ) -> Checked:
        """Read weights that `place` has moved as the quantizer will."""
        low, high = np.empty(self.blocks.count, np.float32), np.empty(self.blocks.count, np.float32)
        faults = np.zeros(2, np.int64)
        given = self.operand, self.absmax, self.levels, plain, codes
        was, *_ = self.blocks.read(before)
        backend.check(was, *self.blocks.read(after), *given, low, high, faults)
        return Checked(low, high, *faults.tolist())

    def feed(
        self,
        values: Values,
        panel: tuple[Any, ...],
        codes: Codes,
        errors: Floats,
        backend: ModuleType,
    ) -> None:
        """Draw one panel of columns of the weights, whose rows are those of `codes`.

        See `feedback.draw`.
        """
        per_block = self.operand, self.scale, self.absmax
        backend.feed(*self.blocks.read(values), *per_block, self.levels, *panel, codes, errors)

    def survey(
        self,
        judged: Floats,
        limit: np.float32,
        factors: Floats,
        counts: npt.NDArray[np.int32],
        kernels: ModuleType,
    ) -> None:
        """Count the weights by their distance to a boundary; see `kernels.survey`."""
        cut = self.blocks.cols, self.blocks.size
        given = self.operand, self.absmax, self.levels, limit, factors
        kernels.survey(judged, cut, *given, counts)

    def account(
        self, weights: Floats, limit: np.float32, kernels: ModuleType
    ) -> npt.NDArray[np.float64]:
        """Sums over the rounding errors, [5]; see `kernels.survey`."""
        cut, sums = (self.blocks.cols, self.blocks.size), np.empty(5)
        given = self.operand, self.scale, self.absmax, self.levels, limit
        kernels.account(read_only(weights), cut, *given, sums)
        return sums

    @abstractmethod
    def decode(self, codes: Codes) -> Floats:
        """The values that the codes stand for, float32 [n]."""

    @abstractmethod
    def errors(self, margins: Margins) -> Floats:
        """|scaled weight - nearest level| in scaled units, as the paper ranks weights."""

    def same_as(self, other: "Grid") -> bool:
        """Whether both grids put every level at the same place, bit for bit."""
        return np.array_equal(self.scale, other.scale) and np.array_equal(
            self.operand, other.operand
        )


@dataclass(frozen=True)
class Scheme(ABC):
    """A number format: `bits` per weight, default `block_size` (None: a whole row)."""

    name: str
    bits: int
    block_size: int | None

    def fit(
        self, values: Values, blocks: Blocks, storage: np.dtype[Any], backend: ModuleType
    ) -> Grid:
        """The grid that the quantizer would lay over the weights (flat, [rows * cols]).

        `storage` is the type in which the file holds them, and so their scales.
        """
        return self.grid(*blocks.extremes(values, backend), blocks, storage)

    @abstractmethod
    def grid(self, low: Floats, high: Floats, blocks: Blocks, storage: np.dtype[Any]) -> Grid:
        """The grid over weights of which only the extremes of every block are known, [count]."""


def finite_reciprocal(values: Floats) -> tuple[Floats, npt.NDArray[np.bool_]]:
    """1 / value in float32, 0 where the value is 0; and where the result is finite and not 0."""
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.where(values != 0, np.float32(1) / values, np.float32(0))
    return inverse, np.isfinite(inverse) & (inverse != 0)
