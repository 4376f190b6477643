"""Codes and scales equal those of onnxruntime's quantizers and of the naive ones, bit for bit."""

import re

import numpy as np
import pytest
from hypothesis import given, settings

from flipguard_onnx.errors import SchemeError
from flipguard_onnx.formats import FLOAT4, FORMATS, Choice
from flipguard_onnx.quantization.kernels import get_backend
from flipguard_onnx.quantization.schemes import SCHEMES, scheme_of
from tests.helpers import forms, naive, oracles
from tests.helpers.forms import CHOICES, MORE, SEARCHED
from tests.helpers.oracles import ORACLES, PUBLIC
from tests.helpers.tensors import ALL_FLOATS, FLOATS, TENSORS, random, tensor, tensors

CPU = get_backend("cpu")
RECIPROCAL = (
    "int2",
    "uint2",
    "int4",
    "int4-channel",
    "uint4",
    "uint4-channel",
    "int8-block",
    "uint8-block",
)


def fit(form, weights):
    """(scheme, grid) of a 2-D tensor."""
    scheme = forms.scheme(form)
    flat = weights.astype(np.float32).reshape(-1)
    return scheme, scheme.fit(flat, forms.cut(form, *weights.shape), weights.dtype, CPU)


def ours(form, weights):
    """Codes and scales, and zero points where there are some, as the file holds them."""
    scheme, grid = fit(form, weights)
    codes = grid.encode(weights.astype(np.float32).reshape(-1), CPU)
    stored_in = np.float32 if scheme.name in FLOAT4 else weights.dtype
    found = forms.stored(form, codes), grid.scale.astype(stored_in)
    if getattr(scheme, "has_zeros", False):
        return *found, grid.zero - scheme.lowest
    assert not grid.zero.any()
    return found


def naives(form, weights):
    blocks = forms.cut(form, *weights.shape)
    return naive.quantize(form, weights.reshape(blocks.rows, blocks.cols), blocks.size)


def naive_codes(form, weights):
    """As `ours`."""
    blocks = naives(form, weights)
    codes = np.concatenate([b.codes for b in blocks]).astype(np.int16)
    found = codes, np.array([b.scale for b in blocks])
    if form.startswith("u"):
        half = 1 << forms.scheme(form).bits - 1
        zeros = [b.codes[0] - int(b.levels[0]) + half for b in blocks]
        return codes + half, found[1], np.array(zeros)
    return found


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
        if (form, name, dtype) not in {(f, "denormal block", np.float32) for f in RECIPROCAL}
    ],
)
def test_codes_and_scales_equal_onnxruntime(form, name, dtype):
    weights = tensor(name, dtype)
    assert_same(ours(form, weights), ORACLES[form](weights))


@pytest.mark.parametrize("dtype", ALL_FLOATS)
@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("form", CHOICES | MORE)
def test_codes_and_scales_equal_naive(form, name, dtype):
    weights = tensor(name, dtype)
    assert_same(ours(form, weights), naive_codes(form, weights))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("form", PUBLIC)
def test_codes_and_scales_equal_the_public_quantizers(form, dtype, tmp_path):
    weights = tensor("ragged last block", dtype)
    assert_same(ours(form.removesuffix("-static"), weights), PUBLIC[form](weights, tmp_path))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("cols", [100, 128])
def test_k_quant_equals_the_public_quantizer(cols, dtype, tmp_path):
    """Which fails where a row has an odd number of blocks."""
    weights = random(16, cols).astype(dtype)
    assert_same(ours("uint4-k_quant", weights), oracles.public_k_quant(weights, tmp_path))


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
@pytest.mark.parametrize("form", CHOICES)
def test_offsets_equal_naive_and_are_zero_at_the_absmax(form, name):
    weights = tensor(name, np.float32)
    _, grid = fit(form, weights)
    flat = weights.reshape(-1)
    offsets = grid.analyze(flat, CPU).offsets
    low, high = (grid.blocks.spread(end) for end in (grid.scales.low, grid.scales.high))
    frozen = (flat <= low) | (high <= flat)
    expected = [b.offset(i) for b in naives(form, weights) for i in range(len(b.codes))]
    np.testing.assert_array_equal(offsets, np.where(frozen, 0, np.array(expected, np.float32)))


@pytest.mark.parametrize("dtype", ALL_FLOATS)
@pytest.mark.parametrize("form", CHOICES)
def test_encode_inverts_decode(form, dtype):
    _, grid = fit(form, random(4, 512).astype(dtype))
    lowest, highest = forms.range_of(form)
    codes = np.resize(np.arange(lowest, highest + 1), 4 * 512).astype(np.int8)
    if form in forms.TWO_ZEROS:
        codes[codes == 7] = 8  # the level -0 is the level 0
    np.testing.assert_array_equal(grid.encode(grid.decode(codes), CPU), codes)


@pytest.mark.parametrize("dtype", ALL_FLOATS)
@pytest.mark.parametrize("form", CHOICES)
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
    theirs = oracles.bnb4_decoded(scheme.stored[codes], grid.scale, *weights.shape, kind)
    np.testing.assert_array_equal(grid.decode(codes), theirs)


def test_fp4_has_two_codes_for_zero_and_only_negative_weights_take_the_second():
    weights = np.array([[1.0, 0.0, -0.0, 1e-3, -1e-3, -1e-45]], np.float32)
    np.testing.assert_array_equal(ours("fp4", weights)[0], [3, 0, 0, 0, 8, 8])


@pytest.mark.parametrize(
    ("chosen", "named"),
    [
        (
            ("int3",),
            "scheme 'int3' is unknown; allowed: int8, uint8, int4, uint4, "
            "int2, uint2, nf4, fp4, fp8, mxfp4, nvfp4",
        ),
        (("int4", "tensor"), "scheme int4 has no granularity 'tensor'; allowed: block, channel"),
        (("int8", None, 64), "block size 64 goes with blocks; int8 has one scale per channel"),
        (("nf4", None, None, 7.0), "scheme nf4 per block has no scale 7; allowed: none"),
        (("int4", None, None, 127.0), "scheme int4 per block has no scale 127; allowed: 8, 7.5, 7"),
        (("uint4", None, None, 7.0), "scheme uint4 per block has no scale 7; allowed: k_quant"),
        (
            ("uint8", None, None, "k_quant"),
            "scheme uint8 per channel has no scale k_quant; allowed: 127.5",
        ),
        (("uint4", "channel", None, 7.0), "no scale 7; allowed: none, it has zero points"),
        (("uint8", None, None, 127.5, True), "reduced range goes with the usual scale, not 127.5"),
        (("int8", "block", None, None, True), "reduced range is for int8 and uint8 per tensor or"),
    ],
)
def test_a_choice_that_does_not_fit_is_named(chosen, named):
    with pytest.raises(SchemeError, match=re.escape(named)):
        Choice(*chosen)


def test_every_choice_has_a_scheme_and_a_label_of_its_own():
    assert list(SCHEMES) == list(FORMATS)
    choices = (CHOICES | MORE | SEARCHED).values()
    labels = [choice.label for choice in choices]
    assert len(set(labels)) == len(labels)
    for choice in choices:
        assert choice.filled.label == choice.label
        assert scheme_of(choice).choice == choice.filled
