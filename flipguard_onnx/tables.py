"""Pieces of text reports."""

from collections import defaultdict
from collections.abc import Iterable, Sequence

from .errors import printable
from .weights import Skipped

CELL = 120  # characters of a name in a table


def text(lines: Iterable[str]) -> str:
    """Lines for a terminal, whatever the names in them are."""
    return "\n".join(printable(line) for line in lines).rstrip()


def table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 2) -> list[str]:
    """Left-aligned text in the first `left` columns, right-aligned figures after them."""
    rows = [[printable(cell, CELL) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    return [
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (head, *rows)
    ]


def config_line(config: str | None) -> list[str]:
    """Which file gave options, if one did."""
    return [f"config    {config}"] if config else []


def megabytes(size: int) -> str:
    return f"{size / 1e6:.2f} MB"


def skipped_lines(skipped: Sequence[Skipped], names: bool = False) -> list[str]:
    """A line per reason; with `names`, a line per tensor below it, 1-D ones and scalars aside."""
    reasons: dict[str, list[Skipped]] = defaultdict(list)
    for tensor in skipped:
        reasons[tensor.reason].append(tensor)
    lines = []
    for reason, members in sorted(reasons.items(), key=lambda item: -len(item[1])):
        size = sum(t.size for t in members)
        lines.append(f"skipped   {len(members)} tensors, {size:,} values: {reason}")
        if names and reason not in ("1-D", "scalar"):
            lines += [f"          {t.name}  {'x'.join(map(str, t.shape))}" for t in members]
    return lines
