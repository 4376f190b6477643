"""verify(): the validation alone, on any two models."""

import fnmatch
import os
import tempfile
from pathlib import Path

from ..graph.weights import find_weights
from ..io.model import open_model
from ..io.publish import workspace
from ..reports.validation import Verification
from ..validation.drift import MAX_DRIFT
from ..validation.validator import Validator
from .guard import guard
from .plan import Format, require_weights


def verify(
    original: str | os.PathLike[str],
    guarded: str | os.PathLike[str],
    scheme: str | None = None,
    *,
    data: str | os.PathLike[str] | None = None,
    max_memory: int = 1024,
    max_drift: float = MAX_DRIFT,
) -> Verification:
    """Validate any model against the one that it was made from.

    The measure is plain quantization of `original`, to `scheme` or, by default, to the one that
    guard() recorded in `guarded` (int8 when there is no record), with the same tensors at 8 bits
    and with activations if that has them.

    Raises ValidationError when `guarded` does not load or run, or drifts further than allowed;
    other errors as in guard().
    """
    source, candidate = open_model(original), open_model(guarded)
    record = {entry.key: entry.value for entry in candidate.proto.metadata_props}
    made_from = record.get("flipguard.input_sha256")
    granularity, block_size = "channel", None
    int8: tuple[str, ...] = ()
    activations, calibration, symmetric = None, "minmax", False
    if scheme is None:
        scheme = record.get("flipguard.scheme", "int8")
        activations = record.get("flipguard.activations")
        calibration = record.get("flipguard.calibration", calibration)
        symmetric = record.get("flipguard.symmetric") == "True"
        granularity = record.get("flipguard.granularity", granularity)
        recorded = record.get("flipguard.block_size", "")
        block_size = int(recorded) if recorded.isdecimal() else None
        int8 = tuple(record.get("flipguard.int8", "").split())
    form = Format(scheme, granularity, block_size, int8)
    with workspace(Path(tempfile.gettempdir())) as folder:
        weights, _ = require_weights(source)
        kinds = [form.plan(weight)[0] for weight in weights]
        trial = Validator.of(
            source, source.proto, weights, kinds, False, max_memory << 20, folder / "layers"
        )
        plain = folder / "plain.onnx"
        there = [weight.name for weight in find_weights(trial.source.proto)[0]]
        guard(
            trial.source.path,
            scheme,
            granularity=granularity,
            block_size=block_size,
            int8=tuple(pattern for pattern in int8 if fnmatch.filter(there, pattern)),
            policy="none",
            data=data,
            max_memory=max_memory,
            output=plain,
            validate=False,
            activations=activations,
            calibration=calibration,
            symmetric=symmetric,
        )
        files = {"plain": plain, "qdq": candidate.path}
        result = trial.run(source, files, Path(data) if data else None, max_drift, folder)
    return Verification(
        str(source.path),
        str(candidate.path),
        scheme,
        None if made_from is None else made_from == source.sha256,
        result,
    )
