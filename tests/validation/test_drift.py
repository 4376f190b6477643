"""How far outputs may be from the original's."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from flipguard_onnx import DriftError, ValidationError, guard, verify
from flipguard_onnx.reports.validation import MAX_RELATIVE_L2, Drift, joined, pooled
from flipguard_onnx.validation.drift import drifts, judge, require_same_meaning
from tests.helpers.samples import F, model, node, save, weights


def drift(relative, kl=None):
    return [Drift("y", 10_000, 1.0, 0.0, relative, 0.0, None, kl)]


def test_no_drift_of_nearest_rounding_excuses_a_lost_model():
    judge(drift(0.7), drift(MAX_RELATIVE_L2), max_drift=3)
    with pytest.raises(DriftError, match=r"0\.8100 .* 2\.16 times .* at most 0\.8 at all"):
        judge(drift(0.7), drift(0.81), max_drift=2)


def test_a_session_with_default_options_computes_what_the_codes_stand_for():
    """Kernels round activations; whatever adds more is a graph that was rewritten wrongly."""
    require_same_meaning(drift(0.02), drift(0.13))
    with pytest.raises(ValidationError, match=r"by 0\.2000 .* by 0\.0200 .* allowed: 0\.1400"):
        require_same_meaning(drift(0.02), drift(0.2))


def test_a_language_model_may_not_lose_its_distributions():
    judge(drift(0.2), drift(0.2, kl=0.99), max_drift=3)
    with pytest.raises(DriftError, match=r"'y' are 1\.20 nats .* up to 1, which is 2\.7 times"):
        judge(drift(0.2), drift(0.2, kl=1.2), max_drift=3)


def test_kl_divergence_worked_by_hand():
    """All mass on one token of 1,000 against a half of it there, a half on the others."""
    wanted, found = np.zeros((1, 1, 1000), np.float32), np.zeros((1, 1, 1000), np.float32)
    wanted[0, 0, 3], found[0, 0, 3] = 100, np.log(999)
    (result,) = drifts(["logits"], [[wanted]], [[found]])
    assert result.kl == pytest.approx(np.log(2), rel=1e-6)
    (result,) = drifts(["logits"], [[wanted[..., :999]]], [[found[..., :999]]])
    assert result.kl is None


def test_what_is_added_up_feed_by_feed_is_the_drift_of_all():
    rng = np.random.default_rng(0)
    wanted = [rng.standard_normal((2, 1200)).astype(np.float32) for _ in range(3)]
    found = [each + rng.standard_normal(each.shape).astype(np.float32) for each in wanted]
    (drift,) = drifts(["y"], ([each] for each in wanted), ([each] for each in found))
    x, y = np.concatenate(wanted).astype(float), np.concatenate(found).astype(float)
    assert drift.values == 2400
    assert drift.relative_l2 == pytest.approx(np.linalg.norm(x - y) / np.linalg.norm(x))
    assert drift.cosine == pytest.approx(np.sum(x * y) / np.linalg.norm(x) / np.linalg.norm(y))
    assert drift.max_abs == pytest.approx(np.abs(x - y).max())
    assert drift.top1 == np.mean(x.argmax(1) == y.argmax(1))
    p, q = (np.exp(z) / np.exp(z).sum(1, keepdims=True) for z in (x, y))
    assert drift.kl == pytest.approx(np.mean(np.sum(p * np.log(p / q), 1)))


def test_the_outputs_of_a_decoders_caches_are_one_line():
    logits = Drift("logits", 100, 0.9, 2.0, 0.1, 20.0, 1.0)
    caches = [
        Drift(f"present.{i}.key", 10, 0.8 + i / 10, 3.0 - i, i / 10, 0.0, None) for i in range(2)
    ]
    assert joined([logits, caches[0]]) == [logits, caches[0]]
    first, line = joined([caches[0], logits, caches[1]])
    assert first == logits
    assert (line.output, line.values) == ("2 caches, present...", 20)
    assert (line.cosine, line.max_abs) == (0.8, 3.0)
    assert line.relative_l2 == pooled(caches)
    assert pooled([first, line]) == pytest.approx(pooled([logits, *caches]))


def test_an_output_that_is_zero_has_no_norm_to_divide_by():
    zeros, noise = np.zeros((4, 25), np.float32), np.full((4, 25), 6e-5, np.float32)
    (result,) = drifts(["z"], [[zeros]], [[noise]])
    assert result.relative_l2 == pytest.approx(6e-5)
    (result,) = drifts(["z"], [[zeros]], [[zeros]])
    assert (result.relative_l2, result.cosine) == (0, 1)


def indices(differing, of=400):
    """One output of integers, of which so many differ, beside floats that drift a little."""
    wanted, found = np.zeros((1, of), np.int64), np.zeros((1, of), np.int64)
    found[0, :differing] = 7
    return [*drift(0.01), *drifts(["i"], [[wanted]], [[found]])]


def test_few_integers_may_differ_by_chance_and_no_more():
    """Up to three times nearest rounding's, and three times what may differ where none did."""
    judge(indices(0), indices(9), max_drift=3)
    with pytest.raises(DriftError, match=r"2\.5% .* integers .* allowed: 2\.2%: 3 times .* 0\.0%"):
        judge(indices(0), indices(10), max_drift=3)
    judge(indices(20), indices(69), max_drift=3)
    with pytest.raises(DriftError, match=r"17\.5% .* allowed: 17\.[23]%"):
        judge(indices(20), indices(70), max_drift=3)
    with pytest.raises(DriftError, match=r"65\.0% .* and at most 64% at all"):
        judge(indices(240), indices(260), max_drift=3)
    require_same_meaning(indices(2), indices(49))
    with pytest.raises(ValidationError, match=r"15\.0% .* but 0\.5% .* allowed: 12\.5%"):
        require_same_meaning(indices(2), indices(60))


def test_integers_excuse_no_floats():
    with pytest.raises(DriftError, match=r"drift by 0\.0400 "):
        judge(indices(200), [*drift(0.04), indices(200)[1]], max_drift=3)
    assert pooled(indices(200)) == pytest.approx(0.01)
    assert pooled(indices(100)[1:]) == pytest.approx(0.5)


@pytest.mark.parametrize("seed", range(1, 5))
@pytest.mark.parametrize("outputs", ["booleans", "indices"])
def test_models_of_booleans_and_indices_pass_as_those_of_floats_do(tmp_path, outputs, seed):
    """At int8 next to none of them changes with nearest rounding."""
    heads = {
        "booleans": (node("Greater", "h zero", "y"), {"y": (TensorProto.BOOL, ["b", 50])}),
        "indices": (
            node("TopK", "h k", "v y"),
            {"v": (F, ["b", 5]), "y": (TensorProto.INT64, ["b", 5])},
        ),
    }
    head, made = heads[outputs]
    constants = {"w": weights((32, 50)), "zero": np.float32(0), "k": np.array([5])}
    proto = model([node("MatMul", "x w", "h"), head], {"x": (F, ["b", 32])}, made, constants)
    source, output = save(proto, tmp_path), tmp_path / "out.onnx"
    guarded = guard(source, output=output, seed=seed).validation.guarded_exact
    assert guarded[-1].counted == 8 * guarded[-1].values
    broken = onnx.load(output)
    (scale,) = (each for each in broken.graph.initializer if each.name.endswith("_scale"))
    scale.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(scale), scale.name))
    with pytest.raises(DriftError):
        verify(source, save(broken, tmp_path, "broken.onnx"))
