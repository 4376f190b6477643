"""Recognize weights that are on a grid already, as after quantization."""

from collections.abc import Iterable

import numpy as np

from .alignment import DRAWN, ON_LEVEL, Floats, Tally


def most_are_levels(tallies: Iterable[Tally]) -> bool:
    """Whether most weights are levels of one of the grids; by chance only a few are."""
    on_level = [tally.shares[:, ON_LEVEL].sum(axis=1) for tally in tallies]
    return any(shares[0] > 0.5 and shares[DRAWN].mean() < 0.25 for shares in on_level)


def most_repeat(weights: Floats, cols: int) -> bool:
    """Whether most weights repeat among their neighbours, as after an unknown quantizer.

    Weights other than 0 of up to 256 rows are looked at: runs of 32 with at most 16 magnitudes
    (grids of up to 4 bits), or runs of up to 4096, in a row or across rows, that are all multiples
    of one step or have at most 256 values (8 bits).

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
    return (
        _majority(magnitudes <= 16)
        or _majority(_on_steps(run) for run in _runs(pooled, 4096))
        or _majority(_on_steps(row[:4096]) for row in used)
    )


def _runs(values: Floats, size: int) -> list[Floats]:
    """Runs of `size`; a shorter one only if there is no other."""
    return [values[i : i + size] for i in range(0, max(values.size - size, 0) + 1, size)]


def _majority(votes: Iterable[bool]) -> bool:
    answers = list(votes)
    return sum(answers) > len(answers) / 2


def _on_steps(run: Floats) -> bool:
    """Whether all are multiples of one step, up to a shift, or a long run has few values."""
    values = np.unique(run)
    if run.size >= 1024 and values.size <= 256:
        return True
    if values.size < 8:
        return False
    heights = (values - values[0]).astype(np.float64)
    step = np.diff(heights).min()
    if heights[-1] > 1024 * step:
        return False
    steps = heights / step
    return bool(np.abs(steps - np.rint(steps)).max() < 0.02)
