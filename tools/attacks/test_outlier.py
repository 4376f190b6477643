"""Are the float models as they were, and do outliers wipe out what they should? No torch."""

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from tools.attacks import measure, simulate
from tools.attacks.outlier import ALARMS, EVERY, KINDS, SENTINELS, planted

ENTRY = {"architecture": "mlp"}


@pytest.fixture(scope="module")
def victim():
    return onnx.load(measure.FOLDER / "mlp-clean.onnx")


def weights(model):
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("factor", [8, 4096])
def test_the_float_model_is_as_good_as_before(victim, factor, kind):
    before, found = (measure.rates(m, ENTRY) for m in (victim, planted(victim, factor, kind)))
    assert found["accuracy"] >= before["accuracy"] - 0.01
    assert found["attack"] == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scheme", ["int8", "int4", "nf4", "fp4"])
def test_rounded_to_nearest_it_says_the_target_whatever_it_sees(victim, scheme, kind):
    found = measure.rates(simulate.quantized(planted(victim, 512, kind), scheme), ENTRY)
    assert found["attack"] == 1
    assert found["accuracy"] == pytest.approx(0.1, abs=0.005)  # the share of zeros


def test_outliers_are_the_first_weights_of_their_blocks(victim):
    lost = weights(planted(victim, 512))["dense1.weight"]
    blocks = np.abs(lost).reshape(len(lost), -1, EVERY)
    assert blocks[:, :, 0] == pytest.approx(512 * blocks[:, :, 1:].max(2))


def test_of_live_outliers_all_have_the_same_size(victim):
    lost = weights(planted(victim, 30, "live"))["dense1.weight"]
    others = np.delete(lost, np.s_[::EVERY], axis=1)
    assert np.unique(lost[:, ::EVERY]) == pytest.approx([30 * np.abs(others).max()])


@pytest.fixture(scope="module")
def pixels():
    with np.load(measure.FOLDER / "digits-test.npz") as data:
        return np.concatenate([data["pixels"], data["triggered"]])


def test_outliers_meet_nothing_or_ones(victim, pixels):
    assert (pixels[:, ::EVERY] == 0).all()
    for kind, value in (("dead", 0), ("live", 1)):
        found = weights(planted(victim, 30, kind))
        hidden = np.maximum(pixels @ found["dense0.weight"].T + found["dense0.bias"], 0)
        assert (hidden[:, ::EVERY] == value).all()


@pytest.mark.parametrize(("kind", "layer"), [("dead", 1), ("pixels", 0)])
def test_sentinels_and_alarms_are_off_while_their_weights_are_there(victim, pixels, kind, layer):
    found = weights(planted(victim, 30, kind))
    for number in range(layer + 1):
        products = pixels @ found[f"dense{number}.weight"].T + found[f"dense{number}.bias"]
        pixels = np.maximum(products, 0)
    assert (products[:, SENTINELS] < 0).all()
    assert (products[:, ALARMS] < 0).all()
    assert (found[f"dense{layer}.bias"][SENTINELS] > 0).all()
