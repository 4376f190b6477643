"""What it costs to guard a decoder that is larger than the memory.

    python -m tools.large_decoder FOLDER --like llama-3.2-1b --layers 1 2 [--dtype float16]
        [--vocabulary N] [--scheme int4] [--max-memory 1024] [--json FILE] [-- OPTIONS OF GUARD]

For every number of layers, a decoder with random weights is written into FOLDER, guarded by a
process of its own, and removed. Its architecture is Llama's, with caches, and its inputs and
outputs have the names that optimum gives them. Two numbers of layers tell what a layer costs and
what the rest does (embedding, output layer, start, validation); the full model's row is
extrapolated from the last two, unless it was among the runs.

Seconds are those of the clock and, as CPU seconds, of the processors. *private* is the largest
memory at any one time of the process and its children, without the pages of mapped files, which
the system may drop and read again; *resident* counts these as well. *disk* is the most that the
run had on disk besides the model: what it keeps for --resume, temporary files and the output. All
are sampled, 10 times a second. Once the kernels are compiled (any run of guard does that), no time
goes into that.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tests.helpers.large import random_tensor
from tools.real_models import environment, heading, markdown, say
from tools.whole_runs import family, resident

OPSET = 17
EPSILON = 1e-5  # of the norms
HIDDEN = -1e9  # what is added to the score of a token that may not be seen
EVERY = 0.1  # seconds between two looks at memory and disk
TYPES = {"float16": np.float16, "float32": np.float32}


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama.

    heads: of the queries; kv_heads: of keys and values. tied: the output layer is the embedding.
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int
    tied: bool

    @property
    def head_size(self) -> int:
        """Columns of a head."""
        return self.hidden // self.heads

    @property
    def parameters(self) -> int:
        """How many weights there are, norms included."""
        attention = 2 * self.hidden * (self.heads + self.kv_heads) * self.head_size
        layer = attention + 3 * self.hidden * self.intermediate + 2 * self.hidden
        tables = 1 if self.tied else 2
        return self.layers * layer + tables * self.vocabulary * self.hidden + self.hidden


SHAPES = {
    "tiny": Shape(64, 2, 4, 2, 640, 200, True),
    "llama-3.2-1b": Shape(2048, 16, 32, 8, 8192, 128256, True),
    "llama-3-8b": Shape(4096, 32, 32, 8, 14336, 128256, False),
}


def write_decoder(path: Path, shape: Shape, dtype: Any = np.float32) -> None:
    """Write a decoder with random weights, these one after the other into a file beside it."""
    with path.with_name(f"{path.name}.data").open("wb") as data:
        graph = _Graph(data, np.dtype(dtype))
        logits, present = _decoder(graph, shape)
    float_type = helper.np_dtype_to_tensor_dtype(graph.dtype)
    tokens = ["batch_size", "sequence_length"]
    total = "past_sequence_length + sequence_length"
    inputs: list[tuple[str, int, list[Any]]] = [
        ("input_ids", TensorProto.INT64, tokens),
        ("attention_mask", TensorProto.INT64, [tokens[0], total]),
        ("position_ids", TensorProto.INT64, tokens),
    ]
    outputs: list[tuple[str, int, list[Any]]] = [(logits, float_type, [*tokens, shape.vocabulary])]
    for name in present:
        before, after = (
            [tokens[0], shape.kv_heads, length, shape.head_size]
            for length in ("past_sequence_length", total)
        )
        inputs.append((name.replace("present", "past_key_values"), float_type, before))
        outputs.append((name, float_type, after))
    values = [[helper.make_tensor_value_info(*each) for each in some] for some in (inputs, outputs)]
    made = helper.make_graph(graph.nodes, "decoder", *values, graph.initializers)
    opset = [helper.make_opsetid("", OPSET)]
    onnx.save(helper.make_model(made, opset_imports=opset, ir_version=8), path)


class _Graph:
    """Nodes and initializers, as they come; `dtype` is that of the weights."""

    def __init__(self, data: IO[bytes], dtype: np.dtype[Any]) -> None:
        self.dtype = dtype
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[TensorProto] = []
        self._data = data

    def add(self, op: str, *inputs: str, name: str = "", count: int = 1, **attributes: Any) -> Any:
        """A node; returns the name of its output, or the names of `count`."""
        name = name or f"{op}.{len(self.nodes)}"
        outputs = [name, *(f"{name}.{n}" for n in range(1, count))]
        self.nodes.append(helper.make_node(op, inputs, outputs, **attributes))
        return name if count == 1 else outputs

    def constant(self, values: Any, dtype: Any = np.int64) -> str:
        """A small initializer."""
        name = f"constant.{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(np.asarray(values, dtype), name))
        return name

    def weight(self, name: str, *dims: int, deviation: float) -> str:
        """A matrix with random weights."""
        seed = len(self.initializers)
        self.initializers.append(random_tensor(self._data, name, dims, deviation, seed, self.dtype))
        return name

    def multiplied(self, value: str, name: str, rows: int, columns: int) -> str:
        """The product with a weight, whose results are about as large as the value."""
        weight = self.weight(f"{name}.weight", rows, columns, deviation=rows**-0.5)
        return self.add("MatMul", value, weight)

    def cast(self, value: str, dtype: Any) -> str:
        """The value in another type than that of the weights; itself where that is the same."""
        if np.dtype(dtype) == self.dtype:
            return value
        return self.add("Cast", value, to=helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))

    def cast_back(self, value: str, dtype: Any = np.float32) -> str:
        """A value of type `dtype` in the type of the weights."""
        if np.dtype(dtype) == self.dtype:
            return value
        return self.add("Cast", value, to=helper.np_dtype_to_tensor_dtype(self.dtype))

    def reshaped(self, value: str, *dims: int) -> str:
        """The value in another shape; 0: as it was."""
        return self.add("Reshape", value, self.constant(dims))

    def normalized(self, value: str, name: str, columns: int) -> str:
        """RMSNorm, in float32, with weights of 1."""
        self.initializers.append(numpy_helper.from_array(np.ones(columns, self.dtype), name))
        x = self.cast(value, np.float32)
        mean = self.add("ReduceMean", self.add("Mul", x, x), axes=[-1])
        size = self.add("Sqrt", self.add("Add", mean, self.constant(EPSILON, np.float32)))
        return self.add("Mul", self.cast_back(self.add("Div", x, size)), name)


def _decoder(graph: _Graph, shape: Shape) -> tuple[str, list[str]]:
    """All nodes; returns the names of the logits and of what takes the place of the caches."""
    hidden = shape.hidden
    table = graph.weight("model.embed_tokens.weight", shape.vocabulary, hidden, deviation=0.02)
    x = graph.add("Gather", table, "input_ids")
    mask, angles = _mask(graph), _angles(graph, shape)
    present = []
    for number in range(shape.layers):
        name = f"model.layers.{number}"
        normed = graph.normalized(x, f"{name}.input_layernorm.weight", hidden)
        attended, caches = _attention(graph, shape, normed, number, mask, angles)
        present += caches
        x = graph.add("Add", x, attended)
        normed = graph.normalized(x, f"{name}.post_attention_layernorm.weight", hidden)
        gate, up = (
            graph.multiplied(normed, f"{name}.mlp.{kind}_proj", hidden, shape.intermediate)
            for kind in ("gate", "up")
        )
        gated = graph.add("Mul", graph.add("Mul", gate, graph.add("Sigmoid", gate)), up)
        down = graph.multiplied(gated, f"{name}.mlp.down_proj", shape.intermediate, hidden)
        x = graph.add("Add", x, down)
    x = graph.normalized(x, "model.norm.weight", hidden)
    if shape.tied:
        head = graph.add("Transpose", table, perm=[1, 0])
    else:
        head = graph.weight("lm_head.weight", hidden, shape.vocabulary, deviation=0.02)
    return graph.add("MatMul", x, head, name="logits"), present


def _mask(graph: _Graph) -> str:
    """What is added to the scores [batch, 1, 1, length, past + length]: causal, where it is 1."""
    sizes = [graph.add("Shape", name) for name in ("input_ids", "attention_mask")]
    zero, one = graph.constant(0), graph.constant(1)
    length, total = (graph.add("Gather", size, one) for size in sizes)
    keys = graph.add("Range", zero, total, one)
    queries = graph.add("Range", graph.add("Sub", total, length), total, one)
    rows = graph.add("Unsqueeze", queries, graph.constant([1]))
    causal = graph.add("LessOrEqual", keys, rows)
    shown = graph.add("Cast", "attention_mask", to=TensorProto.BOOL)
    shown = graph.add("Unsqueeze", shown, graph.constant([1, 2, 3]))
    allowed = graph.add("And", causal, shown)
    return graph.add(
        "Where", allowed, graph.constant(0, np.float32), graph.constant(HIDDEN, np.float32)
    )


def _angles(graph: _Graph, shape: Shape) -> tuple[str, str]:
    """Cosines and sines [batch, 1, length, head_size] of the rotary embedding, base 500000."""
    exponents = np.arange(0, shape.head_size, 2) / shape.head_size
    places = graph.add("Cast", "position_ids", to=TensorProto.FLOAT)
    places = graph.add("Unsqueeze", places, graph.constant([1, 3]))
    half = graph.add("Mul", places, graph.constant(500000.0**-exponents, np.float32))
    angles = graph.add("Concat", half, half, axis=-1)
    cosines, sines = (graph.cast_back(graph.add(op, angles)) for op in ("Cos", "Sin"))
    return cosines, sines


def _attention(
    graph: _Graph, shape: Shape, x: str, number: int, mask: str, angles: tuple[str, str]
) -> tuple[str, list[str]]:
    """Grouped-query attention, and the caches: so many heads of the queries share a key."""
    name, size = f"model.layers.{number}.self_attn", shape.head_size

    def heads(kind: str, count: int) -> str:
        found = graph.multiplied(x, f"{name}.{kind}_proj", shape.hidden, count * size)
        return graph.add("Transpose", graph.reshaped(found, 0, 0, count, size), perm=[0, 2, 1, 3])

    def rotated(value: str) -> str:
        halves = graph.constant([size // 2, size // 2])
        first, second = graph.add("Split", value, halves, axis=-1, count=2)
        turned = graph.add("Concat", graph.add("Neg", second), first, axis=-1)
        cosines, sines = angles
        return graph.add("Add", graph.add("Mul", value, cosines), graph.add("Mul", turned, sines))

    queries = rotated(heads("q", shape.heads))
    found = {"key": rotated(heads("k", shape.kv_heads)), "value": heads("v", shape.kv_heads)}
    caches = {
        kind: graph.add(
            "Concat",
            f"past_key_values.{number}.{kind}",
            value,
            name=f"present.{number}.{kind}",
            axis=2,
        )
        for kind, value in found.items()
    }
    keys, values = (graph.add("Unsqueeze", c, graph.constant([2])) for c in caches.values())
    across = graph.add("Transpose", keys, perm=[0, 1, 2, 4, 3])
    grouped = graph.reshaped(queries, 0, shape.kv_heads, shape.heads // shape.kv_heads, -1, size)
    scores = graph.add(
        "Mul", graph.add("MatMul", grouped, across), graph.constant(size**-0.5, graph.dtype)
    )
    masked = graph.add("Add", graph.cast(scores, np.float32), mask)
    shares = graph.cast_back(graph.add("Softmax", masked, axis=-1))
    context = graph.reshaped(graph.add("MatMul", shares, values), 0, shape.heads, -1, size)
    joined = graph.add("Transpose", context, perm=[0, 2, 1, 3])
    rows = shape.heads * size
    joined = graph.reshaped(joined, 0, 0, rows)
    return graph.multiplied(joined, f"{name}.o_proj", rows, shape.hidden), list(caches.values())


@dataclass(frozen=True)
class Cost:
    """Of guarding one model; memory, disk and files in bytes.

    wall, cpu: seconds. private, resident, disk: see above. stages: seconds of the clock, by the
    stage of the run.
    """

    layers: int
    parameters: int
    model: int
    output: int
    wall: float
    cpu: float
    private: int
    resident: int
    disk: int
    stages: dict[str, float]


def guard_command(model: Path, output: Path, work: Path, options: Sequence[str]) -> list[str]:
    """The command that guards a model and can be interrupted."""
    command = [sys.executable, "-m", "flipguard_onnx", str(model), "-o", str(output)]
    return [*command, "--resume", str(work), *options]


def measured(folder: Path, shape: Shape, dtype: Any, options: Sequence[str]) -> Cost:
    """Write a decoder into the folder, guard it there, and remove all."""
    source = folder / "model"
    source.mkdir(parents=True)
    write_decoder(source / "model.onnx", shape, dtype)
    model = size_of(source)
    run = folder / "run"
    run.mkdir()
    command = guard_command(source / "model.onnx", run / "guarded.onnx", run / "work", options)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    lines: list[tuple[float, str]] = [(started, "start")]

    def listen() -> None:
        assert process.stderr
        for line in process.stderr:
            lines.append((time.perf_counter(), line.rstrip()))
            say(f"{time.perf_counter() - started:8.1f} s  {line.rstrip()}")

    listener = threading.Thread(target=listen)
    listener.start()
    private = largest = disk = 0
    try:
        while process.poll() is None:
            tree = family(process.pid)
            private = max(private, sum(resident(pid, "RssAnon") for pid in tree))
            largest = max(largest, sum(resident(pid) for pid in tree))
            disk = max(disk, size_of(run))
            time.sleep(EVERY)
    finally:
        process.kill()
    ended = time.perf_counter()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    listener.join()
    if process.returncode:
        raise RuntimeError("\n".join(line for _, line in lines[-5:]))
    output = sum(file.stat().st_size for file in run.glob("guarded.onnx*"))
    shutil.rmtree(source)
    shutil.rmtree(run)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    found = {"model": model, "output": output, "wall": ended - started, "cpu": cpu}
    peaks = {"private": private, "resident": largest, "disk": disk}
    return Cost(
        layers=shape.layers,
        parameters=shape.parameters,
        stages=by_stage(lines, ended),
        **found,
        **peaks,
    )


def by_stage(lines: Sequence[tuple[float, str]], ended: float) -> dict[str, float]:
    """Seconds of each stage. lines: what a guard says, and when it began to say it."""
    stages: dict[str, float] = {}
    for (begun, line), (end, _) in zip(lines, [*lines[1:], (ended, "")], strict=True):
        stage = line.removesuffix(" ...").partition(",")[0]
        stages[stage] = stages.get(stage, 0) + end - begun
    return stages


def size_of(folder: Path) -> int:
    """Bytes of the files in a folder; some may go meanwhile."""
    total = 0
    for inner, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                total += os.stat(os.path.join(inner, name)).st_size
    return total


def extrapolated(fewer: Cost, more: Cost, shape: Shape) -> Cost:
    """What the full model costs if every further layer costs what those between two runs did.

    Memory is that of the larger run.
    """
    steps = (shape.layers - more.layers) / (more.layers - fewer.layers)

    def extended(name: str) -> float:
        return float(getattr(more, name) + steps * (getattr(more, name) - getattr(fewer, name)))

    stages = {
        stage: seconds + steps * (seconds - fewer.stages.get(stage, 0))
        for stage, seconds in more.stages.items()
    }
    sizes = {name: round(extended(name)) for name in ("model", "output", "disk")}
    return replace(
        more,
        layers=shape.layers,
        parameters=shape.parameters,
        wall=extended("wall"),
        cpu=extended("cpu"),
        stages=stages,
        **sizes,
    )


def table(costs: Sequence[tuple[str, Cost]]) -> str:
    """A row per run; costs: each with whether it was measured."""
    head = "layers | weights, M | file, GB | output, GB | seconds | CPU seconds | private, MB"
    head += " | resident, MB | disk, GB | "
    rows = []
    for known, cost in costs:
        sizes = (f"{size / 1e9:.2f}" for size in (cost.model, cost.output))
        seconds = (f"{number:,.0f}" for number in (cost.wall, cost.cpu))
        memory = (f"{size / 1e6:,.0f}" for size in (cost.private, cost.resident))
        weights = f"{cost.parameters / 1e6:,.0f}"
        disk = f"{cost.disk / 1e9:.2f}"
        rows.append([str(cost.layers), weights, *sizes, *seconds, *memory, disk, known])
    return markdown(head.split(" | "), rows)


def stage_table(costs: Sequence[Cost]) -> str:
    """Seconds by the stage of the run, a column per run."""
    names = dict.fromkeys(name for cost in costs for name in cost.stages)
    rows = [[name, *(f"{cost.stages.get(name, 0):,.1f}" for cost in costs)] for name in names]
    return markdown(["seconds of", *(f"{cost.layers} layers" for cost in costs)], rows)


def main(given: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if given is None else given)
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="where there is room for the model and more")
    parser.add_argument("--like", choices=SHAPES, default="tiny")
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 2], help="in each run")
    parser.add_argument("--vocabulary", type=int, help="tokens, instead of the original's")
    parser.add_argument("--dtype", choices=TYPES, default="float32")
    parser.add_argument("--scheme", default="int4")
    parser.add_argument("--max-memory", default="1024", help="MiB")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here too")
    options = parser.parse_args(arguments[:cut])
    full = SHAPES[options.like]
    full = replace(full, vocabulary=options.vocabulary or full.vocabulary)
    told = ["--scheme", options.scheme, "--max-memory", options.max_memory]
    told += arguments[cut + 1 :]
    costs: list[tuple[str, Cost]] = []
    for layers in options.layers:
        shape = replace(full, layers=layers)
        say(f"{options.like}, {layers} layers, {shape.parameters / 1e6:,.0f} M weights")
        cost = measured(options.folder, shape, TYPES[options.dtype], told)
        costs.append(("measured", cost))
        say(str(cost))
    if len(costs) > 1 and all(cost.layers != full.layers for _, cost in costs):
        costs.append(("extrapolated", extrapolated(costs[-2][1], costs[-1][1], full)))
    facts = environment("tools.large_decoder")
    runs = [cost for known, cost in costs if known == "measured"]
    print(f"{heading(facts)}\n\n{table(costs)}\n\n{stage_table(runs)}")
    if options.json:
        rows = [{"known": known} | asdict(cost) for known, cost in costs]
        options.json.write_text(json.dumps(facts | {"runs": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
