"""Run what we write in other runtimes, and compare with onnxruntime: a Markdown table.

    python tools/fetch_models.py
    python -m tools.runtimes [--run RUNTIME=PLACE...] [--models NAME[=FILE]...] [--forms NAME...]
        [--targets NAME...] [--json FILE]

RUNTIME=PLACE is one of these; the name may go on behind a colon (onnxruntime:oldest=...):

    reference=PYTHON      onnx.ReferenceEvaluator
    onnxruntime=PYTHON    another version than the one that runs this
    openvino=PYTHON       on the CPU, in float32; by default it quantizes activations block by block
    openvino-exact=PYTHON without that
    web=FOLDER            onnxruntime-web's WebAssembly in node, from FOLDER/node_modules
    chromium=FOLDER       the same in a headless Chromium, by selenium and chromedriver
    webgpu=FOLDER         its WebGPU provider there, on SwiftShader instead of a GPU

PYTHON is the interpreter of an environment with the runtime and numpy. Without --run the table has
what this interpreter can import. Every run is a process of its own.

A cell is the relative L2 distance of the float outputs from those of this onnxruntime without its
optimizations, on the same file and inputs; drift: its own distance from the float model. float32 is
the input model: a runtime that computes something else there is asked no further. In brackets, for
OpenVINO: the share of the guarded weights that are integers in the compiled model, and the memory
that loading and running take at their peak.
"""

import argparse
import base64
import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import product
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np

import flipguard_onnx
from flipguard_onnx.calibration.samples import Samples
from flipguard_onnx.io.model import open_model
from tools.fetch_models import path_of
from tools.real_models import environment, heading, markdown, silence

MODELS = ("open_nsfw", "minilm", "fsmn_vad", "silero_vad", "silero_vad_ifless", "lac")
FLOAT = "float32"
DRIFT = "drift"  # the column of what all are compared with
DASH = "\N{EN DASH}"
TARGETS = ("portable", "onnxruntime")
FORMS: dict[str, dict[str, Any]] = {
    "int8": {"scheme": "int8"},
    "int8 per tensor": {"granularity": "tensor"},
    "int8 in blocks": {"granularity": "block"},
    "uint8": {"scheme": "uint8"},
    "int4": {"scheme": "int4"},
    "int4 per channel": {"scheme": "int4", "granularity": "channel"},
    "uint4": {"scheme": "uint4"},
    "nf4": {"scheme": "nf4"},
    "fp4": {"scheme": "fp4"},
    "int8, uint8 activations": {"activations": "uint8"},
    "int8, int8 activations": {"activations": "int8", "symmetric": True},
}
DISAGREES = 1e-3  # relative L2 on the float model from which on a runtime is not asked further
LIMIT = 300  # seconds that a run may take

PYTHON = """
import base64, json, sys
import numpy as np
def peak():
    with open("/proc/self/status") as status:
        return next(int(s.split()[1]) for s in status if s.startswith("VmHWM")) // 1024
with open(sys.argv[2]) as file:
    rows = json.load(file).items()
feed = {n: np.frombuffer(bytearray(base64.b64decode(d)), t).reshape(s) for n, (t, s, d) in rows}
before, facts = peak(), {}
def finish(outputs):
    facts["outputs"] = [
        [str(o.dtype), o.shape, base64.b64encode(o.tobytes()).decode()]
        for o in map(np.asarray, outputs)
    ]
    facts["mebibytes"] = peak() - before
    print(json.dumps(facts))
"""

ONNXRUNTIME = """
import onnxruntime
facts["version"] = onnxruntime.__version__
options = onnxruntime.SessionOptions()
options.log_severity_level = 4
if sys.argv[3:] == ["exact"]:
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
session = onnxruntime.InferenceSession(sys.argv[1], options, ["CPUExecutionProvider"])
finish(session.run(None, feed))
"""

REFERENCE = """
import onnx, onnx.reference, onnx.version_converter
facts["version"] = onnx.__version__
model = onnx.load(sys.argv[1])
if max(entry.version for entry in model.opset_import if not entry.domain) < 19:
    model = onnx.version_converter.convert_version(model, 21)  # it has no older DequantizeLinear
finish(onnx.reference.ReferenceEvaluator(model).run(None, feed))
"""

OPENVINO = """
import math
import openvino
facts["version"] = openvino.__version__.partition("-")[0]
core = openvino.Core()
settings = {"INFERENCE_PRECISION_HINT": "f32"}
if sys.argv[3:] == ["exact"]:
    settings["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = "0"
model = core.compile_model(core.read_model(sys.argv[1]), "CPU", settings)
outputs = model(feed)
constants = {}
for node in model.get_runtime_model().get_ops():
    about = {key: value.astype(str) for key, value in node.get_rt_info().items()}
    if about.get("layerType") == "Const" and node.get_output_partial_shape(0).is_static:
        kind = about["outputPrecisions"]
        constants[kind] = constants.get(kind, 0) + math.prod(node.get_output_shape(0))
facts["constants"] = constants
finish([outputs[index] for index in range(len(model.outputs))])
"""

WEB = """
async function run(ort, model, given, provider, externalData) {
    const of = {float32: Float32Array, int32: Int32Array, int64: BigInt64Array, bool: Uint8Array,
                uint8: Uint8Array, int8: Int8Array};
    const bytes = text => Uint8Array.from(atob(text), c => c.charCodeAt(0));
    const feed = {};
    for (const [name, [type, shape, data]] of Object.entries(given))
        feed[name] = new ort.Tensor(type, new of[type](bytes(data).buffer), shape);
    ort.env.logLevel = "fatal";
    ort.env.wasm.numThreads = 1;
    const session = await ort.InferenceSession.create(
        model, {executionProviders: [provider], externalData});
    const results = await session.run(feed);
    const outputs = [];
    for (const name of session.outputNames) {
        const {type, dims, data} = results[name];
        const raw = new Uint8Array(data.buffer, data.byteOffset, data.byteLength);
        let text = "";
        for (let i = 0; i < raw.length; i += 4096)
            text += String.fromCharCode(...raw.subarray(i, i + 4096));
        outputs.push([type, dims, btoa(text)]);
    }
    return {version: ort.env.versions.web, outputs};
}
"""

NODE = """
import {readFileSync} from "fs";
import {createRequire} from "module";
import {dirname, join} from "path";
const [folder, model, feed, ...names] = process.argv.slice(2);
const ort = createRequire(folder + "/")("onnxruntime-web");
const data = names.map(path => ({path, data: readFileSync(join(dirname(model), path))}));
run(ort, readFileSync(model), JSON.parse(readFileSync(feed)), "wasm", data).then(
    facts => console.log(JSON.stringify(facts)),
    error => { console.error(String(error)); process.exit(1); });
"""

PAGE = """
const done = arguments[arguments.length - 1];
(async () => {
    const ort = await import(`/dist/${arguments[0]}`);
    const read = async path => new Uint8Array(await (await fetch(path)).arrayBuffer());
    const data = [];
    for (const path of arguments[2]) data.push({path, data: await read(`/data/${path}`)});
    const feed = await (await fetch("/feed")).json();
    return run(ort, await read("/model"), feed, arguments[1], data);
})().then(done, error => done({error: String(error)}));
"""


@dataclass(frozen=True)
class Result:
    """What a runtime made of a file: its outputs, or why there are none."""

    outputs: list[np.ndarray] = field(default_factory=list)
    version: str = ""
    problem: str = ""
    mebibytes: int | None = None
    constants: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Cell:
    """One file in one runtime. distance: relative L2 from onnxruntime's outputs."""

    model: str
    form: str
    target: str
    runtime: str
    version: str
    distance: float | None
    problem: str
    mebibytes: int | None
    integers: float | None


Run = Callable[[Path, Path], Result]
Feed = dict[str, np.ndarray]


def python(script: str, interpreter: str, model: Path, feed: Path, *options: str) -> Result:
    """A runtime with Python's bindings."""
    return answer([interpreter, "-c", PYTHON + script, str(model), str(feed), *options])


def exact(model: Path, feed: Path) -> Result:
    """This onnxruntime without its optimizations, some of which quantize activations."""
    return python(ONNXRUNTIME, sys.executable, model, feed, "exact")


def node(folder: str, model: Path, feed: Path) -> Result:
    """onnxruntime-web in node."""
    with tempfile.NamedTemporaryFile("w", suffix=".mjs") as script:
        script.write(WEB + NODE)
        script.flush()
        places = [str(Path(folder).resolve()), str(model), str(feed)]
        return answer(["node", script.name, *places, *open_model(model).data_sha256])


def answer(command: Sequence[str]) -> Result:
    """What a process prints as its last line, or the last line of its error."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        return Result(problem=f"takes longer than {LIMIT} s")
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return Result(problem=said[-1])
    return result(json.loads(done.stdout.strip().splitlines()[-1]))


def result(facts: dict[str, Any]) -> Result:
    outputs = [
        np.frombuffer(base64.b64decode(data), kind).reshape(shape)
        for kind, shape, data in facts.pop("outputs")
    ]
    return Result(outputs, **facts)


def browser(provider: str, bundle: str, folder: str, model: Path, feed: Path) -> Result:
    """onnxruntime-web in Chromium, which gets everything from a server of ours."""
    from selenium import webdriver
    from selenium.common.exceptions import WebDriverException

    package = Path(folder) / "node_modules" / "onnxruntime-web"
    data = list(open_model(model).data_sha256)
    own = {"/model": model, "/feed": feed}
    own |= {f"/data/{name}": model.parent / name for name in data}

    class Handler(SimpleHTTPRequestHandler):
        def translate_path(self, path: str) -> str:
            return str(own.get(path) or package / path.lstrip("/"))

        def log_message(self, format: str, *args: object) -> None:
            pass

    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--enable-unsafe-webgpu",
                     "--use-webgpu-adapter=swiftshader", "--enable-features=Vulkan"):  # fmt: skip
        options.add_argument(argument)
    service = webdriver.ChromeService("/usr/bin/chromedriver")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        driver = webdriver.Chrome(options, service)
        try:
            driver.set_script_timeout(LIMIT)
            driver.command_executor.client_config.timeout = 2 * LIMIT  # or it gives up before
            driver.get(f"http://127.0.0.1:{server.server_address[1]}/package.json")
            facts = driver.execute_async_script(WEB + PAGE, bundle, provider, data)
        except WebDriverException as error:
            return Result(problem=str(error.msg).splitlines()[0])
        finally:
            driver.quit()
            server.shutdown()
    return Result(problem=facts["error"]) if "error" in facts else result(facts)


RUNTIMES: dict[str, Callable[[str], Run]] = {
    "reference": lambda place: partial(python, REFERENCE, place),
    "onnxruntime": lambda place: partial(python, ONNXRUNTIME, place),
    "openvino": lambda place: partial(python, OPENVINO, place),
    "openvino-exact": lambda place: lambda *files: python(OPENVINO, place, *files, "exact"),
    "web": lambda place: partial(node, place),
    "chromium": lambda place: partial(browser, "wasm", "ort.wasm.min.mjs", place),
    "webgpu": lambda place: partial(browser, "webgpu", "ort.webgpu.min.mjs", place),
}


def here() -> dict[str, Run]:
    """The runtimes that this interpreter has."""
    names = ["reference", "onnxruntime"]
    if importlib.util.find_spec("openvino"):
        names += ["openvino", "openvino-exact"]
    return {name: RUNTIMES[name](sys.executable) for name in names}


def distance(outputs: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> float:
    """Relative L2 over all float outputs together; infinite where their shapes differ."""
    if [o.shape for o in outputs] != [e.shape for e in expected]:
        return float("inf")
    floats = [index for index, e in enumerate(expected) if np.issubdtype(e.dtype, np.floating)]
    own, others = (
        np.concatenate([values[i].astype(float).ravel() for i in floats or range(len(values))])
        for values in (outputs, expected)
    )
    return float(np.linalg.norm(own - others) / max(np.linalg.norm(others), 1e-30))


def encoded(feed: Feed) -> str:
    """Inputs as JSON, which every runtime's language reads."""
    rows = {
        name: (
            str(value.dtype),
            value.shape,
            base64.b64encode(np.ascontiguousarray(value)).decode(),
        )
        for name, value in feed.items()
    }
    return json.dumps(rows)


def compare(
    model: str, forms: Sequence[str], targets: Sequence[str], runtimes: dict[str, Run], folder: Path
) -> Iterator[Cell]:
    """Every form of one model in every runtime. model: a name that can be fetched, or name=file."""
    name, _, file = model.partition("=")
    source, feed = Path(file) if file else path_of(name), folder / f"{name}.json"
    feed.write_text(encoded(inputs(source)))
    original = exact(source, feed)
    asked = {}
    for runtime, run in runtimes.items():
        cell = compared(name, FLOAT, "", runtime, run(source, feed), original)
        yield cell
        if cell.distance is not None and cell.distance < DISAGREES:
            asked[runtime] = run
    for form, target in product(forms, targets):
        path = folder / f"{name} {form} {target}.onnx"
        try:
            weights = guarded(source, form, target, path)
        except flipguard_onnx.FlipguardError as error:
            say(f"{name} {form} {target}: {error}")
            continue
        wanted = exact(path, feed)
        yield compared(name, form, target, DRIFT, wanted, original)
        if wanted.problem:
            continue
        for runtime, run in asked.items():
            yield compared(name, form, target, runtime, run(path, feed), wanted, weights)


def inputs(source: Path) -> Feed:
    """The first of those that the guard makes up."""
    return Samples(open_model(source), None).require().feeds[0]


def guarded(source: Path, form: str, target: str, output: Path) -> int:
    """Write a model in this form; how many weights were guarded."""
    options = FORMS[form] | {"target": target}
    with silence():
        report = flipguard_onnx.guard(
            source, output=output, seed=1, preserve="off", validate=False, force=True, **options
        )
    return report.weights


def compared(
    model: str, form: str, target: str, runtime: str, got: Result, wanted: Result, weights: int = 0
) -> Cell:
    integers = sum(got.constants.get(kind, 0) for kind in ("i8", "u8", "i4", "u4"))
    cell = Cell(
        model,
        form,
        target,
        runtime,
        got.version,
        None if got.problem else distance(got.outputs, wanted.outputs),
        got.problem,
        got.mebibytes if got.constants else None,
        integers / weights if weights and got.constants else None,
    )
    say(cell)
    return cell


def table(cells: Sequence[Cell]) -> str:
    runtimes = list(dict.fromkeys(cell.runtime for cell in cells))
    runtimes.sort(key=lambda runtime: runtime != DRIFT)
    versions = {cell.runtime: cell.version for cell in cells if cell.version}
    rows = {(cell.model, cell.form, cell.target): [DASH] * len(runtimes) for cell in cells}
    for cell in cells:
        rows[cell.model, cell.form, cell.target][runtimes.index(cell.runtime)] = shown(cell)
    heads = (f"{runtime} {versions.get(runtime, '')}".strip() for runtime in runtimes)
    return markdown(("model", "form", "target", *heads), ([*k, *row] for k, row in rows.items()))


def shown(cell: Cell) -> str:
    if cell.problem:
        return "fails"
    parts = [] if cell.integers is None else [f"{cell.integers:.0%}"]
    parts += [] if cell.mebibytes is None else [f"{cell.mebibytes} MiB"]
    return f"{cell.distance:.0e}" + (f" ({', '.join(parts)})" if parts else "")


def problems(cells: Sequence[Cell]) -> str:
    """The errors, each once."""
    found: dict[tuple[str, str], list[str]] = {}
    for cell in cells:
        if cell.problem:
            where = " ".join(filter(None, (cell.model, cell.form, cell.target)))
            found.setdefault((cell.runtime, " ".join(cell.problem.split())[:300]), []).append(where)
    return "\n".join(f"- {r}: {'; '.join(where)}: {why}" for (r, why), where in found.items())


def say(what: object) -> None:
    print(what, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--run", nargs="+", default=[], metavar="RUNTIME=PLACE")
    parser.add_argument("--models", nargs="+", default=MODELS, metavar="NAME[=FILE]")
    parser.add_argument("--forms", nargs="+", default=list(FORMS), choices=FORMS)
    parser.add_argument("--targets", nargs="+", default=TARGETS, choices=TARGETS)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here too")
    parser.add_argument(
        "--load", nargs="+", default=[], type=Path, metavar="FILE", help="of earlier runs"
    )
    options = parser.parse_args(arguments)
    runtimes = here()
    for given in options.run:
        name, _, place = given.partition("=")
        kind = name.partition(":")[0]
        if kind not in RUNTIMES or not place:
            parser.error(f"--run {given}: RUNTIME=PLACE, and RUNTIME one of {', '.join(RUNTIMES)}")
        runtimes[name] = RUNTIMES[kind](place)
    cells = [Cell(**row) for file in options.load for row in json.loads(file.read_text())["cells"]]
    for model in () if options.load else options.models:
        with tempfile.TemporaryDirectory() as folder:
            cells += compare(model, options.forms, options.targets, runtimes, Path(folder))
    facts = environment("tools.runtimes")
    print(f"{heading(facts)}\n\n{table(cells)}\n\n{problems(cells)}")
    if options.json:
        rows = [asdict(cell) for cell in cells]
        options.json.write_text(json.dumps(facts | {"cells": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
