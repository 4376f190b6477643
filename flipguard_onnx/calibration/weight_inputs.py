"""What a weight is multiplied with: where it is found in the graph, and how it becomes rows."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import sliding_window_view
from onnx import FunctionProto, GraphProto

from ..graph.operands import Operand, Window
from ..graph.scopes import Use
from ..graph.weights import Weight
from ..quantization.error_feedback import Floats

NOT_AS_STORED = "not read as it is stored"


@dataclass(frozen=True)
class WeightInput:
    """What one reader of a weight multiplies it with.

    Attributes
    ----------
    value : name of the value in the graph
    elem_type : its type
    axes, window : as in MultipliedInput
    lengths, order : of the weight's axes that are summed over, as the reader has them, and where
        these are found there in the order in which they are stored
    """

    value: str
    elem_type: int
    axes: tuple[int, ...]
    window: Window | None
    lengths: tuple[int, ...]
    order: tuple[int, ...]

    @property
    def groups(self) -> int:
        """How many groups of channels are multiplied apart from each other."""
        return self.window.groups if self.window else 1

    def fits(self, x: npt.NDArray[np.generic]) -> bool:
        """Whether a value has the axes that the weight wants; a stack may hide some of its own."""
        if self.window:
            return x.ndim == 2 + len(self.window.kernel)
        return x.ndim < 2 or tuple(x.shape[axis] for axis in self.axes) == self.lengths

    def rows(self, x: npt.NDArray[np.generic], max_rows: int, rng: np.random.Generator) -> Floats:
        """Up to `max_rows` rows of the value `x`, chosen at random, to multiply rows of a weight.

        Returns
        -------
        float32 [groups, rows, columns]
        """
        if self.window:
            rows = _patches(x, self.window, max_rows, rng)
        else:
            axes = self.axes if x.ndim > 1 else (-1,)  # a vector is a single column
            x = np.moveaxis(x, axes, range(-len(axes), 0)).reshape(-1, prod(self.lengths))
            if len(x) > max_rows:
                x = x[rng.choice(len(x), max_rows, replace=False)]
            rows = x.astype(np.float32)[None]
        if self.order == tuple(range(len(self.order))):
            return rows
        apart = rows.reshape(*rows.shape[:2], *self.lengths)
        return apart.transpose(0, 1, *(axis + 2 for axis in self.order)).reshape(rows.shape)


def weight_input(
    use: Use, weight: Weight, bodies: Sequence[GraphProto | FunctionProto]
) -> WeightInput | str:
    """What a reader of a weight multiplies it with, or the reason why that cannot be recorded.

    Parameters
    ----------
    use, weight : one of the weight's readers
    bodies : of the model, those whose values can be made outputs
    """
    reader = use if use.direct else use.behind
    if not any((reader or use).scope.body is body for body in bodies):
        return "read in a subgraph or function"
    is_whole = reader is not None and reader.whole and use.output_axes() == weight.rows
    if reader is None or reader.operator is None or not is_whole:
        return NOT_AS_STORED
    operand = Operand(reader.node, reader.index, tuple(weight.shape[axis] for axis in reader.perm))
    found = reader.operator.multiplied_input(operand)
    if isinstance(found, str):
        return found
    summed = [axis for axis in reader.perm if axis not in weight.rows]
    return WeightInput(
        reader.node.input[found.index],
        reader.elem_type,
        found.axes,
        found.window,
        tuple(weight.shape[axis] for axis in summed),
        tuple(summed.index(axis) for axis in sorted(summed)),
    )


def _patches(
    x: npt.NDArray[np.generic], window: Window, max_rows: int, rng: np.random.Generator
) -> Floats:
    """What lies under the kernel, in the order of a convolution's weights: channel, then kernel.

    x: [samples, channels, *sizes]. Returns float32 [groups, rows, columns].
    """
    rank = len(window.kernel)
    reach = [d * (k - 1) + 1 for k, d in zip(window.kernel, window.dilations, strict=True)]
    padded = np.pad(x, [(0, 0), (0, 0), *_padding(window, x.shape[2:], reach)])
    windows = sliding_window_view(padded, reach, axis=tuple(range(2, 2 + rank)))
    steps = (slice(None, None, step) for step in window.strides + window.dilations)
    windows = windows[(slice(None), slice(None), *steps)]
    windows = np.moveaxis(windows, 1, 1 + rank)  # sample, places, channel, kernel
    places = windows.shape[: 1 + rank]
    count = int(np.prod(places))
    chosen = np.arange(count) if count <= max_rows else rng.choice(count, max_rows, replace=False)
    patches = windows[np.unravel_index(chosen, places)]
    columns = prod(patches.shape[1:]) // window.groups
    grouped = patches.reshape(len(chosen), window.groups, columns).transpose(1, 0, 2)
    return np.ascontiguousarray(grouped, np.float32)


def _padding(window: Window, sizes: Sequence[int], reach: Sequence[int]) -> list[tuple[int, int]]:
    """Zeros before and behind the input, along each axis. Source: ONNX, operator Conv."""
    if window.auto_pad in ("SAME_UPPER", "SAME_LOWER"):
        padding = []
        for size, stride, r in zip(sizes, window.strides, reach, strict=True):
            total = max((-(-size // stride) - 1) * stride + r - size, 0)
            less, more = total // 2, total - total // 2
            padding.append((less, more) if window.auto_pad == "SAME_UPPER" else (more, less))
        return padding
    if window.auto_pad == "VALID" or not window.pads:
        return [(0, 0)] * len(window.kernel)
    half = len(window.pads) // 2
    return list(zip(window.pads[:half], window.pads[half:], strict=True))
