"""What is done to a model before it is judged: flipguard-onnx, the paper's policy, rivals.

No torch: the public library, onnx and numpy.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, compose, helper, numpy_helper

from flipguard_onnx import guard
from flipguard_onnx.formats import FLOAT4
from flipguard_onnx.graph.weights import Weight, find_weights
from flipguard_onnx.pipeline.options import GuardOptions
from flipguard_onnx.pipeline.plan import WeightPlan
from flipguard_onnx.quantization.kernels import get_backend
from flipguard_onnx.quantization.schemes import Affine, Grid, Scheme
from tests.helpers.attacked import choice_of
from tools.attacks import quantizers
from tools.attacks.simulate import NEAREST

SCHEMES = tuple(scheme for scheme in quantizers.SCHEMES if choice_of(scheme))  # that guard() has
RATIOS = (2, 4, 6, 8, 10, 15, 20, 30, 50)
VOTERS = 5
CPU = get_backend("cpu")


@dataclass(frozen=True)
class Case:
    """One model under one scheme; files go to `folder`."""

    model: Path
    scheme: str
    folder: Path

    def guard(self, target: Path, model: onnx.ModelProto | Path | None = None, **options):
        """guard() of this model, or of a changed copy, as it is called by a user.

        RuntimeError: it went on without error feedback, so a row would not be what it is called.
        """
        options = self.options | {"validate": False} | options
        report = guard(model or self.model, output=target, force=True, **options)
        if report.preserve == "off" and report.preserve_note:
            raise RuntimeError(f"{self.model}: no error feedback: {report.preserve_note}")
        return report

    @property
    def options(self) -> dict:
        """What guard() is told of the scheme."""
        choice = choice_of(self.scheme)
        return {
            "scheme": choice.name,
            "granularity": choice.granularity,
            "block_size": choice.block_size,
            "target": runs_in_onnxruntime(choice.name),
        }

    @property
    def kind(self) -> str:
        """The victim: mlp, cnn or lm."""
        return self.model.name.partition("-")[0]

    @cached_property
    def found(self) -> list[Weight]:
        """What is quantized, in the graph's order."""
        return find_weights(onnx.load(self.model))[0]

    @cached_property
    def weights(self) -> dict[str, np.ndarray]:
        """The weights that are quantized, by name."""
        names = {weight.name for weight in self.found}
        return {name: w for name, w in initializers(self.model).items() if name in names}

    @cached_property
    def size(self) -> int:
        """How many weights are quantized."""
        return sum(values.size for values in self.weights.values())

    @cached_property
    def plain(self) -> Path:
        """The model rounded to nearest."""
        target = self.folder / "plain.onnx"
        self.guard(target, policy="none")
        return target

    @cached_property
    def crossed(self) -> dict[str, np.ndarray]:
        """All float tensors, every weight that can move just across its nearest boundary."""
        target = self.folder / "crossed.onnx"
        self.guard(target, policy="topk", ratio=1.0, emit="float")
        return initializers(target)

    @cached_property
    def half_width(self) -> float:
        """Median over all weights of half the interval of values that have the same code.

        A boundary is midway between two levels, so the interval of a weight is half as wide as
        the distance between the two levels around its own.
        """
        widths = []
        for scheme, grid, floats in self.grids():
            codes = grid.encode(floats, CPU).astype(np.int16)
            ends = (scheme.lowest, scheme.highest) if isinstance(scheme, Affine) else (0, 15)
            above, below = (
                grid.decode(np.clip(codes + step, *ends).astype(np.int8)) for step in (1, -1)
            )
            widths.append(np.abs(above - below) / 4)
        return float(np.median(np.concatenate(widths)))

    @cached_property
    def distance(self) -> float:
        """Mean distance of a weight to its nearest level, in gaps.

        An unbiased draw between the two neighbouring levels changes that share of the codes.
        """
        offsets = [grid.analyze(floats, CPU).offsets for _, grid, floats in self.grids(drawn=True)]
        return float(np.mean(np.abs(np.concatenate(offsets))))

    def grids(self, drawn: bool = False) -> Iterator[tuple[Scheme, Grid, np.ndarray]]:
        """Scheme, grid and float32 values of every weight, flat in its canonical order.

        The quantizer's grid, or the one on which guard() draws.
        """
        options = GuardOptions(**self.options)
        for weight in self.found:
            plan = WeightPlan.of(weight, options)
            scheme, blocks = plan.scheme, plan.blocks
            values = weight.canonical(self.weights[weight.name])
            floats = values.astype(np.float32)
            laid = scheme.unclipped if drawn else scheme.grid
            yield scheme, laid(blocks.extremes(floats, CPU), blocks, values.dtype), floats

    def changed(self, target: Path) -> int:
        """How many codes of a file differ from plain rounding's."""
        codes = codes_of(target)
        return sum(
            int(np.sum(plain != codes[name])) for name, plain in codes_of(self.plain).items()
        )


def initializers(path: Path) -> dict[str, np.ndarray]:
    return {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}


def runs_in_onnxruntime(scheme: str) -> str:
    """The target of guard() whose form of the scheme runs there."""
    return "onnxruntime" if scheme in FLOAT4 else "portable"


def codes_of(path: Path) -> dict[str, np.ndarray]:
    """Every `_quantized` tensor, one byte per code."""
    found = {}
    for tensor in onnx.load(path).graph.initializer:
        if tensor.name.endswith("_quantized"):
            raw = np.frombuffer(tensor.raw_data, np.uint8)
            is_byte = tensor.data_type in (TensorProto.INT8, TensorProto.UINT8)
            found[tensor.name] = raw if is_byte else np.concatenate([raw & 15, raw >> 4])
    return found


def replaced(path: Path, values: dict[str, np.ndarray]) -> onnx.ModelProto:
    """A copy of the model with other initializers."""
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        if tensor.name in values:
            tensor.CopyFrom(numpy_helper.from_array(values[tensor.name], tensor.name))
    return model


def guarded(case: Case, target: Path, seed: int, **options) -> int:
    """guard() with these options; the number of its flips."""
    return case.guard(target, seed=seed, **options).flips


def _noise(
    case: Case, target: Path, seed: int, sigma: float | None = None, widths: float = 1.0
) -> int:
    """Plain rounding of noisy weights; by default `widths` times as noisy as the boxes are wide."""
    rng = np.random.default_rng(seed)
    sigma = widths * case.half_width if sigma is None else sigma
    noisy = {
        name: (values + sigma * rng.standard_normal(values.shape)).astype(values.dtype)
        for name, values in case.weights.items()
    }
    case.guard(target, replaced(case.model, noisy), policy="none")
    return case.changed(target)


def _random_flips(case: Case, target: Path, seed: int) -> int:
    """As many flips per tensor as unbiased draws make, of weights chosen uniformly."""
    rng = np.random.default_rng(seed)
    flipped = {}
    for tensor in case.guard(target, seed=seed, preserve="off").tensors:
        values = case.weights[tensor.name]
        crossed = case.crossed[tensor.name]
        movable = np.flatnonzero(values != crossed)
        chosen = rng.choice(movable, tensor.flips, replace=False)
        flipped[tensor.name] = values.copy()
        flipped[tensor.name].flat[chosen] = crossed.flat[chosen]
    case.guard(target, replaced(case.model, flipped), policy="none")
    return case.changed(target)


def _layers_at_8_bits(case: Case, target: Path, seed: int, which: slice) -> int:
    """Those matrices of the model, in the graph's order, stay at int8."""
    matrices = [weight.name for weight in case.found if weight.op != "Gather"]
    return guarded(case, target, seed, int8=tuple(matrices[which]))


def _sensitive_at_8_bits(case: Case, target: Path, seed: int) -> int:
    """guard() with the most sensitive quarter of the weights at int8, under a 4-bit scheme."""
    share = 0.25 if quantizers.SCHEMES[case.scheme].bits == 4 else 0.0
    return guarded(case, target, seed, int8_share=share)


def _twice(case: Case, target: Path, seed: int) -> int:
    """Guard what guard() moved."""
    first = case.folder / "first.onnx"
    case.guard(first, seed=seed, emit="float")
    case.guard(target, first, seed=seed + 1000)
    return case.changed(target)


def _vote(case: Case, target: Path, seed: int) -> int:
    """The mean output of several draws, as one model; flips are those of the first."""
    draws, flips = [], []
    for voter in range(VOTERS):
        flips.append(guarded(case, target, seed * VOTERS + voter))
        draws.append(onnx.load(target))
    model, (output,) = draws[0], draws[0].graph.output
    names = [output.name]
    for voter, other in enumerate(draws[1:], 1):
        graph = compose.add_prefix(other, f"vote{voter}.").graph
        names.append(graph.output[0].name)
        for given, renamed in zip(model.graph.input, graph.input, strict=True):
            model.graph.node.append(helper.make_node("Identity", [given.name], [renamed.name]))
        model.graph.node.extend(graph.node)
        model.graph.initializer.extend(graph.initializer)
    model.graph.node.append(helper.make_node("Mean", names, ["vote"]))
    output.name = "vote"
    onnx.save(model, target)
    return flips[0]


@dataclass(frozen=True)
class Defence:
    """make(case, target, seed) writes the quantized file and says how many codes it changed.

    draws: it depends on the seed.
    """

    make: Callable[[Case, Path, int], int]
    draws: bool = True


OURS = "ours"
DEFENCES = {
    "none": Defence(partial(guarded, policy="none"), draws=False),
    **{
        f"topk-{percent}": Defence(
            partial(guarded, policy="topk", ratio=percent / 100), draws=False
        )
        for percent in RATIOS
    },
    "noise-1e-4": Defence(partial(_noise, sigma=1e-4)),
    "noise-1e-3": Defence(partial(_noise, sigma=1e-3)),
    "noise-1e-2": Defence(partial(_noise, sigma=1e-2)),
    "noise-box": Defence(_noise),
    "noise-2-boxes": Defence(partial(_noise, widths=2.0)),
    "random-flips": Defence(_random_flips),
    "unbiased-0.3": Defence(partial(guarded, tau=0.3, preserve="off")),
    "unbiased-0.5": Defence(partial(guarded, tau=0.5, preserve="off")),
    "unbiased": Defence(partial(guarded, preserve="off")),
    "feedback-nearest": Defence(partial(guarded, tau=NEAREST, preserve="synthetic"), draws=False),
    "ours-share": Defence(_sensitive_at_8_bits),
    OURS: Defence(guarded),
}
REMEDIES = {
    OURS: DEFENCES[OURS],
    "unbiased": DEFENCES["unbiased"],
    "two passes": Defence(_twice),
    f"vote of {VOTERS} draws": Defence(_vote),
    "blocks of 16": Defence(partial(guarded, block_size=16)),
    "first matrix at int8": Defence(partial(_layers_at_8_bits, which=slice(1))),
    "second matrix at int8": Defence(partial(_layers_at_8_bits, which=slice(1, 2))),
    "last matrix at int8": Defence(partial(_layers_at_8_bits, which=slice(-1, None))),
    "all but the last at int8": Defence(partial(_layers_at_8_bits, which=slice(-1))),
    "all at int8": Defence(partial(guarded, int8=("*",))),
}
