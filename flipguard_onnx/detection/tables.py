"""Recognize tables that a formula made: positions, rotations, windows, masks, coordinates.

The entries of such a table follow from their neighbours, and may gather anywhere on a grid, which
no placebo accounts for. Trained weights do not follow from their neighbours.
"""

from itertools import product

import numpy as np
import numpy.typing as npt

LINES = 64  # of a tensor that are looked at along each axis

LENGTH = 16, 4096  # of a line: fewer entries prove nothing, more are left out

LEVELS = 256  # evenly spaced, that are no weights

UNEVEN = 0.25  # largest difference between their gaps, as a share: float16 rounds them

FOLLOWS = 0.1  # what the neighbours leave of an entry, as a share of its usual size, in a table


def is_table(values: npt.NDArray[np.float32]) -> bool:
    """Whether entries follow from the two before them, along an axis of a matrix [rows, columns].

    That is so for straight lines, powers, sines and cosines, and nearly for whatever is smooth.

    Examples
    --------
    >>> angles = np.outer(np.arange(256), 0.7 ** np.arange(32))
    >>> is_table(np.cos(angles).astype(np.float32))
    True
    >>> is_table(np.random.default_rng(0).standard_normal((256, 32)).astype(np.float32))
    False
    """
    fewest, most = LENGTH
    for lines, step in product((values, values.T), (1, 2)):  # 2: sines and cosines in turn
        if lines.shape[1] >= fewest * step:
            chosen = np.linspace(0, len(lines) - 1, min(LINES, len(lines))).astype(int)
            if _left_over(lines[chosen, : most * step : step].astype(np.float64)) <= FOLLOWS:
                return True
    return False


def has_even_levels(values: npt.NDArray[np.float32]) -> bool:
    """Whether there are at most 256 different values, evenly spaced, as in a mask or coordinates.

    At 8 bits each has a code of its own, and nobody can choose that of a single entry.
    """
    gaps = np.diff(np.unique(values))
    return gaps.size < LEVELS and bool(np.ptp(gaps) <= UNEVEN * gaps.mean() if gaps.size else True)


def _left_over(lines: npt.NDArray[np.float64]) -> float:
    """What is left of entries when the best prediction from the two before them is taken away.

    Medians, so that a few jumps do not matter, as where the next row of an image begins.
    """
    lines = lines / max(float(np.abs(lines).max()), np.finfo(np.float64).tiny)
    before = np.stack([lines[:, 1:-1], lines[:, :-2], np.ones_like(lines[:, 2:])], axis=-1)
    found = np.linalg.pinv(before) @ lines[:, 2:, None]
    residuals = np.abs(lines[:, 2:] - (before @ found)[..., 0])
    usual = np.median(np.abs(lines - np.median(lines, axis=1, keepdims=True)))
    return float(np.median(residuals) / usual) if usual else 0.0
