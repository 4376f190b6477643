"""verify(): the validation alone, on any two models."""

import fnmatch
import json
import tempfile
from dataclasses import replace
from pathlib import Path

from ..calibration.samples import Samples
from ..errors import FlipguardError, ModelError
from ..graph.copies import IndexedModel
from ..io.model import Model, open_model
from ..io.publish import workspace
from ..opening import open_folded
from ..reports.validation import Verification
from ..validation.validator import Validator
from .guard import guard
from .options import GuardOptions, StrPath
from .plan import plan_weights, require_weights


def verify(
    original: StrPath,
    guarded: StrPath,
    scheme: str | None = None,
    *,
    data: StrPath | None = None,
    max_memory: int | None = None,
    max_drift: float = GuardOptions.max_drift,
) -> Verification:
    """Validate any model against the one that it was made from.

    Its drift is compared with that of `original` rounded to nearest under the options that guard()
    recorded in `guarded`, or under the defaults where nothing is recorded.

    Parameters
    ----------
    original : path of the float model
    guarded : path of the model to judge; it need not have been made by guard()
    scheme : round to this instead, with every other option at its default
    data : .npz file, or folder of such files, with inputs; by default they are made up
    max_memory : MiB; of a larger model only sampled layers are run (default: as recorded, or 1024)
    max_drift : allowed drift, as a multiple of the drift that rounding to nearest causes

    Returns
    -------
    Verification : what was compared, and every output's drift

    Raises
    ------
    ValidationError : `guarded` does not load or run, or drifts further than allowed
    ModelError, UnsupportedModelError, OptionError : as in guard()

    Examples
    --------
    >>> import tempfile
    >>> from flipguard_onnx import guard, verify
    >>> model = "models/silero_vad.onnx"
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = guard(model, "int8", output=f"{folder}/guarded.onnx", validate=False)
    ...     result = verify(model, f"{folder}/guarded.onnx")
    >>> result.scheme, result.made_from
    ('int8', True)
    """
    source, candidate = open_folded(original), open_model(guarded)
    options = GuardOptions(scheme=scheme) if scheme else recorded_options(candidate)
    options = replace(
        options,
        policy="none",
        preserve="auto",
        emit="qdq",
        validate=False,
        allow_unguarded=True,
        data=data,
        max_memory=options.max_memory if max_memory is None else max_memory,
        max_drift=max_drift,
    )
    with workspace(Path(tempfile.gettempdir())) as folder:
        weights, _ = require_weights(source, options)
        plans = plan_weights(weights, options)
        indexed = IndexedModel(source.proto, tuple(weights))
        validator = Validator.of(
            Samples(source, options.data_path),
            indexed,
            indexed,
            [(plan.weight, plan.scheme) for plan in plans],
            folder / "layers",
            max_bytes=options.max_bytes,
            max_drift=max_drift,
        )
        there = [weight.name for weight in validator.original_graph.weights]
        baseline = replace(options, int8=tuple(p for p in options.int8 if fnmatch.filter(there, p)))
        nearest = folder / "plain.onnx"
        guard(validator.source.path, output=nearest, **baseline.keywords())
        files = {"plain": nearest, "qdq": candidate.path}
        validation = validator.compare(files, folder)
    made_from = _metadata(candidate).get("flipguard.input_sha256")
    return Verification(
        str(source.path),
        str(candidate.path),
        options.scheme,
        None if made_from is None else made_from == source.sha256,
        validation,
    )


def recorded_options(model: Model) -> GuardOptions:
    """The options under which guard() made a model, its chosen 8-bit tensors among them.

    The defaults where there is no record. Raises ModelError for one that cannot be read.
    """
    metadata = _metadata(model)
    if "flipguard.options" not in metadata:
        return GuardOptions()
    try:
        options = GuardOptions.from_record(json.loads(metadata["flipguard.options"]))
    except (ValueError, TypeError, AttributeError, RecursionError, FlipguardError) as error:
        raise ModelError(
            "its record of options cannot be read: {found}",
            path=model.path,
            found=str(error),
            allowed="as flipguard-onnx writes it, or none (--scheme ignores it)",
        ) from None
    return replace(options, int8=tuple(metadata.get("flipguard.int8", "").split()), int8_share=0.0)


def _metadata(model: Model) -> dict[str, str]:
    return {entry.key: entry.value for entry in model.proto.metadata_props}
