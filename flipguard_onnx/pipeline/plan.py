"""What a run is about to do: which weights are guarded, in which scheme and blocks."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from ..emit.opset import converted, needed_opset
from ..emit.weight_forms import Target
from ..errors import OptionError, UnsupportedModelError
from ..formats import Choice
from ..graph.copies import IndexedModel
from ..graph.traversal import opset_of
from ..graph.weights import Weight, find_weights
from ..io.model import Model
from ..quantization.schemes import SCHEMES, Blocks, Scheme, scheme_of
from ..reports.guard import Tensor
from ..reports.scan import Skipped, pieces
from .options import GuardOptions

INT8 = SCHEMES["int8"]

EIGHT_BITS = ("int8", "uint8")

OTHER_AXES = "channels along other axes"


@dataclass(frozen=True)
class WeightPlan:
    """A weight, the scheme that it gets, and the blocks of weights that share a scale."""

    weight: Weight
    scheme: Scheme
    blocks: Blocks

    @classmethod
    def of(cls, weight: Weight, options: GuardOptions) -> "WeightPlan":
        """The plan for one weight under these options."""
        scheme = scheme_for(weight, scheme_of(options.choice))
        if any(fnmatchcase(weight.name, pattern) for pattern in options.int8):
            scheme = INT8
        return cls.in_scheme(weight, scheme)

    @classmethod
    def in_scheme(cls, weight: Weight, scheme: Scheme) -> "WeightPlan":
        """The plan for one weight in this scheme."""
        return cls(weight, scheme, weight.blocks(scheme.block_size, flat=scheme.flat))

    def finer(self) -> "WeightPlan | None":
        """The next plan that loses less: int8 per output channel; None if this is it."""
        plan = WeightPlan.in_scheme(self.weight, INT8)
        return None if plan == self else plan

    def described(self) -> Tensor:
        """What a report says of the weight before anything is drawn."""
        weight = self.weight
        return Tensor(
            weight.name,
            weight.op,
            weight.shape,
            self.scheme.name,
            self.scheme.choice.label,
            weight.size,
            others=weight.others,
            dynamic=self.dynamic_grid,
        )

    @property
    def dynamic_grid(self) -> str | None:
        """The grid that onnxruntime's quantize_dynamic lays over the weight, if it is another.

        What a Gather reads always gets uint8 with one scale, a Conv one scale, and an LSTM int8.
        Where a matrix has several layouts, or a MatMul reads a stack, channels are others.
        """
        chosen = self.scheme.choice.filled
        if chosen.name not in EIGHT_BITS or chosen.granularity not in ("channel", "tensor"):
            return None
        uses = [use for use in self.weight.uses if use.operator]
        readers, layouts = {use.op for use in uses}, {use.output_axes() for use in uses}
        whole = Choice(chosen.name, "tensor", reduced=chosen.reduced).label
        if any(use.picks for use in uses):
            theirs = Choice("uint8", "tensor", reduced=chosen.reduced).label
        elif "Conv" in readers:
            theirs = whole
        elif "LSTM" in readers:
            theirs = Choice("int8", chosen.granularity, reduced=chosen.reduced).label
        elif "MatMul" in readers and (len(layouts) > 1 or len(self.weight.shape) > 2):
            theirs = whole if chosen.granularity == "tensor" else OTHER_AXES
        else:
            return None
        return None if theirs == chosen.label else theirs


@dataclass(frozen=True)
class Prepared:
    """A model that is ready to be guarded.

    model: opened and checked. original: its graph; graph: the same at the opset that will be
    written. skipped: tensors that are left as they are. int8: patterns of the names of weights
    that stay at 8 bits under a 4-bit scheme.
    """

    model: Model
    original: IndexedModel
    graph: IndexedModel
    weights: tuple[WeightPlan, ...]
    skipped: tuple[Skipped, ...]
    int8: tuple[str, ...]

    @property
    def plain_weights(self) -> list[Weight]:
        """The weights without their plans."""
        return [plan.weight for plan in self.weights]

    @property
    def nbytes(self) -> int:
        """Bytes of all weights."""
        return sum(plan.weight.nbytes for plan in self.weights)

    def with_int8(self, patterns: Iterable[str], options: GuardOptions) -> "Prepared":
        """With weights of such names at 8 bits as well."""
        options = replace(options, int8=(*self.int8, *patterns), int8_share=0.0)
        weights = tuple(WeightPlan.of(weight, options) for weight in self.plain_weights)
        return replace(self, weights=weights, int8=options.int8)


def prepare(model: Model, options: GuardOptions) -> Prepared:
    """Find the model's weights, plan them, and convert its graph to the opset that they need.

    Raises UnsupportedModelError when there is nothing to guard or onnx cannot convert the graph,
    OptionError when a pattern of `int8` names no weight.
    """
    weights, skipped = require_weights(model, options)
    plans = plan_weights(weights, options)
    planned = [plan.weight for plan in plans], [plan.scheme for plan in plans]
    opset = needed_opset(*planned, Target.of(model.proto, options.target))
    original = IndexedModel(model.proto, tuple(weights))
    try:
        graph = converted(model, opset, original)
    except UnsupportedModelError as error:
        if needed_opset(*planned, Target.of(model.proto, "onnxruntime")) <= opset_of(model.proto):
            error.advise("--target onnxruntime needs no conversion")
        raise
    return Prepared(model, original, graph, plans, tuple(skipped), options.int8)


def require_named(model: Model, options: GuardOptions) -> None:
    """Require that every pattern of `include` and `exclude` names a float tensor of the model.

    Raises OptionError, naming the pattern.
    """
    if not options.include and not options.exclude:
        return
    weights, skipped = find_weights(model.proto, partly=True)
    names = [*(weight.name for weight in weights), *(tensor.name for tensor in skipped)]
    for option in ("include", "exclude"):
        for pattern in getattr(options, option):
            if not any(fnmatchcase(name, pattern) for name in names):
                raise OptionError(
                    "{option} pattern {found!r} names no tensor of the model",
                    path=model.path,
                    found=pattern,
                    option=option,
                )


def plan_weights(weights: Sequence[Weight], options: GuardOptions) -> tuple[WeightPlan, ...]:
    """A plan for each. Raises OptionError when a pattern of `int8` names none of them."""
    for pattern in options.int8:
        if not any(fnmatchcase(weight.name, pattern) for weight in weights):
            raise OptionError("int8 pattern {found!r} names no weight of the model", found=pattern)
    return tuple(WeightPlan.of(weight, options) for weight in weights)


def scheme_for(weight: Weight, scheme: Scheme) -> Scheme:
    """The scheme that this weight gets under the one asked for.

    No onnxruntime kernel executes Conv, ConvTranspose, LSTM, GRU or RNN at 4 bits or in blocks:
    those get int8 per channel. So do embeddings (Gather), unless a MatMul shares them: at 4 bits
    they cost a language model about as much accuracy as all its other layers together, and nf4, fp4
    have no operator to gather by.
    """
    coarse = scheme.bits < 8 or scheme.in_blocks
    return INT8 if coarse and not weight.operator.four_bits else scheme


def require_weights(model: Model, options: GuardOptions) -> tuple[list[Weight], list[Skipped]]:
    """As find_weights().

    Raises UnsupportedModelError, too, for a model without weights, and for one with weights that a
    quantizer could reach and that cannot be guarded, unless that is allowed.
    """
    try:
        weights, skipped = find_weights(
            model.proto, options.include, options.exclude, unfolded=model.unfolded
        )
    except UnsupportedModelError as error:
        raise error.at(model.path) from None
    left = [tensor for tensor in skipped if tensor.unguarded]
    if options.emit != "qdq":  # then another quantizer follows, which takes small tensors too
        left += pieces(skipped, sum(weight.size for weight in weights))
    if left and not options.allow_unguarded:
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        raise UnsupportedModelError(
            "a quantizer could reach weights that cannot be guarded: tensor {tensor!r}{more}: "
            "{found}",
            tensor=left[0].name,
            more=more,
            found=left[0].text,
            allowed="a model without them, to leave them to you (--exclude), or --allow-unguarded",
            path=model.path,
        )
    if not weights:
        reasons = sorted({tensor.text for tensor in skipped}) or ["no float tensors"]
        raise UnsupportedModelError(
            "nothing to guard: {found}", path=model.path, found="; ".join(reasons[:3])
        )
    return weights, skipped
