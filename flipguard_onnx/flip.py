"""Which weights cross a decision boundary, and where they land.

`flip` takes one tensor through the whole of it: fit the grid, analyse the margins, choose the
flips by the policy, place the flipped weights just past their boundaries, and check that nothing
but the chosen codes has changed.
"""

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from . import feedback
from .errors import SchemeError, ValidationError
from .feedback import Inputs
from .schemes import Blocks, Grid, Margins, Scheme

POLICIES = ("unbiased", "topk", "none")
COUNTED = 1 << 20  # codes at a time
MAX_STEPS = 8  # values of the storage type that a flipped weight may be moved on beyond its target

TINY = float(np.finfo(np.float32).tiny)

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Policy:
    """How flips are chosen.

    unbiased: a weight whose margin is below `tau` (0 < tau <= 1, in half-gaps) takes the
    neighbouring level with the probability that makes its expected value the weight itself.
    topk: the share `ratio` (0 < ratio <= 1) of every block with the largest error in scaled units
    crosses: Algorithm 1 of FlipGuard (arXiv 2606.28962).
    none: plain rounding to the nearest level.
    """

    name: str = "unbiased"
    tau: float = 1.0
    ratio: float = 0.1

    def __post_init__(self) -> None:
        if self.name not in POLICIES:
            raise SchemeError(f"policy {self.name!r} is unknown; allowed: {', '.join(POLICIES)}")
        for option in ("tau", "ratio"):
            value = getattr(self, option)
            if not 0 < value <= 1:
                raise SchemeError(f"{option} is {value}; allowed: above 0, up to 1")


@dataclass(frozen=True)
class Flips:
    """One tensor, guarded. Arrays are flat, rows of output channels one after the other.

    plain: the codes of rounding to the nearest level; codes: the guarded ones.
    guarded: the weights in their own type, moved so that the scheme's quantizer yields `codes`;
    None where nobody wants them.
    gain: squared error of the products with error feedback / without; None where it was not tried.
    """

    grid: Grid
    plain: npt.NDArray[np.int8]
    codes: npt.NDArray[np.int8]
    guarded: npt.NDArray[Any] | None
    gain: float | None = None

    @property
    def furthest(self) -> int:
        """By how many levels a code differs from plain rounding's at most."""
        most = 0
        for start in range(0, self.codes.size, COUNTED):
            some = slice(start, start + COUNTED)
            steps = np.subtract(self.codes[some], self.plain[some], dtype=np.int16)
            most = max(most, int(np.max(np.abs(steps))))
        return most

    @property
    def count(self) -> int:
        """How many weights crossed."""
        return int(np.count_nonzero(self.plain != self.codes))


def tensor_key(seed: int, name: str) -> np.uint64:
    """Key of the random stream of one tensor: depends on the seed and the name, nothing else."""
    sequence = np.random.SeedSequence(seed, spawn_key=tuple(name.encode()))
    return np.uint64(sequence.generate_state(1, np.uint64)[0])


def flip(
    name: str,
    values: npt.NDArray[Any],
    scheme: Scheme,
    blocks: Blocks,
    policy: Policy,
    key: np.uint64,
    backend: ModuleType,
    inputs: Inputs | None = None,
) -> Flips:
    """Guard one tensor: `values` flat in its storage type, [blocks.rows * blocks.cols].

    inputs: what the tensor is multiplied with; the unbiased policy then feeds its errors forward,
    and keeps that draw if it changes the tensor's products less than the plain one does.
    Raises ValidationError when an invariant of the guard does not hold for this tensor.
    """
    weights = values.astype(np.float32)
    grid = scheme.fit(weights, blocks, values.dtype, backend)
    margins = grid.analyze(weights, backend)
    if policy.name == "none":
        return Flips(grid, margins.codes, margins.codes, values)
    if policy.name == "topk":
        flips = _topk(grid, margins, policy.ratio)
    else:
        flips = np.empty(margins.offsets.size, np.bool_)
        limit = np.float32((1 - policy.tau) / 2)
        backend.draw(margins.offsets, key, limit, flips)
    wanted = np.where(flips, margins.neighbours, margins.codes)
    gain = None
    if inputs and policy.name == "unbiased":
        fed = feedback.draw(weights, grid, inputs, key, limit, backend)
        errors = (inputs.error(weights - grid.decode(codes)) for codes in (fed, wanted))
        gain = next(errors) / max(next(errors), TINY)
        wanted = fed if gain < 1 else wanted
    codes, guarded = _place(values, weights, grid, margins.codes, wanted, backend)
    _check(name, values, guarded, codes != margins.codes, scheme, grid, codes, backend)
    return Flips(grid, margins.codes, codes, guarded, gain)


def _topk(grid: Grid, margins: Margins, ratio: float) -> Mask:
    """The floor(ratio * n) weights with the largest errors of every block of n; first come wins."""
    blocks = grid.blocks
    padded = np.full((blocks.rows, blocks.per_row * blocks.size), -1, np.float32)
    padded[:, : blocks.cols] = grid.errors(margins).reshape(blocks.rows, blocks.cols)
    padded = padded.reshape(blocks.count, blocks.size)
    exact = ratio * np.count_nonzero(padded >= 0, axis=1)
    quota = np.floor(exact + 1e-9).astype(np.int64)  # 0.29 * 100 is 28.999999999999996
    rank = np.empty(padded.shape, np.int64)
    order = np.argsort(-padded, axis=1, kind="stable")
    np.put_along_axis(rank, order, np.arange(blocks.size)[None, :], axis=1)
    chosen = (rank < quota[:, None]).reshape(blocks.rows, -1)[:, : blocks.cols]
    flips: Mask = chosen.reshape(-1) & (margins.offsets != 0)
    return flips


def _place(
    values: npt.NDArray[Any],
    weights: npt.NDArray[np.float32],
    grid: Grid,
    plain: npt.NDArray[np.int8],
    wanted: npt.NDArray[np.int8],
    backend: ModuleType,
) -> tuple[npt.NDArray[np.int8], npt.NDArray[Any]]:
    """Codes and weights after the flips.

    A flipped weight takes the value of its own type nearest past the edge of its new cell, and
    never one short of its target: a float16 on the boundary itself would be rounded one way by
    some quantizers and the other way by others. Where the type is too coarse to hold such a value,
    the weight stays as it was.
    """
    flips = wanted != plain
    target = grid.cross(weights, plain, wanted, backend)
    guarded = np.where(flips, target.astype(values.dtype), values)
    upward = target > weights
    away = np.where(upward, np.inf, -np.inf).astype(values.dtype)
    absmax = grid.blocks.spread(grid.absmax)
    for _ in range(MAX_STEPS):
        stored = guarded.astype(np.float32)
        short = np.where(upward, stored < target, stored > target)
        missed = flips & (short | (np.abs(stored) > absmax))
        missed |= grid.encode(stored, backend) != wanted
        if not missed.any():
            return wanted, guarded
        guarded[missed] = np.nextafter(guarded[missed], away[missed])
    guarded[missed] = values[missed]
    return np.where(missed, plain, wanted), guarded


def _check(
    name: str,
    values: npt.NDArray[Any],
    guarded: npt.NDArray[Any],
    flipped: Mask,
    scheme: Scheme,
    grid: Grid,
    codes: npt.NDArray[np.int8],
    backend: ModuleType,
) -> None:
    """The invariants of a guarded tensor, held to in every run."""
    weights = guarded.astype(np.float32)
    refitted = scheme.fit(weights, grid.blocks, values.dtype, backend)
    if not refitted.same_as(grid):
        raise ValidationError(f"tensor {name!r}: the flips moved the grid; scales must stay")
    if not np.array_equal(refitted.encode(weights, backend), codes):
        raise ValidationError(f"tensor {name!r}: guarded weights do not encode to their codes")
    bits = np.dtype(f"u{values.dtype.itemsize}")
    if np.any((values.view(bits) != guarded.view(bits)) & ~flipped):
        raise ValidationError(f"tensor {name!r}: a weight that was not selected has changed")
