"""k_quant: 4 or 8 bits with zero points; scale and zero point of a block are searched for.

Source: `quant_tensor_k_quant_cpu` in onnxruntime.quantization.neural_compressor.weight_only, which
onnxruntime-genai and Olive call k_quant; equal to it bit for bit, the order of its sums included.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...formats import FORMATS, Choice
from ..kernels import scalar
from ..kernels.protocol import Extremes, Kernels, Scales
from .affine import AffineGrid, MinMax
from .blocks import Blocks, Codes, Floats, Values

TRIED = 20  # scales, from one step fewer than the codes have to almost one more

CHUNK = 1 << 16  # weights that are searched for at a time, so that they stay in the cache

PAIRED, LANES = 128, 8  # numpy adds up longer rows by halves, and this many sums side by side

Sum = Callable[[Floats], Floats]


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
        one_block = blocks.cols <= self.block_size  # per row: onnxruntime has them as columns
        add = _in_turn if one_block and blocks.rows > 1 else _in_pairs
        whole = _whole(values, blocks, self.block_size)
        found = [_searched(each, self.steps, add) for each in whole]
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
    """Blocks of `size` weights in float32, [size, blocks], a chunk of rows at a time."""
    per_row = -(-blocks.cols // size)
    rows = values.reshape(blocks.rows, blocks.cols)
    step = max(CHUNK // blocks.cols, 1)
    for start in range(0, blocks.rows, step):
        some = rows[start : start + step].astype(np.float32)
        whole = np.pad(some, ((0, 0), (0, per_row * size - blocks.cols)))
        yield np.ascontiguousarray(whole.reshape(-1, size).T)


def _searched(weights: Floats, steps: int, add: Sum) -> tuple[Floats, Floats]:
    """Scale and the weight that the lowest code stands for, of every block.

    From the range of the weights on, codes are made with another scale in turn. The line through
    the weights over their codes, by least squares, gives scale and lowest weight; each line that
    leaves a smaller error than the last one kept is kept. Larger weights count more.

    add: sums up the weights of every block, [size, blocks] -> [blocks]
    """
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        norm = np.sqrt(add(weights * weights) / np.float32(len(weights)))
        importance = norm + np.abs(weights)
        total, moment = add(importance), add(importance * weights)
        least, most = weights.min(axis=0), weights.max(axis=0)

        def codes(factor: np.float32) -> Floats:
            inverse = np.where(least != most, factor / (most - least), np.float32(1))
            found: Floats = weights - least
            found *= inverse
            return np.clip(np.rint(found, out=found), 0, np.float32(steps), out=found)

        def error(scale: Values, least: Values, codes: Floats) -> Floats:
            missed = scale * codes
            missed += least
            missed -= weights
            missed *= missed
            missed *= importance
            return add(missed)

        span = np.where(least != most, most - least, np.float32(1))
        scale: Floats = np.where(least != most, 1 / (np.float32(steps) / span), np.float32(1))
        smallest = error(scale, least, codes(np.float32(steps)))
        for tried in range(TRIED):
            chosen = codes(np.float32(-1 + 0.1 * tried + steps))
            weighted = importance * chosen
            first, second = add(weighted), add(weighted * chosen)
            cross = add(weighted * weights)
            determinant = total * second - first * first
            slope = (total * cross - moment * first) / determinant
            intercept = (second * moment - first * cross) / determinant
            left = error(slope, intercept, chosen)
            better = left < smallest
            for kept, found in ((smallest, left), (scale, slope), (least, intercept)):
                np.copyto(kept, found, where=better)
    return scale, least


def _in_turn(values: Floats) -> Floats:
    """Sums over the first axis, one number added after the other."""
    found: Floats = np.add.reduce(values, axis=0)
    return found


def _in_pairs(values: Floats) -> Floats:
    """The same in the order in which numpy adds up numbers that lie side by side in the memory.

    Source: numpy's `pairwise_sum`, of 16 numbers or a larger power of two.
    """
    if len(values) > PAIRED:
        half = len(values) // 2
        return _in_pairs(values[:half]) + _in_pairs(values[half:])
    lanes = _in_turn(values.reshape(-1, LANES, values.shape[1]))
    while len(lanes) > 1:
        lanes = lanes[0::2] + lanes[1::2]
    found: Floats = lanes[0]
    return found
