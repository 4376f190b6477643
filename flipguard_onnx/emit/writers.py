"""The models that a run writes, each a copy of the source that takes the weights one by one."""

from collections.abc import Callable
from typing import Any, Protocol

import numpy.typing as npt
import onnx
from onnx import ModelProto

from ..graph.copies import IndexedModel
from ..io.model import Model
from ..io.writer import Output
from ..quantization.arrays import raw_bytes
from ..quantization.chunks import stored_values
from ..quantization.rounding import QuantizedTensor
from ..quantization.schemes import Scheme
from .weight_forms import Emitter


class ModelWriter(Protocol):
    """Takes the guarded tensors by name, ignores those that it does not have, writes the model."""

    output: Output

    def add_weight(self, name: str, scheme: Scheme, flips: QuantizedTensor) -> None: ...

    def save(self, metadata: dict[str, str]) -> None: ...


class QdqWriter:
    """A graph with codes: the guarded ones, or those of plain rounding."""

    def __init__(
        self,
        source: Model,
        graph: IndexedModel,
        output: Output,
        standard_ops: bool,
        plain: bool = False,
    ) -> None:
        self.output = output
        self._source = source
        self._plain = plain
        self._proto, self._weights = graph.copy()
        self._emitter = Emitter(self._proto, output, standard_ops)
        self.forms: dict[str, tuple[str, ...]] = {}  # by weight: what `qdq.form_of` chose

    def add_weight(self, name: str, scheme: Scheme, flips: QuantizedTensor) -> None:
        if weight := self._weights.get(name):
            codes = flips.nearest if self._plain else flips.codes
            self.forms[name] = self._emitter.emit(weight, scheme, flips.grid, codes)

    def save(self, metadata: dict[str, str]) -> None:
        self._emitter.finish()
        save(self._proto, self.output, self._source, metadata)


class FloatWriter:
    """The same graph with other float weights; `values` picks them from the QuantizedTensor."""

    def __init__(
        self,
        source: Model,
        graph: IndexedModel,
        output: Output,
        values: Callable[[QuantizedTensor], npt.NDArray[Any]],
    ) -> None:
        self.output = output
        self._source = source
        self._values = values
        self._proto, self._weights = graph.copy()

    def add_weight(self, name: str, scheme: Scheme, flips: QuantizedTensor) -> None:
        weight = self._weights.get(name)
        if not weight:
            return
        dtype = onnx.helper.tensor_dtype_to_np_dtype(weight.tensor.data_type)
        values = stored_values(weight.layout, flips, self._values, dtype)
        self.output.store(weight.tensor, raw_bytes(values), inline=weight.node is not None)

    def save(self, metadata: dict[str, str]) -> None:
        save(self._proto, self.output, self._source, metadata)


def guarded_values(flips: QuantizedTensor) -> npt.NDArray[Any]:
    """Float weights from which the user's own quantizer makes the guarded codes."""
    assert flips.guarded is not None
    return flips.guarded


def decoded_values(flips: QuantizedTensor) -> npt.NDArray[Any]:
    """What the guarded codes stand for."""
    return flips.grid.decode(flips.codes)


def save(proto: ModelProto, output: Output, source: Model, metadata: dict[str, str]) -> None:
    """Write a graph with these entries in its metadata."""
    kept = [entry for entry in proto.metadata_props if entry.key not in metadata]
    del proto.metadata_props[:]
    proto.metadata_props.extend(kept)
    for key, value in metadata.items():
        proto.metadata_props.add(key=key, value=value)
    output.save(proto, source)
