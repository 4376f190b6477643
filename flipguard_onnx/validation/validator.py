"""Try the written models with onnxruntime, side by side with the original.

Four models run on the same samples: the original, the original with its weights replaced by the
decoded codes (what the guarded model must compute), one that was rounded to nearest and the guarded
one. The guarded model passes when it computes what its codes say, and drifts from the original by
no more than `max_drift` times what rounding to nearest does. One drift is judged, pooled over all
outputs: rounding errors are a matter of luck, and an output of a few values is too small a sample.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import GraphProto

from .. import runtime
from ..calibration.inputs import required_inputs
from ..calibration.samples import Array, Found, Samples, finite
from ..emit.opset import converted
from ..emit.weight_forms import Target
from ..emit.writers import FloatWriter, ModelWriter, QdqWriter, decoded_values
from ..errors import RunError, ValidationError
from ..graph.constants import RANDOM
from ..graph.copies import IndexedModel
from ..graph.traversal import attribute, bodies, opset_of, subgraphs, tensors
from ..graph.weights import Weight
from ..io.model import Model, open_model
from ..io.writer import Output
from ..quantization.rounding import largest_sound
from ..quantization.schemes import Scheme
from ..reports.validation import Drift, Validation
from .drift import DriftSums, judge, require_same_meaning
from .layers import Layer, cut_out, sample
from .stand_ins import stand_in

INFIDELITY = 1e-3  # relative L2 that another order of summation may cause
INFIDELITY_16_BIT = 2e-2  # and that decoded weights in a model's 16-bit type may

HUGE = 1e-3  # of the largest value that a type has; sums of a few such products may overflow

# Operators whose inputs, or all but the first, decide on the shape of the result by their values.
SELECTING = ("NonMaxSuppression", "NonZero", "Unique", "Compress", "Range", "ConstantOfShape")
SHAPED = ("Expand", "Reshape", "Tile", "Slice", "Pad", "Resize", "TopK", "OneHot")


class ModelRunner:
    """Runs models on the samples of the original, each model once for each way of running it.

    It keeps drifts, and no outputs but the original's.

    baselines: what was made of the original for the comparison alone, in words, by path.
    """

    def __init__(self, samples: Samples, baselines: Mapping[Path, str] | None = None) -> None:
        self._source, self._baselines = samples.source, baselines or {}
        found = samples.require()
        self.feeds, self.expected, self.names = found.feeds, found.outputs, found.names
        samples.release()
        types = {tensor.data_type for tensor in tensors(samples.source.proto)}
        coarse = types & {onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16}
        self._infidelity = INFIDELITY_16_BIT if coarse else INFIDELITY
        self._size = samples.source.size
        self._drifts: dict[tuple[Path, bool], tuple[Drift, ...]] = {}

    def drift(self, path: Path, exact: bool) -> tuple[Drift, ...]:
        """Drift of the model at `path` from the original, per output."""
        if (path, exact) not in self._drifts:
            self._compare(path, exact)
        return self._drifts[path, exact]

    def require_equal(self, decoded: Path, path: Path) -> None:
        """Require that `path` computes what the model with the decoded weights does."""
        _, outputs = self._run(decoded, exact=True)
        wanted = list(outputs)
        (drifts,) = self._compare(path, True, wanted)
        for index, drift in enumerate(drifts):
            is_float = np.issubdtype(wanted[0][index].dtype, np.floating)
            if is_float and drift.relative_l2 > self._infidelity:
                raise ValidationError(
                    "output {tensor!r} differs by {found:.2e} (relative L2) from what the codes "
                    "stand for",
                    tensor=drift.output,
                    found=drift.relative_l2,
                    allowed=f"{self._infidelity:.0e}",
                )

    def _compare(
        self, path: Path, exact: bool, *others: list[list[Array]]
    ) -> list[tuple[Drift, ...]]:
        """Run the model at `path`, for its drift from the original; its drifts from `others`.

        Its outputs are not kept: those of one feed are compared, then those of the next.
        """
        names, outputs = self._run(path, exact)
        if names != self.names:
            raise ValidationError(
                "outputs are {found}", path=path.name, found=names, allowed=str(self.names)
            )
        references = (self.expected, *others)
        sums = [DriftSums(names) for _ in references]
        for index, found in enumerate(outputs):
            for each, reference in zip(sums, references, strict=True):
                each.add(reference[index], found)
        self._drifts[path, exact], *rest = (each.drifts() for each in sums)
        return rest

    def _run(self, path: Path, exact: bool) -> tuple[list[str], Iterator[list[Array]]]:
        """Names and outputs of the model at `path`, these feed by feed."""
        session = runtime.open_session(path, exact, self._size)
        return session.outputs, self._outputs(session, path)

    def _outputs(self, session: runtime.Session, path: Path) -> Iterator[list[Array]]:
        named, how = path.name, ""
        if path in self._baselines:
            named, how = str(self._source.path), f"{self._baselines[path]}, "
        for feed in self.feeds:
            try:
                outputs = session.run(None, feed)
            except RunError as error:
                raise ValidationError(
                    how + "does not run: {found}", path=named, found=str(error)
                ) from None
            for name, values in zip(session.outputs, outputs, strict=True):
                if not finite(values):
                    broken = ValidationError(
                        how + "output {tensor!r} holds NaN or infinity", path=named, tensor=name
                    )
                    raise broken.advise(_huge_values(self._source))
            yield outputs


@dataclass(frozen=True)
class Validator:
    """Compares what a run writes with the original, or with layers cut out of it.

    original: the model that is guarded. source: what is run in its place, itself unless it is too
    large; original_graph: the graph of that, graph: the same at the opset that will be written;
    samples: those of `source`; layers: those that were cut out, if they were; target: what the
    models are written for; max_drift: as in GuardOptions.
    """

    original: Model
    source: Model
    original_graph: IndexedModel
    graph: IndexedModel
    samples: Samples
    layers: tuple[Layer, ...]
    target: Target
    max_drift: float

    @classmethod
    def of(
        cls,
        samples: Samples,
        original: IndexedModel,
        graph: IndexedModel,
        weights: Sequence[tuple[Weight, Scheme]],
        folder: Path,
        *,
        max_bytes: int,
        max_drift: float,
        target: str,
    ) -> "Validator":
        """For the samples' model: whole if it has no more than `max_bytes` and its outputs can be
        compared, else layers of it.

        original, graph: the model's, and the same at the opset that will be written; weights: each
        with its scheme; folder: new, for the layers.
        """
        source = samples.source
        aim = Target.of(graph.proto, target)  # the same for layers, so that their forms are
        names = {weight.tensor_name for weight, _ in weights}
        if source.size <= max_bytes and _comparable(samples, names):
            return cls(source, source, original, graph, samples, (), aim, max_drift)
        schemes = [scheme for _, scheme in weights]
        layers = sample(source, [weight for weight, _ in weights], schemes, aim)
        small = cut_out(source, layers, folder)
        opset = opset_of(graph.proto)
        found = IndexedModel.of(small.proto)
        prepared = converted(small, opset, found)
        own = Samples(small, None, samples.without, takes_data=False)
        return cls(source, small, found, prepared, own, tuple(layers), aim, max_drift)

    def writers(self, folder: Path) -> dict[str, ModelWriter]:
        """The models to compare with: rounded to nearest, and what the codes must compute."""
        nearest, decoded = (
            Output(folder / kind, folder / f"{kind}.onnx", external=True)
            for kind in ("plain", "decoded")
        )
        return {
            "plain": QdqWriter(self.source, self.graph, nearest, self.target, nearest=True),
            "decoded": FloatWriter(self.source, self.original_graph, decoded, decoded_values),
        }

    def compare(self, files: Mapping[str, Path], folder: Path) -> Validation:
        """Run the files and judge the guarded one.

        Parameters
        ----------
        files : "qdq", the guarded model, and "plain", the one rounded to nearest; where they are
            there, "decoded", the original with decoded weights, without which it is not checked
            that codes mean what they should, and "float", the float model with moved weights
        folder : for layers that are cut out of the files

        Raises
        ------
        ValidationError, DriftError : naming the output, the value and the bound
        """
        written = {kind: files[kind] for kind in ("qdq", "float") if kind in files}
        for path in written.values():
            check_model(path, self.original)
        written["plain"] = files["plain"]
        for kind, path in written.items():
            written[kind] = stand_in(path, folder / f"{kind}-stand-in")
        if self.layers:
            for kind, path in written.items():
                written[kind] = self._layers_of(path, folder / f"{kind}-layers")
        guarded, nearest, moved = written["qdq"], written["plain"], written.get("float")
        baselines = {nearest: "rounded to nearest"}
        if "decoded" in files:
            baselines[files["decoded"]] = "with decoded weights"
        runner = ModelRunner(self.samples, baselines)
        if "decoded" in files:
            runner.require_equal(files["decoded"], guarded)
        result = Validation(
            len(runner.feeds),
            self.samples.description,
            self.max_drift,
            plain_exact=runner.drift(nearest, exact=True),
            guarded_exact=runner.drift(guarded, exact=True),
            plain_default=runner.drift(nearest, exact=False),
            guarded_default=runner.drift(guarded, exact=False),
            moved=runner.drift(moved, exact=False) if moved else (),
            layers=len(self.layers),
        )
        judge(result.plain_exact, result.guarded_exact, self.max_drift)
        judge(result.plain_default, result.guarded_default, self.max_drift)
        require_same_meaning(result.guarded_exact, result.guarded_default)
        if result.moved:
            judge(result.plain_default, result.moved, self.max_drift)
        return result

    def _layers_of(self, path: Path, folder: Path) -> Path:
        """The model at `path` cut down to the layers, if it was not made from these."""
        whole = open_model(path, digests=False)
        if _input_names(whole) == _input_names(self.source):
            return path
        try:
            return cut_out(whole, self.layers, folder).path
        except ValidationError as error:
            without = self.samples.without
            advice = f"; go without inputs ({without})" if without else ""
            raise ValidationError(
                "its layers cannot be run one by one ({found})" + advice,
                path=path.name,
                found=str(error).removeprefix(f"{error.path}: "),
            ) from None


def _huge_values(source: Model) -> str:
    """Which weights are so large that what they are multiplied with overflows; "" without such."""
    found = []
    for weight in IndexedModel.of(source.proto).weights:
        array = source.array(weight.tensor)
        largest = max(np.max(array, initial=0), -np.min(array, initial=0))
        if largest > HUGE * float(largest_sound(array.dtype)):
            found.append(f"tensor {weight.name!r} holds {largest:.3g}")
    return f"{' and '.join(found)} (--exclude NAME leaves it as it is)" if found else ""


def _input_names(model: Model) -> list[str]:
    return [value.name for value in required_inputs(model.proto)]


def _comparable(samples: Samples, weights: Iterable[str]) -> bool:
    """Whether the outputs of two models that differ a little are numbers that belong together."""
    proto = samples.source.proto
    nodes = (node for body in bodies(proto) for node in body.node)
    if any(n.op_type in RANDOM and attribute(n, "seed", None) is None for n in nodes):
        return False
    return not (_decide_shapes(proto.graph, weights) and _shapes_vary(samples.require()))


def _decide_shapes(graph: GraphProto, weights: Iterable[str]) -> bool:
    """Whether values computed with weights decide on shapes, as scores do in NonMaxSuppression."""
    reached = set(weights)
    for node in graph.node:
        touched = [name in reached for name in node.input]
        if any(touched[node.op_type not in SELECTING :]) and node.op_type in (*SELECTING, *SHAPED):
            return True
        inside = any(subgraphs(each) for each in node.attribute)
        if (any(touched) or inside) and node.op_type not in ("Shape", "Size"):
            reached.update(node.output)
    return False


def _shapes_vary(found: Found) -> bool:
    """Whether outputs have other shapes for other values of inputs of the same shapes."""
    shapes: dict[Any, Any] = {}
    for feed, outputs in zip(found.feeds, found.outputs, strict=True):
        returned = [values.shape for values in outputs]
        given = tuple((name, values.shape) for name, values in feed.items())
        if shapes.setdefault(given, returned) != returned:
            return True
    return False


def check_model(path: Path, source: Model) -> None:
    """onnx.checker must accept the file, unless it does not accept the original either."""
    problem = runtime.check(path, source.size)
    if problem and not runtime.check(source.path, source.size):
        raise ValidationError("onnx.checker: {found}", path=path.name, found=problem)
