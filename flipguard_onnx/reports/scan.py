"""What a scan found: plain data, and its rendering as text. JSON is `to_dict` dumped."""

import math
from dataclasses import dataclass, field
from enum import Enum
from math import prod
from typing import Any, Literal

from .serialize import FORMAT, jsonable


class SkipReason(Enum):
    """Why a tensor is not guarded, in words; {} stands for the detail."""

    SCALAR = "scalar"
    ONE_AXIS = "1-D"
    NO_OPERATOR = "feeds {}, no weighted operator"
    TYPE = "unsupported type {}"
    TOO_SMALL = "too small (fewer than {} weights)"
    GRAPH_OUTPUT = "is a graph output"
    NOT_INCLUDED = "not selected by --include"
    EXCLUDED = "excluded by --exclude"
    QUANTIZED = "already quantized ({})"
    NOT_CONSTANT = "not constant (weight of {})"
    NOT_JUDGED = "{}"  # by a scan, whose verdict is the detail


@dataclass(frozen=True)
class Skipped:
    """A tensor that is not guarded, and why."""

    name: str
    shape: tuple[int, ...]
    reason: SkipReason
    detail: str = ""

    @property
    def text(self) -> str:
        """The reason in words, with its detail."""
        return self.reason.value.format(self.detail)

    @property
    def is_vector(self) -> bool:
        """Whether it has too few axes for a weight; there are many such tensors."""
        return self.reason in (SkipReason.SCALAR, SkipReason.ONE_AXIS)

    @property
    def size(self) -> int:
        """How many values it has; 0 for one that is computed."""
        return prod(self.shape) if self.reason is not SkipReason.NOT_CONSTANT else 0

    def as_json(self) -> dict[str, Any]:
        """What a report says of it."""
        return {"name": self.name, "shape": self.shape, "reason": self.text}


LEVELS = ("clean", "suspicious", "aligned")  # in ascending order; beside them: NOT_JUDGED

NOT_JUDGED = "not judged"


@dataclass(frozen=True)
class Verdict:
    """level: one of LEVELS, or NOT_JUDGED. grids: those it is aligned to, the strongest first.

    strength: share of the weights that stand where only the strongest of these grids explains it.
    reason: one sentence.
    """

    level: str
    reason: str
    grids: tuple[str, ...] = ()
    strength: float = 0.0

    @property
    def alarming(self) -> bool:
        """Whether it is suspicious or worse."""
        return self.level in LEVELS[1:]


@dataclass(frozen=True)
class Budget:
    """First-order alignment budget, in the weights' own units.

    nearest: sum abs(e), the rounding error that who sets the weights can choose in full. chosen:
    what a guard leaves of it to him, sum abs(E e). random: standard deviation of the rest, which
    he cannot choose, sqrt(sum Var e), with independent draws.
    """

    nearest: float
    chosen: float
    random: float

    def __add__(self, other: "Budget") -> "Budget":
        return Budget(
            self.nearest + other.nearest,
            self.chosen + other.chosen,
            math.hypot(self.random, other.random),
        )


@dataclass(frozen=True)
class Alignment:
    """How the weights of a tensor, or of all tensors, stand to one grid.

    weights: how many are counted, which leaves out zeros and those above 3/4 of their block's
    largest; independent: as many weights that never repeat would be as telling. histogram: share
    of them by distance to the nearest decision boundary, from 0 (on it) to 1 half-gap (on the
    level), in bins of equal width. placebo: the same on grids whose scales were changed at random.
    departure: largest difference between the cumulative histogram and the uniform distribution's;
    shift: ... and the placebo's. peak: by what share of the weights the histogram's sharpest peak
    exceeds those on grids with scales that are all wrong by one factor; peak_at: its distance.
    edge: by what share a peak within a tenth of the boundary exceeds twice those on grids whose
    scales were changed at random.
    collapse: share of the weights other than 0 that lose more than half of their magnitude.
    outlier: largest / second largest magnitude of a block, median.
    """

    grid: str
    weights: int
    independent: int
    histogram: tuple[float, ...]
    placebo: tuple[float, ...]
    departure: float
    shift: float
    peak: float
    peak_at: float
    edge: float
    collapse: float
    outlier: float
    budget: Budget

    @property
    def near(self) -> float:
        """Share of the weights within a tenth of a half-gap of a boundary; uniform: 0.1."""
        return sum(self.histogram[: len(self.histogram) // 10])

    @property
    def near_placebo(self) -> float:
        """The same on placebos."""
        return sum(self.placebo[: len(self.placebo) // 10])

    @property
    def strength(self) -> float:
        """Share of the weights that stand where only this grid explains it."""
        return max(self.peak, self.edge)


@dataclass(frozen=True)
class ScannedTensor:
    """One tensor. alignments: one per grid, in the order of Scan.alignments."""

    name: str
    op: str
    shape: tuple[int, ...]
    weights: int
    verdict: Verdict
    alignments: tuple[Alignment, ...]


@dataclass(frozen=True)
class Scan:
    """The result of scan(). alignments: of all tensors that are judged together, one per grid.

    config: the file that gave options of the command line.
    """

    kind: Literal["scan"] = field(default="scan", init=False)
    format_version: int = field(default=FORMAT, init=False)
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
    config: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return jsonable(self)

    def render(self) -> str:
        """The result as text for a terminal."""
        from .text import render_scan

        return render_scan(self)
