"""Full QDQ graphs: activations in integers, by onnxruntime's own static quantizer.

It reads the guarded float model and calibrates; what is done here is to hold it to the guarded
codes. A weight whose codes, scales and zero points are exactly those stays as onnxruntime wrote it
and runs in integers. Any other gets its guarded codes in the weight-only form, with the reason.
Other constants that onnxruntime would round are put back as they were: what nobody drew at random
an attacker may have aligned.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from onnx import GraphProto, ModelProto
from onnx.numpy_helper import from_array

from .. import runtime
from ..calibration.inputs import Feed
from ..calibration.samples import Samples
from ..calibration.synthetic import synthetic_feeds
from ..errors import UnsupportedModelError, ValidationError
from ..graph.copies import IndexedModel
from ..graph.operators import CONVOLUTIONS, WEIGHTED
from ..graph.traversal import attribute, bodies
from ..graph.weights import Weight, find_weights
from ..io.model import INLINE_LIMIT, Model, open_model
from ..io.writer import Output
from ..quantization.rounding import QuantizedTensor
from ..quantization.schemes import Codes, Grid, Scheme
from ..reports.guard import ActivationQuantization
from .opset import converted
from .rewriter import remove_named
from .static_codes import StaticGraphChecker
from .weight_forms import Emitter
from .writers import FloatWriter, guarded_values, save

OPSETS = {"int8": 13, "uint8": 13, "int16": 21}  # that have QuantizeLinear to these types

CALIBRATIONS = ("minmax", "entropy", "percentile")

# Products, activation functions, normalizations and most sums (see _float_sums) stay float:
# measured on eight real models, integers there bring no speed and up to 1.7 times the drift.
OPERATORS = (
    *WEIGHTED, "Add", "Relu", "Clip", "MaxPool", "AveragePool", "GlobalAveragePool", "Reshape",
    "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Resize", "Concat", "Split", "Slice", "Pad",
)  # fmt: skip

SAMPLES = 32  # that are made up

SEED = 1  # of these; they need not be secret


@dataclass(frozen=True)
class Calibration:
    """What the static quantizer is told: the options, the granularity of the weights' scales, and
    the inputs on which it finds the ranges of activations."""

    integers: ActivationQuantization
    per_channel: bool
    feeds: list[Feed]

    @classmethod
    def of(
        cls,
        asked: ActivationQuantization,
        per_channel: bool,
        weights: Sequence[Weight],
        samples: Samples,
    ) -> "Calibration":
        """On the samples that were given, else on those found and more that resemble real ones.

        weights: those of the samples' source. Raises UnsupportedModelError when the static
        quantizer would find none of them.
        """
        source = samples.source
        if not any(_within_reach(source.proto.graph, weight) for weight in weights):
            raise UnsupportedModelError(
                f"{source.path}: no weight feeds {', '.join(WEIGHTED)} in the main graph, and in "
                "subgraphs onnxruntime's static quantizer does not reach any; allowed: to go "
                "without --activations"
            )
        feeds = samples.given
        if not feeds:
            noise = samples.require().feeds
            made_up = synthetic_feeds(source, samples.session, noise[0], SAMPLES, 1, SEED)
            feeds = noise + made_up
        inputs = "data" if samples.given else "synthetic"
        return cls(replace(asked, inputs=inputs, feeds=len(feeds)), per_channel, feeds)


def preprocessed(source: Model, activations: str, max_bytes: int, folder: Path) -> Model:
    """The source as onnxruntime's pre-processing leaves it: constants folded, BatchNormalization
    merged into Conv, shapes inferred, at an opset that has the activations' type.

    Raises UnsupportedModelError when it is larger than `max_bytes` or cannot be processed.
    """
    max_bytes = min(max_bytes, INLINE_LIMIT)
    if source.size > max_bytes:
        raise UnsupportedModelError(
            f"{source.path}: has {source.size:,} bytes; allowed with --activations: {max_bytes:,} "
            "(up to --max-memory and 1 GiB), since onnxruntime's quantizer loads it whole"
        )
    given = Output(folder / "given", None, external=False)
    proto = ModelProto()
    opset = OPSETS[activations]
    proto.CopyFrom(converted(source, opset, IndexedModel.of(source.proto)).proto)
    given.save(proto, source)
    result = folder / "preprocessed.onnx"
    try:
        runtime.preprocess(given.path, result, source.size)
    except (runtime.RemoteError, ValidationError) as error:
        raise UnsupportedModelError(
            f"{source.path}: onnxruntime's pre-processing refuses it: {error}"
        ) from None
    made = open_model(result)
    for node in made.proto.graph.node:
        if node.op_type == "Add" and not node.name:
            node.name = f"{node.output[0]}_Add"  # it takes a name to leave a node float
    _multiply_out_beta(made)
    used = {node.domain for body in bodies(made.proto) for node in body.node}
    for index in reversed(range(len(made.proto.opset_import))):
        if made.proto.opset_import[index].domain not in {"", *used}:
            del made.proto.opset_import[index]
    _keep_metadata(made.proto, source.proto)
    return replace(source, proto=made.proto, payloads=made.payloads)


def _multiply_out_beta(model: Model) -> None:
    """onnxruntime's static quantizer (1.32) drops the factor of a Gemm's constant bias."""
    main = model.proto.graph
    constants = {tensor.name: tensor for tensor in main.initializer}
    for node in main.node:
        beta = attribute(node, "beta", 1.0)
        if node.op_type != "Gemm" or beta == 1 or not {*node.input[2:]} & constants.keys():
            continue
        bias = model.array(constants[node.input[2]])
        node.input[2] = f"{node.output[0]}_{node.input[2]}"
        main.initializer.append(from_array((beta * bias).astype(bias.dtype), node.input[2]))
        remove_named(node.attribute, "beta")


def _within_reach(main: GraphProto, weight: Weight) -> bool:
    return any(use.scope.body is main and use.op in WEIGHTED for use in weight.uses)


def _float_sums(main: GraphProto) -> list[str]:
    """The names of the Add nodes that stay float: of all but the sums of two activations one of
    which a convolution yields, where integers pass on to the next convolution."""
    makers = {name: node.op_type for node in main.node for name in node.output}
    return [
        node.name
        for node in main.node
        if node.op_type == "Add"
        and not (
            all(name in makers for name in node.input)
            and any(makers[name] in CONVOLUTIONS for name in node.input)
        )
    ]


class StaticQdqWriter:
    """A sink: the float model with guarded (`plain`: with its own) weights, quantized whole.

    integers: what became of the tensors, after `save`.
    """

    def __init__(
        self,
        source: Model,
        graph: IndexedModel,
        output: Output,
        calibration: Calibration,
        standard_ops: bool,
        plain: bool = False,
    ) -> None:
        self.output = output
        self.integers = calibration.integers
        self._folder = output.path.parent.with_name(f"{output.path.parent.name}-float")
        self._float = FloatWriter(source, graph, Output(self._folder, None, False), guarded_values)
        self._float_sums = _float_sums(graph.proto.graph)
        self._calibration = calibration
        self._standard_ops = standard_ops
        self._plain = plain
        self._guarded: dict[str, tuple[Scheme, Grid, Codes]] = {}

    def add_weight(self, name: str, scheme: Scheme, flips: QuantizedTensor) -> None:
        if not self._plain:
            self._float.add_weight(name, scheme, flips)
        self._guarded[name] = scheme, flips.grid, flips.nearest if self._plain else flips.codes

    def save(self, metadata: dict[str, str]) -> None:
        self._float.save({})
        result = self._folder / "static.onnx"
        settings = runtime.StaticQuantization(
            operators=OPERATORS,
            excluded_nodes=self._float_sums,
            activations=self.integers.activations,
            symmetric=self.integers.symmetric,
            calibration=self.integers.calibration,
            per_channel=self._calibration.per_channel,
        )
        runtime.quantize_static(self._float.output.path, result, settings, self._calibration.feeds)
        floats, made = (open_model(p, digests=False) for p in (self._float.output.path, result))
        weights = {weight.name: weight for weight in find_weights(floats.proto)[0]}
        settled = StaticGraphChecker(made, floats, self.output)
        for name, (_, grid, codes) in self._guarded.items():
            settled.weight(weights[name], grid, codes)
        settled.finish()
        self.integers = replace(
            self.integers, weight_only=settled.weight_only, floats=tuple(settled.floats)
        )
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


def _keep_metadata(proto: ModelProto, source: ModelProto) -> None:
    """Without onnxruntime's notes to itself."""
    del proto.metadata_props[:]
    proto.metadata_props.extend(source.metadata_props)
