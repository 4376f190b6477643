"""How weights are cut into blocks, each with a scale of its own."""

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from ..kernels import scalar
from ..kernels.protocol import Extremes, FloatWeights, Kernels, StoredWeights

Floats = npt.NDArray[np.float32]

Codes = npt.NDArray[np.int8]

Values = npt.NDArray[Any]  # flat float32, float16 or bfloat16

FORMS = {
    np.dtype(np.float32): scalar.FLOAT32,
    np.dtype(np.float16): scalar.FLOAT16,
    np.dtype(ml_dtypes.bfloat16): scalar.BFLOAT16,
}


def as_bits(values: Values) -> npt.NDArray[Any]:
    """A view of the bit patterns as unsigned integers."""
    return np.ascontiguousarray(values).view(f"u{values.dtype.itemsize}")


def read_only(values: Values) -> Values:
    """A view that cannot be written to: numba compiles once for all that is only read."""
    view = values.view()
    view.flags.writeable = False
    return view


@dataclass(frozen=True)
class Blocks:
    """A tensor as `rows` rows of `cols` weights, each row cut into blocks of `size` weights.

    The last block of a row may be shorter. Every block has one scale.
    """

    rows: int
    cols: int
    size: int

    @property
    def per_row(self) -> int:
        """Blocks in a row."""
        return -(-self.cols // self.size)

    @property
    def count(self) -> int:
        """Blocks in all."""
        return self.rows * self.per_row

    def extremes(self, values: Values, kernels: Kernels) -> Extremes:
        """Smallest and largest of the weights [rows * cols] in every block, float32 [count]."""
        found = self.no_extremes()
        kernels.extremes(self.weights(values), found)
        return found

    def no_extremes(self) -> Extremes:
        """Room for the extremes of every block."""
        return Extremes(np.empty(self.count, np.float32), np.empty(self.count, np.float32))

    def weights(self, values: Values) -> StoredWeights:
        """Weights as `Kernels` read them."""
        form = FORMS[values.dtype]
        return StoredWeights(read_only(as_bits(values)), form, self.cols, self.size)

    def float_weights(self, values: Floats) -> FloatWeights:
        """Weights in float32 as `ScanKernels` read them."""
        return FloatWeights(read_only(values), self.cols, self.size)

    def number_of(self, weights: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Numbers of the blocks that the weights with these numbers are in."""
        return weights // self.cols * self.per_row + weights % self.cols // self.size

    def first_weight(self, numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Numbers of the first weights of the blocks with these numbers."""
        return numbers // self.per_row * self.cols + numbers % self.per_row * self.size

    def spread(self, per_block: Floats) -> Floats:
        """Repeat one value per block to one value per weight, shape [rows * cols]."""
        rows = np.repeat(per_block.reshape(self.rows, self.per_row), self.size, axis=1)
        return rows[:, : self.cols].reshape(-1)

    def scaled(self, levels: Floats, scale: Floats) -> Floats:
        """Every level [rows * cols] times the scale of its block."""
        if self.cols % self.size:
            return levels * self.spread(scale)
        return np.reshape(levels.reshape(self.count, self.size) * scale[:, None], -1)
