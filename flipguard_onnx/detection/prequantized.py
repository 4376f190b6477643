"""Recognise weights that lie on a grid already, as after quantization."""

from collections.abc import Iterable

import numpy as np

from .alignment import DRAWN, ON_LEVEL, Floats, Tally


def on_levels(counted: Iterable[Tally]) -> bool:
    """Whether most weights are levels of one of the grids, which chance makes of a few."""
    on_level = [tally.shares[:, ON_LEVEL].sum(axis=1) for tally in counted]
    return any(shares[0] > 0.5 and shares[DRAWN].mean() < 0.25 for shares in on_level)


def on_a_grid(weights: Floats, cols: int) -> bool:
    """Whether most weights repeat among their neighbours, as those that were quantized once do.

    Looked at are the weights other than 0 of 256 rows: runs of 32 with at most 16 magnitudes (grids
    of up to 4 bits), or runs of up to 4096, in a row or across rows, that are all multiples of one
    step or have at most 256 values (8 bits).
    """
    rows = weights.reshape(-1, cols)
    picked = rows[np.linspace(0, len(rows) - 1, min(len(rows), 256)).astype(int)]
    used = [row[row != 0] for row in picked]
    pooled = np.concatenate(used)
    runs = np.sort(np.abs(pooled[: pooled.size // 32 * 32]).reshape(-1, 32))
    values = 1 + np.count_nonzero(np.diff(runs), axis=1)
    return (
        _mostly(values <= 16)
        or _mostly(_stepped(run) for run in _cut(pooled, 4096))
        or _mostly(_stepped(row[:4096]) for row in used)
    )


def _cut(values: Floats, size: int) -> list[Floats]:
    """Runs of `size`; what is left over at the end only if there is nothing else."""
    return [values[i : i + size] for i in range(0, max(values.size - size, 0) + 1, size)]


def _mostly(found: Iterable[bool]) -> bool:
    answers = list(found)
    return sum(answers) > len(answers) / 2


def _stepped(run: Floats) -> bool:
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
