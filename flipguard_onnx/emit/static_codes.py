"""The graph that onnxruntime's static quantizer wrote, checked constant by constant."""

from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, NodeProto, TensorProto

from ..errors import ValidationError
from ..graph.operators import operator_of
from ..graph.scopes import Scope
from ..graph.traversal import attribute, bodies, output_names
from ..graph.weights import Weight
from ..io.model import Model
from ..io.writer import Output
from ..quantization.arrays import raw_bytes
from ..quantization.schemes import Codes, Grid
from .rewriter import Rewriter

MAX_ROUNDING = 0.5 * (1 + 1e-6)  # steps by which rounding to nearest may move a bias

NEGLIGIBLE = 1 / 256  # of the step to which a result is rounded anyway

Array = npt.NDArray[Any]


class StaticGraphChecker:
    """Takes the guarded weights one by one, then judges all other constants.

    Parameters
    ----------
    made : what the static quantizer wrote, which is edited
    floats : the float model that it read
    output : where the data of new constants is written

    Attributes
    ----------
    weight_only : by name of a weight whose codes onnxruntime would change: why
    floats : names of the other constants that stay float
    """

    def __init__(self, made: Model, floats: Model, output: Output) -> None:
        self.weight_only: dict[str, str] = {}
        self.floats: list[str] = []
        self._made, self._floats, self._output = made, floats, output
        self._graph = made.proto.graph
        self._constants = {tensor.name: tensor for tensor in self._graph.initializer}
        self._originals = {tensor.name: tensor for tensor in floats.proto.graph.initializer}
        self._decoders = {  # by the name of the tensor that onnxruntime quantized
            node.input[0].removesuffix("_quantized"): node
            for node in self._graph.node
            if node.op_type == "DequantizeLinear"
            and node.input[0] in self._constants
            and node.input[0] not in self._originals
        }
        self._exact: dict[str, NodeProto] = {}  # of the guarded weights, by what they yield
        self._with_rows: dict[str, Weight] = {}  # of these, those whose rows have scales each

    def weight(self, weight: Weight, grid: Grid, codes: Codes) -> None:
        """Keep a weight that has the guarded codes and scales; put any other back as floats.

        Parameters
        ----------
        weight, grid : the weight in the float model, and its guarded scales
        codes : the guarded ones, flat, in canonical order
        """
        decoder = self._decoders.pop(weight.name, None)
        if decoder is None:
            self.weight_only[weight.name] = f"onnxruntime leaves this {weight.op} float"
            return
        found, scale, zero = (self._array(name) for name in decoder.input)
        rows = grid.scale.size
        if scale.size != rows or (rows > 1 and weight.rows != (attribute(decoder, "axis", 1),)):
            reason = f"onnxruntime gives {scale.size} scales to what has {rows}"
        elif zero.any() or scale.reshape(-1).astype(np.float32).tobytes() != grid.scale.tobytes():
            reason = "onnxruntime chose other scales"
        elif changed := int(np.sum(found != weight.stored(codes))):
            reason = f"onnxruntime chose other codes for {changed:,} weights"
        else:
            self._exact[decoder.output[0]] = decoder
            if rows > 1:
                self._with_rows[decoder.output[0]] = weight
            return
        self._back_to_float(weight.name, decoder, reason)

    def finish(self) -> None:
        """Judge biases and all other constants, after the weights.

        Raises
        ------
        ValidationError : a constant is not known to come from the float model
        """
        readers = {name: node for node in self._graph.node for name in node.input}
        for name, decoder in self._decoders.items():
            if name not in self._originals:
                raise ValidationError(
                    "tensor {tensor!r}: onnxruntime made it of no tensor that is known",
                    tensor=decoder.input[0],
                )
            original = self._originals[name]
            if original.dims and self._array(decoder.input[0]).dtype == np.int32:
                self._bias(name, decoder, readers[decoder.output[0]])
            elif np.prod(original.dims) > 1:
                self._back_to_float(name, decoder)
        _drop_unread_initializers(self._made.proto)
        self._hold_floats()
        self._hide_codes()
        _drop_unread_initializers(self._made.proto)

    def _bias(self, name: str, decoder: NodeProto, reader: NodeProto) -> None:
        """Keep a bias if rounding moves it by no more than half a step of the products, or by a
        small part of a step of the result. If it moves further, neither the bias nor the weight
        beside it runs in integers.

        The step of a channel's products is input scale x weight scale; where all codes of the
        channel are 0 it is arbitrary. By default onnxruntime enlarges the scale of a weight until
        the bias fits into 32 bits, which changes the codes; it was told not to, so it clips.
        """
        beside = self._exact.get(reader.input[1])
        if beside:
            found, scale, _ = (self._array(n).astype(np.float64) for n in decoder.input)
            codes = self._array(beside.input[0])
            axes: tuple[int, ...] = tuple(range(codes.ndim))
            if self._array(beside.input[1]).size > 1:
                axes = tuple(a for a in axes if a != attribute(beside, "axis", 1) % codes.ndim)
            used = codes.any(axis=axes)
            wanted = self._floats.array(self._originals[name]).astype(np.float64)
            max_error = np.where(used, MAX_ROUNDING * scale, 0) + 1e-6 * np.abs(wanted)
            max_error = np.maximum(max_error, self._negligible(reader))
            if np.all(np.abs(found * scale - wanted) <= max_error):
                stored = self._constants[decoder.input[0]]
                del stored.dims[
                    :-1
                ]  # a Gemm's [1, N] becomes [N]: there is one scale for each of N
                return
            weight = beside.input[0].removesuffix("_quantized")
            reason = "the bias beside it does not fit into 32 bits at the step of its products"
            self._back_to_float(weight, beside, reason)
        self._back_to_float(name, decoder)

    def _negligible(self, node: NodeProto) -> float:
        """The largest error of the node's result that its rounding hides; 0 if it is not rounded
        at once."""
        name, quantized = node.output[0], None
        while quantized is None:
            readers = [n for n in self._graph.node if name in n.input]
            if len(readers) != 1 or name in output_names(self._graph):
                return 0.0
            if readers[0].op_type == "QuantizeLinear":
                quantized = readers[0]
            elif readers[0].op_type in ("Relu", "Clip") and readers[0].input[0] == name:
                name = readers[0].output[0]
            else:
                return 0.0
        return NEGLIGIBLE * float(self._array(quantized.input[1]).min())

    def _hold_floats(self) -> None:
        """Conv(x, w, b) -> Conv(x, w, DequantizeLinear(ones, b)), where w is float and x is not.

        When onnxruntime loads the file, its optimizer would round such a w to int8 per tensor and
        b to int32, but only if b is a constant. The output of a DequantizeLinear is none, and this
        one is exactly b. Source: onnxruntime's WeightBiasQuantization.
        """
        rewriter, scope = Rewriter(self._made.proto, self._output), Scope(self._graph)
        floats = {t.name: t for t in self._graph.initializer if t.data_type == TensorProto.FLOAT}
        for node in self._graph.node:
            operator = operator_of(node)
            if not operator or not operator.requantized or node.input[1] not in floats:
                continue
            name = node.input[2] if len(node.input) > 2 else ""
            if not name:
                shape = tuple(floats[node.input[1]].dims)
                values = np.zeros(operator.output_channels(node, shape), np.float32)
            elif name in self._originals and len(self._originals[name].dims) == 1:
                values = self._floats.array(self._originals[name])
            else:
                continue
            name = name or f"{node.input[1]}_bias"
            ones = rewriter.constant(scope, f"{name}_quantized", np.ones(values.shape, np.int8))
            scale = rewriter.constant(scope, f"{name}_scale", values)
            decoded = f"{name}_DequantizeLinear_Output"
            del node.input[2:]
            node.input.append(
                rewriter.node(scope, "DequantizeLinear", [ones, scale], decoded, axis=0)
            )
        rewriter.finish()

    def _hide_codes(self) -> None:
        """Reader(DequantizeLinear(codes)) -> Reader(Max(DequantizeLinear(codes), lowest)), for each
        reader that has other output channels than those with the scales.

        When onnxruntime loads the file, it would fuse the two all the same, and give the scales to
        the wrong channels. The Max, which changes no value, is in its way.
        """
        rewriter, scope = Rewriter(self._made.proto, self._output), Scope(self._graph)
        hidden: dict[str, str] = {}
        for node in self._graph.node:
            for index, name in enumerate(node.input):
                weight = self._with_rows.get(name)
                if weight is None or _has_scales(node, index, weight):
                    continue
                if name not in hidden:
                    values = np.array(np.finfo(np.float32).min)
                    lowest = rewriter.constant(scope, f"{weight.name}_lowest", values)
                    value = f"{weight.name}_Max_Output"
                    hidden[name] = rewriter.node(scope, "Max", [name, lowest], value)
                node.input[index] = hidden[name]
        rewriter.finish()

    def _back_to_float(self, name: str, decoder: NodeProto, reason: str | None = None) -> None:
        """Let the readers of a decoder read the float tensor.

        reason: why, for a guarded weight; None for another constant.
        """
        tensor = TensorProto()
        tensor.CopyFrom(self._originals[name])
        if reason is None:
            self.floats.append(name)
            self._output.store(tensor, raw_bytes(self._floats.array(self._originals[name])))
        else:
            self.weight_only[name] = reason  # its codes will take the tensor's place
        self._graph.initializer.append(tensor)
        for node in self._graph.node:
            for index, read in enumerate(node.input):
                if read == decoder.output[0]:
                    node.input[index] = name
        self._graph.node.remove(decoder)

    def _array(self, name: str) -> Array:
        return self._made.array(self._constants[name])


def quantized_axis(node: NodeProto, index: int) -> int | None:
    """The axis of a weight along which onnxruntime's static quantizer (1.32) has its scales differ.

    It is the same whatever number of axes there are, and on both sides of a MatMul; None on the
    left of a Gemm, where the quantizer takes a weight for an activation.
    """
    if node.op_type == "Gemm":
        return (0 if attribute(node, "transB", 0) else 1) if index == 1 else None
    return 0 if node.op_type == "Conv" else 1


def _has_scales(node: NodeProto, index: int, weight: Weight) -> bool:
    """Whether the weight's scales are those of this reader's output channels."""
    operator = operator_of(node)
    if not operator or not operator.static or index not in operator.weights:
        return False
    axes = operator.output_axes(node, index, len(weight.shape))
    return axes == weight.rows == (quantized_axis(node, index),)


def _drop_unread_initializers(proto: ModelProto) -> None:
    read = {name for body in bodies(proto) for node in body.node for name in node.input}
    read.update(output_names(proto.graph))
    for index in reversed(range(len(proto.graph.initializer))):
        if proto.graph.initializer[index].name not in read:
            del proto.graph.initializer[index]
