"""A model in pieces that run one after the other, so that a large one is never whole in memory.

A piece is a stretch of the main graph's nodes, which stand in an order in which they can be
computed. What later pieces read is kept on disk from one piece to the next, for all feeds, so that
every piece is loaded once per pass. A model that fits into memory is a single piece.
"""

import math
import sys
import time
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any

import numpy.typing as npt
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper

from ..graph.traversal import subgraphs
from ..io import kept
from ..io.model import Model
from ..io.writer import Output
from ..runtime.session import Session, open_session
from .inputs import Feed

Array = npt.NDArray[Any]

SHARE = 4  # a piece may have one in so many of the bytes that are allowed: a session needs copies


@dataclass(frozen=True)
class Piece:
    """One stretch of nodes.

    Attributes
    ----------
    nodes : their positions in the main graph, those of the constants that they read first
    initializers : names of those that they read
    reads : names of the graph's inputs and of the values from earlier pieces that they read
    returns : names of the values made here that somebody wants
    passes_on : names of the values, made here or before, that later pieces need
    size : bytes of the weights
    """

    nodes: tuple[int, ...]
    initializers: frozenset[str]
    reads: tuple[str, ...]
    returns: tuple[str, ...]
    passes_on: tuple[str, ...]
    size: int


class Pieces:
    """A model that runs piece by piece.

    Parameters
    ----------
    source : the model
    wanted : names of values of the main graph that `Stream.run` can return, besides its outputs;
        those of a group can be returned together
    folder : new, for the pieces and for what passes between them
    max_bytes : a model of up to this size is a single piece

    Attributes
    ----------
    count : how many there are
    loading : seconds that loading them has taken so far
    """

    def __init__(
        self, source: Model, wanted: Iterable[Sequence[str]], folder: Path, max_bytes: int
    ) -> None:
        self._source = source
        self._folder = folder
        self._inputs = {value.name: value for value in source.proto.graph.input}
        outputs = [value.name for value in source.proto.graph.output]
        limit = max_bytes // SHARE if source.size > max_bytes else sys.maxsize
        self._pieces = _cut(source.proto, [*map(tuple, wanted), *((n,) for n in outputs)], limit)
        self._made_by = {n: i for i, piece in enumerate(self._pieces) for n in piece.returns}
        self._files: dict[int, Path] = {}
        self._open: tuple[int, Session] | None = None
        self.loading = 0.0
        folder.mkdir(parents=True)

    @property
    def count(self) -> int:
        """How many pieces there are."""
        return len(self._pieces)

    @property
    def whole(self) -> bool:
        """Whether there is only one, so that it stays loaded."""
        return self.count == 1

    def number_of(self, names: Iterable[str]) -> int:
        """The first piece after which all of these values are known."""
        return max((self._made_by.get(name, 0) for name in names), default=0)

    def stream(self, feeds: Sequence[Feed]) -> "Stream":
        """Feeds to run the model on."""
        return Stream(self, feeds, self._folder)

    def run_all(self, names: Sequence[str], feeds: Sequence[Feed]) -> Iterator[dict[str, Array]]:
        """As `Stream.run`, once."""
        return self.stream(feeds).run(names)

    def go_on(self, names: list[str], feed: Feed, successors: dict[str, str]) -> list[Array]:
        """As `Session.go_on`, of a model in one piece."""
        given = {name: feed[name] for name in self._pieces[0].reads if name in feed}
        return self._session(0, feed).go_on(names, given, successors)

    def texts(self, caches: Mapping[str, str], logits: str) -> "Texts | None":
        """Texts to run a decoder on, token by token; None if it does not take its caches back.

        Parameters
        ----------
        caches : for each output that is a cache, the input that takes it with the next token
        logits : the output that will be asked for
        """
        read = {name for piece in self._pieces for name in piece.reads}
        if self.number_of(caches) > self.number_of([logits]) or not read.issuperset(
            caches.values()
        ):
            return None
        return Texts(self, caches, self._folder)

    def piece(self, number: int) -> Piece:
        """One of the pieces, from 0."""
        return self._pieces[number]

    def run(self, number: int, given: Feed, names: Sequence[str]) -> dict[str, Array]:
        """Values of one piece, by name.

        Parameters
        ----------
        number : of the piece
        given : the feed, and what earlier pieces passed on
        names : of values that are given or made by this piece
        """
        piece = self._pieces[number]
        made = [name for name in dict.fromkeys(names) if name not in given]
        if not (made or piece.returns or piece.passes_on):  # nobody wants what it computes
            return {name: given[name] for name in names}
        session = self._session(number, given)
        feed = {name: given[name] for name in piece.reads}
        values = session.run(made or session.outputs[:1], feed)
        known = given | dict(zip(made, values, strict=False))
        return {name: known[name] for name in names}

    def _session(self, number: int, given: Feed) -> Session:
        if self._open is None or self._open[0] != number:
            self._open = None  # before the next one is loaded
            started = time.perf_counter()
            piece = self._pieces[number]
            path = self._files.get(number) or self._write(number, piece, given)
            self._files[number] = path
            self._open = number, open_session(path, exact=True, size=max(piece.size, 1))
            self.loading += time.perf_counter() - started
        return self._open[1]

    def _write(self, number: int, piece: Piece, given: Feed) -> Path:
        """The piece as a model of its own; values from earlier pieces are inputs of their type."""
        source = self._source.proto
        proto = ModelProto()
        proto.CopyFrom(source)
        graph = proto.graph
        known = {value.name for value in (*graph.output, *graph.input)}
        del graph.node[:], graph.input[:], graph.initializer[:]
        graph.node.extend(source.graph.node[i] for i in piece.nodes)
        tensors = [t for t in source.graph.initializer if t.name in piece.initializers]
        graph.initializer.extend(tensors)
        for name in piece.reads:
            elem_type = helper.np_dtype_to_tensor_dtype(given[name].dtype)
            passed = helper.make_tensor_value_info(name, elem_type, None)
            graph.input.append(self._inputs.get(name, passed))
        graph.input.extend(self._inputs[t.name] for t in tensors if t.name in self._inputs)
        returned = dict.fromkeys((*piece.returns, *piece.passes_on))
        made = [name for name in returned if name not in given]
        kept = [value for value in graph.output if value.name in made]
        del graph.output[:]
        graph.output.extend(kept)
        graph.output.extend(ValueInfoProto(name=name) for name in made if name not in known)
        folder = self._folder / f"piece{number}"
        output = Output(folder, folder / "piece.onnx", external=True)
        output.save(proto, self._source)
        return output.path


class Stream:
    """Feeds on their way through the pieces.

    Each piece keeps what it passes on until the one after the next begins; asking for values of
    earlier pieces starts again from the feeds.

    caches: by the names of outputs, those of the inputs that take them later; before: those of the
    feeds; after: what the outputs were, by number of the feed and name of the input.
    """

    def __init__(
        self,
        pieces: Pieces,
        feeds: Sequence[Feed],
        folder: Path,
        caches: Mapping[str, str] = MappingProxyType({}),
        before: "_Passed | None" = None,
    ) -> None:
        self._pieces = pieces
        self._feeds = feeds
        self._folder = folder
        self._passed: dict[int, _Passed] = {}  # by the piece that reads it
        self._caches = caches
        self._before = before
        self.after = _Passed(folder)

    def __len__(self) -> int:
        return len(self._feeds)

    def run(self, names: Sequence[str]) -> Iterator[dict[str, Array]]:
        """These values for one feed after the other.

        Parameters
        ----------
        names : those of a group, or one output

        Raises
        ------
        RunError, ValidationError : as `Session.run`
        """
        last = self._pieces.number_of(names)
        first = max((n for n in self._passed if n <= last), default=0)
        for number in range(first, last):
            for _ in self._pass(number, ()):
                pass
        yield from self._pass(last, names)

    def _pass(self, number: int, names: Sequence[str]) -> Iterator[dict[str, Array]]:
        """Run one piece on all feeds, and keep what it passes on unless that is there already."""
        piece = self._pieces.piece(number)
        keeps = number + 1 < self._pieces.count and number + 1 not in self._passed
        passes_on = piece.passes_on if keeps else ()
        cached = [name for name in piece.returns if name in self._caches]
        passed = self._passed.get(number)
        kept = _Passed(self._folder) if keeps else None
        for i, feed in enumerate(self._feeds):
            given = self._cached(i, piece, feed | passed.load(i) if passed else feed)
            values = self._pieces.run(number, given, [*names, *passes_on, *cached])
            for name in cached:
                self.after.store((i, self._caches[name]), {self._caches[name]: values[name]})
            if kept:
                kept.store(i, {name: values[name] for name in passes_on})
            yield {name: values[name] for name in names}
        if kept:
            self._passed = {n: p for n, p in self._passed.items() if n >= number}
            self._passed[number + 1] = kept

    def _cached(self, number: int, piece: Piece, given: Feed) -> Feed:
        """What is given to feed `number`, with those of its caches that the piece reads."""
        if self._before is None:
            return given
        names = set(piece.reads).intersection(self._caches.values())
        return given | {name: self._before.load((number, name))[name] for name in names}


class Texts:
    """Texts of a decoder in pieces, on each of which it goes on from where it stopped.

    whole: it is in memory, never
    """

    whole = False

    def __init__(self, pieces: Pieces, caches: Mapping[str, str], folder: Path) -> None:
        self._pieces = pieces
        self._caches = caches
        self._folder = folder
        self._before: _Passed | None = None

    def run_all(self, names: Sequence[str], feeds: Sequence[Feed]) -> Iterator[dict[str, Array]]:
        """As `Pieces.run_all`, for the next tokens of the same texts.

        The caches in the feeds are taken as they are the first time only; later only their shapes
        count.
        """
        stream = Stream(self._pieces, feeds, self._folder, self._caches, self._before)
        yield from stream.run(names)
        self._before = stream.after


class _Passed:
    """What passes from one run to a later one, in a folder that goes with it."""

    def __init__(self, folder: Path) -> None:
        self._folder = TemporaryDirectory(dir=folder)
        self._files: dict[Hashable, Path] = {}

    def store(self, key: Hashable, values: dict[str, Array]) -> None:
        """Keep the values for a feed."""
        file = self._files.setdefault(key, Path(self._folder.name) / str(len(self._files)))
        kept.store(file, values)

    def load(self, key: Hashable) -> dict[str, Array]:
        """What was stored for a feed."""
        values = kept.load(self._files[key])
        assert values is not None
        return values


def _cut(proto: ModelProto, wanted: Sequence[Sequence[str]], limit: int) -> list[Piece]:
    """Pieces of up to `limit` bytes of weights, or with a single node that reads more."""
    graph = proto.graph
    constants = {
        name: position
        for position, node in enumerate(graph.node)
        if node.op_type == "Constant"
        for name in node.output
    }
    sizes = {tensor.name: _size(tensor) for tensor in graph.initializer}
    for name, position in constants.items():
        attributes = graph.node[position].attribute
        sizes[name] = sum(_size(a.t) if a.HasField("t") else a.ByteSize() for a in attributes)
    read = [list(_names_read(node)) for node in graph.node]
    weights = [[name for name in names if name in sizes] for names in read]
    stretches = _stretches(weights, sizes, limit)
    given = {value.name for value in graph.input} - sizes.keys()
    made_by = dict.fromkeys(given, 0)  # numbers of pieces
    for number, stretch in enumerate(stretches):
        made = (name for i in stretch for name in graph.node[i].output)
        made_by |= dict.fromkeys(filter(None, made), number)
    names_wanted = dict.fromkeys(name for group in wanted for name in group)
    made_by = {n: k for n, k in made_by.items() if n not in sizes}
    needed_by = {
        name: number
        for number, stretch in enumerate(stretches)
        for i in stretch
        for name in read[i]
        if name in made_by
    }
    made_by |= {name: 0 for name in names_wanted if name in sizes}
    for group in wanted:
        number = max((made_by.get(name, 0) for name in group), default=0)
        needed_by |= {name: max(number, needed_by.get(name, 0)) for name in group}
    pieces = []
    for number, stretch in enumerate(stretches):
        nodes = [i for i in stretch if not constants.keys() & set(graph.node[i].output)]
        used = {name for i in nodes for name in weights[i]}
        used |= {name for name in names_wanted if name in sizes} if number == 0 else set()
        reads = dict.fromkeys(n for i in nodes for n in read[i] if n not in sizes)
        pieces.append(
            Piece(
                nodes=tuple(sorted({constants[n] for n in used if n in constants})) + tuple(nodes),
                initializers=frozenset(used - constants.keys()),
                reads=tuple(n for n in reads if n in given or made_by.get(n, number) < number),
                returns=tuple(n for n in names_wanted if made_by[n] == number),
                passes_on=tuple(
                    name
                    for name, needed in needed_by.items()
                    if name not in given and made_by[name] <= number < needed
                ),
                size=sum(sizes[name] for name in used),
            )
        )
    return pieces


def _stretches(weights: Sequence[Sequence[str]], sizes: dict[str, int], limit: int) -> list[range]:
    """Positions of the nodes of every piece. weights: names of those that each node reads."""
    stops, size, loaded = [], 0, set[str]()
    for position, names in enumerate(weights):
        added = sum(sizes[name] for name in names if name not in loaded)
        if loaded and added and size + added > limit:
            stops.append(position)
            loaded, size, added = set(), 0, sum(sizes[name] for name in names)
        loaded.update(names)
        size += added
    return [range(a, b) for a, b in pairwise([0, *stops, len(weights)])]


def _names_read(node: NodeProto) -> Iterator[str]:
    """The values that a node reads, and those that its subgraphs take from outside, or may take."""
    yield from filter(None, node.input)
    for attribute in node.attribute:
        for graph in subgraphs(attribute):
            for inner in graph.node:
                yield from _names_read(inner)
            yield from (value.name for value in graph.output)


def _size(tensor: TensorProto) -> int:
    """Bytes of its values, wherever they are."""
    return math.prod(tensor.dims) * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
