"""Which weights are guarded, and in which scheme and blocks."""

from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from ..errors import SchemeError, UnsupportedModelError
from ..graph.weights import Weight, find_weights
from ..io.model import Model
from ..quantization.rounding import QuantizedTensor
from ..quantization.schemes import SCHEMES, Blocks, Codebook, Scheme, get_scheme
from ..reports.guard import Tensor
from ..reports.scan import Budget, Skipped
from .options import BLOCK_SIZES, GRANULARITIES, one_of


def scheme_for(weight: Weight, scheme: Scheme) -> Scheme:
    """The scheme that this weight gets under the one asked for.

    No onnxruntime kernel executes 4-bit Conv, ConvTranspose, LSTM, GRU or RNN: those get int8. So
    do embeddings (Gather), unless a MatMul shares them: at 4 bits they cost a language model about
    as much accuracy as all its other layers together, and nf4, fp4 have no operator to gather by.
    """
    return scheme if weight.operator.four_bits else SCHEMES["int8"]


def require_weights(
    source: Model, include: tuple[str, ...] = (), exclude: tuple[str, ...] = ()
) -> tuple[list[Weight], list[Skipped]]:
    """As find_weights(). Raises UnsupportedModelError for a model without weights, too."""
    try:
        weights, skipped = find_weights(source.proto, include, exclude)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{source.path}: {error}") from None
    if not weights:
        reasons = sorted({tensor.text for tensor in skipped}) or ["no float tensors"]
        raise UnsupportedModelError(f"{source.path}: nothing to guard: {'; '.join(reasons[:3])}")
    return weights, skipped


@dataclass(frozen=True)
class Format:
    """A scheme with its granularity (int8) or block size (4 bits).

    int8: shell patterns over the names of weights that get 8 bits under a 4-bit scheme.
    """

    scheme: str = "int8"
    granularity: str = "channel"
    block_size: int | None = None
    int8: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        bits = get_scheme(self.scheme).bits
        one_of("granularity", self.granularity, GRANULARITIES)
        if self.block_size is None:
            return
        if bits == 8:
            raise SchemeError("block size is for int4, nf4 and fp4; int8 has a granularity")
        if self.block_size not in BLOCK_SIZES:
            allowed = ", ".join(map(str, BLOCK_SIZES))
            raise SchemeError(f"block size is {self.block_size}; allowed: {allowed}")

    def plan(self, weight: Weight) -> tuple[Scheme, Blocks]:
        """The scheme that this weight gets, and the blocks of weights that share a scale."""
        scheme = scheme_for(weight, SCHEMES[self.scheme])
        if any(fnmatchcase(weight.name, pattern) for pattern in self.int8):
            scheme = SCHEMES["int8"]
        if scheme.bits == 8:
            return scheme, weight.blocks(None, flat=self.granularity == "tensor")
        size = self.block_size or scheme.block_size
        return scheme, weight.blocks(size, flat=isinstance(scheme, Codebook))

    def plans(self, weights: list[Weight]) -> list[tuple[Scheme, Blocks]]:
        """plan() of each. Raises SchemeError when a pattern of `int8` names none of them."""
        for pattern in self.int8:
            if not any(fnmatchcase(weight.name, pattern) for weight in weights):
                raise SchemeError(f"int8 pattern {pattern!r} names no weight of the model")
        return [self.plan(weight) for weight in weights]


def guarded_tensor(
    weight: Weight,
    scheme: Scheme,
    flips: QuantizedTensor | None = None,
    unfed: str | None = None,
    budget: Budget | None = None,
) -> Tensor:
    """What a report says of a weight; without `flips`, what is known before anything is drawn."""
    tensor = Tensor(weight.name, weight.op, weight.shape, scheme.name, weight.size)
    if flips is None:
        return tensor
    moved = replace(tensor, flips=flips.count, furthest=flips.furthest)
    return replace(moved, gain=flips.gain, unfed=unfed, budget=budget)
