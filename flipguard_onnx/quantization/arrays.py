"""Copies of arrays that are not in C order, made in strips."""

from typing import Any

import numpy as np
import numpy.typing as npt

STRIP = 256  # columns that are copied at a time


def raw_bytes(values: npt.NDArray[Any]) -> memoryview:
    """The bytes of an array in C order, as a tensor's raw_data has them; a view where possible."""
    return contiguous(values).reshape(-1).view(np.uint8).data


def contiguous(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The array in C order; the array itself if it is."""
    if values.ndim < 2 or values.flags.c_contiguous:
        return np.ascontiguousarray(values)
    result = np.empty(values.shape, values.dtype)
    assign(result, values)
    return result


def assign(into: npt.NDArray[Any], values: npt.NDArray[Any]) -> None:
    """into[...] = values, in strips: numpy takes 5 times as long over a transposed matrix."""
    for start in range(0, into.shape[-1], STRIP):
        into[..., start : start + STRIP] = values[..., start : start + STRIP]
