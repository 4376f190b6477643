"""Full QDQ graphs: activations in integers, by onnxruntime's own static quantizer.

It reads the guarded float model and calibrates; then its codes are compared with the guarded ones.
A weight that has exactly the guarded codes, scales and zero points stays as onnxruntime wrote it
and runs in integers. Any other weight gets its guarded codes in the weight-only form, and the
report says why. All other constants that onnxruntime rounded become float again: an attacker may
have aligned them, since they were not rounded at random.
"""

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from graphlib import TopologicalSorter

from onnx import GraphProto, ModelProto, NodeProto, TensorProto

from .. import runtime
from ..calibration.inputs import BATCH, Feed, Input, node_readers, signature
from ..calibration.samples import Samples
from ..calibration.synthetic import synthetic_feeds
from ..errors import OptionError, UnsupportedModelError, ValidationError
from ..graph.copies import IndexedModel
from ..graph.operators import CHAIN, OPERATORS, VIEWS, operator_of
from ..graph.scopes import Use
from ..graph.traversal import attribute, output_names
from ..graph.weights import Place, Weight, find_weights
from ..io.integrity import needed_nodes
from ..io.model import Model, open_model
from ..io.writer import Output
from ..quantization.rounding import QuantizedTensor
from ..quantization.schemes import Codes, Grid, Scheme
from ..reports.guard import ActivationQuantization
from .preprocessing import bias_of, make_room
from .rewriter import drop_lost_defaults
from .static_codes import StaticGraphChecker, quantized_axis
from .weight_forms import Emitter, Target
from .writers import FloatWriter, guarded_values, save

WEIGHTED = tuple(operator.name for operator in OPERATORS if operator.static)

# Products, activation functions, normalizations and most sums (see _left_float) stay float:
# measured on eight real models, integers there bring no speed and up to 1.7 times the drift.
QUANTIZED_OPERATORS = (
    *WEIGHTED, "Add", "Relu", "Clip", "MaxPool", "AveragePool", "GlobalAveragePool", "Reshape",
    "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Resize", "Concat", "Split", "Slice", "Pad",
)  # fmt: skip

UNROUNDED = "_QuantizeLinear_Input"  # ends the name of an output before it is rounded

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

        Raises
        ------
        OptionError : the inputs have several shapes, and it counts values by their size
        """
        feeds = samples.given
        if not feeds:
            noise = samples.require().feeds
            made_up = synthetic_feeds(samples.source, samples.session, noise[0], SAMPLES, 1, SEED)
            feeds = noise + made_up
        if asked.calibration != "minmax":
            feeds = list(_alike(feeds, signature(samples.source.proto)))
            if len({tuple(values.shape for values in feed.values()) for feed in feeds}) > 1:
                raise OptionError(
                    "calibration {found!r} takes inputs of one shape",
                    found=asked.calibration,
                    allowed="such data, or minmax",
                    path=samples.data,
                )
        inputs = "data" if samples.given else "synthetic"
        return cls(replace(asked, inputs=inputs, feeds=len(feeds)), per_channel, feeds)


def _alike(feeds: Sequence[Feed], inputs: Sequence[Input]) -> Iterator[Feed]:
    """The samples of the feeds, as many in each as divide the numbers of all."""
    split = [each.name for each in inputs if each.dims[:1] == (BATCH,)]
    step = math.gcd(*(len(feed[name]) for feed in feeds for name in split))
    for feed in feeds:
        for start in range(0, len(feed[split[0]]) if split else 1, step or 1):
            some = slice(start, start + step)
            yield feed | {name: feed[name][some] for name in split}


def require_reachable(source: Model, weights: Sequence[Weight]) -> None:
    """Require that the static quantizer reaches one of the weights, as it does not in subgraphs.

    Raises
    ------
    UnsupportedModelError : it reaches none
    """
    main = source.proto.graph
    uses = (use for weight in weights for use in weight.uses if use.scope.body is main)
    if not any(use.direct and use.operator and use.operator.static for use in uses):
        raise UnsupportedModelError(
            f"no weight feeds {', '.join(WEIGHTED)} in the main graph, and in subgraphs "
            "onnxruntime's static quantizer does not reach any; go without --activations",
            path=source.path,
        )


def _left_float(main: GraphProto) -> list[str]:
    """The names of the nodes that stay float.

    Of the sums, only that of a convolution's output and another activation is in integers, which
    the next convolution can take as they are. What onnxruntime's static quantizer (1.32) gets wrong
    stays float, too: biases that are not one constant for each output channel, those of a
    ConvTranspose with groups, and a Relu or Clip of an output of the graph, which would get the
    range behind it; and an operator whose weight is empty, as its output has no range. So does what
    is computed from constants alone.
    """
    makers = {name: operator_of(node) for node in main.node for name in node.output}
    outputs = {*output_names(main)}
    constants = {tensor.name: tensor for tensor in main.initializer}
    constant = {*constants}
    for node in main.node:
        if node.input and constant.issuperset(node.input):
            constant.update(node.output)

    def is_float(node: NodeProto) -> bool:
        if node.input and constant.issuperset(node.input):
            return True
        if node.op_type in ("Relu", "Clip"):
            return node.input[0] in outputs
        if any(0 in constants[name].dims for name in node.input if name in constants):
            return True
        if name := bias_of(node):
            weight, bias = (constants.get(each) for each in (node.input[1], name))
            grouped = node.op_type == "ConvTranspose" and attribute(node, "group", 1) > 1
            return grouped or not (weight and bias and _one_per_channel(node, weight, bias))
        if node.op_type != "Add":
            return False
        operators = [makers[name] for name in node.input if name in makers]
        has_constant = len(operators) < len(node.input)
        return has_constant or not any(o.convolution for o in operators if o)

    return [node.name for node in main.node if is_float(node)]


def _behind_views(main: GraphProto, uses: Iterable[Use]) -> list[str]:
    """The names of the nodes that a view of a weight passes through, and of those that it reaches.

    A view whose shape is computed, of learned queries for example, would be rounded again, as an
    activation.
    """
    readers = node_readers(main.node)
    pending = [
        use.node
        for use in uses
        if use.operator and not (use.direct or use.behind) and use.scope.body is main
    ]
    found = {}
    while pending:
        node = pending.pop()
        if id(node) not in found:
            found[id(node)] = node.name
            if node.op_type in (*VIEWS, *CHAIN):
                pending += [reader for name in node.output for reader in readers[name]]
    return list(found.values())


def _read_otherwise(weights: Iterable[Weight]) -> list[str]:
    """The names of the nodes that read a weight whose scales onnxruntime would not give to them.

    Its static quantizer (1.32) gives all readers the scales that fit one of them, and knows scales
    that differ along one axis, which follows from the operator.
    """
    return [
        use.node.name
        for weight in weights
        for use in weight.uses
        if use.direct and use.operator and not _takes_scales(use, weight)
    ]


def _takes_scales(use: Use, weight: Weight) -> bool:
    """Whether onnxruntime's scales differ along the axis along which the weight's do."""
    axis = quantized_axis(use.node, use.index)
    return axis is not None and use.output_axes() == weight.rows == (use.perm[axis],)


def _one_per_channel(node: NodeProto, weight: TensorProto, bias: TensorProto) -> bool:
    """Whether a bias is [channels] or [1, channels]."""
    operator = operator_of(node)
    channels = operator.output_channels(node, tuple(weight.dims)) if operator else 0
    return tuple(bias.dims) in ((channels,), (1, channels))


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
        uses = [use for weight in graph.weights for use in weight.uses]
        # what is picked from a stack would be rounded again, as an activation
        picked = [use.behind.node.name for use in uses if use.behind]
        main = graph.proto.graph
        self._left_float = _left_float(main) + picked + _behind_views(main, uses)
        if calibration.per_channel:
            self._left_float += _read_otherwise(graph.weights)
        self._rows = {weight.name: weight.rows for weight in graph.weights}
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
        renamed = make_room(self._float.proto)
        copies = _CopiedInputs(self._float.proto.graph)
        self._float.save({})
        result = self._folder / "static.onnx"
        settings = runtime.StaticQuantization(
            operators=QUANTIZED_OPERATORS,
            excluded_nodes=self._left_float,
            activations=self.integers.activations,
            symmetric=self.integers.symmetric,
            calibration=self.integers.calibration,
            per_channel=self._calibration.per_channel,
        )
        runtime.quantize_static(self._float.output.path, result, settings, self._calibration.feeds)
        floats, made = (open_model(p, digests=False) for p in (self._float.output.path, result))
        weights = {weight.name: weight for weight in find_weights(floats.proto)[0]}
        checker = StaticGraphChecker(made, floats, self.output)
        called = {new: old for old, new in renamed.items()}
        self._guarded = {renamed.get(name, name): g for name, g in self._guarded.items()}
        self._rows = {renamed.get(name, name): rows for name, rows in self._rows.items()}
        for name, guarded in self._guarded.items():
            checker.weight(weights[name], guarded.grid, guarded.codes)
        checker.finish()
        if not any(node.op_type == "QuantizeLinear" for node in made.proto.graph.node):
            nothing = next(iter(self._guarded)), "what it is multiplied with stays float"
            name, reason = next(iter(checker.weight_only.items()), nothing)
            raise UnsupportedModelError(
                "nothing would run in integers (tensor {tensor!r}: {found}); "
                "go without --activations",
                tensor=called.get(name, name),
                found=reason,
            )
        copies.put_back(made.proto.graph)
        drop_lost_defaults(made.proto, floats.proto)
        _sort(made.proto.graph)
        places = {_place(weights[name]): name for name in self._guarded}
        self._emit_the_rest(made.proto, places, checker.weight_only)
        weight_only = {called.get(name, name): why for name, why in checker.weight_only.items()}
        floats_left = tuple(called.get(name, name) for name in checker.floats)
        self.integers = replace(self.integers, weight_only=weight_only, floats=floats_left)
        _keep_metadata(made.proto, floats.proto)
        save(made.proto, self.output, made, metadata)

    def _emit_the_rest(
        self, proto: ModelProto, places: Mapping[Place, str], weight_only: Collection[str]
    ) -> None:
        """Write the weight-only tensors in the forms that a graph with float activations has.

        So are those in integers for readers that stay float, as all in subgraphs do.

        proto : what the static quantizer made
        places : the names of the guarded weights, by their places
        weight_only : the names of those that must be there
        """
        weights = find_weights(proto, partly=True)[0]
        left = {places[_place(w)]: w for w in weights if _place(w) in places}
        if lost := set(weight_only) - left.keys():
            raise ValidationError(
                "tensor {tensor!r}: its codes found no place in the graph", tensor=min(lost)
            )
        emitter = Emitter(proto, self.output, Target.of(proto, self._target))
        for name, found in left.items():
            guarded = self._guarded[name]
            weight = replace(found, rows=self._rows[name])  # whatever stands before its operator
            emitter.emit(weight, guarded.scheme, guarded.grid, guarded.codes)
        emitter.finish()


class _CopiedInputs:
    """The outputs of a graph that are its inputs, itself or copied by an Identity, set aside.

    onnxruntime's static quantizer (1.32) makes a cycle of the former, and rounds the latter.

    graph: of the model, which loses them.
    """

    def __init__(self, graph: GraphProto) -> None:
        inputs = {value.name for value in graph.input}
        readers = node_readers(graph.node)
        self._nodes = [
            node
            for node in graph.node
            if node.op_type == "Identity"
            and node.input[0] in inputs
            and node.output[0] in output_names(graph)
            and not readers[node.output[0]]
        ]
        copied = inputs.union(*(node.output for node in self._nodes))
        self._outputs = [(i, v) for i, v in enumerate(graph.output) if v.name in copied]
        for node in self._nodes:
            graph.node.remove(node)
        for _, value in self._outputs:
            graph.output.remove(value)

    def put_back(self, graph: GraphProto) -> None:
        """Give them to what the static quantizer made of the graph."""
        graph.node.extend(self._nodes)
        for index, value in self._outputs:
            graph.output.insert(index, value)


def _place(weight: Weight) -> Place:
    """The weight's place in the model, also in what onnxruntime's static quantizer made of it.

    That gives another name to what a node with graphs in it yields, if it is an output of the model
    and is quantized.
    """
    path, name = weight.place
    return tuple(part.removesuffix(UNROUNDED) for part in path), name


def _sort(main: GraphProto) -> None:
    """Put nodes behind those that they need.

    onnxruntime's static quantizer (1.32) does not look at what the graphs inside a node need.
    """
    nodes = list(main.node)
    order = TopologicalSorter(needed_nodes(main)).static_order()
    del main.node[:]
    main.node.extend(nodes[index] for index in order)


def _keep_metadata(proto: ModelProto, source: ModelProto) -> None:
    """Give a graph the source's metadata, without what onnxruntime added."""
    del proto.metadata_props[:]
    proto.metadata_props.extend(source.metadata_props)
