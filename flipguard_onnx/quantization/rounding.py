"""Which weights cross a decision boundary, and where they land.

`quantize_tensor` takes one tensor all the way: it fits the grid, finds the margins, chooses by the
policy which weights flip, moves these just past their boundaries, and checks that nothing but the
chosen codes has changed.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from ..errors import ModelError, SchemeError, ValidationError
from .error_feedback import InputMoments, Products, draw_with_feedback
from .kernels.protocol import Extremes, Kernels, RandomDraw
from .layout import Layout
from .parts import Part, parts
from .schemes import Blocks, Checked, Codes, Grid, Margins, Scheme
from .schemes.grid import absmax_of, largest

POLICIES = ("unbiased", "topk", "none")

STRIP = 1 << 18  # values that are counted at a time

FED = 1 << 21  # weights that are drawn with error feedback at a time

OnProducts = tuple[float | None, float | None]  # gain and product error of a tensor

NO_PRODUCTS: OnProducts = None, None

TINY = float(np.finfo(np.float32).tiny)

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Policy:
    """How it is chosen which weights flip to the neighbouring level.

    Parameters
    ----------
    name : "unbiased", a weight takes the neighbouring level with the probability that makes its
        expected value the weight itself; "topk", the weights of every block with the largest errors
        flip: Algorithm 1 of FlipGuard (arXiv 2606.28962); or "none", all are rounded to nearest
    tau : unbiased: only weights whose margin is below tau are drawn, 0 < tau <= 1, in half-gaps
    ratio : topk: the share of every block that flips, 0 < ratio <= 1

    Raises
    ------
    SchemeError : the name is unknown, or a number out of bounds
    """

    name: str = "unbiased"
    tau: float = 1.0
    ratio: float = 0.1

    def __post_init__(self) -> None:
        if self.name not in POLICIES:
            raise SchemeError(
                "policy {found!r} is unknown", found=self.name, allowed=", ".join(POLICIES)
            )
        for option in ("tau", "ratio"):
            value = getattr(self, option)
            if not 0 < value <= 1:
                raise SchemeError(f"{option} is {{found}}", found=value, allowed="above 0, up to 1")


@dataclass(frozen=True)
class QuantizedTensor:
    """One tensor, guarded. Arrays [n] are flat, rows of output channels one after the other.

    Parameters
    ----------
    grid : the levels
    nearest : int8, the codes of rounding to the nearest level
    codes : int8, the guarded codes
    drawn : the weights in their own type as they were drawn: as they are, except where the
        quantizer's grid would have clipped some
    guarded : the weights, moved so that the scheme's quantizer yields `codes`, whichever way it
        rounds what lies on a boundary; None if they are not wanted
    gain : squared error of the products with error feedback / without; None if it was not tried
    product_error : see `Products.error`; None without inputs
    """

    grid: Grid
    nearest: Codes
    codes: Codes
    drawn: npt.NDArray[Any] | None
    guarded: npt.NDArray[Any] | None
    gain: float | None = None
    product_error: float | None = None

    @property
    def furthest(self) -> int:
        """By how many levels codes differ from the nearest ones at most."""
        return max(int(np.max(np.abs(steps))) for steps in self._steps())

    @property
    def count(self) -> int:
        """How many weights flipped."""
        return sum(int(np.count_nonzero(steps)) for steps in self._steps())

    def part(self, part: Part) -> "QuantizedTensor":
        """A part of it; the arrays are views."""
        return QuantizedTensor(
            self.grid.part(part.block_numbers, part.blocks),
            self.nearest[part.weights],
            self.codes[part.weights],
            None if self.drawn is None else self.drawn[part.weights],
            None if self.guarded is None else self.guarded[part.weights],
        )

    def _steps(self) -> Iterator[npt.NDArray[np.int16]]:
        for start in range(0, self.codes.size, STRIP):
            some = slice(start, start + STRIP)
            yield np.subtract(self.codes[some], self.nearest[some], dtype=np.int16)


def tensor_key(seed: int, name: str) -> np.uint64:
    """Key of the random stream of one tensor: depends on the seed and the name, nothing else."""
    sequence = np.random.SeedSequence(seed, spawn_key=tuple(name.encode()))
    return np.uint64(sequence.generate_state(1, np.uint64)[0])


def quantize_tensor(
    name: str,
    values: npt.NDArray[Any],
    scheme: Scheme,
    blocks: Blocks,
    policy: Policy,
    key: np.uint64,
    kernels: Kernels,
    inputs: InputMoments | None = None,
    *,
    moved: bool = True,
    first: int = 0,
    extremes: Extremes | None = None,
) -> QuantizedTensor:
    """Guard one tensor, or a part of one.

    Without `inputs`, parts of a tensor can be guarded one by one, in any order, with the same
    result as the whole.

    Parameters
    ----------
    name : of the tensor, for messages
    values : flat weights in their storage type, [blocks.rows * blocks.cols]
    key : of the tensor's random stream, see `tensor_key`
    inputs : what the tensor is multiplied with. The policy "unbiased" then also draws with error
        feedback, and keeps that draw if it changes the tensor's products less.
    moved : whether weights are wanted that the scheme's quantizer turns into the codes. If so, its
        grid is used, else one that clips no weight
    first : of a part, the number of its first weight in the tensor
    extremes : of a part of a block, the extremes of the whole block; by default those of `values`

    Raises
    ------
    ModelError : some values are not `sound`
    ValidationError : an invariant of the guard does not hold for this tensor
    """
    found = blocks.extremes(values, kernels)
    whole = extremes or found
    if not sound(np.concatenate([*found, *whole]), values.dtype).all():
        raise unsound(name, values)
    random = RandomDraw(key, np.uint64(first), np.float32((1 - policy.tau) / 2))
    if policy.name == "unbiased" and not moved:
        grid = scheme.unclipped(whole, blocks, values.dtype)
        nearest, codes, on_products = _draw(values, values, grid, inputs, random, kernels)
        require_finite(name, grid, codes, whole, values.dtype)
        return QuantizedTensor(grid, nearest, codes, values, None, *on_products)
    drawn, on_products = values, NO_PRODUCTS
    if policy.name == "unbiased":
        ends = random._replace(key=~key)
        if extremes:  # the same for all parts of the block
            ends = ends._replace(first=np.uint64(0))
        drawn, whole = scheme.without_clipping(values, blocks, whole, ends)
        if drawn is not values:
            found = blocks.extremes(drawn, kernels)
    grid = scheme.over(drawn, whole, blocks, values.dtype)
    if policy.name == "none":
        nearest = grid.encode(values, kernels)
        return QuantizedTensor(grid, nearest, nearest, values, values)
    margins = grid.analyze(drawn, kernels)
    nearest = margins.codes
    if policy.name == "topk":
        wanted = np.where(_topk(grid, margins, policy.ratio), margins.neighbours, nearest)
    else:
        _, wanted, on_products = _draw(values, drawn, grid, inputs, random, kernels)
    guarded, codes = grid.move_weights(drawn, margins, wanted, kernels)
    checked = grid.check(drawn, guarded, margins, codes, kernels)
    require_invariants(name, checked, scheme, grid, values.dtype, found, whole)
    if policy.name == "unbiased":
        require_finite(name, grid, codes, whole, values.dtype)
    return QuantizedTensor(grid, nearest, codes, drawn, guarded, *on_products)


def _draw(
    values: npt.NDArray[Any],
    drawn: npt.NDArray[Any],
    grid: Grid,
    inputs: InputMoments | None,
    random: RandomDraw,
    kernels: Kernels,
) -> tuple[Codes, Codes, OnProducts]:
    """Nearest codes, drawn codes, and what these do to the products: gain and relative error.

    Codes are drawn for the weights `drawn`, which have `values` as their mean. Error feedback is
    used where it gains something.
    """
    nearest, codes = grid.draw(drawn, random, kernels)
    if not inputs:
        return nearest, codes, NO_PRODUCTS
    groups, _, columns = inputs.fresh.shape
    rows = Layout((values.size // columns, columns), (0,))
    fed, found = np.empty_like(codes), []
    for part in parts(rows, grid.blocks, FED if groups == 1 else values.size):
        here, of_part = part.weights, grid.part(part.block_numbers, part.blocks)
        first = random._replace(first=random.first + np.uint64(here.start))
        fed[here] = draw_with_feedback(drawn[here], of_part, inputs, first, kernels)
        weights = values[here].astype(np.float32, copy=False)
        errors = (weights - of_part.decode(some[here]) for some in (codes, fed))
        found.append([inputs.products(each) for each in (weights, *errors)])
    whole, before, after = map(Products.joined, zip(*found, strict=True))
    gain = after.power / max(before.power, TINY)
    helps = gain < 1
    error = whole.error(after if helps else before)
    return nearest, fed if helps else codes, (gain if math.isfinite(gain) else None, error)


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


def unsound(name: str, values: npt.NDArray[Any]) -> ModelError:
    """The error for a tensor of any layout that holds values that are not `sound`."""
    flat = values.reshape(-1)
    count = sum(
        int(np.count_nonzero(~sound(flat[start : start + STRIP], values.dtype)))
        for start in range(0, flat.size, STRIP)
    )
    return ModelError(
        "tensor {tensor!r} holds {found} values that are NaN or infinite, or beyond {bound:.4g}",
        tensor=name,
        found=count,
        bound=float(largest_sound(values.dtype)),
        allowed="others (--exclude leaves a tensor as it is)",
    )


def _topk(grid: Grid, margins: Margins, ratio: float) -> Mask:
    """The floor(ratio * n) weights with the largest errors of every block of n.

    Of equal errors, the first ones count.
    """
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


def require_finite(
    name: str, grid: Grid, codes: Codes, extremes: Extremes, storage: np.dtype[Any]
) -> None:
    """Require that drawn levels are numbers of the weights' type.

    Where levels are far apart, the one beyond a weight may be twice as large as the weight.

    Parameters
    ----------
    extremes : of every block

    Raises
    ------
    ValidationError : a level overflows that type
    """
    bound = largest(storage)
    if absmax_of(extremes).max(initial=0) < bound / 4:
        return
    with np.errstate(over="ignore"):
        lost = int(np.count_nonzero(np.abs(grid.decode(codes)) > bound))
    if lost:
        raise ValidationError(
            "tensor {tensor!r}: {found} weights would get levels beyond {bound:.4g}, the largest "
            "number of their type",
            tensor=name,
            found=lost,
            bound=bound,
            allowed="smaller weights (--exclude leaves a tensor as it is)",
        )


def require_invariants(
    name: str,
    checked: Checked,
    scheme: Scheme,
    grid: Grid,
    storage: np.dtype[Any],
    before: Extremes,
    whole: Extremes,
) -> None:
    """Require what holds for every guarded tensor; checked in every run.

    Parameters
    ----------
    checked : what was found when the moved weights were read again
    before : the extremes of these weights before they were moved
    whole : those of the whole blocks, where the weights are only a part of one

    Raises
    ------
    ValidationError : the grid has moved, a weight does not encode to its code, or one that was not
        selected has changed
    """
    low, high = checked.extremes
    low = np.where(before.lowest == whole.lowest, low, np.minimum(low, whole.lowest))
    high = np.where(before.highest == whole.highest, high, np.maximum(high, whole.highest))
    if not scheme.grid(Extremes(low, high), grid.blocks, storage).same_as(grid):
        raise ValidationError(
            "tensor {tensor!r}: the flips moved the grid; scales must stay", tensor=name
        )
    if checked.wrong:
        raise ValidationError(
            "tensor {tensor!r}: guarded weights do not encode to their codes", tensor=name
        )
    if checked.moved:
        raise ValidationError(
            "tensor {tensor!r}: a weight that was not selected has changed", tensor=name
        )
