"""guard() for many models: in processes of this machine, or on a Dask cluster."""

import hashlib
import os
import re
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Unpack

from ..calibration.inputs import npz_files
from ..errors import FlipguardError, ModelError, exit_code
from ..io.model import open_model
from ..io.publish import WORKSPACE, check_target, sweep
from ..progress import Progress
from ..reports.batch import BatchReport, ModelOutcome
from ..runtime.pool import Lost, described, in_processes, on_dask
from .guard import guard
from .options import GuardKeywords, GuardOptions, StrPath, output_paths

OURS = re.compile(r"\.flipguard-\w+(-float)?\.onnx$")  # outputs of earlier runs

_ONE_AT_A_TIME = threading.Lock()  # a Dask worker may have many threads, a run uses all cores


@dataclass(frozen=True)
class Job:
    """One model to guard. outputs: where it may write; the first is what guard() is told."""

    model: Path
    outputs: tuple[Path, ...]
    options: GuardOptions


def guard_many(
    models: Sequence[StrPath],
    output: StrPath | None = None,
    scheme: str = "int8",
    *,
    jobs: int = 1,
    scheduler: str | None = None,
    progress: Progress | None = None,
    **options: Unpack[GuardKeywords],
) -> BatchReport:
    """Guard many models; one that fails, or kills its process, does not stop the others.

    Parameters
    ----------
    models : paths of ONNX files and of folders; those are searched for more, outputs of earlier
        runs aside. Links to files are followed, links to folders are not.
    output : folder for the outputs, made where it is missing; what was found in a folder keeps
        its place below. By default every output goes beside its input.
    scheme, **options : the fields of `GuardOptions`, the same for all models. Of `seed`, every
        model gets one of its own, made from it and the model's content, since models of one
        architecture have the same tensor names and would get the same draws. guard() repeats a
        model with the seed that its report has.
    jobs : how many processes work at a time, each on its share of the cores
    scheduler : address of a Dask scheduler; its workers then do the work instead. They must have
        this package and see the same files under the same paths.
    progress : called with ("guarding models", models done, models in all)

    Returns
    -------
    BatchReport : one outcome per model, in the order of the models

    Raises
    ------
    ModelError : a folder without models, two models with the same output, an output folder that
        cannot be made; nothing is written
    OptionError : an option is not usable; nothing is written
    DeviceError : the scheduler cannot be used

    Examples
    --------
    >>> import tempfile
    >>> from flipguard_onnx import guard_many
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     result = guard_many(["models/silero_vad.onnx"], output=folder, validate=False)
    >>> result.code, len(result.outcomes)
    (0, 1)
    """
    progress = progress or (lambda *_: None)
    folder = Path(output) if output else None
    opts = GuardOptions(scheme=scheme, **options)
    planned = plan_jobs([Path(model) for model in models], folder, opts)
    if opts.data_path:
        npz_files(opts.data_path)  # there, before anything is done
    folders = {job.outputs[0].parent for job in planned}
    _make(folders)
    outcomes = _refused(planned)
    left = [index for index in range(len(planned)) if index not in outcomes]
    if scheduler:
        work = on_dask(run, [_for_dask(planned[index]) for index in left], scheduler)
    else:
        work = in_processes(run, [planned[index] for index in left], jobs)
    progress("guarding models", len(outcomes), len(planned))
    with closing(work):
        for place, result in work:
            model = str(planned[left[place]].model)
            if isinstance(result, Lost):
                result = ModelOutcome(model, 2, error=f"{model}: {result.reason}")
            outcomes[left[place]] = replace(result, model=model)
            progress("guarding models", len(outcomes), len(planned))
    for folder in folders:
        sweep(folder)
    return BatchReport(tuple(outcomes[index] for index in range(len(planned))))


def plan_jobs(
    paths: Sequence[Path], output: Path | None, options: GuardOptions, alone: bool = False
) -> list[Job]:
    """The models that are meant, and where each will be written.

    Parameters
    ----------
    paths : of models and folders
    output : folder for the outputs; None: each beside its model
    options : the same for all
    alone : `paths` is one model, and `output` its output

    Raises
    ------
    ModelError : a folder without models, or two models with the same output
    """
    jobs = []
    for model, place in find_models(paths):
        target = output / place if output and not alone else model
        kinds = output_paths(target, output if alone else None, options.scheme, options.emit)
        jobs.append(Job(model, tuple(kinds.values()), options))
    _require_distinct(jobs)
    return jobs


def find_models(paths: Sequence[Path]) -> list[tuple[Path, Path]]:
    """The models that are meant, each with its place: its path below the folder that was given."""
    found = []
    for path in paths:
        if not path.is_dir():
            found.append((path, Path(path.name)))
            continue
        inside = sorted(_models_in(path))
        if not inside:
            raise ModelError("no .onnx file in this folder", path=path)
        found += [(file, file.relative_to(path)) for file in inside]
    return found


def model_seed(seed: int, model: Path) -> int:
    """The seed of one model of many: 128 bits of a hash over `seed` and the model's content."""
    source = open_model(model)
    parts = [str(seed), source.sha256, *source.data_sha256.values()]
    return int.from_bytes(hashlib.sha256(" ".join(parts).encode()).digest()[:16], "big")


def run(job: Job) -> ModelOutcome:
    """guard() as data, whatever happens."""
    started = time.perf_counter()
    report, error, code = None, None, 0
    try:
        with _ONE_AT_A_TIME:
            seed = job.options.seed
            seed = None if seed is None else model_seed(seed, job.model)
            options = replace(job.options, seed=seed)
            report = guard(job.model, output=job.outputs[0], **options.keywords())
    except FlipguardError as problem:
        error, code = str(problem), exit_code(problem)
    except Exception as problem:  # a defect of ours, or no memory: the others go on
        error, code = described(problem), 2
    return ModelOutcome(str(job.model), code, time.perf_counter() - started, report, error)


def _models_in(folder: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise ModelError("cannot be searched: {found}", path=error.filename, found=error.strerror)

    for place, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not WORKSPACE.fullmatch(name)]
        for name in files:
            path = Path(place, name)
            if path.suffix.lower() == ".onnx" and not OURS.search(name):
                yield path


def _require_distinct(jobs: Sequence[Job]) -> None:
    """Refuse two models that would be written to the same place, under whatever spelling."""
    owners: dict[str, Path] = {}
    for job in jobs:
        for output in job.outputs:
            place = os.path.join(os.path.realpath(output.parent), output.name)
            if place in owners:
                raise ModelError(
                    "{other} and {found}: both would be written to {output}",
                    other=owners[place],
                    found=job.model,
                    output=output,
                )
            owners[place] = job.model


def _make(folders: Iterable[Path]) -> None:
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ModelError("cannot be made: {found}", path=folder, found=error.strerror) from None


def _refused(jobs: Sequence[Job]) -> dict[int, ModelOutcome]:
    """Outcomes, by place in the list, of those whose outputs may not go where they would."""
    outcomes = {}
    inputs = [job.model for job in jobs if job.model.exists()]
    for index, job in enumerate(jobs):
        try:
            for output in job.outputs:
                check_target(output, inputs, job.options.force)
        except ModelError as error:
            outcomes[index] = ModelOutcome(str(job.model), exit_code(error), error=str(error))
    return outcomes


def _for_dask(job: Job) -> Job:
    """The job as a worker elsewhere can do it: absolute paths, and once more if it must.

    A worker can be lost when the output is there and the result not yet with the scheduler.
    """
    data = job.options.data_path
    return Job(
        job.model.absolute(),
        tuple(output.absolute() for output in job.outputs),
        replace(job.options, force=True, data=data and data.absolute()),
    )
