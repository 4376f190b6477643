"""The files that a model consists of: what may be read, and where external data may lie.

Every check raises ModelError; the caller adds the path to it.
"""

import errno
import os
import stat
from collections import defaultdict
from collections.abc import Iterable
from itertools import pairwise
from math import prod
from pathlib import Path

import onnx
from onnx import TensorProto

from ..errors import ModelError
from .wire import Region

LARGEST_FILE = (1 << 31) - 1  # bytes; the limit of protobuf

MAX_SHARING = 4  # times its own size that an external data file may be referred to

BITS: dict[int, int] = {  # of a value, where several share a byte
    TensorProto.INT4: 4,
    TensorProto.UINT4: 4,
    TensorProto.FLOAT4E2M1: 4,
    TensorProto.INT2: 2,
    TensorProto.UINT2: 2,
}


def set_reference(
    tensor: TensorProto, location: str, offset: int = 0, length: int | None = None
) -> None:
    """Let the tensor refer to its data instead of holding it.

    Parameters
    ----------
    tensor : is changed; it loses the values that it holds
    location : of the data, for the readers of the model a file beside it
    offset, length : bytes; where the data lies in it. Without a length neither is written.
    """
    for field in ("raw_data", "float_data", "int32_data", "external_data"):
        tensor.ClearField(field)
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    if length is not None:
        tensor.external_data.add(key="offset", value=str(offset))
        tensor.external_data.add(key="length", value=str(length))


def require_regular(path: Path) -> None:
    """Raise ModelError unless `path` is a regular file that protobuf can hold."""
    try:
        status = path.stat()
    except OSError as error:
        raise ModelError("cannot be read: {found}", found=error.strerror) from None
    except ValueError as error:  # a null character in the path
        raise ModelError("cannot be read: {found}", found=str(error)) from None
    if stat.S_ISDIR(status.st_mode):
        raise ModelError("cannot be read: {found}", found=os.strerror(errno.EISDIR))
    if not stat.S_ISREG(status.st_mode):
        raise ModelError("cannot be read: not a regular file")
    if status.st_size > LARGEST_FILE:
        raise ModelError(
            "has {found} bytes",
            found=status.st_size,
            allowed=f"up to {LARGEST_FILE}, what protobuf can hold "
            "(larger models keep their weights in an external data file)",
        )


def element_count(tensor: TensorProto) -> int:
    """The number of values that the shape declares."""
    return prod(tensor.dims)


def byte_size(tensor: TensorProto) -> int:
    """The number of bytes that the values take, those of fewer than 8 bits packed."""
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    bits = BITS.get(tensor.data_type, 8 * dtype.itemsize)
    return (element_count(tensor) * bits + 7) // 8


def entry(tensor: TensorProto, key: str) -> str:
    """An entry of the tensor's external_data: "location", "offset" or "length"; "" for none."""
    return next((e.value for e in tensor.external_data if e.key == key), "")


def data_file(model: Path, tensor: TensorProto) -> Path:
    """The external data file: a regular one under the model's folder or that of its real path.

    Symbolic links may lead there (the cache of a model hub is made of them), not elsewhere. A hard
    link is the file itself: whoever made it could read it.

    Parameters
    ----------
    model : path of the model file
    tensor : one with external data

    Raises
    ------
    ModelError
        When the data lies elsewhere, or cannot be read.
    """
    location = entry(tensor, "location")

    def refusal(allowed: str) -> ModelError:
        problem = "tensor {tensor!r} has its data at {found!r}"
        return ModelError(problem, tensor=tensor.name, found=location, allowed=allowed)

    def missing(reason: str) -> ModelError:
        problem = "tensor {tensor!r} needs the data file {found!r}: {reason}"
        return ModelError(problem, tensor=tensor.name, found=location, reason=reason)

    inside = "a file under the model's folder"
    if not location or Path(location).is_absolute() or ".." in Path(location).parts:
        raise refusal(inside)
    file = model.parent / location
    try:
        roots = {model.parent.resolve(), model.resolve().parent}
        if not any(file.resolve().is_relative_to(root) for root in roots):
            raise refusal(inside)
        mode = file.stat().st_mode
    except FileNotFoundError:
        raise missing("it does not exist") from None
    except (OSError, ValueError, RuntimeError) as error:  # name too long, null, links in a circle
        raise refusal(f"{inside} ({error})") from None
    if not stat.S_ISREG(mode):
        raise refusal("a regular file")
    if not os.access(file, os.R_OK):
        raise missing("it is not readable")
    return file


def region(tensor: TensorProto, file: Path) -> Region:
    """Where the tensor's data lies in the file.

    Raises ModelError when it is not as long as the tensor's shape and type say, or goes past the
    end of the file.
    """
    size, needed = file.stat().st_size, byte_size(tensor)
    offset, length = _number(tensor, "offset", 0), _number(tensor, "length", needed)
    if length != needed or offset + length > size:
        raise ModelError(
            "tensor {tensor!r} needs {needed} bytes but refers to {found} bytes at {offset} of "
            "{file!r}, which has {size}",
            tensor=tensor.name,
            found=length,
            needed=needed,
            offset=offset,
            file=file.name,
            size=size,
        )
    return Region(file, offset, length)


def require_no_overlap(regions: Iterable[tuple[TensorProto, Region]]) -> None:
    """Raise ModelError for regions that overlap, or are shared too often.

    Tensors of one type may share a region as a whole, and all tensors together may refer to
    MAX_SHARING times the size of a file.
    """
    by_file: dict[Path, list[tuple[int, int, int, str]]] = defaultdict(list)
    for tensor, where in regions:
        if where.length:
            by_file[where.file].append((where.offset, where.length, tensor.data_type, tensor.name))
    for file, uses in by_file.items():
        uses.sort()
        for before, after in pairwise(uses):
            if before[:3] != after[:3] and before[0] + before[1] > after[0]:
                raise ModelError(
                    "tensors {other!r} and {tensor!r} overlap in {file!r}, at {found}",
                    tensor=after[3],
                    other=before[3],
                    file=file.name,
                    found=after[0],
                    allowed="the same bytes as the same type, or none in common",
                )
        size, referred = file.stat().st_size, sum(length for _, length, _, _ in uses)
        if referred > MAX_SHARING * size:
            raise ModelError(
                "tensors refer to {found} bytes of {file!r}, which has {size}",
                found=referred,
                file=file.name,
                size=size,
                allowed=f"{MAX_SHARING} times its size",
            )


def _number(tensor: TensorProto, key: str, default: int) -> int:
    text = entry(tensor, key)
    if not text:
        return default
    if not (text.isascii() and text.isdecimal() and len(text) < 20):
        raise ModelError(
            "tensor {tensor!r} has the {key} {found!r}",
            tensor=tensor.name,
            found=text[:30],
            key=key,
            allowed="a number from 0 on",
        )
    return int(text)
