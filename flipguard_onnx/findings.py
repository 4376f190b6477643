"""What a scan found: plain data, and its rendering as text. JSON is `to_dict` dumped."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .report import megabytes, skipped_lines, table
from .weights import Skipped

LEVELS = ("clean", "suspicious", "aligned")  # in ascending order; or "not judged"


@dataclass(frozen=True)
class Verdict:
    """level: one of LEVELS, or "not judged". grids: those that stand out, the strongest first.

    strength: share of the weights that stand elsewhere than on placebo grids, on the strongest
    grid. reason: one sentence.
    """

    level: str
    grids: tuple[str, ...]
    strength: float
    reason: str


@dataclass(frozen=True)
class Budget:
    """First-order alignment budget, in the weights' own units.

    nearest: sum |e|, the rounding error that who sets the weights can choose in full. chosen: what
    is left of it to him after a guard, sum |E e|. random: standard deviation of the rest, which
    he cannot choose, sqrt(sum Var e), with independent draws.
    """

    nearest: float
    chosen: float
    random: float


@dataclass(frozen=True)
class Alignment:
    """How the weights of a tensor, or of all tensors, stand to one grid.

    weights: how many count; zeros, the outermost sixth and those without a neighbour do not.
    histogram: share of them by distance to the nearest decision boundary, from 0 (on the boundary)
    to 1 half-gap (on the level), in bins of equal width. placebo: the same, as grids with other
    scales let expect it. departure: largest difference between the cumulative histogram and the
    uniform distribution's. shift: ... and the placebo's. peak: largest share by which a bin stands
    out from its neighbours, beyond what the placebo's does; peak_at: the middle of that bin.
    collapse: share of the weights other than 0 that round to level 0. outlier: largest / second
    largest magnitude of a block, median.
    """

    grid: str
    weights: int
    histogram: tuple[float, ...]
    placebo: tuple[float, ...]
    departure: float
    shift: float
    peak: float
    peak_at: float
    collapse: float
    outlier: float
    budget: Budget

    @property
    def near(self) -> float:
        """Share of the weights within a tenth of a half-gap of a boundary; uniform: 0.1."""
        return sum(self.histogram[: len(self.histogram) // 10])


@dataclass(frozen=True)
class ScannedTensor:
    """One tensor. sampled: how many of its weights were looked at (all, unless it is huge).

    alignments: one per grid, in the order of Scan.alignments; empty for one that was not judged
    because its weights lie on a grid already.
    """

    name: str
    op: str
    shape: tuple[int, ...]
    weights: int
    sampled: int
    verdict: Verdict
    alignments: tuple[Alignment, ...]


@dataclass(frozen=True)
class Scan:
    """The result of scan(). alignments: of all judged tensors together, one per grid."""

    version: str
    input: str
    input_sha256: str
    input_data_sha256: dict[str, str]
    input_bytes: int
    verdict: Verdict
    alignments: tuple[Alignment, ...]
    tensors: tuple[ScannedTensor, ...]
    skipped: tuple[Skipped, ...]
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def render(self) -> str:
        lines = [
            f"input     {self.input}  {megabytes(self.input_bytes)}, "
            f"sha256 {self.input_sha256[:16]}",
            f"verdict   {self.verdict.level}: {self.verdict.reason}",
            "",
            *table(
                ("grid", "", "weights", "near", "placebo", "shift", "peak", "at", "collapse"),
                [_cells(a.grid, "all tensors", a) for a in self.alignments],
            ),
            "",
            *skipped_lines(self.skipped),
        ]
        return "\n".join(lines)


def _cells(name: str, what: str, alignment: Alignment) -> Sequence[str]:
    tenth = len(alignment.histogram) // 10
    return (
        name,
        what,
        f"{alignment.weights:,}",
        f"{alignment.near:.2%}",
        f"{sum(alignment.placebo[:tenth]):.2%}",
        f"{alignment.shift:.2%}",
        f"{alignment.peak:.2%}",
        f"{alignment.peak_at:.2f}",
        f"{alignment.collapse:.1%}",
    )
