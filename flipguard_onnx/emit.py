"""The models that a run writes, each a copy of the source that takes the weights one by one."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

import numpy.typing as npt
import onnx
from onnx import ModelProto

from . import runtime
from .errors import UnsupportedModelError, ValidationError
from .flip import Flips
from .model import Model, Output, raw_bytes
from .parts import stored
from .qdq import Emitter, form_of, opset_for
from .schemes import Scheme
from .weights import Weight, find_weights


class Sink(Protocol):
    """Takes the guarded tensors by name, ignores those that it does not have, writes the model."""

    output: Output

    def put(self, name: str, scheme: Scheme, flips: Flips) -> None: ...

    def save(self, metadata: dict[str, str]) -> None: ...


class Quantized:
    """A graph with codes: the guarded ones, or those of plain rounding."""

    def __init__(
        self,
        source: Model,
        prepared: ModelProto,
        output: Output,
        standard_ops: bool,
        plain: bool = False,
    ) -> None:
        self.output = output
        self._source = source
        self._plain = plain
        self._proto = copied(prepared)
        self._weights = by_name(self._proto)
        self._emitter = Emitter(self._proto, output, standard_ops)
        self.forms: dict[str, tuple[str, ...]] = {}  # by weight: what `qdq.form_of` chose

    def put(self, name: str, scheme: Scheme, flips: Flips) -> None:
        if weight := self._weights.get(name):
            codes = flips.plain if self._plain else flips.codes
            self.forms[name] = self._emitter.emit(weight, scheme, flips.grid, codes)

    def save(self, metadata: dict[str, str]) -> None:
        self._emitter.finish()
        save(self._proto, self.output, self._source, metadata)


class Rewritten:
    """The same graph with other float weights; `values` picks them from the Flips."""

    def __init__(
        self, source: Model, output: Output, values: Callable[[Flips], npt.NDArray[Any]]
    ) -> None:
        self.output = output
        self._source = source
        self._values = values
        self._proto = copied(source.proto)
        self._weights = by_name(self._proto)

    def put(self, name: str, scheme: Scheme, flips: Flips) -> None:
        weight = self._weights.get(name)
        if not weight:
            return
        dtype = onnx.helper.tensor_dtype_to_np_dtype(weight.tensor.data_type)
        values = stored(weight, flips, self._values, dtype)
        self.output.store(weight.tensor, raw_bytes(values), inline=weight.node is not None)

    def save(self, metadata: dict[str, str]) -> None:
        save(self._proto, self.output, self._source, metadata)


def guarded_values(flips: Flips) -> npt.NDArray[Any]:
    """Float weights from which the user's own quantizer makes the guarded codes."""
    assert flips.guarded is not None
    return flips.guarded


def decoded_values(flips: Flips) -> npt.NDArray[Any]:
    """What the guarded codes stand for."""
    return flips.grid.decode(flips.codes)


def needed_opset(weights: list[Weight], schemes: list[Scheme], standard_ops: bool) -> int:
    """The lowest version of the standard operators that has every form the weights will take."""
    return max(
        opset_for(form_of(use, weight, scheme, standard_ops), scheme)
        for weight, scheme in zip(weights, schemes, strict=True)
        for use in weight.uses
    )


def inlined(source: Model, opset: int) -> Model:
    """The source, with its local functions expanded if they or the graph are older than `opset`.

    onnx converts graphs and drops their functions. Raises UnsupportedModelError when it cannot.
    """
    functions = source.proto.functions
    if not functions or all(_opset(part) >= opset for part in (source.proto, *functions)):
        return source
    try:
        return replace(source, proto=runtime.inlined(source.proto))
    except (runtime.RemoteError, ValidationError) as error:
        raise UnsupportedModelError(
            f"{source.path}: its local functions cannot be expanded: {error}"
        ) from None


def converted(source: Model, opset: int, weights: list[Weight]) -> ModelProto:
    """The source's graph at `opset` at least, with the same weights.

    Raises UnsupportedModelError when onnx cannot convert it.
    """
    if _opset(source.proto) >= opset:
        return source.proto
    try:
        result = runtime.converted(source.proto, opset)
        if lost := {weight.name for weight in weights} - set(by_name(result)):
            raise ValidationError(f"tensor {min(lost)!r} would no longer be a weight")
        return result
    except (runtime.RemoteError, ValidationError) as error:
        raise UnsupportedModelError(
            f"{source.path}: opset {_opset(source.proto)} cannot be converted to {opset}, "
            f"which this scheme needs: {error}"
        ) from None


def _opset(entity: Any) -> int:
    versions = [o.version for o in entity.opset_import if o.domain in ("", "ai.onnx")]
    return max(versions, default=1 << 31)  # a function without standard operators has no say


def copied(proto: ModelProto) -> ModelProto:
    """A graph to edit; no weights are moved, as they stand in it as references."""
    copy = ModelProto()
    copy.CopyFrom(proto)
    return copy


def by_name(proto: ModelProto) -> dict[str, Weight]:
    """The weights of a graph."""
    return {weight.name: weight for weight in find_weights(proto)[0]}


def save(proto: ModelProto, output: Output, source: Model, metadata: dict[str, str]) -> None:
    """Write a graph with these entries in its metadata."""
    kept = [entry for entry in proto.metadata_props if entry.key not in metadata]
    del proto.metadata_props[:]
    proto.metadata_props.extend(kept)
    for key, value in metadata.items():
        proto.metadata_props.add(key=key, value=value)
    output.save(proto, source)
