"""A tensor piece by piece: what `flip` needs of memory per weight, it needs for one part only.

Rows (or blocks that run across rows) know nothing of each other, and the draws are numbered by
weight: the parts together are what the whole would be.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import gcd, prod
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import ml_dtypes
import numpy as np
import numpy.typing as npt

from .errors import ModelError
from .feedback import Inputs
from .flip import Flips, Policy, flip
from .model import Model, assign, contiguous
from .schemes import Blocks, Scheme
from .weights import Weight

PART = 1 << 21  # weights
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

    def of(self, flips: Flips) -> Flips:
        """What was found for this part; the arrays are views."""
        per_block: dict[str, Any] = {
            name: getattr(flips.grid, name)[self.blocks] for name in PER_BLOCK
        }
        return Flips(
            replace(flips.grid, blocks=self.cut, **per_block),
            flips.plain[self.weights],
            flips.codes[self.weights],
            None if flips.guarded is None else flips.guarded[self.weights],
        )


def parts(weight: Weight, blocks: Blocks, size: int = PART) -> Iterator[Part]:
    """The weight in parts of about `size` weights, each of whole rows and whole blocks."""
    dims = [weight.shape[axis] for axis in weight.perm]
    axis = 0  # the one that is cut up; of those before it every position is taken in turn
    while axis + 1 < len(weight.rows) and (each := prod(dims[axis + 1 :])) > size:
        if blocks.rows == 1 and each % blocks.size:
            break
        axis += 1
    each = prod(dims[axis + 1 :])
    # the blocks of a single long row run on from one position to the next
    unit = blocks.size // gcd(each, blocks.size) if blocks.rows == 1 else 1
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
            numbers = slice(done_blocks, done_blocks := done_blocks + cut.count)
            yield Part((*lead, index), weights, numbers, cut)


def flip_weight(
    source: Model,
    weight: Weight,
    scheme: Scheme,
    blocks: Blocks,
    policy: Policy,
    key: np.uint64,
    backend: ModuleType,
    inputs: Inputs | None = None,
    moved: bool = True,
    done: Callable[[npt.NDArray[Any], Flips], None] = lambda *_: None,
) -> Flips:
    """`flip` for a weight of the model, part by part; with error feedback as a whole.

    moved: whether the result is to have the moved weights. done: called after every part with its
    weights and what became of them.

    Raises ModelError when the tensor holds values that are not finite.
    """
    values = source.array(weight.tensor).transpose(weight.perm)
    plain, codes = np.empty(weight.size, np.int8), np.empty(weight.size, np.int8)
    placed = np.empty(weight.size, values.dtype) if moved else None
    grids, gain = [], None
    for part in parts(weight, blocks, weight.size if inputs else PART):
        found = contiguous(values[part.index]).reshape(-1)
        if not _sound(found).all():
            refuse(source.path, weight, blocks, values)
        first = part.weights.start
        flips = flip(
            weight.name, found, scheme, part.cut, policy, key, backend, inputs, first=first
        )
        plain[part.weights], codes[part.weights] = flips.plain, flips.codes
        if placed is not None:
            placed[part.weights] = flips.guarded
        grids.append(flips.grid)
        gain = flips.gain
        done(found, flips)
    per_block: dict[str, Any] = {
        name: np.concatenate([getattr(g, name) for g in grids]) for name in PER_BLOCK
    }
    return Flips(replace(grids[0], blocks=blocks, **per_block), plain, codes, placed, gain)


def stored(
    weight: Weight, flips: Flips, values: Callable[[Flips], npt.NDArray[Any]], dtype: np.dtype[Any]
) -> npt.NDArray[Any]:
    """What `values` makes of every part, in the layout in which the tensor is stored."""
    result = np.empty(weight.shape, dtype)
    turned = result.transpose(weight.perm)
    for part in parts(weight, flips.grid.blocks):
        piece = turned[part.index]
        assign(piece, values(part.of(flips)).reshape(piece.shape))
    return result


def _sound(values: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Finite, and not so large that a level rounded up from the value would overflow its type."""
    bound = _bound(values.dtype)
    with np.errstate(invalid="ignore"):  # bfloat16 complains of NaN
        sound: npt.NDArray[np.bool_] = (values >= -bound) & (values <= bound)
    return sound


def _bound(dtype: np.dtype[Any]) -> Any:
    kind = ml_dtypes.finfo(dtype)  # type: ignore[no-untyped-call]
    return dtype.type(float(kind.max) * (1 - 2 * float(kind.eps)))


def refuse(path: Path, weight: Weight, blocks: Blocks, values: npt.NDArray[np.generic]) -> NoReturn:
    """Raise ModelError for a tensor, its axes in canonical order, that holds what no grid fits."""
    bad = sum(int(np.count_nonzero(~_sound(values[part.index]))) for part in parts(weight, blocks))
    raise ModelError(
        f"{path}: tensor {weight.name!r} holds {bad} values that are NaN or infinite, or "
        f"beyond {_bound(values.dtype):.4g}; allowed: others (--exclude leaves a tensor as it is)"
    )
