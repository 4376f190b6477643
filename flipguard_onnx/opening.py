"""Open a model as a quantizer would see it: weights behind constant expressions are evaluated.

The evaluation happens in the child process that runs models, on a model of nothing but the
constants and nodes that lead to the weights. What comes of it is data like that of the file: it
lies in a temporary file, and the protobuf refers to it.
"""

import os
import tempfile
import time
import weakref
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from math import prod
from pathlib import Path

from onnx import ModelProto, TensorProto

from . import runtime
from .errors import UnsupportedModelError, ValidationError
from .graph.constants import ConstantValues, Expression, Inferred
from .graph.operators import FLOATS
from .graph.scopes import Value
from .graph.traversal import graphs
from .graph.weights import OTHER_FLOATS, SMALLEST, Unfolded
from .io.external_data import set_reference
from .io.model import DETACH_BYTES, Model, detached_key, open_model
from .io.publish import workspace
from .io.wire import Region
from .io.writer import Output

MAX_GROWTH = 4  # times the model's size that evaluated weights may take

MIN_BYTES = 64 << 20  # that they may take in any case

MAX_SECONDS = 120.0  # for all expressions; what is not evaluated by then stays


def open_folded(path: str | os.PathLike[str]) -> Model:
    """open_model(), with the weights behind constant expressions as initializers.

    Those that cannot be evaluated, or would be too large, are the `unfolded` of the result.

    Raises
    ------
    ModelError, UnsupportedModelError : as open_model(); or local functions cannot be expanded
    """
    return fold_constants(open_model(path))


def fold_constants(source: Model) -> Model:
    """The model with the weights behind constant expressions as initializers.

    Local functions are expanded, as onnxruntime does it: what passes through them may be a weight.
    """
    if source.proto.functions:
        source = replace(source, proto=_inlined(source))
    found, unfolded = constants_of(source)
    if found.expressions:
        proto = ModelProto()
        proto.CopyFrom(source.proto)
        source = replace(source, proto=proto, payloads=dict(source.payloads), scratch=Scratch())
        found, unfolded = constants_of(source)
        evaluation = Evaluation(source, found)
        evaluation.run(found.expressions)
        found.replace(evaluation.folded)
        unfolded += evaluation.unfolded
    return replace(source, unfolded=tuple(unfolded)) if unfolded else source


def constants_of(source: Model) -> tuple[ConstantValues, list[Unfolded]]:
    """The constant values of a model, and weights that would be constant without If or open sizes.

    What onnx infers of a model is looked at where weights depend on it.
    """
    found = ConstantValues(source.proto)
    fixed = ConstantValues(source.proto, fixed=True) if found.asks_for_sizes else found
    open_sized = found.open_sized(fixed)
    at_run_time = found.at_run_time(guess=True)
    if open_sized or at_run_time or (found.expressions and found.asks_for_types):
        inferred = _inferred(source.proto)
        found = ConstantValues(source.proto, inferred)
        open_sized = found.open_sized(ConstantValues(source.proto, inferred, fixed=True))
    told = found.unreachable() + found.multiplied() + open_sized
    named = frozenset().union(*(each.sources for each in told))
    told += [each for each in found.at_run_time() if each.name not in named]
    return found, told


def _inferred(proto: ModelProto) -> Inferred:
    """What onnx infers of the shapes and types of a model's values."""
    try:
        inferred = runtime.inferred(proto)
    except (runtime.RemoteError, ValidationError):
        return Inferred()
    shapes: dict[str, list[int | None]] = {}
    types: dict[str, set[int]] = defaultdict(set)
    for graph in graphs(inferred):
        for value in (*graph.input, *graph.output, *graph.value_info):
            tensor = value.type.tensor_type
            types[value.name].add(tensor.elem_type)
            if graph is inferred.graph and tensor.HasField("shape"):
                sizes = [d.dim_value if d.HasField("dim_value") else None for d in tensor.shape.dim]
                shapes[value.name] = sizes
    return Inferred(shapes, {name: min(t) for name, t in types.items() if len(t) == 1 and min(t)})


def _inlined(source: Model) -> ModelProto:
    try:
        return runtime.inlined(source.proto)
    except (runtime.RemoteError, ValidationError) as error:
        raise UnsupportedModelError(
            "its local functions cannot be expanded: {found}", found=str(error), path=source.path
        ) from None


class Scratch:
    """A temporary folder that is removed when nothing refers to this any more."""

    def __init__(self) -> None:
        with ExitStack() as stack:
            self.folder = stack.enter_context(workspace(Path(tempfile.gettempdir())))
            weakref.finalize(self, stack.pop_all().close)


class Evaluation:
    """Evaluates expressions of a model, together if that works, else one by one.

    Attributes
    ----------
    folded : what became of those that are weights, by value; the model's payloads have the data
    unfolded : the others that could be weights
    """

    def __init__(self, source: Model, constants: ConstantValues) -> None:
        self._source = source
        self._constants = constants
        assert isinstance(source.scratch, Scratch)
        self._folder = source.scratch.folder
        self._left = max(MAX_GROWTH * source.size, MIN_BYTES)
        self._deadline = time.monotonic() + MAX_SECONDS
        self._count = 0
        self.folded: dict[Value, TensorProto] = {}
        self.unfolded: list[Unfolded] = []

    def run(self, expressions: Sequence[Expression]) -> None:
        """Evaluate them all."""
        by_scope: dict[int, list[Expression]] = defaultdict(list)
        for expression in expressions:
            by_scope[id(expression.scope)].append(expression)
        for group in by_scope.values():
            if len(group) > 1 and not self._evaluate(group):
                continue
            for expression in group:
                problem = self._evaluate([expression])
                if problem:
                    found = self._constants.unfolded(expression.value, problem)
                    self.unfolded.append(found)

    def _evaluate(self, expressions: Sequence[Expression]) -> str:
        """Evaluate some together; what is in the way, "" for nothing."""
        proto = self._constants.model_of(expressions)
        if isinstance(proto, str):
            return proto
        if time.monotonic() > self._deadline:
            return f"all such expressions together take longer than {MAX_SECONDS:.0f} s"
        self._count += 1
        output = Output(self._folder / str(self._count), None, external=True)
        output.save(proto, self._source)
        result = self._folder / f"{self._count}.data"
        try:
            values = runtime.evaluate(output.path, result, output.size, self._left)
        except (runtime.RemoteError, ValidationError) as error:
            return str(error)
        for expression, (data_type, shape, offset, length) in zip(expressions, values, strict=True):
            self._take(expression, data_type, shape, Region(result, offset, length))
        return ""

    def _take(
        self, expression: Expression, data_type: int, shape: tuple[int, ...], region: Region
    ) -> None:
        """Keep a value if it is a weight by its type and size."""
        if data_type not in (*FLOATS, *OTHER_FLOATS) or len(shape) < 2 or prod(shape) < SMALLEST:
            return
        self._left -= region.length
        tensor = TensorProto(name=expression.name, data_type=data_type, dims=shape)
        if region.length < DETACH_BYTES:
            with region.file.open("rb") as file:
                file.seek(region.offset)
                tensor.raw_data = file.read(region.length)
        else:
            key = detached_key(len(self._source.payloads))
            self._source.payloads[key] = region
            set_reference(tensor, key)
        self.folded[expression.value] = tensor
