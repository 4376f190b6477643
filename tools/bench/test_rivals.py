"""EFRAP's objective on small layers, and the rivals on a model. Needs torch."""

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs torch")
pytest.importorskip("sklearn", reason="needs scikit-learn")

from flipguard_onnx.calibration import moments  # noqa: E402
from tools import rivals  # noqa: E402
from tools.attacks.measure import FOLDER  # noqa: E402
from tools.bench.defences import Case  # noqa: E402
from tools.bench.rivals import RIVALS, SAMPLES, efrap, samples  # noqa: E402
from tools.bench.rows import evaluate  # noqa: E402

MANIFEST = {entry["name"]: entry for entry in json.loads((FOLDER / "manifest.json").read_text())}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def layer(seed=0):
    """Weights between the levels -1, 0, 1, with the nearest level and the other one."""
    weights = np.random.default_rng(seed).uniform(-0.9, 0.9, 6 * 8).astype(np.float32)
    nearest = np.rint(weights)
    other = np.where(nearest == 0, np.sign(weights), 0).astype(np.float32)
    return weights, nearest, other


def test_without_inputs_every_error_is_flipped():
    assert efrap(*layer(), np.zeros((8, 8))).all()


def test_large_inputs_keep_the_nearest_levels():
    assert not efrap(*layer(), 1e4 * np.eye(8)).any()


def test_flips_preserve_the_products_better_than_flips_anywhere():
    weights, nearest, other = layer(1)
    x = np.random.default_rng(2).standard_normal((500, 2)) @ np.ones((2, 8))
    moments = x.T @ x / len(x)
    flips = efrap(weights, nearest, other, moments)
    rng = np.random.default_rng(3)

    def lost(flipped):
        change = (weights - np.where(flipped, other, nearest)).reshape(6, 8)
        return np.einsum("ij,jk,ik->", change, moments, change)

    assert flips.any()
    assert lost(flips) < min(lost(rng.permutation(flips)) for _ in range(50))


def test_weights_without_a_neighbour_stay():
    weights, nearest, other = layer()
    other[:5] = nearest[:5]
    assert not efrap(weights, nearest, other, np.zeros((8, 8)))[:5].any()


@pytest.mark.parametrize("kind", ["mlp", "lm"])
def test_a_thousand_samples(kind):
    found = samples(kind)
    assert found.shape[0] * found.shape[1] == SAMPLES
    assert len(np.unique(found.reshape(SAMPLES, -1), axis=0)) > 0.99 * SAMPLES


def test_rivals_on_a_classifier():
    clean = MANIFEST["mlp-clean"]
    chosen = {name: RIVALS[name] for name in ("none", "efrap", "gptq", "ours + data")}
    rows = evaluate(MANIFEST["mlp-standard-int4"], "int4", clean, chosen, seeds=1)
    found = {row.defence: row for row in rows}
    assert found["none"].attack > 0.9
    for name in ("efrap", "gptq", "ours + data"):
        assert found[name].attack < 0.1
        assert found[name].utility > 0.9
        assert found[name].flips > 0
    assert rivals.markdown(rows).count("| 0 of 1 |") == 3


def test_gptq_falls_to_who_foresees_it(monkeypatch):
    monkeypatch.setattr(moments, "DAMPINGS", (0.1,))  # which he foresaw
    chosen = {name: RIVALS[name] for name in ("gptq", "ours + data")}
    rows = evaluate(MANIFEST["mlp-gptq-int4"], "int4", MANIFEST["mlp-clean"], chosen, seeds=1)
    found = {row.defence: row for row in rows}
    assert found["gptq"].float_attack < 0.02
    assert found["gptq"].attack > 0.9
    assert found["ours + data"].attack < 0.02
    assert found["ours + data"].utility > 0.95


def test_qvec_moves_weights_away_from_their_levels(tmp_path):
    case = Case(FOLDER / "mlp-clean.onnx", "int8", tmp_path)
    flips = [RIVALS[f"qvec-{alpha}"].make(case, tmp_path / "q.onnx", 0) for alpha in ("0.5", "1")]
    share = np.array(flips) / case.size  # of weights farther than a third, a quarter of a step
    assert share == pytest.approx([1 / 3, 1 / 2], abs=0.03)


@pytest.mark.parametrize(
    ("name", "attack"), [("mlp-standard-int4", 0.01), ("mlp-margin50-int4", 1)]
)
def test_qvec_falls_to_who_keeps_a_margin(name, attack):
    chosen = {"qvec-0.5": RIVALS["qvec-0.5"]}
    (row,) = evaluate(MANIFEST[name], "int4", MANIFEST["mlp-clean"], chosen, seeds=1)
    assert row.attack == pytest.approx(attack, abs=0.02)
