"""Inputs from token ids alone, and from text by the tokenizer beside the model."""

import json
import sys
from importlib.util import find_spec

import numpy as np
import pytest

import flipguard_onnx
from flipguard_onnx import ModelError, OptionError
from flipguard_onnx.calibration.samples import Samples
from flipguard_onnx.io.model import open_model
from tests.helpers.command import call, names
from tests.helpers.decoders import VOCABULARY, WIDTH, decoder, encoder
from tests.helpers.hostile import one_line
from tests.helpers.samples import matmul, save

CACHES = ("past_key_values.0.key", "past_key_values.0.value")

reads_text = pytest.mark.skipif(not find_spec("tokenizers"), reason="tokenizers is not installed")


def write_tokenizer(folder):
    """One token per word w0, w1, ..., and the same number; what is no such word is 0."""
    words = {f"w{number}": number for number in range(VOCABULARY + 10)}
    content = {
        "version": "1.0",
        "truncation": {
            "direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0
        },
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "w0"},
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(content))


def given(folder, proto, data):
    """The feeds of a file, for a model in `folder`."""
    return Samples(open_model(save(proto, folder)), data).given


def npz(folder, **arrays):
    np.savez(folder / "data.npz", **arrays)
    return folder / "data.npz"


IDS = np.random.default_rng(0).integers(0, VOCABULARY, (37, 9))


@pytest.mark.parametrize("merged", [False, True])
def test_token_ids_of_a_decoder_are_enough(tmp_path, merged):
    feeds = given(tmp_path, decoder(merged=merged), npz(tmp_path, input_ids=IDS))
    assert [len(feed["input_ids"]) for feed in feeds] == [16, 16, 5]
    np.testing.assert_array_equal(np.concatenate([feed["input_ids"] for feed in feeds]), IDS)
    for feed in feeds:
        rows = len(feed["input_ids"])
        np.testing.assert_array_equal(feed["attention_mask"], np.ones((rows, 9)))
        np.testing.assert_array_equal(feed["position_ids"], np.tile(np.arange(9), (rows, 1)))
        assert {feed[name].shape for name in CACHES} == {(rows, 1, 0, WIDTH)}
        assert ("use_cache_branch" in feed) == merged
    assert Samples(open_model(tmp_path / "model.onnx"), tmp_path / "data.npz").require()


def test_a_given_mask_is_kept_and_tells_the_positions(tmp_path):
    mask = np.array([[0, 0, 1, 1], [1, 1, 1, 1]])
    data = npz(tmp_path, input_ids=IDS[:2, :4], attention_mask=mask)
    (feed,) = given(tmp_path, decoder(), data)
    np.testing.assert_array_equal(feed["attention_mask"], mask)
    assert feed["position_ids"].tolist() == [[0, 0, 0, 1], [0, 1, 2, 3]]


def test_given_caches_lengthen_the_mask(tmp_path):
    caches = {name: np.ones((2, 1, 3, WIDTH), np.float32) for name in CACHES}
    (feed,) = given(tmp_path, decoder(), npz(tmp_path, input_ids=IDS[:2, :4], **caches))
    np.testing.assert_array_equal(feed["attention_mask"], np.ones((2, 7)))
    np.testing.assert_array_equal(feed["position_ids"], [[3, 4, 5, 6]] * 2)
    for name, cache in caches.items():
        np.testing.assert_array_equal(feed[name], cache)


def test_token_ids_of_an_encoder_are_enough(tmp_path):
    feeds = given(tmp_path, encoder(), npz(tmp_path, input_ids=IDS[None, :4].repeat(2, 0)))
    assert [feed["input_ids"].tolist() for feed in feeds] == [IDS[:4].tolist()] * 2
    for feed in feeds:
        np.testing.assert_array_equal(feed["attention_mask"], np.ones((4, 9)))
        np.testing.assert_array_equal(feed["token_type_ids"], np.zeros((4, 9)))
        assert {array.dtype for array in feed.values()} == {np.dtype(np.int64)}


@pytest.mark.parametrize("token", [-1, VOCABULARY])
def test_token_ids_beyond_the_vocabulary(tmp_path, token):
    source = save(decoder(), tmp_path)
    data = npz(tmp_path, input_ids=np.array([[1, token, 2]]))
    message = one_line(call(source, "--data", data))
    assert message == (
        f"flipguard-onnx: {data}: input 'input_ids' gets the token id {token}; allowed: 0 to 49, "
        "the model's vocabulary"
    )
    assert names(tmp_path) == ["data.npz", "model.onnx"]


def test_some_of_the_caches(tmp_path):
    source = save(decoder(), tmp_path)
    cache = np.ones((1, 1, 3, WIDTH), np.float32)
    data = npz(tmp_path, input_ids=IDS[:1], **{CACHES[1]: cache})
    message = one_line(call(source, "--data", data))
    assert message == (
        f"flipguard-onnx: {data}: no array for input '{CACHES[0]}', a cache; found 1 of 2; "
        "allowed: all of them, or none, which are empty ones"
    )
    assert names(tmp_path) == ["data.npz", "model.onnx"]


@reads_text
@pytest.mark.parametrize("folder", ["", "onnx"])
@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_text(tmp_path, folder, suffix):
    """Longer than the tokenizer's own limit, cut into sequences of 256, what is left dropped."""
    write_tokenizer(tmp_path)
    tokens = np.random.default_rng(1).integers(1, VOCABULARY, 3 * 256 + 100)
    words = [f"w{token}" for token in tokens]
    data = tmp_path / f"text{suffix}"
    if suffix == ".txt":
        data.write_text("\ufeff" + "\n".join(words), "utf-8")
    else:
        lines = [json.dumps({"text": " ".join(part)}) for part in (words[:5], words[5:])]
        data.write_text("\n\n".join([json.dumps({"text": " "}), *lines, ""]))
    (tmp_path / "onnx").mkdir()
    (feed,) = given(tmp_path / folder, decoder(), data)
    np.testing.assert_array_equal(feed["input_ids"], tokens[: 3 * 256].reshape(3, 256))
    np.testing.assert_array_equal(feed["position_ids"], [np.arange(256)] * 3)
    assert feed["past_key_values.0.key"].shape == (3, 1, 0, WIDTH)


@reads_text
def test_a_short_text_is_one_sequence_and_of_a_long_one_some_are_taken(tmp_path):
    write_tokenizer(tmp_path)
    data = tmp_path / "text.txt"
    data.write_text("w7 w3 w5")
    (feed,) = given(tmp_path, encoder(), data)
    assert feed["input_ids"].tolist() == [[7, 3, 5]]
    data.write_text("".join(f"w{number // 256 % VOCABULARY} " for number in range(256 * 500)))
    feeds = given(tmp_path, encoder(), data)
    ids = np.concatenate([feed["input_ids"] for feed in feeds])
    assert ids.shape == (128, 256)
    assert (ids == ids[:, :1]).all()
    assert ids[0, 0] == 0
    assert ids[-1, 0] == 499 % VOCABULARY


@reads_text
def test_a_model_of_fixed_sizes_gets_them(tmp_path):
    write_tokenizer(tmp_path)
    data = tmp_path / "text.txt"
    data.write_text(" ".join(f"w{number}" for number in range(20)))
    feeds = given(tmp_path, encoder(2, 4), data)
    ids = [feed["input_ids"].tolist() for feed in feeds]
    assert ids == [[[0, 1, 2, 3], [4, 5, 6, 7]], [[8, 9, 10, 11], [12, 13, 14, 15]]]
    data.write_text("w1 w2 w3")
    with pytest.raises(ModelError, match=r"text\.txt: holds 3 tokens; allowed: 8 or more"):
        given(tmp_path, encoder(2, 4), data)


@reads_text
def test_a_guard_on_text(tmp_path):
    write_tokenizer(tmp_path)
    data = tmp_path / "text.txt"
    data.write_text(" ".join(f"w{n * n % VOCABULARY}" for n in range(64 * 40)))
    source = save(decoder(length=64), tmp_path)
    report = flipguard_onnx.guard(source, data=data, output=tmp_path / "out.onnx")
    assert report.preserve == "data"
    assert report.validation.inputs == str(data)
    assert any(tensor.preserved for tensor in report.tensors)


def refused(folder, data, content, proto=None, error=ModelError):
    path = folder / data
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    source = save(proto or encoder(), folder)
    result = call(source, "--data", path)
    message = one_line(result)
    assert result.exit_code == 2
    assert not [name for name in names(folder) if "flipguard" in name]
    with pytest.raises(error):
        Samples(open_model(source), path).given  # noqa: B018
    return message.removeprefix("flipguard-onnx: ").removeprefix(f"{path}: ").rstrip("\n")


@pytest.mark.parametrize(
    ("data", "content", "message"),
    [
        ("a.txt", "", "holds no text"),
        ("a.txt", "\n \n", "holds no text"),
        ("a.jsonl", "\n\n", "holds no text"),
        ("a.txt", b"caf\xe9", "byte 0xe9 at offset 3 is not UTF-8; allowed: text in UTF-8"),
        ("a.jsonl", '{"text": "w1"}\n{"txt": "w2"}', 'line 2 is \'{"txt": "w2"}\'; allowed: an'),
        ("a.jsonl", '{"text": 3}', "line 1 is '{\"text\": 3}'; allowed: an object with a string"),
        ("a.jsonl", "[" * 100_000, "line 1 is '[[[["),
        ("a.jsonl", "w1 w2", "line 1 is 'w1 w2'"),
        ("a.txt", "w1 " * (6 << 20), "holds 18,874,368 bytes of text; allowed: up to 16,777,216"),
    ],
)
def test_text_that_is_none(tmp_path, data, content, message):
    write_tokenizer(tmp_path)
    assert refused(tmp_path, data, content).startswith(message)


def test_text_for_a_model_that_takes_none(tmp_path):
    assert refused(tmp_path, "a.txt", "w1", matmul()) == (
        "the model takes no token ids, so text is no input for it"
    )
    proto = decoder()
    proto.graph.input.append(proto.graph.input[0])
    proto.graph.input[-1].name = "pixels"
    assert refused(tmp_path, "a.txt", "w1", proto) == (
        "text says nothing of the input 'pixels'; allowed: an .npz file with arrays for all inputs"
    )


def test_no_tokenizer_beside_the_model(tmp_path):
    assert refused(tmp_path, "a.txt", "w1", error=OptionError) == (
        f"text needs a tokenizer; there is no tokenizer.json in {tmp_path} or one folder up; "
        "allowed: a model with one, or an .npz file with token ids"
    )


def test_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    write_tokenizer(tmp_path)
    assert refused(tmp_path, "a.txt", "w1", error=OptionError) == (
        "text needs a package that is not installed: pip install 'flipguard-onnx[text]'"
    )


@reads_text
def test_a_tokenizer_of_another_model(tmp_path):
    write_tokenizer(tmp_path)
    assert refused(tmp_path, "a.txt", f"w1 w{VOCABULARY + 3}") == (
        "input 'input_ids' gets the token id 53; allowed: 0 to 49, the model's vocabulary"
    )


@reads_text
@pytest.mark.parametrize("content", ["", "{}", '{"model": {"type": "none"}}'])
def test_a_file_that_is_no_tokenizer(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    message = refused(tmp_path, "a.txt", "w1")
    assert message.startswith(f"{tmp_path / 'tokenizer.json'}: does not tokenize the text: ")


@reads_text
def test_text_that_is_no_unicode(tmp_path):
    """Half of a surrogate pair, which JSON can write and UTF-8 cannot."""
    write_tokenizer(tmp_path)
    message = refused(tmp_path, "a.jsonl", '{"text": "w1 \\ud800"}')
    assert message.startswith(f"{tmp_path / 'tokenizer.json'}: does not tokenize the text: ")
