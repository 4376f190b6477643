"""Statistics: how far weights are from the decision boundaries of every grid, and of placebos.

The rounding errors of honest weights are as good as random: the distances to the nearest boundary
are nearly uniform, and have the same distribution on a grid with scales that no quantizer would
choose. A placebo is such a grid: the same levels, the scales divided by some factor. What shows on
the real grid and on none of its placebos was done to the weights for that grid; what shows on the
placebos as well (weights much smaller than the scale, weights that repeat) does not count.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from typing import Any

import numpy as np
import numpy.typing as npt

from ..formats import K_QUANT
from ..quantization.arrays import contiguous
from ..quantization.kernels import get_backend, get_scan_kernels, max_threads, side_by_side
from ..quantization.kernels.protocol import Extremes
from ..quantization.layout import Layout
from ..quantization.parts import parts
from ..quantization.rounding import Policy, QuantizedTensor
from ..quantization.schemes import SCHEMES, Blocks, Choice, Grid, Scheme, scheme_of
from ..reports.scan import Alignment, Budget

GRIDS = {  # by name
    choice.label: scheme_of(choice)
    for choice in (
        Choice("int8"),
        Choice("int8", "tensor"),
        Choice("int8", "block"),
        Choice("int8", "block", 128),
        Choice("uint8"),
        Choice("uint8", "tensor"),
        Choice("uint8", divisor=127.5),
        Choice("uint8", "tensor", divisor=127.5),
        Choice("int4"),
        Choice("int4", "block", 64),
        Choice("int4", "block", 128),
        Choice("int4", "channel"),
        Choice("int4", "block", divisor=7),
        Choice("int4", "block", divisor=7.5),
        Choice("uint4"),
        Choice("uint4", "block", 128),
        Choice("uint4", "channel"),
        Choice("uint4", divisor=K_QUANT),
        Choice("uint8", "block", divisor=K_QUANT),
        Choice("int2"),
        Choice("uint2"),
        Choice("nf4"),
        Choice("fp4"),
        Choice("fp8"),
        Choice("fp8", "tensor"),
        Choice("mxfp4"),
        Choice("mxfp4", divisor=6),
        Choice("nvfp4"),
    )
}

BINS = 100  # of a histogram of distances, from the boundary (bin 0) to the level

PEAK_BINS = 80  # the first bins, where peaks count; in the others rounding errors are too small

EDGE = 0.1  # distance up to which weights are next to a boundary

ON_LEVEL = slice(98, 100)  # the bins of weights that are a level

REPORTED_BINS = 20  # of the histograms in a report

RUNS = 64  # that the weights of a tensor are divided into for counting, at most

RUN = 1 << 15  # weights from which on they are divided further

ENOUGH = 1 << 14  # weights from which on the grids are shared out among threads

MODEL_SAMPLE = 1 << 22  # weights of a model that are counted, about

TENSOR_SAMPLE = 1 << 17, 1 << 20  # weights of a large tensor that are counted, at least and at most

SAMPLE_PART = 1 << 14  # weights of which a sample has all or none, about

AFTER_GUARD = slice(3, 5)  # of the sums: what a guard leaves to choose, and what it draws

FREE = 7  # ... how many weights do not set a scale; of those that are not 0, as the kernels count

LIMIT = np.float32(0.75)  # of a block's largest magnitude: placebos would clip what is above

FLOAT16_ZERO_BITS = range(13, 16)  # how many low bits of a float32 are 0 if it was a float16

FLOAT16_STEP = np.float32(2.0**-24)  # between the smallest values of float16

ECHO = 0.15  # share of a strength up to which it may be due to boundaries shared with others

SAME = np.float32(2.0**-21)  # relative difference up to which weights repeat

CANDIDATES = 6  # grids that are tried in turn as the one that explains the most

WINDOW, AROUND = 3, 6  # bins of a peak, and of its surroundings on either side

MIRRORED = np.pad(np.arange(BINS), WINDOW // 2 + AROUND, mode="symmetric")

Floats = npt.NDArray[np.float32]

Shares = npt.NDArray[np.float64]

Chance = Callable[[Alignment], float]


def _factors() -> Floats:
    """Factors of the grid itself (1), of the FIXED placebos and of the DRAWN ones, by block.

    A fixed placebo has one factor for all blocks: weights at one boundary stay together there, at
    another distance. That tells apart grids with the same blocks, whose boundaries coincide as
    well. A drawn placebo has a random factor per block, which scatters such weights; that reveals
    weights most of which are at the same boundary.
    """
    drawn = np.random.default_rng(0).uniform(-0.12, 0.12, (3, 1021))
    fixed = np.repeat([[0.0], [-0.1], [-0.06], [-0.03], [0.03], [0.06], [0.1]], 1021, axis=1)
    factors: Floats = np.exp(np.concatenate([fixed, drawn])).astype(np.float32)
    return factors


FACTORS = _factors()

FIXED = slice(1, 7)

DRAWN = slice(7, 10)


def sample_size(tensors: int) -> int:
    """About how many weights of each tensor are counted in a model with this many tensors."""
    fewest, most = TENSOR_SAMPLE
    return int(np.clip(MODEL_SAMPLE // max(tensors, 1), fewest, most))


@dataclass(frozen=True)
class Repetition:
    """How often weights repeat.

    weights: how many are not 0. squares: sum, over all magnitudes that occur, of the square of how
    often each occurs.
    """

    weights: int
    squares: int

    def __add__(self, other: "Repetition") -> "Repetition":
        return Repetition(self.weights + other.weights, self.squares + other.squares)

    @classmethod
    def among(cls, weights: Floats) -> "Repetition":
        """Count the weights; those that differ in their last bits alone are the same.

        The rows of a language model's tables for tokens that never occurred are such.
        """
        magnitudes = np.sort(np.abs(weights[weights != 0]))
        ends = np.flatnonzero(np.diff(magnitudes, append=np.inf) > magnitudes * SAME)
        times = np.diff(ends, prepend=-1)
        return cls(magnitudes.size, int(times @ times))

    @property
    def independent(self) -> float:
        """How many weights that do not repeat would tell as much: Kish's effective sample size."""
        return self.weights**2 / max(self.squares, 1)


@dataclass(frozen=True)
class Tally:
    """Weights of one or more tensors, counted on one grid and its placebos.

    counts: [grids, BINS], by distance to the nearest boundary. sums: float64 [11], those of
    `ScanKernels.rounding_error_sums` and the sum of all magnitudes. outliers: of every block,
    largest / second largest magnitude.
    """

    counts: npt.NDArray[np.int64]
    sums: npt.NDArray[np.float64]
    outliers: npt.NDArray[np.float64]
    repetition: Repetition

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(
            self.counts + other.counts,
            self.sums + other.sums,
            np.concatenate([self.outliers, other.outliers]),
            self.repetition + other.repetition,
        )

    @property
    def shares(self) -> Shares:
        """Of the weights counted on each grid, [grids, BINS]."""
        shares: Shares = self.counts / np.maximum(self.counts.sum(axis=1, keepdims=True), 1)
        return shares


@dataclass(frozen=True)
class Sample:
    """Some whole rows of a tensor, in its storage type, flat in canonical order.

    lowest, highest: the extremes of the whole tensor; NaN if one of its values is.
    """

    values: npt.NDArray[Any]
    layout: Layout
    lowest: np.float32
    highest: np.float32

    @classmethod
    def take(
        cls,
        array: npt.NDArray[Any],
        layout: Layout,
        max_weights: int,
        rng: np.random.Generator,
    ) -> "Sample":
        """Take all rows of a tensor as it is stored, or about `max_weights` chosen at random."""
        canonical = array.transpose(layout.perm)
        blocks = layout.blocks(SCHEMES["nf4"].block_size, flat=True)
        found = list(parts(layout, blocks, SAMPLE_PART))
        count = min(-(-len(found) * max_weights // layout.size), len(found))
        chosen = sorted(rng.choice(len(found), count, replace=False))
        values = np.concatenate([contiguous(canonical[found[i].index]).reshape(-1) for i in chosen])
        whole = Blocks(1, layout.size, layout.size)
        extremes = whole.extremes(array.reshape(-1), get_backend("cpu"))
        return cls(values, layout, extremes.lowest[0], extremes.highest[0])

    def grids(self, scheme: Scheme) -> tuple[Grid, Grid]:
        """The grids that the scheme's quantizer and a guard lay over these weights."""
        whole = self.layout.blocks(scheme.block_size, scheme.flat)
        rows = 1 if scheme.flat else self.values.size // whole.cols
        cols = self.values.size // rows
        blocks = Blocks(rows, cols, min(whole.size, cols))
        tensor = extremes = Extremes(np.full(1, self.lowest), np.full(1, self.highest))
        if whole.count > 1:
            extremes = self._extremes_of(blocks)
        scheme, storage = scheme.within(tensor), self.values.dtype
        theirs = scheme.over(self.values, extremes, blocks, storage)
        return theirs, scheme.unclipped(extremes, blocks, storage)

    def _extremes_of(self, blocks: Blocks) -> Extremes:
        if blocks not in self._known:
            self._known[blocks] = blocks.extremes(self.values, get_backend("cpu"))
        return self._known[blocks]

    @cached_property
    def _known(self) -> dict[Blocks, Extremes]:
        """The extremes that were found, for other grids whose blocks are the same."""
        return {}


@dataclass(frozen=True)
class Counted:
    """Flat weights [n] that are counted on one grid after another, and what these have in common.

    weights: in float32. smoothed: the same from `without_lattice`, whose distances are counted.
    repetition: among `smoothed`.
    """

    weights: Floats
    smoothed: Floats
    repetition: Repetition

    @cached_property
    def magnitude(self) -> float:
        """Sum of the magnitudes."""
        return _magnitude(self.weights)

    def outliers(self, blocks: Blocks) -> npt.NDArray[np.float64]:
        """As in a tally, of these blocks."""
        if blocks not in self._known:
            first, second = (np.empty(blocks.count, np.float32) for _ in range(2))
            get_scan_kernels().largest_two(blocks.float_weights(self.weights), first, second)
            used = second > 0
            self._known[blocks] = first[used].astype(np.float64) / second[used]
        return self._known[blocks]

    @cached_property
    def _known(self) -> dict[Blocks, npt.NDArray[np.float64]]:
        return {}


def tallies(
    sample: Sample, spread: Floats | None = None, grids: Iterable[str] = GRIDS
) -> dict[str, Tally]:
    """Count one tensor on each of these grids.

    Parameters
    ----------
    spread : its weights, where they are on a grid, as `Lattice.spread` makes them
    """
    weights, smoothed = sample.values.astype(np.float32), _smoothed(sample, spread)
    repetition = Repetition.among(smoothed if spread is None else weights)
    counted = Counted(weights, smoothed, repetition)
    names = list(grids)

    def on_grid(name: str) -> Tally:
        found = tally(counted, *sample.grids(GRIDS[name]))
        return replace(found, sums=found.sums * (sample.layout.size / weights.size))

    threads = max_threads(get_backend("cpu")) if weights.size >= ENOUGH else 1
    return dict(zip(names, side_by_side(on_grid, names, threads), strict=True))


@dataclass(frozen=True)
class _Tried:
    """What is left once the weights that crowd on a grid are scattered.

    chance: the strength up to which the grid's alignment may be chance. rest: of the strengths with
    other grids those that are neither chance nor an echo; trace: all. without: the weights. own:
    the alignments that make up the rest.
    """

    grid: str
    chance: float
    rest: float
    trace: float
    without: Floats
    own: list[Alignment]

    @property
    def rarity(self) -> tuple[int, bool]:
        """Grids with fewer levels and the usual scale are the likelier ones."""
        scheme = GRIDS[self.grid]
        return scheme.bits, not scheme.choice.has_usual_scale


def explaining(
    sample: Sample, spread: Floats | None, found: Sequence[Alignment], chance: Chance
) -> tuple[str, ...]:
    """The fewest of the grids, with which weights are aligned, that explain all the alignment.

    Grids whose scales agree in some blocks share boundaries there, and those of int4 are levels of
    int8. In turn, the weights at the peak of that grid are scattered after which the least
    alignment with the others is left; of several, of one with fewer levels and the usual scale.
    Grids that cannot be told apart are all named.

    Parameters
    ----------
    spread : as in `tallies`
    found : the alignments, the strongest first
    chance : the strength up to which an alignment may be chance
    """
    left = _smoothed(sample, spread)
    grids = {a.grid: sample.grids(GRIDS[a.grid])[0] for a in found}
    names: list[str] = []
    while found:
        tried: list[_Tried] = []
        for a in found[:CANDIDATES]:
            without = _scattered(grids[a.grid], left, a)
            repetition = Repetition.among(without)
            before = [o for o in found if o is not a]
            others = [
                alignment(o.grid, _surveyed(without, repetition, grids[o.grid])) for o in before
            ]
            own = [
                now
                for o, now in zip(before, others, strict=True)
                if now.strength > max(chance(now), ECHO * o.strength)
            ]
            rest, trace = (sum(o.strength for o in each) for each in (own, others))
            tried.append(_Tried(a.grid, chance(a), rest, trace, without, own))
        least = min(each.rest for each in tried)
        tried = [each for each in tried if each.rest <= least + each.chance]
        usual = min(each.rarity for each in tried)
        tried = sorted((each for each in tried if each.rarity == usual), key=lambda e: e.trace)
        best = tried[0]
        names.extend(each.grid for each in tried if each.trace <= best.trace + each.chance)
        left, found = best.without, sorted(best.own, key=lambda a: -a.strength)
    return tuple(dict.fromkeys(names))


def _scattered(grid: Grid, weights: Floats, found: Alignment) -> Floats:
    """The weights, of which those where they crowd on this grid are moved at random: as many as
    usual stay around that distance to a boundary, the others go to any other.

    So they crowd on no grid any more, and leave no hole.
    """
    margins = grid.analyze(weights, get_backend("cpu"))
    distances = 1 - 2 * np.abs(margins.offsets)
    low, high = found.peak_at - AROUND / BINS, found.peak_at + AROUND / BINS
    if found.edge > found.peak:
        low, high = min(low, 0), max(high, EDGE)
    low = max(low, 0)
    there = (distances >= low) & (distances <= high) & (weights != 0)
    others = np.count_nonzero(weights) - np.count_nonzero(there)
    usual = others * (high - low) / (1 - (high - low))
    rng = np.random.default_rng(0)
    stay = rng.random(weights.size, np.float32) * np.count_nonzero(there) < usual
    anywhere = rng.random(weights.size, np.float32)
    distances = np.where(stay, low + anywhere * np.float32(high - low), anywhere)
    levels = grid.decode(margins.codes)
    gaps = grid.decode(margins.neighbours) - levels
    return np.where(there, levels + (1 - distances) / 2 * gaps, weights).astype(np.float32)


def _smoothed(sample: Sample, spread: Floats | None) -> Floats:
    """The weights as their distances are counted; spread: as in `tallies`."""
    smoothed = without_lattice(sample.values)
    if spread is None:
        return smoothed
    return np.where(spread != sample.values.astype(np.float32), spread, smoothed)


def tally(counted: Counted, grid: Grid, guarded: Grid | None = None) -> Tally:
    """Count weights on one grid and its placebos.

    Parameters
    ----------
    guarded : the grid that a guard would use, if it is another
    """
    kernels, weights = get_scan_kernels(), counted.weights
    found = _surveyed(counted.smoothed, counted.repetition, grid)
    sums = np.append(grid.rounding_error_sums(weights, np.float32(0), kernels), counted.magnitude)
    sums[FREE] += weights.size - sums[0]  # few weights that are not 0 leave little to choose
    if guarded and not guarded.same_as(grid):
        after = guarded.rounding_error_sums(weights, np.float32(0), kernels, AFTER_GUARD.stop)
        sums[AFTER_GUARD] = after[AFTER_GUARD]
    return replace(found, sums=sums, outliers=counted.outliers(grid.blocks))


def _surveyed(smoothed: Floats, repetition: Repetition, grid: Grid) -> Tally:
    """The counts and the repetition of a tally; its sums are 0."""
    runs = min(RUNS, 1 + smoothed.size // RUN)
    counts = np.zeros((runs, len(FACTORS), BINS), np.int32)
    grid.survey(smoothed, LIMIT, FACTORS, counts, get_scan_kernels())
    return Tally(counts.sum(axis=0, dtype=np.int64), np.zeros(11), np.empty(0), repetition)


def without_lattice(values: npt.NDArray[Any]) -> Floats:
    """The weights, in float32, as their distances are counted.

    Weights that were once stored in a type coarser than float32 lie on a lattice, which makes a
    moiré with the grids. Each is put at random somewhere in the interval that was rounded to it.
    """
    weights = values.astype(np.float32)
    bits = int(np.bitwise_or.reduce(weights.view(np.uint32)))
    zero_bits = min((bits & -bits).bit_length() - 1, 23) if bits else 0
    if values.dtype == np.float16:
        zero_bits = FLOAT16_ZERO_BITS.start
    if not zero_bits:
        return weights
    step = np.spacing(np.abs(weights)) * np.float32(2**zero_bits)
    if zero_bits in FLOAT16_ZERO_BITS:
        step = np.maximum(step, FLOAT16_STEP)
    noise = np.random.default_rng(0).random(weights.size, np.float32) - np.float32(0.5)
    smoothed: Floats = weights + noise * step
    smoothed[weights == 0] = 0
    return smoothed


def alignment(name: str, tally: Tally) -> Alignment:
    """What a tally says about the grid called `name`."""
    counted = int(tally.counts[0].sum())
    shares = tally.shares
    expected = shares[DRAWN].mean(axis=0)
    peak, peak_bin = _excess(shares[0], shares[FIXED], PEAK_BINS)
    edge, _ = _excess(shares[0], shares[DRAWN], round(EDGE * BINS), 2)
    nonzero, lost, error, stuck, variance = tally.sums[:5]
    runs, losses, free, above, mirrored, total = tally.sums[5:]
    return Alignment(
        grid=name,
        weights=counted,
        independent=int(min(tally.repetition.independent, counted)),
        histogram=_reported(shares[0]),
        placebo=_reported(expected),
        departure=_largest_difference(shares[0] - 1 / BINS) if counted else 0.0,
        shift=_largest_difference(shares[0] - expected),
        peak=peak,
        peak_at=(peak_bin + 0.5) / BINS,
        edge=edge,
        collapse=float(lost / max(nonzero, 1)),
        outlier=float(np.median(tally.outliers)) if tally.outliers.size else 1.0,
        loss=float(losses / max(runs, 1)),
        clipped=float(above / max(free, 1)),
        mirrored=float(mirrored / max(free, 1)),
        budget=Budget(float(error), float(stuck), float(np.sqrt(variance)), float(total)),
    )


def budget(values: npt.NDArray[Any], quantized: QuantizedTensor, policy: Policy) -> Budget:
    """The alignment budget of weights [n], flat in canonical order, quantized under a policy."""
    weights = values.astype(np.float32, copy=False)
    grid = quantized.grid
    if policy.name == "unbiased":
        assert quantized.drawn is not None
        drawn = quantized.drawn.astype(np.float32, copy=False)
        limit = np.float32((1 - policy.tau) / 2)
        sums = grid.rounding_error_sums(drawn, limit, get_scan_kernels(), AFTER_GUARD.stop)
        _, _, total, stuck, variance = sums.tolist()
        return Budget(total, stuck, math.sqrt(variance), _magnitude(weights))
    total, left = (
        float(np.abs(grid.decode(codes).astype(np.float64) - weights).sum())
        for codes in (quantized.nearest, quantized.codes)
    )
    return Budget(total, left, 0.0, _magnitude(weights))


def _magnitude(weights: Floats) -> float:
    """Sum of the magnitudes."""
    return float(np.abs(weights).sum(dtype=np.float64))


def _excess(real: Shares, placebos: Shares, bins: int, times: int = 1) -> tuple[float, int]:
    """By how much the highest peak in the first `bins` exceeds `times` the placebos' highest.

    A peak is one of the difference between a histogram and the mean of the placebos' (the others',
    for a placebo). Returns 0 where it does not, and the bin of the peak.
    """
    others = (placebos.sum(axis=0) - placebos) / (len(placebos) - 1)
    peaks = _peaks(np.concatenate([[real - placebos.mean(axis=0)], placebos - others]))
    highest = int(np.argmax(peaks[0, :bins]))
    height = peaks[0, highest] - times * peaks[1:].max()
    return max(float(height), 0.0), highest


def _peaks(shares: Shares) -> Shares:
    """By how much the WINDOW at each bin exceeds what the bins AROUND it would lead to expect.

    Of several histograms [n, BINS], each for itself; beyond its ends a histogram is mirrored.
    """
    mirrored = shares[:, MIRRORED]
    width = WINDOW + 2 * AROUND
    window, wide = (
        reduce(np.add, (mirrored[:, i : i + BINS] for i in places))
        for places in (range(AROUND, AROUND + WINDOW), range(width))
    )
    peaks: Shares = window - (wide - window) * WINDOW / (2 * AROUND)
    return peaks


def _largest_difference(difference: Shares) -> float:
    """Largest magnitude of the cumulative difference of two histograms (Kolmogorov-Smirnov)."""
    return float(np.abs(np.cumsum(difference)).max())


def _reported(shares: Shares) -> tuple[float, ...]:
    return tuple(map(float, shares.reshape(REPORTED_BINS, -1).sum(axis=1)))
