"""A tensor part by part, so that memory is needed for one part only (and for the result).

Rows (or blocks that run across rows) do not depend on each other, and the random stream is numbered
by weight: the parts together give what the whole would give.
"""

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from math import gcd, prod
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import ModelError
from .arrays import assign, contiguous
from .error_feedback import InputMoments
from .kernels import get_backend, max_threads, side_by_side
from .kernels.protocol import Kernels
from .layout import Layout
from .rounding import NO_PRODUCTS, OnProducts, Policy, QuantizedTensor, quantize_tensor, unsound
from .schemes import Blocks, Grid, Scheme

PART_SIZE = 1 << 21  # weights that all threads together work on at a time


@dataclass(frozen=True)
class Part:
    """Some of a tensor's weights.

    index: where they are in the array whose axes are in canonical order. weights, block_numbers:
    where they and their scales are in flat arrays. blocks: how they are cut.
    """

    index: tuple[int | slice, ...]
    weights: slice
    block_numbers: slice
    blocks: Blocks

    def extract(self, whole: QuantizedTensor) -> QuantizedTensor:
        """This part of a quantized tensor; the arrays are views."""
        return QuantizedTensor(
            whole.grid.part(self.block_numbers, self.blocks),
            whole.nearest[self.weights],
            whole.codes[self.weights],
            None,
            None if whole.guarded is None else whole.guarded[self.weights],
        )


def parts(layout: Layout, blocks: Blocks, size: int) -> Iterator[Part]:
    """Divide a tensor into parts of about `size` weights, each of whole rows and whole blocks.

    A single block, one scale for the tensor, is divided as well.
    """
    dims = layout.canonical_shape
    across = blocks.rows == 1 < blocks.count  # blocks run on from one position to the next
    axis = 0  # the one that is cut up; of those before it every position is taken in turn
    while axis + 1 < len(layout.rows) and (each := prod(dims[axis + 1 :])) > size:
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


def quantize_weight(
    name: str,
    array: npt.NDArray[Any],
    layout: Layout,
    scheme: Scheme,
    blocks: Blocks,
    policy: Policy,
    key: np.uint64,
    kernels: Kernels,
    *,
    inputs: InputMoments | None = None,
    keep_moved: bool = True,
    inspect_part: Callable[[npt.NDArray[Any], QuantizedTensor], Any] = lambda *_: None,
    on_part_done: Callable[[int, Any], None] = lambda *_: None,
    part_size: int = PART_SIZE,
) -> QuantizedTensor:
    """`quantize_tensor` for a tensor as it is stored, part by part.

    With error feedback, and where weights of one block for the whole tensor compete (policy
    "topk"), it is taken as a whole.

    Parameters
    ----------
    array : the tensor as it is stored, of shape `layout.shape`
    blocks : how its canonical matrix is cut
    keep_moved : whether moved weights are wanted, see `quantize_tensor`
    inspect_part : called with the flat weights of every part and the result for them, for several
        parts at a time
    on_part_done : called for every part in order, with its size in bytes and what `inspect_part`
        returned
    part_size : weights that all threads together work on at a time

    Raises
    ------
    ModelError : the tensor holds values that are not finite, or too large
    ValidationError : an invariant of the guard does not hold for this tensor
    """
    values = array.transpose(layout.perm)
    size = part_size // max_threads(kernels)
    if inputs or (policy.name == "topk" and blocks.count == 1):
        size = layout.size
    extremes = None
    if blocks.count == 1 and size < layout.size:
        whole_block = Blocks(1, layout.size, layout.size)
        extremes = whole_block.extremes(array.reshape(-1), kernels)
    nearest, codes = np.empty(layout.size, np.int8), np.empty(layout.size, np.int8)
    moved = np.empty(layout.size, values.dtype) if keep_moved else None

    def quantize_part(part: Part) -> tuple[Grid, OnProducts, Any]:
        flat = contiguous(values[part.index]).reshape(-1)
        try:
            quantized = quantize_tensor(
                name,
                flat,
                scheme,
                part.blocks,
                policy,
                key,
                kernels,
                inputs,
                moved=keep_moved,
                first=part.weights.start,
                extremes=extremes,
            )
        except ModelError:
            raise unsound(name, array) from None  # with the count of the whole tensor
        nearest[part.weights], codes[part.weights] = quantized.nearest, quantized.codes
        if moved is not None:
            moved[part.weights] = quantized.guarded
        on_products = quantized.gain, quantized.product_error
        return quantized.grid, on_products, inspect_part(flat, quantized)

    grids, on_products = [], NO_PRODUCTS
    cut = list(parts(layout, blocks, size))
    with closing(side_by_side(quantize_part, cut, max_threads(kernels))) as results:
        for part, (grid, on_products, inspected) in zip(cut, results, strict=True):  # noqa: B007
            on_part_done(part.blocks.rows * part.blocks.cols * values.itemsize, inspected)
            grids.append(grid)
    grids = grids[: blocks.count]  # parts of one block all have the same grid
    return QuantizedTensor(Grid.joined(grids, blocks), nearest, codes, None, moved, *on_products)


def stored_values(
    layout: Layout,
    quantized: QuantizedTensor,
    values: Callable[[QuantizedTensor], npt.NDArray[Any]],
    dtype: np.dtype[Any],
    *,
    part_size: int = PART_SIZE,
) -> npt.NDArray[Any]:
    """What `values` makes of every part, put together to the tensor as it is stored."""
    result = np.empty(layout.shape, dtype)
    canonical = result.transpose(layout.perm)
    threads = max_threads(get_backend("cpu"))

    def fill(part: Part) -> None:
        piece = canonical[part.index]
        assign(piece, values(part.extract(quantized)).reshape(piece.shape))

    cut = list(parts(layout, quantized.grid.blocks, part_size // threads))
    list(side_by_side(fill, cut, threads))
    return result
