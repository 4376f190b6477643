"""What the kernels are and what they take: the interface between numpy code and numba code.

`Kernels` is implemented once for the CPU (the module `cpu`) and once for NVIDIA GPUs (the class
`cuda.CudaKernels`), with equal results, bit for bit. `ScanKernels` is the module `scan`.

All arrays are in C order. n is the number of weights, flat, one row after the other; weights are
measured in their own units, positions and offsets in units of the grid (see `scalar`). Results are
written into arrays of the caller, which are the last arguments.
"""

from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from . import scalar
from .scalar import Levels

Codes = npt.NDArray[np.int8]

Floats = npt.NDArray[np.float32]


class StoredWeights(NamedTuple):
    """Weights in the type in which they are stored.

    patterns: their bit patterns, uint32 or uint16 [n]. form: how these are read, scalar.FLOAT32,
    scalar.FLOAT16 or scalar.BFLOAT16. cols, block_size: rows of `cols` weights are cut into blocks
    of `block_size`, the last one of a row possibly shorter. Arrays with a value per block list the
    blocks row by row.
    """

    patterns: npt.NDArray[Any]
    form: int
    cols: int
    block_size: int


class FloatWeights(NamedTuple):
    """Weights in float32 [n], cut like StoredWeights."""

    values: Floats
    cols: int
    block_size: int


class Scales(NamedTuple):
    """The scales of a grid, float32 [blocks].

    operand: what the quantizer divides or multiplies by. scale: as it is stored. zero: the code
    that stands for 0, a whole number; a level is its code minus that. low, high: a weight that is
    not between them sets the scale and never moves.
    """

    operand: Floats
    scale: Floats
    zero: Floats
    low: Floats
    high: Floats


class RandomDraw(NamedTuple):
    """A random stream, and which weights are drawn at all.

    key: number of the stream. first: place in the stream of the first weight. limit: a weight is
    drawn if its |offset| is above that; 0 draws every weight, 1 none.
    """

    key: np.uint64
    first: np.uint64
    limit: np.float32

    def uniform(self, weights: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """The numbers in [0, 1) that the stream has for these weights, counted from `first`."""
        states = scalar.state(self.key, self.first + weights.astype(np.uint64))  # type: ignore[no-untyped-call]
        return scalar.uniform(states)  # type: ignore[no-untyped-call, no-any-return]


class Panel(NamedTuple):
    """Consecutive columns in the order of error feedback; rows are divided evenly into groups.

    carried: float32 [rows, width], what the columns before the panel ask of it. factors: float32
    [groups, width, width], how much of the error of a column [:, i] goes to a later one [:, :, j].
    order: int64 [groups, width], the column of the weights that each stands for. first: place of
    the panel's first column among the columns of `errors`.
    """

    carried: Floats
    factors: npt.NDArray[np.float32]
    order: npt.NDArray[np.int64]
    first: int


class Extremes(NamedTuple):
    """Smallest and largest weight of every block, float32 [blocks]."""

    lowest: Floats
    highest: Floats


class Kernels(Protocol):
    """The kernels of one device."""

    @property
    def device(self) -> str:
        """Name of the device: "cpu" or "cuda"."""

    def extremes(self, weights: StoredWeights, found: Extremes) -> None:
        """Find the smallest and the largest weight of every block."""

    def analyze(
        self, weights: StoredWeights, scales: Scales, levels: Levels, codes: Codes, offsets: Floats
    ) -> None:
        """Find the nearest level of every weight: its code, int8 [n], and the offset, float32 [n].

        A weight that sets the scale has the offset 0.
        """

    def draw(
        self,
        weights: StoredWeights,
        scales: Scales,
        levels: Levels,
        random: RandomDraw,
        nearest: Codes,
        codes: Codes,
    ) -> None:
        """Find the codes of the nearest levels, and draw codes by `scalar.step`; both int8 [n]."""

    def move_weights(
        self,
        weights: StoredWeights,
        scales: Scales,
        levels: Levels,
        nearest: Codes,
        offsets: Floats,
        codes: Codes,
    ) -> None:
        """Move every weight that is to change its code just across the edge of its new cell.

        The weights, for which `analyze` finds `nearest` and `offsets`, are changed in place. Each
        takes the value of its own type nearest past the edge, and never one short of it: on the
        boundary itself, some quantizers round one way and others the other way. So a weight that
        keeps its code, but stands on the edge of its cell, moves away from it just as far. Where no
        such value has the wanted code, the weight stays, and its entry in `codes` becomes the
        nearest code.
        """

    def check(
        self,
        before: StoredWeights,
        after: StoredWeights,
        scales: Scales,
        levels: Levels,
        nearest: Codes,
        offsets: Floats,
        codes: Codes,
        found: Extremes,
        faults: npt.NDArray[np.int64],
    ) -> None:
        """Read moved weights again: find their extremes, and count those that are at fault.

        nearest, offsets: of the weights before. faults: int64 [2], the weights whose code is not
        the one in `codes`, and those that have changed although `codes` and `nearest` agree and
        they were not at an edge.
        """

    def draw_with_feedback(
        self,
        weights: StoredWeights,
        scales: Scales,
        levels: Levels,
        panel: Panel,
        random: RandomDraw,
        codes: npt.NDArray[np.int8],
        errors: npt.NDArray[np.float32],
    ) -> None:
        """Draw the codes of one panel of columns; see `error_feedback.draw_with_feedback`.

        codes: int8 [rows, columns], filled at the panel's columns; its rows are rows of the
        weights, whatever their cut says. errors: float32 [rows, columns in the order of feedback],
        weight - level in the units of the weights, filled from `panel.first` on.
        """


class ScanKernels(Protocol):
    """The kernels of a scan, on float32 weights [n].

    Sums do not depend on the number of threads.
    """

    def survey(
        self,
        weights: FloatWeights,
        scales: Scales,
        levels: Levels,
        limit: np.float32,
        factors: npt.NDArray[np.float32],
        counts: npt.NDArray[np.int32],
    ) -> None:
        """Count weights by their distance to the nearest boundary, from 0 to 1 half-gap.

        Weights that are 0, or not below `limit` times their block's largest magnitude, are not
        counted. factors: float32 [grids, factors]; on grid g the positions in block b are
        multiplied by factors[g, b % factors]: 1 for the grid itself, others for its placebos.
        counts: int32 [runs, grids, bins], to which is added; the weights are divided into runs.
        """

    def rounding_error_sums(
        self,
        weights: FloatWeights,
        scales: Scales,
        levels: Levels,
        limit: np.float32,
        sums: npt.NDArray[np.float64],
    ) -> None:
        """Add up rounding errors e, in the units of the weights.

        Weights whose |offset| is above `limit` are drawn, the others are rounded to nearest.
        sums: float64 [10], or [5] for the first five alone, over all weights: how many are not 0;
        how many lose more than half of their magnitude; sum |e|; the part of it that no draw moves;
        sum Var e. Then, with blocks divided into runs of at most 32, and with the errors of
        rounding to nearest: how many runs have weights w other than 0 beside their largest eighth;
        sum of the relative L2 errors sqrt(sum e^2 / sum w^2) of these runs, without that eighth;
        how many weights neither are 0 nor set the scale; how many of them lie above the highest
        level; how many below the negative of that.
        """

    def largest_two(self, weights: FloatWeights, first: Floats, second: Floats) -> None:
        """Find the largest two magnitudes of every block, float32 [blocks] each."""
