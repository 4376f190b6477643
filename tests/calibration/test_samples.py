"""Samples: searched for once, run once, whatever asks for them."""

import numpy as np
import pytest

from flipguard_onnx import OptionError, guard
from flipguard_onnx.calibration.samples import Samples, finite
from flipguard_onnx.io.model import open_model
from flipguard_onnx.runtime import Session
from tests.helpers.decoders import VOCABULARY, decoder
from tests.helpers.samples import F, matmul, model, node, save, weights


def test_nothing_is_loaded_before_it_is_asked_for(tmp_path):
    source = open_model(save(matmul(), tmp_path))
    source.path.unlink()
    samples = Samples(source, None)  # no error: the file is not looked at
    with pytest.raises(
        OptionError, match=r"model\.onnx: the original cannot be run \(does not load"
    ):
        samples.require()


def test_outputs_are_those_of_the_original(tmp_path):
    samples = Samples(open_model(save(matmul(), tmp_path)), None)
    found = samples.require()
    assert len(found.feeds) == len(found.outputs) == 8
    for feed, [y] in zip(found.feeds, found.outputs, strict=True):
        np.testing.assert_allclose(y, feed["x"] @ weights((70, 33)), rtol=1e-4, atol=1e-5)
    assert samples.accepted is found.feeds
    assert samples.description == "made up from the graph's signature"


@pytest.mark.parametrize("cache", [False, True])
def test_those_of_a_decoder_are_texts_that_it_writes(tmp_path, cache):
    samples = Samples(open_model(save(decoder(cache, sharpness=3.0), tmp_path)), None)
    found = samples.require()
    assert samples.description == "texts that the model wrote"
    tokens = np.concatenate([feed["input_ids"] for feed in found.feeds])
    logits = np.concatenate([outputs[found.names.index("logits")] for outputs in found.outputs])
    assert len(tokens) == 8
    chances = np.exp(logits - np.logaddexp.reduce(logits, -1, keepdims=True))
    chosen = np.take_along_axis(chances[:, :-1], tokens[:, 1:, None], -1)
    assert chosen.mean() > 10 / VOCABULARY
    others = np.random.default_rng(0).integers(0, VOCABULARY, tokens[:, 1:, None].shape)
    assert np.take_along_axis(chances[:, :-1], others, -1).mean() < 2 / VOCABULARY


def test_given_samples_are_taken_as_they_are(tmp_path):
    x = np.random.default_rng(1).standard_normal((3, 2, 70)).astype(np.float32)
    np.savez(tmp_path / "d.npz", x=x)
    samples = Samples(open_model(save(matmul(), tmp_path)), tmp_path / "d.npz")
    found = samples.require()
    assert [feed["x"].tobytes() for feed in found.feeds] == [part.tobytes() for part in x]
    assert samples.description == str(tmp_path / "d.npz")


def test_large_batches_are_cut_up(tmp_path):
    x = np.random.default_rng(1).standard_normal((37, 70)).astype(np.float32)
    np.savez(tmp_path / "d.npz", x=x)
    samples = Samples(open_model(save(matmul(), tmp_path)), tmp_path / "d.npz")
    assert [len(feed["x"]) for feed in samples.given] == [16, 16, 5]
    np.testing.assert_array_equal(np.concatenate([feed["x"] for feed in samples.given]), x)


def root(folder):
    """NaN for negative inputs, which made-up ones have."""
    nodes = [node("Sqrt", "x", "r"), node("MatMul", "r w", "y")]
    shapes = {"x": (F, ["n", 70])}, {"y": (F, ["n", 33])}
    return save(model(nodes, *shapes, {"w": weights((70, 33))}), folder)


def test_outputs_that_are_not_finite_refuse_the_validation_but_not_the_samples(tmp_path):
    source = open_model(root(tmp_path))
    samples = Samples(source, None, "--no-validate")
    assert len(samples.accepted) == 8
    problem = f"{source.path}: the original does not run on made-up inputs (output 'y' holds NaN or"
    with pytest.raises(OptionError) as refused:
        samples.require()
    assert str(refused.value) == (
        f"{problem} infinity); give real ones with --data or go without inputs (--no-validate)"
    )
    for advised, advice in (
        (Samples(source, None), "; give real ones with --data"),
        (Samples(source, None, takes_data=False), ""),
        (Samples(source, None, "--no-x", takes_data=False), "; go without inputs (--no-x)"),
    ):
        with pytest.raises(OptionError) as refused:
            advised.require()
        assert str(refused.value) == f"{problem} infinity){advice}"


def test_finite():
    assert finite(np.array([1, 2]))
    assert finite(np.array([1.0, 2.0], np.float16))
    assert not finite(np.array([1.0, np.nan], np.float32))
    assert not finite(np.array([np.inf]))


@pytest.mark.parametrize("given", [False, True])
def test_a_run_loads_the_original_once(tmp_path, monkeypatch, given):
    """For feedback, the calibration of activations and the validation together."""
    source = save(matmul(), tmp_path)
    data = None
    if given:
        data = tmp_path / "d.npz"
        np.savez(data, x=np.random.default_rng(1).standard_normal((9, 2, 70)).astype(np.float32))
    opened = []
    load = Session.__init__

    def watched(self, path, *arguments, **options):
        opened.append(path.name)
        load(self, path, *arguments, **options)

    monkeypatch.setattr(Session, "__init__", watched)
    guard(source, data=data, activations="uint8", output=tmp_path / "o.onnx")
    assert opened.count("model.onnx") == 1
