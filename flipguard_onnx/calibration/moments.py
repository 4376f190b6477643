"""The moments of what the weights are multiplied with, from running the float model.

Whatever a weight is multiplied with is made an output of a copy of the model, which runs in
onnxruntime on given or made-up samples. Kept are the second moments of it, and a few rows.
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
from ..io.writer import Output
from ..quantization.error_feedback import PANEL, Floats, InputMoments
from ..runtime.session import Session, open_session
from .inputs import Feed, signature
from .samples import Samples
from .synthetic import synthetic_feeds
from .weight_inputs import WeightInput, weight_input

ROWS = 4096  # of inputs that a weight should see at least
SAMPLES = range(64, 1025)  # how many are made up
BATCH = 16
LOGITS = 1 << 25  # of a decoder, in each run
MAX_ROWS = 8192  # of inputs that are kept of each value
FRESH_ROWS = 512  # ... for the comparison of a draw with feedback and each without
FRESH = 8  # one feed in so many is kept for that comparison
GATHERED = 1024  # rows that are added up at a time
PRODUCTS_PER_SECOND = 3e10  # measured on two cores
SECONDS_PER_WEIGHT = 3e-7
MAX_SECONDS = 60.0  # feedback that takes longer is not switched on by itself
SEED = 0  # of the made-up inputs; they need not be secret
BYTES_PER_ENTRY = 32  # of a matrix H, with its damped copy, factor and float32 form


class MomentRecorder:
    """Runs the float model and hands out the InputMoments of each weight.

    Moments are summed for as many weights at a time as `max_bytes` allows, in the weights' order.
    """

    def __init__(
        self,
        samples: Samples,
        weights: Sequence[Weight],
        folder: Path,
        max_bytes: int,
    ) -> None:
        """Raises UnsupportedModelError when the model accepts no samples or no weight reads any,
        ValidationError without onnxruntime.

        weights: those of the samples' source; folder: new, for a copy of the model; max_bytes: for
        the statistics.
        """
        self._samples = samples
        self._source = source = samples.source
        self._max_bytes = max_bytes
        main = source.proto.graph
        self._cuts = {w.name: w.blocks(None, flat=False) for w in weights}
        found = {
            w.name: dict.fromkeys(weight_input(use, w, main) for use in w.uses) for w in weights
        }
        self._inputs = {
            name: tuple(each for each in inputs if isinstance(each, WeightInput))
            for name, inputs in found.items()
        }
        self._reasons = {
            name: next((each for each in inputs if isinstance(each, str)), "")
            for name, inputs in found.items()
        }
        self._all_inputs = list(
            dict.fromkeys(each for inputs in self._inputs.values() for each in inputs)
        )
        if not self._all_inputs:
            raise UnsupportedModelError("the inputs of no weight can be recorded")
        self._gathered: dict[tuple[WeightInput, ...], InputMoments] = {}
        self._session = self._open(Output(folder, folder / "probe.onnx", external=True))
        self._template, self._counts = self._probe()

    def _open(self, output: Output) -> Session:
        proto = ModelProto()
        proto.CopyFrom(self._source.proto)
        known = {value.name for value in (*proto.graph.output, *proto.graph.input)}
        for each in self._all_inputs:
            if each.value not in known:
                known.add(each.value)
                value = helper.make_tensor_value_info(each.value, each.elem_type, None)
                proto.graph.output.append(value)
        output.save(proto, self._source)
        return open_session(output.path, exact=True, size=self._source.size)

    def _probe(self) -> tuple[Feed, dict[WeightInput, int]]:
        """A feed that the model accepts, and how many rows each of the inputs gets."""
        if not self._samples.accepted:
            raise UnsupportedModelError(
                "the model does not run on these inputs: {found}",
                found=self._samples.found.problem,
            )
        feed = self._samples.accepted[0]
        try:
            values = self._run(feed, self._all_inputs)
        except RunError as error:
            raise UnsupportedModelError(
                "the model does not run on these inputs: {found}", found=str(error)
            ) from None
        rng = np.random.default_rng(SEED)
        rows = {each: each.rows(values[each.value], MAX_ROWS, rng) for each in self._all_inputs}
        return feed, {each: found.shape[1] for each, found in rows.items()}

    @property
    def seconds(self) -> float:
        """About how long the statistics and the feedback will take on a machine with two cores."""
        samples = len(self._samples.given) or self._wanted
        work, size = 0.0, 0
        for name, inputs in self._inputs.items():
            cut = self._cuts[name]
            rows = samples * sum(self._counts[each] for each in inputs)
            work += cut.rows * cut.cols * (cut.cols / 2 * bool(inputs) + rows)
            size += cut.rows * cut.cols * bool(inputs)
        for each in self._all_inputs:
            columns = next(
                self._cuts[n].cols for n, inputs in self._inputs.items() if each in inputs
            )
            rows = min(samples * self._counts[each], MAX_ROWS)
            work += each.groups * columns**2 * (columns + rows)
        return work / PRODUCTS_PER_SECOND + size * SECONDS_PER_WEIGHT

    @property
    def _wanted(self) -> int:
        """How many samples to make up."""
        rows = float(np.median(list(self._counts.values())))
        return int(np.clip(-(-ROWS // max(rows, 1)), SAMPLES.start, SAMPLES.stop - 1))

    @cached_property
    def _feeds(self) -> tuple[list[Feed], list[Feed]]:
        """Feeds for the statistics, and others for the comparison (the same if only one)."""
        feeds = self._samples.given or self._made_up()
        kept = max(1, len(feeds) // FRESH)
        return feeds[:-kept] or feeds, feeds[-kept:]

    def _made_up(self) -> list[Feed]:
        samples = self._wanted + max(1, self._wanted // FRESH)
        batch = BATCH
        for wanted in signature(self._source.proto):
            if wanted.table_rows:
                logits = self._template[wanted.name].size * wanted.table_rows
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
        inputs = self._inputs[weight.name]
        if not inputs:
            return self._reasons[weight.name]
        if inputs not in self._gathered:
            self._gathered = self._statistics(weight)
        moments = self._gathered[inputs]
        finite = all(np.isfinite(hessian).all() for hessian in moments.hessians)
        return moments if finite and np.isfinite(moments.fresh).all() else "its inputs overflow"

    def _spans(self, inputs: tuple[WeightInput, ...], columns: int) -> tuple[range, ...]:
        """The columns cut up so that their matrices fit into memory."""
        width = columns
        while inputs[0].groups * columns * width * BYTES_PER_ENTRY > self._max_bytes:
            width = (width - 1) // PANEL * PANEL
            if width <= PANEL:
                break
        return tuple(range(a, min(a + width, columns)) for a in range(0, columns, max(width, 1)))

    def _pass(self, first: Weight) -> Iterator[tuple[tuple[WeightInput, ...], tuple[range, ...]]]:
        """The inputs from this weight on whose matrices fit into memory together."""
        used = 0
        seen: set[tuple[WeightInput, ...]] = set()
        names = list(self._inputs)
        for name in names[names.index(first.name) :]:
            inputs = self._inputs[name]
            if not inputs or inputs in seen:
                continue
            spans = self._spans(inputs, self._cuts[name].cols)
            used += sum(inputs[0].groups * len(s) ** 2 * BYTES_PER_ENTRY for s in spans)
            if seen and used > self._max_bytes:
                return
            seen.add(inputs)
            yield inputs, spans

    def _statistics(self, first: Weight) -> dict[tuple[WeightInput, ...], InputMoments]:
        plan = dict(self._pass(first))
        sums = {
            inputs: [np.zeros((inputs[0].groups, len(s), len(s)), np.float64) for s in spans]
            for inputs, spans in plan.items()
        }
        for inputs, rows in self._rows_of(self._feeds[0], list(plan), MAX_ROWS, GATHERED):
            for total, span in zip(sums[inputs], plan[inputs], strict=True):
                part = rows[:, :, span.start : span.stop]
                with np.errstate(over="ignore", invalid="ignore"):  # `of` finds it
                    total += part.transpose(0, 2, 1) @ part
        fresh = dict(self._rows_of(self._feeds[1], list(plan), FRESH_ROWS, 2 * FRESH_ROWS))
        return {
            inputs: InputMoments(spans, tuple(sums[inputs]), fresh[inputs])
            for inputs, spans in plan.items()
        }

    def _rows_of(
        self,
        feeds: list[Feed],
        wanted: list[tuple[WeightInput, ...]],
        max_rows: int,
        at_a_time: int,
    ) -> Iterator[tuple[tuple[WeightInput, ...], Floats]]:
        """Rows for the inputs of each weight, up to about `max_rows`, some feeds together."""
        rng = np.random.default_rng(SEED)
        share = -(-max_rows // len(feeds))
        waiting: dict[tuple[WeightInput, ...], list[Floats]] = {inputs: [] for inputs in wanted}
        flat = [each for inputs in wanted for each in inputs]
        for feed in feeds:
            values = self._run(feed, flat)
            for inputs, rows in waiting.items():
                rows += [each.rows(values[each.value], share, rng) for each in inputs]
                if sum(part.shape[1] for part in rows) > at_a_time:
                    yield inputs, np.concatenate(rows, axis=1)
                    rows.clear()
        for inputs, rows in waiting.items():
            if rows:
                yield inputs, np.concatenate(rows, axis=1)

    def _run(self, feed: Feed, inputs: Sequence[WeightInput]) -> dict[str, npt.NDArray[Any]]:
        names = [n for n in dict.fromkeys(each.value for each in inputs) if n not in feed]
        names = names or self._session.outputs[:1]
        return feed | dict(zip(names, self._session.run(names, feed), strict=True))


class Moments:
    """What a run knows of the inputs of its weights.

    inputs: "synthetic" or "data" where errors are fed forward, else "off"; note: why they are not.
    """

    def __init__(
        self, recorder: MomentRecorder | None, inputs: str = "off", note: str | None = None
    ) -> None:
        self._recorder = recorder
        self.inputs = inputs if recorder else "off"
        self.note = note
        self.seconds = recorder.seconds if recorder else 0.0

    def of(self, weight: Weight) -> InputMoments | str | None:
        """The moments of a weight's inputs, or why there are none; None where feedback is off."""
        return self._recorder.of(weight) if self._recorder else None


def record(
    samples: Samples,
    weights: Sequence[Weight],
    folder: Path,
    max_bytes: int,
    inputs: str,
    optional: bool,
    max_seconds: float = MAX_SECONDS,
) -> Moments:
    """The moments of what the weights are multiplied with.

    max_bytes: for the statistics. inputs: "synthetic" or "data"; "off" records nothing. optional:
    go without, and say why, where they cannot be had, where the model is larger than `max_bytes`
    or where they would take longer than `max_seconds`.
    """
    if inputs == "off":
        return Moments(None)
    if optional and samples.source.size > max_bytes:
        return Moments(
            None, note=f"the model is larger than --max-memory ({max_bytes >> 20:,} MiB)"
        )
    try:
        recorder = MomentRecorder(samples, weights, folder, max_bytes)
    except (UnsupportedModelError, ValidationError) as error:
        if not optional:
            raise
        return Moments(None, note=str(error))
    if optional and recorder.seconds > max_seconds:
        minutes = recorder.seconds / 60
        return Moments(
            None,
            note=f"it would take about {minutes:.0f} min; --preserve synthetic switches it on",
        )
    return Moments(recorder, inputs)
