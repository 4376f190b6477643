"""The kernels: CPU and CUDA twins, the random stream, the choice of device.

Run as a script (`NUMBA_ENABLE_CUDASIM=1 python tests/quantization/test_kernels.py`) it compares the
twins in numba's CUDA simulator, which has to be chosen before numba is imported.
"""

import inspect
import os
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numba
import numba.cuda
import numpy as np
import pytest

from flipguard_onnx.detection.alignment import Counted, Repetition, tally
from flipguard_onnx.errors import DeviceError
from flipguard_onnx.quantization.error_feedback import InputMoments, draw_with_feedback
from flipguard_onnx.quantization.kernels import (
    get_backend,
    get_scan_kernels,
    scalar,
    what_cuda_lacks,
)
from flipguard_onnx.quantization.kernels.cuda import CudaKernels
from flipguard_onnx.quantization.kernels.protocol import Kernels, RandomDraw, ScanKernels
from flipguard_onnx.quantization.kernels.threads import ENOUGH
from flipguard_onnx.quantization.rounding import Policy, quantize_tensor, tensor_key
from flipguard_onnx.quantization.schemes import SCHEMES, Blocks
from flipguard_onnx.quantization.schemes.blocks import FORMS
from tests.helpers import forms
from tests.helpers.cores import on_cores
from tests.helpers.forms import CHOICES
from tests.helpers.samples import matmul, save

CPU = get_backend("cpu")
KEY = np.uint64(2**64 - 5)
LIMIT = np.float32(0.1)
ROOT = Path(__file__).parents[2]


def methods(protocol):
    found = {n: f for n, f in vars(protocol).items() if callable(f) and not n.startswith("_")}
    return {name: parameters(function)[1:] for name, function in found.items()}


def parameters(function):
    return list(inspect.signature(getattr(function, "py_func", function)).parameters)


@pytest.mark.parametrize(
    ("kernels", "protocol"),
    [(CPU, Kernels), (CudaKernels(), Kernels), (get_scan_kernels(), ScanKernels)],
    ids=["cpu", "cuda", "scan"],
)
def test_kernels_have_the_methods_of_their_protocol(kernels, protocol):
    expected = methods(protocol)
    assert len(expected) == (6 if protocol is Kernels else 3)
    assert {name: parameters(getattr(kernels, name)) for name in expected} == expected


def test_kernels_name_their_device():
    assert (CPU.device, CudaKernels().device) == ("cpu", "cuda")


def test_twins_agree_in_the_simulator():
    command = [sys.executable, "-W", "ignore", __file__]
    environment = {**os.environ, "NUMBA_ENABLE_CUDASIM": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [f"{form}:equal" for form in CHOICES]


def compare_twins():
    assert get_backend("cuda") == CudaKernels()
    # idle threads cost as much as busy ones here, and several blocks are run; two streams, and a
    # last tile that is not full
    gpu = CudaKernels(threads=32, tile=96)
    for form in CHOICES:
        compare_kernels(form, edge_cases().astype(np.float32), gpu)
        for dtype in (np.float16, ml_dtypes.bfloat16):
            compare_tensors(form, edge_cases().astype(dtype), gpu)
        print(f"{form}:equal")


def compare_kernels(form, weights, gpu):
    scheme = forms.scheme(form)
    blocks = forms.cut(form, *weights.shape)
    flat = weights.reshape(-1)

    def steps(kernels):
        yield from blocks.extremes(flat, kernels)
        grid = scheme.fit(flat, blocks, flat.dtype, CPU)
        margins = grid.analyze(flat, kernels)
        yield from (margins.codes, margins.offsets)
        nearest, drawn = grid.draw(flat, RandomDraw(KEY, np.uint64(2**40), LIMIT), kernels)
        yield from (nearest, drawn)
        far = np.where(margins.offsets != 0, grid.encode(-flat, CPU), margins.codes)
        for wanted in (margins.neighbours, far):
            yield from grid.move_weights(flat, margins, wanted, kernels)
        moved, codes = grid.move_weights(flat, margins, drawn, CPU)
        for stated in (codes, nearest):
            checked = grid.check(flat, moved, margins, stated, kernels)
            yield from (*checked.extremes, np.array([checked.wrong, checked.moved]))
        random = RandomDraw(KEY, np.uint64(0), LIMIT)
        yield draw_with_feedback(flat, grid, inputs_of(weights), random, kernels, panel_width=32)

    for step, (ours, theirs) in enumerate(zip(steps(CPU), steps(gpu), strict=True)):
        assert ours.tobytes() == theirs.tobytes(), (form, step)


def inputs_of(weights):
    """Inputs with correlations, for a layer of two groups; several spans and panels."""
    rows, columns = weights.shape
    fresh = np.random.default_rng(1).standard_normal((rows, 40, columns)).astype(np.float32)
    fresh += fresh[:, :, ::-1]
    spans = range(50), range(50, columns)
    parts = [fresh[:, :, span.start : span.stop].astype(np.float64) for span in spans]
    return InputMoments(spans, tuple(p.transpose(0, 2, 1) @ p for p in parts), fresh)


def compare_tensors(form, weights, gpu):
    scheme, key = forms.scheme(form), tensor_key(3, "w")
    blocks = forms.cut(form, *weights.shape)
    ours, theirs = (
        quantize_tensor("w", weights.reshape(-1), scheme, blocks, Policy(), key, kernels)
        for kernels in (CPU, gpu)
    )
    assert ours.count > 0
    assert ours.codes.tobytes() == theirs.codes.tobytes(), form
    assert ours.guarded.tobytes() == theirs.guarded.tobytes(), form


def edge_cases():
    """Two rows of 70: random weights, half steps, both zeros, an all-zero block, a ragged one."""
    weights = 0.05 * np.random.default_rng(0).standard_normal((2, 70))
    weights[0, :8] = [127 / 512, 0.5 / 512, 1.5 / 512, -2.5 / 512, -0.0, 0.0, -1e-9, 1e-7]
    weights[1, :32] = 0
    return weights


def test_extremes_of_ragged_blocks():
    weights = np.array([3, 1, 2, -5, 7, 0, 0, -1, 8, -9], np.float32)
    low, high = Blocks(2, 5, 2).extremes(weights, CPU)
    np.testing.assert_array_equal(low, [1, -5, 7, 0, -1, -9])
    np.testing.assert_array_equal(high, [3, 2, 7, 0, 8, -9])


HALVES = [np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)]


def every(dtype):
    """All 65,536 values of a 16-bit type, by bit pattern."""
    return np.arange(2**16, dtype=np.uint16).view(dtype)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_16_bit_value_is_read_exactly(dtype):
    values = every(dtype)
    for found in Blocks(1, values.size, 1).extremes(values, CPU):
        expected = values.astype(np.float32)
        numbers = ~np.isnan(expected)
        assert numbers.sum() > 63_000
        np.testing.assert_array_equal(np.isnan(found), ~numbers)
        assert found[numbers].tobytes() == expected[numbers].tobytes()


@pytest.mark.filterwarnings("ignore:.*nextafter:RuntimeWarning")
@pytest.mark.parametrize("end", [np.inf, -np.inf])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_16_bit_value_has_its_pattern_and_neighbours(dtype, end):
    values, form = every(dtype), FORMS[dtype]
    values = values[np.isfinite(values.astype(np.float32))]
    bits = values.view(np.uint16).astype(np.uint32)
    following = np.nextafter(values, np.array(end, dtype))
    found = numba.vectorize(scalar.next_pattern)(bits, end > 0, form)
    np.testing.assert_array_equal(found, following.view(np.uint16))
    pattern = numba.vectorize(scalar.pattern)
    numbers = values.astype(np.float32)
    np.testing.assert_array_equal(pattern(numbers, form), bits)
    between = np.nextafter(numbers, np.float32(end))
    found = pattern(between, form).astype(np.uint16).view(dtype)
    assert np.all((found == values) | (found == following))


@pytest.mark.parametrize("upward", [True, False])
def test_neighbours_of_float32_are_numpys(upward):
    numbers = np.array([0.0, -0.0, 1e-45, -1e-45, 1.0, -1.0, 3e38, 1.5e-38], np.float32)
    expected = np.nextafter(numbers, np.float32(np.inf if upward else -np.inf))
    words = [scalar.next_pattern(w, upward, scalar.FLOAT32) for w in numbers.view(np.uint32)]
    np.testing.assert_array_equal(np.array(words, np.uint32), expected.view(np.uint32))


@pytest.mark.skipif(numba.cuda.is_available(), reason="there is a GPU")
def test_auto_without_a_gpu_is_the_cpu_and_the_reason_is_known():
    assert get_backend("auto") is CPU
    assert "NVIDIA" in what_cuda_lacks()


def test_compiling_is_announced_once_and_only_where_the_cache_lacks_a_kernel(tmp_path):
    program = """
import numpy as np
from flipguard_onnx.quantization.kernels import compiling, get_backend
from flipguard_onnx.quantization.schemes import Blocks
with compiling(lambda: print("compiling")):
    for dtype in np.float32, np.float16:
        Blocks(1, 8, 8).extremes(np.zeros(8, dtype), get_backend("cpu"))
print("done")
"""
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": os.getcwd()}
    for expected in (["compiling", "done"], ["done"]):
        command = [sys.executable, "-c", program]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.stdout.split() == expected, done.stderr


@pytest.mark.parametrize("form", CHOICES)
def test_what_a_scan_counts_does_not_depend_on_threads(form):
    weights = np.random.default_rng(0).standard_normal((4, 2 * ENOUGH // 4), np.float32)
    blocks = forms.cut(form, *weights.shape)
    grid = forms.scheme(form).fit(weights.reshape(-1), blocks, weights.dtype, CPU)

    def counted():
        flat = weights.reshape(-1)
        found = tally(Counted(flat, flat, Repetition(1, 1)), grid)
        return [x.tobytes() for x in (found.counts, found.sums, found.outliers)]

    with on_cores(1):
        alone = counted()
    assert counted() == alone


SIGNATURES = 48  # of kernels and helpers that a first run compiles


def test_a_first_run_compiles_few_kernels_and_other_schemes_none(tmp_path):
    """Counted, since seconds depend on the machine: a run waits 0.2 s for each."""
    program = """
import sys
from numba.core import event
import flipguard_onnx
compiled = event.RecordingListener()
event.register("numba:compile", compiled)
for scheme in "int8", "int4", "nf4", "fp4":
    output = f"{sys.argv[1]}.{scheme}.onnx"
    flipguard_onnx.guard(sys.argv[1], scheme=scheme, output=output, validate=False)
    print(sum(e.is_start for _, e in compiled.buffer))
flipguard_onnx.scan(sys.argv[1])
print(sum(e.is_start for _, e in compiled.buffer))
"""
    path = save(matmul(shape=(64, 48)), tmp_path)
    quick = {"XDG_CACHE_HOME": str(tmp_path), "NUMBA_OPT": "0", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program, str(path)]
    done = subprocess.run(command, env=os.environ | quick, capture_output=True, text=True)
    first, *others = map(int, done.stdout.split())
    assert 0 < first <= SIGNATURES * 4 // 3, done.stderr
    assert others == [first] * 4


def drawn(offsets, key, limit):
    """Which of these offsets cross: weights under an int8 scale of 1."""
    weights = np.append(np.asarray(offsets, np.float32), np.float32(127))
    blocks = Blocks(1, weights.size, weights.size)
    grid = SCHEMES["int8"].fit(weights, blocks, weights.dtype, CPU)
    random = RandomDraw(np.uint64(key), np.uint64(0), np.float32(limit))
    nearest, codes = grid.draw(weights, random, CPU)
    return (nearest != codes)[:-1]


def test_stream_is_splitmix64():
    """Published vectors of SplitMix64 seeded with 1234567; a draw uses the upper 24 bits."""
    vectors = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    uniforms = np.array([v >> 40 for v in vectors], np.float32) * np.float32(2.0**-24)
    np.testing.assert_array_equal(uniforms < 0.5, [True, True, False, True])
    chances = np.minimum(uniforms, np.float32(0.5))  # no offset is larger
    assert not drawn(chances, 1234567, 0).any()
    above = np.nextafter(chances, np.float32(1))
    np.testing.assert_array_equal(drawn(above, 1234567, 0), [True, True, False, True])


@pytest.mark.parametrize("chance", [0.01, 0.25, -0.5])
def test_draw_flips_with_the_given_probability(chance):
    n = 200_000
    flips = drawn(np.full(n, chance), 5, 0)
    p = abs(chance)
    assert abs(flips.mean() - p) < 6 * np.sqrt(p * (1 - p) / n)
    assert not drawn(np.full(n, chance), 5, p).any()


def test_unknown_device_is_named():
    with pytest.raises(DeviceError, match=r"'tpu'.*auto, cpu, cuda"):
        get_backend("tpu")


@pytest.mark.skipif(numba.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu_is_refused():
    with pytest.raises(DeviceError, match=r"^device 'cuda' is not usable: .*NVIDIA.*$"):
        get_backend("cuda")


if __name__ == "__main__":
    compare_twins()
