"""Full QDQ graphs: activations in integers, by onnxruntime's own static quantizer.

It reads the guarded float model and calibrates; what is done here is to hold it to the guarded
codes. A weight whose codes, scales and zero points are exactly those stays as onnxruntime wrote it
and runs in integers. Any other gets its guarded codes in the weight-only form, with the reason.
Other constants that onnxruntime would round are put back as they were: what nobody drew at random
an attacker may have aligned.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import GraphProto, ModelProto, NodeProto, TensorProto

from . import runtime
from .emit import Rewritten, Sink, converted, guarded_values, save
from .errors import DriftError, SchemeError, UnsupportedModelError, ValidationError
from .feeds import Feed, load_feeds
from .flip import Flips
from .integers import Integers
from .model import INLINE_LIMIT, Model, Output, bodies, open_model, output_names, raw_bytes
from .options import one_of
from .qdq import Emitter
from .schemes import Codes, Grid, Scheme
from .scopes import attribute
from .synthetic import synthetic_feeds
from .validate import Runner, Validation, pooled
from .weights import Weight, find_weights

OPSETS = {"int8": 13, "uint8": 13, "int16": 21}  # that have QuantizeLinear to these types
CALIBRATIONS = ("minmax", "entropy", "percentile")
WEIGHTED = ("Conv", "ConvTranspose", "MatMul", "Gemm")
# Elementwise sums and products, activation functions and normalizations stay float: measured on
# eight real models, integers there bring no speed and up to 1.7 times the drift.
OPERATORS = (
    *WEIGHTED, "Relu", "Clip", "MaxPool", "AveragePool", "GlobalAveragePool", "Reshape",
    "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Resize", "Concat", "Split", "Slice", "Pad",
)  # fmt: skip
SAMPLES = 32  # that are made up
SEED = 1  # of these; they need not be secret
ROUNDED = 0.5 * (1 + 1e-6)  # steps by which rounding to nearest may move a bias

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Calibration:
    """What the static quantizer is told: the options, the granularity of the weights' scales, and
    the inputs on which it finds the ranges of activations."""

    integers: Integers
    per_channel: bool
    feeds: list[Feed]

    @classmethod
    def of(
        cls,
        integers: Integers,
        granularity: str,
        source: Model,
        weights: Sequence[Weight],
        data: Path | None,
    ) -> "Calibration":
        """On the inputs of `data`, else on made-up ones.

        Raises UnsupportedModelError when the static quantizer would find none of the weights.
        """
        if not any(_within_reach(source.proto.graph, weight) for weight in weights):
            raise UnsupportedModelError(
                f"{source.path}: no weight feeds {', '.join(WEIGHTED)} in the main graph, and in "
                "subgraphs onnxruntime's static quantizer does not reach any; allowed: to go "
                "without --activations"
            )
        if data:
            feeds = load_feeds(data, source.proto)
        else:
            noise = Runner(source, None).feeds
            session = runtime.open_session(source.path, exact=True, size=source.size)
            feeds = noise + synthetic_feeds(source, session, noise[0], SAMPLES, 1, SEED)
        inputs = "data" if data else "synthetic"
        integers = replace(integers, inputs=inputs, feeds=len(feeds))
        return cls(integers, granularity == "channel", feeds)


def asked_for(
    activations: str | None, symmetric: bool, calibration: str, scheme: str, emit: str
) -> Integers | None:
    """The options together, None without activations.

    Raises SchemeError for what is unknown or does not fit the other options.
    """
    one_of("calibration", calibration, CALIBRATIONS)
    if activations is None:
        if symmetric:
            raise SchemeError("symmetric goes with activations")
        return None
    one_of("activations", activations, tuple(OPSETS))
    if scheme != "int8":
        raise SchemeError(f"activations go with scheme int8, not {scheme!r}")
    if emit == "float":
        raise SchemeError("activations go with emit 'qdq' or 'both', not 'float'")
    return Integers(activations, symmetric, calibration)


def preprocessed(source: Model, integers: Integers, most: int, folder: Path) -> Model:
    """The source as onnxruntime's pre-processing leaves it: constants folded, BatchNormalization
    merged into Conv, shapes inferred, at an opset that has the activations' type.

    Raises UnsupportedModelError when it is larger than `most` bytes or cannot be processed.
    """
    most = min(most, INLINE_LIMIT)
    if source.size > most:
        raise UnsupportedModelError(
            f"{source.path}: has {source.size:,} bytes; allowed with --activations: {most:,} "
            "(up to --max-memory and 1 GiB), since onnxruntime's quantizer loads it whole"
        )
    given = Output(folder / "given", None, external=False)
    proto = ModelProto()
    opset = OPSETS[integers.activations]
    proto.CopyFrom(converted(source, opset, find_weights(source.proto)[0]))
    given.save(proto, source)
    result = folder / "preprocessed.onnx"
    try:
        runtime.preprocess(given.path, result, source.size)
    except (runtime.RemoteError, ValidationError) as error:
        raise UnsupportedModelError(
            f"{source.path}: onnxruntime's pre-processing refuses it: {error}"
        ) from None
    made = open_model(result)
    used = {node.domain for body in bodies(made.proto) for node in body.node}
    for index in reversed(range(len(made.proto.opset_import))):
        if made.proto.opset_import[index].domain not in {"", *used}:
            del made.proto.opset_import[index]
    _keep_metadata(made.proto, source.proto)
    return replace(source, proto=made.proto, payloads=made.payloads)


def _within_reach(main: GraphProto, weight: Weight) -> bool:
    return any(use.scope.body is main and use.op in WEIGHTED for use in weight.uses)


def require_useful(validation: Validation, integers: Integers) -> None:
    """Raise DriftError when outputs are no nearer to the original's than zeros would be."""
    drift = pooled(validation.guarded_default)
    if not drift < 1:
        raise DriftError(
            f"with {integers.activations} activations the outputs drift by {drift:.4f} (relative "
            "L2) from the original's; allowed: below 1, which zeros have; real inputs (--data) or "
            "another --calibration may help"
        )


class Static:
    """A sink: the float model with guarded (`plain`: with its own) weights, quantized whole.

    integers: what became of the tensors, after `save`.
    """

    def __init__(
        self,
        source: Model,
        prepared: ModelProto,
        output: Output,
        calibration: Calibration,
        standard_ops: bool,
        plain: bool = False,
    ) -> None:
        self.output = output
        self.integers = calibration.integers
        self._folder = output.path.parent.with_name(f"{output.path.parent.name}-float")
        self._float = Rewritten(
            replace(source, proto=prepared), Output(self._folder, None, False), guarded_values
        )
        self._calibration = calibration
        self._standard_ops = standard_ops
        self._plain = plain
        self._guarded: dict[str, tuple[Scheme, Grid, Codes]] = {}

    def put(self, name: str, scheme: Scheme, flips: Flips) -> None:
        if not self._plain:
            self._float.put(name, scheme, flips)
        self._guarded[name] = scheme, flips.grid, flips.plain if self._plain else flips.codes

    def save(self, metadata: dict[str, str]) -> None:
        self._float.save({})
        result = self._folder / "static.onnx"
        runtime.quantize_static(
            self._float.output.path,
            result,
            OPERATORS,
            self.integers.activations,
            self.integers.symmetric,
            self.integers.calibration,
            self._calibration.per_channel,
            self._calibration.feeds,
        )
        floats, made = open_model(self._float.output.path), open_model(result)
        weights = {weight.name: weight for weight in find_weights(floats.proto)[0]}
        settled = _Settled(made, floats, self.output)
        for name, (_, grid, codes) in self._guarded.items():
            settled.weight(weights[name], grid, codes)
        settled.finish()
        self.integers = replace(
            self.integers, weight_only=settled.weight_only, floats=tuple(settled.floats)
        )
        _drop_unread_initializers(made.proto)
        self._emit_the_rest(made.proto)
        _keep_metadata(made.proto, floats.proto)
        save(made.proto, self.output, made, metadata)

    def _emit_the_rest(self, proto: ModelProto) -> None:
        """The weight-only tensors, in the forms that they have without activations."""
        left = {w.name: w for w in find_weights(proto, partly=True)[0] if w.name in self._guarded}
        if lost := self.integers.weight_only.keys() ^ left.keys():
            raise ValidationError(f"tensor {min(lost)!r}: its codes found no place in the graph")
        emitter = Emitter(proto, self.output, self._standard_ops)
        for name, weight in left.items():
            emitter.emit(weight, *self._guarded[name])
        emitter.finish()


def sinks(
    source: Model,
    prepared: ModelProto,
    output: Callable[[str], Output],
    calibration: Calibration,
    standard_ops: bool,
    measured: bool,
) -> dict[str, Sink]:
    """The guarded model and, where it is `measured`, the plainly quantized one beside it."""
    return {
        kind: Static(source, prepared, output(kind), calibration, standard_ops, kind == "plain")
        for kind in (("qdq", "plain") if measured else ("qdq",))
    }


class _Settled:
    """The graph that onnxruntime wrote, gone through constant by constant."""

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

    def _bias(self, name: str, decoder: NodeProto, reader: NodeProto) -> None:
        """Keep a bias that 32 bits hold to half a step; with it falls the weight beside it.

        The step is that of the products; where all codes of a channel are 0 it is arbitrary, and
        the bias must be exact. onnxruntime enlarges a weight's scale, and so changes its codes,
        until the bias fits; it was told not to, and clips.
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
            if np.all(np.abs(found * scale - wanted) <= most):
                stored = self._constants[decoder.input[0]]
                del stored.dims[:-1]  # a Gemm's [1, N]: one scale for each of N wants [N]
                return
            weight = beside.input[0].removesuffix("_quantized")
            reason = "the bias beside it does not fit into 32 bits at the step of its products"
            self._back_to_float(weight, beside, reason)
        self._back_to_float(name, decoder)

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


def _drop_unread_initializers(proto: ModelProto) -> None:
    read = {name for body in bodies(proto) for node in body.node for name in node.input}
    read.update(output_names(proto.graph))
    for index in reversed(range(len(proto.graph.initializer))):
        if proto.graph.initializer[index].name not in read:
            del proto.graph.initializer[index]


def _keep_metadata(proto: ModelProto, source: ModelProto) -> None:
    """Without onnxruntime's notes to itself."""
    del proto.metadata_props[:]
    proto.metadata_props.extend(source.metadata_props)
