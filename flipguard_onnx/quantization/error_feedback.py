"""Unbiased draws that feed their rounding errors forward.

The columns of a weight are drawn one after the other, those with the largest inputs first. Before
a column is drawn, it takes over what the errors of the columns drawn so far do to the products with
typical inputs, as far as it can make up for it. Each draw is unbiased given those before it, and so
errors have mean zero and every weight's expectation is still the weight itself, wherever an
attacker put it.

The rule is LDLQ of QuIP (arXiv 2307.13304), which equals OBQ/GPTQ (arXiv 2210.17323), with the
draw in the place of rounding to nearest: for H = sum of x x^T = (A + I) D (A + I)^T, A strictly
upper triangular, column k is drawn from w_k + sum over j < k of (w_j - q_j) A_jk.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from .schemes import Grid

DAMPING = 0.05  # of the mean of H's diagonal is added to the diagonal

PANEL = 128  # columns; what one panel passes on to the next is one matrix product

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class InputMoments:
    """What one weight, as rows of canonical order, is multiplied with.

    Rows come in `groups` of equal size (groups of a convolution; 1 otherwise), each with inputs of
    its own. spans: column ranges that share a matrix H; errors do not pass from one to the next.
    hessians: one float64 array [groups, columns of the span, the same] per span.
    fresh: inputs that are not in H, float32 [groups, samples, columns]; the errors are judged on.
    """

    spans: tuple[range, ...]
    hessians: tuple[npt.NDArray[np.float64], ...]
    fresh: Floats

    @cached_property
    def weaves(self) -> Sequence[tuple[npt.NDArray[np.int64], Floats]]:
        """Per span: the order of its columns, and A^T in that order; both for every group."""
        return [_weave(hessian) for hessian in self.hessians]

    def error(self, errors: Floats) -> float:
        """Mean squared change of the products with `fresh` when the weights change by `errors`.

        Infinite or NaN where that overflows.
        """
        groups, _, columns = self.fresh.shape
        rows = errors.reshape(groups, -1, columns)
        with np.errstate(over="ignore", invalid="ignore"):
            return float(np.mean(np.square(rows @ self.fresh.transpose(0, 2, 1))))


def draw(
    weights: npt.NDArray[Any],
    grid: Grid,
    inputs: InputMoments,
    key: np.uint64,
    limit: np.float32,
    backend: ModuleType,
) -> npt.NDArray[np.int8]:
    """Codes [n] of flat weights [n] in their own type; `key` and `limit` as `Grid.draw` takes them.

    Weights that set a scale keep their codes and only pass their errors on.
    """
    groups, _, columns = inputs.fresh.shape
    codes = np.empty((weights.size // columns, columns), np.int8)
    for span, (order, weave) in zip(inputs.spans, inputs.weaves, strict=True):
        errors = np.zeros((len(codes), len(span)), np.float32)
        grouped = errors.reshape(groups, -1, len(span))
        for first in range(0, len(span), PANEL):
            last = min(first + PANEL, len(span))
            with np.errstate(over="ignore", invalid="ignore"):  # then the draw is not used
                carried = grouped[:, :, :first] @ weave[:, first:last, :first].transpose(0, 2, 1)
            panel = (
                carried.reshape(len(errors), -1),
                np.ascontiguousarray(weave[:, first:last, first:last].transpose(0, 2, 1)),
                span.start + order[:, first:last],
                first,
                key,
                limit,
            )
            grid.feed(weights, panel, codes, errors, backend)
    return codes.reshape(-1)


def _weave(hessian: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.int64], Floats]:
    """The order of the columns and A^T, for every group.

    The columns with the largest inputs come first: the most others are left to make up for them.
    H is damped so that it has a factor.
    """
    diagonal = np.einsum("gii->gi", hessian)
    order = np.argsort(-diagonal, axis=1, kind="stable")
    damping = DAMPING * diagonal.mean(axis=1)
    damping[damping == 0] = 1.0
    sorted_ = np.take_along_axis(hessian, order[:, :, None], axis=1)
    sorted_ = np.take_along_axis(sorted_, order[:, None, :], axis=2)
    np.einsum("gii->gi", sorted_)[:] += damping[:, None]
    # H = R R^T, R upper triangular: numpy has the lower factor, of the matrix turned round
    upper = np.linalg.cholesky(sorted_[:, ::-1, ::-1])[:, ::-1, ::-1]
    weave = upper / np.einsum("gii->gi", upper)[:, None, :]
    return order, np.ascontiguousarray(weave.transpose(0, 2, 1), np.float32)
