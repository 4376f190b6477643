"""Open a model without copying its data about, and write one so that it is whole or absent.

The data of large tensors stays where it is, in the file itself or in an external data file, and is
mapped when it is asked for; in the protobuf stand references. So copying, converting and editing a
graph moves no weights; `Output` writes them one after the other.
"""

import hashlib
import mmap
import os
import secrets
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from google.protobuf.message import DecodeError
from onnx import ModelProto, TensorProto

from ..errors import ModelError, UnsupportedModelError
from ..graph.traversal import tensors
from . import external_data, integrity, wire
from .external_data import refer
from .wire import Region

DETACH_BYTES = 1024  # smaller tensors stay in the protobuf

INLINE_LIMIT = 1 << 30  # bytes; a larger model gets a .data file, since protobuf ends at 2 GiB

RACY = 10**9  # ns; of a file changed as recently, a stamp may not show that it changed again

_DETACHED = "detached:"


@dataclass(frozen=True)
class Model:
    """An opened model: where a tensor in `proto` is a reference, `payloads` has its data."""

    path: Path
    proto: ModelProto
    payloads: dict[str, Region]
    sha256: str
    data_sha256: dict[str, str]  # by location of the external data file
    size: int  # bytes of the file and its data files
    stamps: dict[Path, tuple[int, ...]]  # what tells whether a file has changed since

    def array(self, tensor: TensorProto) -> npt.NDArray[Any]:
        """The tensor's values, shaped; a read-only view where the data allows it."""
        if tensor.data_location != TensorProto.EXTERNAL:
            return onnx.numpy_helper.to_array(tensor)
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        return np.frombuffer(self.raw(tensor), dtype=dtype).reshape(tuple(tensor.dims))

    def raw(self, tensor: TensorProto) -> memoryview:
        """The bytes behind a tensor that stands in the proto as a reference."""
        region = self.region(tensor)
        if region.length == 0:
            return memoryview(b"")
        return np.memmap(region.file, np.uint8, "r", region.offset, (region.length,)).data

    def region(self, tensor: TensorProto) -> Region:
        """Where the data of a tensor that stands in the proto as a reference lies."""
        return self.payloads[external_data.entry(tensor, "location")]

    def require_unchanged(self) -> None:
        """Raise ModelError if a file is not what it was when the model was opened.

        A file is read again only where its times do not tell.
        """
        known = {self.path: self.sha256}
        known |= {self.path.parent / name: digest for name, digest in self.data_sha256.items()}
        for file, stamp in self.stamps.items():
            try:
                now = _stamp(file)
                changed = now != stamp and file_sha256(file) != known[file]
            except OSError:
                changed = True
            if changed:
                raise ModelError(f"{file}: changed while it was being guarded; nothing was written")


def open_model(path: str | os.PathLike[str], ours: bool = False) -> Model:
    """Read an ONNX file; external data is mapped when it is asked for.

    ours: written by this run, so that nobody needs its digests, which are left empty.
    Raises ModelError when the file is missing, is not an ONNX model or lacks its data, and
    UnsupportedModelError for sparse initializers.
    """
    path = Path(path)
    try:
        external_data.require_regular(path)
        stamps = {path: _stamp(path)}
        itself = secrets.token_hex(8)  # a location that no file can name
        proto = _parsed(path, itself)
        integrity.admit(proto, itself)
        payloads, files = _detach(path, proto, itself)
        stamps |= {file: _stamp(file) for file in files.values()}
        size = sum(file.stat().st_size for file in stamps)
        digest = "" if ours else file_sha256(path)
        named = {} if ours else files
        digests = {location: file_sha256(file) for location, file in sorted(named.items())}
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from None
    except DecodeError:
        raise ModelError(f"{path}: not an ONNX model (its protobuf does not parse)") from None
    except (ModelError, UnsupportedModelError) as error:
        raise type(error)(f"{path}: {error}") from None
    return Model(path, proto, payloads, digest, digests, size, stamps)


def file_sha256(file: Path) -> str:
    """Hex digest of a file's bytes."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _stamp(file: Path) -> tuple[int, ...]:
    """Equal to a later one only if the file has not been touched in between."""
    now = file.stat()
    recent = time.time_ns() - now.st_ctime_ns
    racy = time.monotonic_ns() if recent < RACY else 0
    return now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns, now.st_ctime_ns, racy


def _parsed(path: Path, itself: str) -> ModelProto:
    """The protobuf, in which large tensors refer to their place in the file, as `itself`."""
    proto = ModelProto()
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size:
            data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            proto.ParseFromString(wire.skeleton(data, DETACH_BYTES, itself))
    return proto


def _detach(
    path: Path, proto: ModelProto, itself: str
) -> tuple[dict[str, Region], dict[str, Path]]:
    """Where the data of the tensors that refer to it lies; and the data files by location.

    The references become keys of the first, so that those of the source and those of an output
    are not mistaken for each other.
    """
    payloads: dict[str, Region] = {}
    files: dict[str, Path] = {}
    external: list[tuple[TensorProto, Region]] = []
    for tensor in tensors(proto):
        if tensor.data_location != TensorProto.EXTERNAL:
            continue
        location = external_data.entry(tensor, "location")
        if location == itself:
            region = external_data.region(tensor, path)
        else:
            file = files.get(location) or external_data.data_file(path, tensor)
            files[location] = file
            region = external_data.region(tensor, file)
            external.append((tensor, region))
        key = f"{_DETACHED}{len(payloads)}"
        payloads[key] = region
        refer(tensor, key)
    external_data.shared_regions(external)
    return payloads, files


def _is_detached(tensor: TensorProto) -> bool:
    return external_data.entry(tensor, "location").startswith(_DETACHED)
