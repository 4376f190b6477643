"""Unbiased draws that feed their rounding errors forward.

The columns of a weight are drawn one after the other, those with the largest inputs first. The
errors of the columns drawn so far change the products with typical inputs; before a column is
drawn, it is shifted so that it makes up for that change as far as it can. Each draw is unbiased
given those before it, so the errors have mean zero and the expectation of every weight is still
the weight itself, wherever an attacker put it.

The rule is LDLQ of QuIP (arXiv 2307.13304), which equals OBQ and GPTQ (arXiv 2210.17323), except
that weights are drawn, not rounded to nearest: for H = sum of x x^T = (A + I) D (A + I)^T, with A
strictly upper triangular, column k is drawn from w_k + sum over j < k of (w_j - q_j) A_jk.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .kernels.protocol import Kernels, Panel, RandomDraw
from .schemes import Grid

DAMPINGS = (0.01, 0.04, 0.16)  # one of these shares of H's mean diagonal is added to the diagonal

PANEL = 128  # columns of a panel; what one passes on to the next is one matrix product

Floats = npt.NDArray[np.float32]


CONSTANT = 1e-9  # share of their power below which the variance of products is rounding


class Products(NamedTuple):
    """How large the products of every row are, float32 [rows]; not finite where they overflow.

    powers: their mean squares. variances: from input to input.
    """

    powers: Floats
    variances: Floats

    @classmethod
    def joined(cls, some: Iterable["Products"]) -> "Products":
        """Those of all rows, of which each has some, in order."""
        return cls(*map(np.concatenate, zip(*some, strict=True)))

    @property
    def power(self) -> float:
        """The mean square of them all."""
        return float(np.mean(self.powers))

    def error(self, change: "Products") -> float | None:
        """By how much a change puts them off, relative to how much they vary, 0 to 1.

        The root mean square over the rows, none of which counts as more than lost: a few large
        rows hide nothing, and a few small ones do not condemn the others. None where the products
        vary too little to tell.
        """
        varied = self.variances > CONSTANT * self.powers
        if not varied.any() or not np.isfinite(change.variances).all():
            return None
        lost = np.minimum(change.variances[varied] / self.variances[varied], 1)
        return float(np.sqrt(np.mean(lost)))


@dataclass(frozen=True)
class InputMoments:
    """What one weight, as rows of output channels, is multiplied with.

    The rows are divided evenly into groups (those of a convolution, else one), each of which has
    inputs of its own.

    Parameters
    ----------
    spans : ranges of columns that share a matrix H; errors do not pass from one span to the next
    hessians : second moments of the inputs per span, float32 [groups, columns, columns] of the span
    fresh : inputs that are not in H, float32 [groups, samples, columns], by which errors are judged
    dampings : how much H may be damped, as shares of the mean of its diagonal
    """

    spans: tuple[range, ...]
    hessians: tuple[Floats, ...]
    fresh: Floats
    dampings: tuple[float, ...] = DAMPINGS

    @cached_property
    def factors(self) -> Sequence[tuple[npt.NDArray[np.int64], Floats]]:
        """Per span: the order of its columns, and A^T in that order; both for every group."""
        return [
            _factored(hessian, self.fresh[:, :, span.start : span.stop], self.dampings)
            for span, hessian in zip(self.spans, self.hessians, strict=True)
        ]

    def products(self, weights: Floats) -> Products:
        """Size of the products of weights [n], or of their errors, with `fresh`."""
        groups, _, columns = self.fresh.shape
        rows = weights.reshape(groups, -1, columns)
        with np.errstate(over="ignore", invalid="ignore"):
            products = rows @ self.fresh.transpose(0, 2, 1)
            powers = np.mean(np.square(products), axis=2)
            products -= products.mean(axis=2, keepdims=True)
            return Products(powers.ravel(), np.mean(np.square(products), axis=2).ravel())


def draw_with_feedback(
    weights: npt.NDArray[Any],
    grid: Grid,
    inputs: InputMoments,
    random: RandomDraw,
    kernels: Kernels,
    *,
    panel_width: int = PANEL,
) -> npt.NDArray[np.int8]:
    """Draw a tensor, or some rows of one whose rows are one group, column by column.

    Weights that set a scale keep their codes and only pass their errors on.

    Parameters
    ----------
    weights : flat weights [n] in their own type
    random : the stream
    panel_width : columns of a panel; the codes do not depend on it, save for rounding

    Returns
    -------
    Codes, int8 [n].
    """
    groups, _, columns = inputs.fresh.shape
    codes = np.empty((weights.size // columns, columns), np.int8)
    for span, (order, factors) in zip(inputs.spans, inputs.factors, strict=True):
        errors = np.zeros((len(codes), len(span)), np.float32)
        grouped = errors.reshape(groups, -1, len(span))
        for first in range(0, len(span), panel_width):
            last = min(first + panel_width, len(span))
            with np.errstate(over="ignore", invalid="ignore"):  # then the draw is not used
                carried = grouped[:, :, :first] @ factors[:, first:last, :first].transpose(0, 2, 1)
            panel = Panel(
                carried.reshape(len(errors), -1),
                np.ascontiguousarray(factors[:, first:last, first:last].transpose(0, 2, 1)),
                span.start + order[:, first:last],
                first,
            )
            grid.draw_with_feedback(weights, panel, random, codes, errors, kernels)
    return codes.reshape(-1)


def _factored(
    hessian: Floats, fresh: Floats, dampings: Sequence[float]
) -> tuple[npt.NDArray[np.int64], Floats]:
    """The order of the columns and A^T, for every group.

    The columns with the largest inputs come first, when most others are left to make up for them.
    H is damped so that it is positive definite, and so that errors stay small where it tells little
    of inputs that are not in it. If every draw has the same variance, the errors are
    e (A + I)^-1 with e white; of the dampings, the best makes their products with `fresh` smallest.
    """
    diagonal = np.einsum("gii->gi", hessian)
    order = np.argsort(-diagonal, axis=1, kind="stable")
    means = diagonal.mean(axis=1, dtype=np.float64)
    means[means == 0] = 1.0
    best, least = np.empty_like(hessian), math.inf
    for damping in dampings:
        factors = np.empty(hessian.shape, np.float32)
        expected = 0.0
        for group, columns in enumerate(order):
            # H = R R^T, R upper triangular: numpy has the lower factor, so both axes are reversed
            backwards = columns[::-1]
            damped = hessian[group][np.ix_(backwards, backwards)].astype(np.float64)
            damped[np.diag_indices(len(columns))] += damping * means[group]
            upper = np.linalg.cholesky(damped)[::-1, ::-1]
            factors[group] = (upper / np.diag(upper)).T
            if len(dampings) > 1:
                expected += _expected_power(factors[group], fresh[group][:, columns])
        if not expected >= least:
            best, least = factors, expected
    return order, best


def _expected_power(factors: Floats, fresh: Floats) -> float:
    """Sum of the squared products of fresh inputs with errors that feedback leaves of white ones.

    factors: A^T, [columns, columns]; fresh: [samples, columns], both in the order of feedback.
    """
    left = fresh.T.copy()
    with np.errstate(over="ignore", invalid="ignore"):
        for first in reversed(range(0, len(left), PANEL)):
            panel = slice(first, first + PANEL)
            left[panel] = np.linalg.solve(factors[panel, panel].T, left[panel])
            left[:first] -= factors[panel, :first].T @ left[panel]
        return float(np.sum(np.square(left)))
