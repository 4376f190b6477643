"""scan(): were the weights of a model prepared for a quantizer, and for which one?"""

import math
import os
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from functools import reduce
from operator import add
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import __version__
from ..errors import ModelError, UnsupportedModelError
from ..graph.weights import Constant, Weight, find_weights, other_constants
from ..io.model import Model
from ..opening import open_folded
from ..progress import Progress
from ..quantization.rounding import unsound
from ..quantization.schemes import Floats, SignedExtreme
from ..reports.scan import (
    LEVELS,
    NOT_JUDGED,
    Alignment,
    Scan,
    ScannedTensor,
    Skipped,
    SkipReason,
    Verdict,
    listed,
    pieces,
)
from .alignment import (
    ECHO,
    GRIDS,
    Repetition,
    Sample,
    Tally,
    alignment,
    explaining,
    sample_size,
    tallies,
)
from .prequantized import find_lattice, most_are_levels, most_repeat, on_codebook
from .tables import has_even_levels, is_table

WHOLE = ("int8 tensor", "uint8 tensor")  # grids that quantizers lay over constants of arithmetic

MIN_WEIGHTS = 1000  # fewer prove nothing

SUSPICIOUS = 0.0025  # share of the weights; docs/scan.md says how these were chosen

ALIGNED = 0.01  # how much more it takes for the verdict "aligned"

NOISE = 0.6  # / sqrt(weights): the strength that may be chance

SHIFTED = 0.03  # largest difference to the placebos of weights that a lattice has blurred

# Tensors that are no weights as the graph is; one that has more of them than weights may change.
UNREAD = (
    SkipReason.NO_OPERATOR,
    SkipReason.NO_WEIGHT,
    SkipReason.NOT_FOLLOWED,
    SkipReason.AT_RUN_TIME,
)

# Weights that cannot be judged; of those that are unguarded a constant that becomes one can be.
UNREADABLE = (SkipReason.TYPE, SkipReason.NOT_FOLDED, SkipReason.QUANTIZED)

JUDGED = 0.99  # share of the weights that it takes for the verdict "clean"

NAMED = 5  # tensors in a reason

# the loss from which on rounding wipes out the weights, by grid; docs/scan.md says what is honest.
# A single outlier does that to a tensor with one scale: "int8 tensor" is only named beside others.
COLLAPSED = {"int8 channel": 0.3, "int4": 0.65, "nf4": 0.65, "fp4": 0.65}

CLIPPED = 0.02  # share of the weights beyond the last level, more than on the other side

CLIPPED_ANYHOW = 0.2  # ... whatever is on the other side; 1 / 16 if weights are spread evenly

ALIGNMENT = (
    "weights gather at the boundaries of {} and of no other grid: the mark of an attack, or of "
    "quantization-aware training"
)

CONSTANTS = "in constants that are no weights as they are, but that arithmetic can make weights"

FINDINGS = {  # verdict -> what was found in a tensor; {} stands for the grids
    "suspicious": ALIGNMENT,
    "clips": "many weights lie beyond the last level of {} and are all rounded the same way",
    "collapses": "outliers wipe out the other weights of their blocks at {}",
    "aligned": ALIGNMENT,
}

TOO_FEW = Verdict(
    NOT_JUDGED, f"fewer than {MIN_WEIGHTS} weights to judge by (counted with the others)"
)

ON_GRID = Verdict(NOT_JUDGED, "the weights already lie on a grid, as after quantization")

GUARDED = (
    "according to its metadata flipguard-onnx has moved weights of this file across boundaries, "
    "which leaves the same traces"
)

CLEAN = Verdict("clean", "the weights do not gather at the boundaries of any grid")

NOTHING = Verdict(NOT_JUDGED, "there are no weights to judge")

# A tensor's verdict, and by grid what was counted on it; nothing if the tensor is on a grid already
Examined = tuple[ScannedTensor, dict[str, Tally]]


def scan(model: str | os.PathLike[str], *, progress: Progress | None = None) -> Scan:
    """Judge whether the weights of an ONNX file were prepared for a quantizer.

    Parameters
    ----------
    model : path of an ONNX file; it is not changed
    progress : called with (stage, tensors done, tensors in all)

    Returns
    -------
    Scan : the verdict on the model and on every tensor, with the statistics behind it. A model
        that is quantized already has the verdict "not judged".

    Raises
    ------
    ModelError : the file cannot be read as a model, or a weight holds NaN or infinity
    UnsupportedModelError : the model has sparse initializers or training information, for example

    Examples
    --------
    >>> import flipguard_onnx
    >>> result = flipguard_onnx.scan("models/silero_vad.onnx")
    >>> result.verdict.level
    'clean'
    >>> len(result.tensors)
    16
    """
    started = time.perf_counter()
    source = open_folded(model)
    try:
        weights, skipped = find_weights(source.proto, unfolded=source.unfolded)
    except UnsupportedModelError as error:
        seconds = time.perf_counter() - started
        return _result(source, Verdict(NOT_JUDGED, str(error)), (), (), (), (), seconds)
    return scan_weights(source, weights, skipped, progress or (lambda *_: None))


def scan_weights(
    source: Model, weights: Sequence[Weight], skipped: Sequence[Skipped], progress: Progress
) -> Scan:
    """scan() of a model that has been opened.

    Raises
    ------
    ModelError : a weight holds NaN or infinity
    """
    started = time.perf_counter()
    max_weights = sample_size(len(weights))
    rng = np.random.default_rng(_seed(source))
    examined: list[Examined] = []
    for weight in weights:
        progress("scanning", len(examined), len(weights))
        try:
            examined.append(examine(weight, source.array(weight.tensor), max_weights, rng))
        except ModelError as error:
            raise error.at(source.path) from None
    progress("scanning", len(examined), len(weights))
    others = other_constants(source.proto, weights, skipped)
    max_weights = sample_size(len(others))
    constants = [
        examine_constant(each, source.array(each.tensor), max_weights, rng) for each in others
    ]
    return conclude(source, examined, skipped, time.perf_counter() - started, constants)


def conclude(
    source: Model,
    examined: Sequence[Examined],
    skipped: Sequence[Skipped],
    seconds: float,
    others: Sequence[Sequence[Examined]] = (),
) -> Scan:
    """The scan of a model whose weights have been examined one by one.

    others: its other constants, each as `examine_constant` found it
    """
    together = _together(by_grid for _, by_grid in examined)
    tensors = tuple(tensor for tensor, _ in examined)
    verdict = model_verdict(tensor_verdict(together) if together else NOTHING, tensors)
    if verdict.level == "clean":
        verdict = not_judged_completely(tensors, skipped) or verdict
    constants = tuple(max((t for t, _ in each), key=_alarm) for each in others if each)
    verdict = _with_constants(verdict, constants, _constants_together(others))
    if any(entry.key == "flipguard.version" for entry in source.proto.metadata_props):
        verdict = replace(verdict, reason=f"{verdict.reason}; {GUARDED}")
    return _result(source, verdict, together, tensors, constants, skipped, seconds)


def _together(tallied: Iterable[dict[str, Tally]]) -> tuple[Alignment, ...]:
    """The alignments of several tensors as one; none where all are on a grid."""
    counted = [by_grid for by_grid in tallied if by_grid]
    if not counted:
        return ()
    sums = {
        grid: reduce(add, found)
        for grid in GRIDS
        if (found := [each[grid] for each in counted if grid in each])
    }
    return tuple(alignment(grid, tally) for grid, tally in sums.items())


def _constants_together(others: Sequence[Sequence[Examined]]) -> Verdict:
    """The worst verdict on all other constants together, in one layout after the other."""
    verdicts = [NOTHING]
    for place in range(max(map(len, others), default=0)):
        if found := _together(each[place][1] for each in others if place < len(each)):
            verdicts.append(constant_verdict(found))
    return max(verdicts, key=_severity)


def _severity(verdict: Verdict) -> tuple[int, float]:
    return (LEVELS.index(verdict.level) if verdict.alarming else 0), verdict.strength


def _alarm(tensor: ScannedTensor) -> tuple[int, float]:
    return _severity(tensor.verdict)


def _with_constants(
    verdict: Verdict, constants: Sequence[ScannedTensor], together: Verdict
) -> Verdict:
    """The verdict on a model, from that on its weights and on its other constants."""
    alarming = sorted((t for t in constants if t.verdict.alarming), key=_alarm, reverse=True)
    worst = max([t.verdict for t in alarming] + [together], key=_severity)
    if not worst.alarming:
        return verdict
    grids = tuple(dict.fromkeys(g for t in alarming for g in t.verdict.grids)) or worst.grids
    names = [tensor.name for tensor in alarming] or ["all of them together"]
    shown = ", ".join(names[:NAMED]) + ", ..." * (len(names) > NAMED)
    reason = f"{CONSTANTS} ({shown}), {ALIGNMENT.format(listed(grids))}"
    if not verdict.alarming:
        return replace(worst, reason=reason, grids=grids)
    level = max(verdict, worst, key=_severity).level
    grids = tuple(dict.fromkeys((*verdict.grids, *grids)))
    strength = max(verdict.strength, worst.strength)
    return Verdict(level, f"{verdict.reason}; {reason}", grids, strength)


def _seed(source: Model) -> list[int]:
    """From the digests of the model's files: no one can prepare a file for the sample taken."""
    return [int(digest, 16) for digest in (source.sha256, *source.data_sha256.values())]


def examine(
    weight: Weight, array: npt.NDArray[Any], max_weights: int, rng: np.random.Generator
) -> Examined:
    """Judge one tensor, or a sample of it.

    Parameters
    ----------
    array : the tensor as it is stored
    max_weights : about how many of its weights are judged

    Raises
    ------
    ModelError : a value is not finite
    """
    sample = Sample.take(array, weight.layout, max_weights, rng)
    if not np.isfinite([sample.lowest, sample.highest]).all():
        raise unsound(weight.name, array)
    verdict, alignments, by_grid = _judged(sample)
    shape, size = weight.shape, weight.size
    return ScannedTensor(weight.name, weight.op, shape, size, verdict, alignments), by_grid


def examine_constant(
    constant: Constant, array: npt.NDArray[Any], max_weights: int, rng: np.random.Generator
) -> list[Examined]:
    """Judge a constant that is no weight in every layout that it could have as one.

    Only alignment counts, since tables and masks may have outliers: with the grids of a whole
    tensor, which quantizers lay over such constants, and with the others unless it `is_table`.
    Masks, with infinite values or evenly spaced ones, are not judged. array, max_weights: as in
    `examine`.
    """
    found: list[Examined] = []
    for layout in constant.layouts:
        sample = Sample.take(array.reshape(layout.shape), layout, max_weights, rng)
        if not np.isfinite([sample.lowest, sample.highest]).all():
            return []
        floats = sample.values.astype(np.float32)
        if has_even_levels(floats):
            return []
        rows = floats.reshape(-1, layout.blocks(None, flat=False).cols)
        verdict, alignments, by_grid = _judged(sample, WHOLE if is_table(rows) else GRIDS)
        tensor = ScannedTensor(
            constant.name, constant.readers, constant.shape, constant.size, verdict, alignments
        )
        found.append((tensor, by_grid))
    return found


def _judged(
    sample: Sample, grids: Collection[str] | None = None
) -> tuple[Verdict, tuple[Alignment, ...], dict[str, Tally]]:
    """A verdict, the alignments, and what was counted; the latter is empty on a grid.

    grids: of a constant that is no weight, those that count; None for a weight
    """
    floats = sample.values.astype(np.float32)
    cols = sample.layout.blocks(None, flat=False).cols
    lattice = find_lattice(floats, cols)
    if lattice and on_codebook(sample, floats):
        lattice = None
    spread = lattice.spread(floats) if lattice else None
    by_grid = tallies(sample, spread, grids or GRIDS)
    if grids:
        repetition = Repetition.among(floats)  # tables repeat; smoothing would hide that
        by_grid = {grid: replace(tally, repetition=repetition) for grid, tally in by_grid.items()}
    alignments = tuple(alignment(name, tally) for name, tally in by_grid.items())
    verdict = constant_verdict(alignments) if grids else tensor_verdict(alignments)
    if FINDINGS.get(verdict.level) == ALIGNMENT:
        verdict = _attributed(verdict, alignments, sample, spread)
    if lattice and not verdict.alarming:
        reason = f"{ON_GRID.reason}: {lattice.text}"
        blurred = None if grids else _blurred(alignments, reason)
        verdict = blurred or Verdict(NOT_JUDGED, reason)
        by_grid = by_grid if verdict.alarming else {}
    elif not lattice and (most_are_levels(by_grid.values()) or most_repeat(floats, cols)):
        verdict, by_grid = ON_GRID, {}
    return verdict, alignments, by_grid


def _attributed(
    verdict: Verdict, alignments: Sequence[Alignment], sample: Sample, spread: Floats | None
) -> Verdict:
    """The verdict without grids that only echo others; see `explaining`."""
    if len(verdict.grids) < 2:
        return verdict
    by_name = {a.grid: a for a in alignments}
    found = [by_name[grid] for grid in verdict.grids]
    return replace(verdict, grids=explaining(sample, spread, found, chance))


def tensor_verdict(alignments: Sequence[Alignment]) -> Verdict:
    """The verdict on weights, from their alignment with every grid."""
    if max(a.weights for a in alignments) < MIN_WEIGHTS:
        return TOO_FEW
    found = [v for v in (_aligned(alignments), _collapsed(alignments), _clipped(alignments)) if v]
    found.sort(key=lambda v: -LEVELS.index(v.level))
    return replace(found[0], reason="; ".join(v.reason for v in found)) if found else CLEAN


def constant_verdict(alignments: Sequence[Alignment]) -> Verdict:
    """The verdict on a constant that is no weight: only whether it is aligned, not suspicious.

    Tables that a formula made are no noise, and come near that.
    """
    if max(a.weights for a in alignments) < MIN_WEIGHTS:
        return TOO_FEW
    found = _aligned(alignments)
    return found if found and found.level == "aligned" else CLEAN


def _aligned(alignments: Sequence[Alignment]) -> Verdict | None:
    """Do the weights gather at the boundaries of a grid?

    Not at those of a grid that is searched for where outliers wipe out the other weights: these
    then fill one cell, whose edge the largest of them reach.
    """
    collapsed = any(map(_is_collapsed, alignments))
    found = [
        a
        for a in alignments
        if a.strength > chance(a) and not (collapsed and GRIDS[a.grid].choice.searches)
    ]
    if not found:
        return None
    # a peak, measured against the fixed placebos, tells apart grids with the same blocks, if they
    # have more than two boundaries
    found = [a for a in found if a.peak > chance(a) or GRIDS[a.grid].bits == 2] or found
    found.sort(key=lambda a: -a.strength)
    first = found[0]
    distance = f"{first.peak_at:.2f}" if first.peak >= first.edge else "less than 0.1"
    return Verdict(
        "aligned" if first.strength > ALIGNED + chance(first) else "suspicious",
        f"{first.strength:.1%} of the weights stand {distance} half-gaps from the boundaries of "
        f"{first.grid}, which no other grid explains",
        tuple(a.grid for a in found if a.strength > ECHO * first.strength),
        first.strength,
    )


def _blurred(alignments: Sequence[Alignment], found: str) -> Verdict | None:
    """Do weights gather at boundaries that are on a lattice, on which no peak is sharp?"""
    first = _foremost(alignments, lambda a: a.shift)
    if first.weights < MIN_WEIGHTS or first.shift < SHIFTED + chance(first):
        return None
    return Verdict(
        "suspicious",
        f"{found}; but {first.shift:.1%} of them stand elsewhere between the boundaries of "
        f"{first.grid} than that explains",
        (first.grid,),
        first.shift,
    )


def _collapsed(alignments: Sequence[Alignment]) -> Verdict | None:
    """Does rounding on some grid wipe out all weights but the largest?"""
    if not any(map(_is_collapsed, alignments)):
        return None
    found = [a for a in alignments if a.loss > COLLAPSED.get(a.grid, max(COLLAPSED.values()))]
    found.sort(key=lambda a: -a.loss)
    return Verdict(
        "collapses",
        f"outliers wipe out the other weights of their blocks: rounded to {found[0].grid}, the "
        f"smaller ones lose {min(found[0].loss, 1):.0%} of what they are",
        tuple(a.grid for a in found),
        found[0].loss,
    )


def collapses(scan: Scan) -> frozenset[tuple[str, str]]:
    """Names of tensors, each with a grid on which outliers wipe out its other weights.

    Tensors of too few weights to be judged by the scan are not among them.
    """
    return frozenset(
        (tensor.name, a.grid)
        for tensor in scan.tensors
        if tensor.verdict.alarming
        for a in tensor.alignments
        if _is_collapsed(a)
    )


def clips(scan: Scan) -> str | None:
    """Of which tensor the most weights lie beyond the last level of a grid, more than on its other
    side, if of any many do."""
    found = [
        (first.clipped, tensor.name, first.grid)
        for tensor in scan.tensors
        if tensor.verdict.alarming
        and (lopsided := [a for a in tensor.alignments if _cuts(a) and _is_lopsided(a)])
        and (first := _foremost(lopsided, lambda a: a.clipped))
    ]
    if not found:
        return None
    share, name, grid = max(found)
    return f"{share:.1%} of the weights of {name!r} lie beyond the last level of {grid}"


def _is_collapsed(alignment: Alignment) -> bool:
    return alignment.loss > COLLAPSED.get(alignment.grid, math.inf)


def _clipped(alignments: Sequence[Alignment]) -> Verdict | None:
    """Do many weights lie beyond the last level of a grid?"""
    found = [a for a in alignments if _cuts(a) and (_is_lopsided(a) or a.clipped > CLIPPED_ANYHOW)]
    if not found:
        return None
    first = _foremost(found, lambda a: a.clipped)
    return Verdict(
        "clips",
        f"{first.clipped:.1%} of the weights lie beyond the last level of {first.grid} and are all "
        f"rounded the same way; {first.mirrored:.1%} as far out on its other side",
        (first.grid,),
        first.clipped,
    )


def _cuts(alignment: Alignment) -> bool:
    """Whether the grid cuts off a whole step on one side: half a step is no more than rounding
    does. A scale that is searched for, or one of 2 bits, clips honest weights, too."""
    scheme = GRIDS[alignment.grid]
    return isinstance(scheme, SignedExtreme) and scheme.bits > 2


def _is_lopsided(alignment: Alignment) -> bool:
    """Whether many more weights are cut off than are as far out on the other side."""
    return alignment.clipped - alignment.mirrored > CLIPPED + noise(alignment)


def model_verdict(together: Verdict, tensors: Sequence[ScannedTensor]) -> Verdict:
    """The verdict on a model: the worst of the one on all weights `together` and its tensors'."""
    alarming = [tensor for tensor in tensors if tensor.verdict.alarming]
    unjudged = [tensor for tensor in tensors if _on_a_grid(tensor)]
    if not alarming and not together.alarming:
        if sum(t.weights for t in unjudged) * 2 > sum(t.weights for t in tensors):
            return Verdict(NOT_JUDGED, _why_unjudged(unjudged, len(tensors)))
        return together
    verdicts = [together, *(tensor.verdict for tensor in alarming)]
    level = max((v.level for v in verdicts if v.alarming), key=LEVELS.index)
    sizes: dict[str, float] = defaultdict(float)
    for tensor in alarming:
        for grid in tensor.verdict.grids:
            if FINDINGS[tensor.verdict.level] == FINDINGS[level]:
                sizes[grid] += tensor.weights * tensor.verdict.strength
    grids = tuple(sorted(sizes, key=lambda grid: -sizes[grid])) or together.grids
    reasons = []
    for finding in dict.fromkeys(FINDINGS[each] for each in (level, *reversed(LEVELS[1:]))):
        told = [tensor for tensor in alarming if FINDINGS[tensor.verdict.level] == finding]
        if told or finding == FINDINGS[level]:
            share = sum(t.weights for t in told) / sum(t.weights for t in tensors)
            named = dict.fromkeys(grid for tensor in told for grid in tensor.verdict.grids)
            reasons.append(
                f"in {len(told)} of {len(tensors)} tensors ({share:.1%} of the weights), "
                + finding.format(listed(grids if finding == FINDINGS[level] else tuple(named)))
            )
    strength = max(v.strength for v in verdicts if v.level == level)
    return Verdict(level, "; ".join(reasons), grids, strength)


def _why_unjudged(unjudged: Sequence[ScannedTensor], count: int) -> str:
    """The reasons, that for most of the weights first."""
    sizes: dict[str, list[int]] = defaultdict(list)
    for tensor in unjudged:
        sizes[tensor.verdict.reason].append(tensor.weights)
    reasons = sorted(sizes, key=lambda reason: -sum(sizes[reason]))
    return "; ".join(f"in {len(sizes[r])} of {count} tensors {r}" for r in reasons[:NAMED])


def not_judged_completely(
    tensors: Sequence[ScannedTensor], skipped: Sequence[Skipped]
) -> Verdict | None:
    """The verdict where too few of the weights were judged for "clean"; None otherwise."""
    left = [(t.name, t.weights) for t in tensors if _on_a_grid(t)]
    left += [(s.name, s.size) for s in skipped if s.reason in UNREADABLE]
    left += [(s.name, s.size) for s in pieces(skipped, sum(t.weights for t in tensors))]
    judged = sum(t.weights for t in tensors if not _on_a_grid(t))
    unread = [(s.name, s.size) for s in skipped if s.reason in UNREAD]
    if sum(size for _, size in unread) >= judged:
        left += unread
    missing = sum(size for _, size in left)
    total = missing + judged
    if missing <= (1 - JUDGED) * total:
        return None
    left.sort(key=lambda each: -each[1])
    names = ", ".join(name for name, _ in left[:NAMED]) + ", ..." * (len(left) > NAMED)
    return Verdict(
        NOT_JUDGED,
        f"not judged completely: nothing stands out, but {missing / total:.1%} of the weights "
        f"could not be judged ({names})",
    )


def _on_a_grid(tensor: ScannedTensor) -> bool:
    return tensor.verdict.reason.startswith(ON_GRID.reason)


def _foremost(alignments: Sequence[Alignment], value: Callable[[Alignment], float]) -> Alignment:
    """The one with the largest value; of several, which share boundaries, the coarsest grid."""
    most = max(map(value, alignments))
    close = [a for a in alignments if value(a) >= most * (1 - ECHO)]
    return min(close, key=lambda a: GRIDS[a.grid].bits)


def chance(alignment: Alignment) -> float:
    """The strength up to which the alignment may be chance."""
    return SUSPICIOUS + noise(alignment)


def noise(alignment: Alignment) -> float:
    """The share of the weights that may be chance, as they are so few."""
    return NOISE / math.sqrt(max(alignment.independent, 1))


def _result(
    source: Model,
    verdict: Verdict,
    together: tuple[Alignment, ...],
    tensors: Sequence[ScannedTensor],
    constants: Sequence[ScannedTensor],
    skipped: Sequence[Skipped],
    seconds: float,
) -> Scan:
    return Scan(
        __version__,
        str(source.path),
        source.sha256,
        source.data_sha256,
        source.size,
        verdict,
        together,
        tuple(tensors),
        tuple(skipped),
        seconds,
        constants=tuple(constants),
    )
