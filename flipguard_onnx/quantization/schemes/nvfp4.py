"""4-bit floats in small blocks (nvfp4): level = codebook[code] * (float8e4m3fn * one float32).

Elements are E2M1, as those of mxfp4, in blocks of 16. A block's scale is a float8e4m3fn in units of
the tensor's, which is set so that the largest block gets 448, the largest of them.
Source: `NVFP4QTensor` of nvidia-modelopt 0.47, in float32.
"""

from dataclasses import dataclass, replace
from typing import Any, Self

import ml_dtypes
import numpy as np
import numpy.typing as npt

from ...formats import Choice
from ..kernels import scalar
from ..kernels.protocol import Extremes, RandomDraw, Scales
from .blocks import Blocks, Floats, Values
from .codebook import Codebook, CodebookGrid
from .float8 import LARGEST, LEVELS
from .grid import absmax_of
from .microscaling import drawn_extremes, e2m1

HIGHEST = 6  # of the levels

BLOCK_SCALES = LEVELS[1:]  # all floats above 0

SLACK = 1 + 2.0**-20  # of the last level: weights up to there count as on it, see `not_below`

SMALLEST_MOVED = 5  # of a type's smallest numbers: a scale from which no weight is moved to 0


@dataclass(frozen=True)
class NvFloat4(Codebook):
    """E2M1 codes, a scale of 8 bits for each block, and one for the tensor.

    Parameters
    ----------
    absmax : the largest magnitude of the tensor, of which blocks may be only some; None where they
        are all
    """

    absmax: np.float32 | None = None

    @property
    def scales_tensor(self) -> bool:
        return True

    def within(self, whole: Extremes) -> Self:
        return replace(self, absmax=absmax_of(whole).max())

    def grid(self, extremes: Extremes, blocks: Blocks, storage: np.dtype[Any]) -> CodebookGrid:
        """absmax / 2688 for the tensor; for each block absmax / (6 * that), rounded to 8 bits.

        Blocks of zeros get 1. Below 2^-9 blocks all get 2^-9, and then no weight sets the scale.
        """
        absmax, whole = absmax_of(extremes), self._whole(extremes)
        tensor_scale = whole / np.float32(HIGHEST * LARGEST)
        used = (absmax > 0) & (tensor_scale > 0)
        tensor_scale = tensor_scale or np.float32(1)
        exact = absmax / (np.float32(HIGHEST) * tensor_scale)
        exact = np.where(used, np.clip(exact, BLOCK_SCALES[0], LARGEST), np.float32(1))
        scale = exact.astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * tensor_scale
        fixed = absmax > HIGHEST * (BLOCK_SCALES[0] * np.float64(tensor_scale))
        smallest = ml_dtypes.finfo(storage).smallest_subnormal  # type: ignore[no-untyped-call]
        fixed |= scale < SMALLEST_MOVED * float(smallest)
        limits = np.where(fixed, absmax, np.float32(np.inf))
        return self._on(blocks, tensor_scale, scale, np.where(used, limits, np.float32(0)))

    def unclipped(self, extremes: Extremes, blocks: Blocks, storage: np.dtype[Any]) -> CodebookGrid:
        """The smallest scales of blocks that clip no weight; none sets one alone."""
        absmax = absmax_of(extremes)
        smallest = np.finfo(np.float32).tiny  # of those that are not subnormal
        tensor_scale = max(self._whole(extremes) / np.float32(HIGHEST * LARGEST), smallest)
        scales = BLOCK_SCALES * tensor_scale
        reach = HIGHEST * SLACK * scales.astype(np.float64)
        scale = scales[np.searchsorted(reach, absmax)]
        free = np.where(absmax > 0, np.float32(np.inf), np.float32(0))
        return self._on(blocks, tensor_scale, scale, free)

    def without_clipping(
        self, values: Values, blocks: Blocks, extremes: Extremes, random: RandomDraw
    ) -> tuple[Values, Extremes]:
        """In every block the extreme becomes the last level of one of the two scales around it.

        See `drawn_extremes`. That of the tensor, which sets its scale, stays; it is a level.
        """
        absmax, whole = absmax_of(extremes).astype(np.float64), self._whole(extremes)
        tensor_scale = self.grid(extremes, blocks, values.dtype).tensor_scale
        ends = np.minimum(HIGHEST * (BLOCK_SCALES * tensor_scale).astype(np.float64), whole)
        step = np.clip(np.searchsorted(ends, absmax, side="right"), 1, len(ends) - 1)
        return drawn_extremes(values, blocks, extremes, random, ends[step - 1], ends[step])

    def _whole(self, extremes: Extremes) -> np.float32:
        """The largest magnitude of the tensor."""
        found: np.float32 = absmax_of(extremes).max() if self.absmax is None else self.absmax
        return found

    def _on(
        self, blocks: Blocks, tensor_scale: np.float32, scale: Floats, limits: npt.NDArray[Any]
    ) -> CodebookGrid:
        """The grid with these scales, in which weights below these limits may move."""
        scales = Scales(scale, scale, np.zeros_like(scale), -limits, limits)
        levels = self.table()._replace(rule=scalar.DIVIDE_AND_COUNT)
        return CodebookGrid(blocks, scales, levels, tensor_scale)


def nvfp4(choice: Choice) -> NvFloat4:
    """The scheme of a choice with every default written out."""
    return NvFloat4(choice, 4, *e2m1(to_even=True), None)
