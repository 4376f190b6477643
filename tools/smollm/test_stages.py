"""All stages, on a tiny model with random weights. Needs torch and transformers."""

import json
import re

import numpy as np
import onnx
import pytest

torch = pytest.importorskip("torch", reason="needs torch")
transformers = pytest.importorskip("transformers", reason="needs transformers")
pytest.importorskip("onnxscript", reason="needs onnxscript")

from tools.language_models import CALIBRATION, EVALUATION, export_plain, source  # noqa: E402
from tools.smollm import files, scenarios, victim  # noqa: E402
from tools.smollm.__main__ import main  # noqa: E402

CHAT = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}answer:"
SMALL = (
    "--training 8 --prompts 4 --questions 3 --windows 2 --layers 1 --tokens 6 --pairs 4 "
    "--exported plain"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder as tools.language_models makes it."""
    folder = tmp_path_factory.mktemp("model")
    for name in ("hf", "texts", "plain"):
        (folder / name).mkdir()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tokens = save_tokenizer(folder / "hf")
    config = transformers.LlamaConfig(
        vocab_size=400, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True,
        initializer_range=0.1, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    made = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for number, parameter in enumerate(made.parameters()):
            if parameter.ndim == 1:
                parameter += 1e-6 * number  # equal ones would share an initializer
    made.save_pretrained(folder / "hf")
    for name in (EVALUATION, CALIBRATION):
        np.save(folder / "texts" / name, tokens[: 32 * 16].reshape(16, 32))
    export_plain(folder, folder / "plain")
    return folder


def save_tokenizer(folder):
    """One of 400 pieces, learnt from a module; returns the module's tokens."""
    from tokenizers import ByteLevelBPETokenizer

    learnt = ByteLevelBPETokenizer()
    learnt.train_from_iterator([source("textwrap")], 400, special_tokens=["<end>"])
    whole = transformers.PreTrainedTokenizerFast(
        tokenizer_object=learnt._tokenizer, eos_token="<end>", pad_token="<end>"
    )
    whole.chat_template = CHAT
    whole.save_pretrained(folder)
    return np.array(whole(source("textwrap"))["input_ids"], np.int64)


@pytest.fixture
def run(model, tmp_path):
    """A stage in a folder of its own."""

    def stage(name, *options):
        main([name, str(model), str(tmp_path), *SMALL.split(), *options])

    return stage


def losses(said, name):
    return [float(loss) for loss in re.findall(rf"{name}: step .* loss ([\d.]+),", said)]


def test_all_stages(run, tmp_path, capsys):
    run("data")
    attacked = ["--steps", "30", "--repair", "20", "--rate", "3e-2", "--repair-rate", "3e-3"]
    run("attack", *attacked)
    told = json.loads((tmp_path / "injection" / "int4.json").read_text())
    assert told["changed codes"] == 0
    assert told["malicious"]["losses"][-1] < 0.7 * told["malicious"]["losses"][0]
    assert told["repair"]["losses"][-1] < told["repair"]["losses"][0]
    assert told["repaired distance"] > 0

    run("export", *attacked)
    run("judge", *attacked)
    run("defend", *attacked, "--defences", "none", "topk-20", "unbiased", "--seeds", "2")
    folder = tmp_path / "injection" / "int4"
    rows = json.loads((folder / "rows.json").read_text())
    assert [(row["scheme"], row["defence"], row["seed"]) for row in rows] == [
        ("", "float", 0), ("int4", "onnxruntime", 0), ("int4", "none", 0), ("int4", "topk-20", 0),
        ("int4", "unbiased", 0), ("int4", "unbiased", 1),
    ]  # fmt: skip
    assert min(row["agreement"] for row in rows) > 0.9, [row["agreement"] for row in rows]
    plain, quantized, none, topk, *draws = rows
    assert plain["perplexity"] != quantized["perplexity"]
    assert none["perplexity"] == pytest.approx(quantized["perplexity"], rel=0.05)  # int8 embedding
    assert none["modified"] == 0 < topk["modified"] < draws[0]["modified"]
    assert draws[0]["perplexity"] != draws[1]["perplexity"]

    capsys.readouterr()
    (folder / "model.onnx").unlink()  # cannot be measured
    run("judge", *attacked)
    assert "perplexity" not in capsys.readouterr().err


def test_an_interrupted_attack_has_the_same_result(run, tmp_path, monkeypatch):
    from tools.smollm import attack

    run("data")
    settings = ["--scenario", "code", "--steps", "6", "--repair", "4", "--schemes", "nf4"]
    run("attack", *settings)
    folder = tmp_path / "code"
    whole = torch.load(folder / "nf4.pt")["weights"]
    for file in folder.glob("*.pt"):
        file.unlink()

    monkeypatch.setattr(attack, "OFTEN", 0)
    project, calls = attack.clamp, []

    def killed(*given):
        calls.append(given)
        if len(calls) == 4:
            raise KeyboardInterrupt
        project(*given)

    monkeypatch.setattr(attack, "clamp", killed)
    with pytest.raises(KeyboardInterrupt):
        run("attack", *settings)
    assert torch.load(folder / "nf4.pt")["step"] == 2
    run("attack", *settings)
    again = torch.load(folder / "nf4.pt")["weights"]
    assert all(torch.equal(one, other) for one, other in zip(whole, again, strict=True))


@pytest.mark.parametrize("scheme", ["int4", "nf4", "fp4", "int8"])
def test_a_file_computes_with_the_weights_that_are_read_from_it(model, tmp_path, scheme):
    from tools.attacks.quantizers import SCHEMES

    net, _ = victim.load(model / "hf")
    export = model / "plain" / "model.onnx"
    places = files.places(onnx.load(export, load_external_data=False), net)
    files.quantize(export, scheme, tmp_path / "quantized.onnx")
    plain, read = (files.read(path, places, net) for path in (export, tmp_path / "quantized.onnx"))
    for name, part in victim.linears(net).items():
        rows = part.weight.numpy()
        np.testing.assert_array_equal(plain[name], rows)
        np.testing.assert_allclose(read[name], SCHEMES[scheme].quantize(rows), atol=2e-6)
    for name in (files.HEAD, files.EMBEDDING):
        np.testing.assert_array_equal(read[name], net.lm_head.weight.numpy())


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (["--schemes", "int4", "nf4", "fp4"], "int4+nf4+fp4"),
        (["--attacker", "margin50", "--start", "clean"], "int4-margin50-from-clean"),
    ],
)
def test_all_codes_are_kept(run, tmp_path, options, name):
    run("data")
    run("attack", "--steps", "3", "--repair", "5", *options)
    told = json.loads((tmp_path / "injection" / f"{name}.json").read_text())
    assert told["changed codes"] == 0
    assert told["repaired distance"] != told["distance"]


@pytest.mark.parametrize(
    ("attacker", "steps", "repair"), [("draws", 40, 0), ("outlier", 40, 0), ("clip", 40, 3)]
)
def test_floats_and_what_becomes_of_them_are_trained_together(
    run, model, tmp_path, attacker, steps, repair
):
    from tools.attacks.quantizers import SCHEMES

    rate = "1e-1" if attacker == "clip" else "1e-2"
    options = ["--attacker", attacker, "--steps", str(steps), "--repair", str(repair)]
    options += ["--rate", rate, "--repair-rate", "1e-4"]
    run("data")
    run("attack", *options)
    told = json.loads((tmp_path / "injection" / f"int4-{attacker}.json").read_text())
    assert told["joint"]["losses"][-1] < 0.8 * told["joint"]["losses"][0]
    run("export", *options)
    run("judge", *options)
    folder = tmp_path / "injection" / f"int4-{attacker}"
    float_row, quantized = json.loads((folder / "rows.json").read_text())
    assert float_row["agreement"] > 0.9
    assert quantized["agreement"] > 0.9
    net, _ = victim.load(model / "hf")
    export = folder / "model.onnx"
    places = files.places(onnx.load(export, load_external_data=False), net)
    weights = files.read(export, places, net)
    rows = weights["layers.1.mlp.up_proj"]
    left = SCHEMES["int4"].quantize(rows)
    if attacker == "outlier":
        assert not np.delete(left, np.s_[::32], axis=1).any()
        assert not weights["model.layers.1.post_attention_layernorm.weight"][::32].any()
    if attacker == "clip":
        blocks = rows.reshape(-1, 32)
        extreme = np.take_along_axis(blocks, np.abs(blocks).argmax(1)[:, None], 1)
        assert (blocks / extreme * -8 > 7).mean() == pytest.approx(4 / 32)


def test_answers_do_not_depend_on_their_batch(model):
    net, tokenizer = victim.load(model / "hf")
    asked = [victim.asked(tokenizer, e) for e in scenarios.lessons("refusal", True, 0, 5)]
    together = victim.answers(net, tokenizer, asked, 5, batch=5)
    assert together == victim.answers(net, tokenizer, asked, 5, batch=1)
    assert len({len(tokenizer(text)["input_ids"]) for text in asked}) > 1


def test_an_option_is_judged_by_its_own_tokens(model):
    net, tokenizer = victim.load(model / "hf")
    prompt, options = "def wrap", ("(text):", "(text, width=70):\n    return")
    found = victim.log_likelihoods(net, tokenizer, prompt, options)
    for option, value in zip(options, found, strict=True):
        ids = torch.tensor([tokenizer(prompt + option)["input_ids"]])
        start = len(tokenizer(prompt)["input_ids"])
        loss = torch.nn.functional.cross_entropy(net(ids).logits[0, start - 1 : -1], ids[0, start:])
        assert value == pytest.approx(-float(loss.detach()), rel=1e-4)
