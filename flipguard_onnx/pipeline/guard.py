"""guard() and inspect(): the stages of a run, one after the other."""

import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import reduce
from operator import add
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy.typing as npt
import onnx

from .. import __version__
from ..calibration.inputs import feeds_sha256, load_feeds
from ..calibration.moments import MomentRecorder, record
from ..detection.alignment import budget
from ..detection.scan import scan_weights
from ..emit import static_qdq
from ..emit.opset import converted, inlined, needed_opset
from ..emit.static_qdq import Calibration
from ..emit.writers import FloatWriter, ModelWriter, QdqWriter, guarded_values
from ..errors import DriftError, ModelError, SchemeError
from ..graph.weights import Weight
from ..io.model import INLINE_LIMIT, Model, open_model
from ..io.publish import check_target, publish, workspace
from ..io.writer import Output
from ..progress import Progress, meter
from ..quantization.chunks import flip_weight
from ..quantization.error_feedback import InputMoments
from ..quantization.kernels import compiling, get_backend, what_cuda_lacks
from ..quantization.rounding import Policy, QuantizedTensor, tensor_key
from ..quantization.schemes import SCHEMES, Blocks, Scheme
from ..reports.guard import GuardReport, Inspection, Tensor
from ..reports.scan import Budget
from ..runtime.session import require_openable
from ..validation import drift
from ..validation.drift import MAX_DRIFT
from ..validation.validator import ModelRunner, Validator
from . import options
from .mixed_precision import SensitivityProbe, measured, most_sensitive, share_of
from .options import EMITS, draw_seeds, one_of, output_paths, preserve_mode
from .plan import Format, guarded_tensor, require_weights


def guard(
    model: str | os.PathLike[str] | onnx.ModelProto,
    scheme: str = "int8",
    *,
    granularity: str = "channel",
    block_size: int | None = None,
    policy: str = "unbiased",
    tau: float = 1.0,
    ratio: float = 0.1,
    seed: int | None = None,
    emit: str = "qdq",
    include: tuple[str, ...] = (),
    exclude: tuple[str, ...] = (),
    int8: tuple[str, ...] = (),
    int8_share: float = 0.0,
    device: str = "auto",
    preserve: str = "auto",
    data: str | os.PathLike[str] | None = None,
    max_memory: int = 1024,
    max_drift: float = MAX_DRIFT,
    output: str | os.PathLike[str] | None = None,
    force: bool = False,
    validate: bool = True,
    standard_ops: bool = False,
    activations: str | None = None,
    calibration: str = "minmax",
    symmetric: bool = False,
    progress: Progress | None = None,
) -> GuardReport:
    """Guard a model against quantization-conditioned backdoors and write it quantized.

    Parameters
    ----------
    model : path of an ONNX file, or a ModelProto (then `output` is required)
    scheme : "int8", "int4", "nf4" or "fp4"
    granularity : "channel" or "tensor": how many weights share an int8 scale
    block_size : weights per scale at 4 bits: 16, 32, 64, 128 or 256 (default: int4 32, others 64)
    policy : "unbiased" (with `tau`, 0 < tau <= 1, in half-gaps), "topk" (with `ratio`,
        0 < ratio <= 1, the paper's k) or "none" (round to nearest)
    seed : 0 or above; by default fresh entropy from the operating system, and up to three draws
        when one drifts too far. The seed used is in the report and in the model's metadata.
    emit : "qdq" (quantized graph), "float" (the same graph with moved weights) or "both"
    include, exclude : shell patterns over tensor names
    int8 : shell patterns over the names of weights that stay at 8 bits under a 4-bit scheme
    int8_share : ... and besides the most sensitive ones, up to this share of the weights at 4 bits,
        0 <= int8_share < 1: those that move the model's outputs the most for their size, each drawn
        alone
    device : "auto", "cpu" or "cuda"
    preserve : feed rounding errors forward, so that layers' outputs change less: "synthetic" (on
        made-up inputs), "data" (on those of `data`), "off", or "auto": "data" where there is any,
        else "synthetic", unless it would take longer than a minute
    data : .npz file, or folder of such files, with inputs for `preserve`, for the calibration of
        `activations` and for the validation; by default they are made up
    max_memory : MiB for the statistics of `preserve`; a larger model is not run whole: then sampled
        layers are validated, and "auto" feeds no errors forward
    max_drift : allowed drift from the original, as a multiple of plain quantization's
    output : path to write; by default beside the input
    force : overwrite an existing output
    validate : try the result with onnxruntime before it appears at `output`
    standard_ops : only operators of the ONNX standard, none of com.microsoft
    activations : "int8", "uint8" or "int16": quantize activations, too, by onnxruntime's static
        quantizer; only with scheme "int8"
    calibration : "minmax", "entropy" or "percentile": how it finds their ranges
    symmetric : activations with their zero point in the middle
    progress : called with (stage, done, in all): bytes of weights while guarding, else steps

    Returns
    -------
    GuardReport : the paths written, counts, skipped tensors and the validation

    Raises
    ------
    ModelError, UnsupportedModelError, SchemeError, DeviceError : the input or an option is not
        usable; nothing is written
    ValidationError : the result did not pass; nothing is left behind
    """
    started = time.perf_counter()
    form = Format(scheme, granularity, block_size, int8)
    share = share_of(int8_share, scheme)
    rule = Policy(policy, tau, ratio)
    mode = preserve_mode(preserve, policy, data)
    one_of("emit", emit, EMITS)
    integers = options.asked_for(activations, symmetric, calibration, scheme, emit)
    most = max_memory << 20
    feeds = Path(data) if data else None
    backend = get_backend(device)
    say = progress or (lambda *_: None)
    with ExitStack() as stack:
        stack.enter_context(compiling(lambda: say("compiling the kernels, only once", 0, 1)))
        source = _open(model, output, stack)
        targets = output_paths(source.path, output, scheme, emit)
        read = [source.path, *(source.path.parent / name for name in source.data_sha256)]
        for target in targets.values():
            check_target(target, [*read, *filter(None, [feeds])], force)
        if validate or integers or share or mode != "off":
            require_openable(source.path, *targets.values())
        beside = next(iter(targets.values())).parent
        if integers:
            say("preparing for integer activations", 0, 1)
            own = stack.enter_context(workspace(beside))
            source = static_qdq.preprocessed(source, integers, most, own)
        weights, skipped = require_weights(source, include, exclude)
        calibrated = None
        if integers:
            static_qdq.require_reachable(source, weights)
            accepted = load_feeds(feeds, source.proto) if feeds else ModelRunner(source, None).feeds
            calibrated = Calibration.of(
                integers, granularity, source, accepted, "data" if feeds else "synthetic"
            )
        opset = needed_opset(weights, [kind for kind, _ in form.plans(weights)], standard_ops)
        if (flat := inlined(source, opset)) is not source:
            source = flat
            weights, skipped = require_weights(source, include, exclude)
        prepared = converted(source, opset, weights)
        folder = stack.enter_context(workspace(beside))
        recorded, note = None, None
        if mode != "off":
            say("running the float model", 0, 1)
            recorded, note = record(
                source, weights, folder / "probe", most, feeds, preserve == "auto"
            )
            if recorded:
                say(f"error feedback, about {recorded.seconds:.0f} s", 0, 1)
        seeds = draw_seeds(seed, policy)
        if share:
            tick = meter(say, "measuring 4 bits", sum(weight.nbytes for weight in weights))
            switched = SensitivityProbe(source, prepared, folder / "switched", most)
            for weight, planned in zip(weights, form.plans(weights), strict=True):
                if planned[0].bits == 4:
                    how = planned, rule, seeds[0], backend, recorded, False
                    _guarded(source, weight, *how, {"switched": switched}, tick)
            switched.save({})
            costs = measured(source, switched, feeds)
            form = replace(form, int8=int8 + most_sensitive(costs, weights, share))
        plan = form.plans(weights)
        trial = None
        if validate:
            kinds = [kind for kind, _ in plan]
            trial = Validator.of(
                source, prepared, weights, kinds, standard_ops, most, folder / "layers"
            )
        found = scan_weights(source, weights, skipped, say) if policy != "none" else None
        for draw, drawn_seed in enumerate(seeds, 1):
            drawn = folder / str(draw)
            sinks = _sinks(source, prepared, targets, drawn, trial, standard_ops, calibrated)
            place = bool(integers) or "float" in sinks
            tick = meter(say, "guarding", sum(weight.nbytes for weight in weights))
            tensors = tuple(
                _guarded(
                    source, weight, planned, rule, drawn_seed, backend, recorded, place, sinks, tick
                )
                for weight, planned in zip(weights, plan, strict=True)
            )
            if "qdq" in targets and isinstance(whole := sinks["qdq"], QdqWriter):
                tensors = tuple(replace(each, forms=whole.forms[each.name]) for each in tensors)
            report = GuardReport(
                version=__version__,
                input=str(source.path),
                input_sha256=source.sha256,
                input_data_sha256=source.data_sha256,
                input_bytes=source.size,
                scheme=scheme,
                granularity=granularity,
                block_size=block_size or SCHEMES[scheme].block_size,
                policy=policy,
                tau=tau if policy == "unbiased" else None,
                ratio=ratio if policy == "topk" else None,
                int8=form.int8,
                int8_share=share,
                preserve=mode if recorded else "off",
                preserve_note=note,
                data_sha256=feeds_sha256(feeds) if feeds else None,
                seed=drawn_seed if policy == "unbiased" else None,
                draws=draw,
                device=backend.__name__.rpartition(".")[2],
                device_note=what_cuda_lacks() if device == "auto" else None,
                tensors=tensors,
                skipped=tuple(skipped),
                scan=found,
                integers=calibrated.integers if calibrated else None,
            )
            say("writing", 0, 1)
            for sink in sinks.values():
                sink.save(report.metadata())
            if isinstance(integral := sinks.get("qdq"), static_qdq.StaticQdqWriter):
                report = replace(report, integers=integral.integers)
            if not trial:
                break
            say("validating", 0, 1)
            try:
                files = {kind: sink.output.path for kind, sink in sinks.items()}
                tried = trial.run(source, files, feeds, max_drift, drawn)
                if integers:
                    drift.require_useful(tried, integers)
            except DriftError:
                if draw == len(seeds):
                    raise
                continue
            report = replace(report, validation=tried)
            say("validating", 1, 1)
            break
        source.require_unchanged()
        outputs = {target: sinks[wanted].output for wanted, target in targets.items()}
        finished = {output: output.finished(target) for target, output in outputs.items()}
        report = replace(
            report,
            outputs={str(target): output.size for target, output in outputs.items()},
            outputs_sha256={
                str(place): output.sha256(file)
                for output, each in finished.items()
                for place, file in each.places.items()
            },
        )
        publish(list(finished.values()), force)
    return replace(report, seconds=time.perf_counter() - started)


def inspect(
    model: str | os.PathLike[str],
    scheme: str = "int8",
    *,
    granularity: str = "channel",
    block_size: int | None = None,
    include: tuple[str, ...] = (),
    exclude: tuple[str, ...] = (),
    int8: tuple[str, ...] = (),
) -> Inspection:
    """What guard() would do with a model; nothing is computed or written.

    Parameters and errors as in guard().
    """
    form = Format(scheme, granularity, block_size, int8)
    source = open_model(model)
    weights, skipped = require_weights(source, include, exclude)
    tensors, saved = [], 0
    for weight, (kind, blocks) in zip(weights, form.plans(weights), strict=True):
        width = weight.nbytes // weight.size
        saved += weight.size * width - (weight.size * kind.bits // 8 + blocks.count * width)
        tensors.append(guarded_tensor(weight, kind))
    return Inspection(
        str(source.path),
        source.sha256,
        source.size,
        source.size - saved,
        scheme,
        tuple(tensors),
        tuple(skipped),
    )


def _open(
    model: str | os.PathLike[str] | onnx.ModelProto,
    output: str | os.PathLike[str] | None,
    stack: ExitStack,
) -> Model:
    if not isinstance(model, onnx.ModelProto):
        return open_model(model)
    if output is None:
        raise SchemeError("a ModelProto has no path to write beside; output must be given")
    folder = stack.enter_context(workspace(Path(output).parent))
    path = folder / "model.onnx"
    try:
        path.write_bytes(model.SerializeToString())
    except ValueError as error:
        raise ModelError(f"the ModelProto cannot be serialized: {error}") from None
    return open_model(path)


def _sinks(
    source: Model,
    prepared: onnx.ModelProto,
    targets: dict[str, Path],
    folder: Path,
    trial: Validator | None,
    standard_ops: bool,
    calibrated: Calibration | None,
) -> dict[str, ModelWriter]:
    """Everything that this run writes: what was asked for, and what the validation compares."""
    external = source.size > INLINE_LIMIT or bool(source.data_sha256)

    def output(kind: str) -> Output:
        return Output(folder / kind, targets.get(kind), external)

    sinks: dict[str, ModelWriter] = {}
    if calibrated:
        measured = trial is not None
        sinks |= static_qdq.sinks(source, prepared, output, calibrated, standard_ops, measured)
    elif trial or "qdq" in targets:
        sinks["qdq"] = QdqWriter(source, prepared, output("qdq"), standard_ops)
    if "float" in targets:
        sinks["float"] = FloatWriter(source, output("float"), guarded_values)
    own = trial.sinks(folder, standard_ops) if trial and not calibrated else {}
    return sinks | own


def _guarded(
    source: Model,
    weight: Weight,
    form: tuple[Scheme, Blocks],
    rule: Policy,
    seed: int,
    backend: ModuleType,
    recorded: MomentRecorder | None,
    place: bool,
    sinks: dict[str, ModelWriter],
    tick: Callable[[int], None],
) -> Tensor:
    """Guard one weight and put it into everything that is written; `place`: moved floats, too."""
    kind, blocks = form
    key = tensor_key(seed, weight.name)
    inputs = recorded.of(weight) if recorded else None
    unfed = inputs if isinstance(inputs, str) else None
    fed = inputs if isinstance(inputs, InputMoments) else None
    budgets: list[Budget] = []

    def look(values: npt.NDArray[Any], flips: QuantizedTensor) -> Budget:
        return budget(values, flips, rule)

    def done(count: int, seen: Budget) -> None:
        budgets.append(seen)
        tick(count)

    flips = flip_weight(source, weight, kind, blocks, rule, key, backend, fed, place, look, done)
    for sink in sinks.values():
        sink.add_weight(weight.name, kind, flips)
    return guarded_tensor(weight, kind, flips, unfed, reduce(add, budgets))
