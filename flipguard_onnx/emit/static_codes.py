"""The graph that onnxruntime's static quantizer wrote, gone through constant by constant."""

from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, NodeProto, TensorProto

from ..errors import ValidationError
from ..graph.operators import REQUANTIZED
from ..graph.scopes import Scope
from ..graph.traversal import attribute, bodies, output_names
from ..graph.weights import Weight
from ..io.model import Model
from ..io.writer import Output
from ..quantization.arrays import raw_bytes
from ..quantization.schemes import Codes, Grid
from .rewriter import Rewriter

ROUNDED = 0.5 * (1 + 1e-6)  # steps by which rounding to nearest may move a bias

NEGLIGIBLE = 1 / 256  # of the step to which a result is rounded anyway

Array = npt.NDArray[Any]


class StaticGraphChecker:
    """Takes the guarded weights one by one, then judges all other constants.

    weight_only: weights whose codes onnxruntime would change, and why. floats: other constants
    that stay float.
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
            if node.op_type == "DequantizeLinear" and node.input[0] in self._constants
        }
        self._exact: dict[str, NodeProto] = {}  # of the guarded weights, by what they yield

    def weight(self, weight: Weight, grid: Grid, codes: Codes) -> None:
        """Keep a guarded weight if it is as it must be, else put the float tensor back for now."""
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
            return
        self._back_to_float(weight.name, decoder, reason)

    def finish(self) -> None:
        """Judge biases and all other constants, after the weights."""
        readers = {name: node for node in self._graph.node for name in node.input}
        for name, decoder in self._decoders.items():
            if name not in self._originals:
                raise ValidationError(f"tensor {decoder.input[0]!r}: made by onnxruntime, of what?")
            original = self._originals[name]
            if original.dims and self._array(decoder.input[0]).dtype == np.int32:
                self._bias(name, decoder, readers[decoder.output[0]])
            elif np.prod(original.dims) > 1:
                self._back_to_float(name, decoder)
        _drop_unread_initializers(self._made.proto)
        self._hold_floats()
        _drop_unread_initializers(self._made.proto)

    def _bias(self, name: str, decoder: NodeProto, reader: NodeProto) -> None:
        """Keep a bias that is held to half a step of the products, or to a small part of that of
        the result; with any other falls the weight beside it.

        Where all codes of a channel are 0 the step of its products is arbitrary. onnxruntime
        enlarges a weight's scale, and so changes its codes, until the bias fits; it was told not
        to, and clips.
        """
        beside = self._exact.get(reader.input[1])
        if beside:
            found, scale, _ = (self._array(n).astype(np.float64) for n in decoder.input)
            codes = self._array(beside.input[0])
            axes: tuple[int, ...] = tuple(range(codes.ndim))
            if self._array(beside.input[1]).size > 1:
                axes = tuple(a for a in axes if a != attribute(beside, "axis", 1) % codes.ndim)
            live = codes.any(axis=axes)
            wanted = self._floats.array(self._originals[name]).astype(np.float64)
            most = np.where(live, ROUNDED * scale, 0) + 1e-6 * np.abs(wanted)
            if np.all(np.abs(found * scale - wanted) <= np.maximum(most, self._negligible(reader))):
                stored = self._constants[decoder.input[0]]
                del stored.dims[:-1]  # a Gemm's [1, N]: one scale for each of N wants [N]
                return
            weight = beside.input[0].removesuffix("_quantized")
            reason = "the bias beside it does not fit into 32 bits at the step of its products"
            self._back_to_float(weight, beside, reason)
        self._back_to_float(name, decoder)

    def _negligible(self, node: NodeProto) -> float:
        """What may be added to the node's result unseen; 0 where that is not quantized at once."""
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
        """Keep onnxruntime's optimizer from rounding float weights and biases when it loads the
        file, to int8 per tensor and to int32, because what they are multiplied with is quantized.

        It passes by where the bias is not a constant; a DequantizeLinear is none, and this one
        yields exactly the bias. Source: onnxruntime's WeightBiasQuantization.
        """
        rewriter, scope = Rewriter(self._made.proto, self._output), Scope(self._graph)
        floats = {t.name: t for t in self._graph.initializer if t.data_type == TensorProto.FLOAT}
        for node in self._graph.node:
            if node.op_type not in REQUANTIZED or node.input[1] not in floats:
                continue
            name = node.input[2] if len(node.input) > 2 else ""
            if not name:
                values = np.zeros(_outputs(node, floats[node.input[1]]), np.float32)
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

    def _back_to_float(self, name: str, decoder: NodeProto, reason: str | None = None) -> None:
        """Let the readers of a decoder read the float tensor; `reason` for a guarded one."""
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


def _outputs(node: NodeProto, weight: TensorProto) -> int:
    """How many output channels a node of REQUANTIZED has."""
    if node.op_type == "ConvTranspose":
        return weight.dims[1] * int(attribute(node, "group", 1))
    by_row = node.op_type == "Conv" or attribute(node, "transB", 0)
    return weight.dims[0 if by_row else 1]


def _drop_unread_initializers(proto: ModelProto) -> None:
    read = {name for body in bodies(proto) for node in body.node for name in node.input}
    read.update(output_names(proto.graph))
    for index in reversed(range(len(proto.graph.initializer))):
        if proto.graph.initializer[index].name not in read:
            del proto.graph.initializer[index]
