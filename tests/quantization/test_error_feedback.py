"""Error feedback: the rule against an oracle of another form, and its laws."""

import tracemalloc

import numpy as np
import pytest

from flipguard_onnx.quantization.chunks import quantize_weight
from flipguard_onnx.quantization.error_feedback import PANEL, InputMoments, draw_with_feedback
from flipguard_onnx.quantization.kernels import get_backend
from flipguard_onnx.quantization.kernels.protocol import Extremes, Panel, RandomDraw
from flipguard_onnx.quantization.kernels.threads import ENOUGH
from flipguard_onnx.quantization.layout import Layout
from flipguard_onnx.quantization.rounding import FED, Policy, quantize_tensor, tensor_key
from flipguard_onnx.quantization.schemes import SCHEMES, Blocks
from tests.helpers import forms
from tests.helpers.cores import on_cores
from tests.helpers.forms import CHOICES

CPU = get_backend("cpu")
KEY = tensor_key(1, "w")
ALL = np.float32(0)  # the limit of tau 1: every weight is drawn
NEAREST = np.float32(1)
UNBIASED = Policy()


def weights_of(rows=6, columns=40, seed=0):
    return (0.05 * np.random.default_rng(seed).standard_normal((rows, columns))).astype(np.float32)


def inputs_of(columns, groups=1, spans=None, seed=0, dampings=(0.01,)):
    """Correlated inputs, some columns much larger than others."""
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((groups, 400, 8)) @ rng.standard_normal((groups, 8, columns))
    x = mixed + 0.3 * rng.standard_normal((groups, 400, columns))
    x *= np.exp(rng.standard_normal(columns))
    spans = tuple(spans or [range(columns)])
    parts = [x[:, 100:, span.start : span.stop] for span in spans]
    hessians = tuple((p.transpose(0, 2, 1) @ p).astype(np.float32) for p in parts)
    return InputMoments(spans, hessians, x[:, :100].astype(np.float32), dampings)


def grid_of(form, weights):
    blocks = forms.cut(form, *weights.shape)
    return forms.scheme(form).fit(weights.reshape(-1), blocks, weights.dtype, CPU)


def random(key=KEY, limit=ALL):
    return RandomDraw(key, np.uint64(0), limit)


def drawn(form, weights, inputs, key=KEY, limit=ALL, **options):
    flat, grid = weights.reshape(-1), grid_of(form, weights)
    return draw_with_feedback(flat, grid, inputs, random(key, limit), CPU, **options)


def uniform(key, index):
    """SplitMix64 in Python's integers."""
    mask = 2**64 - 1
    z = (int(key) + (int(index) + 1) * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return ((z ^ (z >> 31)) >> 40) * 2.0**-24


def oracle(form, weights, inputs):
    """OBQ's form of the rule, one weight at a time: the weights not yet drawn are updated by the
    upper Cholesky factor of the inverse of H."""
    grid = grid_of(form, weights)
    rows, columns = weights.shape
    lowest, highest = forms.range_of(form)
    codes_of = range(lowest, highest + 1)
    levels = [grid.decode(np.full(weights.size, c, np.int8)) for c in codes_of]
    levels = np.array(levels, np.float64).reshape(-1, rows, columns)
    low, high = (
        grid.blocks.spread(end).reshape(rows, columns)
        for end in (grid.scales.low, grid.scales.high)
    )
    rounded = grid.encode(weights.reshape(-1), CPU).reshape(rows, columns)
    decoded = grid.decode(rounded.reshape(-1)).reshape(rows, columns)
    result = rounded.copy()
    for row in range(rows):
        hessian = inputs.hessians[0][row // (rows // len(inputs.fresh))].astype(np.float64)
        order = np.argsort(-np.diag(hessian), kind="stable")
        damped = hessian + 0.01 * np.mean(np.diag(hessian)) * np.eye(columns)
        factor = np.linalg.cholesky(np.linalg.inv(damped[np.ix_(order, order)])).T
        left = weights[row].astype(np.float64)
        for place, column in enumerate(order):
            if not low[row, column] < weights[row, column] < high[row, column]:
                value = decoded[row, column]
            else:
                known = levels[:, row, column]
                weight = weights[row, column]
                room = max(min(weight - known.min(), known.max() - weight), 0)
                value = weight + np.clip(left[column] - weight, -room, room)
                distance = np.abs(known - value)
                nearest = int(np.argmin(distance))
                beyond = [
                    c
                    for c in range(len(known))
                    if (known[c] - value) * (known[nearest] - value) < 0
                ]
                other = min(beyond, key=lambda c: distance[c], default=nearest)
                gap = abs(known[other] - known[nearest])
                if gap and uniform(KEY, row * columns + column) < distance[nearest] / gap:
                    nearest = other
                result[row, column] = codes_of[nearest]
                value = known[nearest]
            error = (left[column] - value) / factor[place, place]
            left[order] -= error * factor[place]
    return result.reshape(-1)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("form", CHOICES)
def test_equals_the_update_rule_of_obq(form, groups):
    weights, inputs = weights_of(), inputs_of(40, groups)
    codes = drawn(form, weights, inputs, panel_width=16)
    expected = oracle(form, weights, inputs)
    if form in forms.TWO_ZEROS:  # its two zeros are one level
        codes, expected = (np.where(c == 7, 8, c) for c in (codes, expected))
    np.testing.assert_array_equal(codes, expected)


@pytest.mark.parametrize("form", CHOICES)
def test_without_correlation_it_is_the_draw_without_feedback(form):
    weights = weights_of(8, 200)
    identity = InputMoments(
        (range(200),), (np.eye(200, dtype=np.float32)[None],), np.ones((1, 1, 200), np.float32)
    )
    _, alone = grid_of(form, weights).draw(weights.reshape(-1), random(), CPU)
    np.testing.assert_array_equal(drawn(form, weights, identity), alone)


@pytest.mark.parametrize("form", CHOICES)
def test_products_change_less_than_without_feedback(form):
    """About as little as the theory says for nearest rounding, whose errors are half as large."""
    weights, inputs = weights_of(64, 200), inputs_of(200)
    grid = grid_of(form, weights)
    flat = weights.reshape(-1)

    def error(codes):
        return inputs.products(flat - grid.decode(codes)).power

    nearest, codes = grid.draw(flat, random(), CPU)
    fed = error(drawn(form, weights, inputs))
    assert fed < 0.3 * error(codes)
    assert fed < error(nearest)
    assert error(drawn(form, weights, inputs, limit=NEAREST)) < fed


@pytest.mark.parametrize("form", CHOICES)
def test_draws_average_to_the_weights_whatever_the_inputs_are(form):
    """Six standard errors over 600 draws; nearest rounding with feedback misses most of them."""
    weights, inputs, draws = weights_of(4, 48), inputs_of(48), 600
    flat, blocks = weights.reshape(-1), forms.cut(form, *weights.shape)
    scheme = forms.scheme(form)
    grid = scheme.unclipped(blocks.extremes(flat, CPU), blocks, weights.dtype)

    def values(limit, key):
        codes = draw_with_feedback(flat, grid, inputs, random(key, limit), CPU)
        return grid.decode(codes).astype(np.float64)

    sample = np.array([values(ALL, tensor_key(seed, "w")) for seed in range(draws)])
    bound = 6 * sample.std(axis=0) / np.sqrt(draws) + 1e-7
    assert np.all(np.abs(sample.mean(axis=0) - flat) <= bound)
    misses = np.abs(values(NEAREST, KEY) - flat) > bound
    assert misses.mean() > 0.3


def test_feedback_asks_no_weight_beyond_the_ends_of_the_grid():
    """Weights at both ends whose errors all go to a last weight, near an end itself."""
    columns = 33
    weights = np.full((1, columns), 0.4, np.float32)  # of a step: a skewed draw
    weights[0, :2], weights[0, -1] = (-8, 6.9), 6.5
    factors = np.zeros((1, columns, columns), np.float32)
    factors[0, :-1, -1] = 1  # [from, to]
    grid = SCHEMES["int4"].unclipped(
        Extremes(np.float32([-8]), np.float32([7])), Blocks(1, columns, columns), weights.dtype
    )
    panel = Panel(
        np.zeros((1, columns), np.float32), factors, np.arange(columns, dtype=np.int64)[None], 0
    )
    found = []
    for seed in range(4000):
        codes, errors = np.empty((1, columns), np.int8), np.empty((1, columns), np.float32)
        grid.draw_with_feedback(
            weights.reshape(-1), panel, random(tensor_key(seed, "w")), codes, errors, CPU
        )
        found.append(codes[0, -1])
    assert set(found) == {6, 7}
    assert abs(np.mean(found) - 6.5) < 0.05


@pytest.mark.parametrize("form", CHOICES)
def test_spans_are_blocks_of_h_of_their_own(form):
    weights, inputs = weights_of(), inputs_of(40, spans=[range(24), range(24, 40)])
    whole = np.zeros((1, 40, 40), np.float32)
    for span, hessian in zip(inputs.spans, inputs.hessians, strict=True):
        whole[:, span.start : span.stop, span.start : span.stop] = hessian
    for part in inputs.hessians:  # the damping is relative to the mean of each: make these equal
        scale = np.trace(whole[0]) / 40 / np.mean(np.diag(part[0]))
        part *= scale
    for span, hessian in zip(inputs.spans, inputs.hessians, strict=True):
        whole[:, span.start : span.stop, span.start : span.stop] = hessian
    joined = InputMoments((range(40),), (whole,), inputs.fresh)
    np.testing.assert_array_equal(drawn(form, weights, inputs), drawn(form, weights, joined))


@pytest.mark.parametrize("form", CHOICES)
def test_codes_do_not_depend_on_threads(form):
    rows = 2 * ENOUGH // PANEL**2  # enough for two threads
    weights, inputs = weights_of(rows, 300), inputs_of(300)
    with on_cores(1):
        alone = drawn(form, weights, inputs)
    np.testing.assert_array_equal(drawn(form, weights, inputs), alone)


def quantized(form, weights, inputs=None, policy=UNBIASED):
    scheme, blocks = forms.scheme(form), forms.cut(form, *weights.shape)
    return quantize_tensor("w", weights.reshape(-1), scheme, blocks, policy, KEY, CPU, inputs)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("form", CHOICES)
def test_invariants_hold_with_feedback_and_codes_move_further(form, dtype):
    weights = weights_of(32, 128).astype(dtype)
    result = quantized(form, weights, inputs_of(128))
    assert 0 < result.gain < 1
    assert result.furthest > 1
    again = quantized(form, result.guarded.reshape(weights.shape), policy=Policy("none"))
    np.testing.assert_array_equal(again.codes, result.codes)
    np.testing.assert_array_equal(again.grid.scale, result.grid.scale)


@pytest.mark.parametrize(("seen", "best"), [(45, 0.16), (300, 0.01)])
def test_the_damping_is_the_best_for_fresh_inputs(seen, best):
    """As few inputs as there are columns fit H too well; many tell nearly all of it."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 700, 40)) @ (rng.standard_normal((40, 40)) * 0.98 ** np.arange(40))
    x = x.astype(np.float32)
    hessian, fresh = x[:, :seen].transpose(0, 2, 1) @ x[:, :seen], x[:, 300:]
    weights = weights_of(256, 40)
    grid = grid_of("int4", weights)

    def error(*dampings):
        inputs = InputMoments((range(40),), (hessian,), fresh, dampings)
        codes = drawn("int4", weights, inputs)
        return inputs.products(weights.reshape(-1) - grid.decode(codes)).power

    errors = {damping: error(damping) for damping in (0.01, 0.16)}
    assert error(0.01, 0.16) == errors[best] == min(errors.values())


def test_feedback_that_does_not_help_is_not_used():
    """Inputs in H and fresh ones that have nothing in common."""
    weights, inputs = weights_of(32, 128), inputs_of(128)
    other = inputs_of(128, seed=9).fresh
    misled = quantized("int4", weights, InputMoments(inputs.spans, inputs.hessians, other))
    assert misled.gain > 1
    np.testing.assert_array_equal(misled.codes, quantized("int4", weights).codes)


def test_inputs_that_are_all_zero_change_nothing():
    weights = weights_of()
    dead = InputMoments(
        (range(40),), (np.zeros((1, 40, 40), np.float32),), np.zeros((1, 5, 40), np.float32)
    )
    fed = quantized("int4", weights, dead)
    np.testing.assert_array_equal(fed.codes, quantized("int4", weights).codes)


@pytest.mark.parametrize("form", ["int4", "nf4"])
def test_a_large_tensor_is_drawn_in_strips_of_rows(form):
    """With the codes of the whole, in the memory of one strip besides the codes."""
    columns, inputs = 56, inputs_of(56)
    weights = weights_of(4 * FED // columns, columns)
    scheme, blocks = forms.scheme(form), forms.cut(form, *weights.shape)
    flat = weights.reshape(-1)
    grid = scheme.unclipped(blocks.extremes(flat, CPU), blocks, flat.dtype)
    whole = draw_with_feedback(flat, grid, inputs, random(), CPU)
    tracemalloc.start()
    result = quantize_tensor("w", flat, scheme, blocks, UNBIASED, KEY, CPU, inputs, moved=False)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert np.mean(result.codes == whole) > 0.999999
    assert result.gain < 0.5
    assert peak < 12 * flat.size


@pytest.mark.parametrize(("scheme", "groups"), [("nf4", 1), ("nf4", 3), ("int4", 3), ("int8", 1)])
def test_a_stored_tensor_is_drawn_as_its_rows_are(scheme, groups):
    """Of 300 rows of 100 weights, no number of whole blocks of 64."""
    layout, inputs = Layout((100, 300), (1,)), inputs_of(100, groups)
    array, kind = weights_of(100, 300), SCHEMES[scheme]
    blocks = layout.blocks(kind.block_size, flat=scheme == "nf4")
    stored = quantize_weight(
        "w", array, layout, kind, blocks, UNBIASED, KEY, CPU, inputs=inputs, part_size=3000
    )
    flat = layout.canonical(array)
    rows = quantize_tensor("w", flat, kind, blocks, UNBIASED, KEY, CPU, inputs)
    np.testing.assert_array_equal(stored.codes, rows.codes)
    assert stored.gain == rows.gain < 1
