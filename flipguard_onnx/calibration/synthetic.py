"""Inputs for statistics of activations, made up so that they resemble real ones.

Token ids of a decoder are sampled from the decoder itself, which models what it was trained on:
one token after the other where it takes back its caches or short texts of any length, else all at
once in several rounds. A decoder that takes embeddings gets those of such tokens, where it takes
back its caches. Other ids are drawn uniformly. Images and sequences are patches that cover each
other ("dead leaves", which have the edges and the spectrum of natural images) under a texture whose
amplitude falls with frequency, in the range that the graph suggests; vectors are white noise in
that range.
The state of a streaming model is zero, as at the start of a stream: it never meets noise there.
Everything else is made up as in `inputs`.
"""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, NodeProto

from ..errors import RunError
from ..io.model import Model
from ..progress import Progress, meter, silent
from .embeddings import text_model
from .inputs import BATCH, LOGITS, Feed, Input, node_readers, signature, values
from .pieces import Pieces, Texts
from .text_model import STATES, TextModel

TEXT = 16  # tokens at most of a text that grows without caches: each takes a run on all before it

SAMPLING_ROUNDS = 8  # in which a decoder with inputs of a fixed length draws token ids

ONE_BY_ONE = 2  # rounds that take as long as drawing token after token with caches (measured)

CACHES = 1 << 28  # bytes of a decoder's caches for the samples that are drawn together

PATCHES = 60  # per sample

MAX_TEXTURE_EXPONENT = 1.5  # of frequency, with which the amplitude of a texture falls

CHANNELS = (1, 3, 4)  # sizes of an axis of channels; larger axes are spatial

_AFFINE = ("Sub", "Add", "Mul", "Div")

_VALUE_KEEPING = ("Cast", "Identity", "Transpose", "Unsqueeze", "Reshape")


class Runs(Protocol):
    """A model that runs on feeds."""

    def run_all(
        self, names: Sequence[str], feeds: Sequence[Feed]
    ) -> Iterator[dict[str, npt.NDArray[Any]]]:
        """These outputs, by name, for one feed after the other."""


class Runner(Runs, Protocol):
    """A model that runs.

    whole: it is in memory, so that it can be run often.
    """

    @property
    def whole(self) -> bool: ...

    def go_on(
        self, names: list[str], feed: Feed, successors: dict[str, str]
    ) -> list[npt.NDArray[Any]]:
        """As `Session.go_on`, of a model that is whole."""


def synthetic_feeds(
    source: Model,
    runner: Runner | None,
    template: Feed,
    samples: int,
    batch: int,
    seed: int,
    progress: Progress = silent,
) -> list[Feed]:
    """Synthetic feeds.

    Parameters
    ----------
    source : the float model
    runner : the same in onnxruntime, from which a decoder's token ids are sampled; None leaves
        them as they are
    template : a feed that the model accepts, whose shapes the feeds get
    samples : in all feeds together
    batch : samples in one feed; 1 where no input has an open first dimension
    seed : of the random values
    """
    rng = np.random.default_rng(seed)
    inputs = signature(source.proto)
    if not any(BATCH in wanted.dims for wanted in inputs):
        batch = 1
    count = -(-samples // batch)
    text = decoder(source, template)
    if text and runner and runner.whole and text.goes_on:
        with suppress(RunError):  # if it does not go on from its caches
            return _one_by_one(text, runner, template, count, batch, rng, progress)
    drawn = [i for i in inputs if not text or i.name not in text.determined]
    advance = meter(progress, "making up inputs", count)
    feeds = []
    for _ in range(count):
        feed = {i.name: _value(source, i, template[i.name].shape, batch, rng) for i in drawn}
        if text and text.table is not None:
            feed[text.ids.name] = text.drawn(feed[text.ids.name].shape[:2], rng)
        feeds.append(text.filled(feed) if text else feed)
        advance(1)
    if not (text and runner):
        return feeds
    if texts := _texts(text, runner):
        with suppress(RunError):  # if it does not go on from its caches
            return _going_on(text, texts, feeds, batch, rng, progress)
    if text.table is not None:
        return feeds
    if isinstance(text.ids.dims[1], str):
        with suppress(RunError):  # if it does not take texts of every length
            return _growing(text, runner, feeds, rng, progress)
    with suppress(RunError):  # if what looked like logits are none
        return _in_rounds(text, runner, feeds, rng, progress)
    return feeds


def decoder(source: Model, template: Feed) -> TextModel | None:
    """The model of text if token ids can be drawn from it, beginning as the template does."""
    text = text_model(source)
    if text is None or not (text.logits and text.ids.table_rows):
        return None
    begins = template[text.ids.name].shape[1] > 1 and text.is_start(template)
    return text if begins else None


def texts_at_a_time(text: TextModel, length: int) -> int:
    """How many texts of this length have caches that take no more than CACHES bytes."""
    return max(1, CACHES // max(1, text.cache_bytes * length))


def _value(
    source: Model, wanted: Input, like: tuple[int, ...], batch: int, rng: np.random.Generator
) -> npt.NDArray[Any]:
    shape = tuple(batch if d == BATCH else n for d, n in zip(wanted.dims, like, strict=True))
    if is_state(source, wanted):
        return np.zeros(shape, wanted.dtype)
    if np.issubdtype(wanted.dtype, np.floating) and "mask" not in wanted.name.lower():
        mean, deviation = input_range(source, wanted.name)
        return (mean + deviation * _field(shape, rng)).astype(wanted.dtype)
    if wanted.dtype == np.uint8 and len(shape) >= 3:
        return np.clip(128 + 50 * _field(shape, rng), 0, 255).astype(np.uint8)
    return values(wanted, shape, max(like, default=1), rng)


def is_state(source: Model, wanted: Input) -> bool:
    """Whether an output becomes this input in the next call, judging by name and shape."""
    name = wanted.name.lower()
    if not (any(word in name for word in STATES) or name.endswith("state")):
        return False
    for value in source.proto.graph.output:
        dims = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        pairs = zip(dims, wanted.dims, strict=False)
        if len(dims) == len(wanted.dims) and all(
            isinstance(wanted_size, str) or size in (0, wanted_size) for size, wanted_size in pairs
        ):
            return True
    return False


def _field(shape: tuple[int, ...], rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """Patches with more or less texture, or white noise: mean 0, variance 1 per sample.

    Noise is for samples that are vectors, in which neighbours need not be alike.
    """
    spatial = [a for a in range(1, len(shape)) if shape[a] > max(CHANNELS)]
    if not spatial or len(shape) == 2:
        return rng.standard_normal(shape)
    return _standardized(
        _patches(shape, spatial, rng) + rng.random() * _texture(shape, spatial, rng)
    )


def _standardized(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The samples, shifted and scaled to mean 0 and variance 1 each."""
    rest = tuple(range(1, x.ndim))
    x = x - x.mean(axis=rest, keepdims=True)
    return np.asarray(x / np.maximum(x.std(axis=rest, keepdims=True), 1e-12))


def _patches(
    shape: tuple[int, ...], spatial: list[int], rng: np.random.Generator
) -> npt.NDArray[np.float64]:
    """Boxes of log-uniform sizes, each with one Gaussian value per channel.

    spatial: the axes along which they extend.
    """
    field = np.zeros(shape)
    values = [1 if axis in spatial else shape[axis] for axis in range(1, len(shape))]
    for sample in field:
        for _ in range(PATCHES):
            box = [slice(None)] * sample.ndim
            for axis in spatial:
                size = max(1, int(shape[axis] ** rng.random()))
                start = int(rng.integers(1 - size, shape[axis]))
                box[axis - 1] = slice(max(start, 0), start + size)
            sample[tuple(box)] = rng.standard_normal(values)
    return _standardized(field)


def _texture(
    shape: tuple[int, ...], spatial: list[int], rng: np.random.Generator
) -> npt.NDArray[np.float64]:
    """A Gaussian field, as smooth as a random exponent makes it."""
    frequencies = np.meshgrid(
        *(np.fft.fftfreq(shape[a]) * shape[a] for a in spatial), indexing="ij"
    )
    distance = np.sqrt(sum(f**2 for f in frequencies))
    amplitude = (1 + distance) ** -rng.uniform(0, MAX_TEXTURE_EXPONENT)
    widened = amplitude.reshape([shape[a] if a in spatial else 1 for a in range(len(shape))])
    noise = np.fft.fftn(rng.standard_normal(shape), axes=spatial)
    return _standardized(np.fft.ifftn(noise * widened, axes=spatial).real)


def input_range(source: Model, name: str) -> tuple[float, float]:
    """Mean and standard deviation that the graph expects of a float input.

    A batch normalization that reads the input has them as constants; a chain of sums and products
    with constants is taken to normalize it to mean 0 and variance 1. Without either: 0 and 1.
    """
    constants = {tensor.name: tensor for tensor in source.proto.graph.initializer}
    for node in source.proto.graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            constants[node.output[0]] = node.attribute[0].t
    gain, shift = 1.0, 0.0  # the value followed is gain * input + shift
    for node in _chain(source.proto, name):
        if node.op_type == "BatchNormalization":
            mean, variance = (float(np.mean(source.array(constants[n]))) for n in node.input[3:5])
            return _inverted(gain, shift, mean, variance**0.5)
        if node.op_type not in _AFFINE:
            continue
        other = next((n for n in node.input if n in constants), None)
        if other is None:
            break
        factor = float(np.mean(source.array(constants[other])))
        flipped = other == node.input[0]
        if node.op_type == "Mul" or (node.op_type == "Div" and not flipped):
            factor = factor if node.op_type == "Mul" else 1 / factor if factor else 0.0
            gain, shift = gain * factor, shift * factor
        elif node.op_type in ("Add", "Sub"):
            shift += factor if node.op_type == "Add" else -factor
    return _inverted(gain, shift, 0.0, 1.0)


def _inverted(gain: float, shift: float, mean: float, deviation: float) -> tuple[float, float]:
    """Mean and deviation of x if gain * x + shift has those given; 0 and 1 if it has none."""
    if not np.isfinite([gain, shift]).all() or gain == 0 or not deviation > 0:
        return 0.0, 1.0
    return (mean - shift) / gain, deviation / abs(gain)


def _chain(proto: ModelProto, name: str) -> Iterator[NodeProto]:
    """The nodes that read the value in turn, as long as each value has a single reader."""
    readers = node_readers(proto.graph.node)
    while len(readers[name]) == 1:
        node = readers[name][0]
        if node.op_type not in (*_AFFINE, *_VALUE_KEEPING, "BatchNormalization"):
            return
        yield node
        name = node.output[0]


def sampling_rounds(source: Model, template: Feed, runner: Runner) -> tuple[float, int]:
    """What drawing the token ids of decoders takes; 0 for other models.

    Returns
    -------
    As long as how many runs it takes for each sample, and how often a model in pieces is loaded.
    """
    text = decoder(source, template)
    if text is None:
        return 0, 0
    length = int(template[text.ids.name].shape[1])
    if text.goes_on and runner.whole:
        return ONE_BY_ONE, 0
    size = _text_length(length)
    loads = 0 if runner.whole else size - 1
    if _texts(text, runner):
        return 1, loads
    if text.table is not None:
        return 0, 0
    if isinstance(text.ids.dims[1], str):
        return size / 2, loads
    rounds = min(SAMPLING_ROUNDS, length)
    return rounds, 0 if runner.whole else rounds


def _texts(text: TextModel, runner: Runner) -> Texts | None:
    """Texts for a decoder in pieces that goes on from its caches."""
    if not (isinstance(runner, Pieces) and text.goes_on and text.logits) or runner.whole:
        return None
    names = (cache.name for cache in text.past)
    return runner.texts(dict(zip(text.present, names, strict=True)), text.logits)


def _one_by_one(
    text: TextModel,
    runner: Runner,
    template: Feed,
    count: int,
    batch: int,
    rng: np.random.Generator,
    progress: Progress,
) -> list[Feed]:
    """So many feeds of a decoder, each token id sampled from the logits that those before it give.

    Samples are drawn together, as many as CACHES allows, if the model takes more than one.
    Raises RunError when the model does not go on from what it returned.
    """
    name, vocabulary = text.ids.name, text.ids.table_rows
    assert text.logits
    assert vocabulary
    rows, length = template[name].shape[:2]
    rows = batch if text.ids.dims[0] == BATCH else rows
    together = texts_at_a_time(text, length) // rows if batch > 1 else 1
    groups = np.array_split(np.arange(count), -(-count // max(together, 1)))
    caches = (cache.name for cache in text.past)
    successors = dict(zip(text.present, caches, strict=True))
    advance = meter(progress, "sampling token ids", len(groups) * (length - 1))
    feeds: list[Feed] = []
    for group in groups:
        shape = len(group) * rows, length
        tokens = text.drawn(shape, rng)
        chances = rng.random((*shape, 1), dtype=np.float32)
        past: Feed = {}  # of the right lengths alone: the caches stay where the model runs
        for place in range(length - 1):
            feed = text.filled({name: tokens[:, place : place + 1]} | past)
            given = {n: values for n, values in feed.items() if n not in past}
            (logits,) = runner.go_on([text.logits], given, successors)
            logits = _logits(text, feed, {text.logits: logits})
            tokens[:, place + 1] = _drawn(logits[:, 0], chances[:, place + 1])
            past = text.past_of(len(tokens), place + 1)
            advance(1)
        feeds += [text.filled({name: part}) for part in np.split(tokens, len(group))]
    return feeds


def _text_length(length: int) -> int:
    """How long the texts are that fill a sample of this length: all alike, up to TEXT tokens."""
    return -(-length // -(-length // TEXT))


def _growing(
    text: TextModel,
    runner: Runner,
    feeds: Sequence[Feed],
    rng: np.random.Generator,
    progress: Progress,
) -> list[Feed]:
    """The feeds with texts, one after the other, each token sampled after all before it.

    Raises RunError when the model does not run on texts of every length.
    """
    name = text.ids.name
    length = feeds[0][name].shape[1]
    size = _text_length(length)
    texts = [feed[name][:, i : i + size].copy() for feed in feeds for i in range(0, length, size)]
    others = [
        {n: values for n, values in feed.items() if n not in text.determined}
        for feed in feeds
        for _ in range(0, length, size)
    ]
    advance = meter(progress, "sampling token ids", len(texts) * (size - 1))
    for place in range(1, size):
        begun = [text.filled(o | {name: t[:, :place]}) for o, t in zip(others, texts, strict=True)]
        for tokens, logits in zip(texts, _all_logits(text, runner, begun), strict=True):
            if place < tokens.shape[1]:
                chances = rng.random((len(tokens), 1), dtype=np.float32)
                tokens[:, place] = _drawn(logits[:, -1], chances)
            advance(1)
    parts = len(texts) // len(feeds)
    joined = (np.concatenate(texts[i : i + parts], 1) for i in range(0, len(texts), parts))
    return [feed | {name: tokens} for feed, tokens in zip(feeds, joined, strict=True)]


def _going_on(
    text: TextModel,
    runner: Texts,
    feeds: Sequence[Feed],
    batch: int,
    rng: np.random.Generator,
    progress: Progress,
) -> list[Feed]:
    """As `_growing`, but each token is run once, with the caches of those before it.

    As many texts as CACHES and LOGITS allow are drawn together if the model takes more than one.
    Raises RunError when the model does not go on from what it returned.
    """
    name, vocabulary = text.ids.name, text.ids.table_rows
    assert vocabulary
    rows, length = feeds[0][name].shape[:2]
    size = _text_length(length)
    parts = -(-length // size)
    together = min(texts_at_a_time(text, size), LOGITS // vocabulary) // rows
    count = len(feeds) * parts
    groups = -(-count // max(together, 1)) if batch > 1 else count
    shapes = [(len(group) * rows, size) for group in np.array_split(np.arange(count), groups)]
    texts = [text.drawn(shape, rng) for shape in shapes]
    chances = [rng.random((*shape, 1), dtype=np.float32) for shape in shapes]
    advance = meter(progress, "sampling token ids", groups * (size - 1))
    for place in range(size - 1):
        begun = [
            text.filled(text.past_of(len(t), place) | {name: t[:, place : place + 1]})
            for t in texts
        ]
        for tokens, chance, logits in zip(
            texts, chances, _all_logits(text, runner, begun), strict=True
        ):
            tokens[:, place + 1] = _drawn(logits[:, 0], chance[:, place + 1])
            advance(1)
    joined = np.concatenate(texts).reshape(-1, parts * size)[:, :length]
    return [text.filled({name: part}) for part in np.split(joined, len(feeds))]


def _in_rounds(
    text: TextModel,
    runner: Runner,
    feeds: Sequence[Feed],
    rng: np.random.Generator,
    progress: Progress,
) -> list[Feed]:
    """The feeds with token ids sampled from the decoder's own logits.

    Every round draws all positions at once, each from the logits that the model computes from the
    positions before it as the last round left them. A position gets the same random number in all
    rounds, so position t is an exact sample from round t on.

    Raises RunError when the model returns no logits.
    """
    name = text.ids.name
    feeds = list(feeds)
    shape = feeds[0][name].shape
    chances = [rng.random((*shape, 1), dtype=np.float32)[:, 1:] for _ in feeds]
    rounds = min(SAMPLING_ROUNDS, shape[1])
    advance = meter(progress, "sampling token ids", len(feeds) * rounds)
    for _ in range(rounds):
        for i, logits in enumerate(_all_logits(text, runner, feeds)):
            tokens = feeds[i][name].copy()
            tokens[:, 1:] = _drawn(logits[:, :-1], chances[i])
            feeds[i] = feeds[i] | {name: tokens}
            advance(1)
    return feeds


def _all_logits(
    text: TextModel, runner: Runs, feeds: Sequence[Feed]
) -> Iterator[npt.NDArray[np.float32]]:
    """As `_logits`, for one feed after the other."""
    assert text.logits
    for feed, found in zip(feeds, runner.run_all([text.logits], feeds), strict=True):
        yield _logits(text, feed, found)


def _logits(
    text: TextModel, feed: Feed, found: dict[str, npt.NDArray[Any]]
) -> npt.NDArray[np.float32]:
    """Of what was found for a feed, the logits [batch, length, vocabulary].

    Raises RunError if they have another shape.
    """
    assert text.logits
    logits = found[text.logits]
    if logits.shape != (*feed[text.ids.name].shape[:2], text.ids.table_rows):
        raise RunError("its logits have the shape {found}", found=logits.shape)
    return logits.astype(np.float32, copy=False)


def _drawn(
    logits: npt.NDArray[np.float32], chances: npt.NDArray[np.float32]
) -> npt.NDArray[np.int64]:
    """Ids from the distributions that the logits stand for, one for each number in [0, 1)."""
    logits -= logits.max(axis=-1, keepdims=True)
    sums = np.cumsum(np.exp(logits, out=logits), axis=-1, out=logits)
    drawn: npt.NDArray[np.int64] = np.sum(sums < chances * sums[..., -1:], axis=-1)
    return drawn
