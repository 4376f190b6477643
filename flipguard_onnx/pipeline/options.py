"""`GuardOptions`: every option of a guard, named, typed, described and checked in one place.

The command line, the configuration file, `guard_many`, `verify` and the report are made from it.
It imports nothing heavy, so that `--help` answers at once.
"""

import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, Self, TypedDict

from ..errors import DeviceError, FlipguardError, OptionError, SchemeError
from ..formats import BLOCK_SIZES, FORMATS, GRANULARITIES, SCALES, Choice

POLICIES = ("unbiased", "topk", "none")
DRAWS = 3  # at most: a draw that drifts too far is thrown away
# options that a record for another machine leaves out
HERE_ONLY = ("data", "force", "resume", "seed")

Group = Literal["Model and output", "Format", "Protection", "Accuracy", "Running"]
StrPath = str | os.PathLike[str]


@dataclass(frozen=True)
class Range:
    """The numbers that an option may be: from `low` to `high`, either end open where it says so."""

    low: float
    high: float | None = None
    low_open: bool = False
    high_open: bool = False

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.low_open else value >= self.low
        if self.high is None:
            return above and value < float("inf")
        return above and (value < self.high if self.high_open else value <= self.high)

    def __str__(self) -> str:
        low = f"above {self.low:g}" if self.low_open else f"{self.low:g} or more"
        if self.high is None:
            return low
        return f"{low}, {'below' if self.high_open else 'up to'} {self.high:g}"


@dataclass(frozen=True)
class About:
    """What is known of an option besides its name, type and default."""

    group: Group
    help: str
    choices: tuple[Any, ...] = ()
    range: Range | None = None
    metavar: str | None = None
    short: str | None = None


def _option(default: Any, group: Group, help: str, **about: Any) -> Any:
    return field(default=default, metadata={"about": About(group, help, **about)})


@dataclass(frozen=True, kw_only=True)
class GuardOptions:
    """How a model is guarded; checked when it is made.

    Parameters
    ----------
    scheme : "int8", "uint8", "int4", "uint4", "int2", "uint2", "nf4", "fp4", "fp8", "mxfp4" or
        "nvfp4": the number format of the weights. "uint8", "uint4" and "uint2" have zero points
    granularity : "tensor", "channel" or "block": how many weights share a scale. None is a channel
        at 8 bits, else a block. Tensors that fewer bits or blocks do not fit get int8 per channel
    block_size : weights of a block: 16, 32, 64, 128 or 256; None is 64 at nf4 and fp4, else 32
    scale : the level that the largest magnitude of a block gets: 8, 7.5 or 7 at int4, 128 or 127 at
        int8 in blocks, 4 or 6 at mxfp4, before it is rounded to a power of two; None is the first.
        With zero points None is the range of the weights; 127.5 is a range that is symmetric, at
        uint8 per channel or tensor, and "k_quant" searches for scale and zero point, at uint4 and
        uint8 in blocks. Others have no choice
    reduce_range : 7 bits: for int8 and uint8 per tensor or channel
    include, exclude : shell patterns over tensor names; what fails them is left as it is. A pattern
        that names no tensor of the model is an error
    activations : "int8", "uint8" or "int16" quantizes activations as well, by onnxruntime's static
        quantizer; only with scheme "int8"
    calibration : "minmax", "entropy" or "percentile": how the ranges of activations are found
    symmetric : activations with their zero point in the middle
    emit : "qdq" (a quantized graph), "float" (the same graph with moved weights) or "both"
    allow_unguarded : write the model although it has weights that a quantizer could reach and that
        cannot be guarded
    target : what runs the quantized graph: "portable" writes standard operators alone, with a
        DequantizeLinear for every weight but those at nf4 and fp4, which all compilers know;
        "onnxruntime" what onnxruntime's CPU provider runs best
    force : overwrite an existing output
    policy : "unbiased", "topk" (the paper's Algorithm 1) or "none" (rounding to nearest)
    tau : unbiased: draw only weights nearer than this to a boundary, in half-gaps; 0 < tau <= 1
    ratio : topk: share of every block that crosses, the paper's k; 0 < ratio <= 1
    seed : of the draws, 0 or more; None is fresh entropy from the operating system, and up to
        three draws when one drifts too far
    preserve : feed rounding errors forward so that layers compute what they did: "synthetic" (on
        made-up inputs), "data" (on those of `data`), "off", or "auto": "data" where there is any,
        else "synthetic"
    data : .npz file, or folder of such files, or text (.txt, .jsonl), with inputs for `preserve`,
        for the calibration of `activations` and for the validation; None makes inputs up
    int8 : shell patterns over the names of weights that stay at 8 bits under a scheme of fewer
    int8_share : keep, besides, the most sensitive weights at 8 bits, up to this share of the
        weights with fewer; 0 <= int8_share < 1
    on_collapse : what becomes of a tensor whose products would be lost in rounding errors, or of a
        model of which the scan says *clips*: "keep" gives them the cheapest form that keeps them,
        int8 or else floats; "refuse" writes nothing
    max_drift : allowed drift of the outputs from the original's, as a multiple of the drift that
        rounding to nearest causes
    validate : run the result with onnxruntime before it appears at the output
    max_memory : MiB for the statistics of `preserve`, which runs a larger model piece by piece; it
        is validated by sampled layers
    resume : folder that keeps what is finished until the run ends well, so that the same run,
        repeated, goes on from there; made if it is not there
    device : "auto", "cpu" or "cuda": where the kernels run

    Raises
    ------
    SchemeError : a scheme or policy that does not exist, or does not fit another option
    DeviceError : a device that does not exist
    OptionError : any other option that has no allowed value, or does not fit another

    Examples
    --------
    >>> GuardOptions(scheme="int4", tau=2.0)
    Traceback (most recent call last):
        ...
    flipguard_onnx.errors.OptionError: tau is 2.0; allowed: above 0, up to 1
    """

    scheme: str = _option("int8", "Format", "Number format of the weights.", choices=tuple(FORMATS))
    granularity: str | None = _option(
        None,
        "Format",
        "What shares a scale.  [default: at 8 bits an output channel, else a block]",
        choices=GRANULARITIES,
    )
    block_size: int | None = _option(
        None,
        "Format",
        "Weights of a block: 16, 32, 64, 128 or 256.  [default: 32, nf4 and fp4 64]",
        choices=BLOCK_SIZES,
    )
    scale: float | str | None = _option(
        None,
        "Format",
        "The level of a block's largest weight: int4 8, 7.5 or 7, int8 in blocks 128 or 127, mxfp4 "
        "4 or 6.  [default: the first]  uint8 127.5: its range is symmetric.  k_quant: searched "
        "for, at uint4 and uint8 in blocks.",
        choices=SCALES,
        metavar="SCALE",
    )
    reduce_range: bool = _option(
        False, "Format", "int8 and uint8 per channel or tensor: 7 bits, as with reduce_range."
    )
    include: tuple[str, ...] = _option(
        (), "Format", "Guard only tensors with such a name.", metavar="PATTERN"
    )
    exclude: tuple[str, ...] = _option(
        (), "Format", "Leave tensors with such a name as they are.", metavar="PATTERN"
    )
    allow_unguarded: bool = _option(
        False,
        "Protection",
        "Go on although a quantizer could reach weights that cannot be guarded.",
    )
    activations: str | None = _option(
        None,
        "Format",
        "int8: quantize activations to this type as well, with onnxruntime's static quantizer on "
        "the inputs of --data; made-up inputs give weaker results.",
        choices=("int8", "uint8", "int16"),
    )
    calibration: str = _option(
        "minmax",
        "Format",
        "How the ranges of activations are found.",
        choices=("minmax", "entropy", "percentile"),
    )
    symmetric: bool = _option(False, "Format", "Activations with their zero point in the middle.")
    emit: str = _option(
        "qdq",
        "Model and output",
        "A quantized graph, or the same graph with moved weights for your own quantizer.",
        choices=("qdq", "float", "both"),
    )
    target: str = _option(
        "portable",
        "Model and output",
        "Standard operators with DequantizeLinear, or what onnxruntime's CPU provider runs best.",
        choices=("portable", "onnxruntime"),
    )
    force: bool = _option(False, "Model and output", "Overwrite the output.")
    policy: str = _option(
        "unbiased",
        "Protection",
        "Which weights cross a boundary; none is rounding to nearest.",
        choices=POLICIES,
    )
    tau: float = _option(
        1.0,
        "Protection",
        "unbiased: draw only weights this near to a boundary, in half-gaps; 1 draws all.",
        range=Range(0, 1, low_open=True),
    )
    ratio: float = _option(
        0.1,
        "Protection",
        "topk: share of each block that crosses.",
        range=Range(0, 1, low_open=True),
    )
    seed: int | None = _option(
        None, "Protection", "Of the draws.  [default: fresh entropy, recorded]", range=Range(0)
    )
    preserve: str = _option(
        "auto",
        "Accuracy",
        "Feed rounding errors forward so that layers compute what they did, on made-up inputs or "
        "those of --data; auto: on the latter where they are given.",
        choices=("auto", "off", "synthetic", "data"),
    )
    data: StrPath | None = _option(  # noqa: RUF009  # as above; the rule trips over os.PathLike
        None,
        "Accuracy",
        ".npz file, or folder of them, with inputs to run the model on; for one that takes token "
        "ids also text, .txt or .jsonl.  [default: made up]",
    )
    int8: tuple[str, ...] = _option(
        (),
        "Accuracy",
        "Keep tensors with such a name at 8 bits under a scheme of 4 or 2.",
        metavar="PATTERN",
    )
    int8_share: float = _option(
        0.0,
        "Accuracy",
        "Keep the most sensitive tensors at 8 bits, up to this share of the weights (0.25).",
        range=Range(0, 1, high_open=True),
        metavar="SHARE",
    )
    on_collapse: str = _option(
        "keep",
        "Accuracy",
        "A tensor whose products would be lost in rounding errors, or a model of which scan says "
        "clips, gets int8, or stays float; or refuse to write.",
        choices=("keep", "refuse"),
    )
    max_drift: float = _option(
        3.0,  # unbiased draws double a weight's squared error: 1.41 times in relative L2
        "Accuracy",
        "Allowed drift of the outputs, as a multiple of what rounding to nearest causes.",
        range=Range(0, low_open=True),
    )
    validate: bool = _option(True, "Running", "Write without running the result.")
    max_memory: int = _option(
        1024,
        "Running",
        "MiB for the statistics of --preserve; of a larger model only sampled layers are run.",
        range=Range(1),
    )
    resume: StrPath | None = _option(  # noqa: RUF009  # as above
        None,
        "Running",
        "Keep what is finished in this folder; the same command goes on from there.",
        metavar="FOLDER",
    )
    device: str = _option(
        "auto", "Running", "Where the kernels run.", choices=("auto", "cpu", "cuda")
    )

    def __post_init__(self) -> None:
        for name, default, about in described():
            object.__setattr__(self, name, checked(name, getattr(self, name), default, about))
        for name, policy in (("tau", "unbiased"), ("ratio", "topk")):
            given = getattr(self, name)
            if given != getattr(GuardOptions, name) and self.policy != policy:
                raise SchemeError(
                    "{name} {given} is for the {policy} policy, not {found!r}",
                    found=self.policy,
                    name=name,
                    given=given,
                    policy=policy,
                )
        whole_bytes = FORMATS[self.choice.name].bits == 8
        if self.int8 and whole_bytes:
            raise SchemeError(
                "int8 patterns are for 4 or 2 bits: {found} has all at 8", found=self.scheme
            )
        if self.int8_share and whole_bytes:
            raise SchemeError(
                "int8 share is for 4 or 2 bits: {found} has all at 8", found=self.scheme
            )
        floats = self.emit != "qdq" and self.policy != "none"
        if self.choice.clips and floats:
            raise SchemeError(
                "scale {found:g} goes with emit 'qdq': its quantizer clips the largest weights, so "
                "that the mean of floats for it would be off",
                found=self.scale,
            )
        if self.choice.searches and (floats or self.policy == "topk"):
            raise SchemeError(
                "scale {found!r} goes with emit 'qdq' and policy unbiased or none: it searches for "
                "another grid over moved weights; leave it out, or use the quantized graph",
                found=self.scale,
            )
        if self.preserve in ("synthetic", "data") and self.policy != "unbiased":
            raise SchemeError(
                "preserve {preserve!r} is for the unbiased policy, not {found!r}",
                found=self.policy,
                preserve=self.preserve,
            )
        if self.on_collapse == "refuse" and self.policy != "unbiased":
            raise SchemeError(
                "on collapse 'refuse' is for the unbiased policy, not {found!r}", found=self.policy
            )
        if self.preserve == "data" and not self.data:
            raise OptionError("preserve 'data' needs inputs: give --data")
        if self.symmetric and self.activations is None:
            raise OptionError("symmetric goes with activations")
        if self.calibration != GuardOptions.calibration and self.activations is None:
            raise OptionError("calibration {found!r} goes with activations", found=self.calibration)
        if self.activations is not None and (
            self.scheme != "int8" or self.granularity == "block" or self.reduce_range
        ):
            raise SchemeError(
                "activations go with scheme int8 per channel or tensor, not {found!r}",
                found=self.choice.label,
            )
        if self.activations is not None and self.emit == "float":
            raise OptionError("activations go with emit 'qdq' or 'both', not 'float'")

    @property
    def data_path(self) -> Path | None:
        """Where the inputs that were given lie."""
        return Path(self.data) if self.data else None

    @property
    def max_bytes(self) -> int:
        """`max_memory` in bytes."""
        return self.max_memory << 20

    @property
    def feedback_inputs(self) -> str:
        """The inputs on which errors are to be fed forward: "off", "synthetic" or "data"."""
        if self.preserve != "auto":
            return self.preserve
        if self.policy != "unbiased":
            return "off"
        return "data" if self.data else "synthetic"

    @property
    def without_inputs(self) -> str:
        """What to change so that the run needs no inputs to run the model on."""
        changes = {
            "--no-validate": self.validate,
            "--preserve off": self.preserve in ("synthetic", "data"),
            "no --activations": self.activations is not None,
            "no --int8-share": bool(self.int8_share),
        }
        return ", ".join(change for change, needed in changes.items() if needed)

    @property
    def choice(self) -> Choice:
        """The scheme with all that was chosen of it."""
        return Choice(self.scheme, self.granularity, self.block_size, self.scale, self.reduce_range)

    def seeds(self) -> list[int]:
        """The seeds to try in turn: a given one alone, else fresh entropy for every draw."""
        if self.seed is None and self.policy == "unbiased":
            return [secrets.randbits(128) for _ in range(DRAWS)]
        return [self.seed or 0]

    def keywords(self) -> dict[str, Any]:
        """Every option as a keyword argument of guard()."""
        return {item.name: getattr(self, item.name) for item in fields(self)}

    def record(self) -> dict[str, Any]:
        """What repeats the run elsewhere, beside the seed that was drawn and the inputs given."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in self.keywords().items()
            if name not in HERE_ONLY
        }

    def changed(self) -> tuple[str, ...]:
        """The names of the options of the record that differ from their defaults."""
        return tuple(
            name
            for name, default, _ in described()
            if name not in HERE_ONLY and getattr(self, name) != default
        )

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Self:
        """The options of a record, others at their defaults. Raises OptionError for what fits none.

        A record comes from a file, and so from anybody: nothing in it is believed.
        """
        names = {name for name, _, _ in described()} - set(HERE_ONLY)
        if unknown := sorted(map(str, record.keys() - names)):
            raise OptionError("the record has the option {found!r}, unknown", found=unknown[0])
        return cls(**record)


class GuardKeywords(TypedDict, total=False):
    """The keyword arguments of guard() and guard_many(): the fields of GuardOptions but `scheme`,
    for editors and type checkers."""

    granularity: str | None
    block_size: int | None
    scale: float | str | None
    reduce_range: bool
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    allow_unguarded: bool
    activations: str | None
    calibration: str
    symmetric: bool
    emit: str
    target: str
    force: bool
    policy: str
    tau: float
    ratio: float
    seed: int | None
    preserve: str
    data: StrPath | None
    int8: tuple[str, ...]
    int8_share: float
    on_collapse: str
    max_drift: float
    validate: bool
    max_memory: int
    resume: StrPath | None
    device: str


def described() -> list[tuple[str, Any, About]]:
    """Name, default and description of every option, in order."""
    return [(item.name, item.default, item.metadata["about"]) for item in fields(GuardOptions)]


ERRORS: dict[str, type[FlipguardError]] = {
    "scheme": SchemeError,
    "policy": SchemeError,
    "device": DeviceError,
}


def checked(name: str, value: Any, default: Any, about: About) -> Any:
    """The value, if the option may have it. Raises one of ERRORS, else OptionError."""
    error, words = ERRORS.get(name, OptionError), name.replace("_", " ")
    if value is None and default is None:
        return None
    if isinstance(default, tuple):
        if isinstance(value, str) or not all(isinstance(item, str) for item in value):
            raise error(f"{words} is {{found!r}}", found=value, allowed="a sequence of patterns")
        return tuple(value)
    if about.choices and value not in about.choices:
        problem = " {found!r} is unknown" if isinstance(value, str) else " is {found}"
        raise error(words + problem, found=value, allowed=", ".join(map(str, about.choices)))
    if isinstance(default, bool) and not isinstance(value, bool):
        raise error(f"{words} is {{found!r}}", found=value, allowed="true or false")
    if about.range:
        kind = Real if isinstance(default, float) else Integral
        if not (isinstance(value, kind) and float(value) in about.range):
            raise error(f"{words} is {{found}}", found=value, allowed=str(about.range))
    return value


def output_paths(model: Path, output: StrPath | None, scheme: str, emit: str) -> dict[str, Path]:
    """Where each kind of output goes: to `output`, by default beside the model.

    Raises OptionError for an `output` that is written as a folder.
    """
    if output and str(output).endswith("/"):
        raise OptionError("the output of one model is a file, not a folder", path=output)
    base = Path(output) if output else model.with_name(f"{model.stem}.flipguard-{scheme}.onnx")
    moved = base
    if emit == "both" or not output:
        moved = base.with_name(f"{base.stem}-float{base.suffix}")
    paths = {"qdq": base, "float": moved}
    return paths if emit == "both" else {emit: paths[emit]}
