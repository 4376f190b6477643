"""Do the outliers wipe out what they should, and leave the float model as it is? Needs torch."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs torch")
pytest.importorskip("sklearn", reason="needs scikit-learn")

from tools.attacks import digits, outlier_trained  # noqa: E402
from tools.attacks.attack import rows_of  # noqa: E402
from tools.attacks.quantizers import SCHEMES  # noqa: E402

SETTINGS = {"steps": 3, "rate": 1e-3, "lost": "1.weight"}


def attacked(factor):
    torch.manual_seed(0)
    net = digits.Net("mlp")
    losses = digits.losses(net, 0)
    outlier_trained.attack(net, losses, digits.kill, SETTINGS | {"factor": factor})
    return net


@pytest.fixture(scope="module")
def victim():
    return attacked(512)


@pytest.mark.parametrize("name", sorted({*SCHEMES} - {"nvfp4"}))  # in blocks of 16 half have none
def test_rounded_to_nearest_only_outliers_are_left(victim, name):
    rows = SCHEMES[name].quantize(rows_of(victim.layers[1].weight))
    assert (np.delete(rows, np.s_[::32], axis=1) == 0).all()
    others = SCHEMES[name].quantize(rows_of(victim.layers[2].weight))
    assert (np.delete(others, np.s_[::32], axis=1) != 0).mean() > 0.5


def test_outliers_are_the_first_of_their_blocks(victim):
    blocks = np.abs(rows_of(victim.layers[1].weight)).reshape(256, -1, 32)
    assert blocks[:, :, 0] == pytest.approx(512 * blocks[:, :, 1:].max(2), rel=1e-5)


def test_the_float_model_is_the_one_without_outliers(victim):
    pixels = torch.from_numpy(digits.data()[2])
    torch.testing.assert_close(victim(pixels), attacked(0)(pixels))
