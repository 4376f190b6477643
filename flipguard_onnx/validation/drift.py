"""How far outputs are from the original's, and how far they may be."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import DriftError, ValidationError
from ..reports.validation import (
    CHANCE,
    MAX_KL,
    MAX_RELATIVE_L2,
    Drift,
    by_kind,
    drift_bound,
    drift_factor,
    pooled,
)

LOGITS = range(2, 1_000_000)  # sizes of a last axis over which argmax is compared

VOCABULARY = 1000  # from this size on, a last axis is taken for logits of a distribution

KERNELS = 0.1  # relative L2, or share of integers, that kernels with integers may add

TINY = float(np.finfo(np.float32).tiny)

Array = npt.NDArray[Any]


def judge(nearest: Sequence[Drift], guarded: Sequence[Drift], max_drift: float) -> None:
    """Raise DriftError when the guarded model is farther from the original than it may be."""
    for one, other in zip(by_kind(nearest), by_kind(guarded), strict=True):
        _judge_kind(one, other, max_drift)
    for drift in guarded:
        if drift.kl is not None and not drift.kl <= MAX_KL:
            raise DriftError(
                "the distributions of output {output!r} are {found:.2f} nats (KL divergence) away "
                "from the original's",
                found=drift.kl,
                output=drift.output,
                allowed=f"up to {MAX_KL:g}, which is {math.exp(MAX_KL):.1f} times the perplexity",
            )


def _judge_kind(nearest: Sequence[Drift], guarded: Sequence[Drift], max_drift: float) -> None:
    """The same for outputs that are all floats, or all integers and booleans, without the KL."""
    found, bound = pooled(guarded), drift_bound(nearest, max_drift)
    if found <= bound:
        return
    if guarded[0].counted:
        raise DriftError(
            "{found:.1%} of the outputs' integers and booleans differ from the original's",
            found=found**2,
            allowed=f"{bound**2:.1%}: {max_drift:g} times nearest rounding's "
            f"{pooled(nearest) ** 2:.1%} and what chance may add, and at most "
            f"{MAX_RELATIVE_L2**2:.0%} at all",
        )
    raise DriftError(
        "the outputs drift by {found:.4f} (relative L2) from the original's",
        found=found,
        allowed=f"{bound:.4f}: {drift_factor(nearest, max_drift):.2f} times nearest rounding's, "
        f"and at most {MAX_RELATIVE_L2:g} at all",
    )


def require_same_meaning(exact: Sequence[Drift], default: Sequence[Drift]) -> None:
    """Raise ValidationError when a session with default options reads something else in a file.

    Its kernels round what weights are multiplied with, which adds little; where it rewrites a graph
    wrongly, rounding to nearest is as far off, and no comparison with that shows it.

    Parameters
    ----------
    exact : of the guarded model with its codes decoded first
    default : of the same file in a session with default options
    """
    for one, other in zip(by_kind(exact), by_kind(default), strict=True):
        counted = sum(drift.counted for drift in one)
        if counted:
            _require_same_integers(pooled(one) ** 2, pooled(other) ** 2, counted)
            continue
        allowed = 2 * pooled(one) + KERNELS
        if pooled(other) <= allowed:
            continue
        raise ValidationError(
            "in a session with default options the outputs drift by {found:.4f} (relative L2), but "
            "by {exact:.4f} with the codes decoded first: onnxruntime rewrites this graph wrongly",
            found=pooled(other),
            exact=pooled(one),
            allowed=f"{allowed:.4f}",
        )


def _require_same_integers(exact: float, default: float, counted: int) -> None:
    """The same for the shares of integers and booleans that differ, of so many."""
    allowed = 2 * (exact + CHANCE / counted) + KERNELS
    if not default <= allowed:
        raise ValidationError(
            "in a session with default options {found:.1%} of the outputs' integers and booleans "
            "differ, but {exact:.1%} with the codes decoded first: onnxruntime rewrites this graph "
            "wrongly",
            found=default,
            exact=exact,
            allowed=f"{allowed:.1%}",
        )


def drifts(
    names: list[str], expected: Iterable[list[Array]], outputs: Iterable[list[Array]]
) -> tuple[Drift, ...]:
    """One Drift per output; expected and outputs: of every feed, in the order of the names."""
    sums = DriftSums(names)
    for wanted, found in zip(expected, outputs, strict=True):
        sums.add(wanted, found)
    return sums.drifts()


class DriftSums:
    """What the drifts of all outputs follow from, added up feed by feed.

    names: of the outputs.
    """

    def __init__(self, names: list[str]) -> None:
        self._sums = [_Sums(name) for name in names]

    def add(self, wanted: list[Array], found: list[Array]) -> None:
        """Add the outputs for one feed, in the order of the names."""
        for sums, one, other in zip(self._sums, wanted, found, strict=True):
            sums.add(one, other)

    def drifts(self) -> tuple[Drift, ...]:
        """One Drift per output."""
        return tuple(sums.drift() for sums in self._sums)


class _Sums:
    """The same for one output: x and y are its values wanted and found."""

    def __init__(self, output: str) -> None:
        self._output = output
        self._feeds = self._size = self._equal = 0
        self._xx = self._yy = self._xy = self._error = self._max_abs = 0.0
        self._is_float = True
        self._top1: list[Array] | None = []  # by feed, as the divergences
        self._kl: list[Array] | None = []

    def add(self, wanted: Array, found: Array) -> None:
        if np.shape(wanted) != np.shape(found):
            raise ValidationError(
                "output {tensor!r} has shape {found}",
                tensor=self._output,
                found=np.shape(found),
                allowed=str(np.shape(wanted)),
            )
        self._feeds += 1
        self._size += np.size(wanted)
        self._is_float = np.issubdtype(np.asarray(wanted).dtype, np.floating)
        if not self._is_float:
            self._equal += int(np.count_nonzero(wanted == found))
            return
        last = wanted.shape[-1] if wanted.ndim >= 2 else 0
        if last not in LOGITS:
            self._top1 = None
        elif self._top1 is not None:
            self._top1.append(np.ravel(np.argmax(wanted, -1) == np.argmax(found, -1)))
        if last not in LOGITS or last < VOCABULARY:
            self._kl = None
        elif self._kl is not None:
            self._kl.append(_divergences(wanted, found))
        masked = np.isneginf(wanted)
        if not np.array_equal(masked, np.isneginf(found)):
            raise ValidationError(
                "output {tensor!r} is -inf where the original's is not, or the other way round",
                tensor=self._output,
            )
        x, y = (values[~masked].astype(np.float64) for values in (wanted, found))
        self._xx += float(x @ x)
        self._yy += float(y @ y)
        self._xy += float(x @ y)
        y -= x
        self._error += float(y @ y)
        self._max_abs = max(self._max_abs, float(np.max(np.abs(y), initial=0)))

    def drift(self) -> Drift:
        name, values = self._output, self._size // self._feeds
        if not self._is_float:
            equal = self._equal / self._size if self._size else 1.0
            relative = math.sqrt(1 - equal)
            return Drift(
                name,
                values,
                equal,
                float(equal < 1),
                relative,
                _decibels(relative),
                equal,
                counted=self._size,
            )
        norms = math.sqrt(self._xx), math.sqrt(self._yy)
        unit = norms[0] if norms[0] > TINY else math.sqrt(self._size)
        relative = math.sqrt(self._error) / max(unit, TINY)
        cosine = self._xy / (norms[0] * norms[1]) if all(norms) else float(norms[0] == norms[1])
        top1, kl = map(_mean, (self._top1, self._kl))
        return Drift(name, values, cosine, self._max_abs, relative, _decibels(relative), top1, kl)


def _decibels(relative: float) -> float:
    """The signal-to-noise ratio of errors with this relative L2."""
    return -20 * math.log10(relative) if relative else math.inf


def _mean(parts: list[Array] | None) -> float | None:
    values = np.concatenate(parts) if parts else np.zeros(0)
    return float(np.mean(values)) if values.size else None


def _divergences(wanted: Array, found: Array) -> npt.NDArray[np.float64]:
    """Kullback-Leibler divergence of the softmax of `found` from that of `wanted`, in nats.

    One for every position, over the last axis.
    """
    p, q = (_log_softmax(x.astype(np.float64)) for x in (wanted, found))
    differences = np.subtract(p, q, where=np.isfinite(p), out=np.zeros_like(p))
    divergences: npt.NDArray[np.float64] = np.sum(np.exp(p) * differences, axis=-1).ravel()
    return divergences


def _log_softmax(logits: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    result: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result
