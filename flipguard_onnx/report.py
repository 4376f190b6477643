"""What a run found and did: plain data, and its rendering as text. JSON is `to_dict` dumped."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from operator import add
from typing import Any, Literal

from .findings import Budget, Scan, verdict_lines
from .flip import Flips
from .integers import Integers
from .jsonable import FORMAT, jsonable
from .qdq import PACKED, PACKED_FORMS
from .schemes import Scheme
from .tables import config_line, megabytes, skipped_lines, table, text
from .validate import Drift, Validation, pooled
from .weights import Skipped, Weight

SLOW_4_BIT = (
    f"matrices of {PACKED:,} weights and more stay packed: that saves memory, and takes longer "
    "than float32 (where few rows are multiplied at once several times as long)"
)


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

    @classmethod
    def of(
        cls,
        weight: Weight,
        scheme: Scheme,
        flips: Flips | None = None,
        unfed: str | None = None,
        budget: Budget | None = None,
    ) -> "Tensor":
        tensor = cls(weight.name, weight.op, weight.shape, scheme.name, weight.size)
        if flips is None:
            return tensor
        moved = replace(tensor, flips=flips.count, furthest=flips.furthest)
        return replace(moved, gain=flips.gain, unfed=unfed, budget=budget)

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
        lines = [
            *config_line(self.config),
            f"{self.input}  {megabytes(self.input_bytes)}, sha256 {self.input_sha256[:16]}",
            f"scheme    {self.scheme}: about {megabytes(self.output_bytes)} when written",
            "",
            *table(
                ("tensor", "operator", "shape", "scheme", "weights"),
                [
                    (t.name, t.op, "x".join(map(str, t.shape)), t.scheme, f"{t.weights:,}")
                    for t in self.tensors
                ],
            ),
            "",
            *skipped_lines(self.skipped, names=True),
            _coverage_line(self.tensors, self.skipped),
        ]
        return text(lines)


@dataclass(frozen=True)
class Report:
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
    integers: Integers | None = None
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
        settings = {
            "unbiased": f"unbiased, tau {self.tau}",
            "topk": f"topk, ratio {self.ratio}",
            "none": "none (round to nearest)",
        }
        form = self.granularity if self.block_size is None else f"blocks of {self.block_size}"
        share = self.flips / max(self.weights, 1)
        lines = [
            *config_line(self.config),
            f"input     {self.input}  {megabytes(self.input_bytes)}, "
            f"sha256 {self.input_sha256[:16]}",
            f"scheme    {self.scheme}, {form}",
            f"policy    {settings[self.policy]}"
            + ("" if self.seed is None else f", seed {self.seed}"),
            *([f"device    {self.device}: {self.device_note}"] if self.device_note else []),
            *([f"int8      {self.at_8_bits}"] if self.at_8_bits else []),
            *self._preserve_lines(),
            *self._integer_lines(),
            *self._speed_lines(),
            "",
            *table(
                ("operator", "scheme", "tensors", "weights", "flipped"), _by_operator(self.tensors)
            ),
            "",
            *skipped_lines(self.skipped),
            _coverage_line(self.tensors, self.skipped) + f", {share:.2%} of them flipped",
            *self._scan_lines(),
            *(_validation_lines(self.validation) if self.validation else ["", "not validated"]),
            "",
            *(
                f"written   {path}  {megabytes(size)} ({size / self.input_bytes:.0%} of the input)"
                for path, size in self.outputs.items()
            ),
        ]
        return text(lines)

    @property
    def budget(self) -> Budget | None:
        """The alignment budget of all tensors together."""
        budgets = [tensor.budget for tensor in self.tensors if tensor.budget]
        return reduce(add, budgets) if budgets else None

    def _scan_lines(self) -> list[str]:
        if not self.scan or not self.budget:
            return []
        left = self.budget
        return [
            "",
            *verdict_lines(self.scan.verdict),
            f"budget    of alignment: {left.nearest:.4g} when rounded to nearest; guarded, "
            f"{left.chosen:.4g} left to choose and {left.random:.4g} at random",
        ]

    def _speed_lines(self) -> list[str]:
        packed = any(PACKED_FORMS & set(tensor.forms) for tensor in self.tensors)
        return [f"speed     {SLOW_4_BIT}"] if packed else []

    def _integer_lines(self) -> list[str]:
        sizes = {tensor.name: tensor.weights for tensor in self.tensors}
        return self.integers.lines(sizes) if self.integers else []

    def _preserve_lines(self) -> list[str]:
        if self.preserve == "off":
            return [f"preserve  off: {self.preserve_note}"] if self.preserve_note else []
        kept = [tensor for tensor in self.tensors if tensor.preserved]
        share = sum(tensor.weights for tensor in kept) / max(self.weights, 1)
        gains = sorted(tensor.gain or 0 for tensor in kept)
        typical = f", layer error x{gains[len(gains) // 2]:.2f} (median)" if gains else ""
        furthest = max((tensor.furthest or 0 for tensor in kept), default=0)
        typical += f", codes up to {furthest} levels from plain's" if furthest > 1 else ""
        reasons: dict[str, list[Tensor]] = defaultdict(list)
        for tensor in self.tensors:
            if not tensor.preserved:
                reasons[tensor.unfed or "no better on fresh inputs"].append(tensor)
        return [
            f"preserve  on {self.preserve} inputs: {len(kept)} of {len(self.tensors)} tensors, "
            f"{share:.1%} of the weights{typical}",
            *(
                f"          not {len(members)}, {sum(t.weights for t in members):,} weights: {why}"
                for why, members in reasons.items()
            ),
        ]


@dataclass(frozen=True)
class Verification:
    """The result of verify().

    made_from: `guarded` records this original (None: no record). config: as in a Scan.
    """

    kind: Literal["verify"] = field(default="verify", init=False)
    format_version: int = field(default=FORMAT, init=False)
    original: str
    guarded: str
    scheme: str
    made_from: bool | None
    validation: Validation
    config: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return jsonable(self)

    def render(self) -> str:
        origin = {
            True: "recorded as made from this original",
            False: "recorded as made from ANOTHER original",
            None: "no record of what it was made from",
        }
        lines = [
            *config_line(self.config),
            f"original  {self.original}",
            f"guarded   {self.guarded}: {origin[self.made_from]}",
            f"measure   plain {self.scheme} quantization of the original",
            *_validation_lines(self.validation),
        ]
        return text(lines)


def coverage(tensors: Iterable[Tensor], skipped: Iterable[Skipped]) -> float:
    """Guarded weights / all constant float values, those of skipped tensors included."""
    guarded = sum(tensor.weights for tensor in tensors)
    return guarded / max(guarded + sum(tensor.size for tensor in skipped), 1)


def _by_operator(tensors: Sequence[Tensor]) -> list[tuple[str, ...]]:
    groups: dict[tuple[str, str], list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        groups[tensor.op, tensor.scheme].append(tensor)
    rows: list[tuple[str, ...]] = []
    for (op, scheme), members in groups.items():
        weights = sum(t.weights for t in members)
        flips = sum(t.flips or 0 for t in members)
        rows.append((op, scheme, str(len(members)), f"{weights:,}", f"{flips / weights:.2%}"))
    return rows


def _coverage_line(tensors: Sequence[Tensor], skipped: Sequence[Skipped]) -> str:
    weights = sum(tensor.weights for tensor in tensors)
    return (
        f"guarded   {weights:,} weights in {len(tensors)} tensors, "
        f"{coverage(tensors, skipped):.2%} of all"
    )


def _validation_lines(validation: Validation) -> list[str]:
    exact = validation.plain_exact, validation.guarded_exact
    default = validation.plain_default, validation.guarded_default
    runs = {"plain": exact[0], "guarded": exact[1]}
    if exact != default:
        runs |= {"plain, fused": default[0], "guarded, fused": default[1]}
    drifts = zip(*runs.values(), strict=True)
    rows = [
        (drift.output, run, *_drift_cells(drift))
        for output in drifts
        for run, drift in zip(runs, output, strict=True)
    ]
    rows += [(drift.output, "float, moved", *_drift_cells(drift)) for drift in validation.moved]
    head = ("output", "run", "relative L2", "cosine", "max abs", "SQNR dB", "top-1")
    return [
        "",
        *table(head, rows),
        "",
        *(
            [f"sampled   {validation.layers} layers: the model is too large to be run whole"]
            if validation.layers
            else []
        ),
        f"valid     on {validation.feeds} inputs ({validation.inputs}): drift of all outputs "
        f"{pooled(validation.guarded_exact):.5f}, plain quantization's "
        f"{pooled(validation.plain_exact):.5f}",
    ]


def _drift_cells(drift: Drift) -> tuple[str, ...]:
    return (
        f"{drift.relative_l2:.5f}",
        f"{drift.cosine:.6f}",
        f"{drift.max_abs:.3g}",
        f"{drift.sqnr_db:.1f}",
        "" if drift.top1 is None else f"{drift.top1:.1%}",
    )
