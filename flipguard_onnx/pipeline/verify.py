"""verify(): the validation alone, on any two models."""

import fnmatch
import json
import math
import tempfile
from dataclasses import replace
from pathlib import Path

from onnx import TensorProto

from ..calibration.inputs import npz_files, required_inputs
from ..calibration.samples import Samples
from ..errors import FlipguardError, ModelError
from ..graph.copies import IndexedModel
from ..graph.traversal import tensors
from ..graph.weights import QUANTIZED, SMALL_FLOATS, SMALLEST, find_weights
from ..io.model import Model, open_model
from ..io.publish import workspace
from ..opening import open_folded
from ..reports.validation import Verification
from ..validation.validator import Validator
from .guard import guard
from .options import GuardOptions, StrPath
from .plan import plan_weights, require_weights
from .run import naming


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
    data : .npz file, or folder of such files, or text (.txt, .jsonl); by default inputs are made up
    max_memory : MiB; of a larger model only sampled layers are run (default: as recorded, or 1024)
    max_drift : allowed drift, as a multiple of the drift that rounding to nearest causes

    Returns
    -------
    Verification : what was compared, and every output's drift

    Raises
    ------
    ValidationError : `guarded` does not load or run, or drifts further than allowed
    ModelError : the two models take different inputs, or as in guard()
    UnsupportedModelError, OptionError : as in guard()

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
    if data:
        npz_files(Path(data))  # there, before anything is done
    source, candidate = open_folded(original), open_model(guarded)
    require_same_inputs(source, candidate)
    options = GuardOptions(scheme=scheme) if scheme else recorded_options(candidate)
    options = replace(
        options,
        policy="none",
        tau=GuardOptions.tau,
        ratio=GuardOptions.ratio,
        preserve="auto",
        emit="qdq",
        validate=False,
        allow_unguarded=True,
        data=data,
        max_memory=options.max_memory if max_memory is None else max_memory,
        max_drift=max_drift,
    )
    with naming(candidate.path), workspace(Path(tempfile.gettempdir())) as folder:
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
            target=options.target,
        )
        validator.samples.require()
        validator.samples.release()
        baseline = those_that_name(validator, options)
        nearest = folder / "plain.onnx"
        guard(validator.source.path, output=nearest, **baseline.keywords())
        files = {"plain": nearest, "qdq": candidate.path}
        validation = validator.compare(files, folder)
    return Verification(
        str(source.path),
        str(candidate.path),
        options.scheme,
        _made_from(candidate, source),
        sum(math.prod(tensor.dims) for tensor in quantized_tensors(candidate)),
        validation,
    )


def require_same_inputs(original: Model, guarded: Model) -> None:
    """Raise ModelError unless both models take inputs of the same names."""
    wanted, found = (
        {value.name for value in required_inputs(model.proto)} for model in (original, guarded)
    )
    if wanted != found:
        lacks, has = (", ".join(map(repr, sorted(n))) for n in (wanted - found, found - wanted))
        differences = [f"lack {lacks}"] * bool(lacks) + [f"have {has} besides"] * bool(has)
        raise ModelError(
            "is no form of {original}: its inputs {found}",
            path=guarded.path,
            original=original.path,
            found=" and ".join(differences),
        )


def quantized_tensors(model: Model) -> list[TensorProto]:
    """The constants that hold codes of weights."""
    return [
        tensor
        for tensor in tensors(model.proto)
        if tensor.data_type in (*QUANTIZED, *SMALL_FLOATS) and math.prod(tensor.dims) >= SMALLEST
    ]


def those_that_name(validator: Validator, options: GuardOptions) -> GuardOptions:
    """Without the patterns that name no tensor of the model that is run, perhaps a few layers."""
    weights, skipped = find_weights(validator.source.proto, partly=True)
    names = [*(weight.name for weight in weights), *(tensor.name for tensor in skipped)]
    kept = [weight.name for weight in validator.original_graph.weights]
    return replace(
        options,
        include=tuple(p for p in options.include if fnmatch.filter(names, p)),
        exclude=tuple(p for p in options.exclude if fnmatch.filter(names, p)),
        int8=tuple(p for p in options.int8 if fnmatch.filter(kept, p)),
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


def _made_from(model: Model, original: Model) -> bool | None:
    """Whether a model records this original, its data files included; None without a record."""
    recorded = _metadata(model)
    if "flipguard.input_sha256" not in recorded:
        return None
    data = recorded.get("flipguard.input_data_sha256", "").split()
    found = [original.sha256, *original.data_sha256.values()]
    return [recorded["flipguard.input_sha256"], *data] == found


def _metadata(model: Model) -> dict[str, str]:
    return {entry.key: entry.value for entry in model.proto.metadata_props}
