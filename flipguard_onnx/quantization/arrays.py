"""Copies of arrays that do not lie in order, made in strips."""

from typing import Any

import numpy as np
import numpy.typing as npt

STRIP = 256  # columns that are copied at a time


def raw_bytes(values: npt.NDArray[Any]) -> memoryview:
    """The bytes of an array, as a tensor's raw_data has them; not copied if they lie in order."""
    return contiguous(values).reshape(-1).view(np.uint8).data


def contiguous(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The array in C order; itself if it is."""
    if values.ndim < 2 or values.flags.c_contiguous:
        return np.ascontiguousarray(values)
    result = np.empty(values.shape, values.dtype)
    assign(result, values)
    return result


def assign(into: npt.NDArray[Any], values: npt.NDArray[Any]) -> None:
    """into[...] = values, in strips: numpy's way through a turned matrix is 5 times as long."""
    for start in range(0, into.shape[-1], STRIP):
        into[..., start : start + STRIP] = values[..., start : start + STRIP]
