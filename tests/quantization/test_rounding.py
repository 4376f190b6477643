"""The laws of flipping: which weights may cross, where they land, what must not move."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flipguard_onnx.errors import SchemeError, ValidationError
from flipguard_onnx.quantization.kernels import get_backend, scalar
from flipguard_onnx.quantization.kernels.threads import ENOUGH
from flipguard_onnx.quantization.rounding import (
    Policy,
    quantize_tensor,
    require_invariants,
    tensor_key,
)
from flipguard_onnx.quantization.schemes import Blocks
from tests.helpers import forms, naive, oracles
from tests.helpers.cores import on_cores
from tests.helpers.forms import CHOICES
from tests.helpers.oracles import ORACLES
from tests.helpers.tensors import tensors

CPU = get_backend("cpu")
FLOATS = [np.float32, np.float16, ml_dtypes.bfloat16]
POLICIES = [Policy(), Policy(tau=0.4), Policy("topk", ratio=0.25)]


def weights_of(rows=8, cols=100, dtype=np.float32, seed=0):
    return (0.05 * np.random.default_rng(seed).standard_normal((rows, cols))).astype(dtype)


def flipped(form, weights, policy=POLICIES[0], seed=0, name="w"):
    scheme = forms.scheme(form)
    blocks = forms.cut(form, *weights.shape)
    key = tensor_key(seed, name)
    return quantize_tensor(name, weights.reshape(-1), scheme, blocks, policy, key, CPU)


def margins_of(grid, weights):
    return grid.analyze(weights.astype(np.float32).reshape(-1), CPU)


def naives(form, weights):
    blocks = forms.cut(form, *weights.shape)
    return naive.quantize(form, weights.reshape(blocks.rows, blocks.cols), blocks.size)


def bits(values):
    return values.view(f"u{values.dtype.itemsize}").reshape(-1)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("form", ["mxfp4", "uint2"])
def test_levels_beyond_the_type_are_refused(form, dtype):
    scheme, blocks = forms.scheme(form), forms.cut(form, 8, 96)
    limit = 0.97 * float(ml_dtypes.finfo(dtype).max)
    values = (np.random.default_rng(0).uniform(-1, 1, 768) * limit).astype(dtype)
    with pytest.raises(ValidationError, match="weights would get levels beyond"):
        quantize_tensor("w", values, scheme, blocks, Policy(), np.uint64(1), CPU, moved=False)
    smaller = values * dtype(0.25)
    drawn = quantize_tensor("w", smaller, scheme, blocks, Policy(), np.uint64(1), CPU, moved=False)
    assert np.isfinite(drawn.grid.decode(drawn.codes).astype(dtype)).all()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("form", CHOICES)
def test_inside_the_margin_the_code_holds_and_just_past_it_changes(form, dtype):
    weights = weights_of(dtype=dtype)
    grid = flipped(form, weights, Policy("none")).grid
    flat = weights.astype(np.float32).reshape(-1)
    margins = grid.analyze(flat, CPU)
    movable = margins.offsets != 0
    assert movable.mean() > 0.8
    wanted = np.where(movable, margins.neighbours, margins.codes)
    past, _ = grid.move_weights(flat, margins, wanted, CPU)
    np.testing.assert_array_equal(grid.encode(past, CPU)[movable], margins.neighbours[movable])
    np.testing.assert_array_equal(past[~movable], flat[~movable])
    scale = np.abs(grid.blocks.spread(grid.scale))
    step = 4 * np.maximum(np.float32(1e-5), np.abs(past / scale) * np.float32(2.0**-19))
    side = np.sign(margins.offsets) * np.sign(grid.blocks.spread(grid.scale))
    inside = past - side * step * scale
    np.testing.assert_array_equal(grid.encode(inside, CPU)[movable], margins.codes[movable])


@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: f"{p.name}-{p.tau}")
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("form", CHOICES)
def test_flips_keep_the_grid_and_every_unselected_weight(form, dtype, policy):
    weights = weights_of(dtype=dtype)
    result = flipped(form, weights, policy)
    guarded = result.guarded.reshape(weights.shape)
    refitted = flipped(form, guarded, Policy("none"))
    np.testing.assert_array_equal(refitted.grid.scale, result.grid.scale)
    np.testing.assert_array_equal(refitted.codes, result.codes)
    crossed = result.codes != result.nearest
    assert result.count == np.count_nonzero(crossed) > 0
    margins = margins_of(result.grid, result.drawn)
    left = ~crossed & (np.abs(margins.offsets) < 0.499)
    assert left.mean() > 0.3
    np.testing.assert_array_equal(bits(guarded)[left], bits(result.drawn)[left])
    np.testing.assert_array_equal(result.codes[crossed], margins.neighbours[crossed])


@pytest.mark.parametrize("form", CHOICES)
@settings(max_examples=40, deadline=None)
@given(weights=tensors(), policy=st.sampled_from([*POLICIES, Policy("topk", ratio=1.0)]))
def test_any_tensor_can_be_quantized(form, weights, policy):
    """`quantize_tensor` checks its own invariants, and raises when one does not hold."""
    result = flipped(form, weights, policy)
    assert np.all(np.abs(result.codes.astype(int) - result.nearest) <= 1)


@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: f"{p.name}-{p.tau}")
@pytest.mark.parametrize("dtype", FLOATS[:2])
@pytest.mark.parametrize("form", [form for form in CHOICES if form in ORACLES])
def test_onnxruntime_quantizes_the_guarded_weights_to_the_guarded_codes(form, dtype, policy):
    weights = weights_of(dtype=dtype)
    result = flipped(form, weights, policy)
    codes = forms.stored(form, result.codes)
    theirs, scales, *_ = ORACLES[form](result.guarded.reshape(weights.shape))
    np.testing.assert_array_equal(codes, theirs)
    np.testing.assert_array_equal(result.grid.scale, scales.astype(np.float32))
    if form == "int4":
        theirs, _ = oracles.int4_matmul_nbits(result.guarded.reshape(weights.shape))
        np.testing.assert_array_equal(codes, theirs)


def on_boundaries(form, dtype):
    """Weights that stand on a boundary of their grid, or next to it."""
    weights = weights_of(dtype=dtype)
    grid = flipped(form, weights, Policy("none")).grid
    margins = margins_of(grid, weights)
    levels, zero = grid.levels, grid.blocks.spread(grid.zero)
    near, beyond = (each - zero for each in (margins.codes, margins.neighbours))
    places = [
        scalar.edge(int(a), int(b), levels.rule, levels)[0] if a != b else 0
        for a, b in zip(near, beyond, strict=True)
    ]
    placed = grid.blocks.spread(grid.scale) * np.array(places, np.float32)
    placed = np.where(margins.offsets != 0, placed, weights.astype(np.float32).reshape(-1))
    placed = placed.astype(dtype).reshape(weights.shape)
    towards = np.random.default_rng(1).choice([-np.inf, np.inf], weights.shape).astype(dtype)
    beside = np.random.default_rng(2).random(weights.shape) < 0.5
    return np.where(beside, np.nextafter(placed, towards), placed)


@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: f"{p.name}-{p.tau}")
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("form", CHOICES)
def test_no_guarded_weight_is_left_on_a_boundary(form, dtype, policy):
    """Where tools differ, an attacker could else choose what a tool makes of all that stay."""
    result = flipped(form, on_boundaries(form, dtype), policy)
    grid, guarded = result.grid, result.guarded.astype(np.float32)
    margins = margins_of(grid, result.drawn)
    free = margins.offsets != 0
    edge = free & (np.abs(margins.offsets) > 0.49)
    if dtype is np.float32:  # others are coarse
        assert edge.mean() > 0.05
        assert 0.1 < (result.codes != result.nearest)[edge].mean() < 0.9
    step = np.abs(grid.blocks.spread(grid.scale)) * np.float32(1e-6)
    for near in (guarded - step, guarded + step):
        np.testing.assert_array_equal(grid.encode(near, CPU)[free], result.codes[free])


def test_both_of_onnxruntimes_int4_quantizers_agree_on_guarded_weights():
    """One rounds w / s, the other w / s + 8, which is a tie for other weights."""
    weights = on_boundaries("int4", np.float32)
    differ = oracles.int4(weights)[0] != oracles.int4_matmul_nbits(weights)[0]
    assert differ.mean() > 0.2
    guarded = flipped("int4", weights).guarded.reshape(weights.shape)
    np.testing.assert_array_equal(oracles.int4(guarded)[0], oracles.int4_matmul_nbits(guarded)[0])


@pytest.mark.parametrize("form", CHOICES)
def test_none_is_rounding_to_nearest(form):
    weights = weights_of()
    result = flipped(form, weights, Policy("none"))
    assert result.count == 0
    np.testing.assert_array_equal(bits(result.guarded), bits(weights))


def test_topk_on_a_block_worked_by_hand():
    # scale 1; errors: 0, .4, .45, .3, .1, .05, .49, .2; the four largest cross
    weights = np.array([[-8, 0.4, 1.45, -2.3, 3.1, 0.05, -4.49, 6.2]], np.float32)
    result = flipped("int4", weights, Policy("topk", ratio=0.5))
    np.testing.assert_array_equal(result.nearest, [-8, 0, 1, -2, 3, 0, -4, 6])
    np.testing.assert_array_equal(result.codes, [-8, 1, 2, -3, 3, 0, -5, 6])
    moved = [-8, 0.50001, 1.50001, -2.50001, 3.1, 0.05, -4.50001, 6.2]
    np.testing.assert_allclose(result.guarded, moved, rtol=0, atol=1e-6)


def test_topk_on_an_nf4_block_worked_by_hand():
    # 0.45 is nearest to 0.4407 (error .0093), 0.8 to 0.7230 (.0770), -0.3 to -0.2844 (.0156)
    weights = np.array([[1.0, 0.45, 0.8, -0.3]], np.float32)
    result = flipped("nf4", weights, Policy("topk", ratio=0.5))
    np.testing.assert_array_equal(result.nearest, [15, 12, 14, 4])
    np.testing.assert_array_equal(result.codes, [15, 12, 15, 3])
    moved = [1.0, 0.45, (0.7229568362 + 1) / 2 + 1e-5, (-0.2844413817 - 0.3949174881) / 2 - 1e-5]
    np.testing.assert_allclose(result.guarded, moved, rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("form", "ratio", "per_block"),
    [("int8-channel", 0.29, 29), ("int4", 0.25, 8), ("int4", 0.125, 4), ("nf4", 0.5, 32)],
)
def test_topk_flips_exactly_its_share_of_every_block(form, ratio, per_block):
    weights = weights_of(8, 100 if "int8" in form else 128)
    result = flipped(form, weights, Policy("topk", ratio=ratio))
    crossed = (result.codes != result.nearest).reshape(-1, result.grid.blocks.size)
    np.testing.assert_array_equal(crossed.sum(axis=1), per_block)


@pytest.mark.parametrize("ratio", [0.1, 0.3])
@pytest.mark.parametrize("form", CHOICES)
def test_topk_equals_the_papers_algorithm(form, ratio):
    weights = weights_of(3, 70)
    result = flipped(form, weights, Policy("topk", ratio=ratio))
    chosen, moved = [], []
    for block in naives(form, weights):
        indices, positions = naive.topk(block, ratio)
        chosen += [len(moved) + i for i in indices]
        moved += positions
    np.testing.assert_array_equal(np.flatnonzero(result.codes != result.nearest), chosen)
    positions = result.guarded / result.grid.blocks.spread(result.grid.scale)
    np.testing.assert_allclose(positions, moved, rtol=2.0**-18, atol=2e-5)


@pytest.mark.parametrize("form", [form for form in CHOICES if "int2" not in form])
def test_unbiased_draws_average_to_the_weights(form):
    """Bernstein's bound, which a single weight breaks with probability 1e-9: about 6.5 standard
    errors. Rounding to nearest and topk break it.

    Its variance is that on the quantizer's grid. At 2 bits the drawn ends of a block make more of
    it; test_laws compares with the variance that there is.
    """
    weights, draws = weights_of(4, 70), 300
    blocks = naives(form, weights)
    chance = np.concatenate([naive.chances(b) for b in blocks])
    gap = np.array([
        0 if n is None else abs(n - v) * abs(np.float32(b.scale))
        for b in blocks
        for n, v in zip(b.neighbours, b.levels, strict=True)
    ])  # fmt: skip
    within = gap > 0  # the rest stands on a level, or beyond the last one
    assert within.mean() > 0.9
    log = np.log(2 / 1e-9)
    bound = gap * (np.sqrt(2 * chance * (1 - chance) * log / draws) + log / (3 * draws)) + 1e-7

    def misses(policy, draws):
        results = [flipped(form, weights, policy, seed) for seed in range(draws)]
        mean = np.mean([r.grid.decode(r.codes) for r in results], axis=0, dtype=np.float64)
        return np.mean((np.abs(mean - weights.reshape(-1)) > bound)[within])

    assert misses(Policy(), draws) == 0
    assert misses(Policy("none"), 1) > 0.3
    assert misses(Policy("topk", ratio=0.3), 1) > 0.3


@pytest.mark.parametrize("form", CHOICES)
def test_tau_selects_by_margin_and_a_larger_tau_only_adds(form):
    weights = weights_of()
    smaller = np.zeros(weights.size, bool)
    for tau in (0.1, 0.3, 0.7, 1.0):
        result = flipped(form, weights, Policy(tau=tau))
        crossed = result.codes != result.nearest
        margin = 1 - 2 * np.abs(margins_of(result.grid, result.drawn).offsets)
        assert crossed.any()
        assert np.all(margin[crossed] < tau)
        assert np.all(crossed[smaller])
        smaller = crossed


@pytest.mark.parametrize("form", CHOICES)
def test_result_does_not_depend_on_threads_or_on_the_order_of_calls(form):
    # several pieces of a block, and enough for two threads
    weights, other = weights_of(4, 2 * ENOUGH // 4), weights_of(4, 9000, seed=1)

    def outcome(names):
        results = {n: flipped(form, {"w": weights, "v": other}[n], name=n) for n in names}
        return [results[n].guarded.tobytes() + results[n].codes.tobytes() for n in "wv"]

    with on_cores(1):
        alone = outcome("wv")
    assert outcome("vw") == alone


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("form", CHOICES)
def test_a_tensor_may_be_quantized_piece_by_piece(form, dtype):
    weights = weights_of(12, 128, dtype)
    whole = flipped(form, weights)
    everything = Blocks(1, weights.size, weights.size).extremes(weights.reshape(-1), CPU)
    scheme, key = forms.scheme(form).within(everything), tensor_key(0, "w")
    pieces = [weights[rows].reshape(-1) for rows in (slice(0, 4), slice(4, 5), slice(5, 12))]
    cuts = [forms.cut(form, piece.size // 128, 128) for piece in pieces]
    one_block = scheme.flat and whole.grid.blocks.count == 1
    extremes = everything if one_block else None
    results, first = [], 0
    for piece, blocks in zip(pieces, cuts, strict=True):
        options = {"first": first, "extremes": extremes}
        result = quantize_tensor("w", piece, scheme, blocks, POLICIES[0], key, CPU, **options)
        results.append(result)
        first += piece.size
    for name in ("nearest", "codes", "guarded"):
        joined = np.concatenate([getattr(result, name) for result in results])
        assert joined.tobytes() == getattr(whole, name).tobytes()


def test_key_depends_on_the_name_and_the_seed():
    keys = {tensor_key(seed, name) for seed in (0, 1, 2**127) for name in ("a", "b", "ab", "")}
    assert len(keys) == 12
    assert tensor_key(7, "a") == tensor_key(7, "a")


def test_seeds_draw_different_flips():
    assert np.any(
        flipped("int4", weights_of(), seed=1).codes != flipped("int4", weights_of()).codes
    )


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"name": "median"}, "'median'"),
        ({"tau": 0}, "tau is 0"),
        ({"tau": 1.5}, "tau is 1.5"),
        ({"tau": float("nan")}, "tau is nan"),
        ({"ratio": -0.1}, "ratio is -0.1"),
        ({"name": "topk", "ratio": 2}, "ratio is 2"),
    ],
)
def test_policy_names_the_value_it_rejects(options, named):
    with pytest.raises(SchemeError, match=named):
        Policy(**options)


def test_nothing_crosses_in_a_block_without_a_scale():
    weights = np.zeros((2, 64), np.float32)
    weights[1] = 1e-40
    for form in CHOICES:
        assert flipped(form, weights).count == 0


def _zero_the_largest(guarded, codes):
    guarded[np.abs(guarded) > np.abs(guarded).max() / 2] = 0


def _alter_a_code(guarded, codes):
    codes[5] ^= 1


def _negate_a_zero(guarded, codes):
    guarded[5] = -guarded[5]


@pytest.mark.parametrize(
    ("tamper", "complaint"),
    [
        (_zero_the_largest, "moved the grid"),
        (_alter_a_code, "do not encode"),
        (_negate_a_zero, "not selected"),
    ],
)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("form", CHOICES)
def test_check_refuses_a_tampered_result(form, dtype, tamper, complaint):
    weights = weights_of(dtype=dtype)
    weights[0, 5] = 0
    rounded = flipped(form, weights, Policy("none"))
    guarded, codes = rounded.guarded.copy(), rounded.codes.copy()
    tamper(guarded, codes)
    scheme, grid = forms.scheme(form), rounded.grid
    margins = grid.analyze(weights.reshape(-1), CPU)
    checked = grid.check(weights.reshape(-1), guarded, margins, codes, CPU)
    whole = grid.blocks.extremes(weights.reshape(-1), CPU)
    with pytest.raises(ValidationError, match=f"tensor 'w': .*{complaint}"):
        require_invariants("w", checked, scheme, grid, weights.dtype, whole, whole)
