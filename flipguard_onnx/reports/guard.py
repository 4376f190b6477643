"""What a run found and did: plain data, and its rendering as text. JSON is `to_dict` dumped."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import reduce
from operator import add
from typing import Any, Literal

from .scan import Budget, Scan, Skipped
from .serialize import FORMAT, jsonable
from .validation import Validation

INPUTS = {
    "data": "the inputs given",
    "synthetic": "made-up inputs, weaker than real ones (--data)",
}


@dataclass(frozen=True)
class ActivationQuantization:
    """What onnxruntime's static quantizer was told, and what became of it.

    activations: their type; symmetric: with the zero point in the middle. calibration: how their
    ranges were found, on `feeds` inputs; inputs: "data" where the user gave them, or "synthetic".
    weight_only: the guarded tensors that do not run in integers, and why. floats: other constants
    that were kept from being rounded, since nobody guards them.
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
        """In a few words."""
        kind = f"{'symmetric ' * self.symmetric}{self.activations} activations"
        return f"{kind}, {self.calibration} on {self.feeds} of {INPUTS[self.inputs]}"


@dataclass(frozen=True)
class Tensor:
    """One guarded tensor; what is None was not computed.

    flips: weights that crossed a boundary. furthest: by how many levels at most. gain: squared
    error of the layer's products with error feedback / without it, on made-up or given inputs;
    feedback was used where that is below 1. unfed: why it was not tried. budget: what an attacker
    could choose before, and what is left of it, with independent draws. forms: how its readers get
    it from a quantized graph with float activations: "folded" to floats when the file is loaded,
    "gather", rows of codes, or packed, "dequantize" and "bnb4".
    """

    name: str
    op: str
    shape: tuple[int, ...]
    scheme: str
    weights: int
    flips: int | None = None
    furthest: int | None = None
    gain: float | None = None
    unfed: str | None = None
    budget: Budget | None = None
    forms: tuple[str, ...] = ()

    @property
    def packed(self) -> bool:
        """Whether a reader keeps it in 4 bits in memory."""
        return not {"dequantize", "bnb4"}.isdisjoint(self.forms)

    @property
    def preserved(self) -> bool:
        """Whether errors were fed forward."""
        return self.gain is not None and self.gain < 1


@dataclass(frozen=True)
class Inspection:
    """What guard() would do. `output_bytes` is an estimate; config: as in a Scan."""

    kind: Literal["inspect"] = field(default="inspect", init=False)
    format_version: int = field(default=FORMAT, init=False)
    input: str
    input_sha256: str
    input_bytes: int
    output_bytes: int
    scheme: str
    tensors: tuple[Tensor, ...]
    skipped: tuple[Skipped, ...]
    config: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return jsonable(self)

    def render(self) -> str:
        """The result as text for a terminal."""
        from .text import render_inspection

        return render_inspection(self)


@dataclass(frozen=True)
class GuardReport:
    """The result of guard().

    outputs: bytes by path, data files counted in. outputs_sha256: of every file written, data files
    too. preserve: the inputs on which errors were fed forward, "off" if they
    were not; preserve_note: why. data_sha256: of the inputs that were given. seed: None where the
    policy draws nothing. draws: how many it took until one passed. device_note: why "auto" did not
    take a GPU. scan: of the input. integers: how activations were quantized, if they were.
    seconds: wall time. config: as in a Scan.
    """

    kind: Literal["guard"] = field(default="guard", init=False)
    format_version: int = field(default=FORMAT, init=False)
    version: str
    input: str
    input_sha256: str
    input_data_sha256: dict[str, str]
    input_bytes: int
    options: dict[str, Any]
    scheme: str
    granularity: str
    block_size: int | None
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
    def weights(self) -> int:
        """How many weights were guarded."""
        return sum(tensor.weights for tensor in self.tensors)

    @property
    def flips(self) -> int:
        """How many of them crossed a boundary."""
        return sum(tensor.flips or 0 for tensor in self.tensors)

    @property
    def coverage(self) -> float:
        """Guarded weights / all float weights of the model."""
        return coverage(self.tensors, self.skipped)

    @property
    def at_8_bits(self) -> str:
        """What was asked for, or chosen, to stay at 8 bits under a 4-bit scheme."""
        if not self.int8_share:
            return " ".join(self.int8)
        names = " ".join(self.int8) or "none"
        return f"{names}, the most sensitive up to {self.int8_share:.0%} of the weights"

    def metadata(self) -> dict[str, str]:
        """What goes into the model's metadata_props: all that is needed to repeat the run."""
        integers = self.integers
        on_data = "data" in (self.preserve, integers and integers.inputs)
        entries = {
            "version": self.version,
            "scheme": self.scheme,
            "granularity": self.granularity if self.block_size is None else None,
            "block_size": self.block_size,
            "policy": self.policy,
            "tau": self.tau,
            "ratio": self.ratio,
            "preserve": self.preserve if self.policy == "unbiased" else None,
            "data_sha256": self.data_sha256 if on_data else None,
            "activations": integers and integers.activations,
            "symmetric": integers and integers.symmetric,
            "calibration": integers and integers.calibration,
            "int8": " ".join(self.int8) or None,
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
        """The report as JSON types; `seed` is a string, since JSON readers round large numbers."""
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

    @property
    def budget(self) -> Budget | None:
        """The alignment budget of all tensors together."""
        budgets = [tensor.budget for tensor in self.tensors if tensor.budget]
        return reduce(add, budgets) if budgets else None


def coverage(tensors: Iterable[Tensor], skipped: Iterable[Skipped]) -> float:
    """Guarded weights / all constant float values, those of skipped tensors included."""
    guarded = sum(tensor.weights for tensor in tensors)
    return guarded / max(guarded + sum(tensor.size for tensor in skipped), 1)
