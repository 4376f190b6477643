"""Inputs for statistics of activations, made up so that they resemble real ones.

Token ids of a decoder are sampled from the decoder itself: for a sound model that is what it was
trained on. Other ids are drawn uniformly. Images and sequences are patches that cover each other
("dead leaves", which have the edges and the spectrum of natural images) under a texture whose
amplitude falls with frequency, in the range that the graph suggests; vectors are white noise in
that range. The state of a streaming model is zero, as at a stream's start: noise in
its place is nothing that the model ever meets. The rest is as in `feeds`.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, NodeProto

from ..io.model import Model
from .inputs import BATCH, Feed, Input, node_readers, signature, values

ROUNDS = 16  # of sampling from a decoder

PATCHES = 60  # in one sample

STEEPEST = 1.5  # exponent of the fall of a field's amplitude with frequency

CHANNELS = (1, 3, 4)  # sizes of an axis that is not a place in an image

STATES = ("cache", "past")

_AFFINE = ("Sub", "Add", "Mul", "Div")

_PASSED_ON = ("Cast", "Identity", "Transpose", "Unsqueeze", "Reshape")


def synthetic_feeds(
    source: Model, session: Any, template: Feed, samples: int, batch: int, seed: int
) -> list[Feed]:
    """Feeds of `batch` samples each, `samples` in all, in the shapes of one that the model accepts.

    session: the float model in onnxruntime, from which a decoder's token ids are sampled.
    """
    rng = np.random.default_rng(seed)
    inputs = signature(source.proto)
    if not any(BATCH in wanted.dims for wanted in inputs):
        batch = 1  # whatever is asked for, a feed holds one sample
    feeds = []
    for _ in range(-(-samples // batch)):
        feed = {i.name: _value(source, i, template[i.name].shape, batch, rng) for i in inputs}
        feeds.append(_from_the_model(source, session, feed, inputs, rng))
    return feeds


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
    """Whether the input is what an output hands on to the next call, by its name and shape."""
    name = wanted.name.lower()
    if not (any(word in name for word in STATES) or name.endswith("state")):
        return False
    for value in source.proto.graph.output:
        dims = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        pairs = zip(dims, wanted.dims, strict=False)
        if len(dims) == len(wanted.dims) and all(
            isinstance(mine, str) or theirs in (0, mine) for theirs, mine in pairs
        ):
            return True
    return False


def _field(shape: tuple[int, ...], rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """Patches with more or less texture: mean 0, variance 1 per sample.

    Of a plain vector per sample nobody knows which entries are neighbours: white noise.
    """
    places = [a for a in range(1, len(shape)) if shape[a] > max(CHANNELS)]
    if not places or len(shape) == 2:
        return rng.standard_normal(shape)
    return _standardized(_patches(shape, places, rng) + rng.random() * _texture(shape, places, rng))


def _standardized(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Mean 0, variance 1 per sample."""
    rest = tuple(range(1, x.ndim))
    x = x - x.mean(axis=rest, keepdims=True)
    return np.asarray(x / np.maximum(x.std(axis=rest, keepdims=True), 1e-12))


def _patches(
    shape: tuple[int, ...], places: list[int], rng: np.random.Generator
) -> npt.NDArray[np.float64]:
    """Boxes of all sizes, equally many in every octave, each of one Gaussian value per channel."""
    field = np.zeros(shape)
    values = [1 if axis in places else shape[axis] for axis in range(1, len(shape))]
    for sample in field:
        for _ in range(PATCHES):
            box = [slice(None)] * sample.ndim
            for axis in places:
                size = max(1, int(shape[axis] ** rng.random()))
                start = int(rng.integers(1 - size, shape[axis]))
                box[axis - 1] = slice(max(start, 0), start + size)
            sample[tuple(box)] = rng.standard_normal(values)
    return _standardized(field)


def _texture(
    shape: tuple[int, ...], places: list[int], rng: np.random.Generator
) -> npt.NDArray[np.float64]:
    """A Gaussian field, smoother or rougher from call to call."""
    frequencies = np.meshgrid(*(np.fft.fftfreq(shape[a]) * shape[a] for a in places), indexing="ij")
    distance = np.sqrt(sum(f**2 for f in frequencies))
    amplitude = (1 + distance) ** -rng.uniform(0, STEEPEST)
    widened = amplitude.reshape([shape[a] if a in places else 1 for a in range(len(shape))])
    noise = np.fft.fftn(rng.standard_normal(shape), axes=places)
    return _standardized(np.fft.ifftn(noise * widened, axes=places).real)


def input_range(source: Model, name: str) -> tuple[float, float]:
    """Mean and standard deviation that the graph expects of a float input.

    A batch normalization that reads the input names them; a chain of sums and products with
    constants is taken to normalize it to mean 0 and variance 1. Without either: 0 and 1.
    """
    constants = {tensor.name: tensor for tensor in source.proto.graph.initializer}
    for node in source.proto.graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            constants[node.output[0]] = node.attribute[0].t
    gain, shift = 1.0, 0.0  # the value followed is gain * input + shift
    for node in _chain(source.proto, name):
        if node.op_type == "BatchNormalization":
            mean, variance = (float(np.mean(source.array(constants[n]))) for n in node.input[3:5])
            return _undone(gain, shift, mean, variance**0.5)
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
    return _undone(gain, shift, 0.0, 1.0)


def _undone(gain: float, shift: float, mean: float, deviation: float) -> tuple[float, float]:
    """Mean and deviation of x where gain * x + shift has these; 0 and 1 if there are none."""
    if not np.isfinite([gain, shift]).all() or gain == 0 or not deviation > 0:
        return 0.0, 1.0
    return (mean - shift) / gain, deviation / abs(gain)


def _chain(proto: ModelProto, name: str) -> Iterator[NodeProto]:
    """The nodes that read the value one after the other, as long as each has one reader."""
    readers = node_readers(proto)
    while len(readers[name]) == 1:
        node = readers[name][0]
        if node.op_type not in (*_AFFINE, *_PASSED_ON, "BatchNormalization"):
            return
        yield node
        name = node.output[0]


def _from_the_model(
    source: Model, session: Any, feed: Feed, inputs: list[Input], rng: np.random.Generator
) -> Feed:
    """The feed with token ids sampled from the model's own logits, if it is a decoder.

    All places are drawn in every round from what the model makes of the places before them in the
    round before, with one noise throughout; so place t is an exact sample from round t on.
    """
    ids = [i for i in inputs if i.table and feed[i.name].ndim == 2 and feed[i.name].shape[1] > 1]
    outputs = [value.name for value in source.proto.graph.output]
    if len(ids) != 1:
        return feed
    name, shape = ids[0].name, (*feed[ids[0].name].shape, ids[0].table)
    results = zip(outputs, session.run(outputs, feed), strict=True)
    output, logits = next((r for r in results if np.shape(r[1]) == shape), (None, None))
    if logits is None:
        return feed
    noise = rng.gumbel(size=logits[:, :-1].shape).astype(np.float32)
    for _ in range(min(ROUNDS, feed[name].shape[1])):
        tokens = feed[name].copy()
        tokens[:, 1:] = np.argmax(logits[:, :-1] + noise, axis=-1)
        feed = feed | {name: tokens}
        logits = session.run([output], feed)[0]
    return feed
