"""What affine and codebook grids share: the cut into blocks, the margins, the Grid itself."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Codes = npt.NDArray[np.int8]


@dataclass(frozen=True)
class Blocks:
    """A tensor as `rows` rows of `cols` weights, each row cut into blocks of `size`.

    The last block of a row may be shorter. One scale per block.
    """

    rows: int
    cols: int
    size: int

    @property
    def per_row(self) -> int:
        return -(-self.cols // self.size)

    @property
    def count(self) -> int:
        return self.rows * self.per_row

    def extremes(self, weights: Floats, backend: ModuleType) -> tuple[Floats, Floats]:
        """Smallest and largest weight of every block, shape [count]."""
        low, high = np.empty(self.count, np.float32), np.empty(self.count, np.float32)
        backend.extremes(weights, self.cols, self.size, low, high)
        return low, high

    def spread(self, per_block: Floats) -> Floats:
        """Repeat one value per block to one value per weight, shape [rows * cols]."""
        rows = np.repeat(per_block.reshape(self.rows, self.per_row), self.size, axis=1)
        return rows[:, : self.cols].reshape(-1)


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
class Grid(ABC):
    """The levels of one tensor under one scheme. Arrays are flat, one value per block.

    scale: float32, as it is stored (already rounded to the weights' own type).
    operand: float32, what the quantizer divides or multiplies by.
    absmax: float32; weights of that magnitude set the scale and never move.
    """

    blocks: Blocks
    scale: Floats
    operand: Floats
    absmax: Floats

    family: ClassVar[
        str
    ]  # the kernels of this grid are encode_, analyze_, cross_, feed_, survey_{family}

    @abstractmethod
    def levels_for(self, kernel: str) -> tuple[Any, ...]:
        """What the family's kernel of that name takes to know the levels."""

    def encode(self, weights: Floats, backend: ModuleType) -> Codes:
        """Codes [n] of flat float32 weights [n], as the downstream quantizer would choose them."""
        codes = np.empty(weights.size, np.int8)
        self._run("encode", backend, weights, [self.operand], [codes])
        return codes

    def analyze(self, weights: Floats, backend: ModuleType) -> Margins:
        """Codes and offsets of flat float32 weights [n]."""
        codes, offsets = np.empty(weights.size, np.int8), np.empty(weights.size, np.float32)
        self._run("analyze", backend, weights, [self.operand, self.absmax], [codes, offsets])
        return Margins(codes, offsets)

    def cross(self, weights: Floats, codes: Codes, wanted: Codes, backend: ModuleType) -> Floats:
        """A copy of the weights, whose codes are `codes`, moved so that they become `wanted`.

        A weight that moves stands just inside the wanted cell, at the edge nearest to where it was.
        """
        moved = weights.copy()
        self._run("cross", backend, moved, [self.scale], [codes, wanted])
        return moved

    def feed(
        self,
        weights: Floats,
        columns: int,
        panel: tuple[Any, ...],
        codes: Codes,
        errors: Floats,
        backend: ModuleType,
    ) -> None:
        """Draw one panel of the weights as rows of `columns`; see `feedback.draw`."""
        per_block = [self.operand, self.scale, self.absmax]
        self._run("feed", backend, weights, per_block, [columns, *panel, codes, errors])

    def survey(
        self,
        weights: Floats,
        judged: Floats,
        limit: np.float32,
        factors: Floats,
        counts: npt.NDArray[np.int32],
        sums: npt.NDArray[np.float64],
        kernels: ModuleType,
    ) -> None:
        """Count the weights by their distance to a boundary; see `kernels.survey`."""
        per_block = [self.operand, self.scale, self.absmax]
        self._run("survey", kernels, weights, per_block, [judged, limit, factors, counts, sums])

    def _run(
        self,
        kernel: str,
        backend: ModuleType,
        weights: Floats,
        per_block: list[Floats],
        rest: list[Any],
    ) -> None:
        run = getattr(backend, f"{kernel}_{self.family}")
        cut = self.blocks.cols, self.blocks.size
        run(weights, *cut, *per_block, *self.levels_for(kernel), *rest)

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


def finite_reciprocal(values: Floats) -> tuple[Floats, npt.NDArray[np.bool_]]:
    """1 / value in float32, 0 where the value is 0; and where the result is finite and not 0."""
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.where(values != 0, np.float32(1) / values, np.float32(0))
    return inverse, np.isfinite(inverse) & (inverse != 0)
