"""Decoders and encoders: what goes with token ids, and tokens sampled from the model itself."""

import numpy as np
import pytest

from flipguard_onnx.calibration.pieces import Pieces
from flipguard_onnx.calibration.samples import Samples
from flipguard_onnx.calibration.synthetic import (
    SAMPLING_ROUNDS,
    sampling_rounds,
    synthetic_feeds,
)
from flipguard_onnx.calibration.text_model import TextModel
from flipguard_onnx.io.model import open_model
from tests.helpers.decoders import VOCABULARY, WIDTH, decoder
from tests.helpers.samples import save

CACHES = ("past_key_values.0.key", "past_key_values.0.value")

FORMS = {
    "cache": {},
    "merged": {"merged": True},
    "tied": {"tied": True},
}


def samples_of(tmp_path, proto, data=None):
    return Samples(open_model(save(proto, tmp_path)), data)


@pytest.mark.parametrize("form", FORMS)
def test_made_up_inputs_start_a_text(tmp_path, form):
    proto = decoder(**FORMS[form])
    feeds = samples_of(tmp_path, proto).require().feeds
    assert len(feeds) == 8
    for feed in feeds:
        assert feed["input_ids"].shape == (1, 64)
        assert VOCABULARY // 2 < feed["input_ids"].max() < VOCABULARY
        assert np.array_equal(feed["attention_mask"], np.ones((1, 64)))
        assert np.array_equal(feed["position_ids"], np.arange(64)[None])
        for name in CACHES:
            assert feed[name].shape == (1, 1, 0, WIDTH)
            assert feed[name].dtype == np.float32
        if form == "merged":
            assert feed["use_cache_branch"].tolist() == [False]
    assert not np.array_equal(feeds[0]["input_ids"], feeds[1]["input_ids"])


def sampled(samples, count, batch):
    source, template = samples.source, samples.accepted[0]
    return synthetic_feeds(source, samples.session, template, count, batch, seed=0)


@pytest.mark.parametrize("form", FORMS)
def test_sampled_tokens_are_what_the_model_says_of_the_whole_text(tmp_path, form):
    """With logits so far apart that every token is determined by those before it."""
    samples = samples_of(tmp_path, decoder(sharpness=3000.0, **FORMS[form]))
    feeds = sampled(samples, 6, batch=3)
    assert [feed["input_ids"].shape for feed in feeds] == [(3, 64)] * 2
    assert sampling_rounds(samples.source.proto, feeds[0], whole=True) == 1
    for feed in feeds:
        (logits,) = samples.session.run(["logits"], feed)
        top = np.sort(logits[:, :-1], axis=-1)
        sure = top[..., -1] > top[..., -2] + 20
        assert sure.mean() > 0.9
        found, said = feed["input_ids"][:, 1:], logits[:, :-1].argmax(axis=-1)
        np.testing.assert_array_equal(found[sure], said[sure])
    assert len({tuple(text[1:]) for feed in feeds for text in feed["input_ids"]}) == 6


def test_sampled_tokens_follow_the_model_s_distribution(tmp_path):
    """Of the tokens that follow the same two: as often as the model says."""
    samples = samples_of(tmp_path, decoder(sharpness=0.2))
    template = samples.accepted[0]
    template = {
        name: array[:, :3] if array.ndim == 2 else array for name, array in template.items()
    }
    feeds = synthetic_feeds(samples.source, samples.session, template, 60_000, 60_000, seed=0)
    texts = feeds[0]["input_ids"]
    assert np.bincount(texts[:, 0]).min() > 1000  # the first is drawn uniformly
    pairs, counts = np.unique(texts[:, :2], axis=0, return_counts=True)
    common = pairs[np.argsort(-counts)[:5]]
    shape = len(common), 2
    text = TextModel.of(samples.source.proto)
    (logits,) = samples.session.run(["logits"], text.filled({"input_ids": common}))
    assert logits.shape == (*shape, VOCABULARY)
    chances = np.exp(logits[:, 1] - logits[:, 1].max(axis=1, keepdims=True))
    chances /= chances.sum(axis=1, keepdims=True)
    for pair, expected in zip(common, chances, strict=True):
        next_tokens = texts[(texts[:, :2] == pair).all(axis=1), 2]
        assert len(next_tokens) > 200
        assert 0.05 < expected.max() < 0.95
        found = np.bincount(next_tokens, minlength=VOCABULARY) / len(next_tokens)
        error = np.sqrt(expected * (1 - expected) / len(next_tokens))
        assert np.all(np.abs(found - expected) < 4 * error + 1e-3)


def test_a_decoder_in_pieces_samples_all_places_at_once_from_empty_caches(tmp_path):
    """In the first SAMPLING_ROUNDS places the tokens are exact."""
    samples = samples_of(tmp_path, decoder(sharpness=3000.0))
    pieces = Pieces(samples.source, [], tmp_path / "pieces", 1)
    assert not pieces.whole
    template = samples.accepted[0]
    feeds = synthetic_feeds(samples.source, pieces, template, 6, batch=3, seed=0)
    assert sampling_rounds(samples.source.proto, feeds[0], whole=False) == SAMPLING_ROUNDS
    for feed in feeds:
        assert feed[CACHES[0]].size == 0
        (logits,) = samples.session.run(["logits"], feed)
        exact = slice(0, SAMPLING_ROUNDS)
        likeliest = logits[:, exact].argmax(-1)
        np.testing.assert_array_equal(likeliest, feed["input_ids"][:, 1 : SAMPLING_ROUNDS + 1])
