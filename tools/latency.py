"""How fast what we write runs in onnxruntime, beside float32 and onnxruntime's own quantizers.

    python tools/fetch_models.py
    python -m tools.latency [--models NAME...] [--files NAME...] [--rounds 20] [--json FILE]
    python -m tools.latency --embeddings [--rounds 20] [--json FILE]
    python -m tools.latency --load FILE...

Two models are made here: gemm and gemm-t, three Gemms of 1024 x 1024 without and with transB.

Every file runs in a process of its own that has nothing but onnxruntime and numpy, with default
session options, or those that its name says. The processes take turns, a run each, so that what
disturbs one disturbs all; a ratio is the median of the ratios to float32's run of the same round.
Memory: the peak of the process, loading included, without what it needs for no model at all.

dynamic: quantize_dynamic, weights per channel. static: quantize_static with its pre-processing,
weights per channel, activations uint8. full: --activations uint8. their int4, nf4, fp4:
onnxruntime's quantizers of the same format. The others are ours, weights only. portable: --target
portable. portable exact: with session.qdq_matmulnbits_accuracy_level 1, so that activations are
not quantized. portable folded: with session.disable_quant_qdq, so that weights are decoded when
the file is loaded. ort: --target onnxruntime. -: quantizes nothing, or fails.

--embeddings: a table of 49,152 x 576 of which 1 or 128 rows are looked up, in the forms that it can
have, with a scale per row at int8 and per block of 32 at int4. float32: Gather. gather: Gather of
codes, a byte each, and Mul by the gathered scales, which is our form. whole: DequantizeLinear of
all, then Gather. blocks: DequantizeLinear in blocks of gathered codes, a byte each, with gathered
scales. contrib: GatherBlockQuantized.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantType,
    quant_pre_process,
    quantize_static,
)

import flipguard_onnx
from flipguard_onnx.calibration.inputs import signature
from flipguard_onnx.calibration.samples import Samples
from flipguard_onnx.io.model import open_model
from tools.fetch_models import path_of, select
from tools.real_models import (
    SCHEMES,
    environment,
    heading,
    markdown,
    of_opset,
    quantize,
    quantized_weights,
    silence,
)

FLOAT = "float32"
MADE = ("gemm", "gemm-t")
OPSET = 21  # of the 4-bit QDQ forms
# what is open in a model's signature, where the tool's own guess is smaller than real inputs
SHAPES = {
    "minilm": (1, 128),
    "ppocr_det": (1, 3, 320, 320),
    "ppocr_rec": (1, 3, 48, 320),
    "ddddocr": (1, 1, 64, 160),
}
EMBEDDING, BLOCK, LOOKUPS = (49152, 576), 32, (1, 128)
EMBEDDINGS = {
    FLOAT: "y = Gather (table, i)",
    "int8 gather": """
        c = Gather (codes, i)
        s = Gather (scales, i)
        d = DequantizeLinear (c, one)
        y = Mul (d, s)""",
    "int8 whole": """
        w = DequantizeLinear <axis = 0> (codes, flat_scales)
        y = Gather (w, i)""",
    "int8 blocks": """
        c = Gather (codes, i)
        s = Gather (scales, i)
        y = DequantizeLinear <axis = -1, block_size = WIDTH> (c, s)""",
    "int4 gather": """
        c = Gather (blocks, i)
        s = Gather (deep_scales, i)
        d = DequantizeLinear (c, one)
        m = Mul (d, s)
        n = Shape (i)
        shape = Concat <axis = 0> (n, width)
        y = Reshape (m, shape)""",
    "int4 whole": """
        w = DequantizeLinear <axis = 1, block_size = BLOCK> (packed, block_scales)
        y = Gather (w, i)""",
    "int4 blocks": """
        c = Gather (nibbles, i)
        s = Gather (block_scales, i)
        y = DequantizeLinear <axis = -1, block_size = BLOCK> (c, s)""",
    "int4 contrib": """
        y = com.microsoft.GatherBlockQuantized
            <gather_axis = 0, quantize_axis = 1, block_size = BLOCK> (packed, i, block_scales)""",
}
TURN = 0.1  # seconds at least for which one file runs again and again before the next has its turn
PAUSE = 0.05  # seconds in which the threads of the process before come to rest
SERVER = """
import os, statistics, sys, time
import numpy as np, onnxruntime
def peak():
    with open("/proc/self/status") as status:
        return next(int(s.split()[1]) for s in status if s.startswith("VmHWM"))
options = onnxruntime.SessionOptions()
options.log_severity_level = 4
for entry in sys.argv[3:]:
    options.add_session_config_entry(*entry.split("="))
before = peak()
feed = dict(np.load(sys.argv[2]))
session = onnxruntime.InferenceSession(sys.argv[1], options, ["CPUExecutionProvider"])
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
session.run(None, feed)
print(flush=True)
for line in sys.stdin:
    seconds, end = [], time.perf_counter() + float(line)
    while len(seconds) < 5 or time.perf_counter() < end:
        started = time.perf_counter()
        session.run(None, feed)
        seconds.append(time.perf_counter() - started)
    print(statistics.median(seconds[1:]), peak() - before, flush=True)
"""

Feed = dict[str, np.ndarray]
Maker = Callable[[Path, Path, list[Feed]], object]


@dataclass(frozen=True)
class Timing:
    """One file. ratio: to float32's time; mebibytes: peak."""

    model: str
    inputs: str
    file: str
    milliseconds: float
    ratio: float
    mebibytes: float


class Reader(CalibrationDataReader):
    def __init__(self, feeds: list[Feed]) -> None:
        self._feeds = iter(feeds)

    def get_next(self) -> Feed | None:
        return next(self._feeds, None)


def static(source: Path, output: Path, feeds: list[Feed]) -> None:
    quant_pre_process(source, output, skip_symbolic_shape=True)
    quantize_static(output, output, Reader(feeds), per_channel=True,
                    activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8)  # fmt: skip


def theirs(scheme: str) -> Maker:
    def make(source: Path, output: Path, feeds: list[Feed]) -> None:
        quantize(source, scheme, output)

    return make


def ours(scheme: str, **options: str) -> Maker:
    def make(source: Path, output: Path, feeds: list[Feed]) -> None:
        flipguard_onnx.guard(
            source, scheme, seed=1, preserve="off", validate=False, output=output, **options
        )

    return make


FILES: dict[str, Maker] = {
    "dynamic": theirs("int8"),
    "static": static,
    "full": ours("int8", activations="uint8"),
    "their int4": theirs("int4"),
    "their nf4": theirs("nf4"),
    "their fp4": theirs("fp4"),
}
SESSIONS = {
    "portable exact": "session.qdq_matmulnbits_accuracy_level=1",
    "portable folded": "session.disable_quant_qdq=1",
}
for scheme in SCHEMES:
    FILES |= dict.fromkeys(
        (f"{scheme} {name}" for name in ("portable", *SESSIONS)), ours(scheme, target="portable")
    )
    FILES[f"{scheme} ort"] = ours(scheme, target="onnxruntime")
COMPARED = ("full", *(file for file in FILES if file.startswith(("int8", "int4"))))


def settings(file: str) -> list[str]:
    """The session options of a file, by its name."""
    return [entry for name, entry in SESSIONS.items() if file.endswith(name)]


def gemm(name: str, folder: Path) -> Path:
    """A model of three Gemms, with transB if its name says so."""
    rng = np.random.default_rng(0)
    weights = {f"w{i}": rng.standard_normal((1024, 1024)).astype(np.float32) / 32 for i in range(3)}
    nodes = [
        helper.make_node("Gemm", [f"x{i}", f"w{i}"], [f"x{i + 1}"], transB=int(name == "gemm-t"))
        for i in range(3)
    ]
    values = [
        helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [16, 1024]) for n in ("x0", "x3")
    ]
    initializers = [numpy_helper.from_array(array, n) for n, array in weights.items()]
    graph = helper.make_graph(nodes, name, values[:1], values[1:], initializers)
    path = folder / "made.onnx"
    opset = [helper.make_opsetid("", OPSET)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=10), path)
    return path


def embedding(form: str, shape: tuple[int, int], path: Path) -> None:
    """Write one of EMBEDDINGS."""
    rows, width = shape
    rng = np.random.default_rng(0)
    codes = rng.integers(-127, 128, shape).astype(np.int8)
    nibbles = rng.integers(-8, 8, shape).astype(np.int8)
    scales = rng.uniform(0.5, 1, (rows, 1)).astype(np.float32) / 127
    block_scales = rng.uniform(0.5, 1, (rows, width // BLOCK)).astype(np.float32) / 8
    known = {
        "table": codes * scales,
        "codes": codes,
        "scales": scales,
        "flat_scales": scales.ravel(),
        "nibbles": nibbles,
        "blocks": nibbles.reshape(rows, -1, BLOCK),
        "packed": nibbles.astype(ml_dtypes.int4),
        "block_scales": block_scales,
        "deep_scales": block_scales[:, :, None],
        "one": np.ones((), np.float32),
        "width": np.array([width]),
    }
    nodes = EMBEDDINGS[form].replace("WIDTH", str(width)).replace("BLOCK", str(BLOCK))
    model = onnx.parser.parse_model(f"""
        <ir_version: 10, opset_import: ["": {OPSET}, "com.microsoft": 1]>
        embedding (int64[texts, length] i) => (float[texts, length, {width}] y) {{ {nodes} }}
    """)
    read = {name for node in model.graph.node for name in node.input}
    kept = (numpy_helper.from_array(known[name], name) for name in sorted(read & known.keys()))
    model.graph.initializer.extend(kept)
    onnx.save(model, path)


def looked_up(rounds: int, folder: Path) -> list[Timing]:
    """All of EMBEDDINGS."""
    paths = {form: folder / f"{form}.onnx" for form in EMBEDDINGS}
    for form, path in paths.items():
        embedding(form, EMBEDDING, path)
    rng, timings = np.random.default_rng(0), []
    for count in LOOKUPS:
        feed = {"i": rng.integers(0, EMBEDDING[0], (1, count))}
        timings += timed(f"{count} row{'s' * (count > 1)}", paths, feed, rounds, folder)
    return timings


def prepared(name: str, folder: Path) -> tuple[Path, list[Feed]]:
    """A copy at an opset that all quantizers take, and inputs."""
    source = open_model(gemm(name, folder) if name in MADE else path_of(name))
    feeds = Samples(source, None).require().feeds
    if shape := SHAPES.get(name):
        rng = np.random.default_rng(0)
        feeds = [
            {i.name: _filled(feed[i.name], shape, rng) for i in signature(source.proto)}
            for feed in feeds
        ]
    path = folder / "float32.onnx"
    onnx.save(of_opset(source.path, OPSET), path)
    return path, feeds


def _filled(like: np.ndarray, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    if np.issubdtype(like.dtype, np.floating):
        return rng.standard_normal(shape).astype(like.dtype)
    return np.resize(like, shape)


@contextmanager
def served(path: Path, feed: Path, *entries: str) -> Iterator[Callable[[], tuple[float, float]]]:
    """A process with the model loaded; a call runs it once: seconds, and MiB at the peak."""
    command = [sys.executable, "-c", SERVER, str(path), str(feed), *entries]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as own:
        assert own.stdin
        assert own.stdout
        if not own.stdout.readline():
            raise RuntimeError("does not load or run")

        def run() -> tuple[float, float]:
            print(TURN, file=own.stdin, flush=True)
            seconds, kibibytes = own.stdout.readline().split()
            return float(seconds), int(kibibytes) / 1024

        yield run
        own.stdin.close()


def measured(name: str, wanted: Sequence[str], rounds: int, folder: Path) -> list[Timing]:
    source, feeds = prepared(name, folder)
    paths = {FLOAT: source}
    for file in wanted:
        kind = file if not settings(file) else f"{file.split()[0]} portable"
        path = folder / f"{kind}.onnx"
        try:
            if not path.exists():
                with silence():
                    FILES[kind](source, path, feeds)
        except Exception as error:
            print(f"  {file}: {type(error).__name__}: {str(error)[:100]}", file=sys.stderr)
            path.unlink(missing_ok=True)
            continue
        if not file.startswith("their") or quantized_weights(onnx.load(path).graph):
            paths[file] = path
    return timed(name, paths, feeds[0], rounds, folder) if rounds else []


def timed(name: str, paths: dict[str, Path], feed: Feed, rounds: int, folder: Path) -> list[Timing]:
    """Files that take turns; the first is the one that the others are compared with."""
    np.savez(folder / "feed.npz", **feed)
    inputs = ", ".join("x".join(map(str, value.shape)) or "1" for value in feed.values())
    with ExitStack() as stack:
        runs = {}
        for file, path in paths.items():
            try:
                runs[file] = stack.enter_context(served(path, folder / "feed.npz", *settings(file)))
            except RuntimeError as error:
                print(f"  {file}: {error}", file=sys.stderr)
        seconds = np.empty((rounds, len(runs)))
        peaks = {}
        for turn in seconds:
            for index, (file, run) in enumerate(runs.items()):
                time.sleep(PAUSE)
                turn[index], peaks[file] = run()
    ratios = np.median(seconds / seconds[:, :1], axis=0)
    times = np.median(seconds, axis=0) * 1e3
    return [
        Timing(name, inputs, file, float(ms), float(ratio), peaks[file])
        for file, ms, ratio in zip(runs, times, ratios, strict=True)
    ]


def table(timings: Sequence[Timing], show: Callable[[Timing], str]) -> str:
    known = {t.file for t in timings} - {FLOAT}
    files = [file for file in (*FILES, *EMBEDDINGS) if file in known]
    rows = []
    for model in dict.fromkeys(t.model for t in timings):
        own = {t.file: t for t in timings if t.model == model}
        base = own[FLOAT]
        cells = [show(own[file]) if file in own else "–" for file in files]
        rows.append(
            [model, base.inputs, f"{base.milliseconds:.3g} ms, {base.mebibytes:.0f} MiB", *cells]
        )
    return markdown(("model", "inputs", FLOAT, *files), rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", default=[], metavar="NAME")
    parser.add_argument("--files", nargs="+", default=COMPARED, choices=FILES)
    parser.add_argument("--embeddings", action="store_true", help="forms of a table instead")
    parser.add_argument("--rounds", type=int, default=20, help="0: only make the files")
    parser.add_argument("--folder", type=Path, help="keep files there, and use those that are")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here too")
    parser.add_argument("--load", nargs="+", type=Path, metavar="FILE", help="of earlier runs")
    options = parser.parse_args()
    timings = []
    if options.load:
        for file in options.load:
            timings += [Timing(**row) for row in json.loads(file.read_text())["timings"]]
    elif options.embeddings:
        with tempfile.TemporaryDirectory() as temporary:
            timings = looked_up(options.rounds, Path(temporary))
    else:
        downloaded = [name for name in options.models if name not in MADE]
        models = [name for name in MADE if name in (options.models or MADE)]
        if downloaded or not options.models:
            models += [m.name for m in select(downloaded) if not m.prequantized]
        for name in models:
            print(name, file=sys.stderr)
            with tempfile.TemporaryDirectory() as temporary:
                folder = (options.folder or Path(temporary)) / name
                folder.mkdir(parents=True, exist_ok=True)
                timings += measured(name, options.files, options.rounds, folder)
    if not options.load:
        facts = environment("tools.latency")
        print(heading(facts) + "\n")
        if options.json:
            rows = [asdict(timing) for timing in timings]
            options.json.write_text(json.dumps(facts | {"timings": rows}, indent=1) + "\n")
    print(table(timings, lambda timing: f"{timing.ratio:.2f}"))
    print()
    print(table(timings, lambda timing: f"{timing.mebibytes:.0f}"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
