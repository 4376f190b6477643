"""Open a model without loading its weights.

The data of large tensors stays where it is, in the file itself or in an external data file, and is
mapped when it is asked for; the protobuf holds references in its place. So copying, converting and
editing a graph moves no weights; `writer.Output` writes them one after the other.
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
from ..graph.weights import Unfolded
from . import external_data, integrity, wire
from .external_data import set_reference
from .wire import Region

DETACH_BYTES = 1024  # smaller tensors stay in the protobuf

INLINE_LIMIT = 1 << 30  # bytes; a larger model gets a data file, as protobuf is limited to 2 GiB

RACY = 10**9  # ns; a file that changed so recently may change again with the same time stamp

_DETACHED = "detached:"


@dataclass(frozen=True)
class Model:
    """An opened model.

    Parameters
    ----------
    path : of the model file
    proto : the model, in which large tensors are references
    payloads : where the data of each of these lies, by the location in the reference
    sha256 : hex digest of the model file
    data_sha256 : hex digests of the external data files, by location
    size : bytes of the model file and its data files
    stamps : by file, what tells whether it has changed since
    unfolded : weights behind constant expressions that could not be evaluated
    scratch : keeps the files of those that were
    """

    path: Path
    proto: ModelProto
    payloads: dict[str, Region]
    sha256: str
    data_sha256: dict[str, str]
    size: int
    stamps: dict[Path, tuple[int, ...]]
    unfolded: tuple[Unfolded, ...] = ()
    scratch: object = None

    def array(self, tensor: TensorProto) -> npt.NDArray[Any]:
        """The tensor's values, shaped; a read-only view where the data allows it."""
        if tensor.data_location != TensorProto.EXTERNAL:
            return onnx.numpy_helper.to_array(tensor)
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        return np.frombuffer(self.raw(tensor), dtype=dtype).reshape(tuple(tensor.dims))

    def raw(self, tensor: TensorProto) -> memoryview:
        """The bytes of a tensor that is a reference in the proto."""
        region = self.region(tensor)
        if region.length == 0:
            return memoryview(b"")
        return np.memmap(region.file, np.uint8, "r", region.offset, (region.length,)).data

    def region(self, tensor: TensorProto) -> Region:
        """Where the data of a tensor lies that is a reference in the proto."""
        return self.payloads[external_data.entry(tensor, "location")]

    def require_unchanged(self) -> None:
        """Raise ModelError if a file is not what it was when the model was opened.

        A file is read again only if its time stamps have changed.
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
                raise ModelError(
                    "changed while it was being guarded; nothing was written", path=file
                )


def open_model(path: str | os.PathLike[str], digests: bool = True) -> Model:
    """Read an ONNX file; external data is mapped when it is asked for.

    Parameters
    ----------
    path : of the model file
    digests : compute those of the files; without them they are left empty

    Raises
    ------
    ModelError
        When the file is missing, is not an ONNX model or lacks its data.
    UnsupportedModelError
        For what is legal but not handled, sparse initializers for example.
    """
    path = Path(path)
    try:
        external_data.require_regular(path)
        stamps = {path: _stamp(path)}
        inline_location = secrets.token_hex(8)  # which no file can know in advance
        proto = _parsed(path, inline_location)
        integrity.require_sound(proto, inline_location)
        payloads, files = _detach(path, proto, inline_location)
        stamps |= {file: _stamp(file) for file in files.values()}
        size = sum(file.stat().st_size for file in stamps)
        sha256 = file_sha256(path) if digests else ""
        digested = sorted(files.items()) if digests else []
        data_sha256 = {location: file_sha256(file) for location, file in digested}
    except OSError as error:
        raise ModelError("cannot be read: {found}", path=path, found=error.strerror) from None
    except DecodeError:
        raise ModelError("not an ONNX model (its protobuf does not parse)", path=path) from None
    except (ModelError, UnsupportedModelError) as error:
        raise error.at(path) from None
    return Model(path, proto, payloads, sha256, data_sha256, size, stamps)


def file_sha256(file: Path) -> str:
    """Hex digest of a file's bytes."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def is_detached(tensor: TensorProto) -> bool:
    """Whether the tensor is a reference that a Model's `payloads` resolve."""
    return external_data.entry(tensor, "location").startswith(_DETACHED)


def detached_key(number: int) -> str:
    """The location of a tensor that is a reference, and its key in `payloads`."""
    return f"{_DETACHED}{number}"


def _stamp(file: Path) -> tuple[int, ...]:
    """What equals an earlier stamp only if the file has not been touched in between."""
    now = file.stat()
    recent = time.time_ns() - now.st_ctime_ns
    racy = time.monotonic_ns() if recent < RACY else 0
    return now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns, now.st_ctime_ns, racy


def _parsed(path: Path, inline_location: str) -> ModelProto:
    """The protobuf, in which large tensors refer to their data in the file as inline_location."""
    proto = ModelProto()
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size:
            data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            proto.ParseFromString(wire.skeleton(data, DETACH_BYTES, inline_location))
    return proto


def _detach(
    path: Path, proto: ModelProto, inline_location: str
) -> tuple[dict[str, Region], dict[str, Path]]:
    """The payloads of a Model, and the external data files by location.

    References in the proto become keys of the payloads, so that those of the source are not
    mistaken for those of an output.
    """
    payloads: dict[str, Region] = {}
    files: dict[str, Path] = {}
    external: list[tuple[TensorProto, Region]] = []
    for tensor in tensors(proto):
        if tensor.data_location != TensorProto.EXTERNAL:
            continue
        location = external_data.entry(tensor, "location")
        if location == inline_location:
            region = external_data.region(tensor, path)
        else:
            file = files.get(location) or external_data.data_file(path, tensor)
            files[location] = file
            region = external_data.region(tensor, file)
            external.append((tensor, region))
        key = detached_key(len(payloads))
        payloads[key] = region
        set_reference(tensor, key)
    external_data.require_no_overlap(external)
    return payloads, files
