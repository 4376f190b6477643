"""A tensor part by part, so that memory is needed for one part only (and for the result).

Rows (or blocks that run across rows) do not depend on each other, and the random stream is numbered
by weight: the parts together give what the whole would give.
"""

from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from ..errors import ModelError
from .arrays import assign, contiguous
from .error_feedback import InputMoments
from .kernels import get_backend, max_threads, side_by_side
from .kernels.protocol import Extremes, Kernels
from .layout import Layout
from .parts import Part, parts
from .rounding import Policy, QuantizedTensor, quantize_tensor, sound, unsound
from .schemes import Blocks, Grid, Scheme
from .schemes.blocks import Values

PART_SIZE = 1 << 21  # weights that all threads together work on at a time

Result = TypeVar("Result")


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
    "topk"), it is taken as a whole, and then inspected part by part.

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
    threads = max_threads(kernels)
    cut = list(parts(layout, blocks, part_size // threads))

    def quantize(part: Part, extremes: Extremes | None = None) -> tuple[Values, QuantizedTensor]:
        flat = contiguous(values[part.index]).reshape(-1)
        try:
            return flat, quantize_tensor(
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

    def inspect(work: Callable[[Part], tuple[Any, Result]]) -> list[Result]:
        """What `work` returns for every part, besides what `inspect_part` does."""
        found = []
        with closing(side_by_side(work, cut, threads)) as results:
            for part, (inspected, result) in zip(cut, results, strict=True):
                on_part_done(part.blocks.rows * part.blocks.cols * values.itemsize, inspected)
                found.append(result)
        return found

    if inputs or (policy.name == "topk" and blocks.count == 1):
        (whole,) = parts(layout, blocks, layout.size)
        flat, quantized = quantize(whole)
        inspect(lambda part: (inspect_part(flat[part.weights], quantized.part(part)), None))
        return replace(quantized, drawn=None)

    extremes = None
    if len(cut) > 1 and (blocks.count == 1 or scheme.scales_tensor):
        whole_tensor = Blocks(1, layout.size, layout.size).extremes(array.reshape(-1), kernels)
        if not sound(np.concatenate(whole_tensor), values.dtype).all():
            raise unsound(name, array)
        scheme = scheme.within(whole_tensor)
        extremes = whole_tensor if blocks.count == 1 else None
    nearest, codes = np.empty(layout.size, np.int8), np.empty(layout.size, np.int8)
    moved = np.empty(layout.size, values.dtype) if keep_moved else None

    def quantize_part(part: Part) -> tuple[Any, Grid]:
        flat, quantized = quantize(part, extremes)
        nearest[part.weights], codes[part.weights] = quantized.nearest, quantized.codes
        if moved is not None:
            moved[part.weights] = quantized.guarded
        return inspect_part(flat, quantized), quantized.grid

    grids = inspect(quantize_part)[: blocks.count]  # parts of one block all have the same grid
    return QuantizedTensor(Grid.joined(grids, blocks), nearest, codes, None, moved)


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
        assign(piece, values(quantized.part(part)).reshape(piece.shape))

    cut = list(parts(layout, quantized.grid.blocks, part_size // threads))
    list(side_by_side(fill, cut, threads))
    return result
