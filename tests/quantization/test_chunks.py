"""A tensor in parts is what it is as a whole."""

import time

import numba
import numpy as np
import onnx
import pytest

from flipguard_onnx.graph.weights import find_weights
from flipguard_onnx.io.model import open_model
from flipguard_onnx.pipeline.plan import Format
from flipguard_onnx.quantization import chunks as parts
from flipguard_onnx.quantization.kernels import get_backend, threads
from flipguard_onnx.quantization.rounding import Policy, flip, tensor_key
from tests.helpers.samples import SAMPLES, matmul, save, weights


def whole_and_in_parts(tmp_path, proto, form, size, monkeypatch, policy=None):
    source = open_model(save(proto, tmp_path))
    weight = find_weights(source.proto)[0][0]
    scheme, blocks = form.plan(weight)
    options = policy or Policy(), tensor_key(3, weight.name), get_backend("cpu")
    whole = flip(
        weight.name, weight.canonical(source.array(weight.tensor)), scheme, blocks, *options
    )
    monkeypatch.setattr(parts, "PART", size)
    count = len(list(parts.parts(weight, blocks, size)))
    return whole, parts.flip_weight(source, weight, scheme, blocks, *options), count


def assert_same(one, other):
    assert one.grid.same_as(other.grid)
    assert one.grid.blocks == other.grid.blocks
    for name in ("plain", "codes", "guarded"):
        assert np.array_equal(getattr(one, name), getattr(other, name))


@pytest.mark.parametrize("scheme", ["int8", "int4", "nf4", "fp4"])
@pytest.mark.parametrize("sample", ["matmul", "gemm_transposed", "matmul_batched", "lstm", "conv"])
@pytest.mark.parametrize("size", [1, 500, 1000])
def test_parts_are_the_whole(tmp_path, monkeypatch, sample, scheme, size):
    proto = SAMPLES[sample]()
    whole, joined, count = whole_and_in_parts(tmp_path, proto, Format(scheme), size, monkeypatch)
    # blocks of a codebook that run across the batch cannot be cut there
    assert count > 1 or (scheme in ("nf4", "fp4") and sample == "matmul_batched")
    assert_same(whole, joined)


def test_topk_in_parts(tmp_path, monkeypatch):
    form, policy = Format("nf4"), Policy("topk", ratio=0.3)
    whole, joined, count = whole_and_in_parts(tmp_path, matmul(), form, 500, monkeypatch, policy)
    assert count > 1
    assert_same(whole, joined)


@pytest.mark.parametrize("sample", ["matmul", "matmul_batched", "conv"])
@pytest.mark.parametrize("policy", [Policy(), Policy("topk", ratio=0.3), Policy("none")])
def test_one_scale_for_the_tensor_in_parts(tmp_path, monkeypatch, sample, policy):
    form, proto = Format("int8", granularity="tensor"), SAMPLES[sample]()
    whole, joined, count = whole_and_in_parts(tmp_path, proto, form, 500, monkeypatch, policy)
    assert count > 1
    assert_same(whole, joined)


def test_a_batch_of_matrices_is_cut_within_the_matrices(tmp_path):
    source = open_model(save(SAMPLES["matmul_batched"](), tmp_path))
    weight = find_weights(source.proto)[0][0]
    each = int(np.prod(weight.shape[1:]))
    cut = list(parts.parts(weight, weight.blocks(None, flat=False), each // 4))
    assert max(part.cut.rows * part.cut.cols for part in cut) <= each // 4
    assert sum(part.cut.rows * part.cut.cols for part in cut) == weight.size


def test_values_come_back_in_the_stored_layout(tmp_path, monkeypatch):
    source = open_model(save(matmul(), tmp_path))
    weight = find_weights(source.proto)[0][0]
    scheme, blocks = Format("int4").plan(weight)
    values = weight.canonical(source.array(weight.tensor))
    flips = flip("w", values, scheme, blocks, Policy(), np.uint64(1), get_backend("cpu"))
    monkeypatch.setattr(parts, "PART", 500)
    decoded = parts.stored(weight, flips, lambda f: f.grid.decode(f.codes), np.dtype("f4"))
    assert np.array_equal(decoded, weight.stored(flips.grid.decode(flips.codes)))


def test_moved_weights_only_where_they_are_wanted(tmp_path):
    source = open_model(save(matmul(), tmp_path))
    weight = find_weights(source.proto)[0][0]
    arguments = *Format().plan(weight), Policy(), np.uint64(1), get_backend("cpu")
    assert parts.flip_weight(source, weight, *arguments, moved=False).guarded is None


def test_all_values_that_are_not_finite_are_counted(tmp_path, monkeypatch):
    bad = weights((70, 33))
    bad[[1, 3, 5], [2, 20, 32]] = np.nan
    proto = matmul()
    proto.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(bad, "w"))
    monkeypatch.setattr(parts, "PART", 200)
    source = open_model(save(proto, tmp_path))
    weight = find_weights(source.proto)[0][0]
    with pytest.raises(parts.ModelError, match="tensor 'w' holds 3 values"):
        parts.flip_weight(
            source, weight, *Format().plan(weight), Policy(), np.uint64(1), get_backend("cpu")
        )


def test_an_error_on_the_way_ends_all_parts(tmp_path, monkeypatch):
    source = open_model(save(matmul((64, 2000)), tmp_path))
    weight = find_weights(source.proto)[0][0]
    scheme, blocks = Format("int4").plan(weight)
    arguments = scheme, blocks, Policy(), tensor_key(1, "w"), get_backend("cpu")
    parts.flip_weight(source, weight, *arguments)  # from here on kernels may run side by side
    monkeypatch.setattr(parts, "PART", 64)
    assert len(list(parts.parts(weight, blocks, 64))) == 2000
    seen = []

    def done(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        parts.flip_weight(source, weight, *arguments, look=lambda *_: seen.append(1), done=done)
    count = len(seen)
    assert 0 < count < 2000
    time.sleep(0.2)
    assert len(seen) == count


def test_kernels_run_side_by_side_only_where_threads_may(monkeypatch):
    backend = get_backend("cpu")
    monkeypatch.setattr(numba, "get_num_threads", lambda: 64)
    for layer, most in (("omp", 8), ("tbb", 8), ("workqueue", 1)):
        monkeypatch.setattr(numba, "threading_layer", lambda layer=layer: layer)
        assert threads(backend) == most
    assert threads(parts) == 1  # any other backend
