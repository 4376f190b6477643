"""What a validation runs: the models, or layers cut out of them where they are too large."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from onnx import ModelProto

from .emit import Quantized, Rewritten, Sink, converted, decoded_values
from .model import Model, Output, open_model
from .sampled import Layer, cut_out, sample
from .schemes import Scheme
from .validate import Candidates, Validation, check_model, compare
from .weights import Weight, find_weights


@dataclass(frozen=True)
class Trial:
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
    ) -> "Trial":
        """The model whole if it has no more than `most` bytes, else layers of it."""
        if source.size <= most:
            return cls(source, prepared)
        layers = sample(source, weights, schemes, standard_ops)
        small = cut_out(source, layers, folder)
        opset = max(entry.version for entry in prepared.opset_import if entry.domain == "")
        return cls(small, converted(small, opset, find_weights(small.proto)[0]), tuple(layers))

    def sinks(self, folder: Path, standard_ops: bool) -> dict[str, Sink]:
        """The models to compare with: plainly quantized, and what the codes must compute."""
        plain, decoded = (
            Output(folder / kind, folder / f"{kind}.onnx", external=True)
            for kind in ("plain", "decoded")
        )
        return {
            "plain": Quantized(self.source, self.prepared, plain, standard_ops, plain=True),
            "decoded": Rewritten(self.source, decoded, decoded_values),
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
