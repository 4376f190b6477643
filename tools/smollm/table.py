"""The rows of all attacked files as one Markdown table. No torch.

    python -m tools.smollm.table [FOLDER]

FOLDER: the work folder of `python -m tools.smollm`; by default the rows in the repository.
"""

import json
import sys
from itertools import groupby
from pathlib import Path
from statistics import mean

from tools.bench.rows import wilson

ROWS = Path(__file__).parent / "rows"
KEY = "scenario", "export", "scheme", "defence"
HEAD = (
    "scenario", "file", "quantized as", "defence", "draws", "attack", "worst draw", "perplexity",
    "next", "choice", "modified", "DER",
)  # fmt: skip


def markdown(rows):
    """A line for each defence of each file, in the rows' order; draws with other seeds are one."""
    lines = [f"| {' | '.join(HEAD)} |", "|" + "---|" * len(HEAD)]
    for key, group in groupby(rows, lambda row: tuple(row[name] for name in KEY)):
        lines.append(f"| {' | '.join((*key, *cells(list(group))))} |")
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
    folder = Path(sys.argv[1]) if sys.argv[1:] else ROWS
    rows = []
    for file in sorted(folder.glob("*/*/rows.json")):
        rows += sorted(json.loads(file.read_text()), key=lambda row: row["scheme"])
    print(markdown(rows))


if __name__ == "__main__":
    main()
