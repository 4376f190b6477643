"""How far outputs are from the original's, and how far they may be."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import DriftError, ValidationError
from ..reports.guard import ActivationQuantization
from ..reports.validation import Drift, Validation, drift_bound, drift_factor, pooled

LOGITS = range(2, 1_000_000)  # sizes of a last axis over which argmax is compared

Array = npt.NDArray[Any]


def require_useful(validation: Validation, integers: ActivationQuantization) -> None:
    """Raise DriftError when outputs are no nearer to the original's than zeros would be."""
    drift = pooled(validation.guarded_default)
    if not drift < 1:
        raise DriftError(
            "with {activations} activations the outputs drift by {found:.4f} (relative L2) from "
            "the original's",
            found=drift,
            activations=integers.activations,
            allowed="below 1, which zeros have; real inputs (--data) or another --calibration may "
            "help",
        )


def judge(nearest: Sequence[Drift], guarded: Sequence[Drift], max_drift: float) -> None:
    """Raise DriftError when the guarded drift is above the bound that `drift_bound` sets."""
    factor, bound = drift_factor(nearest, max_drift), drift_bound(nearest, max_drift)
    if not pooled(guarded) <= bound:
        raise DriftError(
            "the outputs drift by {found:.4f} (relative L2) from the original's",
            found=pooled(guarded),
            allowed=f"{bound:.4f}, {factor:.2f} times plain quantization's",
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
    top1 = None
    if all(w.ndim >= 2 and w.shape[-1] in LOGITS for w, _ in pairs):
        same = [np.ravel(np.argmax(w, -1) == np.argmax(f, -1)) for w, f in pairs]
        top1 = float(np.mean(np.concatenate(same)))
    x, y = x.astype(np.float64), y.astype(np.float64)
    norms = float(np.linalg.norm(x)), float(np.linalg.norm(y))
    error = float(np.linalg.norm(y - x))
    relative = error / max(norms[0], float(np.finfo(np.float32).tiny))
    cosine = float(x @ y / (norms[0] * norms[1])) if all(norms) else float(norms[0] == norms[1])
    sqnr = float(-20 * np.log10(relative)) if relative else np.inf
    max_abs = float(np.max(np.abs(y - x), initial=0))
    return Drift(name, values, cosine, max_abs, relative, sqnr, top1)
