"""Decoders and encoders: what goes with token ids, and tokens sampled from the model itself."""

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

import flipguard_onnx
from flipguard_onnx.calibration.branches import at_the_start
from flipguard_onnx.calibration.pieces import Pieces
from flipguard_onnx.calibration.samples import Samples
from flipguard_onnx.calibration.synthetic import (
    SAMPLING_ROUNDS,
    TEXT,
    sampling_rounds,
    synthetic_feeds,
)
from flipguard_onnx.calibration.text_model import TextModel
from flipguard_onnx.io.model import open_model
from tests.helpers.decoders import INT64, VOCABULARY, WIDTH, decoder
from tests.helpers.samples import F, model, node, save, weights

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
        assert feed["input_ids"].max() < VOCABULARY
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
    assert sampling_rounds(samples.source, feeds[0], samples.session) == (2, 0)
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


def assert_said(samples, feeds, size):
    """Every token is what the model says after those before it, in texts of that many tokens."""
    text = TextModel.of(samples.source.proto)
    for feed in feeds:
        tokens = feed["input_ids"]
        for start in range(0, tokens.shape[1], size):
            part = tokens[:, start : start + size]
            (logits,) = samples.session.run(["logits"], text.filled({"input_ids": part}))
            top = np.sort(logits[:, :-1], axis=-1)
            sure = top[..., -1] > top[..., -2] + 20
            assert sure.mean() > 0.9
            assert (part[:, 1:] == logits[:, :-1].argmax(axis=-1))[sure].all()


@pytest.mark.parametrize(
    ("form", "goes_on"), [({}, True), ({"merged": True}, False), ({"cache": False}, False)]
)
@pytest.mark.parametrize(("length", "size"), [(64, TEXT), (33, 11), (17, 9)])
def test_a_decoder_in_pieces_draws_short_texts_from_empty_caches(
    tmp_path, form, goes_on, length, size
):
    samples = samples_of(tmp_path, decoder(sharpness=3000.0, **form))
    started, _ = at_the_start(samples.source, [])
    pieces = Pieces(started, [], tmp_path / "pieces", 1)
    assert not pieces.whole
    template = {n: a[:, :length] if a.ndim == 2 else a for n, a in samples.accepted[0].items()}
    feeds = synthetic_feeds(samples.source, pieces, template, 6, batch=3, seed=0)
    rounds = sampling_rounds(samples.source, template, pieces)
    assert rounds == (1 if goes_on else size / 2, size - 1)
    for feed in feeds:
        assert feed["input_ids"].shape == (3, length)
        assert not any(feed[name].size for name in CACHES if name in feed)
    assert_said(samples, feeds, size)
    assert len({tuple(row) for feed in feeds for row in feed["input_ids"]}) == 6


@pytest.mark.parametrize(("length", "size"), [(5, 5), (33, 11), (64, 16), (70, 14)])
def test_without_caches_a_sample_is_short_texts_one_after_the_other(tmp_path, length, size):
    samples = samples_of(tmp_path, decoder(cache=False, sharpness=3000.0))
    template = {n: a[:, :length] for n, a in samples.accepted[0].items()}
    if length > 64:
        template = {n: np.resize(a, (1, length)) for n, a in template.items()}
    feeds = synthetic_feeds(samples.source, samples.session, template, 12, batch=6, seed=0)
    for feed in feeds:
        np.testing.assert_array_equal(feed["position_ids"], [range(length)] * 6)
    assert_said(samples, feeds, size)
    starts = np.concatenate([feed["input_ids"][:, ::size] for feed in feeds])
    assert len(np.unique(starts)) > starts.size // 2  # drawn uniformly


@pytest.mark.parametrize("other", ["present.0.key", "present.0.value"])
def test_a_model_that_does_not_take_its_caches_back_draws_short_texts(tmp_path, other):
    """No output becomes a cache, or one that the model does not take."""
    proto = decoder(sharpness=3000.0)
    renamed(proto, other, "something.else")
    if other == "present.0.value":
        proto.graph.node.append(node("Squeeze", "something.else const.1", other))
        proto.graph.output[-1].CopyFrom(helper.make_tensor_value_info(other, F, None))
    assert TextModel.of(proto).goes_on == (other == "present.0.value")
    samples = samples_of(tmp_path, proto)
    feeds = sampled(samples, 4, batch=4)
    assert feeds[0]["past_key_values.0.value"].shape == (4, 1, 0, WIDTH)
    assert_said(samples, feeds, TEXT)


def test_texts_of_a_fixed_length_are_drawn_in_rounds(tmp_path):
    """In the first SAMPLING_ROUNDS places the tokens are exact."""
    samples = samples_of(tmp_path, decoder(cache=False, sharpness=3000.0, length=40))
    feeds = sampled(samples, 6, batch=3)
    rounds = sampling_rounds(samples.source, feeds[0], samples.session)
    assert rounds == (SAMPLING_ROUNDS, 0)
    for feed in feeds:
        (logits,) = samples.session.run(["logits"], feed)
        said = logits[:, :SAMPLING_ROUNDS].argmax(-1)
        np.testing.assert_array_equal(said, feed["input_ids"][:, 1 : SAMPLING_ROUNDS + 1])


def renamed(proto, name, other):
    """Give a value another name, wherever it stands."""
    for each in proto.graph.node:
        each.input[:] = [other if n == name else n for n in each.input]
        each.output[:] = [other if n == name else n for n in each.output]
    for value in proto.graph.output:
        if value.name == name:
            value.name = other


def test_what_is_not_text_is_made_up_beside_it(tmp_path):
    proto = decoder()
    states = helper.make_tensor_value_info("encoder_hidden_states", F, ["batch", "places", 4])
    proto.graph.input.append(states)
    text = TextModel.of(proto)
    assert not text.goes_on
    feed = samples_of(tmp_path, proto).require().feeds[0]
    assert feed["encoder_hidden_states"].shape == (1, 64, 4)
    assert feed["encoder_hidden_states"].std() > 0.5
    assert feed["past_key_values.0.key"].shape == (1, 1, 0, WIDTH)
    assert text.is_start(feed)


@pytest.mark.parametrize("form", FORMS)
def test_a_guard_feeds_errors_forward_on_sampled_text(tmp_path, form):
    source, said = save(decoder(**FORMS[form]), tmp_path), []
    report = flipguard_onnx.guard(
        source,
        "int4",
        output=tmp_path / "out.onnx",
        seed=1,
        progress=lambda stage, done, total: said.append((stage, total)),
    )
    assert report.preserve == "synthetic"
    assert any(tensor.preserved for tensor in report.tensors)
    assert not [tensor.unfed for tensor in report.tensors if tensor.unfed and tensor.op == "MatMul"]
    assert ("sampling token ids", 63) in said  # a step for each token but the first


def test_two_texts_are_none():
    proto = decoder()
    proto.graph.input.append(helper.make_tensor_value_info("decoder_input_ids", INT64, ["b", "s"]))
    assert TextModel.of(proto) is None


def test_how_many_logits_are_kept():
    proto = decoder()
    proto.graph.input.append(helper.make_tensor_value_info("num_logits_to_keep", INT64, []))
    feed = TextModel.of(proto).filled({"input_ids": np.ones((2, 3), np.int64)})
    assert feed["num_logits_to_keep"] == 0
    assert feed["num_logits_to_keep"].shape == ()


@pytest.mark.parametrize(("packed", "width"), [(True, 8 * 4 * 2), (False, 8 * 4)])
def test_the_size_of_a_head_that_is_left_open(tmp_path, packed, width):
    """Four heads with a size of 8 each; packed: two more of keys and two of values."""
    inputs = ["qkv", "", ""] if packed else ["q", "k", "v"]
    inputs += ["past_key_values.0.key", "past_key_values.0.value", "lengths", "total"]
    outputs = ["attended", "present.0.key", "present.0.value"]
    kinds = {"qkv": width} if packed else {"q": width, "k": 16, "v": 16}
    nodes = [
        node("Gather", "table input_ids", "hidden"),
        *(node("MatMul", f"hidden w.{kind}", kind) for kind in kinds),
        node("ReduceSum", "attention_mask axis", "counts", keepdims=0),
        node("Sub", "counts axis", "lasts"),
        node("Cast", "lasts", "lengths", to=TensorProto.INT32),
        node("Shape", "attention_mask", "shape", start=1, end=2),
        node("Squeeze", "shape", "total.long"),
        node("Cast", "total.long", "total", to=TensorProto.INT32),
        helper.make_node(
            "GroupQueryAttention",
            inputs,
            outputs,
            domain="com.microsoft",
            num_heads=4,
            kv_num_heads=2,
        ),
        node("MatMul", "attended head", "logits"),
    ]
    open_dims = ["batch_size", 2, "past_sequence_length", "kv_cache_dim"]
    caches = [f"past_key_values.0.{kind}" for kind in ("key", "value")]
    proto = model(
        nodes,
        {
            "input_ids": (INT64, ["batch_size", "sequence_length"]),
            "attention_mask": (INT64, ["batch_size", "total_sequence_length"]),
            **dict.fromkeys(caches, (F, open_dims)),
        },
        {
            "logits": (F, ["batch_size", "sequence_length", VOCABULARY]),
            **{name.replace("past_key_values", "present"): (F, None) for name in caches},
        },
        {
            "table": weights((VOCABULARY, WIDTH), 1) * 20,
            "head": weights((32, VOCABULARY), 2) * 20,
            "axis": np.array([1], np.int64),
            **{f"w.{kind}": weights((WIDTH, size), 3) * 5 for kind, size in kinds.items()},
        },
    )
    proto.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    proto.graph.value_info.extend(
        helper.make_tensor_value_info(kind, F, ["batch_size", "sequence_length", size])
        for kind, size in kinds.items()
    )
    samples = samples_of(tmp_path, proto)
    feed = samples.require().feeds[0]
    assert [feed[name].shape for name in caches] == [(1, 2, 0, 8)] * 2
    (feed,) = sampled(samples, 3, batch=3)
    assert [feed[name].shape for name in caches] == [(3, 2, 0, 8)] * 2
    assert len({tuple(text[1:]) for text in feed["input_ids"]}) == 3


def array_of(proto, name):
    return next(numpy_helper.to_array(t) for t in proto.graph.initializer if t.name == name)


def tokens_of(embedded, table):
    """Which rows of the table they are."""
    same = (embedded[:, :, None] == table).all(axis=-1)
    assert (same.sum(axis=-1) == 1).all()
    return same.argmax(axis=-1)


@pytest.mark.parametrize("beside", [True, False])
@pytest.mark.parametrize("form", [{}, {"merged": True}, {"cache": False}])
def test_embeddings_are_those_of_tokens(tmp_path, form, beside):
    """Of the table in a model beside, else of the matrix that yields the logits."""
    proto = decoder(sharpness=3000.0, ids=False, **form)
    table = array_of(proto, "head").T
    if beside:
        table = weights((VOCABULARY, WIDTH), 1) * 20
        lookup = [node("Gather", "table input_ids", "inputs_embeds")]
        names = {"input_ids": (INT64, ["b", "s"])}, {"inputs_embeds": (F, ["b", "s", WIDTH])}
        save(model(lookup, *names, {"table": table}), tmp_path, "embed_tokens.onnx")
    samples = samples_of(tmp_path, proto)
    template = samples.accepted[0]
    assert template["inputs_embeds"].shape == (1, 64, WIDTH)
    assert len(np.unique(tokens_of(template["inputs_embeds"], table))) > 20
    feeds = sampled(samples, 6, batch=3)
    rounds, _ = sampling_rounds(samples.source, feeds[0], samples.session)
    assert rounds == (0 if "cache" in form else 2)
    starts = []
    for feed in feeds:
        tokens = tokens_of(feed["inputs_embeds"], table)
        assert tokens.shape == (3, 64)
        starts += [tuple(row[1:]) for row in tokens]
        np.testing.assert_array_equal(feed["position_ids"], [range(64)] * 3)
        if "cache" not in form:
            (logits,) = samples.session.run(["logits"], feed)
            top = np.sort(logits[:, :-1], axis=-1)
            sure = top[..., -1] > top[..., -2] + 20
            assert sure.mean() > 0.9
            np.testing.assert_array_equal(tokens[:, 1:][sure], logits[:, :-1].argmax(-1)[sure])
    assert len(set(starts)) == 6


def test_a_broken_model_beside_is_no_table(tmp_path):
    (tmp_path / "embed_tokens.onnx").write_bytes(b"none")
    proto = decoder(ids=False)
    feed = samples_of(tmp_path, proto).require().feeds[0]
    tokens_of(feed["inputs_embeds"], array_of(proto, "head").T)


def test_embeddings_of_no_known_vocabulary_are_noise(tmp_path):
    proto = decoder(ids=False)
    proto.graph.output[0].type.tensor_type.shape.dim[2].dim_param = "any"
    feed = samples_of(tmp_path, proto).require().feeds[0]
    assert not np.isin(feed["inputs_embeds"], array_of(proto, "head")).any()


def test_positions_on_three_axes():
    """As Qwen2-VL wants them: of time, height and width."""
    proto = decoder()
    names = [value.name for value in proto.graph.input]
    positions = helper.make_tensor_value_info("position_ids", INT64, [3, "batch", "length"])
    proto.graph.input[names.index("position_ids")].CopyFrom(positions)
    feed = TextModel.of(proto).filled({"input_ids": np.ones((2, 3), np.int64)})
    np.testing.assert_array_equal(feed["position_ids"], [[range(3)] * 2] * 3)
