"""Full QDQ graphs: activations in integers, by onnxruntime's own static quantizer.

It reads the guarded float model and calibrates; then its codes are compared with the guarded ones.
A weight that has exactly the guarded codes, scales and zero points stays as onnxruntime wrote it
and runs in integers. Any other weight gets its guarded codes in the weight-only form, and the
report says why. All other constants that onnxruntime rounded become float again: an attacker may
have aligned them, since they were not rounded at random.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from onnx import GraphProto, ModelProto, NodeProto
from onnx.numpy_helper import from_array

from .. import runtime
from ..calibration.inputs import Feed
from ..calibration.samples import Samples
from ..calibration.synthetic import synthetic_feeds
from ..errors import UnsupportedModelError, ValidationError
from ..graph.copies import IndexedModel
from ..graph.operators import OPERATORS, operator_of
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

OPSETS = {"int8": 13, "uint8": 13, "int16": 21}  # the first with QuantizeLinear to each type

WEIGHTED = tuple(operator.name for operator in OPERATORS if operator.static)

# Products, activation functions, normalizations and most sums (see _float_sums) stay float:
# measured on eight real models, integers there bring no speed and up to 1.7 times the drift.
QUANTIZED_OPERATORS = (
    *WEIGHTED, "Add", "Relu", "Clip", "MaxPool", "AveragePool", "GlobalAveragePool", "Reshape",
    "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Resize", "Concat", "Split", "Slice", "Pad",
)  # fmt: skip

SAMPLES = 32  # inputs that are synthesized beside the accepted ones

SEED = 1  # of these; they need not be secret


@dataclass(frozen=True)
class Calibration:
    """What the static quantizer is told.

    Attributes
    ----------
    integers : the options
    per_channel : whether each output channel of a weight has a scale of its own
    feeds : the inputs on which it finds the ranges of activations
    """

    integers: ActivationQuantization
    per_channel: bool
    feeds: list[Feed]

    @classmethod
    def of(
        cls,
        asked: ActivationQuantization,
        per_channel: bool,
        samples: Samples,
    ) -> "Calibration":
        """On the samples that were given, else on those found and more that resemble real ones.

        Parameters
        ----------
        asked : the options
        per_channel : whether each output channel of a weight has a scale
        samples : those of the model, as `preprocessed` returns it
        """
        feeds = samples.given
        if not feeds:
            noise = samples.require().feeds
            made_up = synthetic_feeds(samples.source, samples.session, noise[0], SAMPLES, 1, SEED)
            feeds = noise + made_up
        inputs = "data" if samples.given else "synthetic"
        return cls(replace(asked, inputs=inputs, feeds=len(feeds)), per_channel, feeds)


def require_reachable(source: Model, weights: Sequence[Weight]) -> None:
    """Require that the static quantizer reaches one of the weights, as it does not in subgraphs.

    Raises
    ------
    UnsupportedModelError : it reaches none
    """
    main = source.proto.graph
    uses = (use for weight in weights for use in weight.uses if use.scope.body is main)
    if not any(use.operator and use.operator.static for use in uses):
        raise UnsupportedModelError(
            f"no weight feeds {', '.join(WEIGHTED)} in the main graph, and in subgraphs "
            "onnxruntime's static quantizer does not reach any; go without --activations",
            path=source.path,
        )


def preprocessed(source: Model, activations: str, max_bytes: int, folder: Path) -> Model:
    """The source as onnxruntime's pre-processing leaves it: constants folded, BatchNormalization
    merged into Conv, shapes inferred, at an opset that has the activations' type.

    Parameters
    ----------
    source : the model
    activations : the type that its activations will have
    max_bytes : the size of the largest model that is loaded
    folder : for intermediate files

    Raises
    ------
    UnsupportedModelError : the model is larger than `max_bytes`, or cannot be processed
    """
    max_bytes = min(max_bytes, INLINE_LIMIT)
    if source.size > max_bytes:
        raise UnsupportedModelError(
            "has {found:,} bytes, which onnxruntime's quantizer would load whole",
            path=source.path,
            found=source.size,
            allowed=f"up to {max_bytes:,} with --activations (--max-memory, and 1 GiB)",
        )
    converted_source = Output(folder / "converted", None, external=False)
    proto = ModelProto()
    opset = OPSETS[activations]
    proto.CopyFrom(converted(source, opset, IndexedModel.of(source.proto)).proto)
    converted_source.save(proto, source)
    result = folder / "preprocessed.onnx"
    try:
        runtime.preprocess(converted_source.path, result, source.size)
    except (runtime.RemoteError, ValidationError) as error:
        raise UnsupportedModelError(
            "onnxruntime's pre-processing refuses it: {found}", found=str(error), path=source.path
        ) from None
    made = open_model(result)
    for node in made.proto.graph.node:
        if node.op_type == "Add" and not node.name:
            node.name = f"{node.output[0]}_Add"  # nodes that stay float are listed by name
    _multiply_out_beta(made)
    used = {node.domain for body in bodies(made.proto) for node in body.node}
    for index in reversed(range(len(made.proto.opset_import))):
        if made.proto.opset_import[index].domain not in {"", *used}:
            del made.proto.opset_import[index]
    _keep_metadata(made.proto, source.proto)
    return replace(source, proto=made.proto, payloads=made.payloads)


def _multiply_out_beta(model: Model) -> None:
    """Gemm(x, w, b, beta) -> Gemm(x, w, beta * b), for a constant b.

    onnxruntime's static quantizer (1.32) ignores beta there.
    """
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


def _float_sums(main: GraphProto) -> list[str]:
    """The names of the Add nodes that stay float.

    Only the sum of a convolution's output and another activation is in integers, which the next
    convolution can take as they are.
    """
    makers = {name: operator_of(node) for node in main.node for name in node.output}

    def is_float(node: NodeProto) -> bool:
        operators = [makers[name] for name in node.input if name in makers]
        has_constant = len(operators) < len(node.input)
        return has_constant or not any(o.convolution for o in operators if o)

    return [node.name for node in main.node if node.op_type == "Add" and is_float(node)]


@dataclass(frozen=True)
class _Guarded:
    """The codes of a guarded weight, flat in canonical order."""

    scheme: Scheme
    grid: Grid
    codes: Codes


class StaticQdqWriter:
    """The float model with guarded weights, quantized whole.

    Parameters
    ----------
    source, prepared : the model, and its graph at the opset that is written
    output : where it is written
    calibration : what the static quantizer is told
    target : as in GuardOptions, for weight-only tensors
    nearest : take the model's own weights, rounded to nearest, instead of the guarded ones

    Attributes
    ----------
    integers : what became of the tensors, after `save`
    """

    def __init__(
        self,
        source: Model,
        graph: IndexedModel,
        output: Output,
        calibration: Calibration,
        target: str,
        nearest: bool = False,
    ) -> None:
        self.output = output
        self.integers = calibration.integers
        self._folder = output.path.parent.with_name(f"{output.path.parent.name}-float")
        self._float = FloatWriter(source, graph, Output(self._folder, None, False), guarded_values)
        self._float_sums = _float_sums(graph.proto.graph)
        self._calibration = calibration
        self._target = target
        self._nearest = nearest
        self._guarded: dict[str, _Guarded] = {}

    def add_weight(self, name: str, scheme: Scheme, quantized: QuantizedTensor) -> None:
        if not self._nearest:
            self._float.add_weight(name, scheme, quantized)
        codes = quantized.nearest if self._nearest else quantized.codes
        self._guarded[name] = _Guarded(scheme, quantized.grid, codes)

    def save(self, metadata: dict[str, str]) -> None:
        self._float.save({})
        result = self._folder / "static.onnx"
        settings = runtime.StaticQuantization(
            operators=QUANTIZED_OPERATORS,
            excluded_nodes=self._float_sums,
            activations=self.integers.activations,
            symmetric=self.integers.symmetric,
            calibration=self.integers.calibration,
            per_channel=self._calibration.per_channel,
        )
        runtime.quantize_static(self._float.output.path, result, settings, self._calibration.feeds)
        floats, made = (open_model(p, digests=False) for p in (self._float.output.path, result))
        weights = {weight.name: weight for weight in find_weights(floats.proto)[0]}
        checker = StaticGraphChecker(made, floats, self.output)
        for name, guarded in self._guarded.items():
            checker.weight(weights[name], guarded.grid, guarded.codes)
        checker.finish()
        self.integers = replace(
            self.integers, weight_only=checker.weight_only, floats=tuple(checker.floats)
        )
        self._emit_the_rest(made.proto)
        _keep_metadata(made.proto, floats.proto)
        save(made.proto, self.output, made, metadata)

    def _emit_the_rest(self, proto: ModelProto) -> None:
        """Write the weight-only tensors in the forms that a graph with float activations has."""
        left = {w.name: w for w in find_weights(proto, partly=True)[0] if w.name in self._guarded}
        if lost := self.integers.weight_only.keys() ^ left.keys():
            raise ValidationError(
                "tensor {tensor!r}: its codes found no place in the graph", tensor=min(lost)
            )
        emitter = Emitter(proto, self.output, self._target)
        for name, weight in left.items():
            guarded = self._guarded[name]
            emitter.emit(weight, guarded.scheme, guarded.grid, guarded.codes)
        emitter.finish()


def _keep_metadata(proto: ModelProto, source: ModelProto) -> None:
    """Give a graph the source's metadata, without what onnxruntime added."""
    del proto.metadata_props[:]
    proto.metadata_props.extend(source.metadata_props)
