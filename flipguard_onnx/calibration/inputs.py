"""Inputs to run a model on: from a file, or made up from the graph's signature.

Made-up inputs are a batch of one; masks of ones; token ids below the size of the table that they
index; lengths, sampling rates and positions by their names; noise for everything else. Dimensions
left open are tried at several sizes until the model runs.
"""

import hashlib
import math
import time
import tokenize
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper

from ..errors import ModelError, UnsupportedModelError, first_line
from ..graph.operands import Operand, Shape
from ..graph.operators import Operator, operator_of
from ..graph.traversal import attribute, graphs
from ..io.model import file_sha256

Feed = dict[str, npt.NDArray[Any]]

Dims = tuple[int | str, ...]

FEEDS, FEWER_FEEDS = 8, 4  # made up for small models, and for large ones

LARGE = 32_000_000  # bytes of a model, from which on it counts as large

SIZES = (64, 32, 16, 512, 576, 256, 224, 128, 8, 400, 1)  # for open dimensions, in this order

UNKNOWN_INTEGERS = 100  # integers that index no table are drawn below this

SAMPLING_RATE = 16000

TRY_SECONDS = 60.0  # after which no more candidates are made up

MADE_UP_LIMIT = 1 << 30  # bytes of one candidate

NONE_FIT = f"none takes less than {MADE_UP_LIMIT >> 20} MiB"  # when nothing could be tried

DATA_LIMIT = 4 << 30  # bytes of an .npz file, unpacked

SAMPLES = 16  # that a model runs on at once, at most

LOGITS = 1 << 25  # of a decoder, in each run

ATTENTION = 1 << 22  # pairs of tokens of a text, in each run

BATCH = "batch"  # stands for a dimension that is open and counts samples

# operators that index constant tables: the numbers of both inputs
_INDEXING = {"Gather": ((1, 0),), "EmbedLayerNormalization": ((0, 2), (1, 4))}

_SHAPE_KEEPING = ("Cast", "Identity", "Add", "Sub", "Mul", "Div")

_VALUE_KEEPING = ("Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Slice")


@dataclass(frozen=True)
class Input:
    """One input of a graph.

    Parameters
    ----------
    name, dtype : of the input
    dims : sizes, or names of the dimensions that are open
    table_rows : rows of the constant table that it indexes, if it does
    ranked : whether the model says how many axes it has; if not, `dims` fit a node that reads it
    """

    name: str
    dtype: np.dtype[Any]
    dims: Dims
    table_rows: int | None
    ranked: bool = True


def load_feeds(path: Path, proto: ModelProto, optional: Collection[str] = ()) -> list[Feed]:
    """Feeds from an .npz file with one array per graph input, or from a folder of such files.

    Parameters
    ----------
    path : of the file or folder. Arrays have the names of the inputs. Those with one axis more
        than their inputs hold several feeds along the first axis.
    proto : the model
    optional : names of inputs that may be missing

    Returns
    -------
    Feeds in the inputs' types, in the order of the files' names.

    Raises
    ------
    ModelError
        When an input is missing or does not fit.
    UnsupportedModelError
        When the model has inputs that are no tensors of numbers.
    """
    return [feed for file in npz_files(path) for feed in _feeds_of(file, proto, optional)]


def npz_files(path: Path) -> list[Path]:
    """The file itself, or the .npz files of a folder, sorted by name.

    Raises ModelError if there are none, or more than DATA_LIMIT bytes of them.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ModelError("cannot be read: not a regular file, or not there", path=path)
    files = sorted(path.glob("*.npz"))
    if not files:
        raise ModelError("a folder without .npz files", path=path)
    if (size := sum(file.stat().st_size for file in files)) > DATA_LIMIT:
        raise ModelError(
            "its .npz files hold {found} bytes",
            path=path,
            found=size,
            allowed=f"up to {DATA_LIMIT}",
        )
    return files


def feeds_sha256(path: Path) -> str:
    """Hex digest of a file of feeds; for a folder, that of its files' digests."""
    files = npz_files(path)
    if files == [path]:
        return file_sha256(path)
    return hashlib.sha256("".join(map(file_sha256, files)).encode()).hexdigest()


def _feeds_of(path: Path, proto: ModelProto, optional: Collection[str]) -> list[Feed]:
    arrays = _read_npz(path)
    inputs = [i for i in signature(proto) if i.name in arrays or i.name not in optional]
    for wanted in inputs:
        if wanted.name not in arrays:
            raise ModelError(
                "no array for input {tensor!r}; found {found}",
                path=path,
                tensor=wanted.name,
                found=sorted(arrays),
            )
        _require_fit(path, wanted, arrays[wanted.name])
    sized = [i.name for i in inputs if any(isinstance(dim, str) for dim in i.dims)]
    if sized and not any(arrays[name].size for name in sized):  # one alone may be an empty cache
        raise ModelError(
            "holds no samples: input {tensor!r} is given with shape {found}",
            path=path,
            tensor=sized[0],
            found=arrays[sized[0]].shape,
        )
    stacked = [i.ranked and arrays[i.name].ndim == len(i.dims) + 1 for i in inputs]
    if any(stacked):
        counts = {
            len(arrays[i.name]) for i, is_stack in zip(inputs, stacked, strict=True) if is_stack
        }
        if len(counts) != 1 or not all(stacked):
            raise ModelError("either all or no arrays may stack several feeds", path=path)
        if counts == {0}:
            raise ModelError("holds no feeds", path=path)
        return [
            {i.name: arrays[i.name][n].astype(i.dtype) for i in inputs} for n in range(counts.pop())
        ]
    return [{i.name: arrays[i.name].astype(i.dtype) for i in inputs}]


_UNREADABLE = (
    *(OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error),
    *(NotImplementedError, RuntimeError),  # encrypted, or compressed in an unknown way
    *(SyntaxError, tokenize.TokenError, MemoryError),  # an array's header, a literal of Python
)


def _read_npz(path: Path) -> dict[str, npt.NDArray[Any]]:
    """The arrays of an .npz file, by name; no pickles, no more memory than the file declares."""
    arrays = {}
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
            if size > DATA_LIMIT:
                raise ModelError(
                    "holds {found} bytes", path=path, found=size, allowed=f"up to {DATA_LIMIT}"
                )
            for entry in archive.infolist():
                with archive.open(entry) as stream:
                    _require_honest(stream, entry.file_size)
                with archive.open(entry) as stream:
                    name = entry.filename.removesuffix(".npy")
                    arrays[name] = np.lib.format.read_array(stream, allow_pickle=False)
    except _UNREADABLE as error:
        raise ModelError(
            "not a readable .npz file ({found})",
            path=path,
            found=first_line(error),
            allowed="an .npz file, a folder of them, a .txt or a .jsonl file",
        ) from None
    return arrays


def _require_honest(stream: IO[bytes], size: int) -> None:
    """Raise ValueError if the header of an .npy file of `size` bytes claims more values."""
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0
    if version != (1, 0):
        read = np.lib.format.read_array_header_2_0
    shape, _, dtype = read(stream)
    if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize > size:
        raise ValueError(f"an array claims the shape {shape[:8]}, but its file has {size} bytes")


def _require_fit(path: Path, wanted: Input, array: npt.NDArray[Any]) -> None:
    """Raise ModelError unless the array, or each of those stacked in it, fits the input."""
    dims = wanted.dims
    shape = array.shape[1:] if array.ndim == len(dims) + 1 else array.shape
    sizes_fit = len(shape) == len(dims) and all(
        isinstance(dim, str) or dim == n for dim, n in zip(dims, shape, strict=True)
    )
    if array.dtype.kind not in "biuf" or (wanted.ranked and not sizes_fit):
        raise ModelError(
            "input {tensor!r} is given as {found}",
            path=path,
            tensor=wanted.name,
            found=f"{array.dtype} {array.shape}",
            allowed=f"{wanted.dtype} {dims}",
        )
    if wanted.dtype.kind in "iu" and array.dtype.kind in "iuf":
        limits = np.iinfo(wanted.dtype)
        with np.errstate(invalid="ignore", over="ignore"):
            fits = (array == np.rint(array)) & (array >= limits.min) & (array < limits.max + 1)
        if not fits.all():
            raise ModelError(
                "input {tensor!r} holds {found}",
                path=path,
                tensor=wanted.name,
                found=array[~fits][0],
                allowed=f"values of {wanted.dtype}",
            )


def samples_at_a_time(feed: Feed, inputs: Sequence[Input]) -> int:
    """How many samples like those of a feed the model runs on at once; fewer of long texts."""
    count = SAMPLES
    for wanted in inputs:
        shape = feed[wanted.name].shape
        if wanted.table_rows and shape:
            tokens = max(math.prod(shape[wanted.dims[0] == BATCH :]), 1)
            most = min(LOGITS // (tokens * wanted.table_rows), ATTENTION // tokens**2)
            count = max(1, min(count, most))
    return count


def cut_up(feed: Feed, inputs: Sequence[Input]) -> Iterator[Feed]:
    """The samples of a feed, as many at a time as the model takes well; whole if they are one."""
    inputs = [i for i in inputs if i.name in feed]
    sizes = {len(feed[i.name]) if i.dims[:1] == (BATCH,) else 0 for i in inputs}
    if len(sizes) != 1 or sizes == {0}:
        yield feed
        return
    step = samples_at_a_time(feed, inputs)
    for start in range(0, sizes.pop(), step):
        yield {name: array[start : start + step] for name, array in feed.items()}


def made_up_feeds(proto: ModelProto, model_bytes: int, seed: int = 0) -> Iterator[list[Feed]]:
    """Candidates, each a list of feeds; the caller takes the first that the model accepts.

    Parameters
    ----------
    proto : the model
    model_bytes : its size; large models get fewer feeds
    seed : of the random values

    Returns
    -------
    An iterator that may be empty: candidates of more than MADE_UP_LIMIT bytes are left out.
    """
    count = FEEDS if model_bytes < LARGE else FEWER_FEEDS
    inputs = signature(proto)
    open_dims = list(dict.fromkeys(d for i in inputs for d in i.dims if isinstance(d, str)))
    open_dims = [d for d in open_dims if d != BATCH]
    lengths = any("len" in i.name.lower() for i in inputs)  # they get the size, too
    tried = set()
    started = time.monotonic()
    for size in SIZES:
        for choice in product((size, 1), repeat=min(len(open_dims), 6)):
            sizes = dict.fromkeys([BATCH, *open_dims], 1)
            sizes |= dict(zip(open_dims, choice, strict=False))
            key = (size if lengths else 0, *sizes.values())
            if key in tried:
                continue
            tried.add(key)
            if time.monotonic() - started > TRY_SECONDS:
                return
            rng = np.random.default_rng(seed)
            shapes = [tuple(sizes[d] if isinstance(d, str) else d for d in i.dims) for i in inputs]
            pairs = zip(inputs, shapes, strict=True)
            if count * sum(i.dtype.itemsize * math.prod(s) for i, s in pairs) > MADE_UP_LIMIT:
                continue
            yield [
                {i.name: values(i, s, size, rng) for i, s in zip(inputs, shapes, strict=True)}
                for _ in range(count)
            ]


def signature(proto: ModelProto) -> list[Input]:
    """The inputs of a model, those aside that an initializer has a default for.

    Raises UnsupportedModelError for one that is no tensor of numbers.
    """
    tables = _tables(proto)
    readers = node_readers(node for graph in graphs(proto) for node in graph.node)
    found = []
    for value in required_inputs(proto):
        wanted = _input(value, _indexed_table(value.name, tables, readers))
        fitting = _fitting(value.name, tables, readers)
        if not value.type.tensor_type.HasField("shape"):
            wanted = replace(wanted, dims=_made_up_dims(value.name, fitting), ranked=False)
        else:
            wanted = replace(wanted, dims=_with_channels(wanted.dims, fitting))
        found.append(wanted)
    return found


def required_inputs(proto: ModelProto) -> list[ValueInfoProto]:
    """The inputs that a model must be given: no initializer has a default for them."""
    constants = {tensor.name for tensor in proto.graph.initializer}
    return [value for value in proto.graph.input if value.name not in constants]


def _input(value: ValueInfoProto, table_rows: int | None) -> Input:
    kind = value.type.tensor_type
    if not value.type.HasField("tensor_type"):
        raise UnsupportedModelError(
            "input {tensor!r} is no tensor", tensor=value.name, allowed="tensors of real numbers"
        )
    dims: list[int | str] = []
    for axis, dim in enumerate(kind.shape.dim):
        if dim.HasField("dim_value") and dim.dim_value >= 0:
            dims.append(dim.dim_value)
        elif axis == 0 or "batch" in dim.dim_param.lower():
            dims.append(BATCH)
        else:
            dims.append(dim.dim_param.strip("?") or f"{value.name}:{axis}")
    try:
        dtype = helper.tensor_dtype_to_np_dtype(kind.elem_type or TensorProto.FLOAT)
    except KeyError:
        raise UnsupportedModelError(
            "input {tensor!r} has the type {found}, unknown",
            tensor=value.name,
            found=kind.elem_type,
        ) from None
    if dtype.kind in "Oc":
        raise UnsupportedModelError(
            "input {tensor!r} holds {found}",
            tensor=value.name,
            found=dtype.name if dtype.kind == "c" else "strings",
            allowed="tensors of real numbers",
        )
    return Input(value.name, dtype, tuple(dims), table_rows)


def _made_up_dims(name: str, fitting: Iterator[tuple[Operator, Shape]]) -> Dims:
    """Dimensions that fit the first weight; two open ones without any."""
    for operator, shape in fitting:
        places = (f"{name}:{axis}" for axis in range(2, len(shape)))
        return (*shape[:2], *places) if operator.convolution else tuple(shape)
    return f"{name}:0", f"{name}:1"


def _with_channels(dims: Dims, fitting: Iterator[tuple[Operator, Shape]]) -> Dims:
    """The dimensions of an image or a sequence with as many channels as its kernel has."""
    if len(dims) < 3 or not isinstance(dims[1], str):
        return dims
    for operator, shape in fitting:
        if operator.convolution and len(shape) == len(dims):
            return dims[0], shape[1], *dims[2:]
    return dims


def _fitting(
    name: str, tables: Mapping[str, Sequence[int]], readers: Mapping[str, list[NodeProto]]
) -> Iterator[tuple[Operator, Shape]]:
    """The operators with a weight that read this value, and a shape that fits the weight.

    The value may pass through a Cast, or be shifted and scaled as images are, on its way.
    """
    for reached in _reached(name, readers, _SHAPE_KEEPING):
        for node in readers[reached]:
            operator = operator_of(node)
            for index in operator.weights if operator else ():
                shape = tables.get(node.input[index]) if index < len(node.input) else None
                if operator and shape:
                    fitting = operator.layer_input(Operand(node, index, tuple(shape)))
                    if fitting and node.input[fitting.index] == reached:
                        yield operator, fitting.shape


def _reached(
    name: str, readers: Mapping[str, list[NodeProto]], passed: Collection[str]
) -> Iterator[str]:
    """The value itself, and those that nodes of these operators make of it."""
    pending, seen = [name], {name}
    while pending:
        current = pending.pop()
        yield current
        for node in readers[current]:
            if node.op_type in passed:
                pending.extend(set(node.output) - seen)
                seen.update(node.output)


def _tables(proto: ModelProto) -> dict[str, Sequence[int]]:
    """The shapes of constants by name, subgraphs included.

    Tables of float16 are often stored behind a Cast, those that are the last layer's weight as
    well behind a Transpose.
    """
    tables: dict[str, Sequence[int]] = {}
    for graph in graphs(proto):
        tables.update((tensor.name, tensor.dims) for tensor in graph.initializer)
        for node in graph.node:
            if node.op_type in ("Cast", "Identity", "Transpose") and node.input[0] in tables:
                dims = tables[node.input[0]]
                axes = attribute(node, "perm", range(len(dims))[::-1])
                if node.op_type == "Transpose" and sorted(axes) == [*range(len(dims))]:
                    dims = [dims[axis] for axis in axes]
                tables[node.output[0]] = dims
    return tables


def _indexed_table(
    name: str, tables: Mapping[str, Sequence[int]], readers: Mapping[str, list[NodeProto]]
) -> int | None:
    """Rows of the smallest constant table that this value indexes."""
    sizes: list[int] = []
    for current in _reached(name, readers, _VALUE_KEEPING):
        for node in readers[current]:
            for index, table in _INDEXING.get(node.op_type, ()):
                reads = table < len(node.input) and node.input[index] == current
                dims = tables.get(node.input[table], ()) if reads else ()
                axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
                sizes += dims[axis : axis + 1 or None]
    return min(sizes, default=None)


def node_readers(nodes: Iterable[NodeProto]) -> dict[str, list[NodeProto]]:
    """Which of these nodes read a value, each once, by the value's name."""
    readers: dict[str, list[NodeProto]] = defaultdict(list)
    for node in nodes:
        for name in dict.fromkeys(node.input):
            readers[name].append(node)
    return readers


def values(
    wanted: Input, shape: tuple[int, ...], size: int, rng: np.random.Generator
) -> npt.NDArray[Any]:
    """Made-up values for one input, of that shape; open dimensions in it have `size`."""
    name = wanted.name.lower()
    if wanted.dtype == np.bool_ or "mask" in name:
        return np.ones(shape, wanted.dtype)
    if wanted.table_rows and "position" not in name:
        return rng.integers(0, wanted.table_rows, shape).astype(wanted.dtype)
    if np.issubdtype(wanted.dtype, np.integer):
        if name in ("sr", "sample_rate", "sampling_rate"):
            return np.full(shape, SAMPLING_RATE).astype(wanted.dtype)
        if "len" in name:
            return np.full(shape, size).astype(wanted.dtype)
        if "position" in name and shape:
            return np.broadcast_to(np.arange(shape[-1]), shape).astype(wanted.dtype)
        if "type" in name:
            return np.zeros(shape, wanted.dtype)
        return rng.integers(0, UNKNOWN_INTEGERS, shape).astype(wanted.dtype)
    return rng.standard_normal(shape).astype(wanted.dtype)
