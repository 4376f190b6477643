"""Try the written models with onnxruntime, side by side with the original.

Four models run on the same inputs: the original, the original with its weights replaced by the
decoded codes (what the guarded model must compute), the plainly quantized one and the guarded one.
The guarded model passes when it computes what its codes say and drifts from the original by no
more than `max_drift` times what plain quantization does. One drift is judged, pooled over all
outputs: rounding errors are a draw of luck, and an output of a few values is too small a sample.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto

from .. import runtime
from ..calibration.inputs import NONE_FIT, load_feeds, made_up_feeds
from ..emit.opset import converted
from ..emit.writers import FloatWriter, ModelWriter, QdqWriter, decoded_values
from ..errors import RunError, ValidationError
from ..graph.traversal import tensors
from ..graph.weights import Weight, find_weights
from ..io.model import Model, open_model
from ..io.writer import Output
from ..quantization.schemes import Scheme
from ..reports.validation import Drift, Validation
from .drift import MAX_DRIFT, Array, _finite, drifts, judge
from .layers import Layer, cut_out, sample

INFIDELITY = 1e-3  # relative L2 that another order of summation may cause

INFIDELITY_16_BIT = 2e-2  # and that decoded weights in a model's 16-bit type may


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


class ModelRunner:
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
    runner = ModelRunner(source, data)
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


@dataclass(frozen=True)
class Validator:
    """What stands for the original.

    source: the original, or its layers; prepared: its graph at the opset that will be written;
    layers: those that were cut out, if they were.
    """

    source: Model
    prepared: ModelProto
    layers: tuple[Layer, ...] = ()

    @classmethod
    def of(
        cls,
        source: Model,
        prepared: ModelProto,
        weights: Sequence[Weight],
        schemes: Sequence[Scheme],
        standard_ops: bool,
        most: int,
        folder: Path,
    ) -> "Validator":
        """The model whole if it has no more than `most` bytes, else layers of it."""
        if source.size <= most:
            return cls(source, prepared)
        layers = sample(source, weights, schemes, standard_ops)
        small = cut_out(source, layers, folder)
        opset = max(entry.version for entry in prepared.opset_import if entry.domain == "")
        return cls(small, converted(small, opset, find_weights(small.proto)[0]), tuple(layers))

    def sinks(self, folder: Path, standard_ops: bool) -> dict[str, ModelWriter]:
        """The models to compare with: plainly quantized, and what the codes must compute."""
        plain, decoded = (
            Output(folder / kind, folder / f"{kind}.onnx", external=True)
            for kind in ("plain", "decoded")
        )
        return {
            "plain": QdqWriter(self.source, self.prepared, plain, standard_ops, nearest=True),
            "decoded": FloatWriter(self.source, decoded, decoded_values),
        }

    def run(
        self,
        original: Model,
        files: Mapping[str, Path],
        data: Path | None,
        max_drift: float,
        folder: Path,
    ) -> Validation:
        """Compare the files: "qdq", "plain", and, if they are there, "decoded" and "float".

        data: inputs for whole models. Raises ValidationError as `compare` does.
        """
        written = {kind: files[kind] for kind in ("qdq", "float") if kind in files}
        if self.layers:
            for path in written.values():
                check_model(path, original)
            for kind, path in written.items():
                whole = open_model(path, ours=True)
                written[kind] = cut_out(whole, self.layers, folder / f"{kind}-layers").path
        candidates = Candidates(
            self.source.path,
            files["plain"],
            written["qdq"],
            files.get("decoded"),
            written.get("float"),
        )
        result = compare(self.source, candidates, None if self.layers else data, max_drift)
        return replace(result, layers=len(self.layers))
