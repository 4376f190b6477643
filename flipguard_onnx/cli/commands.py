"""The command line: parse, call the library, print, return the exit code.

0: done and valid. 1: the validation failed, nothing was written. 2: usage, unreadable input,
nothing to guard, weights that cannot be, or no inputs on which the float model runs. For several
models, the highest of their codes. 128 + n: interrupted by signal n.
scan: 0: clean. 1: suspicious or worse. 2: unreadable, or not judged.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from .. import __version__
from ..errors import FlipguardError, OptionError, exit_code, printable
from ..interrupts import Interrupted, interruptible
from ..io.publish import made, reports, write_report
from ..reports.serialize import dumped
from .options import (
    FILE,
    FORMAT_OPTIONS,
    GroupedCommand,
    batch_options,
    config_option,
    guard_options,
    output_option,
    page_options,
    report_options,
    target_option,
)
from .paths import check_files
from .progress import progress_bar

if TYPE_CHECKING:
    from ..reports.batch import BatchReport
    from ..reports.guard import GuardReport, Inspection, TargetInspection
    from ..reports.scan import Scan
    from ..reports.validation import Verification


class DefaultGroup(click.Group):
    """A group whose first command is meant when none is named."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, "--help", "--version"):
            args = ["guard", *args]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Parse what a command is given, and run it."""
        with failures():
            return super().invoke(ctx)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Of the first word: a command, or what the command that goes unnamed takes."""
        named = super().shell_complete(ctx, incomplete)
        if not incomplete.startswith("-"):
            return [CompletionItem(incomplete, type="file"), *named]
        guard = self.commands["guard"]
        with guard.make_context("guard", [], parent=ctx, resilient_parsing=True) as inner:
            return [*named, *guard.shell_complete(inner, incomplete)]


@click.group(cls=DefaultGroup, no_args_is_help=True)
@click.version_option(__version__, prog_name="flipguard-onnx")
def main() -> None:
    """Guard ONNX models against quantization-conditioned backdoors.

    `flipguard-onnx MODEL` is short for `flipguard-onnx guard MODEL`.
    """
    # Read when numpy is loaded, whose threads for matrix products wait for the next one in a loop
    # and take the processors from our kernels: after 2^16 cycles they shall sleep.
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "16")


def configure(context: click.Context, _: click.Parameter, file: Path | None) -> str | None:
    """Let a file give defaults; the path of the one that did."""
    if context.resilient_parsing:  # for the shell's completion
        return None
    from .config_file import configured

    read, context.default_map = configured(main, context.command.name or "", file)
    return str(read) if read else None


EXAMPLES = """\b
Examples:
  flipguard-onnx model.onnx
  flipguard-onnx model.onnx --scheme int4 --data samples.npz --html report.html
  flipguard-onnx guard vendor/ -o guarded/ --jobs 4 --report report.json
"""


@main.command(cls=GroupedCommand, epilog=EXAMPLES)
@click.argument("models", type=FILE, nargs=-1, required=True)
@output_option
@guard_options()
@batch_options
@page_options
@report_options
@config_option(configure)
def guard(
    models: tuple[Path, ...],
    output: str | None,
    jobs: int,
    scheduler: str | None,
    html: Path | None,
    sbom: Path | None,
    report: Path | None,
    quiet: bool,
    config: str | None,
    **options: Any,
) -> None:
    """Guard MODELS and write them quantized; folders are searched for .onnx files."""
    from ..pipeline.batch import plan_jobs
    from ..pipeline.options import GuardOptions

    alone = len(models) == 1 and not models[0].is_dir() and not scheduler
    place = Path(output) if output else None
    plan = plan_jobs(models, place, GuardOptions(**options), alone=alone)
    check_files(
        {"--report": report, "--html": html, "--sbom": sbom},
        models=[job.model for job in plan],
        outputs=[path for job in plan for path in job.outputs],
        data=options["data"],
        config=config,
    )
    if sbom:
        from ..reports.sbom import sbom as bom  # before the run: it may not be installed
    if alone:
        from ..pipeline.guard import guard_with

        def files_on(result: "GuardReport") -> AbstractContextManager[None]:
            """The reports, which are written in full before the models are published."""
            result, texts = replace(result, config=config), {}
            if html:
                from ..reports.html import guard_html

                texts[html] = guard_html(result)
            if sbom:
                texts[sbom] = bom(result)
            if report:
                texts[report] = dumped(result.to_dict()) + "\n"
            return reports(texts)

        folders = [place.absolute().parent] if place else []
        with made(folders), progress_bar(quiet) as progress:
            opts = GuardOptions(**options)
            result = guard_with(models[0], opts, output, progress, files_on)
        publish(replace(result, config=config), None, quiet)
    elif html or sbom:
        option = "--html" if html else "--sbom"
        raise OptionError("{option} is for one model; --report has all of them", option=option)
    else:
        from .. import guard_many

        with progress_bar(quiet) as progress:
            batch = guard_many(
                models, output, jobs=jobs, scheduler=scheduler, progress=progress, **options
            )
        failed = len(batch.outcomes) == 1 and batch.code != 0
        publish(replace(batch, config=config), report, quiet or failed)
        for outcome in batch.outcomes if quiet or failed else ():
            if outcome.error:
                echo(f"flipguard-onnx: {printable(outcome.error)}", err=True)
        sys.exit(batch.code)


@main.command(cls=GroupedCommand)
@click.argument("model", type=FILE)
@target_option
@guard_options(*FORMAT_OPTIONS)
@report_options
@config_option(configure)
def inspect(
    model: Path,
    target: str | None,
    report: Path | None,
    quiet: bool,
    config: str | None,
    **options: Any,
) -> None:
    """Show what would be guarded in MODEL and what would be skipped; write no model.

    With --target MODEL is a quantized file, and what that runtime would not take is shown.
    """
    check_files({"--report": report}, models=[model], config=config)
    found: Inspection | TargetInspection
    if target:
        from ..detection.requirements import inspect_for

        found = inspect_for(model, target)
    else:
        from .. import inspect as run

        found = run(model, **options)
    publish(replace(found, config=config), report, quiet)


@main.command(cls=GroupedCommand)
@click.argument("original", type=FILE)
@click.argument("guarded", type=FILE)
@guard_options(
    "scheme",
    default=None,
    help="Compare with rounding to this.  [default: as recorded in GUARDED, or int8]",
)
@guard_options("data")
@guard_options(
    "max_memory",
    default=None,
    help="MiB; of a larger model only sampled layers are run.  [default: as recorded, or 1024]",
)
@guard_options("max_drift")
@report_options
@config_option(configure)
def verify(
    original: Path,
    guarded: Path,
    report: Path | None,
    quiet: bool,
    config: str | None,
    **options: Any,
) -> None:
    """Validate GUARDED against ORIGINAL, as guard does with its own output."""
    from .. import verify as run

    models = [original, guarded]
    check_files({"--report": report}, models=models, data=options["data"], config=config)
    publish(replace(run(original, guarded, **options), config=config), report, quiet)


@main.command()
@click.argument("models", type=FILE, nargs=-1, required=True)
@click.option(
    "--format",
    "form",
    type=click.Choice(("text", "json", "sarif", "html")),
    default="text",
    show_default=True,
    help="Of the output; other than text for one model.",
)
@click.option("--report", type=FILE, help="One model: write it here, and print text all the same.")
@click.option(
    "--fail-on",
    type=click.Choice(("suspicious", "aligned", "never")),
    default="suspicious",
    show_default=True,
    help="Verdict from which on the exit code is 1.",
)
@click.option("--quiet", is_flag=True, help="Print errors only.")
@config_option(configure)
def scan(
    models: tuple[Path, ...],
    form: str,
    report: Path | None,
    fail_on: str,
    quiet: bool,
    config: str | None,
) -> None:
    """Was one of MODELS prepared for a quantizer, and for which one?

    Compares where its weights stand between the decision boundaries of int8, int4, nf4 and fp4
    with where they stand on grids that nobody uses. Folders are searched for .onnx files, outputs
    of earlier runs of guard aside. Unlike guard, it takes one model after the other and has no
    summary; exit code 1 is a verdict, and 2 a model that could not be read or judged.
    """
    codes: list[int] = []
    from .. import scan as run
    from ..pipeline.batch import find_models

    found: list[tuple[Path, FlipguardError | None]] = []
    for path in models:
        try:
            found += [(model, None) for model, _ in find_models([path])]
        except FlipguardError as error:
            found.append((path, error))
    if len(found) > 1 and (report or form != "text"):
        raise OptionError("--report and --format are for one model, not {found}", found=len(found))
    check_files({"--report": report}, models=[model for model, _ in found], config=config)
    for model, problem in found:
        try:
            if problem:
                raise problem
            with progress_bar(quiet) as progress:
                result = replace(run(model, progress=progress), config=config)
        except (FlipguardError, MemoryError, OSError) as error:
            codes.append(tell(error, model))
            continue
        text = scan_output(result, form)
        if report:
            write_report(report, text + "\n")
        if not quiet:
            echo("\n" * bool(codes) + (result.render() if report else text))
        elif result.verdict.level == "not judged":
            echo(f"flipguard-onnx: {printable(f'{model}: {result.verdict.reason}')}", err=True)
        codes.append(scan_code(result.verdict.level, fail_on))
    sys.exit(max(codes))


def scan_output(result: "Scan", form: str) -> str:
    """The scan in the form asked for."""
    if form == "text":
        return result.render()
    if form == "json":
        return dumped(result.to_dict())
    if form == "html":
        from ..reports.html import scan_html

        return scan_html(result)
    from ..reports.sarif import sarif

    return dumped(sarif(result))


def scan_code(level: str, fail_on: str) -> int:
    """The exit code of a scan with this verdict."""
    if level == "not judged":
        return 2
    if level == "suspicious":
        return int(fail_on == "suspicious")
    return int(level != "clean" and fail_on != "never")


def publish(
    result: "GuardReport | Inspection | TargetInspection | Verification | BatchReport",
    path: Path | None,
    quiet: bool,
) -> None:
    """Print the result and write it as JSON."""
    if path:
        write_report(path, dumped(result.to_dict()) + "\n")
    if not quiet:
        echo(result.render())


def echo(text: str, err: bool = False) -> None:
    """Print; what the terminal's encoding does not have as an escape."""
    encoding = (sys.stderr if err else sys.stdout).encoding or "utf-8"
    click.echo(text.encode(encoding, "backslashreplace").decode(encoding), err=err)


@contextmanager
def failures() -> Iterator[None]:
    """Turn whatever ends a run into one line and an exit code."""
    try:
        with interruptible():
            yield
    except Interrupted as signal:
        echo(f"flipguard-onnx: {signal}", err=True)
        sys.exit(signal.code)
    except BrokenPipeError:  # click's
        raise
    except (FlipguardError, MemoryError, OSError) as error:
        sys.exit(tell(error))


def tell(error: FlipguardError | MemoryError | OSError, model: Path | None = None) -> int:
    """Print what went wrong, with the model where the error does not name it; the exit code."""
    place, code = "" if model is None else f"{model}: ", 2
    if isinstance(error, FlipguardError):
        text, code = str(error if model is None else error.at(model)), exit_code(error)
    elif isinstance(error, OSError):
        place = f"{error.filename}: " if error.filename else place
        text = f"{place}{error.strerror or error}"
    else:
        text = f"{place}not enough memory for this model; nothing was written"
    echo(f"flipguard-onnx: {printable(text)}", err=True)
    return code
