"""The moments of what the weights are multiplied with, from running the float model.

Whatever a weight is multiplied with is made an output of a copy of the model, which runs in
onnxruntime on given or made-up samples, a large one piece by piece. Kept are the second moments of
it, and a few rows.

Few given samples say nothing of most directions in which inputs may lie, and feedback that trusts
them does worse than without. So made-up ones stand beside them as a prior: their second moments, in
the given ones' scale, count as PRIOR rows per column, or as PRIOR_OF_TEXTS, however many they are.
That is shrinkage of a covariance towards a target (Ledoit and Wolf, J. Multivariate Analysis 88,
2004).
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import chain
from pathlib import Path

import numpy as np

from ..errors import RunError, UnsupportedModelError, ValidationError
from ..graph.weights import Weight
from ..io.kept import NOTHING_KEPT, Arrays, Kept
from ..progress import Progress, meter, silent
from ..quantization.error_feedback import DAMPINGS, PANEL, Floats, InputMoments
from .branches import at_the_start
from .embeddings import text_model
from .inputs import NONE_FIT, Feed, samples_at_a_time, signature
from .pieces import Pieces, Stream
from .samples import Samples
from .synthetic import decoder, sampling_rounds, synthetic_feeds, texts_at_a_time
from .text_model import TextModel
from .weight_inputs import NOT_AS_STORED, WeightInput, weight_input

ROWS = 8192  # of inputs that a weight should see at least
SAMPLES = range(64, 1025)  # how many are made up
MAX_ROWS = 32768  # of inputs that are kept of each value
MAX_PATCHES = 8192  # ... that a convolution reads: they overlap, and tell less
FRESH_ROWS = 512  # ... for the comparison of a draw with feedback and each without
FRESH = 8  # one feed in so many is kept for that comparison
GATHERED = 256  # rows at least that are added up at a time, from as many feeds as it takes
WIDE = 4  # ... of more than WIDE * GATHERED columns one row for so many of these
PRODUCTS_PER_SECOND = 3e10  # measured on two cores
SECONDS_PER_WEIGHT = 3e-7
SEED = 0  # of the made-up inputs; they need not be secret
MADE_UP_DAMPINGS = (0.05,)  # what is made up says little of fresh inputs, so it does not choose
ENOUGH = 16  # given rows per column, so that nothing is made up
PRIOR = 0.1  # ... that made-up inputs count as beside fewer
PRIOR_OF_TEXTS = 1.0  # ... that texts do which a decoder wrote: they are more like real ones
FEW = f"fewer than {ENOUGH} rows per column of some weight, so made-up ones stand beside them"
BYTES = 4  # of an entry of a matrix H, and of a factor
BYTES_TO_FACTOR = 40  # per entry, of one H while it is factored

RECORDING = "recording what weights are multiplied with"

NOTHING_RECORDED = "the inputs of no weight can be recorded"

Inputs = tuple[WeightInput, ...]  # of all readers of a weight

Plan = dict[Inputs, tuple[range, ...]]  # what one pass over the samples records, and in which spans


class MomentRecorder:
    """Runs the float model and hands out the InputMoments of each weight.

    Moments are summed for as many weights at a time as `max_bytes` allows, piece by piece.
    """

    def __init__(
        self,
        samples: Samples,
        weights: Sequence[Weight],
        folder: Path,
        max_bytes: int,
        kept: Kept = NOTHING_KEPT,
    ) -> None:
        """Raises UnsupportedModelError when the model accepts no samples or no weight reads any,
        ValidationError without onnxruntime.

        weights: those of the samples' source; folder: new, for a copy of the model; max_bytes: for
        the statistics, and of a model that is run as a whole; kept: where made-up samples are.
        """
        self._samples = samples
        self._kept = kept
        self._progress: Progress = silent
        self._source = source = samples.source
        self._max_bytes = max_bytes
        started, bodies = at_the_start(source, samples.given)
        self._cuts = {w.name: w.blocks(None, flat=False) for w in weights}
        found = {
            w.name: dict.fromkeys(weight_input(use, w, bodies) for use in w.uses) for w in weights
        }
        self._inputs = {
            name: tuple(each for each in inputs if isinstance(each, WeightInput))
            for name, inputs in found.items()
        }
        self._reasons = {
            name: next((each for each in inputs if isinstance(each, str)), "")
            for name, inputs in found.items()
        }
        groups = dict.fromkeys(filter(None, self._inputs.values()))
        if not groups:
            raise UnsupportedModelError(NOTHING_RECORDED)
        self._pieces = Pieces(started, [_names(group) for group in groups], folder, max_bytes)
        self._is_merged = started is not source and self._pieces.whole  # so it can go on, too
        self._passes = list(self._plan())
        self._gathered: dict[Inputs, InputMoments] = {}
        self._latest: tuple[Inputs, InputMoments] | None = None
        self._template, self._counts, self._seconds_per_sample = self._probe()

    @property
    def pieces(self) -> int:
        """In how many pieces the model runs."""
        return self._pieces.count

    def _probe(self) -> tuple[Feed, dict[WeightInput, int], float]:
        """A feed that the model accepts, how many rows each input gets, seconds of all passes."""
        samples, problem = self._samples, NONE_FIT
        if samples.given or self._source.size <= self._max_bytes:
            candidates: Iterable[list[Feed]] = [samples.accepted] if samples.accepted else []
            problem = samples.found.problem if not candidates else ""
        else:
            candidates = samples.candidates()
        for feed, *_ in candidates:
            try:
                counts, seconds = self._timed(feed)
                if self._pieces.whole:  # the first run of a session takes longer
                    counts, seconds = self._timed(feed)
            except RunError as error:
                problem = str(error)
                continue
            self._leave_out({each for each, count in counts.items() if count is None})
            return feed, {each: n for each, n in counts.items() if n is not None}, seconds
        raise UnsupportedModelError(
            "the model does not run on these inputs: {found}", found=problem
        )

    def _timed(self, feed: Feed) -> tuple[dict[WeightInput, int | None], float]:
        """As `_counted`, and how many seconds it took without loading."""
        started = time.perf_counter() - self._pieces.loading
        counts = self._counted(feed)
        return counts, time.perf_counter() - self._pieces.loading - started

    def _leave_out(self, misfits: set[WeightInput]) -> None:
        """Record nothing for the weights that are not multiplied with these as it seemed."""
        if not misfits:
            return
        for name, inputs in self._inputs.items():
            if misfits.intersection(inputs):
                self._inputs[name], self._reasons[name] = (), NOT_AS_STORED
        if not any(self._inputs.values()):
            raise UnsupportedModelError(NOTHING_RECORDED)
        self._passes = list(self._plan())

    def _counted(self, feed: Feed) -> dict[WeightInput, int | None]:
        """How many rows each input has in a feed; None where it does not fit. Raises RunError."""
        rng = np.random.default_rng(SEED)
        stream, counts = self._pieces.stream([feed]), {}
        for plan in self._passes:
            (values,) = stream.run(_names(chain(*plan)))
            for each in chain(*plan):
                x = values[each.value]
                counts[each] = each.rows(x, MAX_ROWS, rng).shape[1] if each.fits(x) else None
        return counts

    @property
    def seconds(self) -> float:
        """About how long the statistics and the feedback will take on a machine with two cores."""
        made_up, rounds, loads = 0, 0.0, 0
        if self._few:
            made_up = self._wanted
            rounds, loads = sampling_rounds(self._source, self._pattern[0], self._pieces)
        samples = len(self._samples.given) + made_up
        # what was timed are all passes, in each of which a model in one piece runs as a whole
        runs = samples + made_up * rounds * self._pieces.count / len(self._passes)
        work, size = 0.0, 0
        for name, inputs in self._inputs.items():
            if inputs:
                cut = self._cuts[name]
                size += cut.rows * cut.cols
                work += cut.rows * cut.cols * (cut.cols / 2 + 3 * FRESH_ROWS)
        for plan in self._passes:
            for inputs, spans in plan.items():
                rows = min(samples * sum(self._counts[each] for each in inputs), MAX_ROWS)
                work += inputs[0].groups * sum(len(s) ** 2 * (len(s) / 3 + rows) for s in spans)
        seconds = runs * self._seconds_per_sample + (1 + loads) * self._pieces.loading
        return seconds + work / PRODUCTS_PER_SECOND + size * SECONDS_PER_WEIGHT

    @property
    def note(self) -> str | None:
        """What there is beside given samples."""
        return FEW if self._beside else None

    @cached_property
    def _pattern(self) -> tuple[Feed, TextModel | None]:
        """A feed of the shapes that are made up, a given one or the beginning of a decoder's text;
        and the model, if it writes texts itself.

        A text is as long as without data: in long ones small models lose their way.
        """
        if self._samples.given and text_model(self._source):
            begun = next(self._samples.candidates())[0]
            if found := decoder(self._source, begun):
                return begun, found
        return self._template, decoder(self._source, self._template)

    @property
    def _wanted(self) -> int:
        """How many samples to make up."""
        rows = float(np.median(list(self._counts.values())))
        pattern, text = self._pattern
        if text:
            rows *= pattern[text.ids.name].size / self._template[text.ids.name].size
        return int(np.clip(-(-ROWS // max(rows, 1)), SAMPLES.start, SAMPLES.stop - 1))

    @property
    def _few(self) -> bool:
        """Whether given samples, if any, are too few for some weight."""
        samples = len(self._samples.given)
        return any(
            samples * sum(self._counts[each] for each in inputs)
            < min(ENOUGH * self._cuts[name].cols, MAX_ROWS)
            for name, inputs in self._inputs.items()
            if inputs
        )

    @cached_property
    def _beside(self) -> Stream | None:
        """Made-up feeds beside few given ones, unless it turns out that the model refuses them."""
        if not (self._samples.given and self._few):
            return None
        try:
            return self._pieces.stream(self._made_up())
        except RunError:
            return None

    @cached_property
    def _streams(self) -> tuple[Stream, Stream]:
        """Feeds for the statistics, and others for the comparison (the same if only one)."""
        feeds = self._samples.given or self._made_up()
        kept = max(1, len(feeds) // FRESH)
        return self._pieces.stream(feeds[:-kept] or feeds), self._pieces.stream(feeds[-kept:])

    def _made_up(self) -> list[Feed]:
        if found := self._kept.load("inputs"):
            return _numbered(found)
        feeds = self._sampled()
        if not any(values.dtype.hasobject for values in feeds[0].values()):
            named = {
                f"{i} {n}": values for i, feed in enumerate(feeds) for n, values in feed.items()
            }
            self._kept.store("inputs", named)
        return feeds

    def _sampled(self) -> list[Feed]:
        source, (template, text) = self._source, self._pattern
        batch = samples_at_a_time(template, signature(source.proto))
        # attention takes memory that grows with the square of the rows of a sample
        batch = min(batch, max(1, ROWS // max(1, *self._counts.values())))
        if text:
            batch = min(batch, texts_at_a_time(text, template[text.ids.name].shape[1]))
        if batch > 1:
            try:
                self._counted(synthetic_feeds(source, None, template, batch, batch, SEED)[0])
            except RunError:  # the model takes no batches, whatever its signature says
                batch = 1
        samples = self._wanted + max(1, self._wanted // FRESH)
        runner = self._samples.session if self._is_merged else self._pieces
        return synthetic_feeds(source, runner, template, samples, batch, SEED, self._progress)

    def prepare(self, progress: Progress) -> None:
        """Record the inputs of the first weights, as many as `max_bytes` allows."""
        self._progress = progress
        self._gathered = self._statistics(self._passes[0])

    def piece_of(self, name: str) -> int:
        """The number of the piece of the model after which the inputs of a weight are known."""
        return self._pieces.number_of(_names(self._inputs[name]))

    def of(self, weight: Weight) -> InputMoments | str:
        """The inputs of a weight, or the reason why there are none."""
        inputs = self._inputs[weight.name]
        if not inputs:
            return self._reasons[weight.name]
        if inputs not in self._gathered:
            self._gathered = {}
            self._gathered = self._statistics(next(p for p in self._passes if inputs in p))
        if self._latest is None or self._latest[0] != inputs:  # those before lose their factors
            self._latest = inputs, replace(self._gathered[inputs])
        moments = self._latest[1]
        if not moments.fresh.shape[1]:
            return "its inputs hold no values"
        finite = all(np.isfinite(hessian).all() for hessian in moments.hessians)
        return moments if finite and np.isfinite(moments.fresh).all() else "its inputs overflow"

    def _plan(self) -> Iterator[Plan]:
        """The inputs whose matrices fit into memory together, in the order of the pieces.

        All are known after the same piece.
        """
        plan: Plan = {}
        seen: set[Inputs] = set()
        used, piece = 0, -1
        for name in sorted(self._inputs, key=self.piece_of):
            inputs = self._inputs[name]
            if not inputs or inputs in seen:
                continue
            seen.add(inputs)
            groups, columns = inputs[0].groups, self._cuts[name].cols
            spans = _spans(groups, columns, self._max_bytes)
            used += _bytes_kept(groups, spans)
            full = used + _bytes_to_factor(groups, spans) > self._max_bytes
            before, piece = piece, self._pieces.number_of(_names(inputs))
            if plan and (full or piece != before):
                yield plan
                plan, used = {}, _bytes_kept(groups, spans)
            plan[inputs] = spans
        yield plan

    def _statistics(self, plan: Plan) -> dict[Inputs, InputMoments]:
        sums = {
            inputs: tuple(np.zeros((inputs[0].groups, len(s), len(s)), np.float32) for s in spans)
            for inputs, spans in plan.items()
        }
        beside, (feeds, others) = self._beside, self._streams
        runs = len(beside or ()) + len(feeds) + len(others)
        advance = meter(self._progress, RECORDING, runs)
        gathered = dict.fromkeys(plan, 2 * FRESH_ROWS)
        fresh = dict(self._rows_of(others, gathered, FRESH_ROWS, advance))
        if beside:
            self._add_prior(beside, plan, sums, fresh, advance)
        self._add(feeds, plan, sums, advance)
        are_fresh = self._samples.given[1:]  # else they are those of the statistics
        dampings = DAMPINGS if are_fresh else MADE_UP_DAMPINGS
        return {
            inputs: InputMoments(spans, sums[inputs], fresh[inputs], dampings)
            for inputs, spans in plan.items()
        }

    def _add_prior(
        self,
        feeds: Stream,
        plan: Plan,
        sums: dict[Inputs, tuple[Floats, ...]],
        fresh: dict[Inputs, Floats],
        advance: Callable[[int], None],
    ) -> None:
        """Add those of made-up feeds, as if they were few and as large as the fresh rows."""
        rows_per_column = PRIOR_OF_TEXTS if self._pattern[1] else PRIOR
        try:
            self._add(feeds, plan, sums, advance)
        except RunError:
            self._beside, rows_per_column = None, 0
        for inputs, totals in sums.items():
            for total, span in zip(totals, plan[inputs], strict=True):
                rows = fresh[inputs][:, :, span.start : span.stop]
                _scale(total, rows, rows_per_column * len(span))

    def _add(
        self,
        feeds: Stream,
        plan: Plan,
        sums: dict[Inputs, tuple[Floats, ...]],
        advance: Callable[[int], None],
    ) -> None:
        """Add the second moments of feeds to those of each input."""
        gathered = {inputs: _gathered(spans[-1].stop) for inputs, spans in plan.items()}
        for inputs, rows in self._rows_of(feeds, gathered, MAX_ROWS, advance):
            for total, span in zip(sums[inputs], plan[inputs], strict=True):
                part = rows[:, :, span.start : span.stop]
                with np.errstate(over="ignore", invalid="ignore"):  # `of` finds it
                    total += part.transpose(0, 2, 1) @ part

    def _rows_of(
        self,
        feeds: Stream,
        gathered: dict[Inputs, int],
        max_rows: int,
        advance: Callable[[int], None],
    ) -> Iterator[tuple[Inputs, Floats]]:
        """Rows for the inputs of each weight, up to about `max_rows`, at least `gathered` of them
        together."""
        rng = np.random.default_rng(SEED)
        waiting: dict[Inputs, list[Floats]] = {inputs: [] for inputs in gathered}
        for values in feeds.run(_names(chain(*waiting))):
            for inputs, rows in waiting.items():
                limit = min(max_rows, MAX_PATCHES) if inputs[0].window else max_rows
                share = -(-limit // len(feeds))
                rows += [each.rows(values[each.value], share, rng) for each in inputs]
                if sum(part.shape[1] for part in rows) >= gathered[inputs]:
                    yield inputs, rows[0] if len(rows) == 1 else np.concatenate(rows, axis=1)
                    rows.clear()
            advance(1)
        for inputs, rows in waiting.items():
            if rows:
                yield inputs, np.concatenate(rows, axis=1)


def _scale(moments: Floats, rows: Floats, count: float) -> None:
    """Scale second moments [groups, columns, columns] to those of so many rows as large as these
    [groups, rows, columns]; 0 where they are not finite."""
    power = np.square(rows, dtype=np.float64).sum(axis=(1, 2)) / max(rows.shape[1], 1)
    trace = np.einsum("gii->g", moments, dtype=np.float64)
    with np.errstate(all="ignore"):
        moments *= (count * power / trace).astype(np.float32)[:, None, None]
    moments[~np.isfinite(moments).all(axis=(1, 2))] = 0


def _numbered(arrays: Arrays) -> list[Feed]:
    """The feeds of arrays that are named after the number of their feed, a space and the input."""
    feeds: list[Feed] = []
    for key, values in arrays.items():
        number, _, name = key.partition(" ")
        feeds += [{}] * (int(number) == len(feeds))
        feeds[int(number)][name] = values
    return feeds


def _names(inputs: Iterable[WeightInput]) -> list[str]:
    """The values that they are, each once."""
    return list(dict.fromkeys(each.value for each in inputs))


def _gathered(columns: int) -> int:
    """How many rows are added up at a time: adding takes as long for one as for many."""
    return max(GATHERED, columns // WIDE)


def _spans(groups: int, columns: int, max_bytes: int) -> tuple[range, ...]:
    """The columns cut up so that their matrices fit into memory."""
    width = columns
    while True:
        spans = tuple(range(a, min(a + width, columns)) for a in range(0, columns, max(width, 1)))
        needed = _bytes_kept(groups, spans) + _bytes_to_factor(groups, spans)
        if needed <= max_bytes or width <= PANEL:
            return spans
        width = (width - 1) // PANEL * PANEL


def _bytes_kept(groups: int, spans: tuple[range, ...]) -> int:
    """Of the matrices H of one input, and of its rows: gathered, and for the comparison."""
    rows = FRESH_ROWS + _gathered(spans[-1].stop)
    return BYTES * groups * sum(len(s) * (len(s) + rows) for s in spans)


def _bytes_to_factor(groups: int, spans: tuple[range, ...]) -> int:
    """Of the factors of one input, for the best damping and another, and what computing takes."""
    squares = [len(s) ** 2 for s in spans]
    return 2 * BYTES * groups * sum(squares) + BYTES_TO_FACTOR * max(squares, default=0)


class Moments:
    """What a run knows of the inputs of its weights.

    inputs: "synthetic" or "data" where errors are fed forward, else "off"; note: why they are not,
    or what there is beside the data.
    """

    def __init__(
        self, recorder: MomentRecorder | None, inputs: str = "off", note: str | None = None
    ) -> None:
        self._recorder = recorder
        self.inputs = inputs if recorder else "off"
        self.note = recorder.note if recorder else note

    def of(self, weight: Weight) -> InputMoments | str | None:
        """The moments of a weight's inputs, or why there are none; None where feedback is off."""
        return self._recorder.of(weight) if self._recorder else None

    def order(self, weight: Weight) -> int:
        """Drawn in this order, the weights of a model in pieces take one run of it."""
        return self._recorder.piece_of(weight.name) if self._recorder else 0


def record(
    samples: Samples,
    weights: Sequence[Weight],
    folder: Path,
    max_bytes: int,
    inputs: str,
    optional: bool,
    kept: Kept = NOTHING_KEPT,
    progress: Progress = silent,
) -> Moments:
    """The moments of what the weights are multiplied with.

    max_bytes: for the statistics, and of a model that is run as a whole. inputs: "synthetic" or
    "data"; "off" records nothing. optional: go without, and say why, where they cannot be had.
    kept: where made-up samples are kept.
    """
    if inputs == "off":
        return Moments(None)
    try:
        recorder = MomentRecorder(samples, weights, folder, max_bytes, kept)
        progress(f"error feedback, about {recorder.seconds:.0f} s", 0, 1)
        recorder.prepare(progress)
    except (UnsupportedModelError, ValidationError) as error:
        if not optional:
            raise
        return Moments(None, note=str(error))
    return Moments(recorder, inputs)
