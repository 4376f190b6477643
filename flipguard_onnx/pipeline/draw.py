"""One draw: every weight is quantized once and put into every model that the run writes."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import numpy.typing as npt

from ..calibration.moments import Moments
from ..detection.alignment import budget
from ..emit.static_qdq import Calibration, StaticQdqWriter
from ..emit.writers import FloatWriter, ModelWriter, QdqWriter, guarded_values
from ..errors import ModelError, ValidationError
from ..io.model import Model
from ..progress import Progress, meter
from ..quantization.chunks import quantize_weight
from ..quantization.error_feedback import InputMoments
from ..quantization.kernels.protocol import Kernels
from ..quantization.rounding import Policy, QuantizedTensor, tensor_key
from ..reports.guard import ActivationQuantization, Tensor
from ..reports.scan import Budget
from ..reports.validation import Validation
from ..validation.drift import require_useful
from ..validation.validator import Validator
from .plan import Prepared, WeightPlan
from .run import Run

# Share of nearest rounding's errors that may be left to choose. Codes are drawn without bias; moved
# weights of 16 bits are too coarse to reach every level, and set their scales themselves.
MAX_CHOSEN, MAX_CHOSEN_MOVED = 0.01, 0.1


@dataclass(frozen=True)
class Draw:
    """The result of one draw.

    seed: of its random streams. number: 1 for the first draw of a run. writers: the models being
    written, by kind; folder: where. tensors: what became of every weight.
    """

    seed: int
    number: int
    writers: dict[str, ModelWriter]
    folder: Path
    tensors: tuple[Tensor, ...]
    progress: Progress

    @property
    def activations(self) -> ActivationQuantization | None:
        """How activations are quantized, if they are; in full once the models are saved."""
        guarded = self.writers.get("qdq")
        return guarded.integers if isinstance(guarded, StaticQdqWriter) else None

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
        if self.activations:
            require_useful(validation, self.activations)
        self.progress("validating", 1, 1)
        return validation


def quantize(
    run: Run,
    prepared: Prepared,
    moments: Moments,
    calibration: Calibration | None,
    validator: Validator | None,
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
    )
    advance = meter(run.progress, "guarding", prepared.nbytes)
    tensors = [quantizer.quantize(plan, writers.values(), advance) for plan in prepared.weights]
    if quantizer.policy == Policy("unbiased", tau=1.0):
        require_unbiased(tensors, MAX_CHOSEN_MOVED if quantizer.moved else MAX_CHOSEN)
    guarded = writers.get("qdq")
    if isinstance(guarded, QdqWriter) and "qdq" in run.targets:
        tensors = [replace(tensor, forms=guarded.forms[tensor.name]) for tensor in tensors]
    return Draw(seed, number, writers, folder, tuple(tensors), run.progress)


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
    shares = {t.name: t.budget.chosen / (t.budget.nearest or 1.0) for t in tensors if t.budget}
    if left := {name: share for name, share in shares.items() if not share <= limit}:
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

    moved: whether somebody wants the float weights that yield the chosen codes.
    """

    model: Model
    policy: Policy
    seed: int
    kernels: Kernels
    moments: Moments
    moved: bool

    def quantize(
        self, plan: WeightPlan, writers: Iterable[ModelWriter], advance: Callable[[int], None]
    ) -> Tensor:
        """Quantize one weight and put it into the models; `advance` is told the bytes done."""
        weight = plan.weight
        inputs = self.moments.of(weight)
        budgets: list[Budget] = []

        def account(values: npt.NDArray[Any], quantized: QuantizedTensor) -> Budget:
            return budget(values, quantized, self.policy)

        def done(count: int, found: Budget) -> None:
            budgets.append(found)
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
        for writer in writers:
            writer.add_weight(weight.name, plan.scheme, quantized)
        return replace(
            plan.described(),
            flips=quantized.count,
            furthest=quantized.furthest,
            gain=quantized.gain,
            unfed=inputs if isinstance(inputs, str) else None,
            budget=reduce(add, budgets),
        )


def _writers(
    run: Run,
    prepared: Prepared,
    calibration: Calibration | None,
    validator: Validator | None,
    folder: Path,
) -> dict[str, ModelWriter]:
    """Everything that a draw writes, by kind: what was asked for, and what is compared with it."""
    model, graph, standard_ops = prepared.model, prepared.graph, run.options.standard_ops
    writers: dict[str, ModelWriter] = {}
    if calibration:
        for kind in ("qdq", "plain") if validator else ("qdq",):
            output = run.output(folder, kind)
            writers[kind] = StaticQdqWriter(
                model, graph, output, calibration, standard_ops, nearest=kind == "plain"
            )
    elif validator or "qdq" in run.targets:
        writers["qdq"] = QdqWriter(model, graph, run.output(folder, "qdq"), standard_ops)
    if "float" in run.targets:
        writers["float"] = FloatWriter(
            model, prepared.original, run.output(folder, "float"), guarded_values
        )
    if validator and not calibration:
        writers |= validator.writers(folder)
    return writers
