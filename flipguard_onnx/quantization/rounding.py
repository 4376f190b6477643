"""Which weights cross a decision boundary, and where they land.

`flip` takes one tensor through the whole of it: fit the grid, analyse the margins, choose the
flips by the policy, place the flipped weights just past their boundaries, and check that nothing
but the chosen codes has changed.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from ..errors import ModelError, SchemeError, ValidationError
from . import error_feedback
from .error_feedback import InputMoments
from .schemes import Blocks, Checked, Codes, Floats, Grid, Margins, Scheme

POLICIES = ("unbiased", "topk", "none")

COUNTED = 1 << 18  # codes at a time

TINY = float(np.finfo(np.float32).tiny)

Mask = npt.NDArray[np.bool_]

Extremes = tuple[Floats, Floats]


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
class QuantizedTensor:
    """One tensor, guarded. Arrays are flat, rows of output channels one after the other.

    plain: the codes of rounding to the nearest level; codes: the guarded ones.
    guarded: the weights in their own type, moved so that the scheme's quantizer yields `codes`;
    None where nobody wants them.
    gain: squared error of the products with error feedback / without; None where it was not tried.
    """

    grid: Grid
    plain: Codes
    codes: Codes
    guarded: npt.NDArray[Any] | None
    gain: float | None = None

    @property
    def furthest(self) -> int:
        """By how many levels a code differs from plain rounding's at most."""
        return max(int(np.max(np.abs(steps))) for steps in self._steps())

    @property
    def count(self) -> int:
        """How many weights crossed."""
        return sum(int(np.count_nonzero(steps)) for steps in self._steps())

    def _steps(self) -> Iterator[npt.NDArray[np.int16]]:
        for start in range(0, self.codes.size, COUNTED):
            some = slice(start, start + COUNTED)
            yield np.subtract(self.codes[some], self.plain[some], dtype=np.int16)


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
    inputs: InputMoments | None = None,
    *,
    first: int = 0,
    extremes: Extremes | None = None,
) -> QuantizedTensor:
    """Guard one tensor: `values` flat in its storage type, [blocks.rows * blocks.cols].

    inputs: what the tensor is multiplied with; the unbiased policy then feeds its errors forward,
    and keeps that draw if it changes the tensor's products less than the plain one does.
    A tensor may come in pieces, with the same result where there are no `inputs`: whole blocks, in
    any order, `first` being the number of a piece's first weight in the tensor. Where one block is
    cut into pieces, `extremes` are those of all of it (`Blocks.extremes` of the pieces, merged).
    Raises ModelError for values that are not `sound`, and ValidationError when an invariant of the
    guard does not hold for this tensor.
    """
    found = blocks.extremes(values, backend)
    whole = extremes or found
    if not sound(np.concatenate([*found, *whole]), values.dtype).all():
        raise ModelError(f"tensor {name!r} holds values that are NaN, infinite or too large")
    grid = scheme.grid(*whole, blocks, values.dtype)
    if policy.name == "none":
        plain = grid.encode(values, backend)
        return QuantizedTensor(grid, plain, plain, values)
    gain = None
    if policy.name == "topk":
        margins = grid.analyze(values, backend)
        plain = margins.codes
        wanted = np.where(_topk(grid, margins, policy.ratio), margins.neighbours, plain)
    else:
        limit = np.float32((1 - policy.tau) / 2)
        plain, wanted = grid.draw(values, key, limit, backend, first)
        if inputs:
            fed = error_feedback.draw(values, grid, inputs, key, limit, backend)
            gain = _gain(values, grid, inputs, fed, wanted)
            wanted = fed if gain is not None and gain < 1 else wanted
    guarded, codes = grid.place(values, plain, wanted, backend)
    checked = grid.check(values, guarded, plain, codes, backend)
    _require(name, checked, scheme, grid, values.dtype, found, whole)
    return QuantizedTensor(grid, plain, codes, guarded, gain)


def sound(values: npt.NDArray[Any], storage: np.dtype[Any]) -> Mask:
    """Finite, and not so large that a level rounded up from the value would overflow that type."""
    bound = largest_sound(storage)
    with np.errstate(invalid="ignore"):  # bfloat16 complains of NaN
        within: Mask = (values >= -bound) & (values <= bound)
    return within


def largest_sound(storage: np.dtype[Any]) -> Any:
    """The bound of `sound`, a scalar of that type."""
    kind = ml_dtypes.finfo(storage)  # type: ignore[no-untyped-call]
    return storage.type(float(kind.max) * (1 - 2 * float(kind.eps)))


def _gain(
    values: npt.NDArray[Any], grid: Grid, inputs: InputMoments, fed: Codes, drawn: Codes
) -> float | None:
    """Squared error of the products with error feedback / without; None where they overflow."""
    with_feedback, without = (
        inputs.error(values.astype(np.float32) - grid.decode(codes)) for codes in (fed, drawn)
    )
    gain = with_feedback / max(without, TINY)
    return gain if math.isfinite(gain) else None


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


def _require(
    name: str,
    checked: Checked,
    scheme: Scheme,
    grid: Grid,
    storage: np.dtype[Any],
    before: Extremes,
    whole: Extremes,
) -> None:
    """The invariants of a guarded tensor, held to in every run.

    before: the extremes of these weights before they were moved; whole: those of the whole blocks,
    where these weights are but a piece.
    """
    low = np.where(before[0] == whole[0], checked.low, np.minimum(checked.low, whole[0]))
    high = np.where(before[1] == whole[1], checked.high, np.maximum(checked.high, whole[1]))
    if not scheme.grid(low, high, grid.blocks, storage).same_as(grid):
        raise ValidationError(f"tensor {name!r}: the flips moved the grid; scales must stay")
    if checked.wrong:
        raise ValidationError(f"tensor {name!r}: guarded weights do not encode to their codes")
    if checked.moved:
        raise ValidationError(f"tensor {name!r}: a weight that was not selected has changed")
