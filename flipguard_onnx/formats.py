"""What may be chosen of every scheme: granularity, block size, scale. It imports nothing heavy."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from .errors import SchemeError

GRANULARITIES = ("tensor", "channel", "block")
BLOCK_SIZES = (16, 32, 64, 128, 256)  # those that onnxruntime's kernels take

BY_32 = (32, *(size for size in BLOCK_SIZES if size != 32))

BY_64 = (64, *(size for size in BLOCK_SIZES if size != 64))


@dataclass(frozen=True)
class Format:
    """What may be chosen of a scheme; of every choice, the first is the default.

    bits: of a code. granularities: of its scales. block_sizes: where there are blocks. divisors: by
    granularity, the level that the largest magnitude of a block gets, about; with zero points never
    the default, and then these are all alike. searches: names of ways to search for the scale of a
    block instead; never the default. reducible: whether there is a form with a bit less. has_zeros:
    whether blocks differ in the code that stands for 0; files then hold unsigned codes.
    """

    bits: int
    granularities: tuple[str, ...]
    block_sizes: tuple[int, ...]
    divisors: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    searches: tuple[str, ...] = ()
    reducible: bool = False
    has_zeros: bool = False

    def scales(self, granularity: str) -> tuple[float | str, ...]:
        """What may be chosen as the scale."""
        searches = self.searches if granularity == "block" else ()
        return *self.divisors.get(granularity, ()), *searches

    def usual_divisor(self, granularity: str) -> float | None:
        """The default of the divisors; None where the range of the weights sets the scale."""
        return None if self.has_zeros else next(iter(self.divisors.get(granularity, ())), None)


K_QUANT = "k_quant"

_OF_INT4 = (8.0, 7.5, 7.0)

FORMATS = {
    "int8": Format(
        8,
        ("channel", "tensor", "block"),
        BY_32,
        {"channel": (127.0,), "tensor": (127.0,), "block": (128.0, 127.0)},
        reducible=True,
    ),
    "uint8": Format(
        8,
        ("channel", "tensor", "block"),
        BY_32,
        {"channel": (127.5,), "tensor": (127.5,)},
        searches=(K_QUANT,),
        reducible=True,
        has_zeros=True,
    ),
    "int4": Format(4, ("block", "channel"), BY_32, {"block": _OF_INT4, "channel": _OF_INT4}),
    "uint4": Format(4, ("block", "channel"), BY_32, searches=(K_QUANT,), has_zeros=True),
    "int2": Format(2, ("block", "channel"), BY_32, {"block": (2.0,), "channel": (2.0,)}),
    "uint2": Format(2, ("block", "channel"), BY_32, has_zeros=True),
    "nf4": Format(4, ("block",), BY_64),
    "fp4": Format(4, ("block",), BY_64),
    "fp8": Format(8, ("channel", "tensor"), BY_32),
    "mxfp4": Format(4, ("block",), (32,), {"block": (4.0, 6.0)}),
    "nvfp4": Format(4, ("block",), (16,)),
}

FLOAT4 = ("mxfp4", "nvfp4")  # with ONNX's float4e2m1, for which onnxruntime has no kernel

SCALES: tuple[float | str, ...] = (
    *sorted({d for known in FORMATS.values() for ds in known.divisors.values() for d in ds}),
    *sorted({name for known in FORMATS.values() for name in known.searches}),
)


def shown_scale(scale: float | str) -> str:
    """A scale as users write it.

    Examples
    --------
    >>> shown_scale(7.0), shown_scale(K_QUANT)
    ('7', 'k_quant')
    """
    return scale if isinstance(scale, str) else f"{scale:g}"


@dataclass(frozen=True)
class Choice:
    """A scheme with all that may be chosen of it, checked; None takes the default.

    Parameters
    ----------
    name : "int8", "uint8", "int4", "uint4", "int2", "uint2", "nf4", "fp4", "fp8", "mxfp4" or
        "nvfp4"
    granularity : "tensor", "channel" or "block": how many weights share a scale
    block_size : weights per scale, where the granularity is "block"
    divisor : scale = largest magnitude / divisor; at mxfp4 that is rounded to a power of two, down
        with 4 and up with 6. "k_quant" searches for scale and zero point
    reduced : 7 bits of 8

    Raises
    ------
    SchemeError : the name is unknown, or the choices do not fit the scheme or each other

    Examples
    --------
    >>> Choice("int4").filled
    Choice(name='int4', granularity='block', block_size=32, divisor=8.0, reduced=False)
    >>> Choice("nf4", "channel")
    Traceback (most recent call last):
        ...
    flipguard_onnx.errors.SchemeError: scheme nf4 has no granularity 'channel'; allowed: block
    """

    name: str
    granularity: str | None = None
    block_size: int | None = None
    divisor: float | str | None = None
    reduced: bool = False

    def __post_init__(self) -> None:
        if self.name not in FORMATS:
            raise SchemeError(
                "scheme {found!r} is unknown", found=self.name, allowed=", ".join(FORMATS)
            )
        known = FORMATS[self.name]
        if self._granularity not in known.granularities:
            raise SchemeError(
                "scheme {name} has no granularity {found!r}",
                name=self.name,
                found=self.granularity,
                allowed=", ".join(known.granularities),
            )
        if self.block_size is not None and self._granularity != "block":
            raise SchemeError(
                "block size {found} goes with blocks; {name} has one scale per {granularity}",
                found=self.block_size,
                name=self.name,
                granularity=self._granularity,
                allowed="--granularity block" if "block" in known.granularities else "none",
            )
        if self.block_size not in (None, *known.block_sizes):
            raise SchemeError(
                "scheme {name} has no blocks of {found}",
                name=self.name,
                found=self.block_size,
                allowed=", ".join(map(str, sorted(known.block_sizes))),
            )
        scales = known.scales(self._granularity)
        if self.divisor is not None and self.divisor not in scales:
            raise SchemeError(
                "scheme {name} per {granularity} has no scale {found}",
                name=self.name,
                granularity=self._granularity,
                found=shown_scale(self.divisor),
                allowed=", ".join(map(shown_scale, scales))
                or ("none, it has zero points" if known.has_zeros else "none"),
            )
        if self.reduced and (not known.reducible or self._granularity == "block"):
            raise SchemeError(
                "reduced range is for int8 and uint8 per tensor or channel, not {name} per "
                "{granularity}",
                name=self.name,
                granularity=self._granularity,
            )
        if self.reduced and not self.has_usual_scale:
            raise SchemeError(
                "reduced range goes with the usual scale, not {found}",
                found=shown_scale(self.divisor or 0),
            )

    @property
    def filled(self) -> "Choice":
        """The same with every default written out."""
        known, granularity = FORMATS[self.name], self._granularity
        size = self.block_size or known.block_sizes[0]
        return Choice(
            self.name,
            granularity,
            size if granularity == "block" else None,
            self.divisor or known.usual_divisor(granularity),
            self.reduced,
        )

    @property
    def label(self) -> str:
        """The name, and what differs from the defaults; 8 bits always say how they are scaled.

        Examples
        --------
        >>> Choice("int4").label, Choice("int4", block_size=128).label, Choice("int8").label
        ('int4', 'int4 g128', 'int8 channel')
        >>> Choice("int4", "channel", divisor=7).label, Choice("uint8", reduced=True).label
        ('int4 channel /7', 'uint8 channel 7 bits')
        """
        known, chosen = FORMATS[self.name], self.filled
        words = [self.name]
        if self._granularity != "block":
            words.append(self._granularity)
        elif chosen.block_size != known.block_sizes[0] or known.bits == 8:
            words.append(f"g{chosen.block_size}")
        if not self.has_usual_scale:
            assert chosen.divisor
            words.append("/" * (not self.searches) + shown_scale(chosen.divisor))
        return " ".join([*words, "7 bits"] if self.reduced else words)

    @property
    def has_usual_scale(self) -> bool:
        """Whether the scale is the default."""
        return self.divisor in (None, FORMATS[self.name].usual_divisor(self._granularity))

    @property
    def clips(self) -> bool:
        """Whether the largest magnitude gets no level of its own: half a step is cut off."""
        return isinstance(self.divisor, float) and not self.divisor.is_integer()

    @property
    def searches(self) -> bool:
        """Whether scales are searched for."""
        return isinstance(self.divisor, str)

    @property
    def _granularity(self) -> str:
        return self.granularity or FORMATS[self.name].granularities[0]
