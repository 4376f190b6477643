"""guard() for many models: in processes of this machine, or on a Dask cluster."""

import filecmp
import hashlib
import os
import re
import shutil
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Unpack

from ..calibration.inputs import npz_files
from ..errors import FlipguardError, ModelError, exit_code
from ..io.model import open_model
from ..io.publish import WORKSPACE, check_target, made, sweep
from ..progress import Progress, silent
from ..reports.batch import BatchReport, ModelOutcome
from ..runtime.pool import Event, Lost, described, in_processes, on_dask
from .guard import guard
from .options import GuardKeywords, GuardOptions, StrPath, output_paths

OURS = re.compile(r"\.flipguard-\w+(-float)?\.onnx$")  # outputs of earlier runs

SETTINGS = ("genai_config.json", "config.json")  # one of them is in every model folder

LINKED = 1 << 24  # bytes from which a file that goes along is a hard link where it can be

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
        its place below. By default every output goes beside its input. Of a model folder, which
        has a config.json or genai_config.json in it, outputs have the names of their inputs, and
        all else in it goes along except the data of its models, so that what ran from the one
        folder runs from the other.
    scheme, **options : the fields of `GuardOptions`, the same for all models. Of `seed`, every
        model gets one of its own, made from it and the model's content, since models of one
        architecture have the same tensor names and would get the same draws. guard() repeats a
        model with the seed that its report has.
    jobs : how many processes work at a time, each on its share of the cores
    scheduler : address of a Dask scheduler; its workers then do the work instead. They must have
        this package and see the same files under the same paths.
    progress : called with ("guarding models", models done, models in all), and with the stages of
        each model that is guarded on this machine, as "MODEL: STAGE"

    Returns
    -------
    BatchReport : one outcome per model, in the order of the models

    Raises
    ------
    ModelError : a folder without models, two models with the same output, an output folder that
        cannot be made, a file that would go along and is there already; nothing is written
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
    progress = progress or silent
    folder = Path(output) if output else None
    opts = GuardOptions(scheme=scheme, **options)
    planned = plan_jobs([Path(model) for model in models], folder, opts)
    if opts.data_path:
        npz_files(opts.data_path)  # there, before anything is done
    companions = [] if folder is None else plan_copies(map(Path, models), folder, opts.force)
    folders = {job.outputs[0].parent for job in planned}
    with made(folders):
        done = _outcomes(planned, jobs, scheduler, progress)
        for written in folders:
            sweep(written)
        guarded = any(outcome.report for outcome in done)
        return BatchReport(done, tuple(map(_copy, companions)) if guarded else ())


def _outcomes(
    planned: Sequence[Job], jobs: int, scheduler: str | None, progress: Progress
) -> tuple[ModelOutcome, ...]:
    """What becomes of every job."""
    outcomes = _refused(planned)
    left = [index for index in range(len(planned)) if index not in outcomes]

    def tell(place: int, event: Event) -> None:
        model = planned[left[place]].model.name
        progress(f"{model}: {event.stage}", event.done, event.total)

    if scheduler:
        work = on_dask(run, [_for_dask(planned[index]) for index in left], scheduler)
    else:
        work = in_processes(run, [planned[index] for index in left], jobs, tell)
    progress("guarding models", len(outcomes), len(planned))
    with closing(work):
        for place, result in work:
            model = str(planned[left[place]].model)
            if isinstance(result, Lost):
                result = ModelOutcome(model, 2, error=f"{model}: {result.reason}")
            outcomes[left[place]] = replace(result, model=model)
            progress("guarding models", len(outcomes), len(planned))
    return tuple(outcomes[index] for index in range(len(planned)))


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
    for path in paths:
        for model, place in find_models([path]):
            target = output / place if output and not alone else model
            named = output if alone else target if is_model_folder(path, output) else None
            kinds = output_paths(target, named, options.scheme, options.emit)
            jobs.append(Job(model, tuple(kinds.values()), options))
    _require_distinct(jobs)
    return jobs


def is_model_folder(path: Path, output: Path | None) -> bool:
    """Whether a folder is what a runtime loads whole, and is to be written to another place."""
    settings = any((path / name).is_file() for name in SETTINGS)
    return settings and output is not None and not _same(path, output)


def plan_copies(paths: Iterable[Path], output: Path, force: bool) -> list[tuple[Path, Path]]:
    """What goes along with the models of model folders: files, each with its place in `output`.

    That is all but models, their data, and what is hidden.

    Raises
    ------
    ModelError : another file is there already, and `force` does not say to replace it
    """
    copies = []
    for folder in paths:
        if is_model_folder(folder, output):
            files = sorted(_files_in(folder, output))
            models = [file for file in files if file.suffix.lower() == ".onnx"]
            left = {os.path.realpath(file) for model in models for file in _files_of(model)}
            for file in files:
                if os.path.realpath(file) not in left and not file.name.startswith("."):
                    copies.append((file, output / file.relative_to(folder)))
    for file, target in copies:
        if os.path.lexists(target) and not (target.is_file() and (force or _equal(file, target))):
            raise ModelError("exists already; --force overwrites it", path=target)
    return copies


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


def run(job: Job, progress: Progress = silent) -> ModelOutcome:
    """guard() as data, whatever happens."""
    started = time.perf_counter()
    report, error, code = None, None, 0
    try:
        with _ONE_AT_A_TIME:
            seed = job.options.seed
            seed = None if seed is None else model_seed(seed, job.model)
            options = replace(job.options, seed=seed)
            report = guard(
                job.model, output=job.outputs[0], progress=progress, **options.keywords()
            )
    except FlipguardError as problem:
        error, code = str(problem), exit_code(problem)
    except Exception as problem:  # a defect of ours, or no memory: the others go on
        error, code = described(problem), 2
    return ModelOutcome(str(job.model), code, time.perf_counter() - started, report, error)


def _models_in(folder: Path) -> Iterator[Path]:
    for place, _, files in _walk(folder):
        for name in files:
            path = Path(place, name)
            if path.suffix.lower() == ".onnx" and not OURS.search(name):
                yield path


def _walk(folder: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """os.walk() without our own temporary folders."""

    def refuse(error: OSError) -> None:
        raise ModelError("cannot be searched: {found}", path=error.filename, found=error.strerror)

    for place, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not WORKSPACE.fullmatch(name)]
        yield place, folders, files


def _files_in(folder: Path, output: Path) -> Iterator[Path]:
    """The regular files of a folder, links to some included; not what is hidden or in `output`."""
    for place, folders, files in _walk(folder):
        folders[:] = [
            name
            for name in folders
            if not name.startswith(".") and not _same(Path(place, name), output)
        ]
        yield from (Path(place, name) for name in files if Path(place, name).is_file())


def _files_of(model: Path) -> Iterable[Path]:
    """A model's file and those with its data."""
    try:
        return open_model(model, digests=False).stamps
    except FlipguardError:  # its own run says what is wrong with it
        return [model]


def _same(path: Path, other: Path) -> bool:
    return os.path.realpath(path) == os.path.realpath(other)


def _equal(file: Path, other: Path) -> bool:
    return filecmp.cmp(file, other, shallow=False)


def _copy(pair: tuple[Path, Path]) -> str:
    """Let a file go along; where it went."""
    file, target = pair
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if not (target.is_file() and target.samefile(file)):
            target.unlink(missing_ok=True)
            if file.stat().st_size >= LINKED:
                with suppress(OSError):  # another file system
                    os.link(os.path.realpath(file), target)
            if not target.exists():
                shutil.copyfile(file, target)
    except OSError as error:
        raise ModelError("cannot be written: {found}", path=target, found=error.strerror) from None
    return str(target)


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
