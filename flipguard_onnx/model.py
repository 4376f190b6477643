"""Open a model without copying its data about, and write one so that it is whole or absent.

Large tensors are taken out of the protobuf when a model is opened and stand in it as references,
whether they came from the file itself or from an external data file. So copying, converting and
editing a graph moves no weights; `Output` puts them back, one after the other, when it saves.
"""

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from google.protobuf.message import DecodeError
from onnx import FunctionProto, GraphProto, ModelProto, TensorProto

from . import disk, intake
from .disk import Region
from .errors import ModelError, UnsupportedModelError
from .intake import subgraphs

DETACH_BYTES = 1024  # smaller tensors stay in the protobuf
INLINE_LIMIT = 1 << 30  # bytes; a larger model gets a .data file, since protobuf ends at 2 GiB
ALIGNMENT = 64
_DETACHED = "detached:"


@dataclass(frozen=True)
class Model:
    """An opened model: where a tensor in `proto` is a reference, `payloads` has its data."""

    path: Path
    proto: ModelProto
    payloads: dict[str, bytes | Region]
    sha256: str
    data_sha256: dict[str, str]  # by location of the external data file
    size: int  # bytes of the file and its data files

    def array(self, tensor: TensorProto) -> npt.NDArray[Any]:
        """The tensor's values, shaped; a read-only view where the data allows it."""
        if tensor.data_location != TensorProto.EXTERNAL:
            return onnx.numpy_helper.to_array(tensor)
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        return np.frombuffer(self.raw(tensor), dtype=dtype).reshape(tuple(tensor.dims))

    def raw(self, tensor: TensorProto) -> memoryview:
        """The bytes behind a tensor that stands in the proto as a reference."""
        payload = self.payloads[disk.entry(tensor, "location")]
        if isinstance(payload, bytes):
            return memoryview(payload)
        if payload.length == 0:
            return memoryview(b"")
        return np.memmap(payload.file, np.uint8, "r", payload.offset, (payload.length,)).data


def open_model(path: str | os.PathLike[str]) -> Model:
    """Read an ONNX file; external data is mapped when it is asked for.

    Raises ModelError when the file is missing, is not an ONNX model or lacks its data, and
    UnsupportedModelError for sparse initializers.
    """
    path = Path(path)
    try:
        content = disk.read(path)
        proto = ModelProto()
        proto.ParseFromString(content)
        intake.admit(proto)
        payloads, files = _detach(path, proto)
    except DecodeError:
        raise ModelError(f"{path}: not an ONNX model (its protobuf does not parse)") from None
    except (ModelError, UnsupportedModelError) as error:
        raise type(error)(f"{path}: {error}") from None
    size = len(content) + sum(file.stat().st_size for file in files.values())
    return Model(
        path,
        proto,
        payloads,
        hashlib.sha256(content).hexdigest(),
        {location: file_sha256(file) for location, file in sorted(files.items())},
        size,
    )


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


@contextmanager
def workspace(folder: Path) -> Iterator[Path]:
    """A temporary folder inside `folder`, on the same file system; removed at the end."""
    try:
        with tempfile.TemporaryDirectory(prefix=".flipguard-", dir=folder) as path:
            yield Path(path)
    except OSError as error:
        raise ModelError(f"{folder}: cannot be written: {error.strerror}") from None


class Output:
    """A model being written: tensors go in one by one, `save` finishes, `publish` makes it appear.

    Everything is written into `folder` under its final names, so that it can be loaded and tried
    there. With `external`, tensors go on to a data file as they come.
    """

    def __init__(self, folder: Path, target: Path, external: bool) -> None:
        self.target = target
        self.path = folder / target.name
        self._folder = folder
        self._data_path = data_path(self.path)
        folder.mkdir(parents=True)
        self._data = self._data_path.open("wb") if external else None

    def store(self, tensor: TensorProto, raw: bytes | memoryview, inline: bool = False) -> None:
        """Give the tensor its data: into the protobuf, or on to the data file.

        inline: for tensors in attributes, which cannot have external data.
        """
        if inline or self._data is None or len(raw) < DETACH_BYTES:
            for field in ("float_data", "int32_data", "external_data", "data_location"):
                tensor.ClearField(field)
            tensor.raw_data = bytes(raw)
            return
        self._data.write(b"\0" * (-self._data.tell() % ALIGNMENT))
        refer(tensor, self._data_path.name, self._data.tell(), len(raw))
        self._data.write(raw)

    def save(self, proto: ModelProto, source: Model) -> None:
        """Write the proto; tensors that still refer to the source's data bring it along."""
        for graph in graphs(proto):
            for tensor in graph.initializer:
                if _is_detached(tensor):
                    self.store(tensor, source.raw(tensor))
        for tensor in attribute_tensors(proto):
            if _is_detached(tensor):
                self.store(tensor, source.raw(tensor), inline=True)
        if self._data:
            self._data.close()
        self.path.write_bytes(proto.SerializeToString(deterministic=True))

    @property
    def size(self) -> int:
        """Bytes written."""
        return sum(file.stat().st_size for file in self._folder.iterdir())

    def publish(self) -> None:
        """Move the finished files to the target, the data file first."""
        if self._data:
            os.replace(self._data_path, data_path(self.target))
        os.replace(self.path, self.target)


def data_path(model: Path) -> Path:
    """Where the external data of a written model goes."""
    return model.with_name(f"{model.name}.data")


def file_sha256(file: Path) -> str:
    """Hex digest of a file's bytes."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _detach(path: Path, proto: ModelProto) -> tuple[dict[str, bytes | Region], dict[str, Path]]:
    """Turn large and external tensors into references; their data, and the files by location."""
    payloads: dict[str, bytes | Region] = {}
    files: dict[str, Path] = {}
    external: list[tuple[TensorProto, Region]] = []
    for tensor in tensors(proto):
        payload: bytes | Region = tensor.raw_data
        if tensor.data_location == TensorProto.EXTERNAL:
            file = files[disk.entry(tensor, "location")] = disk.data_file(path, tensor)
            payload = disk.region(tensor, file)
            external.append((tensor, payload))
        elif len(tensor.raw_data) < DETACH_BYTES:
            continue
        key = f"{_DETACHED}{len(payloads)}"
        payloads[key] = payload
        refer(tensor, key)
    disk.shared_regions(external)
    return payloads, files


def _is_detached(tensor: TensorProto) -> bool:
    return disk.entry(tensor, "location").startswith(_DETACHED)
