"""Models that run piece by piece: every value as when they run whole."""

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper

from flipguard_onnx.calibration.pieces import SHARE, Pieces
from flipguard_onnx.calibration.text_model import TextModel
from flipguard_onnx.io.model import open_model
from tests.helpers.decoders import VOCABULARY, decoder
from tests.helpers.samples import model, node, save, weights

F = TensorProto.FLOAT
WIDTH = 16
MATRIX = 4 * WIDTH**2  # bytes


def constant(name, value):
    tensor = helper.make_tensor(name, F, [1], [value])
    return helper.make_node("Constant", [], [name], value=tensor)


def chain():
    """Layers with a residual over all of them, a branch with a captured value, shared constants."""
    then = helper.make_graph(
        [node("MatMul", "h1 w2", "t")], "then", [], [helper.make_tensor_value_info("t", F, None)]
    )
    other = helper.make_graph(
        [node("Add", "x two", "e")], "else", [], [helper.make_tensor_value_info("e", F, None)]
    )
    nodes = [
        constant("two", 2.0),
        helper.make_node("Constant", [], ["half"], value_float=0.5),
        node("MatMul", "x w0", "h0"),
        node("Mul", "h0 two", "h1"),
        node("MatMul", "h1 w1", "h2"),
        helper.make_node("If", ["on"], ["h3"], then_branch=then, else_branch=other),
        node("Add", "h3 h2", "h4"),
        node("MatMul", "h4 w0", "h5"),
        node("Add", "h5 h0", "h6"),
        *(node("MatMul", f"h{i} w{i - 3}", f"h{i + 1}") for i in range(6, 10)),
        node("Mul", "h10 half", "y"),
        node("MatMul", "y w0", "unread"),
    ]
    inputs = {"x": (F, [None, WIDTH]), "on": (TensorProto.BOOL, []), "unused": (F, [1])}
    tables = {f"w{i}": weights((WIDTH, WIDTH), seed=i) for i in range(7)}
    return model(nodes, inputs, {"y": (F, None), "w1": (F, [WIDTH, WIDTH])}, tables)


WANTED = [("h1",), ("h4",), ("h0", "h5"), ("x",)]


@pytest.fixture
def source(tmp_path):
    return open_model(save(chain(), tmp_path))


def feeds(count=3):
    rng = np.random.default_rng(0)
    for i in range(count):
        x = rng.standard_normal((i + 1, WIDTH)).astype(np.float32)
        yield {"x": x, "on": np.array(i % 2 == 0), "unused": np.zeros(1, np.float32)}


@pytest.mark.parametrize("max_bytes", [1, SHARE * (MATRIX + 4)])
def test_pieces_compute_what_the_whole_computes(source, tmp_path, max_bytes):
    pieces = Pieces(source, WANTED, tmp_path / "pieces", max_bytes)
    assert pieces.count > 1
    stream = pieces.stream([*feeds()])
    # back and forth, and the same piece twice
    whole = Pieces(source, WANTED, tmp_path / "whole", 1 << 30).stream([*feeds()])
    for names in [*WANTED, ("y",), ("w1",), *reversed(WANTED), WANTED[0], ("y",)]:
        found = [values[name] for values in stream.run(names) for name in names]
        expected = [values[name] for values in whole.run(names) for name in names]
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_the_whole_is_what_onnxruntime_computes(source, tmp_path):
    whole = Pieces(source, [], tmp_path / "whole", 1 << 30)
    assert whole.count == 1
    session = onnxruntime.InferenceSession(source.path, providers=["CPUExecutionProvider"])
    for feed, values in zip(feeds(), whole.stream([*feeds()]).run(["y"]), strict=True):
        np.testing.assert_allclose(values["y"], *session.run(["y"], feed), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("limit", "largest"), [(1, MATRIX + 4), (MATRIX + 4, MATRIX + 4)])
def test_a_piece_has_what_fits_or_a_single_node(source, tmp_path, limit, largest):
    pieces = Pieces(source, [], tmp_path / "pieces", SHARE * limit)
    sizes = [pieces.piece(i).size for i in range(1, pieces.count)]  # the first has an output, too
    assert max(sizes) <= largest
    assert sum(sizes) >= 6 * MATRIX


CACHES = {f"present.0.{kind}": f"past_key_values.0.{kind}" for kind in ("key", "value")}


def test_texts_go_on_with_the_caches_of_the_tokens_before(tmp_path):
    source = open_model(save(decoder(), tmp_path))
    pieces = Pieces(source, [], tmp_path / "pieces", 1)
    assert pieces.count > 1
    session = onnxruntime.InferenceSession(source.path, providers=["CPUExecutionProvider"])
    text = TextModel.of(source.proto)
    ids = [np.random.default_rng(0).integers(0, VOCABULARY, (rows, 9)) for rows in (3, 1)]
    expected = [session.run(["logits"], text.filled({"input_ids": i}))[0] for i in ids]
    texts = pieces.texts(CACHES, "logits")
    for start, stop in ((0, 4), (4, 5), (5, 9)):
        begun = [
            text.filled(text.past_of(len(i), start) | {"input_ids": i[:, start:stop]}) for i in ids
        ]
        for values, whole in zip(texts.run_all(["logits"], begun), expected, strict=True):
            np.testing.assert_allclose(values["logits"], whole[:, start:stop], atol=1e-5)


def test_without_caches_that_come_back_there_are_no_texts(tmp_path):
    """They are not read, or made only after the logits."""
    source = open_model(save(decoder(), tmp_path))
    pieces = Pieces(source, [], tmp_path / "pieces", 1)
    assert pieces.texts({"present.0.key": "input_ids"}, "logits")
    assert pieces.texts({"present.0.key": "unread"}, "logits") is None
    assert pieces.texts({"logits": "past_key_values.0.key"}, "present.0.key") is None
