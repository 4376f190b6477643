"""The opset that a written graph needs, and how the source gets there."""

from dataclasses import replace
from typing import Any

from .. import runtime
from ..errors import UnsupportedModelError, ValidationError
from ..graph.copies import IndexedModel
from ..graph.weights import Weight
from ..io.model import Model
from ..quantization.schemes import Scheme
from .weight_forms import form_of


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


def converted(source: Model, opset: int, original: IndexedModel) -> IndexedModel:
    """The source's graph at `opset` at least, with the same weights; `original` if it is.

    Raises UnsupportedModelError when onnx cannot convert it.
    """
    if _opset(source.proto) >= opset:
        return original
    try:
        result = IndexedModel.of(runtime.converted(source.proto, opset))
        there = {weight.name for weight in result.weights}
        if lost := {weight.name for weight in original.weights} - there:
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


def opset_for(form: str, scheme: Scheme) -> int:
    """The lowest version of the standard operators that has this form."""
    if scheme.bits == 4 and form in ("dequantize", "folded"):
        return 21  # blocks, and 4-bit integers as tensors
    return 7
