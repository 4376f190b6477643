"""Models of text: what their other inputs get where the token ids are known.

The inputs are told apart by their names, types and axes, as optimum, onnxruntime-genai and
transformers.js lay them out:

    input_ids             [batch, length]
    inputs_embeds         [batch, length, width] instead: rows of a table, see `embeddings`
    attention_mask        [batch, past + length]: ones
    position_ids          [batch, length]: how many tokens of the mask come before each; some
                          models want that three times, [3, batch, length]
    token_type_ids        [batch, length]: zeros
    past_key_values.*     [batch, heads, past, size]: what the model returned as `present.*` for
                          the tokens before; empty at the start
    use_cache_branch      whether there is a past, where two graphs were merged
    num_logits_to_keep    0: all
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import ModelProto

from ..errors import ModelError
from .inputs import BATCH, MADE_UP_LIMIT, Feed, Input, node_readers, signature

Array = npt.NDArray[Any]

STATES = ("cache", "past")  # in the names of inputs that hold a state

_ONE_TOKEN = np.ones((1, 1), np.int64)


@dataclass(frozen=True)
class TextModel:
    """A model that takes token ids, or the rows that they pick of a table.

    Parameters
    ----------
    inputs : all of its inputs
    ids : the one with the token ids; where it takes rows of a table, as if it took the ids
    past : those with caches
    present : for each cache the output that takes its place in the next call; empty unless all
        have one
    logits : the output from which the next token can be drawn
    table : embeddings [vocabulary, width], where rows of them are what the model takes
    """

    inputs: tuple[Input, ...]
    ids: Input
    past: tuple[Input, ...]
    present: tuple[str, ...]
    logits: str | None
    table: Array | None = None

    @classmethod
    def of(cls, proto: ModelProto) -> "TextModel | None":
        """What the signature of a model says; None where no input, or several, take token ids.

        Raises UnsupportedModelError for an input that is no tensor of numbers.
        """
        inputs = signature(proto)
        sequences = [i for i in inputs if i.dtype.kind in "iu" and len(i.dims) == 2]
        named = [i for i in sequences if "input_ids" in i.name.lower()]
        indexing = [i for i in sequences if i.table_rows and _values(i, _ONE_TOKEN, 1) is None]
        candidates = named or indexing
        return cls._taking(proto, inputs, candidates[0]) if len(candidates) == 1 else None

    @classmethod
    def of_embeddings(
        cls, proto: ModelProto, inputs: Sequence[Input], taken: Input, table: Array
    ) -> "TextModel | None":
        """The same of a model that takes rows of a table [vocabulary, width] at one of its inputs.

        inputs: its signature
        """
        dims, int64 = taken.dims[:2], np.dtype(np.int64)
        ids = replace(taken, dtype=int64, dims=dims, table_rows=len(table))
        text = cls._taking(proto, inputs, ids)
        return text and replace(text, table=table)

    @classmethod
    def _taking(cls, proto: ModelProto, signed: Sequence[Input], ids: Input) -> "TextModel | None":
        inputs = tuple(_with_size(proto, i) if _is_cache(i) else i for i in signed)
        past = tuple(filter(_is_cache, inputs))
        outputs = {value.name for value in proto.graph.output}
        present = tuple(n for cache in past for n in _successors(cache.name) if n in outputs)
        complete = len(present) == len(past)
        text = cls(inputs, ids, past, present if complete else (), logits_of(proto, ids))
        return text if text.cache_bytes <= MADE_UP_LIMIT else None

    @property
    def determined(self) -> frozenset[str]:
        """The names of the inputs whose values follow from the token ids."""
        others = (i for i in self.inputs if i.name != self.ids.name)
        return frozenset(i.name for i in others if _values(i, _ONE_TOKEN, 1) is not None)

    @property
    def cache_flag(self) -> str | None:
        """The name of the input that says whether there is a past."""
        return next((i.name for i in self.inputs if _is_flag(i)), None)

    @property
    def goes_on(self) -> bool:
        """Whether tokens can be drawn one after the other, each with the caches of those before."""
        alone = len(self.determined) == len(self.inputs) - 1
        one_by_one = self.ids.dims[1] == 1 or isinstance(self.ids.dims[1], str)
        grows = any(_length_axis(cache) for cache in self.past)
        draws = bool(self.logits and self.ids.table_rows)
        return alone and one_by_one and grows and draws and bool(self.present)

    @property
    def cache_bytes(self) -> int:
        """Bytes of the caches for one token of one sample."""
        return sum(
            cache.dtype.itemsize * prod(n for n in cache.dims if isinstance(n, int))
            for cache in self.past
        )

    def is_start(self, feed: Feed) -> bool:
        """Whether the caches are empty, as at the start of a text."""
        return not any(feed[cache.name].any() for cache in self.past)

    def filled(self, given: Feed) -> Feed:
        """What is given, and what goes with it: masks, positions, empty caches.

        Parameters
        ----------
        given : token ids [batch, length], also for a model that takes rows of a table, or these
            rows; the caches of the tokens before if there are any; and whatever else is known

        Returns
        -------
        A feed without those inputs only that do not follow from token ids.
        """
        batch, length = given[self.ids.name].shape[:2]
        sizes = [
            given[cache.name].shape[axis]
            for cache in self.past
            if cache.name in given and (axis := _length_axis(cache))
        ]
        ones = np.ones((batch, max(sizes, default=0) + length), np.int64)
        mask = next((given[i.name] for i in self.inputs if _is_mask(i) and i.name in given), ones)
        feed = {}
        for wanted in self.inputs:
            values = given.get(wanted.name)
            if values is None:
                values = _values(wanted, mask, length)
            elif wanted.name == self.ids.name and self.table is not None and values.ndim == 2:
                values = self.table[values]
            if values is not None:
                feed[wanted.name] = values.astype(wanted.dtype, copy=False)
        return feed

    def past_of(self, batch: int, length: int) -> Feed:
        """Zeros in place of the caches of so many tokens; they take no memory."""
        shapes = {
            cache: [
                n if isinstance(n, int) else batch if n == BATCH else length for n in cache.dims
            ]
            for cache in self.past
        }
        return {c.name: np.broadcast_to(c.dtype.type(0), dims) for c, dims in shapes.items()}

    def require_known(self, feeds: Iterable[Feed], path: Path) -> None:
        """Raise ModelError, naming the file, for token ids beyond the vocabulary."""
        rows = self.ids.table_rows
        if rows is None:
            return
        for feed in feeds:
            ids = feed[self.ids.name]
            if ids.ndim > 2:  # rows of the table
                continue
            beyond = ids[(ids < 0) | (ids >= rows)]
            if beyond.size:
                raise ModelError(
                    "input {tensor!r} gets the token id {found}",
                    path=path,
                    tensor=self.ids.name,
                    found=int(beyond[0]),
                    allowed=f"0 to {rows - 1}, the model's vocabulary",
                )

    def require_all_caches(self, feeds: Iterable[Feed], path: Path) -> None:
        """Raise ModelError, naming the file, for feeds with some of the caches and not the rest."""
        names = [cache.name for cache in self.past]
        for feed in feeds:
            missing = [name for name in names if name not in feed]
            if missing and len(missing) < len(names):
                raise ModelError(
                    "no array for input {tensor!r}, a cache; found {found}",
                    path=path,
                    tensor=missing[0],
                    found=f"{len(names) - len(missing)} of {len(names)}",
                    allowed="all of them, or none, which are empty ones",
                )

    def starting(self, candidates: Iterable[list[Feed]]) -> Iterator[list[Feed]]:
        """Made-up feeds, with masks, positions and caches as at the start of a text."""
        kept = [wanted.name for wanted in self.inputs if wanted.name not in self.determined]
        rng, tried = np.random.default_rng(0), set()
        for feeds in candidates:
            shapes = tuple(feeds[0][name].shape for name in kept)
            if shapes in tried:
                continue
            tried.add(shapes)
            starts = [{name: feed[name] for name in kept} for feed in feeds]
            if self.table is not None:
                name = self.ids.name
                starts = [s | {name: self.drawn(s[name].shape[:2], rng)} for s in starts]
            yield [self.filled(start) for start in starts]

    def drawn(self, shape: tuple[int, ...], rng: np.random.Generator) -> Array:
        """Token ids of this shape, each as likely as any."""
        assert self.ids.table_rows
        return rng.integers(0, self.ids.table_rows, shape).astype(self.ids.dtype)


def logits_of(proto: ModelProto, ids: Input) -> str | None:
    """The first output with three axes whose last one may be as long as the table of the ids."""
    for value in proto.graph.output:
        dims = value.type.tensor_type.shape.dim
        if len(dims) == 3 and dims[2].dim_value in (0, ids.table_rows):
            return value.name
    return None


def _values(wanted: Input, mask: Array, length: int) -> Array | None:
    """What an input gets beside token ids; None for one that does not follow from them.

    mask: [batch, past + length], of which the last `length` are the token ids'.
    """
    name, rank = wanted.name.lower(), len(wanted.dims)
    batch, total = mask.shape
    if _is_mask(wanted):
        return mask
    if _is_cache(wanted):
        sizes = [n if isinstance(n, int) else batch * (n == BATCH) for n in wanted.dims]
        return np.zeros(sizes)
    if _is_flag(wanted):
        return np.full([1] * rank, total > length)
    if rank <= 1 and "logits_to_keep" in name:
        return np.zeros([1] * rank)
    if "position" in name and (rank in (1, 2) or (rank == 3 and wanted.dims[0] == 3)):
        before: Array = np.maximum(np.cumsum(mask, axis=1, dtype=np.int64) - 1, 0)[
            :, total - length :
        ]
        return before[0] if rank == 1 else before if rank == 2 else np.stack([before] * 3)
    if rank == 2 and ("type" in name or "segment" in name):
        return np.zeros((batch, length))
    return None


def _is_mask(wanted: Input) -> bool:
    """Whether it says which of the tokens count; not those of the encoder before a decoder."""
    name = wanted.name.lower()
    return "mask" in name and "encoder" not in name and len(wanted.dims) == 2


def _is_flag(wanted: Input) -> bool:
    return len(wanted.dims) <= 1 and "use_cache" in wanted.name.lower()


def _is_cache(wanted: Input) -> bool:
    named = any(word in wanted.name.lower() for word in STATES)
    return named and wanted.dtype.kind not in "biu" and len(wanted.dims) > 1


def _length_axis(cache: Input) -> int:
    """The axis of a cache that is as long as the tokens before are many; 0 if there is none."""
    return next((a for a, n in enumerate(cache.dims) if isinstance(n, str) and n != BATCH), 0)


def _successors(name: str) -> set[str]:
    """The names that the output may have that becomes a cache in the next call."""
    return {name.replace("past_key_values", "present"), name.replace("past", "present")}


def _with_size(proto: ModelProto, cache: Input) -> Input:
    """The cache with the size of its last axis, which onnxruntime-genai leaves open.

    GroupQueryAttention (com.microsoft) reads query, key, value and then the two caches; where it
    has no key, the query holds all three.
    """
    if not isinstance(cache.dims[-1], str):
        return cache
    widths = {
        value.name: value.type.tensor_type.shape.dim[-1].dim_value
        for value in proto.graph.value_info
        if value.type.tensor_type.shape.dim
    }
    for node in node_readers(proto.graph.node)[cache.name]:
        if node.op_type == "GroupQueryAttention" and len(node.input) > 1:
            counts = {a.name: a.i for a in node.attribute}
            query, key = node.input[:2]
            heads = counts.get("kv_num_heads", 0)
            heads += 0 if key else heads + counts.get("num_heads", 0)
            size = widths.get(key or query, 0) // max(heads, 1)
            if size > 0:
                return replace(cache, dims=(*cache.dims[:-1], size))
    return cache
