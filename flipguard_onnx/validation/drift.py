"""How far outputs are from the original's, and how far they may be."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import DriftError, ValidationError
from ..reports.validation import (
    MAX_KL,
    MAX_RELATIVE_L2,
    Drift,
    drift_bound,
    drift_factor,
    pooled,
)

LOGITS = range(2, 1_000_000)  # sizes of a last axis over which argmax is compared

VOCABULARY = 1000  # from this size on, a last axis is taken for logits of a distribution

Array = npt.NDArray[Any]


def judge(nearest: Sequence[Drift], guarded: Sequence[Drift], max_drift: float) -> None:
    """Raise DriftError when the guarded model is farther from the original than it may be."""
    factor, bound = drift_factor(nearest, max_drift), drift_bound(nearest, max_drift)
    if not pooled(guarded) <= bound:
        raise DriftError(
            "the outputs drift by {found:.4f} (relative L2) from the original's",
            found=pooled(guarded),
            allowed=f"{bound:.4f}: {factor:.2f} times nearest rounding's, and at most "
            f"{MAX_RELATIVE_L2:g} at all",
        )
    for drift in guarded:
        if drift.kl is not None and not drift.kl <= MAX_KL:
            raise DriftError(
                "the distributions of output {output!r} are {found:.2f} nats (KL divergence) away "
                "from the original's",
                found=drift.kl,
                output=drift.output,
                allowed=f"up to {MAX_KL:g}, which is {math.exp(MAX_KL):.1f} times the perplexity",
            )


def drifts(
    names: list[str], expected: list[list[Array]], outputs: list[list[Array]]
) -> tuple[Drift, ...]:
    """One Drift per output; expected and outputs: of every feed, in the order of the names."""
    results = []
    for index, name in enumerate(names):
        pairs = [(e[index], o[index]) for e, o in zip(expected, outputs, strict=True)]
        for wanted, found in pairs:
            if np.shape(wanted) != np.shape(found):
                raise ValidationError(
                    "output {tensor!r} has shape {found}",
                    tensor=name,
                    found=np.shape(found),
                    allowed=str(np.shape(wanted)),
                )
        results.append(_drift(name, pairs))
    return tuple(results)


def _drift(name: str, pairs: list[tuple[Array, Array]]) -> Drift:
    x = np.concatenate([np.ravel(wanted) for wanted, _ in pairs])
    y = np.concatenate([np.ravel(found) for _, found in pairs])
    values = x.size // len(pairs)
    if not np.issubdtype(x.dtype, np.floating):
        equal = float(np.mean(x == y)) if x.size else 1.0
        return Drift(name, values, equal, float(equal < 1), math.sqrt(1 - equal), np.inf, equal)
    top1 = kl = None
    if all(w.ndim >= 2 and w.shape[-1] in LOGITS for w, _ in pairs):
        same = [np.ravel(np.argmax(w, -1) == np.argmax(f, -1)) for w, f in pairs]
        top1 = float(np.mean(np.concatenate(same)))
        if all(w.shape[-1] >= VOCABULARY for w, _ in pairs):
            kl = float(np.mean(np.concatenate([_divergences(w, f) for w, f in pairs])))
    x, y = x.astype(np.float64), y.astype(np.float64)
    norms = float(np.linalg.norm(x)), float(np.linalg.norm(y))
    error = float(np.linalg.norm(y - x))
    relative = error / max(norms[0], float(np.finfo(np.float32).tiny))
    cosine = float(x @ y / (norms[0] * norms[1])) if all(norms) else float(norms[0] == norms[1])
    sqnr = float(-20 * np.log10(relative)) if relative else np.inf
    max_abs = float(np.max(np.abs(y - x), initial=0))
    return Drift(name, values, cosine, max_abs, relative, sqnr, top1, kl)


def _divergences(wanted: Array, found: Array) -> npt.NDArray[np.float64]:
    """Kullback-Leibler divergence of the softmax of `found` from that of `wanted`, in nats.

    One for every position, over the last axis.
    """
    p, q = (_log_softmax(x.astype(np.float64)) for x in (wanted, found))
    divergences: npt.NDArray[np.float64] = np.sum(np.exp(p) * (p - q), axis=-1).ravel()
    return divergences


def _log_softmax(logits: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    result: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result
