"""The opset that a written graph needs, and how the source gets there."""

from onnx import ModelProto, TensorProto, helper, numpy_helper

from .. import runtime
from ..errors import UnsupportedModelError, ValidationError
from ..formats import FLOAT4
from ..graph.copies import IndexedModel
from ..graph.operators import FLOATS, WeightForm
from ..graph.traversal import bodies, opset_of, tensors
from ..graph.weights import Weight
from ..io.model import Model
from ..quantization.schemes import Float8, Scheme
from .weight_forms import Target, form_of

RESIZE_OPSET = 11  # the first whose Resize says how coordinates are found

SCAN_OPSET = 9  # the first whose Scan has no axis for batches

CLIP_OPSET = 11  # the first whose Clip has its bounds as inputs


def needed_opset(weights: list[Weight], schemes: list[Scheme], target: Target) -> int:
    """The lowest opset that has every form the weights will take.

    Parameters
    ----------
    weights, schemes : the weights, and the scheme of each
    target : what the graph is written for
    """
    return max(
        opset_for(form_of(use, weight, scheme, target), scheme)
        for weight, scheme in zip(weights, schemes, strict=True)
        for use in weight.uses
    )


def converted(source: Model, opset: int, original: IndexedModel) -> IndexedModel:
    """The source's graph at `opset` at least, with the same weights; `original` if it is.

    Raises
    ------
    UnsupportedModelError : onnx cannot convert it, or not without losing a weight of `original`
    """
    if opset_of(source.proto) >= opset:
        return original
    try:
        _require_convertible(source.proto)
        proto = runtime.converted(source.proto, opset)
        if opset_of(source.proto) < RESIZE_OPSET:
            _keep_interpolation(proto)
        if opset_of(source.proto) < CLIP_OPSET:
            _keep_types(proto, source.proto)
        result = IndexedModel.of(proto)
        there = {weight.name for weight in result.weights}
        if lost := {weight.name for weight in original.weights} - there:
            raise ValidationError("tensor {tensor!r} would no longer be a weight", tensor=min(lost))
        return result
    except (runtime.RemoteError, ValidationError) as error:
        raise UnsupportedModelError(
            "opset {old} cannot be converted to {new}, which this scheme needs: {found}",
            path=source.path,
            found=str(error),
            old=opset_of(source.proto),
            new=opset,
        ) from None


def _require_convertible(proto: ModelProto) -> None:
    """Raise ValidationError for what onnx's converter (1.23) silently turns into something else."""
    nodes = (node for body in bodies(proto) for node in body.node)
    if opset_of(proto) < SCAN_OPSET and any(n.op_type == "Scan" for n in nodes):
        raise ValidationError("a Scan of before opset 9 goes over batches, which no later one does")


def _keep_interpolation(proto: ModelProto) -> None:
    """Let Resize nodes of before RESIZE_OPSET compute what they did.

    onnx's converter leaves them with newer defaults.
    """
    before = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    for body in bodies(proto):
        for node in body.node:
            if node.op_type == "Resize":
                named = {each.name for each in node.attribute}
                node.attribute.extend(
                    helper.make_attribute(name, value)
                    for name, value in before.items()
                    if name not in named
                )


def _keep_types(proto: ModelProto, source: ModelProto) -> None:
    """Give the bounds of Clip nodes the type of what they clip.

    onnx's converter makes constants of float32 of them, whatever that is.
    """
    clipped = [node for node in proto.graph.node if node.op_type == "Clip"]
    in_16_bits = {*FLOATS} - {TensorProto.FLOAT}
    if not (clipped and any(tensor.data_type in in_16_bits for tensor in tensors(source))):
        return
    inferred = runtime.inferred(source).graph
    values = (*inferred.input, *inferred.output, *inferred.value_info)
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    makers = {node.output[0]: node for node in proto.graph.node if node.op_type == "Constant"}
    for node in clipped:
        wanted = types.get(node.input[0], TensorProto.FLOAT)
        for maker in (makers[name] for name in node.input[1:] if name in makers):
            bound = numpy_helper.to_array(maker.attribute[0].t)
            cast = bound.astype(helper.tensor_dtype_to_np_dtype(wanted))
            maker.attribute[0].t.CopyFrom(numpy_helper.from_array(cast))


def opset_for(form: WeightForm, scheme: Scheme) -> int:
    """The lowest opset that has this form."""
    if scheme.name in FLOAT4 and form is WeightForm.DEQUANTIZE:
        return 23  # the first with 4-bit floats as tensors
    if isinstance(scheme, Float8) and form in (WeightForm.DEQUANTIZE, WeightForm.FOLDED):
        return 19  # the first with 8-bit floats as tensors
    as_tensors = form in (WeightForm.DEQUANTIZE, WeightForm.FOLDED, WeightForm.GATHER)
    if scheme.bits < 8 and as_tensors:
        return {2: 25, 4: 21}[scheme.bits]  # the first with such integers as tensors
    if scheme.in_blocks and form is WeightForm.DEQUANTIZE:
        return 21  # the first with scales per block
    if form is WeightForm.DEQUANTIZE:
        return 13  # the first with scales per axis
    return 10 if form in (WeightForm.GATHER, WeightForm.GATHER_PACKED) else 7
