"""A tensor cut into parts of whole rows and whole blocks."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import gcd, prod

import numpy as np

from .layout import Layout
from .schemes import Blocks


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


def parts(layout: Layout, blocks: Blocks, size: int) -> Iterator[Part]:
    """Divide a tensor into parts of about `size` weights, each of whole rows and whole blocks.

    A single block, one scale for the tensor, is divided as well. A tensor of no more than `size`
    weights is one part.
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
    step = dims[axis] if dims[axis] * each <= size else max(size // each // unit, 1) * unit
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
