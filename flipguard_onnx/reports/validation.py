"""The results of a validation and of verify(), and how far outputs may drift."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from .serialize import FORMAT, jsonable

SMALL_SAMPLE = 8.0  # n output values widen the bound by 1 + 8 / sqrt(n)

DRIFT_FLOOR = 1e-3  # relative L2 below which drift is not judged

MAX_RELATIVE_L2 = 0.8  # above which a model has lost its function, however far nearest rounding is

CHANCE = 3.0  # values that may differ in truth where none did: their upper limit at 95%

MAX_KL = 1.0  # nats above which a language model has


@dataclass(frozen=True)
class Drift:
    """How far one output is from the original's, over all inputs that were tried.

    With x the output and y the original's, all values of all inputs in one vector each:

    Attributes
    ----------
    output : its name
    values : how many values it has for one input
    cosine : x . y / (||x|| ||y||)
    max_abs : max abs(x - y), in the output's unit
    relative_l2 : ||x - y|| / ||y||, where y is 0 the root mean square of x; for integers
        sqrt(1 - share of equal values)
    sqnr_db : -20 log10(relative_l2), in decibels
    top1 : share of equal argmax over the last axis, None where that means nothing; for integers
        the share of equal values
    kl : mean Kullback-Leibler divergence of the softmax of x from that of y over the last axis, in
        nats: by this much the model's log perplexity grows. None where that axis has fewer than
        1,000 values, too few for a vocabulary
    counted : for integers and booleans: how many values of all inputs were compared; else 0
    """

    output: str
    values: int
    cosine: float
    max_abs: float
    relative_l2: float
    sqnr_db: float
    top1: float | None
    kl: float | None = None
    counted: int = 0


@dataclass(frozen=True)
class Validation:
    """The models that were run, and how far each output drifts from the original's.

    "Plain" models have every weight rounded to nearest. "Exact" runs decode the codes to float32
    when the file is loaded; "default" runs leave the file to onnxruntime's optimizations.

    Attributes
    ----------
    feeds : how many inputs each model ran on
    inputs : where they come from: a path, or that they were made up
    max_drift : the drift allowed, as a multiple of nearest rounding's
    plain_exact : nearest rounding, run exactly; one Drift per output, as in the fields below
    guarded_exact : the guarded model, run exactly
    plain_default : nearest rounding, run by default
    guarded_default : the guarded model, run by default
    moved : the float model with moved weights, run by default; empty where none was written
    layers : how many layers were run in place of a model too large to be run whole, or whose
        outputs depend on chance or have shapes that depend on weights; 0: it was run whole
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

    @property
    def allowed(self) -> float:
        """The pooled relative L2 up to which the guarded model passes, run exactly."""
        return drift_bound(self.plain_exact, self.max_drift)


def by_kind(outputs: Sequence[Drift]) -> list[list[Drift]]:
    """The outputs of floats, and those of integers and booleans; without a kind that is not there.

    What rounds floats a little changes a few integers, such as indices of near ties, by anything.
    """
    floats = [drift for drift in outputs if not drift.counted]
    return [kind for kind in (floats, [d for d in outputs if d.counted]) if kind]


def pooled(outputs: Sequence[Drift]) -> float:
    """Root mean square of the relative L2 of outputs of floats, weighted by their values.

    Of those of integers and booleans where there are no others.
    """
    outputs = next(iter(by_kind(outputs)), [])
    values = sum(drift.values for drift in outputs)
    return math.sqrt(sum(d.values * d.relative_l2**2 for d in outputs) / max(values, 1))


def joined(outputs: Sequence[Drift]) -> list[Drift]:
    """The same with those of a decoder's caches, present..., in one: its largest errors."""
    caches = [drift for drift in outputs if drift.output.startswith("present")]
    if len(caches) < 2:
        return list(outputs)
    relative = pooled(caches)
    one = Drift(
        f"{len(caches)} caches, present...",
        sum(drift.values for drift in caches),
        min(drift.cosine for drift in caches),
        max(drift.max_abs for drift in caches),
        relative,
        -20 * math.log10(relative) if relative else math.inf,
        None,
    )
    return [*(drift for drift in outputs if drift not in caches), one]


def drift_factor(nearest: Sequence[Drift], max_drift: float) -> float:
    """The multiple of nearest rounding's drift that is allowed.

    It is `max_drift`, widened for outputs of n values in all by 1 + 8 / sqrt(n).
    """
    values = sum(drift.values for drift in nearest)
    return max_drift * (1 + SMALL_SAMPLE / math.sqrt(max(values, 1)))


def drift_bound(nearest: Sequence[Drift], max_drift: float) -> float:
    """The pooled relative L2 that is allowed, where nearest rounding drifts like this.

    The share of integers and booleans that differ, which is its square, grows as the drift of
    floats does; they may be so few that none happened to differ.
    """
    nearest = next(iter(by_kind(nearest)), [])
    if counted := sum(drift.counted for drift in nearest):
        share = max_drift * (pooled(nearest) ** 2 + CHANCE / counted)
        return min(math.sqrt(share), MAX_RELATIVE_L2)
    relative = drift_factor(nearest, max_drift) * max(pooled(nearest), DRIFT_FLOOR)
    return min(relative, MAX_RELATIVE_L2)


@dataclass(frozen=True)
class Verification:
    """The result of verify().

    Attributes
    ----------
    original : path of the model before the guard
    guarded : path of the guarded model
    scheme : the scheme at which nearest rounding of the original is compared
    made_from : whether `guarded` records this original as its input; None: it has no record
    codes : how many quantized weights `guarded` holds; 0: nothing in it is quantized
    validation : the models that were run, and their drift
    config : the file that gave options of the command line, if one did
    """

    kind: Literal["verify"] = field(default="verify", init=False)
    format_version: int = field(default=FORMAT, init=False)
    original: str
    guarded: str
    scheme: str
    made_from: bool | None
    codes: int
    validation: Validation
    config: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON types."""
        return jsonable(self)

    def render(self) -> str:
        """The result as text for a terminal."""
        from .text import render_verification

        return render_verification(self)
