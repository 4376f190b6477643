"""What the CUDA compiler makes of the kernels: IEEE divisions, no product fused with a sum.

Compiling needs no GPU, but the package numba-cuda (extra `ptx`). Run as a script (`python
tests/test_ptx.py 8 0`) it prints the PTX of every kernel for one compute capability, since numba
keeps device functions compiled for the first.
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
KERNELS = {"_extremes", "_analyze", "_draw", "_place", "_check", "_feed"}
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
        assert bool(divisions) == (name != "_extremes")
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
    from flipguard_onnx.quantization.schemes import SCHEMES, Blocks

    device = SimpleNamespace(compute_capability=capability)
    numba.cuda.dispatcher.get_current_device = lambda: device  # device functions ask for one

    def array(kind, dimensions=1):
        return types.Array(kind, dimensions, "C")

    floats, codes, keys = array(types.float32), array(types.int8), array(types.int32)
    key, index, limit = types.uint64, types.int64, types.float32
    cut = types.UniTuple(index, 2)
    one = np.ones(1, np.float32)
    levels = numba.typeof(SCHEMES["nf4"].grid(one, one, Blocks(1, 1, 1), one.dtype).levels)
    for word in (types.uint32, types.uint16):
        weights, grid = array(word), [index, index, cut, floats, floats, levels]
        scaled = [index, index, cut, floats, floats, floats, levels]
        panel = [index, array(limit, 3), array(index, 2), index, key, limit]
        arguments = {
            "_extremes": [index, index, cut, keys, keys, weights],
            "_analyze": [*grid, weights, codes, floats],
            "_draw": [*grid, key, key, limit, weights, codes, codes],
            "_place": [*scaled, codes, weights, codes],
            "_check": [*grid, keys, keys, array(index), weights, weights, codes, codes],
            "_feed": [*scaled, *panel, *(array(x, 2) for x in (word, limit, types.int8, limit))],
        }
        for name, signature in arguments.items():
            kernel = getattr(kernels, name).py_func
            ptx, _ = cuda.compile(
                kernel, tuple(signature), cc=capability, output="ptx", abi="numba", device=False
            )
            print(f"kernel {name} {word}\n{ptx}")


if __name__ == "__main__":
    print_ptx((int(sys.argv[1]), int(sys.argv[2])))
