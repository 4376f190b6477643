"""What the CUDA compiler makes of the kernels: IEEE divisions, no product fused with a sum.

Compiling needs no GPU, but the package numba-cuda (extra `ptx`). Run as a script (`python
tests/quantization/test_ptx.py 8 0`) it prints the PTX of every kernel for one compute capability;
numba would keep the device functions compiled for the first one in a process.
"""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

CAPABILITIES = [(7, 5), (8, 0), (9, 0)]
KERNELS = {"extremes", "analyze", "draw", "move_weights", "check", "draw_with_feedback"}
ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(not importlib.util.find_spec("numba_cuda"), reason="numba-cuda is missing")
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_kernel_compiles_to_ieee_arithmetic(capability):
    command = [sys.executable, "-W", "ignore", __file__, *map(str, capability)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    parts = re.split(r"^kernel (\w+) \w+$", done.stdout, flags=re.MULTILINE)[1:]
    compiled = list(zip(parts[::2], parts[1::2], strict=True))
    assert sorted(name for name, _ in compiled) == sorted([*KERNELS] * 2)
    for name, ptx in compiled:
        assert f".target sm_{capability[0]}{capability[1]}" in ptx
        divisions = re.findall(r"\bdiv\.\S*f(?:32|64)\b", ptx)
        assert set(divisions) <= {"div.rn.f32"}, name
        assert bool(divisions) == (name != "extremes")
        assert not re.findall(r"\b(?:fma|mad)\.\S*f32\b|\bapprox\b|\bftz\b", ptx), name
        assert not fusible(ptx), name


def fusible(ptx):
    """Sums of float32 with a product for an operand: the assembler, too, may fuse these."""
    products = set(re.findall(r"\bmul\.f32 \t?(%f\w+),", ptx))
    sums = re.findall(r"\b(?:add|sub)\.f32 \t?%\w+, (%?\w+), (%?\w+);", ptx)
    return [operands for operands in sums if products & set(operands)]


@pytest.mark.parametrize(("operand", "found"), [("%f3", True), ("%f1", False)])
def test_fusible_sums_are_found(operand, found):
    ptx = f"mul.f32 \t%f3, %f1, %f2;\nadd.f32 \t%f4, {operand}, %f2;\n"
    assert bool(fusible(ptx)) == found


def print_ptx(capability):
    import numba.cuda.dispatcher
    import numpy as np
    from numba import cuda, types

    from flipguard_onnx.quantization.kernels import cuda as kernels
    from flipguard_onnx.quantization.kernels.protocol import Extremes, RandomDraw, Scales
    from flipguard_onnx.quantization.schemes import SCHEMES, Blocks

    device = SimpleNamespace(compute_capability=capability)
    numba.cuda.dispatcher.get_current_device = lambda: device  # device functions ask for one

    def array(kind, dimensions=1):
        return types.Array(kind, dimensions, "C")

    floats, codes, keys = array(types.float32), array(types.int8), array(types.int32)

    def named(kind, *fields):
        return types.NamedTuple(fields, kind)

    index, one = types.int64, np.ones(1, np.float32)
    grid = SCHEMES["nf4"].grid(Extremes(one, one), Blocks(1, 1, 1), one.dtype)
    grid = [types.NamedUniTuple(floats, len(Scales._fields), Scales), numba.typeof(grid.levels)]
    tensor = types.NamedUniTuple(index, 3, kernels.SharedWeights)
    extremes = types.NamedUniTuple(keys, 2, Extremes)
    random = named(RandomDraw, types.uint64, types.uint64, types.float32)
    factors, order = array(types.float32, 3), array(index, 2)
    panel = named(kernels.SharedPanel, factors, order, index, index)
    for word in (types.uint32, types.uint16):
        weights, rows = array(word), array(word, 2)
        table, matrix = array(types.float32, 2), array(types.int8, 2)
        arguments = {
            "extremes": [index, tensor, extremes, weights],
            "analyze": [index, tensor, *grid, weights, codes, floats],
            "draw": [index, tensor, *grid, random, weights, codes, codes],
            "move_weights": [index, tensor, *grid, codes, floats, weights, codes],
            "check": [
                index, tensor, *grid, extremes, array(index), weights, weights, codes, floats,
                codes,
            ],
            "draw_with_feedback": [
                index, tensor, *grid, panel, random, rows, table, matrix, table,
            ],
        }  # fmt: skip
        for name, signature in arguments.items():
            kernel = getattr(kernels, name).py_func
            ptx, _ = cuda.compile(
                kernel, tuple(signature), cc=capability, output="ptx", abi="numba", device=False
            )
            print(f"kernel {name} {word}\n{ptx}")


if __name__ == "__main__":
    print_ptx((int(sys.argv[1]), int(sys.argv[2])))
