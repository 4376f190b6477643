"""Try the written models with onnxruntime, side by side with the original.

Four models run on the same inputs: the original, the original with its weights replaced by the
decoded codes (what the guarded model must compute), the plainly quantized one and the guarded one.
The guarded model passes when it computes what its codes say and drifts from the original by no
more than `max_drift` times what plain quantization does. One drift is judged, pooled over all
outputs: rounding errors are a draw of luck, and an output of a few values is too small a sample.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from . import runtime
from .errors import DriftError, RunError, ValidationError
from .feeds import NONE_FIT, load_feeds, made_up_feeds
from .model import Model, tensors

MAX_DRIFT = 3.0  # unbiased draws double the squared error of a weight: 1.41 times in relative L2
SMALL_SAMPLE = 8.0  # n output values widen the bound by 1 + 8 / sqrt(n)
DRIFT_FLOOR = 1e-3  # relative L2 below which drift is not judged
INFIDELITY = 1e-3  # relative L2 that another order of summation may cause
INFIDELITY_16_BIT = 2e-2  # and that decoded weights in a model's 16-bit type may
LOGITS = range(2, 1_000_000)  # sizes of a last axis over which argmax is compared

Array = npt.NDArray[Any]


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


@dataclass(frozen=True)
class Candidates:
    """The files to try.

    decoded: the original with decoded weights, what `guarded` must compute; without it, fidelity
    is not checked. moved: the float model with moved weights, if there is one.
    """

    original: Path
    plain: Path
    guarded: Path
    decoded: Path | None = None
    moved: Path | None = None


class Runner:
    """Runs models on one set of feeds; the feeds are those that the original accepts."""

    def __init__(self, source: Model, data: Path | None) -> None:
        types = {tensor.data_type for tensor in tensors(source.proto)}
        coarse = types & {onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16}
        self.infidelity = INFIDELITY_16_BIT if coarse else INFIDELITY
        self._size = source.size
        self._results: dict[tuple[Path, bool], tuple[list[str], list[list[Array]]]] = {}
        if data:
            self.feeds = load_feeds(data, source.proto)
            self.names, self.expected = self._run(source.path, exact=True)
            return
        problem = NONE_FIT
        session = runtime.open_session(source.path, exact=True, size=source.size)
        for feeds in made_up_feeds(source.proto, source.size):
            try:
                outputs = [session.run(None, feed) for feed in feeds]
            except RunError as error:
                problem = str(error)
                continue
            if all(_finite(value) for values in outputs for value in values):
                self.feeds, self.expected = feeds, outputs
                self.names = session.outputs
                return
            problem = "it returns NaN or infinity"
        raise ValidationError(
            f"{source.path}: the original does not run on made-up inputs ({problem}); "
            "give real ones with --data, or --no-validate"
        )

    def drift(self, path: Path, exact: bool) -> tuple[Drift, ...]:
        """Drift of the model at `path` from the original, per output."""
        names, outputs = self._run(path, exact)
        if names != self.names:
            raise ValidationError(f"{path.name}: outputs are {names}; allowed: {self.names}")
        return drifts(names, self.expected, outputs)

    def require_equal(self, decoded: Path, path: Path) -> None:
        """Require that `path` computes what the model with the decoded weights does."""
        names, wanted = self._run(decoded, exact=True)
        _, outputs = self._run(path, exact=True)
        for index, drift in enumerate(drifts(names, wanted, outputs)):
            is_float = np.issubdtype(wanted[0][index].dtype, np.floating)
            if is_float and drift.relative_l2 > self.infidelity:
                raise ValidationError(
                    f"output {drift.output!r} differs by {drift.relative_l2:.2e} (relative L2) "
                    f"from what the codes stand for; allowed: {self.infidelity:.0e}"
                )

    def _run(self, path: Path, exact: bool) -> tuple[list[str], list[list[Array]]]:
        """Names and outputs of the model at `path` for every feed; run once, then remembered."""
        if (path, exact) not in self._results:
            self._results[path, exact] = self._run_once(path, exact)
        return self._results[path, exact]

    def _run_once(self, path: Path, exact: bool) -> tuple[list[str], list[list[Array]]]:
        session = runtime.open_session(path, exact, self._size)
        try:
            outputs = [session.run(None, feed) for feed in self.feeds]
        except RunError as error:
            raise ValidationError(f"{path.name}: does not run: {error}") from None
        names = session.outputs
        for name, values in zip(names, zip(*outputs, strict=True), strict=True):
            if not all(_finite(value) for value in values):
                raise ValidationError(f"{path.name}: output {name!r} holds NaN or infinity")
        return names, outputs


def compare(
    source: Model, files: Candidates, data: Path | None = None, max_drift: float = MAX_DRIFT
) -> Validation:
    """Run the models and judge the guarded one; `data` is an .npz of inputs.

    Raises ValidationError, naming the output, the value and the bound.
    """
    runner = Runner(source, data)
    for path in filter(None, (files.guarded, files.moved)):
        check_model(path, source)
    if files.decoded:
        runner.require_equal(files.decoded, files.guarded)
    result = Validation(
        len(runner.feeds),
        str(data) if data else "made up from the graph's signature",
        max_drift,
        plain_exact=runner.drift(files.plain, exact=True),
        guarded_exact=runner.drift(files.guarded, exact=True),
        plain_default=runner.drift(files.plain, exact=False),
        guarded_default=runner.drift(files.guarded, exact=False),
        moved=runner.drift(files.moved, exact=False) if files.moved else (),
    )
    judge(result.plain_exact, result.guarded_exact, max_drift)
    judge(result.plain_default, result.guarded_default, max_drift)
    if result.moved:
        judge(result.plain_default, result.moved, max_drift)
    return result


def check_model(path: Path, source: Model) -> None:
    """onnx.checker must accept the file, unless it does not accept the original either."""
    problem = runtime.check(path, source.size)
    if problem and not runtime.check(source.path, source.size):
        raise ValidationError(f"{path.name}: onnx.checker: {problem}")


def pooled(outputs: Sequence[Drift]) -> float:
    """Root mean square of the outputs' relative L2, weighted by their numbers of values."""
    values = sum(drift.values for drift in outputs)
    return math.sqrt(sum(d.values * d.relative_l2**2 for d in outputs) / max(values, 1))


def judge(plain: Sequence[Drift], guarded: Sequence[Drift], max_drift: float) -> None:
    """Raise DriftError when the guarded drift is above `max_drift` times plain's.

    For outputs of n values in all, the bound is wider by 1 + 8 / sqrt(n).
    """
    values = sum(drift.values for drift in plain)
    factor = max_drift * (1 + SMALL_SAMPLE / math.sqrt(max(values, 1)))
    bound = factor * max(pooled(plain), DRIFT_FLOOR)
    if not pooled(guarded) <= bound:
        raise DriftError(
            f"the outputs drift by {pooled(guarded):.4f} (relative L2) from the original's; "
            f"allowed: {bound:.4f}, {factor:.2f} times plain quantization's"
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
                    f"output {name!r} has shape {np.shape(found)}; allowed: {np.shape(wanted)}"
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


def _finite(value: Array) -> bool:
    return not np.issubdtype(value.dtype, np.floating) or bool(np.isfinite(value).all())
