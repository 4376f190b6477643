"""Writers of models: each copies the source and takes the guarded weights one by one."""

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
from .weight_forms import Emitter, Target


class ModelWriter(Protocol):
    """Takes the guarded weights, then writes the model.

    output: where it is written.
    """

    output: Output

    def add_weight(self, name: str, scheme: Scheme, quantized: QuantizedTensor) -> None:
        """Take one weight, by its name; a weight that the model does not have is ignored."""

    def save(self, metadata: dict[str, str]) -> None:
        """Write the model, with these entries in its metadata."""


class QdqWriter:
    """Writes a graph with codes.

    Parameters
    ----------
    source, prepared : the model, and its graph at the opset that is written
    output : where it is written
    target : what it is written for
    nearest : take the codes of rounding to nearest instead of the guarded ones

    Attributes
    ----------
    forms : by name of a weight: the forms that its readers got, as `Emitter.emit` returns them
    """

    def __init__(
        self,
        source: Model,
        graph: IndexedModel,
        output: Output,
        target: Target,
        nearest: bool = False,
    ) -> None:
        self.output = output
        self._source = source
        self._nearest = nearest
        self._proto, self._weights = graph.copy()
        self._emitter = Emitter(self._proto, output, target)
        self.forms: dict[str, tuple[str, ...]] = {}

    def add_weight(self, name: str, scheme: Scheme, quantized: QuantizedTensor) -> None:
        if weight := self._weights.get(name):
            codes = quantized.nearest if self._nearest else quantized.codes
            self.forms[name] = self._emitter.emit(weight, scheme, quantized.grid, codes)

    def save(self, metadata: dict[str, str]) -> None:
        self._emitter.finish()
        save(self._proto, self.output, self._source, metadata)


class FloatWriter:
    """Writes the same graph with other float weights.

    Parameters
    ----------
    source : the model
    output : where it is written
    values : returns the weights, flat and in canonical order, of a guarded tensor

    Attributes
    ----------
    proto : the graph
    """

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
        self.proto, self._weights = graph.copy()

    def add_weight(self, name: str, scheme: Scheme, quantized: QuantizedTensor) -> None:
        weight = self._weights.get(name)
        if not weight:
            return
        dtype = onnx.helper.tensor_dtype_to_np_dtype(weight.tensor.data_type)
        values = stored_values(weight.layout, quantized, self._values, dtype)
        self.output.store(weight.tensor, raw_bytes(values), inline=weight.node is not None)

    def save(self, metadata: dict[str, str]) -> None:
        save(self.proto, self.output, self._source, metadata)


def guarded_values(quantized: QuantizedTensor) -> npt.NDArray[Any]:
    """Float weights from which the user's own quantizer makes the guarded codes."""
    assert quantized.guarded is not None
    return quantized.guarded


def decoded_values(quantized: QuantizedTensor) -> npt.NDArray[Any]:
    """What the guarded codes stand for."""
    return quantized.grid.decode(quantized.codes)


def save(proto: ModelProto, output: Output, source: Model, metadata: dict[str, str]) -> None:
    """Write a graph with these entries in its metadata."""
    kept = [entry for entry in proto.metadata_props if entry.key not in metadata]
    del proto.metadata_props[:]
    proto.metadata_props.extend(kept)
    for key, value in metadata.items():
        proto.metadata_props.add(key=key, value=value)
    output.save(proto, source)
