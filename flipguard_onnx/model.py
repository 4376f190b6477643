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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from google.protobuf.message import DecodeError
from onnx import FunctionProto, GraphProto, ModelProto, TensorProto

from . import disk, intake, wire
from .errors import ModelError, UnsupportedModelError
from .intake import subgraphs
from .publish import Finished
from .wire import Region

DETACH_BYTES = 1024  # smaller tensors stay in the protobuf
INLINE_LIMIT = 1 << 30  # bytes; a larger model gets a .data file, since protobuf ends at 2 GiB
ALIGNMENT = 64
STRIP = 256  # columns that are copied at a time
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
        return self.payloads[disk.entry(tensor, "location")]

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
        disk.require_regular(path)
        stamps = {path: _stamp(path)}
        itself = secrets.token_hex(8)  # a location that no file can name
        proto = _parsed(path, itself)
        intake.admit(proto, itself)
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


def graphs(proto: ModelProto) -> Iterator[GraphProto]:
    """The main graph and every subgraph in If, Loop and Scan nodes, functions included."""

    def nested(body: GraphProto | FunctionProto) -> Iterator[GraphProto]:
        for node in body.node:
            for attribute in node.attribute:
                for graph in subgraphs(attribute):
                    yield graph
                    yield from nested(graph)

    yield proto.graph
    yield from nested(proto.graph)
    for function in proto.functions:
        yield from nested(function)


def bodies(proto: ModelProto) -> list[GraphProto | FunctionProto]:
    """Every graph, subgraph and function body."""
    return [*graphs(proto), *proto.functions]


def output_names(body: GraphProto | FunctionProto) -> list[str]:
    """The names of what a graph or a function returns."""
    if isinstance(body, GraphProto):
        return [value.name for value in body.output]
    return list(body.output)


def tensors(proto: ModelProto) -> Iterator[TensorProto]:
    """Every initializer, then every tensor in a node's attribute."""
    for graph in graphs(proto):
        yield from graph.initializer
    yield from attribute_tensors(proto)


def attribute_tensors(proto: ModelProto) -> Iterator[TensorProto]:
    """The tensors in Constant nodes and the like, functions included."""
    for body in bodies(proto):
        for node in body.node:
            for attribute in node.attribute:
                if attribute.HasField("t"):
                    yield attribute.t


def refer(tensor: TensorProto, location: str, offset: int = 0, length: int | None = None) -> None:
    """Let the tensor point to data elsewhere instead of holding it."""
    for field in ("raw_data", "float_data", "int32_data", "external_data"):
        tensor.ClearField(field)
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    if length is not None:
        tensor.external_data.add(key="offset", value=str(offset))
        tensor.external_data.add(key="length", value=str(length))


class Output:
    """A model being written: tensors go in one by one, `save` finishes.

    Everything is written into `folder` under its final names, so that it can be loaded and tried
    there. Tensors go on to a data file as they come; unless the model is to have one (`external`),
    `save` moves them from there into the model file. Without a `target` the model is not meant to
    leave the folder.
    """

    def __init__(self, folder: Path, target: Path | None, external: bool) -> None:
        self.path = folder / (target.name if target else f"{folder.name}.onnx")
        self._folder = folder
        self._external = external
        self._published = target is not None
        name = self.path.name.encode(errors="replace").decode()  # what a protobuf can hold
        if external and name != self.path.name:
            raise ModelError(f"{target}: a model with a data file needs a name in UTF-8")
        self._data_path = self.path.with_name(f"{name}.data")
        folder.mkdir(parents=True)
        self._data = self._data_path.open("wb")
        self._data_sha256 = ""

    def store(self, tensor: TensorProto, raw: bytes | memoryview, inline: bool = False) -> None:
        """Give the tensor its data: on to the data file, or into the protobuf where it is short.

        inline: for tensors in attributes, which cannot have external data.
        """
        if len(raw) < DETACH_BYTES or (inline and self._external):
            for field in ("float_data", "int32_data", "external_data", "data_location"):
                tensor.ClearField(field)
            tensor.raw_data = bytes(raw)
            return
        self._refer(tensor, len(raw))
        self._data.write(raw)

    def _refer(self, tensor: TensorProto, length: int) -> None:
        self._data.write(b"\0" * (-self._data.tell() % ALIGNMENT))
        refer(tensor, self._data_path.name, self._data.tell(), length)

    def save(self, proto: ModelProto, source: Model) -> None:
        """Write the proto; tensors that still refer to the source's data bring it along."""
        for graph in graphs(proto):
            for tensor in graph.initializer:
                if _is_detached(tensor):
                    region = source.region(tensor)
                    self._refer(tensor, region.length)
                    region.copy_to(self._data)
        for tensor in attribute_tensors(proto):
            if _is_detached(tensor):
                self.store(tensor, source.raw(tensor), inline=True)
        self._data.close()
        if self._external and self._published:
            self._name_data(proto)
        content = proto.SerializeToString(deterministic=True)
        if self._external:
            self.path.write_bytes(content)
            return
        with self.path.open("wb") as stream:
            wire.write_whole(content, self._region, stream)
        self._data_path.unlink()

    def _region(self, tensor: TensorProto) -> Region:
        offset, length = int(disk.entry(tensor, "offset")), int(disk.entry(tensor, "length"))
        return Region(self._data_path, offset, length)

    @property
    def size(self) -> int:
        """Bytes written."""
        return sum(file.stat().st_size for file in self._folder.iterdir())

    def sha256(self, file: Path) -> str:
        """Hex digest of one of the files written."""
        return (file == self._data_path and self._data_sha256) or file_sha256(file)

    def finished(self, target: Path) -> Finished:
        """The files, ready to be published."""
        return Finished(self.path, self._data_path if self._external else None, target)

    def _name_data(self, proto: ModelProto) -> None:
        """Give the data file the name that `publish` demands, and refer to it by that."""
        old = self._data_path
        self._data_sha256 = file_sha256(old)
        self._data_path = old.with_name(f"{self.path.name}.{self._data_sha256[:16]}.data")
        old.rename(self._data_path)
        for graph in graphs(proto):
            for tensor in graph.initializer:
                for entry in tensor.external_data:
                    if entry.key == "location" and entry.value == old.name:
                        entry.value = self._data_path.name


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
        location = disk.entry(tensor, "location")
        if location == itself:
            region = disk.region(tensor, path)
        else:
            file = files.get(location) or disk.data_file(path, tensor)
            files[location] = file
            region = disk.region(tensor, file)
            external.append((tensor, region))
        key = f"{_DETACHED}{len(payloads)}"
        payloads[key] = region
        refer(tensor, key)
    disk.shared_regions(external)
    return payloads, files


def _is_detached(tensor: TensorProto) -> bool:
    return disk.entry(tensor, "location").startswith(_DETACHED)
