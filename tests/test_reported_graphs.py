"""Graphs as exporters write them, that this tool once refused or gave a wrong number for."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

import flipguard_onnx
from flipguard_onnx import OptionError, ValidationError
from tests.helpers.samples import F, model, node, save, weights

HALF, INT64 = TensorProto.FLOAT16, TensorProto.INT64


def run(path, feed):
    return onnxruntime.InferenceSession(path).run(None, feed)


def relative(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(a)


def integers(*values):
    return np.array(values, np.int64)


def test_an_lstm_of_which_only_the_last_state_is_used(tmp_path):
    proto = model(
        [helper.make_node("LSTM", ["x", "w", "r"], ["", "h"], hidden_size=16)],
        {"x": (F, [5, 1, 24])},
        {"h": (F, [1, 1, 16])},
        {"w": weights((1, 64, 24)) * 5, "r": weights((1, 64, 16), 1) * 5},
    )
    source = save(proto, tmp_path)
    report = flipguard_onnx.guard(source, seed=1, output=tmp_path / "out.onnx")
    assert {tensor.name for tensor in report.tensors} == {"w", "r"}
    feed = {"x": np.random.default_rng(0).standard_normal((5, 1, 24)).astype(np.float32)}
    assert relative(*run(source, feed), *run(tmp_path / "out.onnx", feed)) < 0.03


def masked(mask):
    """x @ w @ v, with -inf where a constant mask of the outputs says so."""
    return model(
        [node("MatMul", "x w", "h"), node("MatMul", "h v", "z"), node("Add", "z mask", "y")],
        {"x": (F, ["n", 24])},
        {"y": (F, ["n", 32])},
        {"w": weights((24, 24)), "v": weights((24, 32), 1), "mask": mask},
    )


def test_outputs_with_masked_logits(tmp_path):
    mask = np.zeros(32, np.float32)
    mask[::3] = -np.inf
    report = flipguard_onnx.guard(
        save(masked(mask), tmp_path), seed=1, output=tmp_path / "out.onnx"
    )
    plain = flipguard_onnx.guard(
        save(masked(np.zeros(32, np.float32)), tmp_path, "plain.onnx"),
        seed=1,
        output=tmp_path / "plain-out.onnx",
    )
    found, without = report.validation.guarded_exact[0], plain.validation.guarded_exact[0]
    assert 0 < found.relative_l2 < 1.5 * without.relative_l2
    assert 0.99 < found.cosine < 1


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_outputs_without_a_number_to_compare_are_refused(tmp_path, value):
    source = save(masked(np.full(32, value, np.float32)), tmp_path)
    with pytest.raises(OptionError, match="output 'y' holds NaN or infinity"):
        flipguard_onnx.guard(source, output=tmp_path / "out.onnx")
    assert flipguard_onnx.guard(source, validate=False, output=tmp_path / "out.onnx").tensors


@pytest.mark.parametrize(
    ("op", "shape", "given"),
    [("MatMul", (24, 32), (5, 24)), ("Gemm", (24, 32), (5, 24)), ("Conv", (8, 3, 5), (1, 3, 40))],
)
def test_an_input_whose_rank_the_model_does_not_say(tmp_path, op, shape, given):
    proto = model([node(op, "x w", "y")], {"x": (F, None)}, {"y": (F, None)}, {"w": weights(shape)})
    source = save(proto, tmp_path)
    report = flipguard_onnx.guard(source, seed=1, output=tmp_path / "out.onnx")
    assert report.validation.feeds == 8
    feed = {"x": np.random.default_rng(0).standard_normal(given).astype(np.float32)}
    assert relative(*run(source, feed), *run(tmp_path / "out.onnx", feed)) < 0.03
    np.savez(tmp_path / "x.npz", **feed)
    report = flipguard_onnx.guard(
        source, data=tmp_path / "x.npz", seed=1, output=tmp_path / "out.onnx", force=True
    )
    assert report.validation.feeds == 1


def test_lengths_of_a_sequence_along_the_first_axis(tmp_path):
    proto = model(
        [helper.make_node("LSTM", ["x", "w", "r", "", "lens"], ["y"], hidden_size=16)],
        {"x": (F, ["seq", "batch", 24]), "lens": (TensorProto.INT32, ["batch"])},
        {"y": (F, ["seq", 1, "batch", 16])},
        {"w": weights((1, 64, 24)) * 5, "r": weights((1, 64, 16), 1) * 5},
    )
    source = save(proto, tmp_path)
    assert flipguard_onnx.guard(source, seed=1, output=tmp_path / "out.onnx").validation


def sequence_input():
    proto = model([node("MatMul", "x w", "y")], {}, {"y": (F, None)}, {"w": weights((24, 32))})
    kind = helper.make_sequence_type_proto(helper.make_tensor_type_proto(F, ["n", 24]))
    proto.graph.input.append(helper.make_value_info("xs", kind))
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.int64(0), "i"))
    proto.graph.node.insert(0, node("SequenceAt", "xs i", "x"))
    return proto


def string_input():
    lookup = helper.make_node(
        "LabelEncoder",
        ["word"],
        ["id"],
        domain="ai.onnx.ml",
        keys_strings=["a", "b"],
        values_int64s=[0, 1],
    )
    proto = model(
        [lookup, node("Gather", "w id", "y")],
        {"word": (TensorProto.STRING, ["n"])},
        {"y": (F, None)},
        {"w": weights((24, 32))},
    )
    proto.opset_import.append(helper.make_opsetid("ai.onnx.ml", 2))
    return proto


@pytest.mark.parametrize("make", [sequence_input, string_input])
def test_the_advice_for_inputs_that_are_no_numbers_works(tmp_path, make):
    source = save(make(), tmp_path)
    with pytest.raises(OptionError, match=r"go without inputs \(--no-validate\)") as refusal:
        flipguard_onnx.guard(source, output=tmp_path / "out.onnx")
    assert "--data" not in str(refusal.value)
    report = flipguard_onnx.guard(source, validate=False, output=tmp_path / "out.onnx")
    assert [tensor.name for tensor in report.tensors] == ["w"]
    with pytest.raises(OptionError) as refusal:
        flipguard_onnx.verify(source, tmp_path / "out.onnx")
    assert "--no-validate" not in str(refusal.value)


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_half_precision_with_a_clip_of_old_opsets(tmp_path, scheme):
    proto = model(
        [
            node("MatMul", "x w", "h"),
            node("Clip", "h", "c", min=-0.25, max=0.25),
            node("MatMul", "c v", "y"),
        ],
        {"x": (HALF, ["n", 32])},
        {"y": (HALF, ["n", 24])},
        {"w": weights((32, 64), 0, np.float16), "v": weights((64, 24), 1, np.float16)},
        opset=10,
    )
    source = save(proto, tmp_path)
    flipguard_onnx.guard(source, scheme, seed=1, output=tmp_path / "out.onnx")
    feed = {"x": np.random.default_rng(0).standard_normal((5, 32)).astype(np.float16)}
    wanted, found = (run(path, feed)[0] for path in (source, tmp_path / "out.onnx"))
    assert found.dtype == np.float16
    assert relative(wanted.astype(float), found.astype(float)) < (0.03 if scheme == "int8" else 0.3)


def detector():
    """Convolutions and NonMaxSuppression: how many boxes come out depends on the weights."""
    nodes = [
        node("Conv", "images w", "c"),
        node("Relu", "c", "r"),
        node("Conv", "r v", "h"),
        node("Reshape", "h shape", "p"),
        node("Sigmoid", "p", "s"),
        node("Slice", "s zero four one", "b"),
        node("Transpose", "b", "boxes", perm=[0, 2, 1]),
        node("Slice", "s four six one", "scores"),
        node("NonMaxSuppression", "boxes scores most iou threshold", "selected"),
        node("Slice", "selected two three one", "i"),
        node("Reshape", "i flat", "places"),
        node("Gather", "boxes places", "y", axis=1),
    ]
    constants = {
        "w": weights((16, 3, 3, 3)) * 8,
        "v": weights((6, 16, 1, 1), 1) * 8,
        **{name: integers(value) for value, name in enumerate(("zero", "one", "two", "three"))},
        "four": integers(4),
        "six": integers(6),
        "shape": integers(1, 6, -1),
        "most": integers(200),
        "flat": integers(-1),
        "iou": np.array([0.5], np.float32),
        "threshold": np.array([0.6], np.float32),
    }
    return model(
        nodes, {"images": (F, [1, 3, 24, 24])}, {"y": (F, [1, "k", 4])}, constants, opset=17
    )


def test_outputs_whose_shapes_depend_on_the_weights(tmp_path):
    source = save(detector(), tmp_path)
    images = np.random.default_rng(0).standard_normal((8, 1, 3, 24, 24)).astype(np.float32)
    shapes = {run(source, {"images": image})[0].shape for image in images}
    assert len(shapes) > 1, "the control"
    report = flipguard_onnx.guard(source, seed=1, output=tmp_path / "out.onnx")
    assert report.validation.layers == 2
    assert {drift.output for drift in report.validation.guarded_exact} == {"c", "h"}
    assert "or have shapes that depend on weights" in report.render()
    verified = flipguard_onnx.verify(source, tmp_path / "out.onnx")
    assert verified.validation.layers == 2
    with pytest.raises(ValidationError, match=r"\(--no-validate, no --activations\)"):
        flipguard_onnx.guard(source, activations="uint8", output=tmp_path / "static.onnx")


@pytest.mark.parametrize(
    "between",
    [
        [node("RandomNormalLike", "a", "r"), node("Add", "a r", "b")],
        [node("Sigmoid", "a", "s"), node("Bernoulli", "s", "b")],
        [node("RandomUniform", "", "r", shape=[32]), node("Add", "a r", "b")],
    ],
)
def test_outputs_that_depend_on_chance(tmp_path, between):
    proto = model(
        [node("MatMul", "x w", "a"), *between, node("MatMul", "b v", "y")],
        {"x": (F, ["n", 24])},
        {"y": (F, ["n", 16])},
        {"w": weights((24, 32)), "v": weights((32, 16), 1)},
    )
    source = save(proto, tmp_path)
    x = {"x": np.random.default_rng(0).standard_normal((8, 24)).astype(np.float32)}
    session = onnxruntime.InferenceSession(source)
    assert relative(*session.run(None, x), *session.run(None, x)) > 0, "the control"
    report = flipguard_onnx.guard(source, seed=1, output=tmp_path / "out.onnx")
    assert {drift.output for drift in report.validation.guarded_exact} == {"a", "y"}
    assert all(0 < drift.relative_l2 < 0.05 for drift in report.validation.guarded_exact)
    assert "outputs depend on chance" in report.render()
    assert flipguard_onnx.verify(source, tmp_path / "out.onnx").validation.layers == 2


def test_integers_in_a_model_with_random_numbers(tmp_path):
    proto = model(
        [
            node("MatMul", "x w", "a"),
            node("RandomNormalLike", "a", "r"),
            node("Add", "a r", "b"),
            node("MatMul", "b v", "y"),
        ],
        {"x": (F, ["n", 24])},
        {"y": (F, ["n", 16])},
        {"w": weights((24, 32)), "v": weights((32, 16), 1)},
    )
    report = flipguard_onnx.guard(
        save(proto, tmp_path), activations="uint8", seed=1, output=tmp_path / "out.onnx"
    )
    assert report.validation.layers == 2
    assert all(0 < drift.relative_l2 < 0.1 for drift in report.validation.guarded_exact)


def test_shapes_that_depend_on_the_inputs_alone_are_compared_whole(tmp_path):
    proto = model(
        [
            node("NonZero", "keep", "places"),
            node("Squeeze", "places zero", "rows"),
            node("Gather", "x rows", "some"),
            node("MatMul", "some w", "y"),
        ],
        {"x": (F, [16, 24]), "keep": (TensorProto.INT64, [16])},
        {"y": (F, ["k", 32])},
        {"w": weights((24, 32)), "zero": integers(0)},
    )
    source = save(proto, tmp_path)
    rng = np.random.default_rng(0)
    keep, x = rng.integers(0, 2, (4, 16)), rng.standard_normal((4, 16, 24)).astype(np.float32)
    np.savez(tmp_path / "x.npz", x=x, keep=keep)
    report = flipguard_onnx.guard(
        source, data=tmp_path / "x.npz", seed=1, output=tmp_path / "out.onnx"
    )
    assert report.validation.layers == 0


def test_weights_that_a_scan_goes_through(tmp_path):
    """One matrix for each step, stacked, as JAX exports equal layers."""
    body = helper.make_graph(
        [node("MatMul", "state layer", "h"), node("Tanh", "h", "next")],
        "body",
        [helper.make_tensor_value_info(name, F, None) for name in ("state", "layer")],
        [helper.make_tensor_value_info("next", F, None)],
    )
    stack = weights((3, 32, 32)) * 4
    proto = model(
        [node("Scan", "x stack", "y", body=body, num_scan_inputs=1)],
        {"x": (F, [4, 32])},
        {"y": (F, [4, 32])},
        {"stack": stack},
    )
    source = save(proto, tmp_path)
    report = flipguard_onnx.guard(source, seed=1, output=tmp_path / "out.onnx")
    assert report.coverage == 1
    assert [tensor.name for tensor in report.tensors] == ["stack"]
    x = np.random.default_rng(0).standard_normal((4, 32)).astype(np.float32)
    written = onnx.load(tmp_path / "out.onnx").graph
    codes = next(t for t in written.initializer if t.data_type == TensorProto.INT8 and t.dims)
    assert list(codes.dims) == [3 * 32, 32]  # a scale for each output channel of each matrix
    (found,), (wanted,) = run(tmp_path / "out.onnx", {"x": x}), run(source, {"x": x})
    by_hand = x
    for layer in stack:
        by_hand = np.tanh(by_hand @ layer)
    np.testing.assert_allclose(wanted, by_hand, rtol=1e-4, atol=1e-5)
    assert relative(by_hand, found) < 0.05


def test_a_matrix_that_branches_return_is_listed_with_the_true_reason(tmp_path):
    branches = [
        helper.make_graph(
            [node("Identity", name, f"{name}o")],
            name,
            [],
            [helper.make_tensor_value_info(f"{name}o", F, None)],
        )
        for name in ("p", "q")
    ]
    proto = model(
        [
            node("If", "c", "w", then_branch=branches[0], else_branch=branches[1]),
            node("MatMul", "x w", "h"),
            node("MatMul", "h v", "y"),
        ],
        {"x": (F, ["n", 24]), "c": (TensorProto.BOOL, [])},
        {"y": (F, ["n", 24])},
        {"p": weights((24, 32)), "q": weights((24, 32), 1), "v": weights((32, 24), 2)},
    )
    found = flipguard_onnx.inspect(save(proto, tmp_path))
    assert [tensor.name for tensor in found.tensors] == ["v"]
    reasons = {tensor.name: tensor.text for tensor in found.skipped}
    assert all("feeds If, through which weights are not followed" in r for r in reasons.values())
    assert reasons.keys() == {"p", "q"}
    assert sum(tensor.size for tensor in found.skipped) == 2 * 24 * 32
