"""The result of scan()."""

import math
from collections.abc import Sequence
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
    NO_WEIGHT = "feeds {}, but not as its weight"
    BIAS = "bias of {}"
    NOT_FOLLOWED = "feeds {}, through which weights are not followed"
    TYPE = "unsupported type {}"
    TOO_SMALL = "too small (fewer than {} weights)"
    NOT_FOLDED = "weight behind a constant expression that was not evaluated: {}"
    AT_RUN_TIME = "becomes a weight only at run time, through {}"
    NOT_INCLUDED = "not selected by --include"
    EXCLUDED = "excluded by --exclude"
    QUANTIZED = "already quantized ({})"
    NOT_CONSTANT = "not constant (weight of {})"
    COLLAPSES = "left float: {}"
    NOT_JUDGED = "{}"  # by a scan, whose verdict is the detail


# A quantizer could reach these, and nobody asked to leave them alone.
UNGUARDABLE = (SkipReason.TYPE, SkipReason.NOT_FOLDED, SkipReason.AT_RUN_TIME)


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
    def unguarded(self) -> bool:
        """Whether a quantizer could reach it all the same."""
        return self.reason in UNGUARDABLE

    @property
    def is_vector(self) -> bool:
        """Whether it has too few axes for a weight; there are many such tensors."""
        return self.reason in (SkipReason.SCALAR, SkipReason.ONE_AXIS)

    @property
    def is_computed(self) -> bool:
        """Whether its shape and its number of values are not known."""
        return self.reason is SkipReason.NOT_CONSTANT

    @property
    def size(self) -> int:
        """How many values it has; 0 for one that is computed."""
        return 0 if self.is_computed else prod(self.shape)

    def as_json(self) -> dict[str, Any]:
        """What a report says of it."""
        return {"name": self.name, "shape": self.shape, "reason": self.text}


MANY = 0.01  # share of the weights from which on small tensors are a matrix in pieces


def pieces(skipped: Sequence[Skipped], weights: int) -> list[Skipped]:
    """The tensors too small to be guarded, where they are many beside so many weights.

    Honest models have none, or a few; an attacker could cut a matrix into them.
    """
    small = [tensor for tensor in skipped if tensor.reason is SkipReason.TOO_SMALL]
    size = sum(tensor.size for tensor in small)
    return small if size > MANY * (weights + size) else []


def listed(names: Sequence[str]) -> str:
    """Names in words: a, b and c."""
    return " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))


LEVELS = ("clean", "suspicious", "clips", "collapses", "aligned")  # in ascending order


NOT_JUDGED = "not judged"  # beside them


@dataclass(frozen=True)
class Verdict:
    """Whether weights look prepared for a quantizer.

    Attributes
    ----------
    level : one of LEVELS, or "not judged"
    reason : one sentence
    grids : names of the grids that it is about, the strongest first
    strength : share, 0 to 1, on the strongest of these grids: of the weights whose position only
        that grid explains; "collapses": the loss; "clips": of the weights beyond the last level
    """

    level: str
    reason: str
    grids: tuple[str, ...] = ()
    strength: float = 0.0

    @property
    def alarming(self) -> bool:
        """Whether it is suspicious or worse."""
        return self.level in LEVELS[1:]

    @property
    def title(self) -> str:
        """The level with the grids."""
        link = " at " if self.level in ("clips", "collapses") else ", "
        return self.level + link * bool(self.grids) + listed(self.grids)


@dataclass(frozen=True)
class Budget:
    """First-order alignment budget: how much rounding error an attacker can choose.

    All fields are in the weights' own units. With e the error of rounding a weight to nearest, and
    e' the error after a guard whose draws are independent:

    Attributes
    ----------
    nearest : sum abs(e), all of which whoever sets the weights can choose
    chosen : sum abs(E e'): what a guard leaves to choose
    random : sqrt(sum Var e'), a standard deviation: the error that a guard draws and nobody chooses
    total : sum abs(w) of the same weights w, with which the other fields are compared
    """

    nearest: float
    chosen: float
    random: float
    total: float

    def __add__(self, other: "Budget") -> "Budget":
        return Budget(
            self.nearest + other.nearest,
            self.chosen + other.chosen,
            math.hypot(self.random, other.random),
            self.total + other.total,
        )

    @property
    def shares(self) -> tuple[float, float, float]:
        """Nearest, chosen and random as shares of the total."""
        total = self.total or 1.0
        return self.nearest / total, self.chosen / total, self.random / total


@dataclass(frozen=True)
class Alignment:
    """How the weights of a tensor, or of all tensors, stand to one grid.

    Distances are those of a weight to the nearest decision boundary in half-gaps: 0 on the
    boundary, 1 on a level. A placebo is the same grid with scales that no quantizer would choose;
    some have one wrong factor for all scales, others a random one per block.

    Attributes
    ----------
    grid : its name, such as "int8 channel" or "nf4"
    weights : how many are counted; zeros and those above 3/4 of their block's largest are not
    independent : how many weights that never repeat would be as telling
    histogram : share of the weights by distance, 20 bins of equal width from 0 to 1
    placebo : the same on the placebos with random factors, their mean
    departure : largest difference between the cumulative histogram and that of an even spread
    shift : largest difference between the cumulative histogram and the placebos'
    peak : share of the weights by which the histogram's sharpest peak exceeds those of the
        placebos with one factor
    peak_at : the distance of that peak
    edge : share of the weights by which a peak at a distance below 0.1 exceeds twice those of the
        placebos with random factors
    collapse : share of the weights other than 0 that lose more than half of their magnitude when
        they are rounded
    outlier : largest / second largest magnitude of a block, median over the blocks
    loss : relative L2 error, when rounded, of the weights without the largest eighth in every run
        of 32; mean over the runs
    clipped : share of the weights, without those that set a scale, above the highest level of a
        grid that does not reach as far there as on the other side
    mirrored : share of the same weights that are as far out on the other side
    budget : what an attacker could choose, before and after a guard on this grid
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
    loss: float
    clipped: float
    mirrored: float
    budget: Budget

    @property
    def near(self) -> float:
        """Share of the weights at a distance below 0.1; 0.1 of them when spread evenly."""
        return sum(self.histogram[: len(self.histogram) // 10])

    @property
    def near_placebo(self) -> float:
        """The same on the placebos."""
        return sum(self.placebo[: len(self.placebo) // 10])

    @property
    def strength(self) -> float:
        """Share of the weights whose position only this grid explains."""
        return max(self.peak, self.edge)


@dataclass(frozen=True)
class ScannedTensor:
    """What a scan found in one tensor.

    Attributes
    ----------
    name : of the initializer or constant, with the scopes it is in
    op : type of the operator that reads it
    shape : as it is stored in the model
    weights : how many values it has
    verdict : on this tensor alone
    alignments : one per grid, in the order of `Scan.alignments`; empty if it lies on a grid already
    """

    name: str
    op: str
    shape: tuple[int, ...]
    weights: int
    verdict: Verdict
    alignments: tuple[Alignment, ...]


@dataclass(frozen=True)
class Scan:
    """The result of scan().

    Attributes
    ----------
    version : of flipguard-onnx
    input : path of the model
    input_sha256 : of the model's file
    input_data_sha256 : of its external data files, by their names
    input_bytes : size of the model, data files included
    verdict : on the whole model
    alignments : of all tensors that are judged together, one per grid; empty if there are none
    tensors : those that could be guarded, in the order of the graph
    skipped : the others, and why
    seconds : wall time
    config : the file that gave options of the command line, if one did
    constants : those of the others that were looked at all the same, since arithmetic could make
        weights of them
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
    constants: tuple[ScannedTensor, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON types."""
        return jsonable(self)

    def render(self) -> str:
        """The result as text for a terminal."""
        from .text import render_scan

        return render_scan(self)
