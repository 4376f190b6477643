"""guard() and inspect(): the stages of a run, one after the other."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Unpack

import onnx

from .. import __version__
from ..calibration.inputs import feeds_sha256
from ..calibration.moments import Moments, record
from ..calibration.samples import Samples
from ..detection.scan import scan_weights
from ..emit.preprocessing import preprocessed
from ..emit.static_qdq import Calibration, require_reachable
from ..errors import DriftError, OptionError
from ..io.publish import publish
from ..opening import open_folded
from ..progress import Progress
from ..quantization.kernels import what_cuda_lacks
from ..quantization.rounding import sound, unsound
from ..reports.guard import ActivationQuantization, GuardReport, Inspection
from ..reports.scan import Scan
from ..validation.validator import Validator
from .draw import Draw, quantize
from .mixed_precision import choose_precision
from .options import GuardKeywords, GuardOptions, StrPath
from .plan import Prepared, plan_weights, prepare, require_named, require_weights
from .run import Run, naming, open_run


def guard(
    model: StrPath | onnx.ModelProto,
    scheme: str = "int8",
    *,
    output: StrPath | None = None,
    progress: Progress | None = None,
    **options: Unpack[GuardKeywords],
) -> GuardReport:
    """Guard a model against quantization-conditioned backdoors and write it quantized.

    Parameters
    ----------
    model : path of an ONNX file, or a ModelProto (then `output` is required); it is never changed
    scheme : "int8", "uint8", "int4", "uint4", "int2", "uint2", "nf4", "fp4", "fp8", "mxfp4" or
        "nvfp4"
    output : path to write; by default beside the input
    progress : called with (stage, done, in all): bytes of weights while guarding, else steps
    **options : the fields of `GuardOptions`

    Returns
    -------
    GuardReport : the paths written, counts, skipped tensors, the scan and the validation

    Raises
    ------
    ModelError, UnsupportedModelError, OptionError, DeviceError : the input or an option is not
        usable; nothing is written
    ValidationError : the result did not pass; nothing is left behind

    Examples
    --------
    >>> import tempfile
    >>> from flipguard_onnx import guard
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     report = guard("models/silero_vad.onnx", "int8", output=f"{folder}/guarded.onnx")
    >>> report.scheme, f"{report.coverage:.1%}"
    ('int8', '99.5%')
    """
    return guard_with(model, GuardOptions(scheme=scheme, **options), output, progress)


def guard_with(
    model: StrPath | onnx.ModelProto,
    opts: GuardOptions,
    output: StrPath | None = None,
    progress: Progress | None = None,
    beside: Callable[[GuardReport], AbstractContextManager[object]] = nullcontext,
) -> GuardReport:
    """guard() with its options in one; the models are published within `beside` the report.

    beside: what it raises before its body leaves nothing published.
    """
    started = time.perf_counter()
    with open_run(model, output, opts, progress) as run:
        prepared = prepare_model(run)
        samples = Samples(prepared.model, opts.data_path, opts.without_inputs)
        if opts.activations:
            require_reachable(prepared.model, prepared.plain_weights)
        require_inputs(run, prepared, samples)
        calibration = calibrate(samples, opts)
        samples.release()
        moments = record_moments(run, prepared, samples)
        seeds = run.seeds
        prepared = choose_precision(run, prepared, samples, moments, seeds[0])
        validator = make_validator(run, prepared, samples)
        scan = scan_input(run, prepared)
        for number, seed in enumerate(seeds, 1):
            draw = quantize(run, prepared, moments, calibration, validator, scan, seed, number)
            report = describe(run, prepared, moments, scan, draw)
            draw.save(report.metadata())
            try:
                validation = draw.validate(validator)
                break
            except DriftError as error:
                if number == len(seeds):
                    raise error.advise(draw.advice(moments.inputs)) from None
        finished, sizes, digests = run.finish({k: w.output for k, w in draw.writers.items()})
        report = replace(
            report,
            integers=draw.activations,
            validation=validation,
            outputs=sizes,
            outputs_sha256=digests,
            seconds=time.perf_counter() - started,
        )
        with beside(report):
            publish(finished, opts.force)
        run.kept.remove()
    return report


def inspect(
    model: StrPath,
    scheme: str = "int8",
    *,
    granularity: str | None = None,
    block_size: int | None = None,
    scale: float | str | None = None,
    reduce_range: bool = False,
    include: tuple[str, ...] = (),
    exclude: tuple[str, ...] = (),
    int8: tuple[str, ...] = (),
) -> Inspection:
    """What guard() would do with a model; nothing is computed or written.

    Parameters
    ----------
    model : path of an ONNX file
    scheme, granularity, block_size, scale, reduce_range, include, exclude, int8 : as in
        `GuardOptions`

    Returns
    -------
    Inspection : the tensors that would be guarded, the others with the reason, sizes in bytes

    Raises
    ------
    ModelError, UnsupportedModelError, OptionError : as in guard()

    Examples
    --------
    >>> from flipguard_onnx import inspect
    >>> found = inspect("models/silero_vad.onnx", "int8")
    >>> len(found.tensors), found.tensors[0].op
    (16, 'Conv')
    """
    options = GuardOptions(
        scheme=scheme,
        granularity=granularity,
        block_size=block_size,
        scale=scale,
        reduce_range=reduce_range,
        include=include,
        exclude=exclude,
        int8=int8,
        allow_unguarded=True,
    )
    source = open_folded(model)
    with naming(source.path):
        require_named(source, options)
        weights, skipped = require_weights(source, options)
        plans = plan_weights(weights, options)
    saved = 0
    for plan in plans:
        width = plan.weight.nbytes // plan.weight.size
        codes = plan.weight.size * plan.scheme.bits // 8
        saved += plan.weight.nbytes - (codes + plan.blocks.count * width)
    return Inspection(
        str(source.path),
        source.sha256,
        source.data_sha256,
        source.size,
        source.size - saved,
        scheme,
        tuple(plan.described() for plan in plans),
        tuple(skipped),
    )


def prepare_model(run: Run) -> Prepared:
    """The weights and the graph; with activations, of the model that onnxruntime pre-processed."""
    model, options = run.model, run.options
    require_named(model, options)
    if options.activations:
        run.progress("preparing for integer activations", 0, 1)
        model = preprocessed(model, options.activations, options.max_bytes, run.folder)
    return prepare(model, options)


def calibrate(samples: Samples, options: GuardOptions) -> Calibration | None:
    """What onnxruntime's static quantizer is told; None where activations stay float."""
    if not options.activations:
        return None
    asked = ActivationQuantization(options.activations, options.symmetric, options.calibration)
    return Calibration.of(asked, options.granularity != "tensor", samples)


def require_inputs(run: Run, prepared: Prepared, samples: Samples) -> None:
    """Refuse a model that accepts no inputs before anything that takes long is done in vain.

    Of a model that is not run as a whole, its layers find inputs of their own. Raises ModelError
    where weights are to blame that are not finite, else OptionError.
    """
    options = run.options
    made_up = options.activations and not options.data
    needed = options.validate or options.int8_share or made_up
    if needed and samples.source.size <= options.max_bytes:
        run.progress("trying the inputs", 0, 1)
        try:
            samples.require()
        except OptionError:
            for weight in prepared.plain_weights:
                array = prepared.model.array(weight.tensor)
                if not sound(array, array.dtype).all():
                    raise unsound(weight.name, array) from None
            raise


def record_moments(run: Run, prepared: Prepared, samples: Samples) -> Moments:
    """The second moments of what each weight is multiplied with, for error feedback."""
    options = run.options
    if options.feedback_inputs != "off":
        run.progress("running the float model", 0, 1)
    return record(
        samples,
        prepared.plain_weights,
        run.folder / "probe",
        options.max_bytes,
        inputs=options.feedback_inputs,
        optional=options.preserve == "auto",
        kept=run.kept,
        progress=run.progress,
    )


def make_validator(run: Run, prepared: Prepared, samples: Samples) -> Validator | None:
    """What compares the results with the original; None where nobody wants that."""
    options = run.options
    if not options.validate:
        return None
    return Validator.of(
        samples,
        prepared.original,
        prepared.graph,
        [(plan.weight, plan.scheme) for plan in prepared.weights],
        run.folder / "layers",
        max_bytes=options.max_bytes,
        max_drift=options.max_drift,
        target=options.target,
    )


def scan_input(run: Run, prepared: Prepared) -> Scan | None:
    """Was the input prepared for a quantizer? Not asked where nothing is guarded."""
    if run.options.policy == "none":
        return None
    return scan_weights(prepared.model, prepared.plain_weights, prepared.skipped, run.progress)


def describe(
    run: Run, prepared: Prepared, moments: Moments, scan: Scan | None, draw: Draw
) -> GuardReport:
    """The report on a draw, before it is validated and published."""
    options, source = run.options, prepared.model
    chosen = options.choice.filled
    on_auto = options.device == "auto"
    return GuardReport(
        version=__version__,
        input=str(source.path),
        input_sha256=source.sha256,
        input_data_sha256=source.data_sha256,
        input_bytes=source.size,
        options=options.record(),
        changed_options=options.changed(),
        scheme=options.scheme,
        granularity=chosen.granularity or "",
        block_size=chosen.block_size,
        scale=chosen.divisor,
        reduce_range=chosen.reduced,
        policy=options.policy,
        tau=options.tau if options.policy == "unbiased" else None,
        ratio=options.ratio if options.policy == "topk" else None,
        int8=prepared.int8,
        int8_share=options.int8_share,
        preserve=moments.inputs,
        preserve_note=moments.note,
        data_sha256=feeds_sha256(options.data_path) if options.data_path else None,
        seed=draw.seed if options.policy == "unbiased" else None,
        draws=draw.number,
        device=run.kernels.device,
        device_note=what_cuda_lacks() if on_auto else None,
        tensors=draw.tensors,
        skipped=(*prepared.skipped, *draw.kept),
        scan=scan,
        integers=draw.activations,
    )
