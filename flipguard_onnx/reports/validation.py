"""What a validation found."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from .serialize import FORMAT, jsonable


@dataclass(frozen=True)
class Drift:
    """How far one output is from the original's, over all feeds.

    values: how many the output has for one feed. relative_l2: ||x - original|| / ||original||.
    sqnr_db: -20 log10 of it. top1: share of equal argmax over the last axis (None where that means
    nothing). For integers, top1 is the share of equal values, relative_l2 the root of the rest.
    """

    output: str
    values: int
    cosine: float
    max_abs: float
    relative_l2: float
    sqnr_db: float
    top1: float | None


@dataclass(frozen=True)
class Validation:
    """What was run and what came out: one Drift per output for every model and way of running it.

    exact: with DequantizeLinear folded to float32 at load. default: as onnxruntime runs the file.
    moved: the float model with moved weights, where one was written. layers: how many were run
    instead of the models, which are too large; 0: whole models.
    """

    feeds: int
    inputs: str
    max_drift: float
    plain_exact: tuple[Drift, ...]
    guarded_exact: tuple[Drift, ...]
    plain_default: tuple[Drift, ...]
    guarded_default: tuple[Drift, ...]
    moved: tuple[Drift, ...] = ()
    layers: int = 0


def pooled(outputs: Sequence[Drift]) -> float:
    """Root mean square of the outputs' relative L2, weighted by their numbers of values."""
    values = sum(drift.values for drift in outputs)
    return math.sqrt(sum(d.values * d.relative_l2**2 for d in outputs) / max(values, 1))


@dataclass(frozen=True)
class Verification:
    """The result of verify().

    made_from: `guarded` records this original (None: no record). config: as in a Scan.
    """

    kind: Literal["verify"] = field(default="verify", init=False)
    format_version: int = field(default=FORMAT, init=False)
    original: str
    guarded: str
    scheme: str
    made_from: bool | None
    validation: Validation
    config: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return jsonable(self)

    def render(self) -> str:
        """The result as text for a terminal."""
        from .text import render_verification

        return render_verification(self)
