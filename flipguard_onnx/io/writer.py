"""Write a model tensor by tensor, so that its weights are never in memory together."""

from pathlib import Path

from onnx import ModelProto, TensorProto

from ..errors import ModelError
from ..graph.traversal import attribute_tensors, graphs
from . import external_data, wire
from .external_data import set_reference
from .model import DETACH_BYTES, Model, file_sha256, is_detached
from .publish import Finished
from .wire import Region

ALIGNMENT = 64  # bytes; of every tensor in a data file


class Output:
    """A model being written: `store` takes its tensors one by one, `save` finishes it.

    Everything is written into `folder` under its final names, so that the model can be loaded and
    validated there. `store` appends to a data file; unless the model is to have one, `save` moves
    the tensors from there into the model file.

    Parameters
    ----------
    folder : is made
    target : where the model goes in the end; None if it never leaves the folder
    external : leave the tensors in a data file
    """

    def __init__(self, folder: Path, target: Path | None, external: bool) -> None:
        self.path = folder / (target.name if target else f"{folder.name}.onnx")
        self._folder = folder
        self._external = external
        self._published = target is not None
        name = self.path.name.encode(errors="replace").decode()  # what a protobuf can hold
        if external and name != self.path.name:
            raise ModelError("a model with a data file needs a name in UTF-8", path=target)
        self._data_path = self.path.with_name(f"{name}.data")
        folder.mkdir(parents=True)
        self._data = self._data_path.open("wb")
        self._data_sha256 = ""

    def store(self, tensor: TensorProto, raw: bytes | memoryview, inline: bool = False) -> None:
        """Write the data of a tensor to the data file, or into the protobuf if it is short.

        Parameters
        ----------
        tensor : of the proto that will be saved
        raw : its values as raw_data holds them
        inline : the tensor is in an attribute and cannot have external data
        """
        if len(raw) < DETACH_BYTES or (inline and self._external):
            for field in ("float_data", "int32_data", "external_data", "data_location"):
                tensor.ClearField(field)
            tensor.raw_data = bytes(raw)
            return
        self._append_reference(tensor, len(raw))
        self._data.write(raw)

    def _append_reference(self, tensor: TensorProto, length: int) -> None:
        self._data.write(b"\0" * (-self._data.tell() % ALIGNMENT))
        set_reference(tensor, self._data_path.name, self._data.tell(), length)

    def save(self, proto: ModelProto, source: Model) -> None:
        """Write the proto, with the data of the tensors that still refer to the source's."""
        for graph in graphs(proto):
            for tensor in graph.initializer:
                if is_detached(tensor):
                    region = source.region(tensor)
                    self._append_reference(tensor, region.length)
                    region.copy_to(self._data)
        for tensor in attribute_tensors(proto):
            if is_detached(tensor):
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
        offset, length = (int(external_data.entry(tensor, key)) for key in ("offset", "length"))
        return Region(self._data_path, offset, length)

    @property
    def size(self) -> int:
        """Bytes written."""
        return sum(file.stat().st_size for file in self._folder.iterdir())

    def sha256(self, file: Path) -> str:
        """Hex digest of one of the files written."""
        return (file == self._data_path and self._data_sha256) or file_sha256(file)

    def finished(self, target: Path) -> Finished:
        """The files written, to be published at `target`."""
        return Finished(self.path, self._data_path if self._external else None, target)

    def _name_data(self, proto: ModelProto) -> None:
        """Rename the data file as `publish` needs it, in the references as well."""
        old = self._data_path
        self._data_sha256 = file_sha256(old)
        self._data_path = old.with_name(f"{self.path.name}.{self._data_sha256[:16]}.data")
        old.rename(self._data_path)
        for graph in graphs(proto):
            for tensor in graph.initializer:
                for entry in tensor.external_data:
                    if entry.key == "location" and entry.value == old.name:
                        entry.value = self._data_path.name
