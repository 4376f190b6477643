"""How far outputs may be from the original's."""

import numpy as np
import pytest

from flipguard_onnx import DriftError, ValidationError
from flipguard_onnx.reports.validation import MAX_RELATIVE_L2, Drift, joined, pooled
from flipguard_onnx.validation.drift import drifts, judge, require_same_meaning


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
