"""The options of a run, checked when they are given."""

import os
import secrets
from pathlib import Path

from ..emit.static_qdq import CALIBRATIONS, OPSETS
from ..errors import SchemeError
from ..reports.guard import ActivationQuantization


def asked_for(
    activations: str | None, symmetric: bool, calibration: str, scheme: str, emit: str
) -> ActivationQuantization | None:
    """The options together, None without activations.

    Raises SchemeError for what is unknown or does not fit the other options.
    """
    one_of("calibration", calibration, CALIBRATIONS)
    if activations is None:
        if symmetric:
            raise SchemeError("symmetric goes with activations")
        return None
    one_of("activations", activations, tuple(OPSETS))
    if scheme != "int8":
        raise SchemeError(f"activations go with scheme int8, not {scheme!r}")
    if emit == "float":
        raise SchemeError("activations go with emit 'qdq' or 'both', not 'float'")
    return ActivationQuantization(activations, symmetric, calibration)


EMITS = ("qdq", "float", "both")

GRANULARITIES = ("channel", "tensor")

BLOCK_SIZES = (16, 32, 64, 128, 256)  # those that onnxruntime's kernels take

PRESERVES = ("auto", "off", "synthetic", "data")

DRAWS = 3  # at the most: a draw that drifts too far is thrown away


def preserve_mode(preserve: str, policy: str, data: object) -> str:
    """The kind of inputs that error feedback uses: "off", "synthetic" or "data".

    Raises SchemeError for what is asked for in vain.
    """
    one_of("preserve", preserve, PRESERVES)
    if preserve == "auto":
        return "off" if policy != "unbiased" else "data" if data else "synthetic"
    if preserve != "off" and policy != "unbiased":
        raise SchemeError(f"preserve {preserve!r} is for the unbiased policy, not {policy!r}")
    if preserve == "data" and not data:
        raise SchemeError("preserve 'data' needs inputs: give --data")
    return preserve


def one_of(option: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise SchemeError unless the value is one of those allowed."""
    if value not in allowed:
        raise SchemeError(f"{option} {value!r} is unknown; allowed: {', '.join(allowed)}")


def output_paths(
    model: Path, output: str | os.PathLike[str] | None, scheme: str, emit: str
) -> dict[str, Path]:
    """Where each kind of output goes: to `output`, by default beside the model."""
    base = Path(output) if output else model.with_name(f"{model.stem}.flipguard-{scheme}.onnx")
    moved = base
    if emit == "both" or not output:
        moved = base.with_name(f"{base.stem}-float{base.suffix}")
    paths = {"qdq": base, "float": moved}
    return paths if emit == "both" else {emit: paths[emit]}


def draw_seeds(seed: int | None, policy: str) -> list[int]:
    """The seeds to try in turn: a given one alone, else fresh entropy for every draw."""
    if seed is None and policy == "unbiased":
        return [secrets.randbits(128) for _ in range(DRAWS)]
    if seed is not None and seed < 0:
        raise SchemeError(f"seed is {seed}; allowed: 0 and above")
    return [seed or 0]
