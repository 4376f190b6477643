"""One draw: every weight is quantized once and put into every model that the run writes."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import numpy.typing as npt

from ..calibration.moments import Moments
from ..detection.scan import clips, collapses
from ..emit.static_qdq import Calibration, StaticQdqWriter
from ..emit.weight_forms import Target
from ..emit.writers import FloatWriter, ModelWriter, QdqWriter, guarded_values
from ..errors import ModelError, ValidationError
from ..formats import FORMATS
from ..io.kept import Kept
from ..io.model import Model
from ..progress import Progress, meter
from ..quantization.chunks import quantize_weight
from ..quantization.error_feedback import InputMoments
from ..quantization.kernels.protocol import Kernels
from ..quantization.rounding import Policy, QuantizedTensor, tensor_key
from ..reports.guard import ActivationQuantization, Tensor
from ..reports.scan import Scan, Skipped, SkipReason
from ..reports.validation import Validation
from ..validation.validator import Validator
from .drawn import Account, DrawnWeight
from .options import GuardOptions
from .plan import INT8, Prepared, WeightPlan
from .run import Run

WORST = 3  # tensors that an advice names

FLOAT = "float"  # the scheme of a weight that stays as it is

MAX_PRODUCT_ERROR = 0.35  # see `Products.error`; those of honest real models reach 0.28 (fp4)

# Share of nearest rounding's errors that may be left to choose. Codes are drawn without bias; moved
# weights of 16 bits are too coarse to reach every level, and set their scales themselves.
MAX_CHOSEN, MAX_CHOSEN_MOVED = 0.01, 0.1

# by scheme: the grid that scan judges collapses on; others have their own
LIKE = {
    "int8": "int8 channel",
    "uint8": "int8 channel",
    "uint4": "int4",
    "int2": "int4",
    "uint2": "int4",
}

EXACT = 1e-6  # share of the weights themselves that is no more than the rounding of float32


@dataclass(frozen=True)
class Draw:
    """The result of one draw.

    seed: of its random streams. number: 1 for the first draw of a run. writers: the models being
    written, by kind; folder: where. tensors: what became of every weight; kept: those that stay
    float, since quantization would wipe them out.
    """

    seed: int
    number: int
    writers: dict[str, ModelWriter]
    folder: Path
    tensors: tuple[Tensor, ...]
    kept: tuple[Skipped, ...]
    progress: Progress

    @property
    def activations(self) -> ActivationQuantization | None:
        """How activations are quantized, if they are; in full once the models are saved."""
        guarded = self.writers.get("qdq")
        return guarded.integers if isinstance(guarded, StaticQdqWriter) else None

    def advice(self, inputs: str) -> str:
        """Where the largest errors are and which options may help.

        inputs : those on which errors were fed forward, "off" if they were not
        """
        errors = [(t.product_error or t.weight_error or 0, t) for t in self.tensors]
        worst = sorted(errors, key=lambda pair: -pair[0])[:WORST]
        named = ", ".join(f"{t.name!r} ({t.scheme}, {error:.0%})" for error, t in worst)
        options = (
            ["--int8-share 0.25", "--int8 NAME"]
            if any(FORMATS[tensor.scheme].bits < 8 for tensor in self.tensors)
            else ["--exclude NAME"]
        )
        if inputs == "off":
            options.append("--preserve synthetic")
        if inputs != "data":
            options.append("--data with real inputs")
        return f"the largest errors are in {named}; what may help: {', '.join(options)}"

    def save(self, metadata: dict[str, str]) -> None:
        """Finish the models, each with these entries in its metadata."""
        self.progress("writing", 0, 1)
        for writer in self.writers.values():
            writer.save(metadata)

    def validate(self, validator: Validator | None) -> Validation | None:
        """Compare the models with the original, if that is wanted.

        Raises DriftError where they are too far from it, ValidationError where they do not run.
        """
        if validator is None:
            return None
        self.progress("validating", 0, 1)
        files = {kind: writer.output.path for kind, writer in self.writers.items()}
        validation = validator.compare(files, self.folder)
        self.progress("validating", 1, 1)
        return validation


def quantize(
    run: Run,
    prepared: Prepared,
    moments: Moments,
    calibration: Calibration | None,
    validator: Validator | None,
    scan: Scan | None,
    seed: int,
    number: int,
) -> Draw:
    """Quantize every weight under this seed and put it into every model that the run writes."""
    folder = run.folder / str(number)
    writers = _writers(run, prepared, calibration, validator, folder)
    quantizer = WeightQuantizer(
        prepared.model,
        run.policy,
        seed,
        run.kernels,
        moments,
        moved=calibration is not None or "float" in writers,
        options=run.options,
        kept=run.kept,
        collapsing=collapses(scan) if scan else frozenset(),
        clips=clips(scan) if scan else None,
    )
    advance = meter(run.progress, "guarding", prepared.nbytes)
    drawn = {
        plan.weight.name: quantizer.quantize(plan, writers.values(), advance)
        for plan in sorted(prepared.weights, key=lambda plan: moments.order(plan.weight))
    }
    found = [drawn[plan.weight.name] for plan in prepared.weights]
    tensors = [tensor for tensor in found if tensor.scheme != FLOAT]
    kept = tuple(
        Skipped(tensor.name, tensor.shape, SkipReason.COLLAPSES, tensor.fallback or "")
        for tensor in found
        if tensor.scheme == FLOAT
    )
    if not tensors:
        raise ValidationError(
            "nothing is left to guard: {found}", found=kept[0].text, path=prepared.model.path
        )
    if quantizer.policy == Policy("unbiased", tau=1.0):
        require_unbiased(tensors, MAX_CHOSEN_MOVED if quantizer.moved else MAX_CHOSEN)
    guarded = writers.get("qdq")
    if isinstance(guarded, QdqWriter) and "qdq" in run.targets:
        tensors = [replace(tensor, forms=guarded.forms[tensor.name]) for tensor in tensors]
    return Draw(seed, number, writers, folder, tuple(tensors), kept, run.progress)


def require_unbiased(tensors: Iterable[Tensor], limit: float) -> None:
    """Require that a draw has left an attacker next to nothing to choose.

    Parameters
    ----------
    tensors : with their budgets
    limit : share of nearest rounding's errors that may be left

    Raises
    ------
    ValidationError : naming the tensors
    """
    left = {
        t.name: t.budget.chosen / t.budget.nearest
        for t in tensors
        if t.budget and t.budget.chosen > limit * t.budget.nearest + EXACT * t.budget.total
    }
    if left:
        raise ValidationError(
            "of {tensor}: up to {found} of the rounding errors could still be chosen by whoever "
            "prepared the model",
            tensor=", ".join(map(repr, left)),
            found=f"{max(left.values()):.1%}",
            allowed=f"{limit:.0%} (--exclude leaves a tensor as it is)",
        )


@dataclass(frozen=True)
class WeightQuantizer:
    """Quantizes weights of a model, one after the other.

    moved: whether somebody wants the float weights that yield the chosen codes. options: those of
    the run. collapsing, clips: see `detection.scan`.
    """

    model: Model
    policy: Policy
    seed: int
    kernels: Kernels
    moments: Moments
    moved: bool
    options: GuardOptions
    kept: Kept
    collapsing: frozenset[tuple[str, str]] = frozenset()
    clips: str | None = None

    def quantize(
        self, plan: WeightPlan, writers: Iterable[ModelWriter], advance: Callable[[int], None]
    ) -> Tensor:
        """Quantize one weight and put it into the models; `advance` is told the bytes done.

        A weight whose products would be lost in rounding errors gets a finer plan; where there is
        none it stays float, and is put into no model. So do all weights of few bits if an attacker
        seems to have counted on these.
        """
        fallback = self._foreseen(plan)
        if fallback:
            plan = WeightPlan.in_scheme(plan.weight, INT8)
        quantized, tensor = self._draw(plan, advance)
        while lost := self._lost(tensor, quantized):
            if self._keeps_forms:
                raise ValidationError("{tensor!r}: {lost}", tensor=tensor.name, lost=lost).advise(
                    "--exclude leaves a tensor as it is"
                )
            fallback = fallback or lost
            finer = plan.finer()
            if finer is None:
                return replace(tensor, scheme=FLOAT, fallback=fallback)
            quantized, tensor = self._draw(plan := finer, lambda _: None)
        for writer in writers:
            writer.add_weight(tensor.name, plan.scheme, quantized)
        return replace(tensor, fallback=fallback)

    @property
    def _keeps_forms(self) -> bool:
        """Whether no weight may get another form: another quantizer rounds, or nobody wants it."""
        return self.moved or self.options.on_collapse == "refuse"

    def _lost(self, tensor: Tensor, quantized: QuantizedTensor) -> str | None:
        """Why the weight would be lost in rounding errors, if it would.

        Its products tell; where they are not known, or only on made-up inputs, so does the scan
        (but for weights that another quantizer rounds, whose form nobody can choose).
        """
        if self.policy.name != "unbiased":
            return None
        if quantized.grid.loses_blocks and not self.moved:
            return f"at {tensor.scheme} its smallest blocks would become 0"
        error = tensor.product_error
        if error is not None and error > MAX_PRODUCT_ERROR:
            return (
                f"at {tensor.scheme} its products would be off by {error:.0%} "
                f"(allowed: {MAX_PRODUCT_ERROR:.0%})"
            )
        grid = LIKE.get(tensor.scheme, tensor.scheme)
        known = error is not None and (self.moved or self.moments.inputs == "data")
        if (tensor.name, grid) in self.collapsing and not known:
            return f"at {tensor.scheme} outliers wipe out its other weights"
        return None

    def _foreseen(self, plan: WeightPlan) -> str | None:
        """Why a weight of few bits gets more, if an attacker seems to have counted on few.

        Clipping undoes what keeps the float model from being malicious. A grid that clips nothing
        keeps that, but the rounding errors of few bits, in whatever tensor, undo it in part.
        """
        if self.policy.name != "unbiased" or plan.scheme.bits >= INT8.bits or not self.clips:
            return None
        if self._keeps_forms:
            raise ValidationError("{found}", found=self.clips, allowed="--scheme int8")
        return self.clips

    def _draw(
        self, plan: WeightPlan, advance: Callable[[int], None]
    ) -> tuple[QuantizedTensor, Tensor]:
        weight, scheme = plan.weight, plan.scheme
        name = f"{self.seed} {weight.name} {scheme.choice.label} {plan.blocks} {self.moved}"
        if found := self.kept.load(name):
            storage = self.model.array(weight.tensor).dtype
            drawn = DrawnWeight.from_arrays(found, scheme, plan.blocks, storage)
            advance(weight.nbytes)
        else:
            drawn = self._drawn(plan, advance)
            self.kept.store(name, drawn.arrays())
        quantized = drawn.quantized
        tensor = replace(
            plan.described(),
            flips=quantized.count,
            furthest=quantized.furthest,
            gain=quantized.gain,
            unfed=drawn.unfed or None,
            weight_error=drawn.account.weight_error,
            product_error=quantized.product_error,
            budget=drawn.account.budget,
        )
        return quantized, tensor

    def _drawn(self, plan: WeightPlan, advance: Callable[[int], None]) -> DrawnWeight:
        weight = plan.weight
        inputs = self.moments.of(weight)
        accounts: list[Account] = []

        def account(values: npt.NDArray[Any], quantized: QuantizedTensor) -> Account:
            return Account.of(values, quantized, self.policy)

        def done(count: int, found: Account) -> None:
            accounts.append(found)
            advance(count)

        try:
            quantized = quantize_weight(
                weight.name,
                self.model.array(weight.tensor),
                weight.layout,
                plan.scheme,
                plan.blocks,
                self.policy,
                tensor_key(self.seed, weight.name),
                self.kernels,
                inputs=inputs if isinstance(inputs, InputMoments) else None,
                keep_moved=self.moved,
                inspect_part=account,
                on_part_done=done,
            )
        except ModelError as error:
            raise error.at(self.model.path) from None
        unfed = inputs if isinstance(inputs, str) else ""
        return DrawnWeight(quantized, reduce(add, accounts), unfed)


def _writers(
    run: Run,
    prepared: Prepared,
    calibration: Calibration | None,
    validator: Validator | None,
    folder: Path,
) -> dict[str, ModelWriter]:
    """Everything that a draw writes, by kind: what was asked for, and what is compared with it."""
    model, graph, target = prepared.model, prepared.graph, run.options.target
    writers: dict[str, ModelWriter] = {}
    if calibration:
        for kind in ("qdq", "plain") if validator else ("qdq",):
            output = run.output(folder, kind)
            writers[kind] = StaticQdqWriter(
                model, graph, output, calibration, target, nearest=kind == "plain"
            )
    elif validator or "qdq" in run.targets:
        aim = Target.of(graph.proto, target)
        writers["qdq"] = QdqWriter(model, graph, run.output(folder, "qdq"), aim)
    if "float" in run.targets:
        writers["float"] = FloatWriter(
            model, prepared.original, run.output(folder, "float"), guarded_values
        )
    if validator and not calibration:
        writers |= validator.writers(folder)
    return writers
