"""What affine and codebook grids share: the cut into blocks, the margins, the Grid itself."""

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from ..kernels import scalar

Floats = npt.NDArray[np.float32]

Codes = npt.NDArray[np.int8]

Values = npt.NDArray[Any]  # flat float32, float16 or bfloat16

FORMS = {
    np.dtype(np.float32): scalar.FLOAT32,
    np.dtype(np.float16): scalar.FLOAT16,
    np.dtype(ml_dtypes.bfloat16): scalar.BFLOAT16,
}


def as_bits(values: Values) -> npt.NDArray[Any]:
    """A view on the bit patterns, unsigned."""
    return np.ascontiguousarray(values).view(f"u{values.dtype.itemsize}")


def read_only(values: Values) -> Values:
    """A view that cannot be written to: numba compiles once for all that is only read."""
    view = values.view()
    view.flags.writeable = False
    return view


@dataclass(frozen=True)
class Blocks:
    """A tensor as `rows` rows of `cols` weights, each row cut into blocks of `size`.

    The last block of a row may be shorter. One scale per block.
    """

    rows: int
    cols: int
    size: int

    @property
    def per_row(self) -> int:
        return -(-self.cols // self.size)

    @property
    def count(self) -> int:
        return self.rows * self.per_row

    def extremes(self, values: Values, backend: ModuleType) -> tuple[Floats, Floats]:
        """Smallest and largest weight of every block, shape [count]."""
        low, high = np.empty(self.count, np.float32), np.empty(self.count, np.float32)
        backend.extremes(*self.read(values), low, high)
        return low, high

    def read(self, values: Values) -> tuple[npt.NDArray[Any], int, tuple[int, int]]:
        """What every kernel takes first: bit patterns, their form, the cut."""
        return read_only(as_bits(values)), FORMS[values.dtype], (self.cols, self.size)

    def spread(self, per_block: Floats) -> Floats:
        """Repeat one value per block to one value per weight, shape [rows * cols]."""
        rows = np.repeat(per_block.reshape(self.rows, self.per_row), self.size, axis=1)
        return rows[:, : self.cols].reshape(-1)

    def scaled(self, levels: Floats, scale: Floats) -> Floats:
        """Every level [rows * cols] times the scale of its block."""
        if self.cols % self.size:
            return levels * self.spread(scale)
        return np.reshape(levels.reshape(self.count, self.size) * scale[:, None], -1)
