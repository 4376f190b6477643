"""How far real models drift on real inputs when quantized, and how far onnxruntime's drift.

    python tools/fetch_models.py
    python -m tools.real_inputs [--models NAME...] [--schemes NAME...] [--seeds 5] [--json FILE]
    python -m tools.real_inputs --load FILE

Needs scikit-learn, matplotlib, blingfire, kaldi-native-fbank, and espeak-ng for the voice models.

Ways: plain (rounded to nearest), unbiased (draws without feedback), ours (feedback on made-up
inputs), the same with the most sensitive quarter of the 4-bit weights at int8, ours + data
(feedback on real inputs, none of those that are judged on), onnxruntime (its own quantizer of the
same format). onnxruntime's 4-bit quantizers take the weights of MatMul alone; so all are measured
on these weights alone, too ("MatMul"). Drift: relative L2 from the float model.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import onnx

import flipguard_onnx
from flipguard_onnx import UnsupportedModelError
from tools.attacks.measure import session
from tools.bench.remembered import remembered
from tools.fetch_models import path_of
from tools.real.subjects import SUBJECTS, Feed, Rows, Subject
from tools.real_models import (
    SCHEMES,
    environment,
    heading,
    markdown,
    of_opset,
    quantize,
    quantized_weights,
    silence,
)

WAYS = {
    "plain": {"policy": "none"},
    "unbiased": {"preserve": "off"},
    "ours": {"preserve": "synthetic"},
    "ours, a quarter at int8": {"preserve": "synthetic", "int8_share": 0.25},
    "ours + data": {"preserve": "data"},
}
ONNXRUNTIME = "onnxruntime"
MEMORY = 8192  # MiB: the statistics of all weights at once
OPSET = 21  # of onnxruntime's int4 form; older models are converted for it


@dataclass(frozen=True)
class Row:
    """One quantized file. weights: "all" or "MatMul". seconds: of processor time."""

    model: str
    scheme: str
    weights: str
    way: str
    seed: int
    drift: float
    scores: dict[str, float]
    seconds: float


@dataclass(frozen=True)
class Bench:
    """A model with its inputs; files go to `folder`."""

    subject: Subject
    folder: Path

    @cached_property
    def asked(self) -> list[Feed]:
        return self.subject.feeds(1)

    @cached_property
    def expected(self) -> list[Rows]:
        return self._rows(self.source)

    @cached_property
    def data(self) -> Path:
        """What "ours + data" is given."""
        path, feeds = self.folder / "data.npz", self.subject.feeds(0)
        np.savez(path, **{name: np.stack([feed[name] for feed in feeds]) for name in feeds[0]})
        return path

    @property
    def source(self) -> Path:
        return path_of(self.subject.name)

    @property
    def target(self) -> Path:
        return self.folder / "quantized.onnx"

    def guarded(self, scheme: str, include: tuple[str, ...], way: str, seed: int) -> Row:
        """One of WAYS; include: the weights, all if empty."""
        given = {"data": self.data} if way == "ours + data" else {}
        options = WAYS[way] | given | {"include": include, "seed": seed, "max_memory": MEMORY}
        started = time.process_time()
        flipguard_onnx.guard(
            self.source, scheme, output=self.target, force=True, validate=False, **options
        )
        seconds = time.process_time() - started
        return self._row(scheme, "MatMul" if include else "all", way, seed, seconds)

    def theirs(self, scheme: str, weights: str) -> Row:
        """onnxruntime's own quantizer; models too old for its int4 form are converted first."""
        copy = self.folder / "float.onnx"  # quantize_dynamic writes beside its input
        onnx.save(of_opset(self.source, OPSET if scheme == "int4" else 0), copy)
        started = time.process_time()
        with silence():
            quantize(copy, scheme, self.target)
        return self._row(scheme, weights, ONNXRUNTIME, 0, time.process_time() - started)

    def _row(self, scheme: str, weights: str, way: str, seed: int, seconds: float) -> Row:
        found = self._rows(self.target)
        drift = _drift(self.expected, found)
        scores = self.subject.scores(self.expected, found)
        return Row(self.subject.name, scheme, weights, way, seed, drift, scores, seconds)

    def _rows(self, path: Path) -> list[Rows]:
        run = session(path)
        names = [output.name for output in run.get_outputs()]
        return [
            self.subject.read(feed, dict(zip(names, run.run(None, feed), strict=True)))
            for feed in self.asked
        ]


def measure(subject: Subject, schemes: Sequence[str], seeds: int) -> Iterator[Row]:
    """Every way on one model; the first run of a way gathers its statistics."""
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(subject, Path(folder))
        with remembered():
            for scheme in schemes:
                yield from _of_scheme(bench, scheme, seeds)


def _of_scheme(bench: Bench, scheme: str, seeds: int) -> Iterator[Row]:
    everything = flipguard_onnx.inspect(bench.source, scheme).tensors
    chosen = {"all": everything}
    matmul = [tensor for tensor in everything if tensor.op == "MatMul"]
    if scheme != "int8" and matmul:
        chosen["MatMul"] = matmul
    for weights, tensors in chosen.items():
        include = tuple(tensor.name for tensor in tensors) if weights == "MatMul" else ()
        for way, options in WAYS.items():
            if "int8_share" in options and scheme == "int8":
                continue
            try:
                for seed in range(1 if way == "plain" else seeds):
                    yield bench.guarded(scheme, include, way, seed)
            except UnsupportedModelError as error:
                say(f"  {scheme}: {way}: {error}")
    try:
        found = bench.theirs(scheme, weights)
    except Exception as error:  # whatever it is: a line, and no row of the table
        say(f"  {scheme}: onnxruntime's own: {type(error).__name__}: {str(error)[:120]}")
        return
    covered = quantized_weights(onnx.load(bench.target).graph)
    ours = sum(tensor.weights for tensor in tensors)
    if covered != ours:
        say(f"  {scheme}: onnxruntime's own covers {covered:,} weights, ours {ours:,}")
    if covered:
        yield found


def _drift(expected: Sequence[Rows], found: Sequence[Rows]) -> float:
    a, b = np.concatenate(expected), np.concatenate(found)
    return float(np.linalg.norm(b - a) / np.linalg.norm(a))


def table(rows: Sequence[Row]) -> str:
    """A line per model, scheme and choice of weights, a column per way: scores, and drift."""
    ways = [*WAYS, ONNXRUNTIME]
    lines = []
    for key in dict.fromkeys((row.model, row.scheme, row.weights) for row in rows):
        of_key = [row for row in rows if (row.model, row.scheme, row.weights) == key]
        score = ", ".join(of_key[0].scores)
        cells = [_cell([row for row in of_key if row.way == way]) for way in ways]
        lines.append([*key, score, *cells])
    return markdown(["model", "scheme", "weights", "scores", *ways], lines)


def _cell(rows: Sequence[Row]) -> str:
    """Means of the scores; mean and spread of the drift."""
    if not rows:
        return "–"
    scores = [f"{np.mean([r.scores[name] for r in rows]):.2%}" for name in rows[0].scores]
    drifts = [row.drift for row in rows]
    spread = f" ± {np.std(drifts):.4f}" if len(rows) > 1 else ""
    return f"{', '.join(scores)}; {np.mean(drifts):.4f}{spread}"


def times(rows: Sequence[Row]) -> str:
    """Processor seconds of the first run of every way on a model, statistics included."""
    ways = [*WAYS, ONNXRUNTIME]
    lines = []
    for model in dict.fromkeys(row.model for row in rows):
        first = [next((r for r in rows if (r.model, r.way) == (model, way)), None) for way in ways]
        lines.append([model, *(f"{row.seconds:.1f}" if row else "–" for row in first)])
    return markdown(["processor seconds", *ways], lines)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(given: Sequence[str] | None = None) -> int:
    known = {subject.name: subject for subject in SUBJECTS}
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=list(known), choices=known, metavar="NAME")
    parser.add_argument("--schemes", nargs="+", default=SCHEMES, choices=SCHEMES)
    parser.add_argument("--seeds", type=int, default=5, help="draws of what is random (default 5)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--load", nargs="+", type=Path, metavar="FILE", help="of earlier runs")
    options = parser.parse_args(given)
    rows: list[Row] = []
    facts = environment("tools.real_inputs")
    for file in options.load or ():
        facts = json.loads(file.read_text())
        rows += [Row(**stored) for stored in facts.pop("rows")]
    for name in () if options.load else options.models:
        say(name)
        for row in measure(known[name], options.schemes, options.seeds):
            say(f"  {row.scheme} {row.weights} {row.way} {row.seed}: {_cell([row])}")
            rows.append(row)
            if options.json:
                stored = facts | {"rows": [asdict(row) for row in rows]}
                options.json.write_text(json.dumps(stored, indent=1) + "\n")
    print(heading(facts), table(rows), times(rows), sep="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
