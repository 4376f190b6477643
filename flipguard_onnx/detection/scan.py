"""scan(): was this model prepared for a quantizer, and for which one?"""

import os
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import __version__
from ..errors import UnsupportedModelError
from ..graph.weights import Weight, find_weights
from ..io.model import Model, open_model
from ..progress import Progress
from ..quantization.chunks import refuse
from ..reports.scan import LEVELS, NOT_JUDGED, Alignment, Scan, ScannedTensor, Skipped, Verdict
from .alignment import Sample, Tally, alignment, sample_size, tallies
from .prequantized import on_a_grid, on_levels

FEWEST = 1000  # weights; what fewer do says nothing

SUSPICIOUS = 0.0025  # share of the weights; see README for how these were chosen

ALIGNED = 0.01  # above that

NOISE = 0.6  # / sqrt(weights): how far chance takes it

ECHO = 0.15  # of the strongest grid's strength: others share some boundaries with it

TOO_FEW = Verdict(NOT_JUDGED, f"fewer than {FEWEST} weights that count (judged with the others)")

ON_GRID = Verdict(NOT_JUDGED, "the weights lie on a grid already, as after quantization")

GUARDED = (
    "according to its metadata flipguard-onnx has moved weights of this file across boundaries, "
    "which leaves the same traces"
)

NOTHING = Verdict(NOT_JUDGED, "there are no weights to judge")

# and what was counted on each grid: nothing if the tensor lies on a grid
Examined = tuple[ScannedTensor, dict[str, Tally]]


def scan(model: str | os.PathLike[str], *, progress: Progress | None = None) -> Scan:
    """Judge whether the weights of an ONNX file were prepared for a quantizer.

    Raises ModelError, UnsupportedModelError when the file cannot be read, or a weight holds NaN.
    """
    started = time.perf_counter()
    source = open_model(model)
    say = progress or (lambda *_: None)
    try:
        weights, skipped = find_weights(source.proto)
    except UnsupportedModelError as error:
        seconds = time.perf_counter() - started
        return _result(source, Verdict(NOT_JUDGED, str(error)), (), (), (), seconds)
    return scan_weights(source, weights, skipped, say)


def scan_weights(
    source: Model, weights: Sequence[Weight], skipped: Sequence[Skipped], say: Progress
) -> Scan:
    """scan() of a model that has been opened. Raises ModelError when a weight holds NaN."""
    started = time.perf_counter()
    most = sample_size(len(weights))
    rng = np.random.default_rng(_digest(source))
    examined: list[Examined] = []
    for weight in weights:
        say("scanning", len(examined), len(weights))
        examined.append(examine(source.path, weight, source.array(weight.tensor), most, rng))
    say("scanning", len(examined), len(weights))
    return conclude(source, examined, skipped, time.perf_counter() - started)


def conclude(
    source: Model, examined: Sequence[Examined], skipped: Sequence[Skipped], seconds: float
) -> Scan:
    """The scan of a model whose weights have been examined one by one."""
    pool = [counted for _, counted in examined if counted]
    together: tuple[Alignment, ...] = ()
    if pool:
        sums = {grid: reduce(add, (counted[grid] for counted in pool)) for grid in pool[0]}
        together = tuple(alignment(grid, tally) for grid, tally in sums.items())
    tensors = tuple(tensor for tensor, _ in examined)
    verdict = of_model(of_tensor(together) if together else NOTHING, tensors)
    if any(entry.key == "flipguard.version" for entry in source.proto.metadata_props):
        verdict = replace(verdict, reason=f"{verdict.reason}; {GUARDED}")
    return _result(source, verdict, together, tensors, skipped, seconds)


def _digest(source: Model) -> list[int]:
    """Of the model's files: nobody can prepare a file for the sample that is taken of it."""
    return [int(digest, 16) for digest in (source.sha256, *source.data_sha256.values())]


def examine(
    path: Path, weight: Weight, values: npt.NDArray[Any], most: int, rng: np.random.Generator
) -> Examined:
    """Judge one tensor, its values as they are stored, or a sample of about `most` of them.

    Raises ModelError, which names the model at `path`, when a value is not finite.
    """
    sample = Sample.of(weight, values, most, rng)
    if not np.isfinite([sample.low, sample.high]).all():
        refuse(path, weight, weight.blocks(None, flat=False), values.transpose(weight.perm))
    counted = tallies(weight, sample)
    alignments = tuple(alignment(name, tally) for name, tally in counted.items())
    verdict = of_tensor(alignments)
    floats = sample.values.astype(np.float32)
    if on_levels(counted.values()) or on_a_grid(floats, weight.blocks(None, flat=False).cols):
        verdict, counted = ON_GRID, {}
    shape, size = weight.shape, weight.size
    return ScannedTensor(weight.name, weight.op, shape, size, verdict, alignments), counted


def of_tensor(alignments: Sequence[Alignment]) -> Verdict:
    """The verdict on weights that stand to the grids like this."""
    if max(a.weights for a in alignments) < FEWEST:
        return TOO_FEW
    found = [a for a in alignments if a.strength > _chance(a)]
    if not found:
        return Verdict("clean", "no grid's boundaries attract its weights")
    # grids with one wrong scale tell apart grids of the same blocks, others do not
    found = [a for a in found if a.peak > _chance(a)] or found
    found.sort(key=lambda a: -a.strength)
    first = found[0]
    place = f"{first.peak_at:.2f}" if first.peak >= first.edge else "less than 0.1"
    return Verdict(
        "aligned" if first.strength > ALIGNED + _chance(first) else "suspicious",
        f"{first.strength:.1%} of the weights stand {place} half-gaps from the boundaries of "
        f"{first.grid} where only that grid explains it",
        tuple(a.grid for a in found if a.strength > ECHO * first.strength),
        first.strength,
    )


def of_model(together: Verdict, tensors: Sequence[ScannedTensor]) -> Verdict:
    """The verdict on the model: the worst of its tensors', and of all weights `together`."""
    alarming = [tensor for tensor in tensors if tensor.verdict.alarming]
    unjudged = [tensor for tensor in tensors if tensor.verdict is ON_GRID]
    if not alarming and not together.alarming:
        if sum(t.weights for t in unjudged) * 2 > sum(t.weights for t in tensors):
            return Verdict(
                NOT_JUDGED, f"in {len(unjudged)} of {len(tensors)} tensors {ON_GRID.reason}"
            )
        return together
    sizes: dict[str, float] = defaultdict(float)
    for tensor in alarming:
        for grid in tensor.verdict.grids:
            sizes[grid] += tensor.weights * tensor.verdict.strength
    grids = tuple(sorted(sizes, key=lambda grid: -sizes[grid])) or together.grids
    verdicts = [together, *(tensor.verdict for tensor in alarming)]
    share = sum(t.weights for t in alarming) / sum(t.weights for t in tensors)
    return Verdict(
        max((v.level for v in verdicts if v.alarming), key=LEVELS.index),
        f"{len(alarming)} of {len(tensors)} tensors, {share:.1%} of the weights, stand where only "
        f"the boundaries of {' and '.join(grids)} explain it: an attack, or quantization-aware "
        "training, which may do the same",
        grids,
        max(verdict.strength for verdict in verdicts),
    )


def _chance(alignment: Alignment) -> float:
    """The strength up to which a grid means nothing."""
    return SUSPICIOUS + NOISE / float(np.sqrt(max(alignment.independent, 1)))


def _result(
    source: Model,
    verdict: Verdict,
    together: tuple[Alignment, ...],
    tensors: Sequence[ScannedTensor],
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
    )
