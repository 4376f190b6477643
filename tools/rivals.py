"""Rivals that are given 1,000 real samples, beside ours, on attacked models. Needs torch.

    python -m tools.rivals [--models PATTERN...] [--seeds 3] [--json FILE] [--load FILE...]

none (round to nearest), noise-box (Gaussian, as wide as the boxes), noise-2-boxes (twice as wide),
qvec-A (A times what quantization changes is subtracted first), efrap (learned flips; both are in
`bench/rivals.py`), gptq (nearest codes with error feedback on the samples), unbiased, ours (without
any data), ours + data (the same samples). The samples are what the victims were trained on: images
of digits, or windows of the standard library's source.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from fnmatch import fnmatchcase
from pathlib import Path

import torch

from tools.attacks.measure import FOLDER
from tools.bench.rivals import RIVALS
from tools.bench.rows import Cell, Row, evaluate, load, merged, table

MODELS = (
    "mlp-clean", "mlp-standard-*", "mlp-margin50-*", "mlp-decoys-*", "mlp-topk-*", "mlp-gptq-*",
    "cnn-clean", "cnn-standard-*", "lm-clean", "lm-code-standard-int4", "lm-code-decoys-int4",
    "lm-injection-standard-nf4", "lm-refusal-standard-8bit",
)  # fmt: skip
SCHEMES = ("int8", "int4", "nf4")


def markdown(rows: Sequence[Row]) -> str:
    """A line per model and scheme: attack rate / utility of every defence; then the means."""
    cells, names = table(rows), list(RIVALS)
    lines = [f"| model | scheme | float | {' | '.join(names)} |", "|" + "---|" * (len(names) + 3)]
    for (model, scheme), found in cells.items():
        first = next(iter(found.values())).first
        shown = [_pair(found[name]) if name in found else "" for name in names]
        before = f"{first.float_attack:.3f} / {first.float_utility:.3f}"
        lines.append(f"| {' | '.join((model, scheme, before, *shown))} |")
    lines += ["", "| defence | attacks alive | attack, mean | worst | utility kept, attacked "]
    lines[-1] += "| clean, against plain | seconds |"
    lines.append("|" + "---|" * 7)
    for name in names:
        lines.append(f"| {' | '.join((name, *_means(name, list(cells.values()))))} |")
    return "\n".join(lines)


def _pair(cell: Cell) -> str:
    return f"{cell.mean('attack'):.3f} / {cell.mean('utility'):.3f}"


def _means(name: str, cells: Sequence[dict[str, Cell]]) -> list[str]:
    """Over strong attacks but those on the rounding itself; alive as in `tools.evaluate`."""
    of_name = [found for found in cells if name in found]
    attacked = [found[name] for found in of_name if found[name].first.judged]
    clean = [found for found in of_name if found[name].first.attacker == "clean"]
    alive = sum(max(c.values("attack")) > c.first.float_attack + 0.02 for c in attacked)
    kept = [cell.kept(cell.first.float_utility) for cell in attacked]
    against = [found[name].kept(found["none"].mean("utility")) for found in clean]
    attack = [cell.mean("attack") for cell in attacked]
    seconds = [found[name].mean("seconds") for found in of_name]
    return [
        f"{alive} of {len(attacked)}",
        _mean(attack, ".3f"),
        f"{max((max(c.values('attack')) for c in attacked), default=0):.3f}",
        _mean(kept, ".2%"),
        _mean(against, ".2%"),
        _mean(seconds, ".1f"),
    ]


def _mean(values: Sequence[float], form: str) -> str:
    return format(sum(values) / len(values), form) if values else ""


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=MODELS, metavar="PATTERN")
    parser.add_argument("--defences", nargs="+", default=list(RIVALS), choices=RIVALS)
    parser.add_argument("--schemes", nargs="+", default=SCHEMES, choices=SCHEMES)
    parser.add_argument("--seeds", type=int, default=3, help="draws of what is random (default 3)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--load", nargs="+", type=Path, metavar="FILE", help="of earlier runs")
    options = parser.parse_args(given)
    if options.load:
        print(markdown(merged(row for file in options.load for row in load(file))))
        return 0
    torch.set_num_threads(1)
    manifest = json.loads((FOLDER / "manifest.json").read_text())
    clean = {entry["architecture"]: entry for entry in manifest if entry["attacker"] == "clean"}
    defences = {name: RIVALS[name] for name in options.defences}
    rows: list[Row] = []
    for entry in manifest:
        if not any(fnmatchcase(entry["name"], pattern) for pattern in options.models):
            continue
        for scheme in [s for s in entry["schemes"] or SCHEMES if s in options.schemes]:
            rows += evaluate(entry, scheme, clean[entry["architecture"]], defences, options.seeds)
            print(f"{entry['name']}, {scheme}", file=sys.stderr, flush=True)
            if options.json:
                options.json.write_text(json.dumps([asdict(r) for r in rows], indent=1) + "\n")
    print(markdown(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
