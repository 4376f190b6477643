"""How a tensor as it is stored becomes rows of output channels, and back."""

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from .arrays import contiguous
from .schemes import Blocks


@dataclass(frozen=True)
class Layout:
    """The layout of a weight tensor.

    In canonical order the axes of the output channels come first, then all others, each in the
    order in which they are stored: a matrix [output channels, weights per channel].

    Parameters
    ----------
    shape : of the tensor as it is stored
    rows : the stored axes that number the output channels

    Examples
    --------
    >>> layout = Layout(shape=(3, 2), rows=(1,))  # the weight of a MatMul
    >>> flat = layout.canonical(np.array([[1, 4], [2, 5], [3, 6]]))
    >>> flat.tolist()
    [1, 2, 3, 4, 5, 6]
    >>> layout.stored(flat).tolist()
    [[1, 4], [2, 5], [3, 6]]
    """

    shape: tuple[int, ...]
    rows: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of weights."""
        return prod(self.shape)

    @property
    def perm(self) -> tuple[int, ...]:
        """The stored axes in canonical order."""
        return self.rows + tuple(a for a in range(len(self.shape)) if a not in self.rows)

    @property
    def canonical_shape(self) -> tuple[int, ...]:
        """The shape with its axes in canonical order."""
        return tuple(self.shape[axis] for axis in self.perm)

    def blocks(self, size: int | None, flat: bool) -> Blocks:
        """Cut the canonical matrix into blocks.

        Parameters
        ----------
        size : weights of a block; None takes whole rows
        flat : whether blocks run on from one row to the next
        """
        rows = 1 if flat else prod(self.shape[axis] for axis in self.rows)
        cols = self.size // rows
        return Blocks(rows, cols, min(size or cols, cols))

    def canonical(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The tensor as it is stored to flat rows of output channels."""
        return contiguous(values.transpose(self.perm)).reshape(-1)

    def stored(self, flat: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Flat rows of output channels to the tensor as it is stored (a view)."""
        return flat.reshape(self.canonical_shape).transpose(np.argsort(self.perm))
