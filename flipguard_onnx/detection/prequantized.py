"""Recognize weights that are on a grid already, as those decoded from a quantized format.

A block of such weights has equally spaced values, a few hundred at most: it is on a lattice, with
a step of its own. The formats of GGUF are of this kind, and those of GPTQ and AWQ, with or without
a zero point. Codebooks (nf4, fp4) are not, but there weights of a block repeat.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..quantization.kernels import get_backend
from ..quantization.schemes import SCHEMES
from .alignment import DRAWN, ON_LEVEL, Floats, Sample, Tally

RUNS = 32, 16  # weights of a block that are looked at together; Q6_K has blocks of 16

LOOKS = 256  # runs of a tensor that are looked at first

LEVELS = 256  # of a lattice, at most

VALUES = 4  # different ones that a run on a lattice has at least

SLACK = 0.05  # root mean square distance of weights from their lattice, in steps, at most

CAPS = 4, 32, 256  # steps between neighbouring weights from which a step is measured, by round

BLOCKS = 32, 64, 128, 256  # usual sizes

MOST = 0.93  # of the neighbouring runs in a block have the same step

CODEBOOKS = "nf4", "fp4"


@dataclass(frozen=True)
class Lattice:
    """Weights on lattices, run by run.

    size: weights of a run, in rows of `cols` weights that begin with a run. steps: float64
    [rows, runs of a row], 0 where the run is on no lattice.
    """

    cols: int
    size: int
    steps: npt.NDArray[np.float64]
    levels: int

    @property
    def text(self) -> str:
        """The lattice in words."""
        return f"{self.levels} levels per {self._block}"

    @property
    def _block(self) -> str:
        earlier, later = self.steps[:, :-1], self.steps[:, 1:]
        found = (earlier > 0) & (later > 0)
        same = found & (np.abs(later - earlier) < 0.02 * earlier)
        place = np.arange(1, self.steps.shape[1])
        block = self.size
        for size in BLOCKS:
            inside = place % (size // self.size) != 0
            if same[:, inside].sum() > MOST * found[:, inside].sum():
                block = size
        if block < BLOCKS[-1] or same.sum() <= MOST * found.sum():
            return f"block of {block}"
        rows = np.median(self.steps, axis=1)
        return "tensor" if np.ptp(rows) < 0.02 * rows.max() else "row"

    def spread(self, weights: Floats) -> Floats:
        """Put each weight at random somewhere within half a step of where it is.

        That is as good as taking the rounding back: weights that only a lattice of their own has
        gathered are spread evenly again, but others are not. What is left at the end of a row
        becomes 0, which no one counts.
        """
        runs = self.steps.shape[1]
        per_weight = np.zeros((len(self.steps), self.cols), np.float32)
        per_weight[:, : runs * self.size] = np.repeat(self.steps, self.size, axis=1)
        steps = per_weight.reshape(-1)
        noise = np.random.default_rng(1).random(weights.size, np.float32) - np.float32(0.5)
        spread: Floats = weights + noise * steps
        spread.reshape(-1, self.cols)[:, runs * self.size :] = 0
        return spread


def find_lattice(weights: Floats, cols: int) -> Lattice | None:
    """The lattices that most of the weights are on, if they are.

    Parameters
    ----------
    weights : flat rows of `cols` weights
    """
    short = cols < RUNS[0]  # then only one lattice for the whole tensor shows
    if short:
        cols = weights.size
    rows = weights.reshape(-1, cols)
    for size in RUNS:
        count = cols // size
        runs = rows[:, : count * size].reshape(len(rows), count, size)
        if not runs.size:
            return None
        looks = np.linspace(0, len(rows) * count - 1, min(len(rows) * count, LOOKS)).astype(int)
        if _majority(lattice_steps(runs[looks // count, looks % count])[0] > 0):
            steps, levels = lattice_steps(runs.reshape(-1, size))
            if short and np.count_nonzero(steps) < 0.9 * steps.size:
                return None
            bits = int(np.ceil(np.log2(levels.max())))
            return Lattice(cols, size, steps.reshape(len(rows), count), 2**bits)
    return None


def lattice_steps(runs: Floats) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Step of the lattice that each of the runs [n, weights] is on, or 0; levels that it spans.

    The smallest gap between two weights is one to three steps. The step is then measured over
    wider and wider gaps, and all weights have to be at multiples of it.
    """
    ascending = np.sort(runs, axis=1).astype(np.float64)
    span = ascending[:, -1:] - ascending[:, :1]
    gaps = np.diff(ascending)
    apart = gaps > 0.3 / LEVELS * span  # closer ones are at the same level
    smallest = np.where(apart, gaps, np.inf).min(axis=1, keepdims=True)
    enough = apart.sum(axis=1) + 1 >= VALUES
    steps, levels = np.zeros((2, len(runs)))
    for multiple in (1, 2, 3):
        left = np.flatnonzero(enough & (steps == 0))
        step = smallest[left] / multiple
        for cap in CAPS:
            counts = np.rint(gaps[left] / step)
            used = (counts > 0) & (counts <= cap)
            total = np.where(used, counts, 0).sum(axis=1, keepdims=True)
            measured = np.where(used, gaps[left], 0).sum(axis=1, keepdims=True)
            step = np.where(total > 0, measured / np.maximum(total, 1), step)
        heights = (ascending[left] - ascending[left, :1]) / step
        distance = heights - np.rint(heights)
        slack = np.sqrt(np.square(distance).mean(axis=1))
        fits = (slack < SLACK) & (heights[:, -1] < LEVELS)
        steps[left[fits]] = step[fits, 0]
        levels[left[fits]] = heights[fits, -1] + 1
    return steps, levels


def on_codebook(sample: Sample, weights: Floats) -> bool:
    """Whether nearly all weights are levels of a codebook.

    Those of fp4 are almost on a lattice, and those of two blocks of nvfp4 often on a common one.
    """
    for name in (*CODEBOOKS, "nvfp4"):
        grid, _ = sample.grids(SCHEMES[name])
        offsets = grid.analyze(weights, get_backend("cpu")).offsets
        if np.count_nonzero(np.abs(offsets) < 0.01) > 0.9 * offsets.size:
            return True
    return False


def most_are_levels(tallies: Iterable[Tally]) -> bool:
    """Whether most weights are levels of one of the grids; by chance only a few are."""
    on_level = [tally.shares[:, ON_LEVEL].sum(axis=1) for tally in tallies]
    return any(shares[0] > 0.5 and shares[DRAWN].mean() < 0.25 for shares in on_level)


def most_repeat(weights: Floats, cols: int) -> bool:
    """Whether most weights repeat among their neighbours, as after an unknown quantizer.

    Weights other than 0 of up to 256 rows are looked at: runs of 32 with at most 16 magnitudes
    (grids of up to 4 bits), or runs of up to 4096 with at most 256 values (8 bits).

    Parameters
    ----------
    weights : flat rows of `cols` weights
    """
    rows = weights.reshape(-1, cols)
    picked = rows[np.linspace(0, len(rows) - 1, min(len(rows), 256)).astype(int)]
    used = [row[row != 0] for row in picked]
    pooled = np.concatenate(used)
    runs = np.sort(np.abs(pooled[: pooled.size // 32 * 32]).reshape(-1, 32))
    magnitudes = 1 + np.count_nonzero(np.diff(runs), axis=1)
    return _majority(magnitudes <= 16) or _majority(map(_has_few_values, _runs(pooled, 4096)))


def _runs(values: Floats, size: int) -> list[Floats]:
    """Runs of `size`; a shorter one only if there is no other."""
    return [values[i : i + size] for i in range(0, max(values.size - size, 0) + 1, size)]


def _majority(votes: Iterable[bool]) -> bool:
    answers = list(votes)
    return sum(answers) > len(answers) / 2


def _has_few_values(run: Floats) -> bool:
    """Whether a long run has as many values as 8 bits can tell apart, at most."""
    return run.size >= 1024 and np.unique(run).size <= 256
