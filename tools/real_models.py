"""Guard every real model in every scheme, beside onnxruntime's own quantizer: a Markdown table.

    python tools/fetch_models.py
    python -m tools.real_models [--models NAME...] [--schemes NAME...] [--seed 1] [--json FILE]

Drift is the relative L2 distance of all outputs from those of the float model, on made-up inputs.
"""

import argparse
import json
import logging
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from importlib.metadata import version
from io import StringIO
from math import prod
from pathlib import Path

import onnx
import onnxruntime
from onnx import version_converter
from onnxruntime.quantization import QuantFormat, QuantType, quantize_dynamic
from onnxruntime.quantization.matmul_bnb4_quantizer import MatMulBnb4Quantizer
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

import flipguard_onnx
from flipguard_onnx.calibration.samples import Samples
from flipguard_onnx.graph.traversal import subgraphs
from flipguard_onnx.io.model import open_model
from flipguard_onnx.reports.guard import GuardReport, Inspection
from flipguard_onnx.reports.validation import pooled
from flipguard_onnx.validation.validator import ModelRunner
from tools.fetch_models import RealModel, path_of, select

SCHEMES = ("int8", "int4", "nf4", "fp4")
PACKAGES = ("flipguard-onnx", "onnx", "onnxruntime", "numpy", "numba")
CODES = (
    onnx.TensorProto.INT8,
    onnx.TensorProto.UINT8,
    onnx.TensorProto.INT4,
    onnx.TensorProto.UINT4,
)
# where operators of quantized graphs read their codes
CODE_INPUTS = {
    "DequantizeLinear": (0,),
    "MatMulInteger": (0, 1),
    "ConvInteger": (1,),
    "DynamicQuantizeLSTM": (1, 2),
    "Gather": (0,),
    "MatMulNBits": (1,),
    "MatMulBnb4": (1,),
    "GatherBlockQuantized": (0,),
}
PASSED_ON = ("Identity", "Transpose", "Reshape", "Squeeze", "Unsqueeze")
PROBLEMS = ("does not load", "does not run", "holds NaN", "has shape")


@dataclass(frozen=True)
class Ours:
    """What guard() did. Shares are of all float weights; in_scheme leaves out the int8 fallback."""

    coverage: float
    in_scheme: float
    flipped: float
    size: float
    drift_plain: float
    drift_guarded: float
    seconds: float


@dataclass(frozen=True)
class Theirs:
    """What onnxruntime's quantizer did; None where it got nowhere, for the reason in `problem`."""

    coverage: float | None = None
    size: float | None = None
    drift: float | None = None
    problem: str = ""


@dataclass(frozen=True)
class Cell:
    """One model in one scheme. `error`: why guard() wrote nothing."""

    model: str
    scheme: str
    ours: Ours | None
    error: str
    theirs: Theirs


@dataclass(frozen=True)
class Refusal:
    """What the command line says to a model that is quantized already."""

    model: str
    exit_code: int
    message: str


def guarded(source: Path, scheme: str, seed: int, folder: Path) -> tuple[GuardReport | None, str]:
    """The report of guard(), or the error."""
    output = folder / f"guarded-{scheme}.onnx"
    try:
        return flipguard_onnx.guard(source, scheme, seed=seed, output=output), ""
    except Exception as error:  # a row of the table, whatever it is
        return None, f"{type(error).__name__}: {error}"


def ours(report: GuardReport, scheme: str) -> Ours:
    tried = report.validation
    assert tried is not None
    total = all_weights(report)
    return Ours(
        coverage=report.coverage,
        in_scheme=sum(t.weights for t in report.tensors if t.scheme == scheme) / total,
        flipped=report.flips / report.weights,
        size=sum(report.outputs.values()) / report.input_bytes,
        drift_plain=pooled(tried.plain_default),
        drift_guarded=pooled(tried.guarded_default),
        seconds=report.seconds,
    )


def all_weights(found: GuardReport | Inspection) -> int:
    """How many constant float values the model has."""
    return sum(t.weights for t in found.tensors) + sum(t.size for t in found.skipped)


def theirs(source: Path, scheme: str, runner: ModelRunner, total: int, folder: Path) -> Theirs:
    """onnxruntime's quantizer on the same file; whatever it raises is the result."""
    output = folder / f"onnxruntime-{scheme}.onnx"
    try:
        with silence():
            quantize(source, scheme, output)
    except Exception as error:
        return Theirs(problem=f"quantizer raises {type(error).__name__}")
    coverage = quantized_weights(onnx.load(output).graph) / total
    size = output.stat().st_size / source.stat().st_size
    nothing = "" if coverage else "nothing quantized"
    try:
        drift = pooled(runner.drift(output, exact=False))
    except flipguard_onnx.ValidationError as error:
        say(f"    {str(error)[:200]}")
        return Theirs(coverage, size, None, "; ".join(filter(None, (nothing, problem(error)))))
    return Theirs(coverage, size, drift, nothing)


def problem(error: Exception) -> str:
    """A few words for a result that onnxruntime itself does not accept."""
    return "output " + next((words for words in PROBLEMS if words in str(error)), "is no match")


def of_opset(path: Path, least: int) -> onnx.ModelProto:
    """A model, converted where its opset is older than `least`, which a quantizer may need."""
    model = onnx.load(path)
    if max(entry.version for entry in model.opset_import if not entry.domain) < least:
        model = version_converter.convert_version(model, least)
    return model


def quantize(source: Path, scheme: str, output: Path) -> None:
    """onnxruntime's own quantizer of the same format."""
    if scheme == "int8":
        quantize_dynamic(source, output, per_channel=True, weight_type=QuantType.QInt8)
        return
    if scheme == "int4":
        quantizer = MatMulNBitsQuantizer(
            onnx.load(source), block_size=32, is_symmetric=True, quant_format=QuantFormat.QDQ
        )
    else:
        kind = MatMulBnb4Quantizer.NF4 if scheme == "nf4" else MatMulBnb4Quantizer.FP4
        quantizer = MatMulBnb4Quantizer(onnx.load(source), kind, 64)
    quantizer.process()
    quantizer.model.save_model_to_file(str(output))


@contextmanager
def silence() -> Iterator[None]:
    """No log lines and no prints."""
    logging.disable(logging.CRITICAL)
    try:
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            yield
    finally:
        logging.disable(logging.NOTSET)


def quantized_weights(graph: onnx.GraphProto) -> int:
    """How many weights an operator of a quantized graph reads as integer codes."""
    return sum(_read_codes(graph, {}, "").values())


def _read_codes(
    graph: onnx.GraphProto, outer: dict[str, tuple[str, int]], path: str
) -> dict[str, int]:
    """Number of weights by tensor. `outer`: constants of the graphs around this one."""
    known = dict(outer)
    known.update((t.name, (f"{path}/{t.name}", prod(t.dims))) for t in _codes(graph))
    found: dict[str, int] = {}
    for number, node in enumerate(graph.node):
        if node.op_type in PASSED_ON and node.input[0] in known:
            known[node.output[0]] = known[node.input[0]]
        for index in CODE_INPUTS.get(node.op_type, ()):
            if node.input[index] in known:
                key, size = known[node.input[index]]
                found[key] = _unpacked(node) or size
        for attr in node.attribute:
            for inner, body in enumerate(subgraphs(attr)):
                found |= _read_codes(body, known, f"{path}/{number}.{attr.name}.{inner}")
    return found


def _codes(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Initializers and Constant nodes of integer types that hold codes, named by what they are."""
    yield from (tensor for tensor in graph.initializer if tensor.data_type in CODES)
    for node in graph.node:
        for attr in node.attribute:
            if node.op_type == "Constant" and attr.name == "value" and attr.t.data_type in CODES:
                yield onnx.TensorProto(dims=attr.t.dims, name=node.output[0])


def _unpacked(node: onnx.NodeProto) -> int:
    """Weights behind a packed operand, 0 for operators that do not pack."""
    sizes = {a.name: a.i for a in node.attribute if a.name in ("K", "N")}
    return prod(sizes.values()) if node.op_type in ("MatMulNBits", "MatMulBnb4") else 0


def measure(model: RealModel, schemes: Sequence[str], seed: int) -> Iterator[Cell]:
    """All schemes on one model; nothing is written beside it."""
    source = open_model(path_of(model.name))
    runner = ModelRunner(Samples(source, None))
    for scheme in schemes:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            copy = folder / "model.onnx"  # quantize_dynamic writes beside its input
            copy.write_bytes(source.path.read_bytes())
            report, error = guarded(copy, scheme, seed, folder)
            total = all_weights(report or flipguard_onnx.inspect(copy, scheme))
            other = theirs(copy, scheme, runner, total, folder)
            mine = ours(report, scheme) if report else None
            yield Cell(model.name, scheme, mine, error.replace(str(copy), "model"), other)


def refusal(model: RealModel) -> Refusal:
    """Run the command line on a model as a user would."""
    path = path_of(model.name)
    with tempfile.TemporaryDirectory() as temporary:
        command = [sys.executable, "-m", "flipguard_onnx", path.name, "-o", f"{temporary}/out.onnx"]
        done = subprocess.run(command, cwd=path.parent, capture_output=True, text=True)
    return Refusal(model.name, done.returncode, done.stderr.strip().replace("\n", " "))


def environment(module: str) -> dict[str, object]:
    """What a reader needs in order to compare; module: the one that was run."""
    versions = {name: version(name) for name in PACKAGES}
    return {
        "command": shlex.join(["python", "-m", module, *sys.argv[1:]]),
        "versions": versions | {"python": platform.python_version()},
        "machine": f"{os.cpu_count()} cores, {cpu()}",
    }


def cpu() -> str:
    """Name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.machine())


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cells_table(cells: Sequence[Cell]) -> str:
    head = (
        "model",
        "scheme",
        "coverage",
        "flipped",
        "size",
        "drift plain",
        "drift guarded",
        "seconds",
        "onnxruntime's: coverage",
        "size",
        "drift",
    )
    return markdown(head, ([c.model, c.scheme, *our_columns(c), *their_columns(c)] for c in cells))


def percent(share: float) -> str:
    return "<0.1%" if 0 < share < 0.001 else f"{share:.1%}"


def our_columns(cell: Cell) -> list[str]:
    if cell.ours is None:
        return [f"**{cell.error}**", *["–"] * 5]
    mine = cell.ours
    coverage = percent(mine.coverage)
    if mine.in_scheme < mine.coverage:
        coverage += f" ({percent(mine.in_scheme)} at 4 bits)"
    return [
        coverage,
        f"{mine.flipped:.1%}",
        f"{mine.size:.1%}",
        f"{mine.drift_plain:.4f}",
        f"{mine.drift_guarded:.4f}",
        f"{mine.seconds:.1f}",
    ]


def their_columns(cell: Cell) -> list[str]:
    other = cell.theirs
    if other.problem:
        return [other.problem, "–", "–"]
    return [percent(other.coverage or 0), f"{other.size:.1%}", f"{other.drift:.4f}"]


def refusals_table(refusals: Sequence[Refusal]) -> str:
    rows = ([r.model, str(r.exit_code), r.message] for r in refusals)
    return markdown(("already quantized", "exit code", "message"), rows)


def heading(facts: dict[str, object]) -> str:
    versions = facts["versions"]
    assert isinstance(versions, dict)
    named = ", ".join(f"{name} {number}" for name, number in versions.items())
    return f"`{facts['command']}` with {named}, on {facts['machine']}."


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", default=[], metavar="NAME")
    parser.add_argument("--schemes", nargs="+", default=SCHEMES, choices=SCHEMES)
    parser.add_argument("--seed", type=int, default=1, help="of the draws")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here too")
    return parser.parse_args()


def main() -> int:
    options = arguments()
    models = select(options.models)
    if missing := [model.name for model in models if not path_of(model.name).exists()]:
        sys.exit(f"not downloaded: {', '.join(missing)}; tools/fetch_models.py does that")
    onnxruntime.set_default_logger_severity(4)
    cells: list[Cell] = []
    refusals: list[Refusal] = []
    for number, model in enumerate(models, 1):
        say(f"{number}/{len(models)} {model.name}")
        if model.prequantized:
            refusals.append(refusal(model))
            continue
        for cell in measure(model, options.schemes, options.seed):
            say(f"  {cell.scheme}: {' '.join(our_columns(cell) + their_columns(cell))}")
            cells.append(cell)
    facts = environment("tools.real_models")
    print(heading(facts))
    if cells:
        print(f"\n{cells_table(cells)}")
    if refusals:
        print(f"\n{refusals_table(refusals)}")
    if options.json:
        results = {"cells": [asdict(c) for c in cells], "refusals": [asdict(r) for r in refusals]}
        options.json.write_text(json.dumps(facts | results, indent=2) + "\n")
    failed = any(c.ours is None for c in cells) or any(r.exit_code != 2 for r in refusals)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
