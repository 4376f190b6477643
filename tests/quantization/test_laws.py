"""Laws of every scheme, for any weights: ragged last blocks and all-zero blocks among them."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flipguard_onnx.formats import FLOAT4
from flipguard_onnx.quantization.kernels import get_backend
from flipguard_onnx.quantization.rounding import Policy, quantize_tensor, tensor_key
from flipguard_onnx.quantization.schemes import Blocks
from tests.helpers import forms
from tests.helpers.forms import CHOICES, SEARCHED

CPU = get_backend("cpu")
POLICIES = [Policy(), Policy(tau=0.4), Policy("topk", ratio=0.25), Policy("topk", ratio=1.0)]


@st.composite
def tensors(draw):
    """Rows of any length, most of which end in a short block; stretches of them may be zero."""
    dtype = draw(st.sampled_from([np.float32, np.float16, ml_dtypes.bfloat16]))
    rows, cols = draw(st.integers(1, 4)), draw(st.integers(1, 200))
    scale = 10.0 ** draw(st.integers(-3, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    weights = scale * rng.standard_normal(rows * cols)
    for start in draw(st.lists(st.integers(0, rows * cols), max_size=3)):
        weights[start : start + 130] = 0  # longer than two blocks: a whole one is among them
    return weights.reshape(rows, cols).astype(dtype)


def setting(form, weights):
    """The scheme, and the blocks of these weights."""
    return forms.scheme(form), forms.cut(form, *weights.shape)


def levels_of(form, codes):
    """Codes, where two that stand for the same level are one."""
    return np.where(codes == 7, 8, codes) if form in forms.TWO_ZEROS else codes  # -0 and 0


@pytest.mark.parametrize("form", CHOICES)
@settings(max_examples=60, deadline=None)
@given(weights=tensors(), seed=st.integers(0, 2**32))
def test_encode_inverts_decode(form, weights, seed):
    """Wherever a block has a scale of its own: the levels of all others are zero."""
    scheme, blocks = setting(form, weights)
    flat = weights.astype(np.float32).reshape(-1)
    grid = scheme.fit(flat, blocks, weights.dtype, CPU)
    low, high = forms.range_of(form)
    codes = np.random.default_rng(seed).integers(low, high, flat.size, np.int8, endpoint=True)
    found = grid.encode(grid.decode(codes), CPU)
    movable = grid.blocks.spread(grid.scales.high) > 0
    np.testing.assert_array_equal(levels_of(form, found)[movable], levels_of(form, codes)[movable])


@pytest.mark.parametrize("form", CHOICES)
@settings(max_examples=60, deadline=None)
@given(weights=tensors(), policy=st.sampled_from(POLICIES), seed=st.integers(0, 2**32))
def test_moved_weights_have_the_same_grid_and_the_guarded_codes(form, weights, policy, seed):
    scheme, blocks = setting(form, weights)
    flat, key = weights.reshape(-1), tensor_key(seed, "w")
    result = quantize_tensor("w", flat, scheme, blocks, policy, key, CPU)
    refitted = scheme.fit(result.guarded, blocks, weights.dtype, CPU)
    assert refitted.same_as(result.grid)
    np.testing.assert_array_equal(refitted.scales.high, result.grid.scales.high)
    np.testing.assert_array_equal(refitted.encode(result.guarded, CPU), result.codes)


@pytest.mark.parametrize("form", CHOICES)
@settings(max_examples=60, deadline=None)
@given(weights=tensors())
def test_a_block_does_not_depend_on_the_others(form, weights):
    """The last one, ragged or not, as if it were alone in a tensor with the same extremes."""
    scheme, blocks = setting(form, weights)
    flat = weights.reshape(-1)
    grid = scheme.fit(flat, blocks, weights.dtype, CPU)
    size = (blocks.cols - 1) % blocks.size + 1
    last = flat[-size:]
    whole = Blocks(1, flat.size, flat.size).extremes(flat, CPU)
    alone = scheme.within(whole).fit(last, Blocks(1, size, size), weights.dtype, CPU)
    np.testing.assert_array_equal(grid.scale[-1:], alone.scale)
    if grid.levels.lowest == alone.levels.lowest:  # one for all blocks of a tensor
        np.testing.assert_array_equal(grid.encode(flat, CPU)[-size:], alone.encode(last, CPU))


@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: f"{p.name}-{p.tau}-{p.ratio}")
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("form", CHOICES)
def test_an_all_zero_block_stays_as_it_is(form, dtype, policy):
    weights = np.random.default_rng(0).standard_normal((2, 100)).astype(dtype)
    weights[1] = 0
    scheme, blocks = setting(form, weights)
    flat, key = weights.reshape(-1), tensor_key(1, "w")
    result = quantize_tensor("w", flat, scheme, blocks, policy, key, CPU)
    zeros = slice(128, 200)  # from where blocks across the rows hold nothing else
    assert not result.grid.decode(result.codes)[zeros].any()
    np.testing.assert_array_equal(result.codes[zeros], result.nearest[zeros])
    assert not result.guarded[zeros].astype(np.float32).any()


def awkward(dtype):
    """Rows of one sign, rows whose ends are about equal, one with half of its weights at an end."""
    weights = np.random.default_rng(0).standard_normal((8, 96))
    weights[0], weights[1] = np.abs(weights[0]), -np.abs(weights[1])
    weights[2] = np.clip(4 * weights[2], -1, 1)
    weights[3] *= 1e-3
    weights[4, ::2], weights[4, 1::2] = 0.99, -1
    weights[5, 1::2] = np.linspace(0.875, 1, 48)
    weights[5, ::32] = -1  # the clip attack: an extreme, and half of the weights opposite to it
    return weights.astype(dtype)


LEFT = {  # gaps by which floats of 16 bits may be off: (float16, bfloat16)
    "int8-channel": (0.11, 0.25),
    "int8-tensor": (0.11, 0.25),
    "int8-block": (0.25, 1),
    "uint8-channel": (0.16, 0.5),
    "uint8-block": (0.13, 0.5),
    "fp8": (0.03, 0.03),
    "int4": (1e-3, 0.06),
    "int4-7": (5e-3, 0.06),
    "uint4": (0.01, 0.06),
    "uint2": (1e-3, 0.02),
}


def bias_and_noise(form, weights, copies, moved, inputs=None):
    """Mean error of every weight over `copies` draws, and their deviation, in gaps.

    The draws are those of as many copies of the rows.
    """
    scheme, tiled = forms.scheme(form), np.tile(weights, (copies, 1))
    blocks, flat = forms.cut(form, *tiled.shape), tiled.reshape(-1)
    result = quantize_tensor(
        "w", flat, scheme, blocks, Policy(), tensor_key(1, "w"), CPU, inputs, moved=moved
    )
    decoded = result.grid.decode(result.codes).astype(np.float64)
    scales = np.abs(result.grid.scale)
    if form in FLOAT4:  # whose scales may be random, and whose widest gap is 2 of them
        highest = {"mxfp4": 1, "nvfp4": 1.125}[form]  # of the scales, in those of the quantizer
        scales = 2 * highest * scheme.fit(flat, blocks, flat.dtype, CPU).scale
    gaps = blocks.spread(scales).astype(np.float64)
    if form == "fp8":  # whose gaps grow with the weights
        place = np.maximum(np.abs(flat.astype(np.float64)) / gaps, 2.0**-6)
        gaps *= 2.0 ** (np.floor(np.log2(place)) - 3)
    errors = (decoded - flat.astype(np.float64)) / gaps
    errors = errors.reshape(copies, -1)
    return errors.mean(axis=0), errors.std(axis=0)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize(
    ("form", "moved"),
    [
        pytest.param(form, moved, id=f"{form}-{'floats' if moved else 'codes'}")
        for form in CHOICES | SEARCHED
        for moved in (False, True)
        if not (moved and form in SEARCHED)  # refused: moved weights have another grid
        if (form, moved) != ("uint8-tensor", True)  # its ends are drawn once for all copies
    ],
)
def test_the_mean_of_the_draws_is_the_weight(form, dtype, moved):
    """For every weight, extremes included: nothing is left for an attacker to choose.

    Save for floats of 16 bits, whose extremes the quantizer's own scale rounds, and some of which
    are too coarse to reach the level that was drawn, or the end.
    """
    weights, copies = awkward(dtype), 4000
    bias, noise = bias_and_noise(form, weights, copies, moved)
    left = 1e-3
    if moved and dtype != np.float32:
        left = LEFT.get(form, (left, left))[dtype != np.float16]
    assert np.all(np.abs(bias) <= left + 4.5 * noise / np.sqrt(copies))
    coarse = left > 1e-3  # then a weight may be moved with its end, too
    assert noise.max() < (1 if coarse else 1.01 / 2)  # of two levels that are a gap apart


LARGE = 100.0


def tiny_blocks(dtype):
    """Beside one large weight, blocks of nvfp4 that want scales from the smallest normal one down.

    No scale is below 2^-9; blocks that want a smaller one get that, whatever their weights are.
    """
    sizes = np.array([2.0**-6, 2.9 * 2.0**-9, 1.4 * 2.0**-9, 2.0**-9, 2.0**-11, 2.0**-20, 0])
    weights = np.random.default_rng(0).uniform(-1, 1, (len(sizes), 16))
    weights[:, 3] = -1
    weights *= 6 / 2688 * LARGE * sizes[:, None]
    one = np.zeros((1, 16))
    one[0, 5] = LARGE
    return np.concatenate([one, weights]).reshape(2, -1).astype(dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("moved", [False, True], ids=["codes", "floats"])
def test_the_mean_of_the_draws_is_the_weight_in_tiny_blocks(dtype, moved):
    weights, copies = tiny_blocks(dtype), 4000
    bias, noise = bias_and_noise("nvfp4", weights, copies, moved)
    assert np.all(np.abs(bias) <= 1e-3 + 4.5 * noise / np.sqrt(copies))
    drawn = noise.reshape(-1, 16) > 0
    assert not drawn[[0, -1]].any()  # the extreme of the tensor is a level, and so are zeros
    assert np.all(np.count_nonzero(drawn[1:-1], axis=1) >= 14)


@pytest.mark.parametrize("seed", range(20))
def test_no_block_of_nvfp4_loses_its_last_weight(seed):
    """Blocks of zeros have another scale; a float16 may have no smaller number but 0."""
    weights = np.zeros((4, 32), np.float16)
    weights[0, 0] = 0.2
    weights[1:, 3] = np.float16(6e-8)  # the smallest
    scheme, blocks = setting("nvfp4", weights)
    flat, key = weights.reshape(-1), tensor_key(seed, "w")
    result = quantize_tensor("w", flat, scheme, blocks, Policy(), key, CPU)
    assert scheme.fit(result.guarded, blocks, weights.dtype, CPU).same_as(result.grid)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("form", ["int8-channel", "int4"])
def test_no_weight_is_so_small_that_it_is_dropped(form, dtype):
    """Quantizers round rows below 1.5e-36 to 0, whatever a layer behind makes of them."""
    smallest = ml_dtypes.finfo(dtype).smallest_subnormal
    rows = [1e-36, 1e-38, 3e-40, 100 * float(smallest), 3 * float(smallest)]
    rng = np.random.default_rng(0)
    weights = np.stack([size * rng.uniform(-1, 1, 96) for size in rows]).astype(dtype)
    bias, noise = bias_and_noise(form, weights, 2000, moved=False)
    assert np.all(np.abs(bias) <= 1e-3 + 4.5 * noise / np.sqrt(2000))
    used = weights.reshape(-1) != 0
    scheme, blocks = setting(form, weights)
    result = quantize_tensor(
        "w", weights.reshape(-1), scheme, blocks, Policy(), tensor_key(1, "w"), CPU, moved=False
    )
    assert np.count_nonzero(result.codes) >= np.count_nonzero(used) / 2
