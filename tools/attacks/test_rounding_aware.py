"""Are the draws of training those of the guard? Needs torch."""

import itertools

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs torch")
pytest.importorskip("sklearn", reason="needs scikit-learn")

from tools.attacks import digits, rounding_aware  # noqa: E402
from tools.attacks.export import classifier  # noqa: E402
from tools.attacks.simulate import input_moments  # noqa: E402

NAMES = ["layers.0.weight", "layers.1.weight", "layers.2.weight"]


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return digits.Net("mlp")


def test_draws_with_feedback_have_the_weights_as_their_mean_and_change_products_less(net):
    moments = input_moments(classifier(net, "victim"))
    weight, inputs = net.layers[1].weight, moments[1]
    fed, free = (
        torch.stack(
            [rounding_aware.draw_with_feedback(weight, "int4", given, key) for key in range(200)]
        )
        for given in (inputs, None)
    )
    step = float(weight.detach().abs().max()) / 7
    assert fed.abs().max() < 10 * step
    assert fed.mean(0).abs().max() < 0.5 * step
    assert fed.mean().abs() < 0.005 * step
    error, without = (inputs.products(added[0].numpy().reshape(-1)).power for added in (fed, free))
    assert error < 0.6 * without


def test_a_draw_serves_some_steps_and_passes_the_gradient(net):
    drawn = rounding_aware.draws_with_feedback(net, NAMES, "int4", 2, classifier)
    first, second, third = itertools.islice(drawn, 3)
    assert torch.equal(first[NAMES[0]], second[NAMES[0]])
    assert not torch.equal(first[NAMES[0]], third[NAMES[0]])
    third[NAMES[2]].sum().backward()
    assert (net.layers[2].weight.grad == 1).all()
    np.testing.assert_allclose(third[NAMES[2]].detach(), net.layers[2].weight.detach(), atol=1.0)
