"""Write a model so that it is whole or absent; its tensors go in one by one."""

from pathlib import Path

from onnx import ModelProto, TensorProto

from ..errors import ModelError
from ..graph.traversal import attribute_tensors, graphs
from . import external_data, wire
from .external_data import refer
from .model import DETACH_BYTES, Model, _is_detached, file_sha256
from .publish import Finished
from .wire import Region

ALIGNMENT = 64


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
        offset, length = (
            int(external_data.entry(tensor, "offset")),
            int(external_data.entry(tensor, "length")),
        )
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
