"""An HTML page: one file that needs nothing from outside itself.

The template escapes whatever comes from the model; the pictures are SVG, in which the names of
layers are escaped.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import jinja2
from markupsafe import Markup, escape

from ..errors import printable
from .scan import Skipped
from .words import percent

SHADES = (0.5, 0.8, 1.1, 1.5, 2.0, 3.0, 5.0)  # share / even share at which the next shade begins

WIDTH = 800  # of pictures, in pixels

ROW_HEIGHTS = range(3, 15)  # of the heat map

MAP_HEIGHT = 480  # of a picture with many layers, about

LABELLED = 40  # layers; a picture of more has no room for their names

LONGEST_LABEL = 40  # characters

LABELS = 260  # width of the names beside a picture, in pixels


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
    """A heading with some text, a picture and a table, each where there is one.

    terms: what the columns of the table mean, by their heads.
    """

    title: str
    text: str = ""
    picture: str = ""
    head: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    terms: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Page:
    """Everything that the template shows.

    Tones of verdicts: good, warn, bad or plain. columns: what they mean, by their heads.
    """

    heading: str
    subheading: str
    verdicts: tuple[tuple[str, str, str], ...]  # tone, level, sentence
    facts: tuple[tuple[str, str], ...]
    sections: tuple[Section, ...]
    columns: Mapping[str, str]
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
    """Text from a model made printable: a mark in it could turn the direction of writing."""
    if isinstance(value, Markup) or not isinstance(value, str):
        return value
    return printable(value, len(value))


def heat_section(where: str, rows: Sequence[tuple[str, Sequence[float]]]) -> Section:
    """Layers from top to bottom, distance to the nearest decision boundary from left to right.

    rows: name and histogram of every layer.
    """
    return Section(
        f"How far the weights stand from the decision boundaries, {where}",
        "One row per layer, in the order of the graph. The colour says how many weights stand at a "
        "distance, compared with an even spread (1x).",
        heat_map(rows),
    )


def heat_map(rows: Sequence[tuple[str, Sequence[float]]]) -> Markup:
    """An SVG with a row of cells for every layer; shades tell the share / an even share.

    One path per shade holds all of its cells, so that a page with hundreds of layers stays small.
    """
    height = min(max(MAP_HEIGHT // len(rows), ROW_HEIGHTS.start), ROW_HEIGHTS.stop - 1)
    left = LABELS if len(rows) <= LABELLED else 0
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
    if left:
        svg += _labels([name for name, _ in rows], height)
    svg += [
        f'<text x="{left}" y="{total + 14}">on a boundary</text>',
        f'<text x="{WIDTH}" y="{total + 14}" text-anchor="end">on a level</text>',
    ]
    edges = ["0", *(f"{edge:g}" for edge in SHADES)]
    for shade, edge in enumerate(edges):
        x = left + shade * 60
        svg.append(f'<rect class="h{shade}" x="{x}" y="{total + 24}" width="14" height="12"/>')
        svg.append(f'<text x="{x + 18}" y="{total + 34}">{edge}x</text>')
    return Markup("".join(svg) + "</svg>")


def bars(
    rows: Sequence[tuple[str, float, float]],
    kinds: tuple[str, str],
    show: Callable[[float], str] = "{:.3g}".format,
) -> Markup:
    """An SVG with two bars for every name, the first one pale, on a common scale from 0.

    kinds: what the two bars are; show: the text of a value.
    """
    longest = max((max(first, second) for _, first, second in rows), default=0) or 1.0
    height = 16 if len(rows) <= LABELLED else max(MAP_HEIGHT // len(rows), 4)
    left, right = (LABELS if len(rows) <= LABELLED else 0), 60
    scale = (WIDTH - left - right) / longest
    total = len(rows) * height
    svg = [f'<svg viewBox="0 0 {WIDTH} {total + 40}" width="{WIDTH}" role="img">']
    thick = height * 0.4
    lengths = ("before", [row[1] for row in rows]), ("after", [row[2] for row in rows])
    for number, (shade, values) in enumerate(lengths):
        cells = [
            f"M{left} {y * height + number * thick:g}h{value * scale:g}v{thick:g}"
            f"h{-value * scale:g}z"
            for y, value in enumerate(values)
        ]
        svg.append(f'<path class="{shade}" d="{"".join(cells)}"/>')
        x = left + number * 160
        svg.append(f'<rect class="{shade}" x="{x}" y="{total + 24}" width="14" height="12"/>')
        svg.append(f'<text x="{x + 18}" y="{total + 34}">{kinds[number]}</text>')
    if left:
        svg += _labels([name for name, *_ in rows], height)
        svg += [
            f'<text x="{WIDTH - right + 4}" y="{(y + 1) * height - 4}">{escape(show(after))}</text>'
            for y, (_, _, after) in enumerate(rows)
        ]
    end = escape(show(longest))
    svg.append(f'<text x="{left}" y="{total + 14}">0</text>')
    svg.append(f'<text x="{WIDTH - right}" y="{total + 14}" text-anchor="end">{end}</text>')
    return Markup("".join(svg) + "</svg>")


def skipped_section(skipped: Sequence[Skipped]) -> Section:
    """The tensors that are not guarded, by reason; 1-D ones and scalars are only counted."""
    rows = []
    ordered = sorted(skipped, key=lambda tensor: tensor.text)
    for reason, members in groupby(ordered, key=lambda tensor: tensor.text):
        found = list(members)
        values = sum(tensor.size for tensor in found)
        computed = found[0].is_computed
        rows.append((reason, f"{len(found):,}", "" if computed else f"{values:,}"))
        if computed:
            rows += [(f"— {t.name}", "", "") for t in found]
        elif not found[0].is_vector:
            rows += [
                (f"— {t.name} {'x'.join(map(str, t.shape))}", "", f"{t.size:,}") for t in found
            ]
    text = "Tensors that are not guarded, and why."
    return Section("Skipped", text, head=("reason", "tensors", "values"), rows=tuple(rows))


def share(value: float) -> Cell:
    """A share of 1, in per cent."""
    return Cell(percent(value), float(f"{value:.6g}"))


def figure(value: float, prefix: str = "") -> Cell:
    """A number of which three digits matter."""
    return Cell(f"{prefix}{value:.3g}", float(f"{value:.6g}"))


def count(value: int) -> Cell:
    """A whole number."""
    return Cell(f"{value:,}", value)


def _labels(names: Sequence[str], height: int) -> list[Markup]:
    """Names beside the rows of a picture; a long one is cut on the left and whole in its title."""
    labels = []
    for y, name in enumerate(names):
        name = printable(name, len(name))
        cut = name if len(name) <= LONGEST_LABEL else f"…{name[1 - LONGEST_LABEL :]}"
        label = Markup('<text x="0" y="{}">{}<title>{}</title></text>')
        labels.append(label.format((y + 1) * height - 3, cut, name))
    return labels
