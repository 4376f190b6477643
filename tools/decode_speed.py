"""How fast written language models decode, beside float32 and onnxruntime's own 4-bit quantizer.

    python -m tools.decode_speed FLOAT.onnx GUARDED.onnx ... [--context 128] [--rounds 20]

Every file runs one token at a time: with key and value caches behind `--context` tokens, without
caches alone. The processes take turns (see tools/latency.py); speed and memory are those of the
file / those of MatMulNBits, the median of the rounds' ratios. Memory: the peak of the process,
loading included.

MatMulNBits: MatMulNBitsQuantizer in its own form, blocks of 32, symmetric, with accuracy_level 4,
which rounds activations to 8 bits and is its fastest. unset: without an accuracy level.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

from flipguard_onnx.calibration.text_model import TextModel
from tools.latency import PAUSE, Feed, served
from tools.real_models import environment, heading, markdown, silence

BASE = "MatMulNBits"
LEVELS = {BASE: 4, f"{BASE}, unset": None}  # accuracy_level


@dataclass(frozen=True)
class Decoding:
    """One file. speed, memory: relative to MatMulNBits; mebibytes: peak."""

    file: str
    tokens_per_second: float
    speed: float
    mebibytes: float
    memory: float


def one_token(path: Path, context: int) -> Feed:
    """What a model gets for the token behind `context` others, with the caches of these."""
    text = TextModel.of(onnx.load(path, load_external_data=False))
    if text is None:
        raise SystemExit(f"{path}: takes no token ids")
    known = {text.ids.name: np.ones((1, 1), np.int64)}
    if text.present:
        before = text.filled({text.ids.name: np.ones((1, context), np.int64)})
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        caches = session.run(list(text.present), before)
        known |= zip((cache.name for cache in text.past), caches, strict=True)
    return text.filled(known)


def quantized(source: Path, level: int | None, output: Path) -> None:
    """onnxruntime's form of the model."""
    quantizer = MatMulNBitsQuantizer(
        onnx.load(source), block_size=32, is_symmetric=True, accuracy_level=level
    )
    quantizer.process()
    quantizer.model.save_model_to_file(str(output), use_external_data_format=True)


def measured(paths: Mapping[str, Path], feed: Path, rounds: int) -> list[Decoding]:
    """Every file, in turns."""
    seconds = np.empty((rounds, len(paths)))
    peaks = {}
    with ExitStack() as stack:
        runs = {file: stack.enter_context(served(path, feed)) for file, path in paths.items()}
        for turn in seconds:
            for index, (file, run) in enumerate(runs.items()):
                time.sleep(PAUSE)
                turn[index], peaks[file] = run()
    base = list(paths).index(BASE)
    speeds = np.median(seconds[:, base, None] / seconds, axis=0)
    rates = 1 / np.median(seconds, axis=0)
    return [
        Decoding(file, float(rate), float(speed), peaks[file], peaks[file] / peaks[BASE])
        for file, rate, speed in zip(paths, rates, speeds, strict=True)
    ]


def table(rows: Sequence[Decoding]) -> str:
    cells = []
    for r in rows:
        speed = f"{r.tokens_per_second:.1f}", f"{r.speed:.2f}"
        cells.append([r.file, *speed, f"{r.mebibytes:.0f}", f"{r.memory:.2f}"])
    return markdown(("file", "tokens/s", "speed", "MiB", "memory"), cells)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("float", type=Path, metavar="FLOAT.onnx")
    parser.add_argument("guarded", type=Path, nargs="+", metavar="GUARDED.onnx")
    parser.add_argument("--context", type=int, default=128, help="tokens before the one decoded")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        feed = Path(temporary) / "feed.npz"
        np.savez(feed, **one_token(options.float, options.context))
        paths = {"float32": options.float}
        for number, (name, level) in enumerate(LEVELS.items()):
            paths[name] = Path(temporary) / str(number) / "model.onnx"
            paths[name].parent.mkdir()
            with silence():
                quantized(options.float, level, paths[name])
        paths |= {str(path): path for path in options.guarded}
        rows = measured(paths, feed, options.rounds)
    facts = environment("tools.decode_speed")
    print(heading(facts) + "\n")
    print(table(rows))
    if options.json:
        content = facts | {"decoding": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
