"""What a weight is multiplied with: where it is found in the graph, and how it becomes rows."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import sliding_window_view

from ..graph.scopes import Use
from ..graph.traversal import attribute
from ..graph.weights import Weight
from ..quantization.error_feedback import Floats


@dataclass(frozen=True)
class WeightInput:
    """One reading of a weight: `value` is what it is multiplied with.

    kind: how the value becomes rows of inputs: "rows" (its last axis), "columns" (the last but
    one) or "patches" of a convolution, whose geometry the other fields hold.
    """

    value: str
    elem_type: int
    kind: str
    kernel: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    dilations: tuple[int, ...] = ()
    pads: tuple[int, ...] = ()
    auto_pad: str = "NOTSET"
    groups: int = 1

    def rows(self, x: npt.NDArray[Any], most: int, rng: np.random.Generator) -> Floats:
        """Up to `most` inputs, chosen at random, float32 [groups, inputs, columns]."""
        if self.kind == "patches":
            return self._patches(x, most, rng)
        if self.kind == "columns" and x.ndim > 1:  # a vector is a single column
            x = np.moveaxis(x, -2, -1)
        x = x.reshape(-1, x.shape[-1])
        if len(x) > most:
            x = x[rng.choice(len(x), most, replace=False)]
        return x.astype(np.float32)[None]

    def _patches(self, x: npt.NDArray[Any], most: int, rng: np.random.Generator) -> Floats:
        """Rows in the order of a convolution's weights: channel, then place in the kernel."""
        rank = len(self.kernel)
        reach = [d * (k - 1) + 1 for k, d in zip(self.kernel, self.dilations, strict=True)]
        padded = np.pad(x, [(0, 0), (0, 0), *self._padding(x.shape[2:], reach)])
        windows = sliding_window_view(padded, reach, axis=tuple(range(2, 2 + rank)))
        windows = windows[
            (
                slice(None),
                slice(None),
                *(slice(None, None, n) for n in self.strides + self.dilations),
            )
        ]
        windows = np.moveaxis(windows, 1, 1 + rank)  # sample, places, channel, kernel
        places = windows.shape[: 1 + rank]
        count = int(np.prod(places))
        chosen = np.arange(count) if count <= most else rng.choice(count, most, replace=False)
        patches = windows[np.unravel_index(chosen, places)]
        grouped = patches.reshape(len(chosen), self.groups, -1).transpose(1, 0, 2)
        return np.ascontiguousarray(grouped, np.float32)

    def _padding(self, sizes: Sequence[int], reach: Sequence[int]) -> list[tuple[int, int]]:
        if self.auto_pad in ("SAME_UPPER", "SAME_LOWER"):
            padding = []
            for size, stride, r in zip(sizes, self.strides, reach, strict=True):
                total = max((-(-size // stride) - 1) * stride + r - size, 0)
                less, more = total // 2, total - total // 2
                padding.append((less, more) if self.auto_pad == "SAME_UPPER" else (more, less))
            return padding
        if self.auto_pad == "VALID" or not self.pads:
            return [(0, 0)] * len(self.kernel)
        half = len(self.pads) // 2
        return list(zip(self.pads[:half], self.pads[half:], strict=True))


def weight_input(use: Use, weight: Weight, main: Any) -> WeightInput | str:
    """The tap for one reader of a weight, or the reason why its inputs cannot be recorded."""
    if use.scope.body is not main:
        return "read in a subgraph or function"
    if not use.direct or not use.op or use.output_axes() != weight.rows:
        return "not read as it is stored"
    node = use.node
    if use.op == "MatMul" and len(weight.shape) == 2:
        return WeightInput(
            node.input[1 - use.index], use.elem_type, "rows" if use.index else "columns"
        )
    if use.op == "Gemm":
        kind = "columns" if attribute(node, "transA", 0) else "rows"
        return WeightInput(node.input[0], use.elem_type, kind)
    if use.op in ("LSTM", "GRU", "RNN") and use.index == 1:
        return WeightInput(node.input[0], use.elem_type, "rows")
    if use.op == "Conv" and min(attribute(node, "pads", ()), default=0) >= 0:
        kernel = tuple(weight.shape[axis] for axis in use.perm[2:])
        ones = (1,) * len(kernel)
        return WeightInput(
            node.input[0],
            use.elem_type,
            "patches",
            kernel,
            tuple(attribute(node, "strides", ones)),
            tuple(attribute(node, "dilations", ones)),
            tuple(attribute(node, "pads", ())),
            attribute(node, "auto_pad", b"NOTSET").decode(),
            attribute(node, "group", 1),
        )
    if use.op == "Gather":
        return "Gather picks rows: nothing is summed"
    if use.op in ("LSTM", "GRU", "RNN"):
        return f"recurrent: {use.op} multiplies it with its own state"
    return f"inputs of {use.op} are not recorded here"
