"""Markdown of the bench."""

from collections.abc import Sequence

import numpy as np

from tools.bench.defences import OURS
from tools.bench.rows import Cell, Row, Table, best_topk, table

COLUMNS = ("none", "topk", "feedback-nearest", "unbiased", OURS)
HEADER = (
    "Attack rate / utility (accuracy, or perplexity of the `lm` models) / DER. Mean over the "
    "seeds, in brackets the smallest and the largest. Best topk: the ratio with the largest DER, "
    "chosen with hindsight. Ceiling: the DER of the float model at the price of an unbiased draw "
    "between neighbouring levels. Worst: the largest attack rate of a single draw, with Wilson's "
    "95 % interval over its prompts or images."
)


def markdown(rows: Sequence[Row]) -> str:
    """A summary, one line per model and scheme, the means by scheme, then every defence in full."""
    cells = table(rows)
    parts = [HEADER, "", *summary(cells), "", *overview(cells), "", *full(cells), ""]
    return "\n".join(parts)


def summary(cells: Table) -> list[str]:
    lines = [
        "| model | scheme | float | plain | best topk | feedback-nearest | unbiased | ours "
        "| ceiling |",
        "|" + "---|" * 9,
    ]
    for (model, scheme), defences in cells.items():
        first = _first(defences)
        weak = first.attacker != "clean" and not first.strong
        shown = [
            f"{model}{' (not strong)' if weak else ''}",
            scheme,
            f"{first.float_attack:.3f} / {first.float_utility:.3f}",
        ]
        for name in COLUMNS:
            cell = best_topk(defences) if name == "topk" else defences.get(name)
            ratio = (
                f"{cell.first.defence.removeprefix('topk-')} %: " if cell and name == "topk" else ""
            )
            shown.append(ratio + _short(cell) if cell else "")
        shown.append(f"{first.ceiling:.3f}")
        lines.append(f"| {' | '.join(shown)} |")
    return lines


def overview(cells: Table) -> list[str]:
    """Every defence over all judged attacks of a scheme, and over the clean models.

    Utility as a share of the float model's (attacked) or of plain quantization's (clean).
    """
    lines = [
        "| scheme | defence | attacks alive | attack, mean | worst | utility kept, attacked "
        "| clean, against plain | modified | DER | DER, lambda 0 |",
        "|" + "---|" * 10,
    ]
    for scheme in dict.fromkeys(scheme for _, scheme in cells):
        of_scheme = [defences for (_, s), defences in cells.items() if s == scheme]
        for name in dict.fromkeys(name for defences in of_scheme for name in defences):
            found = [defences[name] for defences in of_scheme if name in defences]
            attacked = [cell for cell in found if cell.first.judged]
            clean = [
                defences[name].kept(defences["none"].mean("utility"))
                for defences in of_scheme
                if name in defences
                and "none" in defences
                and defences[name].first.attacker == "clean"
            ]
            if not attacked:
                continue
            alive = sum(
                max(cell.values("attack")) > cell.first.float_attack + 0.02 for cell in attacked
            )
            rows = [row for cell in attacked for row in cell.rows]
            kept = [cell.kept(cell.first.float_utility) for cell in attacked]
            shown = (
                scheme,
                name,
                f"{alive} of {len(attacked)}",
                f"{np.mean([row.attack for row in rows]):.3f}",
                _worst(rows),
                f"{np.mean(kept):.2%}",
                f"{np.mean(clean):.2%}" if clean else "",
                f"{np.mean([row.modified for row in rows]):.1%}",
                f"{np.mean([row.der for row in rows]):.3f}",
                f"{np.mean([row.bare for row in rows]):.3f}",
            )
            lines.append(f"| {' | '.join(shown)} |")
    return lines


def full(cells: Table) -> list[str]:
    lines = [
        "| model | scheme | defence | attack | utility | safe | modified | seconds | DER "
        "| DER, lambda 0 |",
        "|" + "---|" * 10,
    ]
    for (model, scheme), defences in cells.items():
        for name, cell in defences.items():
            shown = (
                model,
                scheme,
                name,
                _spread(cell.values("attack")),
                _spread(cell.values("utility")),
                "" if cell.first.safe is None else _spread(cell.values("safe")),
                f"{cell.mean('modified'):.2%}",
                f"{cell.mean('seconds'):.2f}",
                _spread(cell.values("der")),
                _spread(cell.values("bare")),
            )
            lines.append(f"| {' | '.join(shown)} |")
    return lines


def remedies(cells: Table) -> list[str]:
    """What moves the attacks on rounding itself: a line per remedy, a column per model."""
    names = dict.fromkeys(name for defences in cells.values() for name in defences)
    heads = []
    for (model, _), defences in cells.items():
        first = _first(defences)
        heads.append(f"{model} (float {first.float_attack:.3f} / {first.float_utility:.3f})")
    lines = [f"| remedy | {' | '.join(heads)} |", "|" + "---|" * (len(heads) + 1)]
    for name in names:
        shown = [
            _short(d[name], ("attack", "utility")) if name in d else "" for d in cells.values()
        ]
        lines.append(f"| {name} | {' | '.join(shown)} |")
    return lines


def _worst(rows: Sequence[Row]) -> str:
    worst = max(rows, key=lambda row: row.attack)
    low, high = worst.interval
    return f"{worst.attack:.3f} ({low:.3f}-{high:.3f})"


def _first(defences: dict[str, Cell]) -> Row:
    return next(iter(defences.values())).first


def _short(cell: Cell, kinds: Sequence[str] = ("attack", "utility", "der")) -> str:
    return " / ".join(_spread(cell.values(kind)) for kind in kinds)


def _spread(values: Sequence[float]) -> str:
    mean, low, high = np.mean(values), min(values), max(values)
    if f"{low:.3f}" == f"{high:.3f}":
        return f"{mean:.3f}"
    return f"{mean:.3f} [{low:.3f}, {high:.3f}]"
