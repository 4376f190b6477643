"""What the weights are multiplied with, from running the float model.

The inputs of MatMul, Gemm, Conv and of the input side of recurrent operators are made outputs of a
copy of the model, which runs in onnxruntime on synthetic or given inputs; what is kept of them are
their second moments and a few rows.
"""

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, helper

from ..errors import RunError, UnsupportedModelError, ValidationError
from ..graph.weights import Weight
from ..io.model import Model
from ..io.writer import Output
from ..quantization.error_feedback import PANEL, Floats, InputMoments
from ..runtime.session import Session, open_session
from .inputs import NONE_FIT, Feed, load_feeds, made_up_feeds, signature
from .synthetic import synthetic_feeds
from .weight_inputs import WeightInput, weight_input

ROWS = 4096  # of inputs that a weight should see at least

SAMPLES = range(64, 1025)  # how many are made up

BATCH = 16

LOGITS = 1 << 25  # of a decoder, in one run

MOST_ROWS = 8192  # of inputs that are kept of one reading

FRESH_ROWS = 512

FRESH = 8  # one feed in so many is kept for the judgement

GATHERED = 1024  # rows that are added up at a time

PRODUCTS_PER_SECOND = 3e10  # measured on two cores

SECONDS_PER_WEIGHT = 3e-7

LONGEST = 60.0  # seconds; feedback that takes longer is not switched on by itself

SEED = 0  # of the made-up inputs; they need not be secret

BYTES_PER_ENTRY = 32  # of a matrix H, with its damped copy, factor and float32 form


class MomentRecorder:
    """Runs the float model and hands out the InputMoments of each weight.

    Statistics are gathered for as many weights at a time as `max_bytes` allows, in their order.
    """

    def __init__(
        self,
        source: Model,
        weights: Sequence[Weight],
        folder: Path,
        max_bytes: int,
        data: Path | None,
    ) -> None:
        """Find inputs that the model accepts: those of `data`, an .npz file, or made-up ones.

        Raises UnsupportedModelError when there are none or no weight reads any, ValidationError
        without onnxruntime.
        """
        main = source.proto.graph
        self._source = source
        self._max_bytes = max_bytes
        self._cuts = {w.name: w.blocks(None, flat=False) for w in weights}
        found = {
            w.name: dict.fromkeys(weight_input(use, w, main) for use in w.uses) for w in weights
        }
        self._taps = {
            name: tuple(tap for tap in taps if isinstance(tap, WeightInput))
            for name, taps in found.items()
        }
        self._reasons = {
            name: next((tap for tap in taps if isinstance(tap, str)), "")
            for name, taps in found.items()
        }
        self._all_taps = list(dict.fromkeys(tap for taps in self._taps.values() for tap in taps))
        if not self._all_taps:
            raise UnsupportedModelError("the inputs of no weight can be recorded")
        self._gathered: dict[tuple[WeightInput, ...], InputMoments] = {}
        self._session = self._open(Output(folder, folder / "probe.onnx", external=True))
        self._given = load_feeds(data, source.proto) if data else []
        self._template, self._counts = self._probe()

    def _open(self, output: Output) -> Session:
        proto = ModelProto()
        proto.CopyFrom(self._source.proto)
        known = {value.name for value in (*proto.graph.output, *proto.graph.input)}
        for tap in self._all_taps:
            if tap.value not in known:
                known.add(tap.value)
                value = helper.make_tensor_value_info(tap.value, tap.elem_type, None)
                proto.graph.output.append(value)
        output.save(proto, self._source)
        return open_session(output.path, exact=True, size=self._source.size)

    def _probe(self) -> tuple[Feed, dict[WeightInput, int]]:
        """A feed that the model accepts, and how many rows of inputs it gives each tap."""
        problem = NONE_FIT
        made_up = made_up_feeds(self._source.proto, self._source.size)
        for feeds in [self._given] if self._given else made_up:
            try:
                values = self._run(feeds[0], self._all_taps)
            except RunError as error:
                problem = str(error)
                continue
            rng = np.random.default_rng(SEED)
            rows = {tap: tap.rows(values[tap.value], MOST_ROWS, rng) for tap in self._all_taps}
            return feeds[0], {tap: found.shape[1] for tap, found in rows.items()}
        raise UnsupportedModelError(f"the model does not run on these inputs: {problem}")

    @property
    def seconds(self) -> float:
        """About how long the statistics and the feedback will take on a machine with two cores."""
        samples = len(self._given) or self._samples
        work, size = 0.0, 0
        for name, taps in self._taps.items():
            cut = self._cuts[name]
            rows = samples * sum(self._counts[tap] for tap in taps)
            work += cut.rows * cut.cols * (cut.cols / 2 * bool(taps) + rows)
            size += cut.rows * cut.cols * bool(taps)
        for tap in self._all_taps:
            columns = next(self._cuts[n].cols for n, taps in self._taps.items() if tap in taps)
            rows = min(samples * self._counts[tap], MOST_ROWS)
            work += tap.groups * columns**2 * (columns + rows)
        return work / PRODUCTS_PER_SECOND + size * SECONDS_PER_WEIGHT

    @property
    def _samples(self) -> int:
        """How many samples to make up."""
        rows = float(np.median(list(self._counts.values())))
        return int(np.clip(-(-ROWS // max(rows, 1)), SAMPLES.start, SAMPLES.stop - 1))

    @cached_property
    def _feeds(self) -> tuple[list[Feed], list[Feed]]:
        """Feeds for the statistics, and others for the judgement (the same if there is one)."""
        feeds = self._given or self._made_up()
        kept = max(1, len(feeds) // FRESH)
        return feeds[:-kept] or feeds, feeds[-kept:]

    def _made_up(self) -> list[Feed]:
        samples = self._samples + max(1, self._samples // FRESH)
        batch = BATCH
        for wanted in signature(self._source.proto):
            if wanted.table:
                logits = self._template[wanted.name].size * wanted.table
                batch = max(1, min(batch, LOGITS // max(logits, 1)))
        if batch > 1:
            try:
                self._run(self._synthetic(batch, batch)[0], [])
            except RunError:  # the model takes no batches, whatever its signature says
                batch = 1
        return self._synthetic(samples, batch)

    def _synthetic(self, samples: int, batch: int) -> list[Feed]:
        return synthetic_feeds(self._source, self._session, self._template, samples, batch, SEED)

    def of(self, weight: Weight) -> InputMoments | str:
        """The inputs of a weight, or the reason why there are none."""
        taps = self._taps[weight.name]
        if not taps:
            return self._reasons[weight.name]
        if taps not in self._gathered:
            self._gathered = self._statistics(weight)
        inputs = self._gathered[taps]
        finite = all(np.isfinite(hessian).all() for hessian in inputs.hessians)
        return inputs if finite and np.isfinite(inputs.fresh).all() else "its inputs overflow"

    def _spans(self, taps: tuple[WeightInput, ...], columns: int) -> tuple[range, ...]:
        """The columns cut up so that their matrices fit into memory."""
        width = columns
        while taps[0].groups * columns * width * BYTES_PER_ENTRY > self._max_bytes:
            width = (width - 1) // PANEL * PANEL
            if width <= PANEL:
                break
        return tuple(range(a, min(a + width, columns)) for a in range(0, columns, max(width, 1)))

    def _pass(self, first: Weight) -> Iterator[tuple[tuple[WeightInput, ...], tuple[range, ...]]]:
        """The taps from this weight on whose matrices fit into memory together."""
        used = 0
        seen: set[tuple[WeightInput, ...]] = set()
        names = list(self._taps)
        for name in names[names.index(first.name) :]:
            taps = self._taps[name]
            if not taps or taps in seen:
                continue
            spans = self._spans(taps, self._cuts[name].cols)
            used += sum(taps[0].groups * len(s) ** 2 * BYTES_PER_ENTRY for s in spans)
            if seen and used > self._max_bytes:
                return
            seen.add(taps)
            yield taps, spans

    def _statistics(self, first: Weight) -> dict[tuple[WeightInput, ...], InputMoments]:
        plan = dict(self._pass(first))
        sums = {
            taps: [np.zeros((taps[0].groups, len(s), len(s)), np.float64) for s in spans]
            for taps, spans in plan.items()
        }
        for taps, rows in self._rows_of(self._feeds[0], list(plan), MOST_ROWS, GATHERED):
            for total, span in zip(sums[taps], plan[taps], strict=True):
                part = rows[:, :, span.start : span.stop]
                with np.errstate(over="ignore", invalid="ignore"):  # `of` finds it
                    total += part.transpose(0, 2, 1) @ part
        fresh = dict(self._rows_of(self._feeds[1], list(plan), FRESH_ROWS, 2 * FRESH_ROWS))
        return {
            taps: InputMoments(spans, tuple(sums[taps]), fresh[taps])
            for taps, spans in plan.items()
        }

    def _rows_of(
        self, feeds: list[Feed], wanted: list[tuple[WeightInput, ...]], most: int, at_a_time: int
    ) -> Iterator[tuple[tuple[WeightInput, ...], Floats]]:
        """Rows of inputs for the taps of each weight, up to about `most`, some feeds together."""
        rng = np.random.default_rng(SEED)
        share = -(-most // len(feeds))
        waiting: dict[tuple[WeightInput, ...], list[Floats]] = {taps: [] for taps in wanted}
        flat = [tap for taps in wanted for tap in taps]
        for feed in feeds:
            values = self._run(feed, flat)
            for taps, rows in waiting.items():
                rows += [tap.rows(values[tap.value], share, rng) for tap in taps]
                if sum(part.shape[1] for part in rows) > at_a_time:
                    yield taps, np.concatenate(rows, axis=1)
                    rows.clear()
        for taps, rows in waiting.items():
            if rows:
                yield taps, np.concatenate(rows, axis=1)

    def _run(self, feed: Feed, taps: Sequence[WeightInput]) -> dict[str, npt.NDArray[Any]]:
        names = [n for n in dict.fromkeys(tap.value for tap in taps) if n not in feed]
        names = names or self._session.outputs[:1]
        return feed | dict(zip(names, self._session.run(names, feed), strict=True))


def record(
    source: Model,
    weights: Sequence[Weight],
    folder: Path,
    most: int,
    data: Path | None,
    optional: bool,
) -> tuple[MomentRecorder | None, str | None]:
    """What the weights are multiplied with, or None and the reason.

    most: bytes for the statistics. optional: go without where it cannot be had, where the model is
    larger than that, or where it takes longer than LONGEST.
    """
    if optional and source.size > most:
        return None, f"the model is larger than --max-memory ({most >> 20:,} MiB)"
    try:
        activations = MomentRecorder(source, weights, folder, most, data)
    except (UnsupportedModelError, ValidationError) as error:
        if not optional:
            raise
        return None, str(error)
    if optional and activations.seconds > LONGEST:
        minutes = activations.seconds / 60
        return None, f"it would take about {minutes:.0f} min; --preserve synthetic switches it on"
    return activations, None
