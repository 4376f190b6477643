"""An HTML page: one file that needs nothing from outside itself.

The template escapes whatever comes from the model; pictures are SVG made of numbers alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import jinja2
from markupsafe import Markup

from ..errors import printable
from .scan import Skipped

SHADES = (0.5, 0.8, 1.1, 1.5, 2.0, 3.0, 5.0)  # share / even share, where the next shade begins

WIDTH = 800  # of pictures, in pixels

ROW_HEIGHTS = range(3, 15)  # of the heat map

MAP_HEIGHT = 480  # which is about kept to

LABELLED = 40  # layers; a map of more has no room for their names


@dataclass(frozen=True)
class Cell:
    """What a cell shows, and the number by which its column is sorted (None: by the text)."""

    text: str
    value: float | None = None


@dataclass(frozen=True)
class Layer:
    """A row of the table of layers; histograms by title, shares of equal bins."""

    cells: tuple[Cell, ...]
    histograms: tuple[tuple[str, Sequence[float]], ...]


@dataclass(frozen=True)
class Section:
    """A heading with a line of text, a picture and a table, each where there is one."""

    title: str
    text: str = ""
    picture: str = ""
    head: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True)
class Page:
    """Everything that the template shows. tone of a verdict: good, warn, bad or plain."""

    heading: str
    subheading: str
    verdicts: tuple[tuple[str, str, str], ...]  # tone, level, sentence
    facts: tuple[tuple[str, str], ...]
    sections: tuple[Section, ...]
    columns: tuple[str, ...]
    layers: tuple[Layer, ...]
    skipped: Section
    footer: str

    def render(self) -> str:
        """The page as HTML."""
        loader = jinja2.PackageLoader(__package__)
        environment = jinja2.Environment(
            loader=loader, autoescape=True, trim_blocks=True, finalize=_visible
        )
        histograms = [
            [[title, [round(10_000 * share) for share in shares]] for title, shares in h.histograms]
            for h in self.layers
        ]
        template = environment.get_template("report.html.j2")
        return template.render(page=self, histograms=histograms).strip()


def _visible(value: Any) -> Any:
    """Text from a model, in which a mark could turn the direction of writing; ours stays."""
    own = isinstance(value, Markup) or not isinstance(value, str)
    return value if own else printable(value, len(value))


def heat_section(where: str, rows: Sequence[tuple[str, Sequence[float]]]) -> Section:
    """Layers from top to bottom, distance to the nearest decision boundary from left to right."""
    return Section(
        f"Layers and distance to the boundary, {where}",
        "One row per layer in the order of the graph; on the left the weights on a decision "
        "boundary, on the right those on a level. The stronger the colour, the more weights "
        "than evenly spread ones would put there.",
        heat_map(rows),
    )


def heat_map(rows: Sequence[tuple[str, Sequence[float]]]) -> Markup:
    """An SVG with a row of cells for every layer: shade by share of an even share.

    One path per shade holds all of its cells, so that hundreds of layers stay small.
    """
    height = min(max(MAP_HEIGHT // len(rows), ROW_HEIGHTS.start), ROW_HEIGHTS.stop - 1)
    labelled = len(rows) <= LABELLED
    left = 260 if labelled else 0
    paths: dict[int, list[str]] = {}
    for y, (_, shares) in enumerate(rows):
        width = (WIDTH - left) / len(shares)
        shades = [sum(share * len(shares) >= edge for edge in SHADES) for share in shares]
        x = 0
        for shade, run in groupby(shades):
            length = len(list(run))
            start, span = left + x * width, length * width
            paths.setdefault(shade, []).append(
                f"M{start:g} {y * height}h{span:g}v{height}h{-span:g}z"
            )
            x += length
    total = len(rows) * height
    svg = [f'<svg viewBox="0 0 {WIDTH} {total + 40}" width="{WIDTH}" role="img">']
    svg += [f'<path class="h{s}" d="{"".join(cells)}"/>' for s, cells in sorted(paths.items())]
    if labelled:
        svg += [
            Markup('<text x="0" y="{}">{}</text>').format((y + 1) * height - 3, _short(name))
            for y, (name, _) in enumerate(rows)
        ]
    svg += [
        f'<text x="{left}" y="{total + 14}">boundary</text>',
        f'<text x="{WIDTH}" y="{total + 14}" text-anchor="end">level</text>',
    ]
    edges = ["0", *(f"{edge:g}" for edge in SHADES)]
    for shade, edge in enumerate(edges):
        x = left + shade * 60
        svg.append(f'<rect class="h{shade}" x="{x}" y="{total + 24}" width="14" height="12"/>')
        svg.append(f'<text x="{x + 18}" y="{total + 34}">{edge}x</text>')
    return Markup("".join(svg) + "</svg>")


def bars(rows: Sequence[tuple[str, float, float]]) -> Markup:
    """An SVG with two bars for every name, the first one pale, on a common scale from 0."""
    most = max((max(first, second) for _, first, second in rows), default=0) or 1.0
    height = 14 if len(rows) <= LABELLED else max(MAP_HEIGHT // len(rows), 4)
    left, right = (260 if len(rows) <= LABELLED else 0), 60
    scale = (WIDTH - left - right) / most
    svg = [f'<svg viewBox="0 0 {WIDTH} {len(rows) * height + 20}" width="{WIDTH}" role="img">']
    thick = height * 0.4
    lengths = ("before", [row[1] for row in rows]), ("after", [row[2] for row in rows])
    for place, (kind, values) in enumerate(lengths):
        cells = [
            f"M{left} {y * height + place * thick:g}h{value * scale:g}v{thick:g}"
            f"h{-value * scale:g}z"
            for y, value in enumerate(values)
        ]
        svg.append(f'<path class="{kind}" d="{"".join(cells)}"/>')
    if left:
        svg += [
            Markup('<text x="0" y="{}">{}</text>').format((y + 1) * height - 3, _short(name))
            for y, (name, *_) in enumerate(rows)
        ]
    end = len(rows) * height + 14
    svg.append(f'<text x="{left}" y="{end}">0</text>')
    svg.append(f'<text x="{WIDTH - right}" y="{end}" text-anchor="end">{most:.3g}</text>')
    return Markup("".join(svg) + "</svg>")


def skipped_section(skipped: Sequence[Skipped]) -> Section:
    """The tensors that are left alone, by reason; 1-D ones and scalars only counted."""
    rows = []
    ordered = sorted(skipped, key=lambda tensor: tensor.text)
    for reason, members in groupby(ordered, key=lambda tensor: tensor.text):
        found = list(members)
        values = sum(tensor.size for tensor in found)
        rows.append((reason, f"{len(found):,}", f"{values:,}"))
        if not found[0].is_vector:
            rows += [
                (f"— {t.name} {'x'.join(map(str, t.shape))}", "", f"{t.size:,}") for t in found
            ]
    return Section("Skipped", head=("reason", "tensors", "values"), rows=tuple(rows))


def percent(value: float) -> str:
    return f"{value:.2%}"


def share(value: float) -> Cell:
    return Cell(percent(value), round(value, 6))


def figure(value: float, prefix: str = "") -> Cell:
    return Cell(f"{prefix}{value:.4g}", float(f"{value:.6g}"))


def count(value: int) -> Cell:
    return Cell(f"{value:,}", value)


def _short(name: str) -> str:
    name = printable(name, len(name))
    return name if len(name) <= LABELLED else f"…{name[-LABELLED + 1 :]}"
