"""The measuring part, on a small model; what is fetched needs torch and the network."""

import json
import math
import shutil

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tools.attacks import prompts
from tools.attacks.measure import FOLDER
from tools.language_models import CALIBRATION, EVALUATION, Row, feed, judge, load, main

VOCABULARY, CACHE = 7, ["batch", 3, "past", 8]
OPEN_CACHE = ["batch", 3, "past", "size"]


def decoder(path, following):
    """Logits: `following` (0, or one of which each token knows the next) for each token."""
    rows = np.broadcast_to(following, (VOCABULARY, VOCABULARY)).astype(np.float32)
    tokens = ["batch", "sequence"]
    inputs = {"input_ids": tokens, "attention_mask": tokens, "position_ids": tokens}
    values = [helper.make_tensor_value_info(n, TensorProto.INT64, d) for n, d in inputs.items()]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [*tokens, VOCABULARY])]
    nodes = [helper.make_node("Gather", ["rows", "input_ids"], ["logits"])]
    for name, dims in (("0.key", CACHE), ("1.key", OPEN_CACHE)):
        values.append(helper.make_tensor_value_info(f"past.{name}", TensorProto.FLOAT, dims))
        outputs.append(helper.make_tensor_value_info(f"present.{name}", TensorProto.FLOAT, dims))
        nodes.append(helper.make_node("Identity", [f"past.{name}"], [f"present.{name}"]))
    tables = [numpy_helper.from_array(rows, "rows")]
    graph = helper.make_graph(nodes, "decoder", values, outputs, tables)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)]), path)
    return path


def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary(tmp_path):
    windows = np.random.default_rng(0).integers(0, VOCABULARY, (3, 10))
    judged = judge(decoder(tmp_path / "model.onnx", 0), windows)
    assert judged.perplexity == pytest.approx(VOCABULARY)
    assert judged.guesses.tolist() == [0] * 27


def test_perplexity_is_that_of_the_next_token(tmp_path):
    following = math.log(6) * np.eye(VOCABULARY)[[1, 2, 3, 4, 5, 6, 0]]  # 6 : 1 for the next number
    rising = np.array([[0, 1, 2, 3, 4], [3, 4, 5, 6, 0]])
    judged = judge(decoder(tmp_path / "model.onnx", following), rising)
    assert judged.perplexity == pytest.approx(2)
    assert judged.guesses.tolist() == [1, 2, 3, 4, 4, 5, 6, 0]
    assert judge(tmp_path / "model.onnx", rising[:, ::-1]).perplexity == pytest.approx(12)


def test_inputs_are_the_beginning_of_a_text(tmp_path):
    tokens = np.array([[4, 5, 6], [1, 2, 3]])
    made = feed(load(decoder(tmp_path / "model.onnx", 0)), tokens)
    assert made["input_ids"].tolist() == tokens.tolist()
    assert made["attention_mask"].tolist() == [[1, 1, 1]] * 2
    assert made["position_ids"].tolist() == [[0, 1, 2]] * 2
    assert made["past.0.key"].shape == (2, 3, 0, 8)
    assert made["past.1.key"].shape == (2, 3, 0, 64)


@pytest.fixture
def folder(tmp_path):
    """The bench's language model, as if it were an export."""
    for name in ("plain", "texts"):
        (tmp_path / name).mkdir()
    shutil.copy(FOLDER / "lm-clean.onnx", tmp_path / "plain" / "model.onnx")
    tokens = prompts.encode((FOLDER / "lm-held-out.txt").read_text())[: 64 * 40].reshape(-1, 64)
    np.save(tmp_path / "texts" / EVALUATION, tokens[:8])
    np.save(tmp_path / "texts" / CALIBRATION, tokens[8:])
    return tmp_path


def test_rows_are_measured_once(folder, capsys):
    file = folder / "rows.json"
    asked = ["--schemes", "int4", "--data-tokens", "1024", "--windows", "4", "--json", str(file)]
    command = ["measure", str(folder), *asked, "--", "--no-validate"]
    main(command)
    rows = [Row(**row) for row in json.loads(file.read_text())["rows"]]
    defences = ["nearest", "ours", "ours, 1,024 tokens"]
    assert [(row.scheme, row.defence) for row in rows] == [
        ("float32", ""),
        *(("int4", defence) for defence in defences),
    ]
    assert [row.options for row in rows] == ["", *["--no-validate"] * 3]
    original, *written = rows
    windows = np.load(folder / "texts" / EVALUATION)[[0, 2, 4, 7]]
    assert original.perplexity == judge(folder / "plain" / "model.onnx", windows).perplexity
    assert original.agreement == 1
    assert len({row.perplexity for row in rows}) == 4
    for row in written:
        assert row.perplexity == pytest.approx(original.perplexity, rel=0.2)
        assert 0.8 < row.agreement < 1
        assert row.megabytes < 0.4 * original.megabytes
    shown = capsys.readouterr().out
    relative = written[1].perplexity / written[0].perplexity
    for row, ratio in zip(written, ["1.000", f"{relative:.3f}"], strict=False):
        start = f"| plain | int4 | {row.defence} --no-validate | {row.perplexity:.2f} |"
        assert f"{start} {ratio} | {row.agreement:.1%} |" in shown

    onnx.save(onnx.ModelProto(), folder / "plain" / "model.onnx")  # cannot be measured
    main(command)
    assert capsys.readouterr().out == shown


def test_a_guard_that_refuses_is_no_row(folder, capsys):
    command = ["measure", str(folder), "--schemes", "int4", "--data-tokens", "--windows", "1"]
    main([*command, "--", "--block-size", "7"])
    said = capsys.readouterr()
    assert "| plain | float32 |" in said.out
    assert "| plain | int4 |" not in said.out
    assert "block" in said.err
