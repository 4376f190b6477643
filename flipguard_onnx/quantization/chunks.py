"""A tensor piece by piece: what `flip` needs of memory per weight, it needs for one part only.

Rows (or blocks that run across rows) know nothing of each other, and the draws are numbered by
weight: the parts together are what the whole would be.
"""

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from math import gcd, prod
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from ..errors import ModelError
from ..graph.weights import Weight
from ..io.model import Model
from .arrays import assign, contiguous
from .error_feedback import InputMoments
from .kernels import get_backend, side_by_side, threads
from .rounding import Policy, QuantizedTensor, flip, largest_sound, sound
from .schemes import Blocks, Grid, Scheme

PART = 1 << 21  # weights, in the hands of all threads together

PER_BLOCK = ("scale", "operand", "absmax")  # the arrays of a Grid


@dataclass(frozen=True)
class Part:
    """Some of a tensor's weights.

    index: where they are in the array whose axes are in canonical order; weights, blocks: where in
    the flat arrays; cut: how they are cut into blocks.
    """

    index: tuple[int | slice, ...]
    weights: slice
    blocks: slice
    cut: Blocks

    def of(self, flips: QuantizedTensor) -> QuantizedTensor:
        """What was found for this part; the arrays are views."""
        per_block: dict[str, Any] = {
            name: getattr(flips.grid, name)[self.blocks] for name in PER_BLOCK
        }
        return QuantizedTensor(
            replace(flips.grid, blocks=self.cut, **per_block),
            flips.plain[self.weights],
            flips.codes[self.weights],
            None if flips.guarded is None else flips.guarded[self.weights],
        )


def parts(weight: Weight, blocks: Blocks, size: int) -> Iterator[Part]:
    """The weight in parts of about `size` weights, each of whole rows and whole blocks.

    A single block, one scale for the tensor, is cut as well.
    """
    dims = [weight.shape[axis] for axis in weight.perm]
    across = blocks.rows == 1 < blocks.count  # blocks run on from one position to the next
    axis = 0  # the one that is cut up; of those before it every position is taken in turn
    while axis + 1 < len(weight.rows) and (each := prod(dims[axis + 1 :])) > size:
        if across and each % blocks.size:
            break
        axis += 1
    each = prod(dims[axis + 1 :])
    unit = blocks.size // gcd(each, blocks.size) if across else 1
    step = max(size // each // unit, 1) * unit
    done, done_blocks = 0, 0
    for lead in np.ndindex(*dims[:axis]):
        for start in range(0, dims[axis], step):
            index = slice(start, min(start + step, dims[axis]))
            count = (index.stop - index.start) * each
            cut = Blocks(1, count, min(blocks.size, count))
            if blocks.rows > 1:
                cut = Blocks(count // blocks.cols, blocks.cols, blocks.size)
            weights = slice(done, done := done + count)
            numbers = slice(done_blocks, done_blocks + cut.count)
            if blocks.count > 1:
                done_blocks = numbers.stop
            yield Part((*lead, index), weights, numbers, cut)


def flip_weight(
    source: Model,
    weight: Weight,
    scheme: Scheme,
    blocks: Blocks,
    policy: Policy,
    key: np.uint64,
    backend: ModuleType,
    inputs: InputMoments | None = None,
    moved: bool = True,
    look: Callable[[npt.NDArray[Any], QuantizedTensor], Any] = lambda *_: None,
    done: Callable[[int, Any], None] = lambda *_: None,
) -> QuantizedTensor:
    """`flip` for a weight of the model, part by part; as a whole with error feedback, and where
    weights of one block compete for it.

    moved: whether the result is to have the moved weights. look: called for every part with its
    weights and what became of them, for several at a time. done: called for every part in turn with
    its bytes and what `look` returned.

    Raises ModelError when the tensor holds values that are not finite.
    """
    array = source.array(weight.tensor)
    values = array.transpose(weight.perm)
    size = PART // threads(backend)
    if inputs or (policy.name == "topk" and blocks.count == 1):
        size = weight.size
    extremes = None
    if blocks.count == 1 and size < weight.size:
        extremes = Blocks(1, weight.size, weight.size).extremes(array.reshape(-1), backend)
    plain, codes = np.empty(weight.size, np.int8), np.empty(weight.size, np.int8)
    placed = np.empty(weight.size, values.dtype) if moved else None

    def one(part: Part) -> tuple[Grid, float | None, Any]:
        found = contiguous(values[part.index]).reshape(-1)
        how = scheme, part.cut, policy, key, backend, inputs
        try:
            flips = flip(weight.name, found, *how, first=part.weights.start, extremes=extremes)
        except ModelError:
            refuse(source.path, weight, blocks, values)
        plain[part.weights], codes[part.weights] = flips.plain, flips.codes
        if placed is not None:
            placed[part.weights] = flips.guarded
        return flips.grid, flips.gain, look(found, flips)

    grids, gains = [], []
    cut = list(parts(weight, blocks, size))
    with closing(side_by_side(one, cut, backend)) as results:
        for part, (grid, gain, seen) in zip(cut, results, strict=True):
            done(part.cut.rows * part.cut.cols * values.itemsize, seen)
            grids.append(grid)
            gains.append(gain)
    grids = grids[: blocks.count]  # of parts of one block, all are the same
    per_block: dict[str, Any] = {
        name: np.concatenate([getattr(g, name) for g in grids]) for name in PER_BLOCK
    }
    return QuantizedTensor(
        replace(grids[0], blocks=blocks, **per_block), plain, codes, placed, gains[-1]
    )


def stored(
    weight: Weight,
    flips: QuantizedTensor,
    values: Callable[[QuantizedTensor], npt.NDArray[Any]],
    dtype: np.dtype[Any],
) -> npt.NDArray[Any]:
    """What `values` makes of every part, in the layout in which the tensor is stored."""
    result = np.empty(weight.shape, dtype)
    turned = result.transpose(weight.perm)
    backend = get_backend("cpu")

    def one(part: Part) -> None:
        piece = turned[part.index]
        assign(piece, values(part.of(flips)).reshape(piece.shape))

    cut = list(parts(weight, flips.grid.blocks, PART // threads(backend)))
    list(side_by_side(one, cut, backend))
    return result


def refuse(path: Path, weight: Weight, blocks: Blocks, values: npt.NDArray[np.generic]) -> NoReturn:
    """Raise ModelError for a tensor, its axes in canonical order, that holds what no grid fits."""
    bad = sum(
        int(np.count_nonzero(~sound(values[part.index], values.dtype)))
        for part in parts(weight, blocks, PART)
    )
    raise ModelError(
        f"{path}: tensor {weight.name!r} holds {bad} values that are NaN or infinite, or "
        f"beyond {largest_sound(values.dtype):.4g}; allowed: others (--exclude leaves a tensor as "
        "it is)"
    )
