"""How far outputs may be from the original's."""

import numpy as np
import pytest

from flipguard_onnx import DriftError
from flipguard_onnx.reports.validation import MAX_RELATIVE_L2, Drift
from flipguard_onnx.validation.drift import drifts, judge


def drift(relative, kl=None):
    return [Drift("y", 10_000, 1.0, 0.0, relative, 0.0, None, kl)]


def test_no_drift_of_nearest_rounding_excuses_a_lost_model():
    judge(drift(0.7), drift(MAX_RELATIVE_L2), max_drift=3)
    with pytest.raises(DriftError, match=r"0\.8100 .* 2\.16 times .* at most 0\.8 at all"):
        judge(drift(0.7), drift(0.81), max_drift=2)


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
