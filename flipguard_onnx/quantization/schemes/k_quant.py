"""k_quant: 4 or 8 bits with zero points; scale and zero point of a block are searched for.

Source: `quant_tensor_k_quant_cpu` in onnxruntime.quantization.neural_compressor.weight_only, which
onnxruntime-genai and Olive call k_quant; equal to it bit for bit, the order of its sums included.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from ...formats import FORMATS, Choice
from ..kernels import scalar
from ..kernels.protocol import Extremes, Kernels, Scales
from .affine import AffineGrid, MinMax
from .blocks import Blocks, Codes, Floats, Values

TRIED = 20  # scales, from one step fewer than the codes have to almost one more

CHUNK = 1 << 15  # weights that are searched for at a time, so that they stay in the cache


@dataclass(frozen=True)
class SearchedGrid(AffineGrid):
    """Weights are divided in float64 by the scale in float32, also where the file has 16 bits."""

    def encode(self, values: Values, kernels: Kernels) -> Codes:
        """Half to even once the zero point is added; see `Grid.encode`."""
        blocks, lowest = self.blocks, np.float64(self.levels.lowest)
        codes = np.empty(values.size, np.int8)
        step = max(CHUNK // blocks.cols, 1)
        for row in range(0, blocks.rows, step):
            some = Blocks(min(step, blocks.rows - row), blocks.cols, blocks.size)
            numbers = slice(row * blocks.per_row, (row + some.rows) * blocks.per_row)
            part = slice(row * blocks.cols, (row + some.rows) * blocks.cols)
            scale, zero = (
                some.spread(each[numbers]).astype(np.float64)
                for each in (self.scales.operand, self.zero)
            )
            with np.errstate(divide="ignore", invalid="ignore"):
                place = values[part].astype(np.float64) / scale + (zero - lowest)
            code = np.rint(np.nan_to_num(place)) + lowest
            codes[part] = np.clip(code, lowest, self.levels.highest)
        return codes


@dataclass(frozen=True)
class KQuant(MinMax):
    """Codes are drawn on the grid of `MinMax.unclipped`.

    It has the smallest scale with which a zero point clips no weight, and so the smallest errors:
    the one that was searched for clips, and with its zero point the scale could only be larger.
    """

    grid_type = SearchedGrid

    def over(
        self, values: Values, extremes: Extremes, blocks: Blocks, storage: np.dtype[Any]
    ) -> SearchedGrid:
        """The grid that is found, which depends on all weights of a block.

        A row is filled up with zeros to whole blocks, which count like weights.
        """
        assert self.block_size
        found = [_searched(each, self.steps) for each in _whole(values, blocks, self.block_size)]
        scale, least = (np.concatenate(each) for each in zip(*found, strict=True))
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            zero = np.nan_to_num(np.clip(np.rint(-least / scale), 0, self.steps)) + self.lowest
            stored = scale.astype(storage).astype(np.float32)
        limits = np.minimum(extremes.lowest, 0), np.maximum(extremes.highest, 0)
        scales = Scales(scale, stored, zero.astype(np.float32), *limits)
        return SearchedGrid(blocks, scales, self.levels(self.rule))


def k_quant(choice: Choice) -> KQuant:
    """The scheme of a choice with every default written out."""
    bits = FORMATS[choice.name].bits
    half = 1 << bits - 1
    rule, steps = scalar.DIVIDE_HALF_EVEN, 2 * half - 1
    return KQuant(choice, bits, -half, half - 1, rule, exactly=False, steps=steps)


def _whole(values: Values, blocks: Blocks, size: int) -> Iterator[Floats]:
    """Blocks of `size` weights in float32, [blocks, size], a chunk of rows at a time.

    Rows of one block lie in the memory as columns, since onnxruntime has them so: then numpy adds
    the weights of a block one after the other, else in pairs. A single row is no column.
    """
    per_row = -(-blocks.cols // size)
    rows = values.reshape(blocks.rows, blocks.cols)
    step = max(CHUNK // blocks.cols, 2)
    starts = [*range(0, max(blocks.rows - 1, 1), step), blocks.rows]
    for start, stop in pairwise(starts):
        some = rows[start:stop].astype(np.float32)
        whole = np.pad(some, ((0, 0), (0, per_row * size - blocks.cols)))
        yield np.asfortranarray(whole) if per_row == 1 else whole.reshape(-1, size)


def _searched(weights: Floats, steps: int) -> tuple[Floats, Floats]:
    """Scale and the weight that the lowest code stands for, of every block.

    From the range of the weights on, codes are made with another scale in turn. The line through
    the weights over their codes, by least squares, gives scale and lowest weight; each line that
    leaves a smaller error than the last one kept is kept. Larger weights count more.
    """
    size = weights.shape[1]
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        norm = np.sqrt(_sum(weights * weights) / np.float32(size))
        importance = norm + np.abs(weights)
        total, moment = _sum(importance), _sum(importance * weights)
        least, most = weights.min(axis=1, keepdims=True), weights.max(axis=1, keepdims=True)

        def codes(factor: np.float32) -> Floats:
            inverse = np.where(least != most, factor / (most - least), np.float32(1))
            found: Floats = np.clip(np.rint(inverse * (weights - least)), 0, np.float32(steps))
            return found

        def error(scale: Values, least: Values, codes: Floats) -> Floats:
            missed = scale * codes + least - weights
            return _sum(importance * (missed * missed))

        span = np.where(least != most, most - least, np.float32(1))
        scale: Floats = np.where(least != most, 1 / (np.float32(steps) / span), np.float32(1))
        smallest = error(scale, least, codes(np.float32(steps)))
        for tried in range(TRIED):
            chosen = codes(np.float32(-1 + 0.1 * tried + steps))
            weighted = importance * chosen
            first, second = _sum(weighted), _sum(weighted * chosen)
            cross = _sum(weighted * weights)
            determinant = total * second - first * first
            slope = (total * cross - moment * first) / determinant
            intercept = (second * moment - first * cross) / determinant
            left = error(slope, intercept, chosen)
            better = left < smallest
            for kept, found in ((smallest, left), (scale, slope), (least, intercept)):
                np.copyto(kept, found, where=better)
    return scale[:, 0], least[:, 0]


def _sum(values: Floats) -> Floats:
    """Of every row, in numpy's order."""
    found: Floats = np.sum(values, axis=1, keepdims=True)
    return found
