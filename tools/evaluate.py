"""Judge flipguard-onnx and its rivals on the attacked models, and on the clean ones.

    python -m tools.evaluate --json rows.json --markdown table.md --plot plot.png --jobs 2
    python -m tools.evaluate --check
    python -m tools.evaluate --models 'mlp-*' --defences none 'topk-*' ours --seeds 2
    python -m tools.evaluate --load rows.json --check
    python -m tools.evaluate --remedies
    python -m tools.evaluate --outliers --seeds 3
    python -m tools.evaluate --grids mlp-standard-blocks --seeds 3

Every model of models/attacks/manifest.json is guarded for the scheme it was made for (a clean one
for all schemes) by every defence; the quantized file runs in onnxruntime as it comes. No torch.

Defences: none (round to nearest); topk-K (the paper's, K per cent); noise-S (Gaussian of standard
deviation S on every weight that is quantized, then round to nearest; noise-box: S = the median
half-width of the boxes, noise-2-boxes: twice that); random-flips (as many as `unbiased` makes with
the same seed, per tensor, chosen uniformly); unbiased-T (tau T) and unbiased (tau 1), both without
error feedback; feedback-nearest (error feedback, every code the nearest); ours: guard() with its
defaults; ours-share: with --int8-share 0.25 at 4 bits.

Attack rate and utility (accuracy, or the perplexity of a language model per character): see
models/attacks/README.md.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from fnmatch import fnmatchcase
from functools import partial
from multiprocessing import get_context
from pathlib import Path

from tools.attacks import quantizers
from tools.attacks.measure import FOLDER
from tools.bench import judge, tables
from tools.bench.defences import DEFENCES, OURS, REMEDIES, SCHEMES
from tools.bench.rows import Row, evaluate, load, merged, table

Task = tuple[dict, str, dict]  # entry, scheme, entry of its clean model
CHECKED = ("none", "topk-*", OURS)  # what --check needs


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", metavar="PATTERN")
    parser.add_argument("--defences", nargs="+", metavar="PATTERN", help=", ".join(DEFENCES))
    parser.add_argument("--seeds", type=int, default=5, help="draws of what is random (default 5)")
    parser.add_argument("--jobs", type=int, default=1, help="processes (default 1)")
    parser.add_argument("--load", nargs="+", type=Path, metavar="FILE", help="rows of earlier runs")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="needs matplotlib")
    parser.add_argument(
        "--histogram",
        nargs=4,
        metavar=("CLEAN", "ATTACKED", "SCHEME", "FILE"),
        help="only plot where the weights of two models stand; needs matplotlib",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="fail unless the defaults hold; by default only the defences that this needs",
    )
    parser.add_argument(
        "--remedies",
        action="store_true",
        help="what helps at 4 bits against attacks on rounding itself (by default mlp-rounding-*)",
    )
    parser.add_argument(
        "--outliers",
        action="store_true",
        help="only outliers of growing size, at every scheme: scan, exit codes, rates",
    )
    parser.add_argument(
        "--grids",
        nargs="+",
        metavar="MODEL",
        help="only these models on every grid of the scan, rounded to nearest and guarded",
    )
    options = parser.parse_args(arguments)
    if options.grids:
        from tools.bench import grids

        for line in grids.lines(options.grids, options.seeds):
            print(line, flush=True)
        return 0
    if options.outliers:
        from tools.bench.outliers import lines

        for line in lines(options.seeds):
            print(line, flush=True)
        return 0
    if options.histogram:
        from tools.bench.plots import histogram

        *which, file = options.histogram
        histogram(*which, Path(file))
        return 0
    if options.load:
        rows = [
            row
            for row in merged(row for file in options.load for row in load(file))
            if any(fnmatchcase(row.model, p) for p in options.models or ["*"])
            and any(fnmatchcase(row.defence, p) for p in options.defences or ["*"])
        ]
    else:
        known = REMEDIES if options.remedies else DEFENCES
        wanted = list(options.defences or (CHECKED if options.check else ["*"]))
        if options.check:
            wanted += CHECKED
        defences = [name for name in known if any(fnmatchcase(name, p) for p in wanted)]
        models = options.models or (["*-rounding-*"] if options.remedies else ["*"])
        tasks = _tasks(models, bits=4 if options.remedies else None)
        if not tasks or not defences or min(options.seeds, options.jobs) < 1:
            parser.error("nothing to do: no model, no defence, no seed or no job")
        rows = _run(tasks, defences, options)
    if options.plot:
        from tools.bench.plots import scatter

        scatter(rows, options.plot)
    if options.check:
        return report_check(rows)
    text = "\n".join(tables.remedies(table(rows))) if options.remedies else tables.markdown(rows)
    if options.markdown:
        options.markdown.write_text(text + "\n")
    print(text)
    return 0


def _tasks(models: Sequence[str], bits: int | None) -> list[Task]:
    """Every model with every scheme that it is judged under: those that guard() has."""
    manifest = json.loads((FOLDER / "manifest.json").read_text())
    clean = {e["architecture"]: e for e in manifest if e["attacker"] == "clean"}
    return [
        (entry, scheme, clean[entry["architecture"]])
        for entry in manifest
        if any(fnmatchcase(entry["name"], pattern) for pattern in models)
        for scheme in entry["schemes"] or SCHEMES
        if scheme in SCHEMES and bits in (None, quantizers.SCHEMES[scheme].bits)
    ]


def _run(tasks: list[Task], defences: list[str], options: argparse.Namespace) -> list[Row]:
    """The rows of every task, in their order."""
    work = partial(_task, defences=defences, seeds=options.seeds, remedies=options.remedies)
    done: dict[int, list[Row]] = {}
    rows: list[Row] = []
    started = time.perf_counter()
    for place, found in _results(work, tasks, options.jobs):
        done[place] = found
        entry, scheme, _ = tasks[place]
        passed = f"{time.perf_counter() - started:5.0f} s, {len(done)} of {len(tasks)}"
        print(f"{passed}: {entry['name']}, {scheme}", file=sys.stderr)
        rows = [row for place in sorted(done) for row in done[place]]
        if options.json:  # after every task: a long run that is stopped leaves what it has
            options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    return rows


def _results(
    work: Callable[[Task], list[Row]], tasks: list[Task], jobs: int
) -> Iterator[tuple[int, list[Row]]]:
    if jobs == 1:
        yield from enumerate(map(work, tasks))
        return
    os.environ["NUMBA_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        futures = {pool.submit(work, task): place for place, task in enumerate(tasks)}
        for future in as_completed(futures):
            yield futures[future], future.result()


def _task(task: Task, defences: list[str], seeds: int, remedies: bool) -> list[Row]:
    known = REMEDIES if remedies else DEFENCES
    return evaluate(*task, {name: known[name] for name in defences}, seeds)


def report_check(rows: Sequence[Row]) -> int:
    """Print what does not hold, and what could be better; the exit code."""
    cells = table(rows)
    failed, short = judge.failures(cells), judge.shortfalls(cells)
    ours = [row for row in rows if row.defence == OURS]
    aside = sorted({row.model for row in ours if row.attacker != "clean" and not row.judged})
    print(*failed, sep="\n")
    print(f"{len(ours)} guarded files, {len(failed)} failures")
    print(f"not judged, since not strong or out of scope: {', '.join(aside) or 'none'}")
    print(judge.outdone(cells))
    print(f"{len(short)} shortfalls:")
    print(*short, sep="\n")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
