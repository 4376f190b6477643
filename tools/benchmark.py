"""How fast the kernels are, against a copy of the same array in memory.

    python -m tools.benchmark [--weights N] [--repeats N] [--schemes NAME...] [--types NAME...]
    python -m tools.benchmark --first-run [--repeats N]

The first prints a Markdown table, a row per scheme and storage type. All but the last column are
times as multiples of the copy's, the smallest of several repetitions each, copy and job in turn:

codes: fit the grid, then the code and the offset of every weight; drawn: the same with an unbiased
draw instead of the offsets, nearest and drawn codes; guard: all of `quantize_tensor`, with the
arrays that it returns; floats: the same with the weights moved for `--emit float`, and checked;
numpy: grid and codes, written in plain numpy; onnxruntime: its own quantizer on any number of
threads, without bfloat16. two threads: how many times as fast `drawn` is on two as on one, by the
clock on the wall; all others are CPU time of one thread, but onnxruntime's, which is wall time,
too. Per tensor, int8 is one block; otherwise blocks are of 64 weights.

The second prints what the command line takes for a model of 90,000 weights, in processor time of
all its processes: first, with no compiled kernels, and next, with those of the run before. Each is
the least of the repetitions.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnxruntime.capi import _pybind_state as native
from onnxruntime.quantization.quant_utils import quantize_data

from flipguard_onnx.quantization.kernels import get_backend
from flipguard_onnx.quantization.kernels.protocol import RandomDraw
from flipguard_onnx.quantization.rounding import Policy, quantize_tensor
from flipguard_onnx.quantization.schemes import SCHEMES, Blocks, Codebook
from tests.helpers.cores import on_cores
from tests.helpers.samples import matmul, save

FORMS = ("int8", "int8-tensor", "int4", "nf4", "fp4")
TYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
COLS, BLOCK = 4096, 64
RANDOM = RandomDraw(key=np.uint64(1), first=np.uint64(0), limit=np.float32(0))  # all are drawn
CPU = get_backend("cpu")

Job = Callable[[], Any]


@dataclass(frozen=True)
class Case:
    """One scheme on one tensor of [rows, COLS]."""

    form: str
    values: np.ndarray

    @property
    def scheme(self) -> Any:
        return SCHEMES[self.form.partition("-")[0]]

    @property
    def blocks(self) -> Blocks:
        size = self.values.size
        if self.form == "int8-tensor":
            return Blocks(1, size, size)
        return Blocks(size // COLS, COLS, BLOCK)

    def kernels(self, name: str) -> Job:
        """Fit and run one kernel, into arrays that are there already."""
        blocks, size = self.blocks, self.values.size
        extremes, weights = blocks.no_extremes(), blocks.weights(self.values)
        nearest, drawn = np.empty(size, np.int8), np.empty(size, np.int8)
        offsets = np.empty(size, np.float32)

        def run() -> None:
            CPU.extremes(weights, extremes)
            grid = self.scheme.grid(extremes, blocks, self.values.dtype)
            if name == "analyze":
                CPU.analyze(weights, grid.scales, grid.levels, nearest, offsets)
            else:
                CPU.draw(weights, grid.scales, grid.levels, RANDOM, nearest, drawn)

        return run

    def guard(self, moved: bool) -> Job:
        given = "w", self.values, self.scheme, self.blocks, Policy(), RANDOM.key, CPU
        return lambda: quantize_tensor(*given, moved=moved)

    def numpy(self) -> Job:
        rows = self.values.reshape(self.blocks.count, -1)
        scheme = self.scheme

        def run() -> np.ndarray:
            weights = rows.astype(np.float32)
            absmax = np.abs(weights).max(axis=1, keepdims=True)
            if isinstance(scheme, Codebook):
                return np.searchsorted(scheme.pivots, weights * (1 / absmax)).astype(np.int8)
            steps = np.rint(weights / (absmax / (127 if scheme.bits == 8 else 8)))
            return np.clip(steps, -(2 ** (scheme.bits - 1)), 127).astype(np.int8)

        return run

    def onnxruntime(self) -> Job | None:
        if self.values.dtype not in (np.float32, np.float16):
            return None
        rows = self.values.reshape(-1, COLS)
        cols, size = len(rows), self.values.size
        if self.scheme.bits == 8:
            parts = [self.values] if self.form == "int8-tensor" else rows
            return lambda: [quantize_data(p, onnx.TensorProto.INT8, symmetric=True) for p in parts]
        packed = np.empty(size // 2, np.uint8)
        scales = np.empty(size // BLOCK, self.values.dtype)
        if isinstance(self.scheme, Codebook):
            kind = self.scheme.bnb4_type
            return lambda: native.quantize_matmul_bnb4(
                packed, rows, scales, BLOCK, kind, cols, COLS
            )
        zero_points = np.empty(size // BLOCK // 2, np.uint8)
        return lambda: native.quantize_qdq_matmul_4bits(
            packed, rows, scales, zero_points, BLOCK, COLS, cols, True
        )


def ratio(job: Job, copy: Job, clock: Callable[[], float], repeats: int) -> float:
    """Time of the job / of the copy, of each the least of several; one more warms up."""
    times = np.array([[seconds(run, clock) for run in (job, copy)] for _ in range(repeats + 1)])
    least = times[1:].min(axis=0)
    return float(least[0] / least[1])


def seconds(job: Job, clock: Callable[[], float]) -> float:
    start = clock()
    job()
    return clock() - start


def speedup(job: Job, repeats: int) -> float:
    """Wall time on one thread / on two, interleaved."""
    times: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(repeats + 1):
        for threads, found in times.items():
            with on_cores(threads):
                found.append(seconds(job, time.perf_counter))
    return min(times[1][1:]) / min(times[2][1:])


def row(case: Case, repeats: int) -> list[str]:
    target = np.empty_like(case.values)

    def copy() -> None:
        np.copyto(target, case.values)

    drawn = case.kernels("draw")
    guards = [case.guard(moved) for moved in (False, True)]
    jobs = [case.kernels("analyze"), drawn, *guards, case.numpy()]
    with on_cores(1):
        cells = [f"{ratio(job, copy, time.thread_time, repeats):.2f}" for job in jobs]
    own = case.onnxruntime()
    cells.append(f"{ratio(own, copy, time.perf_counter, repeats):.1f}" if own else "–")
    both = f"{speedup(drawn, repeats):.2f}" if len(os.sched_getaffinity(0)) > 1 else "–"
    nanoseconds = min(seconds(copy, time.thread_time) for _ in range(repeats)) / case.values.size
    return [case.form, str(case.values.dtype), f"{nanoseconds * 1e9:.2f}", *cells, both]


def first_and_next(arguments: list[str]) -> tuple[float, float]:
    """Processor time of the command line with an empty cache, and with what that run left."""
    with tempfile.TemporaryDirectory() as folder:
        model = save(matmul(shape=(300, 300)), Path(folder))
        command = [sys.executable, "-m", "flipguard_onnx", *arguments, str(model)]
        found = []
        for _ in range(2):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            environment = os.environ | {"XDG_CACHE_HOME": folder}
            subprocess.run(command, env=environment, check=True, capture_output=True)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            found.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return found[0], found[1]


def first_runs(repeats: int) -> None:
    print("| run | first, CPU s | next, CPU s |\n| --- | --- | --- |")
    for scheme in ("int8", "int4", "nf4", None):
        arguments = ["guard", "--force", "--scheme", scheme] if scheme else ["scan"]
        first, following = np.min([first_and_next(arguments) for _ in range(repeats)], axis=0)
        print(f"| {scheme or 'scan'} | {first:.1f} | {following:.1f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=int, default=1 << 24, help="a multiple of 4096")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--schemes", nargs="*", choices=FORMS, default=FORMS)
    parser.add_argument("--types", nargs="*", choices=TYPES, default=[*TYPES])
    parser.add_argument("--first-run", action="store_true")
    options = parser.parse_args()
    if options.first_run:
        first_runs(options.repeats)
        return
    weights = np.random.default_rng(0).standard_normal(options.weights, np.float32)
    header = ["scheme", "type", "copy, ns a weight", "codes", "drawn", "guard", "floats"]
    print("|", " | ".join([*header, "numpy", "onnxruntime", "two threads"]), "|")
    print("|", " | ".join(["---"] * 10), "|")
    for dtype in options.types:
        values = weights.astype(TYPES[dtype])
        for form in options.schemes:
            print("|", " | ".join(row(Case(form, values), options.repeats)), "|", flush=True)


if __name__ == "__main__":
    main()
