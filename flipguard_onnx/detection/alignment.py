"""How the weights of a tensor stand to the decision boundaries of every grid, and to placebos.

Rounding errors of honest weights are as good as random: their distance to the nearest boundary is
nearly uniform, and it is the same on a grid with scales that no quantizer would choose. A placebo
is such a grid: the same levels, the scales divided by some factor. What the weights do on the real
grid and on none of its placebos was done to them for its sake; what the placebos show too (weights
much smaller than the scale, weights that repeat) counts for nothing.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ..graph.weights import Weight
from ..quantization.arrays import contiguous
from ..quantization.chunks import parts
from ..quantization.kernels import get_backend, get_survey
from ..quantization.rounding import Policy, QuantizedTensor
from ..quantization.schemes import SCHEMES, Blocks, Grid, Scheme
from ..reports.scan import Alignment, Budget

GRIDS = {  # name -> scheme, and whether blocks run across the rows
    "int8 channel": ("int8", False),
    "int8 tensor": ("int8", True),
    "int4": ("int4", False),
    "nf4": ("nf4", True),
    "fp4": ("fp4", True),
}

BINS = 100

LEVEL = 80  # bin from which on weights stand on the level: their rounding errors are no weapon

ON_LEVEL = slice(98, 100)  # the bins of weights that are a level

SHOWN = 20  # bins of the histograms that are reported

RUNS = 64  # a tensor is added up in so many parts

ALL = 1 << 22  # weights of a model that are counted, about

OF_A_TENSOR = 1 << 17, 1 << 20  # ... of a huge tensor, at least and at most

PIECE = 1 << 14  # ... in pieces of so many

LIMIT = np.float32(0.75)  # of the largest of the block: placebos would clip what lies beyond

# of float32, zero where float16 was; the step of its smallest values
FLOAT16_BITS, FLOAT16_STEP = range(13, 16), np.float32(2.0**-24)

WINDOW, AROUND = 3, 6  # bins of a peak, and of its surroundings on either side

Floats = npt.NDArray[np.float32]

Shares = npt.NDArray[np.float64]


def _factors() -> Floats:
    """The grid itself; FIXED placebos with one factor each; others with one drawn per block.

    On a fixed placebo the weights at one boundary still stand together, at another distance. It
    tells apart the grids of the same blocks, whose boundaries stand together too. Factors per block
    scatter them; that shows weights most of which stand at the same boundary.
    """
    drawn = np.random.default_rng(0).uniform(-0.12, 0.12, (3, 1021))
    fixed = np.repeat([[0.0], [-0.1], [-0.06], [-0.03], [0.03], [0.06], [0.1]], 1021, axis=1)
    factors: Floats = np.exp(np.concatenate([fixed, drawn])).astype(np.float32)
    return factors


FACTORS = _factors()

FIXED = slice(1, 7)

DRAWN = slice(7, 10)


def sample_size(tensors: int) -> int:
    """About how many weights of each tensor are counted in a model of so many tensors."""
    return int(np.clip(ALL // max(tensors, 1), *OF_A_TENSOR))


@dataclass(frozen=True)
class Spread:
    """How many weights there are, and the sum of the squares of how often each magnitude occurs."""

    weights: int
    repeats: int

    def __add__(self, other: "Spread") -> "Spread":
        return Spread(self.weights + other.weights, self.repeats + other.repeats)

    @classmethod
    def of(cls, judged: Floats) -> "Spread":
        magnitudes = np.sort(np.abs(judged[judged != 0]))
        ends = np.flatnonzero(np.diff(magnitudes, append=np.inf))
        times = np.diff(ends, prepend=-1)
        return cls(magnitudes.size, int(times @ times))

    @property
    def independent(self) -> float:
        """As many weights that do not repeat would be as telling as these."""
        return self.weights**2 / max(self.repeats, 1)


@dataclass(frozen=True)
class Tally:
    """Weights of one or more tensors, counted on one grid: see `kernels.survey`."""

    counts: npt.NDArray[np.int64]  # [grids, bins]
    sums: Shares  # [6]: those of `kernels.account`, and sum |w|
    outliers: Shares  # per block: largest / second largest magnitude
    spread: Spread

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(
            self.counts + other.counts,
            self.sums + other.sums,
            np.concatenate([self.outliers, other.outliers]),
            self.spread + other.spread,
        )

    @property
    def shares(self) -> Shares:
        """Of the weights counted on each grid, [grids, bins]."""
        shares: Shares = self.counts / np.maximum(self.counts.sum(axis=1, keepdims=True), 1)
        return shares


@dataclass(frozen=True)
class Sample:
    """Some whole rows of a tensor, in its storage type, flat in canonical order.

    low, high: the extremes of the whole tensor; NaN where one of its values is.
    """

    values: npt.NDArray[Any]
    low: np.float32
    high: np.float32

    @classmethod
    def of(
        cls, weight: Weight, values: npt.NDArray[Any], most: int, rng: np.random.Generator
    ) -> "Sample":
        """All rows of values as they are stored, or about `most` weights chosen at random."""
        stored = values.transpose(weight.perm)
        found = list(parts(weight, weight.blocks(SCHEMES["nf4"].block_size, flat=True), PIECE))
        kept = -(-len(found) * most // weight.size)
        chosen = sorted(rng.choice(len(found), min(kept, len(found)), replace=False))
        picked = np.concatenate([contiguous(stored[found[i].index]).reshape(-1) for i in chosen])
        whole = Blocks(1, weight.size, weight.size)
        low, high = whole.extremes(values.reshape(-1), get_backend("cpu"))
        return cls(picked, low[0], high[0])

    def grid(self, weight: Weight, scheme: Scheme, flat: bool) -> Grid:
        """The grid that the scheme lays over these weights."""
        backend = get_backend("cpu")
        whole = weight.blocks(scheme.block_size, flat)
        rows = 1 if flat else self.values.size // whole.cols
        cols = self.values.size // rows
        blocks = Blocks(rows, cols, min(whole.size, cols))
        if whole.count == 1:
            extremes = np.full(1, self.low), np.full(1, self.high)
            return scheme.grid(*extremes, blocks, self.values.dtype)
        return scheme.fit(self.values, blocks, self.values.dtype, backend)


def tallies(weight: Weight, sample: Sample) -> dict[str, Tally]:
    """One tensor on each of GRIDS."""
    weights = sample.values.astype(np.float32)
    judged = judgeable(sample.values)
    spread = Spread.of(judged)
    found = {}
    for name, (scheme, flat) in GRIDS.items():
        grid = sample.grid(weight, SCHEMES[scheme], flat)
        counted = tally(weights, judged, spread, grid)
        found[name] = replace(counted, sums=counted.sums * (weight.size / weights.size))
    return found


def tally(weights: Floats, judged: Floats, spread: Spread, grid: Grid) -> Tally:
    """Count flat weights on their grid and on its placebos; `judged` as from judgeable()."""
    kernels = get_survey()
    counts = np.zeros((RUNS, len(FACTORS), BINS), np.int32)
    grid.survey(judged, LIMIT, FACTORS, counts, kernels)
    sums = np.append(grid.account(weights, np.float32(0), kernels), _total(weights))
    first, second = (np.empty(grid.blocks.count, np.float32) for _ in range(2))
    kernels.largest_two(weights, (grid.blocks.cols, grid.blocks.size), first, second)
    used = second > 0
    outliers = first[used].astype(np.float64) / second[used]
    return Tally(counts.sum(axis=0, dtype=np.int64), sums, outliers, spread)


def judgeable(values: npt.NDArray[Any]) -> Floats:
    """The weights as they are counted, of values in their storage type.

    Weights that were stored in fewer bits than float32 has stand on a lattice, which beats with
    the grids; each is put somewhere in the interval that was rounded to it.
    """
    weights = values.astype(np.float32)
    bits = int(np.bitwise_or.reduce(weights.view(np.uint32)))
    dropped = min((bits & -bits).bit_length() - 1, 23) if bits else 0
    if values.dtype == np.float16:
        dropped = FLOAT16_BITS.start
    if not dropped:
        return weights
    step = np.spacing(np.abs(weights)) * np.float32(2**dropped)
    if dropped in FLOAT16_BITS:
        step = np.maximum(step, FLOAT16_STEP)
    noise = np.random.default_rng(0).random(weights.size, np.float32) - np.float32(0.5)
    judged: Floats = weights + noise * step
    judged[weights == 0] = 0
    return judged


def alignment(name: str, tally: Tally) -> Alignment:
    """What a tally says of the grid called `name`."""
    counted = int(tally.counts[0].sum())
    shares = tally.shares
    expected = shares[DRAWN].mean(axis=0)
    peak, at = _excess(shares[0], shares[FIXED], LEVEL)
    edge, _ = _excess(shares[0], shares[DRAWN], BINS // 10, 2)
    nonzero, lost, error, stuck, variance, total = tally.sums
    return Alignment(
        grid=name,
        weights=counted,
        independent=int(min(tally.spread.independent, counted)),
        histogram=_shown(shares[0]),
        placebo=_shown(expected),
        departure=_furthest(shares[0] - 1 / BINS) if counted else 0.0,
        shift=_furthest(shares[0] - expected),
        peak=peak,
        peak_at=(at + 0.5) / BINS,
        edge=edge,
        collapse=float(lost / max(nonzero, 1)),
        outlier=float(np.median(tally.outliers)) if tally.outliers.size else 1.0,
        budget=Budget(float(error), float(stuck), float(np.sqrt(variance)), float(total)),
    )


def budget(values: npt.NDArray[Any], flips: QuantizedTensor, policy: Policy) -> Budget:
    """The alignment budget of weights, flat in canonical order, that are guarded like this."""
    weights = values.astype(np.float32, copy=False)
    if policy.name == "unbiased":
        limit = np.float32((1 - policy.tau) / 2)
        _, _, nearest, stuck, variance = flips.grid.account(weights, limit, get_survey()).tolist()
        return Budget(nearest, stuck, math.sqrt(variance), _total(weights))
    plain, left = (
        float(np.abs(flips.grid.decode(codes).astype(np.float64) - weights).sum())
        for codes in (flips.plain, flips.codes)
    )
    return Budget(plain, left, 0.0, _total(weights))


def _total(weights: Floats) -> float:
    """Sum of the magnitudes."""
    return float(np.abs(weights).sum(dtype=np.float64))


def _excess(real: Shares, placebos: Shares, bins: int, times: int = 1) -> tuple[float, int]:
    """By how much the largest peak of the first `bins` exceeds `times` the placebos'; its bin.

    Peaks are looked for in what is left of a histogram less the mean of the placebos'.
    """
    peaks = _peaks(real - placebos.mean(axis=0))
    at = int(np.argmax(peaks[:bins]))
    others = (placebos.sum(axis=0) - placebos) / (len(placebos) - 1)
    height = peaks[at] - times * max(_peaks(row).max() for row in placebos - others)
    return max(float(height), 0.0), at


def _peaks(shares: Shares) -> Shares:
    """Share of the WINDOW around each bin above what the bins AROUND it let expect."""
    width = WINDOW + 2 * AROUND
    mirrored = np.pad(shares, width // 2, mode="symmetric")
    window = np.convolve(mirrored, np.ones(WINDOW), "same")
    around = np.convolve(mirrored, np.ones(width), "same") - window
    peaks: Shares = (window - around * WINDOW / (2 * AROUND))[width // 2 : -(width // 2)]
    return peaks


def _furthest(difference: Shares) -> float:
    """Largest magnitude of the cumulative difference of two histograms."""
    return float(np.abs(np.cumsum(difference)).max())


def _shown(shares: Shares) -> tuple[float, ...]:
    return tuple(map(float, shares.reshape(SHOWN, -1).sum(axis=1)))
