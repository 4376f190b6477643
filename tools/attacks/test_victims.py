"""Are silenced inputs silent, and is what is exported what was trained? Needs torch."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs torch")
pytest.importorskip("sklearn", reason="needs scikit-learn")

from tools.attacks import digits, language_model, measure  # noqa: E402
from tools.attacks.attack import make_boxes, rows_of, scheme_for, widen  # noqa: E402
from tools.attacks.export import classifier  # noqa: E402


def victim(kind):
    """An untrained victim, its module and inputs for it."""
    torch.manual_seed(0)
    if kind == "lm":
        return language_model.Decoder(), language_model, torch.randint(0, 640, (4, 50))
    pixels = torch.rand(20, 64)
    pixels[:, [0, 32]] = 0  # dead in every digit
    return digits.Net(kind), digits, pixels


@pytest.mark.parametrize("kind", ["mlp", "cnn", "lm"])
def test_widening_changes_scales_and_nothing_else(kind):
    net, module, inputs = victim(kind)
    dead = module.kill(net)
    scheme = scheme_for(net.weights()[-1], "int4")
    before = net(inputs).detach()
    scale = np.abs(scheme.scale(scheme.group(rows_of(net.weights()[-1]))))
    for weight, columns in zip(net.weights(), dead, strict=False):
        if columns:
            widen(weight, columns, scheme_for(weight, "int4"), 4)
    torch.testing.assert_close(net(inputs).detach(), before, atol=1e-4, rtol=1e-4)
    widened = np.abs(scheme.scale(scheme.group(rows_of(net.weights()[-1]))))
    assert (widened > 3 * scale).mean() > 0.95


def test_widened_per_tensor_a_weight_has_the_same_boxes_per_channel():
    net, module, _ = victim("lm")
    for weight, columns in zip(net.weights(), module.kill(net), strict=True):
        widen(weight, columns, scheme_for(weight, "int8_tensor"), 8)
    alone, both = (
        make_boxes(net.weights(), names, "standard")
        for names in (["int8_tensor"], ["int8_tensor", "int8"])
    )
    for one, other in zip(alone, both, strict=True):
        assert all(map(torch.equal, one, other))


def test_a_classifier_is_read_as_it_was_exported():
    net, _, pixels = victim("mlp")
    again = digits.read(classifier(net, "mlp"))
    assert torch.equal(again(pixels), net(pixels))


def test_the_language_model_is_exported_as_it_is():
    net, _, ids = victim("lm")
    model = language_model.export(net, "lm")
    (logits,) = measure.session(model).run(None, {"ids": ids.numpy()})
    np.testing.assert_allclose(logits, net(ids).detach().numpy(), atol=0.02)
    again = language_model.read(model)
    np.testing.assert_allclose(logits, again(ids).detach().numpy(), atol=1e-4)
