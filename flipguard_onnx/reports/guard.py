"""The results of guard() and inspect(), and of a look at a quantized file."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import reduce
from glob import escape
from operator import add
from typing import Any, Literal

from ..formats import Choice, shown_scale
from .scan import Budget, Scan, Skipped
from .serialize import FORMAT, jsonable
from .validation import Validation

INPUTS = {
    "data": "of the inputs given",
    "synthetic": "made-up inputs, which are weaker than real ones (--data)",
}


@dataclass(frozen=True)
class ActivationQuantization:
    """How onnxruntime's static quantizer quantized the activations.

    Attributes
    ----------
    activations : their type: "int8", "uint8" or "int16"
    symmetric : whether their zero_point is in the middle of the type's range
    calibration : how their ranges were found: "minmax", "entropy" or "percentile"
    inputs : what they were found on: "data" (inputs that were given) or "synthetic"
    feeds : how many inputs that were
    weight_only : the guarded tensors whose operators still compute in floats, and why
    floats : other constants that stay float, since the guard does not cover them
    """

    activations: str
    symmetric: bool
    calibration: str
    inputs: str = ""
    feeds: int = 0
    weight_only: dict[str, str] = field(default_factory=dict)
    floats: tuple[str, ...] = ()

    @property
    def setting(self) -> str:
        """Type, calibration and inputs in a few words."""
        kind = f"{'symmetric ' * self.symmetric}{self.activations} activations"
        return f"{kind}, {self.calibration} on {self.feeds} {INPUTS[self.inputs]}"


@dataclass(frozen=True)
class Tensor:
    """One guarded tensor; what is None was not computed.

    Attributes
    ----------
    name : of the initializer or constant, with the scopes it is in
    op : type of the operator that reads it
    shape : as it is stored in the model
    scheme : "int8", "uint8", "int4", "uint4", "int2", "uint2", "nf4", "fp4", "fp8", "mxfp4" or
        "nvfp4"; some tensors get int8 under others
    grid : the scheme with its granularity, as a scan names it: "int8 channel", "int4", "int4 g128"
    weights : how many values it has
    flips : how many of them have another code than nearest rounding's
    furthest : the largest distance of a code from nearest rounding's, in levels
    gain : squared error of the layer's products with error feedback / with independent draws, on
        the inputs of `GuardReport.preserve`; feedback was used where this is below 1
    unfed : why error feedback was not tried
    weight_error : relative L2 of the change of the weights
    product_error : by how much the layer's products with those inputs are off, relative to how much
        they vary from input to input, 0 to 1 (root mean square over the output channels, none of
        which counts as more than 1)
    fallback : why it has another scheme than the one asked for
    budget : how much rounding error an attacker could choose, and what is left after the guard if
        the draws are independent
    forms : how its readers get it in a quantized graph with float activations: by "dequantize" (a
        DequantizeLinear), "gather" (decoded row by row), "folded" (decoded to floats when the file
        is loaded), or packed in onnxruntime's memory by "nbits", "bnb4" and "gather packed"
    others : what else it is or feeds: "a graph output", "a graph input" whose default it is, types
        of operators that are not weighted. All get the guarded value.
    dynamic : the grid that onnxruntime's quantize_dynamic lays over it, if it is not `grid`
    """

    name: str
    op: str
    shape: tuple[int, ...]
    scheme: str
    grid: str
    weights: int
    flips: int | None = None
    furthest: int | None = None
    gain: float | None = None
    unfed: str | None = None
    weight_error: float | None = None
    product_error: float | None = None
    fallback: str | None = None
    budget: Budget | None = None
    forms: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    dynamic: str | None = None

    @property
    def preserved(self) -> bool:
        """Whether error feedback was used."""
        return self.gain is not None and self.gain < 1


@dataclass(frozen=True)
class Inspection:
    """The result of inspect(): what guard() would do.

    Attributes
    ----------
    input : path of the model
    input_sha256 : of the model's file
    input_data_sha256 : of its external data files, by their names
    input_bytes : size of the model, data files included
    output_bytes : size that the quantized model would have, estimated
    scheme : "int8", "uint8", "int4", "uint4", "int2", "uint2", "nf4", "fp4", "fp8", "mxfp4" or
        "nvfp4"
    tensors : those that would be guarded, in the order of the graph
    skipped : the others, and why
    config : the file that gave options of the command line, if one did
    """

    kind: Literal["inspect"] = field(default="inspect", init=False)
    format_version: int = field(default=FORMAT, init=False)
    input: str
    input_sha256: str
    input_data_sha256: dict[str, str]
    input_bytes: int
    output_bytes: int
    scheme: str
    tensors: tuple[Tensor, ...]
    skipped: tuple[Skipped, ...]
    config: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON types."""
        return jsonable(self)

    def render(self) -> str:
        """The result as text for a terminal."""
        from .text import render_inspection

        return render_inspection(self)


@dataclass(frozen=True)
class Finding:
    """A requirement of a runtime, and the tensors of a quantized file that do not meet it."""

    requirement: str
    tensors: tuple[str, ...]


@dataclass(frozen=True)
class TargetInspection:
    """What a runtime would not take, or not as integers, in a quantized file.

    Attributes
    ----------
    input : path of the model
    input_sha256 : of the model's file
    input_data_sha256 : of its external data files, by their names
    target : the runtime: "tensorrt", "qnn" or "openvino"
    tensors : how many tensors and activations are quantized
    findings : the requirements that are not met
    config : the file that gave options of the command line, if one did
    """

    kind: Literal["inspect --target"] = field(default="inspect --target", init=False)
    format_version: int = field(default=FORMAT, init=False)
    input: str
    input_sha256: str
    input_data_sha256: dict[str, str]
    target: str
    tensors: int
    findings: tuple[Finding, ...]
    config: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON types."""
        return jsonable(self)

    def render(self) -> str:
        """The result as text for a terminal."""
        from .text import render_target_inspection

        return render_target_inspection(self)


@dataclass(frozen=True)
class GuardReport:
    """The result of guard().

    Attributes
    ----------
    version : of flipguard-onnx
    input : path of the model
    input_sha256 : of the model's file
    input_data_sha256 : of its external data files, by their names
    input_bytes : size of the model, data files included
    options : every option of the run as it was asked for, by its name in guard()
    changed_options : the names of those that differ from their defaults
    scheme : "int8", "uint8", "int4", "uint4", "int2", "uint2", "nf4", "fp4", "fp8", "mxfp4" or
        "nvfp4"
    granularity : how many weights share a scale: "tensor", "channel" or "block"
    block_size : weights of a block; None for other granularities
    scale : the level that the largest magnitude gets; None for codebooks and with zero points;
        "k_quant" where it was searched for
    reduce_range : whether 7 of 8 bits are used
    policy : how codes are chosen: "unbiased", "topk" or "none" (round to nearest)
    tau : of the unbiased policy: distance from a boundary up to which weights are drawn, in
        half-gaps; None for other policies
    ratio : of the topk policy: share of each block that is flipped; None for other policies
    int8 : patterns over the names of tensors that stay at 8 bits under a 4-bit scheme
    int8_share : share of the weights up to which the most sensitive tensors stay at 8 bits, too
    preserve : the inputs on which errors were fed forward, "data" or "synthetic"; "off" if they
        were not
    preserve_note : why they were not, or that made-up inputs stood beside few data
    data_sha256 : of the inputs that were given
    seed : of the draws; None where the policy draws nothing
    draws : how many draws it took until one passed the validation
    device : "cpu" or "cuda"
    device_note : why "auto" did not take a GPU
    tensors : those that were guarded, in the order of the graph
    skipped : the others, and why
    scan : of the input
    integers : how activations were quantized; None if they were not
    validation : the models that were run, and their drift; None without validation
    outputs : size in bytes by path of the models written, data files included
    outputs_sha256 : of every file written, data files too, by path
    seconds : wall time
    config : the file that gave options of the command line, if one did
    """

    kind: Literal["guard"] = field(default="guard", init=False)
    format_version: int = field(default=FORMAT, init=False)
    version: str
    input: str
    input_sha256: str
    input_data_sha256: dict[str, str]
    input_bytes: int
    options: dict[str, Any] = field(default_factory=dict, kw_only=True)
    changed_options: tuple[str, ...] = field(default=(), kw_only=True)
    scheme: str
    granularity: str
    block_size: int | None
    scale: float | str | None
    reduce_range: bool
    policy: str
    tau: float | None
    ratio: float | None
    int8: tuple[str, ...]
    int8_share: float
    preserve: str
    preserve_note: str | None
    data_sha256: str | None
    seed: int | None
    draws: int
    device: str
    device_note: str | None
    tensors: tuple[Tensor, ...]
    skipped: tuple[Skipped, ...]
    scan: Scan | None = None
    integers: ActivationQuantization | None = None
    validation: Validation | None = None
    outputs: dict[str, int] = field(default_factory=dict)
    outputs_sha256: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    config: str | None = None

    @property
    def grid(self) -> str:
        """The scheme with what was chosen of it, as a scan names it."""
        return Choice(
            self.scheme, self.granularity, self.block_size, self.scale, self.reduce_range
        ).label

    @property
    def weights(self) -> int:
        """How many weights were guarded."""
        return sum(tensor.weights for tensor in self.tensors)

    @property
    def flips(self) -> int:
        """How many of them have another code than nearest rounding's."""
        return sum(tensor.flips or 0 for tensor in self.tensors)

    @property
    def coverage(self) -> float:
        """Guarded weights / all float weights of the model."""
        return coverage(self.tensors, self.skipped)

    @property
    def budget(self) -> Budget | None:
        """The alignment budget of all tensors together."""
        budgets = [tensor.budget for tensor in self.tensors if tensor.budget]
        return reduce(add, budgets) if budgets else None

    @property
    def at_8_bits(self) -> str:
        """What stays at 8 bits under a 4-bit scheme, in words; empty if nothing does."""
        chosen = f"the most sensitive tensors, up to {self.int8_share:.0%} of the weights"
        named = " ".join(self.int8)
        return " and ".join(filter(None, (named, chosen if self.int8_share else "")))

    def metadata(self) -> dict[str, str]:
        """What goes into the model's metadata_props: what the codes depend on, and the counts."""
        integers = self.integers
        finer = [pattern_of(t.name) for t in self.tensors if t.fallback and t.scheme == "int8"]
        on_data = "data" in (self.preserve, integers and integers.inputs)
        entries = {
            "version": self.version,
            "scheme": self.scheme,
            "granularity": self.granularity,
            "block_size": self.block_size,
            "scale": self.scale and shown_scale(self.scale),
            "reduce_range": self.reduce_range or None,
            "policy": self.policy,
            "tau": self.tau,
            "ratio": self.ratio,
            "preserve": self.preserve if self.policy == "unbiased" else None,
            "data_sha256": self.data_sha256 if on_data else None,
            "activations": integers and integers.activations,
            "symmetric": integers and integers.symmetric,
            "calibration": integers and integers.calibration,
            "int8": " ".join([*self.int8, *finer]) or None,
            "int8_share": self.int8_share or None,
            "options": json.dumps(self.options),
            "seed": self.seed,
            "input_sha256": self.input_sha256,
            "input_data_sha256": " ".join(self.input_data_sha256.values()) or None,
            "weights": self.weights,
            "flips": self.flips,
            "coverage": f"{self.coverage:.6f}",
        }
        return {f"flipguard.{k}": str(v) for k, v in entries.items() if v is not None}

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON types; `seed` is a string, since JSON readers round large numbers."""
        result = jsonable(self)
        result["seed"] = None if self.seed is None else str(self.seed)
        return result | {
            "weights": self.weights,
            "flips": self.flips,
            "coverage": self.coverage,
        }

    def render(self) -> str:
        """The result as text for a terminal."""
        from .text import render_guard

        return render_guard(self)


def coverage(tensors: Iterable[Tensor], skipped: Iterable[Skipped]) -> float:
    """Guarded weights / all constant float values, those of skipped tensors included."""
    guarded = sum(tensor.weights for tensor in tensors)
    return guarded / max(guarded + sum(tensor.size for tensor in skipped), 1)


def pattern_of(name: str) -> str:
    """A shell pattern that names a tensor, without spaces, as a list of patterns is split there."""
    return "".join("?" if c.isspace() else c for c in escape(name))
