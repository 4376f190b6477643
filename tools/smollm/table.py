"""The rows of all attacked files as Markdown tables: a summary, and all of them. No torch.

    python -m tools.smollm.table [FOLDER]

FOLDER: the work folder of `python -m tools.smollm`; by default the rows in the repository.
"""

import argparse
import json
from collections import defaultdict
from itertools import product
from pathlib import Path
from statistics import mean

from tools.bench.rows import wilson
from tools.smollm.scenarios import SCENARIOS

ROWS = Path(__file__).parent / "rows"
SCHEMES = "int8", "int4", "nf4", "fp4"
KEY = "scenario", "export", "scheme", "defence"
HEAD = (
    "scenario", "file", "quantized as", "defence", "draws", "attack", "worst draw", "perplexity",
    "next", "choice", "modified", "DER",
)  # fmt: skip


SUMMARY = (
    "scenario", "scheme", "float", "onnxruntime", "`topk`", "`ours`", "ratio of `topk`",
    "published: undefended → defended",
)  # fmt: skip
PUBLISHED = {  # arXiv 2606.28962; of code it has the share of secure completions
    ("injection", "nf4"): "Phi-2: 92.9% → 0.1%",
    ("refusal", "nf4"): "Phi-2: 30.2% → 0.53%",
    ("code", "int8"): "StarCoderBase-3B: 93.0% → 1.3%",
}


def summary(rows):
    """The attack of the paper, a line for each scenario and scheme: attack and perplexity.

    The ratio of `topk` is its best in hindsight: the least attack, then the least perplexity.
    """
    lines = [f"| {' | '.join(SUMMARY)} |", "|" + "---|" * len(SUMMARY)]
    for scenario, scheme in product(SCENARIOS, SCHEMES):
        draws = defaultdict(list)
        for row in rows:
            if (row["scenario"], row["export"].removesuffix("-from-clean")) == (scenario, scheme):
                draws[row["defence"]].append((row["attack"], row["perplexity"]))
        if not draws:
            continue
        found = {name: tuple(map(mean, zip(*some, strict=True))) for name, some in draws.items()}
        best = min((name for name in found if name.startswith("topk")), key=found.get)
        shown = (
            f"{attack:.1%}, {perplexity:.1f}"
            for attack, perplexity in map(found.get, ("float", "onnxruntime", best, "ours"))
        )
        ratio, published = best.removeprefix("topk-"), PUBLISHED.get((scenario, scheme), "")
        lines.append(f"| {' | '.join((scenario, scheme, *shown, f'{ratio}%', published))} |")
    return "\n".join(lines)


def markdown(rows):
    """A line for each defence of each file, in the rows' order; draws with other seeds are one."""
    lines = [f"| {' | '.join(HEAD)} |", "|" + "---|" * len(HEAD)]
    draws = defaultdict(list)
    for row in rows:
        draws[tuple(row[name] for name in KEY)].append(row)
    lines += (f"| {' | '.join((*key, *cells(found)))} |" for key, found in draws.items())
    return "\n".join(lines)


def cells(draws):
    """The figures of one defence: the worst draw has Wilson's interval of 95 %."""
    worst = max(draws, key=lambda row: row["attack"])
    low, high = wilson(worst["attack"], worst["asked"])
    return (
        str(len(draws)),
        f"{mean(row['attack'] for row in draws):.3f}",
        f"{worst['attack']:.3f} ({low:.3f} to {high:.3f})",
        f"{mean(row['perplexity'] for row in draws):.2f}",
        f"{mean(row['next'] for row in draws):.3f}",
        f"{mean(row['choice'] for row in draws):.2f}",
        f"{mean(row['modified'] for row in draws):.1%}",
        f"{mean(row['der'] for row in draws):.3f}",
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, nargs="?", default=ROWS)
    folder, rows = parser.parse_args().folder, []
    for file in sorted(folder.glob("*/*/rows.json")):
        rows += sorted(json.loads(file.read_text()), key=lambda row: row["scheme"])
    if not rows:
        parser.error(f"{folder}: no SCENARIO/FILE/rows.json")
    print(summary(rows), markdown(rows), sep="\n\n")


if __name__ == "__main__":
    main()
