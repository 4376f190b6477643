"""What a guard of a language model takes, stage by stage, beside one pass over its samples.

    python -m tools.feedback_speed FILE.onnx [-- OPTIONS OF GUARD]

A pass: onnxruntime runs the float model on as many tokens as error feedback makes up, 8,192 and an
eighth for the comparison of draws, in texts of 64. Seconds are those of the clock.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime

from flipguard_onnx.calibration.text_model import TextModel
from tools.large_decoder import by_stage
from tools.real_models import markdown

TEXTS, LENGTH, TOGETHER = 150, 64, 10


def guarded(model: Path, options: Sequence[str]) -> dict[str, float]:
    """Seconds of each stage of a guard."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "guarded.onnx"
        command = [sys.executable, "-m", "flipguard_onnx", str(model), "-o", str(output), *options]
        lines = [(time.perf_counter(), "start")]
        with subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        ) as process:
            assert process.stderr
            for line in process.stderr:
                lines.append((time.perf_counter(), line.rstrip()))
    if process.returncode:
        raise RuntimeError(lines[-1][1])
    return by_stage(lines, time.perf_counter())


def one_pass(model: Path) -> float:
    """Seconds."""
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    text = TextModel.of(onnx.load(model, load_external_data=False))
    assert text
    tokens = np.random.default_rng(0).integers(0, text.ids.table_rows, (TEXTS, LENGTH))
    feeds = [text.filled({text.ids.name: some}) for some in np.split(tokens, TEXTS // TOGETHER)]
    session.run([text.logits], feeds[0])  # the first takes longer
    started = time.perf_counter()
    for each in feeds:
        session.run([text.logits], each)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("options", nargs="*", help="of guard, after --")
    arguments = parser.parse_args()
    passed = one_pass(arguments.model)
    stages = guarded(arguments.model, arguments.options)
    rows = {"one pass": passed, **stages, "all stages": sum(stages.values())}
    print(
        markdown(
            ("stage", "seconds", "passes"),
            [(name, f"{s:.1f}", f"{s / passed:.2f}") for name, s in rows.items()],
        )
    )


if __name__ == "__main__":
    main()
