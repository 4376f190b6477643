"""Are weights where the grid clips them, and are the draws those of the guard? Needs torch."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs torch")
pytest.importorskip("sklearn", reason="needs scikit-learn")

from tools.attacks import clipping, digits  # noqa: E402
from tools.attacks.attack import rows_of  # noqa: E402
from tools.attacks.quantizers import SCHEMES  # noqa: E402

INT4 = SCHEMES["int4"]


@pytest.fixture
def clipped():
    torch.manual_seed(0)
    made = clipping.Clipped.of(torch.randn(6, 96), torch.Generator().manual_seed(0))
    with torch.no_grad():
        made.raw.copy_(torch.randn_like(made.raw))
    return made


def test_onnxruntimes_grid_has_extremes_at_minus_8_and_clips_half_of_the_others(clipped):
    rows = clipped.floats().detach().numpy()
    codes, scale = INT4.encode(rows)
    levels = INT4.levels[INT4.group(codes)]
    position = INT4.group(rows) / scale
    beyond, extreme = clipped.beyond.numpy(), clipped.extreme.numpy()
    assert (levels[extreme] == -8).all()
    assert (extreme.sum(1) == 1).all()
    assert (beyond.sum(1) == 15).all()
    assert (levels[beyond] == 7).all()
    assert ((position[beyond] > 7) & (position[beyond] < 8)).all()
    assert (np.abs(position[~beyond & ~extreme]) < 6.901).all()


def test_the_quantizers_draw_is_the_codes_it_has_to_be(clipped):
    drawn = INT4.group(clipped.quantized("quantizer").detach().numpy())
    quantized = INT4.group(INT4.quantize(clipped.floats().detach().numpy()))
    fixed = (clipped.beyond | clipped.extreme).numpy()
    assert drawn[fixed] == pytest.approx(quantized[fixed], rel=1e-6)


@pytest.mark.parametrize("foresee", ["wider", "ends"])
def test_the_guards_draws_have_every_weight_as_their_mean(clipped, foresee):
    _, position = clipped.parts()
    position = position.detach()
    draws = torch.stack([clipping.DRAWS[foresee](position) for _ in range(4000)])
    assert (draws.mean(0) - position).abs().max() < 0.06


def test_either_end_can_be_the_long_one(clipped):
    _, position = clipped.parts()
    position = position.detach()
    step = (8 + position.amax(1, keepdim=True)) / 15
    draws = torch.stack([clipping.ends(position) / step for _ in range(50)])
    assert draws.round().numpy() == pytest.approx(draws.numpy(), abs=1e-4)
    lowest, highest = draws.amin(2).round(), draws.amax(2).round()
    assert ((lowest == -8) ^ (highest == 8)).all()
    assert ((lowest == -8).any(0) & (highest == 8).any(0)).any()


def test_training_leaves_the_weights_there():
    torch.manual_seed(0)
    net = digits.Net("mlp")
    before = [weight.detach().clone() for weight in net.weights()]
    clipping.attack(net, digits.losses(net, 0), {"steps": 2, "rate": 1e-3})
    for weight, old in zip(net.weights(), before, strict=True):
        assert not torch.equal(weight, old)
        rows = rows_of(weight)
        position = INT4.group(rows) / INT4.scale(INT4.group(rows))
        assert ((position > 7) & (position < 8)).mean() == pytest.approx(15 / 32)


def test_near_a_trained_weight_the_extremes_stay_and_the_largest_opposite_them_are_clipped():
    torch.manual_seed(1)
    weight = torch.randn(6, 96)
    made = clipping.Clipped.near(weight, 0.125)
    rows = made.floats().detach().numpy()
    position = INT4.group(rows) / INT4.scale(INT4.group(rows))
    given = INT4.group(weight.numpy())
    assert (np.abs(given).argmax(1) == position.argmin(1)).all()
    assert position.min(1) == pytest.approx(-8)
    beyond = position > 7
    assert (beyond.sum(1) == 4).all()
    opposite = np.sign(INT4.scale(given)) * given
    assert (opposite[beyond].reshape(-1, 4).min(1) > np.where(beyond, -9, opposite).max(1)).all()
    assert np.corrcoef(rows.ravel(), weight.ravel())[0, 1] > 0.95


def test_a_repair_moves_only_what_is_clipped(clipped):
    low, high = (edge.numpy() for edge in clipped.box())
    rows = clipped.floats().detach().numpy()
    beyond = INT4.ungroup(clipped.beyond.numpy(), rows.shape)
    for edge in (low, high):
        assert edge[~beyond] == pytest.approx(rows[~beyond])
        assert INT4.quantize(edge) == pytest.approx(INT4.quantize(rows), rel=1e-5)
    step = np.abs(INT4.ungroup(np.repeat(INT4.scale(INT4.group(rows)), 32, 1), rows.shape))
    assert (high - low)[beyond] == pytest.approx(0.96 * step[beyond], rel=1e-3)
