"""The options of a run, checked when they are given."""

import os
import secrets
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from .errors import SchemeError
from .qdq import scheme_for
from .schemes import SCHEMES, Blocks, Codebook, Scheme, get_scheme
from .weights import Weight

EMITS = ("qdq", "float", "both")
GRANULARITIES = ("channel", "tensor")
BLOCK_SIZES = (16, 32, 64, 128, 256)  # those that onnxruntime's kernels take
PRESERVES = ("auto", "off", "synthetic", "data")
DRAWS = 3  # at the most: a draw that drifts too far is thrown away


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


def preserve_mode(preserve: str, policy: str, data: object) -> str:
    """The kind of inputs that error feedback uses: "off", "synthetic" or "data".

    Raises SchemeError for what is asked for in vain.
    """
    one_of("preserve", preserve, PRESERVES)
    if preserve == "auto":
        return "off" if policy != "unbiased" else "data" if data else "synthetic"
    if preserve != "off" and policy != "unbiased":
        raise SchemeError(f"preserve {preserve!r} is for the unbiased policy, not {policy!r}")
    if preserve == "data" and not data:
        raise SchemeError("preserve 'data' needs inputs: give --data")
    return preserve


def one_of(option: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise SchemeError unless the value is one of those allowed."""
    if value not in allowed:
        raise SchemeError(f"{option} {value!r} is unknown; allowed: {', '.join(allowed)}")


def output_paths(
    model: Path, output: str | os.PathLike[str] | None, scheme: str, emit: str
) -> dict[str, Path]:
    """Where each kind of output goes: to `output`, by default beside the model."""
    base = Path(output) if output else model.with_name(f"{model.stem}.flipguard-{scheme}.onnx")
    moved = base
    if emit == "both" or not output:
        moved = base.with_name(f"{base.stem}-float{base.suffix}")
    paths = {"qdq": base, "float": moved}
    return paths if emit == "both" else {emit: paths[emit]}


def draw_seeds(seed: int | None, policy: str) -> list[int]:
    """The seeds to try in turn: a given one alone, else fresh entropy for every draw."""
    if seed is None and policy == "unbiased":
        return [secrets.randbits(128) for _ in range(DRAWS)]
    if seed is not None and seed < 0:
        raise SchemeError(f"seed is {seed}; allowed: 0 and above")
    return [seed or 0]
