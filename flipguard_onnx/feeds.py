"""Inputs to try a model on: from a file, or made up from the graph's signature.

What is made up: a batch of one; masks of ones; token ids below the size of the table that they
index; lengths, sampling rates and positions by their names; noise for everything else. Dimensions
left open are tried at several sizes until the model runs.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, TensorProto, ValueInfoProto, helper

from .errors import ModelError

Feed = dict[str, npt.NDArray[Any]]

FEEDS, FEWER_FEEDS = 8, 4  # how many are made up, for small models and for large ones
LARGE = 32_000_000  # bytes
SIZES = (64, 32, 16, 512, 576, 256, 224, 128, 8, 400, 1)  # for open dimensions, in this order
UNKNOWN_INTEGERS = 100  # integers that index no table are drawn below this
SAMPLING_RATE = 16000
BATCH = "batch"  # stands for a dimension that is open and counts samples
_PASSED_ON = ("Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Slice")


@dataclass(frozen=True)
class Input:
    """One graph input: type, dimensions (names where open), rows of the table that it indexes."""

    name: str
    dtype: np.dtype[Any]
    dims: tuple[int | str, ...]
    table: int | None


def load_feeds(path: Path, proto: ModelProto) -> list[Feed]:
    """Feeds from an .npz file with one array per graph input, named as it is.

    An array with one axis more than its input holds several feeds along its first axis.
    Raises ModelError when an input is missing or does not fit.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: not a readable .npz file ({error})") from None
    inputs = signature(proto)
    for wanted in inputs:
        if wanted.name not in arrays:
            raise ModelError(f"{path}: no array for input {wanted.name!r}; found {sorted(arrays)}")
    stacked = [arrays[i.name].ndim == len(i.dims) + 1 for i in inputs]
    if any(stacked):
        counts = {len(arrays[i.name]) for i, many in zip(inputs, stacked, strict=True) if many}
        if len(counts) != 1 or not all(stacked):
            raise ModelError(f"{path}: either all or no arrays may stack several feeds")
        return [
            {i.name: arrays[i.name][n].astype(i.dtype) for i in inputs} for n in range(counts.pop())
        ]
    return [{i.name: arrays[i.name].astype(i.dtype) for i in inputs}]


def made_up_feeds(proto: ModelProto, model_bytes: int, seed: int = 0) -> Iterator[list[Feed]]:
    """Candidates, each a list of feeds; the caller takes the first that the model accepts."""
    count = FEEDS if model_bytes < LARGE else FEWER_FEEDS
    inputs = signature(proto)
    open_dims = list(dict.fromkeys(d for i in inputs for d in i.dims if isinstance(d, str)))
    open_dims = [d for d in open_dims if d != BATCH]
    tried = set()
    for size in SIZES:
        for choice in product((size, 1), repeat=min(len(open_dims), 6)):
            sizes = dict.fromkeys([BATCH, *open_dims], 1)
            sizes |= dict(zip(open_dims, choice, strict=False))
            key = tuple(sizes.values())
            if key in tried:
                continue
            tried.add(key)
            rng = np.random.default_rng(seed)
            shapes = [tuple(sizes[d] if isinstance(d, str) else d for d in i.dims) for i in inputs]
            yield [
                {i.name: values(i, s, size, rng) for i, s in zip(inputs, shapes, strict=True)}
                for _ in range(count)
            ]


def signature(proto: ModelProto) -> list[Input]:
    """The inputs that a caller must give."""
    constants = {tensor.name for tensor in proto.graph.initializer}
    return [_input(proto, value) for value in proto.graph.input if value.name not in constants]


def _input(proto: ModelProto, value: ValueInfoProto) -> Input:
    kind = value.type.tensor_type
    if not value.type.HasField("tensor_type"):
        raise ModelError(f"input {value.name!r} is no tensor; give --data or --no-validate")
    dims: list[int | str] = []
    for axis, dim in enumerate(kind.shape.dim):
        if dim.dim_value > 0:
            dims.append(dim.dim_value)
        elif axis == 0 or "batch" in dim.dim_param.lower():
            dims.append(BATCH)
        else:
            dims.append(dim.dim_param.strip("?") or f"{value.name}:{axis}")
    dtype = helper.tensor_dtype_to_np_dtype(kind.elem_type or TensorProto.FLOAT)
    return Input(value.name, dtype, tuple(dims), _indexed_table(proto, value.name))


def _indexed_table(proto: ModelProto, name: str) -> int | None:
    """Rows of the smallest constant table that a Gather indexes with this value."""
    tables = {tensor.name: tensor.dims for tensor in proto.graph.initializer}
    for node in proto.graph.node:  # float16 tables are often stored behind a Cast
        if node.op_type in ("Cast", "Identity") and node.input[0] in tables:
            tables[node.output[0]] = tables[node.input[0]]
    sizes = []
    pending, seen = [name], {name}
    while pending:
        current = pending.pop()
        for node in proto.graph.node:
            if current not in node.input:
                continue
            if node.op_type == "Gather" and node.input[1] == current and node.input[0] in tables:
                axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
                sizes.append(tables[node.input[0]][axis])
            elif node.op_type in _PASSED_ON:
                pending.extend(set(node.output) - seen)
                seen.update(node.output)
    return min(sizes, default=None)


def values(
    wanted: Input, shape: tuple[int, ...], size: int, rng: np.random.Generator
) -> npt.NDArray[Any]:
    """Made-up values for one input; `size` is that of the open dimensions."""
    name = wanted.name.lower()
    if wanted.dtype == np.bool_ or "mask" in name:
        return np.ones(shape, wanted.dtype)
    if wanted.table:
        return rng.integers(0, wanted.table, shape).astype(wanted.dtype)
    if np.issubdtype(wanted.dtype, np.integer):
        if name in ("sr", "sample_rate", "sampling_rate"):
            return np.full(shape, SAMPLING_RATE, wanted.dtype)
        if "len" in name:
            return np.full(shape, size, wanted.dtype)
        if "position" in name and shape:
            return np.broadcast_to(np.arange(shape[-1], dtype=wanted.dtype), shape).copy()
        if "type" in name:
            return np.zeros(shape, wanted.dtype)
        return rng.integers(0, UNKNOWN_INTEGERS, shape).astype(wanted.dtype)
    return rng.standard_normal(shape).astype(wanted.dtype)
