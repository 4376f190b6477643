"""The files that a model consists of: what may be read, and where external data may lie.

Every check raises ModelError with one line; the caller puts the path before it.
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


def refer(tensor: TensorProto, location: str, offset: int = 0, length: int | None = None) -> None:
    """Let the tensor point to data elsewhere instead of holding it."""
    for field in ("raw_data", "float_data", "int32_data", "external_data"):
        tensor.ClearField(field)
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    if length is not None:
        tensor.external_data.add(key="offset", value=str(offset))
        tensor.external_data.add(key="length", value=str(length))


LARGEST_FILE = (1 << 31) - 1  # bytes; where protobuf ends

MOST_SHARING = 4  # times its own size that an external data file may be referred to

PACKED = {  # bits of a value, where several share a byte
    TensorProto.INT4: 4,
    TensorProto.UINT4: 4,
    TensorProto.FLOAT4E2M1: 4,
    **{getattr(TensorProto, name): 2 for name in ("INT2", "UINT2") if hasattr(TensorProto, name)},
}


def require_regular(path: Path) -> None:
    """What a model is read from must be a regular file that protobuf can hold."""
    try:
        status = path.stat()
    except OSError as error:
        raise ModelError(f"cannot be read: {error.strerror}") from None
    except ValueError as error:  # a null character in the path
        raise ModelError(f"cannot be read: {error}") from None
    if stat.S_ISDIR(status.st_mode):
        raise ModelError(f"cannot be read: {os.strerror(errno.EISDIR)}")
    if not stat.S_ISREG(status.st_mode):
        raise ModelError("cannot be read: not a regular file")
    if status.st_size > LARGEST_FILE:
        raise ModelError(
            f"has {status.st_size} bytes; allowed: up to {LARGEST_FILE}, what protobuf can "
            "hold (larger models keep their weights in an external data file)"
        )


def elements(tensor: TensorProto) -> int:
    """How many values the shape declares."""
    return prod(tensor.dims)


def byte_size(tensor: TensorProto) -> int:
    """How many bytes the values take, 4-bit ones packed."""
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    bits = PACKED.get(tensor.data_type, 8 * dtype.itemsize)
    return (elements(tensor) * bits + 7) // 8


def entry(tensor: TensorProto, key: str) -> str:
    """What the tensor says of its external data: "location", "offset" or "length"."""
    return next((e.value for e in tensor.external_data if e.key == key), "")


def data_file(model: Path, tensor: TensorProto) -> Path:
    """The external data file: a regular one under the model's folder or that of its real path.

    Symbolic links may lead there (the cache of a model hub is made of them), not elsewhere. A hard
    link is the file itself: whoever made it could read it.
    """
    name, location = tensor.name, entry(tensor, "location")
    refusal = f"tensor {name!r} has its data at {location!r}; allowed: "
    if not location or Path(location).is_absolute() or ".." in Path(location).parts:
        raise ModelError(f"{refusal}a file under the model's folder")
    file = model.parent / location
    try:
        roots = {model.parent.resolve(), model.resolve().parent}
        if not any(file.resolve().is_relative_to(root) for root in roots):
            raise ModelError(f"{refusal}a file under the model's folder")
        mode = file.stat().st_mode
    except FileNotFoundError:
        raise ModelError(f"tensor {name!r} needs the data file {location!r}, not there") from None
    except (OSError, ValueError, RuntimeError) as error:  # name too long, null, links in a circle
        raise ModelError(f"{refusal}a file under the model's folder ({error})") from None
    if not stat.S_ISREG(mode):
        raise ModelError(f"{refusal}a regular file")
    if not os.access(file, os.R_OK):
        raise ModelError(f"tensor {name!r} needs the data file {location!r}: not readable")
    return file


def region(tensor: TensorProto, file: Path) -> Region:
    """Where the tensor's data lies; it must be as long as its shape says, and inside the file."""
    size, needed = file.stat().st_size, byte_size(tensor)
    offset, length = _number(tensor, "offset", 0), _number(tensor, "length", needed)
    if length != needed or offset + length > size:
        raise ModelError(
            f"tensor {tensor.name!r} needs {needed} bytes but refers to {length} bytes "
            f"at {offset} of {file.name!r}, which has {size}"
        )
    return Region(file, offset, length)


def shared_regions(regions: Iterable[tuple[TensorProto, Region]]) -> None:
    """Tensors may share a region whole, as the same type, and not many times over."""
    by_file: dict[Path, list[tuple[int, int, int, str]]] = defaultdict(list)
    for tensor, where in regions:
        if where.length:
            by_file[where.file].append((where.offset, where.length, tensor.data_type, tensor.name))
    for file, found in by_file.items():
        found.sort()
        for before, after in pairwise(found):
            if before[:3] != after[:3] and before[0] + before[1] > after[0]:
                raise ModelError(
                    f"tensors {before[3]!r} and {after[3]!r} overlap in {file.name!r}, at "
                    f"{after[0]}; allowed: the same bytes as the same type, or none in common"
                )
        size, referred = file.stat().st_size, sum(length for _, length, _, _ in found)
        if referred > MOST_SHARING * size:
            raise ModelError(
                f"tensors refer to {referred} bytes of {file.name!r}, which has {size}; "
                f"allowed: {MOST_SHARING} times its size"
            )


def _number(tensor: TensorProto, key: str, default: int) -> int:
    text = entry(tensor, key)
    if not text:
        return default
    if not (text.isascii() and text.isdecimal() and len(text) < 20):
        raise ModelError(
            f"tensor {tensor.name!r} has the {key} {text[:30]!r}; allowed: a number from 0 on"
        )
    return int(text)
