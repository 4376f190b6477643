"""Codes and scales equal those of onnxruntime's quantizers and of the naive ones, bit for bit."""

import numpy as np
import pytest
from hypothesis import given, settings

from flipguard_onnx.errors import SchemeError
from flipguard_onnx.quantization.kernels import get_backend
from flipguard_onnx.quantization.schemes import SCHEMES, Blocks, Codebook, get_scheme
from tests.helpers import naive, oracles
from tests.helpers.oracles import CUTS, ORACLES, PUBLIC
from tests.helpers.tensors import ALL_FLOATS, FLOATS, TENSORS, random, tensor, tensors

CPU = get_backend("cpu")


def fit(form, weights):
    """(scheme, grid) of a 2-D tensor."""
    scheme = SCHEMES[form.split("-")[0]]
    flat = weights.astype(np.float32).reshape(-1)
    return scheme, scheme.fit(flat, Blocks(*CUTS[form](*weights.shape)), weights.dtype, CPU)


def stored(scheme, codes):
    return scheme.stored[codes] if isinstance(scheme, Codebook) else codes


def ours(form, weights):
    scheme, grid = fit(form, weights)
    codes = grid.encode(weights.astype(np.float32).reshape(-1), CPU)
    return stored(scheme, codes), grid.scale.astype(weights.dtype)


def naives(form, weights):
    rows, cols, size = CUTS[form](*weights.shape)
    return naive.quantize(form.split("-")[0], weights.reshape(rows, cols), size)


def naive_codes(form, weights):
    blocks = naives(form, weights)
    return np.concatenate([b.codes for b in blocks]), np.array([b.scale for b in blocks])


def assert_same(found, expected):
    for ours_, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours_.astype(np.float64), theirs.astype(np.float64))


@pytest.mark.parametrize(
    ("form", "name", "dtype"),
    [
        (form, name, dtype)
        for form in ORACLES
        for name in TENSORS
        for dtype in FLOATS
        # the reciprocal of that scale is infinite, and C leaves open what int(inf) is
        if (form, name, dtype) != ("int4", "denormal block", np.float32)
    ],
)
def test_codes_and_scales_equal_onnxruntime(form, name, dtype):
    weights = tensor(name, dtype)
    assert_same(ours(form, weights), ORACLES[form](weights))


@pytest.mark.parametrize("dtype", ALL_FLOATS)
@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("form", CUTS)
def test_codes_and_scales_equal_naive(form, name, dtype):
    weights = tensor(name, dtype)
    assert_same(ours(form, weights), naive_codes(form, weights))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("form", PUBLIC)
def test_codes_and_scales_equal_the_public_quantizers(form, dtype, tmp_path):
    weights = tensor("ragged last block", dtype)
    assert_same(ours(form.removesuffix("-static"), weights), PUBLIC[form](weights, tmp_path))


@pytest.mark.parametrize("form", ORACLES)
@settings(max_examples=40, deadline=None)
@given(weights=tensors())
def test_any_tensor_equals_onnxruntime(form, weights):
    assert_same(ours(form, weights), ORACLES[form](weights))


@pytest.mark.parametrize("dtype", FLOATS)
def test_int4_equals_the_matmul_nbits_form_away_from_half_steps(dtype):
    weights = tensor("ragged last block", dtype)
    assert_same(ours("int4", weights), oracles.int4_matmul_nbits(weights))


@pytest.mark.parametrize("name", ["random", "odd sizes", "negative zero", "pivots", "half steps"])
@pytest.mark.parametrize("form", CUTS)
def test_offsets_equal_naive_and_are_zero_at_the_absmax(form, name):
    weights = tensor(name, np.float32)
    _, grid = fit(form, weights)
    flat = weights.reshape(-1)
    offsets = grid.analyze(flat, CPU).offsets
    frozen = np.abs(flat) == grid.blocks.spread(grid.absmax)
    expected = [b.offset(i) for b in naives(form, weights) for i in range(len(b.codes))]
    np.testing.assert_array_equal(offsets, np.where(frozen, 0, np.array(expected, np.float32)))


@pytest.mark.parametrize("dtype", ALL_FLOATS)
@pytest.mark.parametrize("form", CUTS)
def test_encode_inverts_decode(form, dtype):
    _, grid = fit(form, random(4, 512).astype(dtype))
    lowest, highest = (-127, 127) if "int8" in form else (-8, 7) if form == "int4" else (0, 15)
    codes = np.resize(np.arange(lowest, highest + 1), 4 * 512).astype(np.int8)
    if form == "fp4":
        codes[codes == 7] = 8  # the level -0 is the level 0
    np.testing.assert_array_equal(grid.encode(grid.decode(codes), CPU), codes)


@pytest.mark.parametrize("dtype", ALL_FLOATS)
@pytest.mark.parametrize("form", CUTS)
def test_decode_equals_naive(form, dtype):
    weights = tensor("ragged last block", dtype)
    _, grid = fit(form, weights)
    decoded = grid.decode(grid.encode(weights.astype(np.float32).reshape(-1), CPU))
    expected = np.concatenate([b.decoded for b in naives(form, weights)])
    np.testing.assert_array_equal(decoded, expected)


@pytest.mark.parametrize("name", ["ragged last block", "negative zero", "pivots", "all zero"])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_codebook_decodes_as_matmul_bnb4_does(kind, name):
    weights = tensor(name, np.float32)
    scheme, grid = fit(kind, weights)
    codes = grid.encode(weights.reshape(-1), CPU)
    theirs = oracles.bnb4_decoded(stored(scheme, codes), grid.scale, *weights.shape, kind)
    np.testing.assert_array_equal(grid.decode(codes), theirs)


def test_fp4_has_two_codes_for_zero_and_only_negative_weights_take_the_second():
    weights = np.array([[1.0, 0.0, -0.0, 1e-3, -1e-3, -1e-45]], np.float32)
    np.testing.assert_array_equal(ours("fp4", weights)[0], [3, 0, 0, 0, 8, 8])


def test_unknown_scheme_is_named():
    with pytest.raises(SchemeError, match=r"'int3'.*int8, int4, nf4, fp4"):
        get_scheme("int3")
