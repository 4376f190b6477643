"""The HTML page of a scan or a guard: one file that needs nothing from outside itself.

The template escapes whatever comes from the model; pictures are SVG made of numbers alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import jinja2
from markupsafe import Markup

from .findings import Alignment, Scan, ScannedTensor, Verdict
from .report import megabytes
from .weights import Skipped

TONES = {"clean": "good", "suspicious": "warn", "aligned": "bad"}
SHADES = (0.5, 0.8, 1.1, 1.5, 2.0, 3.0, 5.0)  # share / even share, where the next shade begins
WIDTH = 800  # of pictures, in pixels
ROW_HEIGHTS = range(3, 15)  # of the heat map
MAP_HEIGHT = 480  # which is about kept to
SCANNED = (
    "name",
    "operator",
    "shape",
    "weights",
    "verdict",
    "grid",
    "shift",
    "near",
    "peak",
    "collapse",
    "outlier",
    "budget",
)
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
        loader = jinja2.PackageLoader("flipguard_onnx")
        environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True)
        histograms = [
            [[title, [round(10_000 * share) for share in shares]] for title, shares in h.histograms]
            for h in self.layers
        ]
        template = environment.get_template("report.html.j2")
        return template.render(page=self, histograms=histograms)


def scan_page(scan: Scan) -> str:
    """The result of a scan as one HTML file."""
    strongest = max(scan.alignments, key=lambda a: a.shift, default=None)
    judged = [tensor for tensor in scan.tensors if tensor.alignments]
    sections = [
        Section(
            "Where the weights stand, grid by grid",
            "All judged tensors together. Near: share of the weights within a tenth of a half-gap "
            "of a decision boundary; evenly spread weights have 10 %. Placebo: the same on grids "
            "that no quantizer uses. Shift: how much of the distribution stands elsewhere than on "
            "the placebos.",
            head=("grid", "weights", "near", "placebo", "shift", "peak", "at", "collapse"),
            rows=tuple(
                (
                    a.grid,
                    f"{a.weights:,}",
                    _percent(a.near),
                    _percent(_near(a.placebo)),
                    _percent(a.shift),
                    _percent(a.peak),
                    f"{a.peak_at:.2f}",
                    _percent(a.collapse),
                )
                for a in scan.alignments
            ),
        )
    ]
    if strongest and judged:
        index = [a.grid for a in scan.alignments].index(strongest.grid)
        rows = [(t.name, t.alignments[index].histogram) for t in judged]
        sections.append(heat_section(f"on {strongest.grid}", rows))
    sections.append(budget_section(scan.alignments))
    page = Page(
        scan.input,
        "Was this model prepared for a quantizer?",
        (_verdict(scan.verdict),),
        _file_facts(scan.input_sha256, scan.input_data_sha256, scan.input_bytes),
        tuple(sections),
        SCANNED,
        tuple(_scanned_layer(tensor) for tensor in scan.tensors),
        skipped_section(scan.skipped),
        f"flipguard-onnx {scan.version}, {scan.seconds:.1f} s",
    )
    return page.render()


def _scanned_layer(tensor: ScannedTensor) -> Layer:
    at = max(tensor.alignments, key=lambda a: a.shift, default=None)
    cells = [
        Cell(tensor.name),
        Cell(tensor.op),
        Cell("x".join(map(str, tensor.shape))),
        _count(tensor.weights),
        Cell(tensor.verdict.level),
        Cell(at.grid if at else ""),
    ]
    if at:
        cells += [_share(v) for v in (at.shift, at.near, at.peak, at.collapse)]
        cells += [_figure(v) for v in (at.outlier, at.budget.nearest)]
    else:
        cells += [Cell("")] * 6
    return Layer(tuple(cells), tuple((a.grid, a.histogram) for a in tensor.alignments))


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


def budget_section(alignments: Sequence[Alignment]) -> Section:
    """What is left to an attacker, before and after a guard."""
    return Section(
        "Alignment budget",
        "Sums over all judged weights, in their own units. Nearest: the rounding error that "
        "whoever set the weights can choose in full when they are rounded to nearest. After a "
        "guard: what he still chooses, and the standard deviation of the rest, which is drawn.",
        head=("grid", "nearest", "chosen after a guard", "drawn"),
        rows=tuple(
            (a.grid, *(f"{v:.4g}" for v in (a.budget.nearest, a.budget.chosen, a.budget.random)))
            for a in alignments
        ),
    )


def skipped_section(skipped: Sequence[Skipped]) -> Section:
    """The tensors that are left alone, by reason; 1-D ones and scalars only counted."""
    rows = []
    ordered = sorted(skipped, key=lambda tensor: tensor.reason)
    for reason, members in groupby(ordered, key=lambda tensor: tensor.reason):
        found = list(members)
        values = sum(tensor.size for tensor in found)
        rows.append((reason, f"{len(found):,}", f"{values:,}"))
        if reason not in ("1-D", "scalar"):
            rows += [
                (f"— {t.name} {'x'.join(map(str, t.shape))}", "", f"{t.size:,}") for t in found
            ]
    return Section("Skipped", head=("reason", "tensors", "values"), rows=tuple(rows))


def _verdict(verdict: Verdict) -> tuple[str, str, str]:
    return TONES.get(verdict.level, "plain"), verdict.level, verdict.reason


def _file_facts(sha256: str, data_sha256: dict[str, str], size: int) -> tuple[tuple[str, str], ...]:
    data = tuple((f"sha256 of {name}", digest) for name, digest in data_sha256.items())
    return (("sha256", sha256), *data, ("size", megabytes(size)))


def _near(histogram: Sequence[float]) -> float:
    return sum(histogram[: len(histogram) // 10])


def _percent(share: float) -> str:
    return f"{share:.2%}"


def _share(value: float) -> Cell:
    return Cell(_percent(value), round(value, 6))


def _figure(value: float) -> Cell:
    return Cell(f"{value:.4g}", float(f"{value:.6g}"))


def _count(value: int) -> Cell:
    return Cell(f"{value:,}", value)


def _short(name: str) -> str:
    return name if len(name) <= LABELLED else f"…{name[-LABELLED + 1 :]}"
