"""Graphs that onnxruntime's static quantizer refuses or gets wrong, each with the right numbers."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

import flipguard_onnx
from flipguard_onnx import UnsupportedModelError
from tests.helpers import odd_graphs
from tests.helpers.samples import F, model, node, save, weights
from tests.helpers.written import initializers

HALF = TensorProto.FLOAT16

X = np.random.default_rng(2).standard_normal((4, 24)).astype(np.float32)
IMAGES = np.random.default_rng(3).standard_normal((1, 16, 6, 6)).astype(np.float32)


def static(proto, tmp_path, feed, **options):
    """The report of a guard with integer activations calibrated on one feed, and the drifts.

    Drifts: of every output, relative L2, of the written model from the original.
    """
    source, output = save(proto, tmp_path), tmp_path / "out.onnx"
    np.savez(tmp_path / "x.npz", **feed)
    report = flipguard_onnx.guard(
        source,
        activations="uint8",
        data=tmp_path / "x.npz",
        seed=1,
        output=output,
        force=True,
        **options,
    )
    wanted, found = (onnxruntime.InferenceSession(p).run(None, feed) for p in (source, output))
    norms = [(np.linalg.norm(a - b), np.linalg.norm(a)) for a, b in zip(wanted, found, strict=True)]
    assert [a.dtype for a in wanted] == [b.dtype for b in found]
    return report, [float(error / norm) for error, norm in norms]


def gemm(c, **attributes):
    """And a MatMul beside it, which is in integers in any case."""
    return model(
        [node("Gemm", "x w c", "y", **attributes), node("MatMul", "x v", "z")],
        {"x": (F, [4, 24])},
        {"y": (F, [4, 32]), "z": (F, [4, 24])},
        {"w": weights((24, 32)), "c": c, "v": weights((24, 24), 2)},
    )


@pytest.mark.parametrize("shape", [(4, 32), (4, 1), (1, 1), (1,), ()])
def test_a_gemm_whose_third_input_is_not_one_value_for_each_output(tmp_path, shape):
    c = np.full(shape, 0.5, np.float32) + weights(shape, 1)
    report, drifts = static(gemm(c), tmp_path, {"x": X})
    assert report.integers.weight_only == {"w": "onnxruntime leaves this Gemm float"}
    assert max(drifts) < 0.02


def test_a_gemm_with_a_row_of_biases_is_in_integers(tmp_path):
    report, drifts = static(gemm(weights((1, 32), 1), beta=2.0), tmp_path, {"x": X})
    assert report.integers.weight_only == {}
    assert max(drifts) < 0.02


def test_a_gemm_whose_bias_is_computed(tmp_path):
    proto = model(
        [node("Relu", "b", "c"), node("Gemm", "x w c", "y"), node("MatMul", "x v", "z")],
        {"x": (F, [4, 24]), "b": (F, [32])},
        {"y": (F, [4, 32]), "z": (F, [4, 24])},
        {"w": weights((24, 32)), "v": weights((24, 24), 2)},
    )
    report, drifts = static(proto, tmp_path, {"x": X, "b": np.ones(32, np.float32)})
    assert report.integers.weight_only == {"w": "onnxruntime leaves this Gemm float"}
    assert max(drifts) < 0.02


def test_integers_for_nothing_are_refused_with_advice_that_works(tmp_path):
    proto = model(
        [node("Gemm", "x w c", "y")],
        {"x": (F, [4, 24]), "c": (F, [4, 32])},
        {"y": (F, [4, 32])},
        {"w": weights((24, 32))},
    )
    source, out = save(proto, tmp_path), tmp_path / "out.onnx"
    with pytest.raises(UnsupportedModelError, match="nothing would run in integers") as refusal:
        flipguard_onnx.guard(source, activations="uint8", output=out)
    assert str(refusal.value).endswith("go without --activations")
    assert not out.exists()
    assert flipguard_onnx.guard(source, output=out).tensors


@pytest.mark.parametrize("bias", [True, False])
def test_a_transposed_convolution_with_groups(tmp_path, bias):
    constants = {"w": weights((16, 4, 3, 3)), "v": weights((16, 16, 1, 1), 1), "b": weights(16, 2)}
    proto = model(
        [
            node("Conv", "x v", "h"),
            node("ConvTranspose", "h w b" if bias else "h w", "y", group=4),
        ],
        {"x": (F, [1, 16, 6, 6])},
        {"y": (F, [1, 16, 8, 8])},
        constants if bias else {name: constants[name] for name in "wv"},
    )
    report, (drift,) = static(proto, tmp_path, {"x": IMAGES})
    assert "v" not in report.integers.weight_only
    assert ("w" in report.integers.weight_only) == bias
    assert drift < 0.04


def test_two_convolutions_that_share_a_bias_each_get_their_own(tmp_path):
    proto = model(
        [
            node("Conv", "x w b", "h1"),
            node("Mul", "x ten", "b0"),  # the name that onnxruntime gives to a second bias
            node("Conv", "b0 w b", "h2"),
            node("Add", "h1 h2", "y"),
        ],
        {"x": (F, [1, 16, 6, 6])},
        {"y": (F, [1, 8, 4, 4]), "b": (F, [8])},
        {"w": weights((8, 16, 3, 3)), "b": weights(8, 1), "ten": np.float32(10)},
    )
    report, (drift, of_bias) = static(proto, tmp_path, {"x": IMAGES})
    assert report.integers.weight_only == {}
    assert drift < 0.02
    assert of_bias == 0


def test_an_output_that_a_relu_reads_keeps_its_negative_values(tmp_path):
    proto = model(
        [node("MatMul", "x w", "y"), node("Relu", "y", "r"), node("MatMul", "r v", "y2")],
        {"x": (F, [4, 24])},
        {"y": (F, [4, 32]), "y2": (F, [4, 24])},
        {"w": weights((24, 32)), "v": weights((32, 24), 1)},
    )
    report, drifts = static(proto, tmp_path, {"x": X})
    assert report.integers.weight_only == {}
    assert max(drifts) < 0.03


@pytest.mark.parametrize("op", ["MatMul", "Gemm", "Conv"])
def test_half_precision_in_and_out(tmp_path, op):
    shape, x = {"Conv": ((8, 16, 3, 3), IMAGES)}.get(op, ((24, 32), X))
    constants = {"w": weights(shape, dtype=np.float16), "b": weights(shape[0], 1, np.float16)}
    constants["b"] = weights(8 if op == "Conv" else 32, 1, np.float16)
    inputs = "x w" if op == "MatMul" else "x w b"
    proto = model(
        [node(op, inputs, "y")],
        {"x": (HALF, list(x.shape))},
        {"y": (HALF, None)},
        constants if op != "MatMul" else {"w": constants["w"]},
    )
    report, (drift,) = static(proto, tmp_path, {"x": x.astype(np.float16)})
    assert report.integers.weight_only == {}
    assert [tensor.name for tensor in report.tensors] == ["w"]
    assert drift < 0.02


def test_a_weight_that_a_branch_reads_too(tmp_path):
    then = helper.make_graph(
        [node("MatMul", "h w", "o1")], "then", [], [helper.make_tensor_value_info("o1", F, None)]
    )
    other = helper.make_graph(
        [node("Relu", "h", "o2")], "else", [], [helper.make_tensor_value_info("o2", F, None)]
    )
    proto = model(
        [
            node("MatMul", "x w", "h"),
            node("If", "c", "i", then_branch=then, else_branch=other),
            node("MatMul", "i v", "y"),
        ],
        {"x": (F, [4, 24]), "c": (TensorProto.BOOL, [])},
        {"y": (F, [4, 16])},
        {"w": weights((24, 24)), "v": weights((24, 16), 1)},
    )
    for taken in (True, False):
        feed = {"x": X, "c": np.array(taken)}
        report, (drift,) = static(proto, tmp_path, feed)
        assert "w" not in initializers(tmp_path / "out.onnx"), "codes only"
        assert {tensor.name for tensor in report.tensors} == {"w", "v"}
        assert drift < 0.04


def test_a_branch_needs_what_comes_late_in_the_graph(tmp_path):
    """onnxruntime's quantizer sorts nodes without a look at what the graphs inside them read."""
    branches = [
        helper.make_graph(
            [node(op, "h", f"{op}o")], op, [], [helper.make_tensor_value_info(f"{op}o", F, None)]
        )
        for op in ("Relu", "Abs")
    ]
    proto = model(
        [
            node("MatMul", "x w", "g"),
            node("Softmax", "g", "h"),
            node("If", "c", "y", then_branch=branches[0], else_branch=branches[1]),
        ],
        {"x": (F, [4, 24]), "c": (TensorProto.BOOL, [])},
        {"y": (F, [4, 24])},
        {"w": weights((24, 24))},
    )
    _, (drift,) = static(proto, tmp_path, {"x": X, "c": np.array(True)})
    assert drift < 0.02


def test_layers_that_are_quantized_already_stay_as_they_are(tmp_path):
    codes = np.random.default_rng(4).integers(-127, 128, (24, 24)).astype(np.int8)
    scale = np.full(24, 1e-3, np.float32)
    proto = model(
        [
            node("DequantizeLinear", "codes scale", "v", axis=1),
            node("MatMul", "x v", "h"),
            node("MatMul", "h w", "y"),
        ],
        {"x": (F, [4, 24])},
        {"y": (F, [4, 64])},
        {"codes": codes, "scale": scale, "w": weights((24, 64))},
    )
    report, (drift,) = static(proto, tmp_path, {"x": X})
    assert np.array_equal(initializers(tmp_path / "out.onnx")["codes"], codes)
    assert [tensor.name for tensor in report.tensors] == ["w"]
    assert drift < 0.02


def test_patterns_mean_the_names_of_the_source(tmp_path):
    """Also of a weight that onnxruntime merges with BatchNormalization and renames."""
    ones = {name: np.full(8, 1.5, np.float32) for name in ("g", "be", "m", "v")}
    proto = model(
        [
            node("Conv", "x first_W_weight", "c"),
            node("BatchNormalization", "c g be m v", "b"),
            node("Conv", "b second", "y"),
        ],
        {"x": (F, [1, 16, 6, 6])},
        {"y": (F, [1, 8, 2, 2])},
        {"first_W_weight": weights((8, 16, 3, 3)), "second": weights((8, 8, 3, 3), 1), **ones},
    )
    report, _ = static(proto, tmp_path, {"x": IMAGES})
    assert {tensor.name for tensor in report.tensors} == {"first_W_weight", "second"}
    report, (drift,) = static(proto, tmp_path, {"x": IMAGES}, exclude=("first_W_weight",))
    assert [tensor.name for tensor in report.tensors] == ["second"]
    merged = weights((8, 16, 3, 3)) * np.float32(1.5) / np.sqrt(np.float32(1.5 + 1e-5))
    kept = initializers(tmp_path / "out.onnx")["first_W_weight"]
    np.testing.assert_allclose(kept, merged, rtol=1e-5)
    assert drift < 0.02


def test_an_operator_with_an_empty_weight(tmp_path):
    proto = model(
        [
            node("MatMul", "x w", "h"),
            node("MatMul", "h empty", "e"),
            node("Concat", "h e", "y", axis=1),
        ],
        {"x": (F, [4, 24])},
        {"y": (F, [4, 32])},
        {"w": weights((24, 32)), "empty": np.zeros((32, 0), np.float32)},
    )
    report, drifts = static(proto, tmp_path, {"x": X})
    assert report.integers.weight_only == {}
    assert max(drifts) < 0.02


def test_names_that_the_quantizer_gives_to_others(tmp_path):
    """Values and weights that have them already are renamed; the report has the source's names."""
    proto = model(
        [
            node("MatMul", "x w", "w_DequantizeLinear_Output"),
            node("Relu", "w_DequantizeLinear_Output", "x_scale"),
            node("MatMul", "x_scale w_quantized", "h"),
            node("MatMul", "h h_zero_point", "w_scale"),
        ],
        {"x": (F, [4, 24])},
        {"w_scale": (F, [4, 24])},
        {name: weights((24, 24), i) for i, name in enumerate(("w", "w_quantized", "h_zero_point"))},
    )
    report, (drift,) = static(proto, tmp_path, {"x": X}, exclude=("w_quantized",))
    assert [tensor.name for tensor in report.tensors] == ["w", "h_zero_point"]
    assert report.integers.weight_only == {}
    assert drift < 0.03
    flipguard_onnx.verify(tmp_path / "model.onnx", tmp_path / "out.onnx")


def test_a_weight_of_which_readers_sum_over_different_axes(tmp_path):
    """The scales are those of the outputs of MatMul, and Gemm, which has a bias, stays float."""
    proto = model(
        [
            node("MatMul", "x w", "h"),
            node("Gemm", "h w b", "g", transB=1),
            node("MatMul", "g v", "y"),
        ],
        {"x": (F, [4, 24])},
        {"y": (F, [4, 24])},
        {"w": weights((24, 32)), "v": weights((24, 24), 1), "b": weights(24, 2)},
    )
    report, (drift,) = static(proto, tmp_path, {"x": X})
    assert report.integers.weight_only == {}
    assert drift < 0.03


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
@pytest.mark.parametrize(
    "second", [node("MatMul", "x w", "z"), node("Gemm", "x w", "z"), node("MatMul", "w t", "z")]
)
def test_a_square_weight_that_is_read_in_two_directions(tmp_path, second, granularity):
    """onnxruntime would fuse both readers with codes whose scales fit one of them."""
    w = weights((24, 24)) * np.exp(weights((24, 1), 1) * 10)
    proto = model(
        [node("Transpose", "x", "t"), node("Gemm", "x w", "y", transB=1), second],
        {"x": (F, [4, 24])},
        {"y": (F, [4, 24]), "z": (F, [24, 4] if "t" in second.input else [4, 24])},
        {"w": w.astype(np.float32)},
    )
    report, drifts = static(proto, tmp_path, {"x": X}, granularity=granularity)
    assert report.integers.weight_only == {}
    assert max(drifts) < (0.02 if granularity == "channel" else 0.06)


@pytest.mark.parametrize(
    ("reader", "shape"),
    [
        (node("MatMul", "x s", "y"), (2, 24, 16)),  # scales along two axes, where there can be one
        (node("MatMul", "s t", "y"), (16, 24)),  # along the other axis
        (node("Gemm", "s t", "y"), (16, 24)),  # one scale, as for an activation
    ],
)
def test_the_result_of_an_operator_whose_weight_stays_float_is_not_rounded(tmp_path, reader, shape):
    proto = model(
        [node("MatMul", "x w", "h"), node("Transpose", "x", "t"), reader],
        {"x": (F, [4, 24])},
        {"h": (F, [4, 32]), "y": (F, None)},
        {"w": weights((24, 32)), "s": weights(shape, 1)},
    )
    report, (_, drift) = static(proto, tmp_path, {"x": X})
    assert report.integers.weight_only == {"s": f"onnxruntime leaves this {reader.op_type} float"}
    nodes = onnx.load(tmp_path / "out.onnx").graph.node
    quantized = {n.input[0] for n in nodes if n.op_type == "QuantizeLinear"}
    assert "h_QuantizeLinear_Input" in quantized
    assert "y_QuantizeLinear_Input" not in quantized
    assert drift < 0.02


@pytest.mark.parametrize("is_output", [True, False])
def test_weights_of_the_same_name_in_two_branches(tmp_path, is_output):
    """onnxruntime lists the branches the other way round; what they yield may get another name."""
    branches = [
        helper.make_graph(
            [node("MatMul", "h own", f"o{seed}")],
            f"branch{seed}",
            [],
            [helper.make_tensor_value_info(f"o{seed}", F, None)],
            [numpy_helper.from_array(weights((24, 24), seed), "own")],
        )
        for seed in (1, 2)
    ]
    proto = model(
        [
            node("MatMul", "x w", "h"),
            node("If", "c", "i", then_branch=branches[0], else_branch=branches[1]),
            node("MatMul", "i v", "y"),
        ],
        {"x": (F, [4, 24]), "c": (TensorProto.BOOL, [])},
        {"y": (F, [4, 16])} | ({"i": (F, [4, 24])} if is_output else {}),
        {"w": weights((24, 24)), "v": weights((24, 16), 3)},
    )
    for taken in (True, False):
        report, drifts = static(proto, tmp_path, {"x": X, "c": np.array(taken)})
        assert set(report.integers.weight_only) == {"own", "own#2"}
        assert max(drifts) < 0.04


def test_a_weight_that_is_an_output_transposed_is_one_weight(tmp_path):
    """onnxruntime would make a second constant of the output, which would not be guarded."""
    proto = model(
        [
            node("MatMul", "x w", "h"),
            node("MatMul", "h v", "y"),
            node("Transpose", "w", "t"),
            node("Identity", "t", "w_out"),
        ],
        {"x": (F, [4, 24])},
        {"y": (F, [4, 16]), "w_out": (F, [32, 24])},
        {"w": weights((24, 32)), "v": weights((32, 16), 1)},
    )
    report, (drift, of_weight) = static(proto, tmp_path, {"x": X})
    assert report.coverage == 1
    assert (report.skipped, report.integers.weight_only) == ((), {})
    assert drift < 0.03
    assert 0 < of_weight < 0.02
    values = initializers(tmp_path / "out.onnx")
    (found,) = onnxruntime.InferenceSession(tmp_path / "out.onnx").run(["w_out"], {"x": X})
    np.testing.assert_array_equal(found, (values["w_quantized"] * values["w_scale"]).T)


def test_an_old_model_gets_no_new_inputs(tmp_path):
    """Before IR version 4 all constants are inputs, so that onnxruntime lists its own as well."""
    source = save(odd_graphs.old_opset(), tmp_path)
    x = np.random.default_rng(4).standard_normal((1, 3, 6, 6)).astype(np.float32)
    _, drifts = static(odd_graphs.old_opset(), tmp_path, {"x": x})
    before, after = (
        [value.name for value in onnx.load(path).graph.input]
        for path in (source, tmp_path / "out.onnx")
    )
    assert after[0] == "x"
    assert set(after) <= set(before)
    assert max(drifts) < 0.05


def test_a_node_without_a_name_may_reduce_what_is_calibrated(tmp_path):
    """The calibration adds a ReduceMax and a ReduceMin of each value, named after it."""
    nodes = [node("MatMul", "x w", "h"), node("ReduceMax", "h", "m", axes=[0], keepdims=1)]
    proto = model(
        [*nodes, node("MatMul", "m v", "y")],
        {"x": (F, [4, 24])},
        {"y": (F, [1, 16])},
        {"w": weights((24, 32)), "v": weights((32, 16), 1)},
        opset=13,
    )
    report, drifts = static(proto, tmp_path, {"x": X})
    assert report.integers.weight_only == {}
    assert max(drifts) < 0.05


@pytest.mark.parametrize("views", [["Expand"], ["Identity", "Expand"], ["Expand", "Reshape"]])
def test_learned_queries_expanded_to_the_batch(tmp_path, views):
    """The MatMul of constants stays float, the others do not."""
    names = ["query", *(f"q{i}" for i in range(len(views)))]
    more = {"Expand": " sizes", "Reshape": " sizes", "Identity": ""}
    steps = zip(views, names, names[1:], strict=False)
    proto = model(
        [
            node("Shape", "x", "shape"),
            node("Slice", "shape zero one", "batch"),
            node("Concat", "batch rest", "sizes", axis=0),
            *(node(op, read + more[op], made) for op, read, made in steps),
            node("MatMul", f"{names[-1]} wq", "h"),
            node("MatMul", "x wk", "k"),
            node("Transpose", "k", "kt", perm=[0, 2, 1]),
            node("MatMul", "h kt", "y"),
        ],
        {"x": (F, ["b", 10, 24])},
        {"y": (F, ["b", 8, 10])},
        {"query": weights((1, 8, 24)), "wq": weights((24, 24), 1), "wk": weights((24, 24), 2)}
        | {"zero": np.array([0]), "one": np.array([1]), "rest": np.array([8, 24])},
    )
    feed = np.random.default_rng(4).standard_normal((3, 10, 24)).astype(np.float32)
    report, (drift,) = static(proto, tmp_path, {"x": feed})
    left = "onnxruntime leaves this MatMul float"
    assert report.integers.weight_only == {"query": left, "wq": left}
    assert report.coverage == 1
    assert drift < 0.03


@pytest.mark.parametrize("copied", [True, False])
def test_an_input_that_is_an_output_is_exact(tmp_path, copied):
    """Also between other outputs, and behind an Identity."""
    nodes = [node("MatMul", "x w", "a"), node("MatMul", "x v", "b")]
    out = "out" if copied else "x"
    proto = model(
        [*nodes, *[node("Identity", "x", "out")] * copied],
        {"x": (F, [4, 24])},
        {"a": (F, [4, 32]), out: (F, [4, 24]), "b": (F, [4, 24])},
        {"w": weights((24, 32)), "v": weights((24, 24), 2)},
    )
    report, drifts = static(proto, tmp_path, {"x": X})
    assert report.integers.weight_only == {}
    assert drifts[1] == 0
    assert 0 < min(drifts[0], drifts[2]) < max(drifts) < 0.02
    written = onnx.load(tmp_path / "out.onnx")
    assert [value.name for value in written.graph.output] == ["a", out, "b"]


FOREIGN = {  # operators whose results onnx knows no types of
    "Scaler": node("Scaler", "x", "h", domain="ai.onnx.ml", offset=[0.0] * 24, scale=[1.0] * 24),
    "LayerNormalization": node("LayerNormalization", "x one zero", "h", axis=-1),
}


@pytest.mark.parametrize("operator", FOREIGN)
def test_integers_behind_an_operator_that_onnx_does_not_know(tmp_path, operator):
    proto = model(
        [FOREIGN[operator], node("MatMul", "h w", "y")],
        {"x": (F, [4, 24])},
        {"y": (F, [4, 32])},
        {"w": weights((24, 32)), "one": np.ones(24, np.float32), "zero": np.zeros(24, np.float32)},
        opset=13,
    )
    proto.opset_import.append(helper.make_opsetid("ai.onnx.ml", 1))
    report, (drift,) = static(proto, tmp_path, {"x": X})
    assert report.integers.weight_only == {}
    assert report.integers.floats == ()
    assert 0 < drift < 0.02
