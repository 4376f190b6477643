"""Whole runs, ours and onnxruntime's quantizers', on the same files: wall time and peak memory.

    python -m tools.whole_runs [--models minilm open_nsfw big] [--repeat 3] [--folder DIR] [--alone]

Every run is a process of its own, start-up included, and the runs on a file take turns. `big` is
made here, in a temporary folder (inside --folder), and removed: 8 MatMul of 9000x9000, 2.6 GB of
external data (--layers and --width change that). Seconds and CPU seconds are the least of the
repetitions. Memory is the resident memory of the process and its children, pages of mapped files
included. The ratios are to onnxruntime's quantizer of the same format; --alone leaves it out, for
models that it has not the memory for.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from tests.helpers.large import save_large
from tools.fetch_models import path_of

OURS = {
    "ours, unvalidated": ("--preserve", "off", "--no-validate"),
    "ours, validated": ("--preserve", "off"),
    "ours, defaults": (),
}
THEIRS = {  # scheme -> name, and what takes `source` to `target` with or without `external` data
    "int8": (
        "quantize_dynamic",
        "from onnxruntime.quantization import QuantType, quantize_dynamic\n"
        "quantize_dynamic(source, target, per_channel=True, weight_type=QuantType.QInt8,\n"
        "                 use_external_data_format=external)",
    ),
    "int4": (
        "MatMulNBits",
        "from onnxruntime.quantization import QuantFormat\n"
        "from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer\n"
        "q = MatMulNBitsQuantizer(source, block_size=32, is_symmetric=True,\n"
        "                         quant_format=QuantFormat.QDQ)\n"
        "q.process()\n"
        "q.model.save_model_to_file(target, external)",
    ),
    "nf4": (
        "MatMulBnb4",
        "import onnx\n"
        "from onnxruntime.quantization.matmul_bnb4_quantizer import MatMulBnb4Quantizer\n"
        "q = MatMulBnb4Quantizer(onnx.load(source), 1, 64)\n"
        "q.process()\n"
        "q.model.save_model_to_file(target, external)",
    ),
}
EVERY = 0.02  # seconds between two looks at the memory


@dataclass(frozen=True)
class Cost:
    """Of one process: seconds, CPU seconds of it and its children, bytes of resident memory."""

    wall: float
    cpu: float
    memory: int

    def least(self, other: "Cost") -> "Cost":
        wall, cpu = min(self.wall, other.wall), min(self.cpu, other.cpu)
        return Cost(wall, cpu, max(self.memory, other.memory))


def cost_of(command: list[str]) -> Cost:
    """Run the command to its end. Raises RuntimeError with what it said if it fails."""
    with tempfile.TemporaryFile("w+") as said:
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=said, stderr=said)
        memory, cpu = 0, 0.0
        while process.poll() is None:
            tree = family(process.pid)
            memory = max(memory, sum(resident(pid) for pid in tree))
            cpu = max(cpu, sum(cpu_seconds(pid) for pid in tree))
            time.sleep(EVERY)
        wall = time.perf_counter() - started
        if process.returncode:
            said.seek(0)
            raise RuntimeError(said.read()[-2000:])
    return Cost(wall, cpu, memory)


def family(pid: int) -> list[int]:
    """The process and its descendants."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return [pid]
    return [pid, *(member for child in children for member in family(int(child)))]


def resident(pid: int, kind: str = "VmRSS") -> int:
    """Bytes in memory now; kind: "RssAnon" leaves out the pages of files."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{kind}:"))


def cpu_seconds(pid: int) -> float:
    """Of the process and of its children that have ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return sum(map(int, fields[11:15])) / 100


def measure(source: Path, schemes: list[str], repeat: int, folder: Path, alone: bool) -> None:
    """Print the table of one model."""
    external = source.with_name(f"{source.name}.data").exists()
    size = sum(file.stat().st_size for file in source.parent.glob(f"{source.name}*"))
    print(f"\n**{source.stem}**, {size / 1e6:,.0f} MB\n")
    print("| scheme | run | seconds | ratio | CPU seconds | ratio | memory, MB | ratio |")
    print("|---|---|---|---|---|---|---|---|")
    for scheme in schemes:
        name, code = THEIRS[scheme]
        target = folder / "target.onnx"
        setting = f"source, target, external = {str(source)!r}, {str(target)!r}, {external}\n"
        commands = {} if alone else {name: [sys.executable, "-c", setting + code]}
        for run, options in OURS.items():
            command = [sys.executable, "-m", "flipguard_onnx", str(source), "--scheme", scheme]
            commands[run] = [*command, "-o", str(target), "--force", "--quiet", *options]
        costs: dict[str, Cost] = {}
        for _ in range(repeat):
            for run, command in commands.items():
                cost = cost_of(command)
                print(f"{source.stem} {scheme} {run}: {cost}", file=sys.stderr, flush=True)
                costs[run] = costs[run].least(cost) if run in costs else cost
                for file in folder.glob("target.onnx*"):
                    file.unlink()
        base = costs.get(name)
        for run, cost in costs.items():
            cells = [f"{cost.wall:.1f}", f"{cost.cpu:.1f}", f"{cost.memory / 1e6:,.0f}"]
            if base:
                ratios = (cost.wall / base.wall, cost.cpu / base.cpu, cost.memory / base.memory)
                cells = [f"{cell} | {ratio:.2f}" for cell, ratio in zip(cells, ratios, strict=True)]
            else:
                cells = [f"{cell} | –" for cell in cells]
            print(f"| {scheme} | {run} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["minilm", "open_nsfw", "big"])
    parser.add_argument("--schemes", nargs="+", default=list(THEIRS), choices=THEIRS)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=9000)
    parser.add_argument("--alone", action="store_true", help="ours alone")
    parser.add_argument("--folder", type=Path, help="where there is room for `big`, twice")
    arguments = parser.parse_args()
    for name in arguments.models:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            source = Path(folder) / "big.onnx"
            if name == "big":
                save_large(source, arguments.layers, arguments.width)
                os.sync()  # or the first run pays for the writing
            else:
                source = path_of(name)
            measure(source, arguments.schemes, arguments.repeat, Path(folder), arguments.alone)


if __name__ == "__main__":
    main()
