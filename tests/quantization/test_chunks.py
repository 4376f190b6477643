"""A tensor in parts is what it is as a whole."""

import doctest
import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from flipguard_onnx.errors import ModelError
from flipguard_onnx.quantization import layout as layout_module
from flipguard_onnx.quantization.chunks import quantize_weight, stored_values
from flipguard_onnx.quantization.kernels import get_backend, max_threads, side_by_side
from flipguard_onnx.quantization.kernels.cuda import CudaKernels
from flipguard_onnx.quantization.kernels.threads import share_out
from flipguard_onnx.quantization.layout import Layout
from flipguard_onnx.quantization.parts import parts
from flipguard_onnx.quantization.rounding import Policy, quantize_tensor, tensor_key
from flipguard_onnx.quantization.schemes import SCHEMES
from tests.helpers.cores import on_cores
from tests.helpers.samples import weights

CPU = get_backend("cpu")
KEY = tensor_key(3, "w")
UNBIASED = Policy()
LAYOUTS = {
    "matmul": Layout((70, 33), (1,)),
    "gemm transposed": Layout((33, 70), (0,)),
    "batch of matrices": Layout((3, 70, 33), (0, 2)),
    "conv": Layout((16, 8, 3, 3), (0,)),
    "transposed conv": Layout((8, 16, 3, 3), (1,)),
    "lstm": Layout((2, 64, 17), (0, 1)),
}

SIZES = 1, 500, 1000

COUNTS = {  # of parts of those sizes, in whole rows
    "matmul": (33, 5, 3),
    "gemm transposed": (33, 5, 3),
    "batch of matrices": (99, 15, 9),
    "conv": (16, 3, 2),
    "transposed conv": (16, 3, 2),
    "lstm": (128, 6, 4),
}


def cut(layout, scheme, granularity="channel"):
    """The blocks that guard() would use."""
    if scheme.bits == 8:
        return layout.blocks(None, flat=granularity == "tensor")
    return layout.blocks(scheme.block_size, flat=scheme.flat)


def quantized(array, layout, scheme, blocks, policy=UNBIASED, **options):
    return quantize_weight("w", array, layout, scheme, blocks, policy, KEY, CPU, **options)


def whole_and_in_parts(layout, scheme, blocks, size, policy=UNBIASED):
    array = weights(layout.shape)
    flat = layout.canonical(array)
    whole = quantize_tensor("w", flat, scheme, blocks, policy, KEY, CPU)
    joined = quantized(array, layout, scheme, blocks, policy, part_size=size)
    return whole, joined, len(list(parts(layout, blocks, size)))


def assert_same(one, other):
    assert one.grid.same_as(other.grid)
    assert one.grid.blocks == other.grid.blocks
    for name in ("nearest", "codes", "guarded"):
        assert np.array_equal(getattr(one, name), getattr(other, name))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("size", SIZES)
def test_parts_are_the_whole(name, scheme, size):
    layout, scheme = LAYOUTS[name], SCHEMES[scheme]
    blocks = cut(layout, scheme)
    whole, joined, count = whole_and_in_parts(layout, scheme, blocks, size)
    if scheme.flat:  # where its blocks run across a batch, that cannot be cut
        assert count == (1 if name == "batch of matrices" else 2)
    else:
        assert count == COUNTS[name][SIZES.index(size)]
    assert_same(whole, joined)


def test_topk_in_parts():
    layout, scheme = LAYOUTS["matmul"], SCHEMES["nf4"]
    policy = Policy("topk", ratio=0.3)
    whole, joined, count = whole_and_in_parts(layout, scheme, cut(layout, scheme), 500, policy)
    assert count == 2
    assert_same(whole, joined)


@pytest.mark.parametrize("name", ["matmul", "batch of matrices", "conv"])
@pytest.mark.parametrize("policy", [Policy(), Policy("topk", ratio=0.3), Policy("none")])
def test_one_scale_for_the_tensor_in_parts(name, policy):
    layout, scheme = LAYOUTS[name], SCHEMES["int8"]
    blocks = cut(layout, scheme, "tensor")
    whole, joined, count = whole_and_in_parts(layout, scheme, blocks, 500, policy)
    assert count == COUNTS[name][SIZES.index(500)]
    assert_same(whole, joined)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_tensor_that_is_no_larger_than_a_part_is_one(name, scheme):
    layout = LAYOUTS[name]
    blocks = cut(layout, SCHEMES[scheme])
    (part,) = parts(layout, blocks, layout.size)
    assert part.blocks == blocks
    assert part.weights == slice(0, layout.size)
    assert part.block_numbers == slice(0, blocks.count)


def test_a_batch_of_matrices_is_cut_within_the_matrices():
    layout = LAYOUTS["batch of matrices"]
    each = int(np.prod(layout.shape[1:]))
    sizes = [
        part.blocks.rows * part.blocks.cols
        for part in parts(layout, layout.blocks(None, flat=False), each // 4)
    ]
    assert max(sizes) <= each // 4
    assert sum(sizes) == layout.size


@pytest.mark.parametrize("name", LAYOUTS)
def test_values_come_back_as_the_tensor_is_stored(name):
    layout, scheme = LAYOUTS[name], SCHEMES["int4"]
    result = quantized(weights(layout.shape), layout, scheme, cut(layout, scheme))
    decoded = stored_values(
        layout, result, lambda part: part.grid.decode(part.codes), np.dtype("f4"), part_size=500
    )
    assert np.array_equal(decoded, layout.stored(result.grid.decode(result.codes)))


def test_the_example_in_the_documentation():
    results = doctest.testmod(layout_module)
    assert (results.failed, results.attempted) == (0, 4)


@pytest.mark.parametrize("name", LAYOUTS)
def test_canonical_order_is_rows_of_output_channels(name):
    layout = LAYOUTS[name]
    array = weights(layout.shape)
    flat = layout.canonical(array)
    assert np.array_equal(layout.stored(flat), array)
    channels = int(np.prod([layout.shape[axis] for axis in layout.rows]))
    first = tuple(0 if axis in layout.rows else slice(None) for axis in range(array.ndim))
    assert np.array_equal(flat.reshape(channels, -1)[0], array[first].reshape(-1))


def test_moved_weights_only_where_they_are_wanted():
    layout, scheme = LAYOUTS["matmul"], SCHEMES["int8"]
    array, blocks = weights(layout.shape), cut(layout, scheme)
    assert quantized(array, layout, scheme, blocks, keep_moved=False).guarded is None


@pytest.mark.parametrize("bad", [np.nan, np.inf, 3.4028235e38])
def test_all_values_that_are_not_sound_are_counted(bad):
    layout, scheme = LAYOUTS["matmul"], SCHEMES["int8"]
    array = weights(layout.shape)
    array[[1, 3, 5], [2, 20, 32]] = bad
    message = r"^tensor 'w' holds 3 values that are NaN.*as it is\)$"
    with pytest.raises(ModelError, match=message) as error:
        quantized(array, layout, scheme, cut(layout, scheme), part_size=200)
    assert (error.value.tensor, error.value.found, error.value.path) == ("w", 3, None)


def test_an_error_on_the_way_ends_all_parts():
    layout, scheme = Layout((64, 2000), (1,)), SCHEMES["int4"]
    array, blocks = weights(layout.shape), cut(layout, scheme)
    assert len(list(parts(layout, blocks, 64))) == 2000
    seen = []

    def interrupt(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantized(
            array,
            layout,
            scheme,
            blocks,
            inspect_part=lambda *_: seen.append(1),
            on_part_done=interrupt,
            part_size=64,
        )
    count = len(seen)
    assert 0 < count < 2000
    time.sleep(0.2)
    assert len(seen) == count


def test_threads_are_the_cores_of_the_process_but_on_a_gpu():
    available = os.sched_getaffinity(0)
    assert 1 <= max_threads(CPU) <= min(len(available), 8)
    with on_cores(1):
        assert max_threads(CPU) == 1
    assert os.sched_getaffinity(0) == available
    assert max_threads(CudaKernels()) == 1


def test_numba_num_threads_is_the_most():
    program = "from flipguard_onnx.quantization.kernels import *; print(max_threads(get_backend()))"
    for given in ("1", "2"):
        environment = os.environ | {"NUMBA_NUM_THREADS": given}
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True
        )
        assert int(done.stdout) == min(int(given), len(os.sched_getaffinity(0))), done.stderr


@pytest.mark.parametrize("count", [1, 2, 7, 1000])
def test_every_item_is_in_one_range(count):
    seen = []
    share_out(lambda start, stop: seen.extend(range(start, stop)), count, 1 << 30)
    assert sorted(seen) == list(range(count))


def test_what_is_little_work_starts_no_thread():
    threads = set()
    share_out(lambda *_: threads.add(threading.get_ident()), 1000, 1000)
    assert threads == {threading.get_ident()}


def test_threads_start_no_others():
    def inner(_):
        mine = set()
        share_out(lambda *_: mine.add(threading.get_ident()), 1000, 1 << 30)
        return mine == {threading.get_ident()}

    assert all(side_by_side(inner, range(4), 2))
