"""open_folded(): what becomes an initializer, what stays, and what is refused."""

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

import flipguard_onnx
from flipguard_onnx import UnsupportedModelError
from flipguard_onnx.graph.weights import find_weights
from flipguard_onnx.io.model import open_model
from flipguard_onnx.opening import open_folded
from tests.helpers.attacked import FOLDER
from tests.helpers.command import call, one_line
from tests.helpers.samples import SAMPLES, F, model, node, save, weights

INT64 = TensorProto.INT64


def matmul_of(nodes, initializers, shape=(64, 32), **options):
    """x times the value "v"; "w" is a plain weight of another layer."""
    return model(
        [*nodes, node("MatMul", "x v", "h"), node("MatMul", "h w", "y")],
        {"x": (F, ["n", shape[0]])},
        {"y": (F, ["n", 16])},
        {"w": weights((shape[1], 16), 9), **initializers},
        **options,
    )


def folded(proto, folder):
    return open_folded(save(proto, folder))


def names(model):
    return {weight.name: weight for weight in find_weights(model.proto)[0]}


@pytest.mark.parametrize("sample", sorted(set(SAMPLES) - {"function", "function_old_opset"}))
def test_models_without_expressions_stay_as_they_are(tmp_path, sample):
    path = save(SAMPLES[sample](), tmp_path)
    assert open_folded(path).proto == open_model(path).proto


def test_arguments_of_functions_are_expanded(tmp_path):
    opened = folded(SAMPLES["function"](), tmp_path)
    assert not opened.proto.functions
    assert {w.rows for w in names(opened).values()} == {(1,)}


@pytest.mark.parametrize("external", [False, True])
def test_an_expression_becomes_an_initializer(tmp_path, external):
    values = weights((64, 32))
    proto = matmul_of(
        [node("Reshape", "flat s", "a"), node("Mul", "a two", "v")],
        {"flat": values.reshape(-1), "s": np.array([64, 32], np.int64), "two": np.float32(2)},
    )
    opened = open_folded(save(proto, tmp_path, external=external))
    assert [each.op_type for each in opened.proto.graph.node] == ["MatMul", "MatMul"]
    assert {t.name for t in opened.proto.graph.initializer} == {"v", "w"}
    found = names(opened)
    np.testing.assert_array_equal(opened.array(found["v"].tensor), values * 2)
    assert found["v"].rows == (1,)


def test_what_others_read_stays(tmp_path):
    proto = matmul_of(
        [
            node("Split", "both", "v rest", axis=1),
            node("ReduceSum", "rest", "s", keepdims=0),
            node("Mul", "s both", "t"),
            node("ReduceSum", "t", "u", keepdims=0),
        ],
        {"both": weights((64, 64))},
    )
    proto.graph.output.append(helper.make_tensor_value_info("u", F, []))
    path = save(proto, tmp_path)
    opened = open_folded(path)
    assert set(names(opened)) == {"v", "w"}
    report = flipguard_onnx.guard(path, output=tmp_path / "out.onnx")
    assert {tensor.name for tensor in report.tensors} == {"v", "w"}


def test_values_in_a_branch(tmp_path):
    proto = SAMPLES["nested"]()
    for attr in proto.graph.node[0].attribute:
        inner = attr.g
        inner.initializer[0].name = f"{inner.name}.raw"
        twice = node("Add", f"{inner.name}.raw {inner.name}.raw", inner.name)
        inner.node.insert(0, twice)
    path = save(proto, tmp_path)
    assert set(names(open_folded(path))) == {"a", "b", "outer"}
    assert flipguard_onnx.guard(path, output=tmp_path / "out.onnx").coverage == 1


def test_codes_with_their_scales_stay(tmp_path):
    codes = np.random.default_rng(0).integers(-127, 128, (64, 32)).astype(np.int8)
    for front, scale in (
        ([node("DequantizeLinear", "c k", "v", axis=1)], weights(32) ** 2),
        ([node("Cast", "c", "f", to=F), node("Mul", "f k", "v")], weights((1, 32))),
    ):
        proto = matmul_of(front, {"c": codes, "k": scale})
        path = save(proto, tmp_path)
        opened = open_folded(path)
        assert opened.proto == open_model(path).proto
        _, skipped = find_weights(opened.proto, partly=True)
        assert [s.text for s in skipped if s.name == "c"] == [
            f"already quantized (INT8, feeds {front[0].op_type})"
        ]


def test_a_partly_quantized_model_is_not_called_clean(tmp_path):
    codes = np.random.default_rng(0).integers(-127, 128, (64, 32)).astype(np.int8)
    proto = matmul_of(
        [node("DequantizeLinear", "c k", "v", axis=1), node("MatMul", "x more", "y2")],
        {"c": codes, "k": weights(32) ** 2, "more": weights((64, 200))},
    )
    proto.graph.output.append(helper.make_tensor_value_info("y2", F, ["n", 200]))
    verdict = flipguard_onnx.scan(save(proto, tmp_path)).verdict
    assert verdict.level == "not judged"
    assert "not judged completely" in verdict.reason
    assert "(c)" in verdict.reason


def bomb():
    return model(
        [node("Tile", "raw times", "v"), node("MatMul", "x v", "y"), node("MatMul", "x w", "z")],
        {"x": (F, ["n", 64])},
        {"y": (F, ["n", 1 << 20]), "z": (F, ["n", 16])},
        {
            "raw": weights((64, 32)),
            "times": np.array([1, 1 << 15], np.int64),
            "w": weights((64, 16)),
        },
    )


def test_what_would_be_too_large_is_refused(tmp_path):
    path = save(bomb(), tmp_path)
    opened = open_folded(path)
    assert "v" not in names(opened)
    [left] = opened.unfolded
    assert left.name == "v"
    assert left.reason == "it would take 268,435,456 bytes; allowed: 67,108,864"


def test_unguarded_weights_need_an_option(tmp_path):
    values = numpy_helper.from_array(weights((64, 32)))
    branches = {
        "then_branch": helper.make_graph(
            [node("Constant", "", "t", value=values)], "a", [], [helper.ValueInfoProto(name="t")]
        ),
        "else_branch": helper.make_graph(
            [node("Neg", "x", "e")], "b", [], [helper.ValueInfoProto(name="e")]
        ),
    }
    proto = matmul_of([node("If", "yes", "v", **branches)], {"yes": np.array(True)})
    path, output, report = save(proto, tmp_path), tmp_path / "out.onnx", tmp_path / "r.json"
    line = one_line(call("guard", path, "-o", output, "--quiet"))
    assert "tensor 't': weight behind a constant expression" in line
    assert "--allow-unguarded" in line
    assert not output.exists()
    for option in (("--allow-unguarded",), ("--exclude", "t")):
        result = call("guard", path, "-o", output, "--force", "--report", report, *option)
        assert result.exit_code == 0, result.output
        assert ("UNGUARDED 1 tensor, 2,048 values" in result.stdout) == (len(option) == 1)
        assert "  20.00% of all" in result.stdout.replace(", ", "  ")
    inspected = call("inspect", path)
    assert inspected.exit_code == 0
    assert "UNGUARDED 1 tensor" in inspected.stdout
    assert call("scan", path).exit_code == 2


def test_outputs_deliver_the_guarded_value(tmp_path):
    proto = matmul_of([node("Transpose", "v", "vt")], {"v": weights((64, 32))})
    for name, shape in (("v", [64, 32]), ("vt", [32, 64])):
        proto.graph.output.append(helper.make_tensor_value_info(name, F, shape))
    path, output = save(proto, tmp_path), tmp_path / "out.onnx"
    for scheme in ("int8", "int4", "nf4"):
        report = flipguard_onnx.guard(path, scheme, output=output, force=True)
        assert {t.name: t.others for t in report.tensors} == {"v": ("a graph output",), "w": ()}
        assert report.coverage == 1
        x = np.eye(64, dtype=np.float32)
        session = flipguard_onnx.runtime.open_session(output, True, 1)
        _, v, vt = session.run(None, {"x": x})
        np.testing.assert_array_equal(v, vt.T)
        error = np.abs(v - weights((64, 32))).max()
        assert 0 < error < np.abs(v).max() / (64 if scheme == "int8" else 2)


def test_a_constant_node_that_is_an_output(tmp_path):
    value = numpy_helper.from_array(weights((64, 32)))
    proto = matmul_of([node("Constant", "", "v", value=value)], {})
    proto.graph.output.append(helper.make_tensor_value_info("v", F, [64, 32]))
    report = flipguard_onnx.guard(save(proto, tmp_path), output=tmp_path / "out.onnx")
    assert report.coverage == 1


def test_double_weights_are_refused(tmp_path):
    proto = model(
        [node("MatMul", "x w", "y")],
        {"x": (TensorProto.DOUBLE, ["n", 16])},
        {"y": (TensorProto.DOUBLE, ["n", 16])},
        {"w": weights((16, 16), dtype=np.float64)},
    )
    with pytest.raises(UnsupportedModelError, match="'w': unsupported type DOUBLE"):
        flipguard_onnx.guard(save(proto, tmp_path), output=tmp_path / "out.onnx")


def test_a_model_that_onnxruntime_refuses_is_no_failed_validation(tmp_path):
    proto = SAMPLES["matmul"]()
    proto.opset_import[0].version = 999
    line = one_line(call("guard", save(proto, tmp_path), "--quiet"))
    assert "does not load" in line


def test_layouts_behind_views_are_those_of_the_operator(tmp_path):
    """The grid of a weight is that of the layout in which it is multiplied."""
    axis = np.array([0], np.int64)
    proto = matmul_of(
        [node("Unsqueeze", "raw axis", "a"), node("Squeeze", "a axis", "v")],
        {"raw": weights((64, 32)), "axis": axis},
    )
    assert names(folded(proto, tmp_path))["v"].rows == (1,)


def test_attacked_files_are_untouched(tmp_path):
    path = FOLDER / "mlp-standard-int4.onnx"
    assert open_folded(path).proto == open_model(path).proto
    assert not open_folded(path).unfolded


def test_the_type_of_an_input_that_is_not_known(tmp_path):
    gelu = node("Gelu", "x", "h", domain="com.microsoft")
    proto = matmul_of([gelu, node("CastLike", "raw h", "v")], {"raw": weights((64, 32))})
    proto.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    proto.graph.node[2].output[0] = "g"
    proto.graph.node[3].input[0] = "g"
    path, output = save(proto, tmp_path), tmp_path / "out.onnx"
    line = one_line(call("guard", path, "-o", output, "--quiet"))
    assert "tensor 'v': weight behind a constant expression that was not evaluated" in line
    assert "the type of 'h' is not known" in line
    assert not output.exists()


@pytest.mark.parametrize(
    ("picked", "size"),
    [
        ([node("Shape", "x", "s", start=1)], 64),
        ([node("Shape", "x", "s", end=-1)], None),
        ([node("Shape", "x", "all"), node("Gather", "all minus", "s")], 64),
        ([node("Shape", "x", "all"), node("Gather", "all one.0", "s")], 64),
        ([node("Shape", "x", "all"), node("Gather", "all zero", "s")], None),
        ([node("Shape", "x", "all"), node("Slice", "all one far", "s")], 64),
        ([node("Shape", "x", "all"), node("Slice", "all minus far zero one", "s")], 64),
        ([node("Shape", "x", "all"), node("Slice", "all minus zero zero minus", "s")], 64),
        ([node("Shape", "x", "all"), node("Slice", "all zero far", "s")], None),
        ([node("Size", "w", "s")], 512),
        ([node("Size", "x", "s")], None),
    ],
)
def test_sizes_that_a_weight_depends_on(tmp_path, picked, size):
    """Those of the axes that are not open; x is [n, 64]."""
    numbers = {"one": [1], "one.0": 1, "zero": [0], "minus": [-1], "far": [2**62]}
    proto = matmul_of(
        [
            *picked,
            node("Cast", "s", "f", to=F),
            node("ReduceProd", "f", "p", keepdims=0),
            node("Mul", "raw p", "v"),
        ],
        {"raw": weights((64, 32)), **{k: np.array(v, np.int64) for k, v in numbers.items()}},
    )
    opened = folded(proto, tmp_path)
    if size is None:
        [left] = opened.unfolded
        assert left.name == "v"
        assert left.reason == "it depends on a size of an input, which is open"
    else:
        assert not opened.unfolded
        np.testing.assert_array_equal(
            opened.array(names(opened)["v"].tensor), weights((64, 32)) * np.float32(size)
        )


def test_weights_expanded_and_sliced_by_open_sizes_have_rows_of_outputs(tmp_path):
    proto = matmul_of(
        [
            node("Shape", "x", "s", end=1),
            node("Min", "s one", "first"),
            node("Slice", "wide first end axis", "part"),
            node("Transpose", "part", "t"),
            node("Unsqueeze", "t axis", "u"),
            node("Squeeze", "u axis", "v"),
            node("Concat", "first sizes", "shape", axis=0),
            node("Expand", "batch shape", "many"),
            node("MatMul", "h3 many", "z"),
            node("Unsqueeze", "x one", "h3"),
        ],
        {
            "wide": weights((33, 64)),
            "batch": weights((1, 64, 5), 2),
            **{k: np.array(v, np.int64) for k, v in (("one", [1]), ("end", [33]), ("axis", [0]))},
            "sizes": np.array([64, 5], np.int64),
        },
    )
    nodes = sorted(proto.graph.node, key=lambda n: "h3" in n.input)
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    proto.graph.output.append(helper.make_tensor_value_info("z", F, ["n", 1, 5]))
    path = save(proto, tmp_path)
    assert {w.name: w.rows for w in names(open_folded(path)).values()} == {
        "wide": (0,),
        "batch": (0, 2),
        "w": (1,),
    }
    for scheme in ("int8", "int4"):
        report = flipguard_onnx.guard(path, scheme, output=tmp_path / "out.onnx", force=True)
        assert report.coverage == 1


def test_rotary_frequencies_stay_as_they_are(tmp_path):
    """Expanded to the batch and multiplied with places, each is a row of its own."""
    frequencies = (10_000.0 ** -(np.arange(64) / 64)).astype(np.float32)
    proto = model(
        [
            node("Shape", "places", "batch", end=1),
            node("Concat", "batch rest", "shape", axis=0),
            node("Expand", "frequencies shape", "f"),
            node("MatMul", "f places", "angles"),
        ],
        {"places": (F, ["n", 1, "length"])},
        {"angles": (F, ["n", 64, "length"])},
        {"frequencies": frequencies[None, :, None], "rest": np.array([64, 1], np.int64)},
    )
    path, output = save(proto, tmp_path), tmp_path / "out.onnx"
    flipguard_onnx.guard(path, "int4", output=output)
    session = flipguard_onnx.runtime.open_session(output, False, 1)
    [angles] = session.run(None, {"places": np.full((2, 1, 3), 1000, np.float32)})
    expected = np.broadcast_to(1000 * frequencies[None, :, None], angles.shape)
    np.testing.assert_allclose(angles, expected, rtol=1e-6)


def test_what_only_calculates_with_sizes_is_no_weight(tmp_path):
    """A position's sines and cosines, scaled by a vector, times a matrix."""
    proto = model(
        [
            node("Shape", "x", "s", start=1, end=2),
            node("Squeeze", "s", "n"),
            node("Range", "zero n step", "i"),
            node("Cast", "i", "t", to=F),
            node("Unsqueeze", "t one", "column"),
            node("Mul", "column frequencies", "angles"),
            node("Sin", "angles", "sines"),
            node("Mul", "sines gain", "places"),
            node("MatMul", "places w", "p"),
            node("Transpose", "p", "q"),
            node("MatMul", "x q", "y"),
        ],
        {"x": (F, [1, "length", 64])},
        {"y": (F, [1, "length", "length"])},
        {
            "zero": np.int64(0),
            "step": np.int64(1),
            "one": np.array([1], np.int64),
            "frequencies": weights(128),
            "gain": weights(128, 1),
            "w": weights((128, 64), 2),
        },
    )
    opened = folded(proto, tmp_path)
    assert not opened.unfolded
    assert list(names(opened)) == ["w"]


def test_learned_queries_are_activations(tmp_path):
    """Expanded to the batch, times a slice of packed weights, plus one of packed biases."""
    proto = model(
        [
            node("Shape", "x", "batch", end=1),
            node("Concat", "batch rest", "shape", axis=0),
            node("Expand", "queries shape", "expanded"),
            node("Slice", "packed zero width zero", "w_q"),
            node("Transpose", "w_q", "w_qt"),
            node("MatMul", "expanded w_qt", "product"),
            node("Split", "biases", "b_q b_k b_v", num_outputs=3),
            node("Add", "product b_q", "q"),
            node("Transpose", "x", "k", perm=[0, 2, 1]),
            node("MatMul", "q k", "y"),
        ],
        {"x": (F, ["n", "length", 64])},
        {"y": (F, ["n", 16, "length"])},
        {
            "queries": weights((1, 16, 64)),
            "packed": weights((192, 64), 1),
            "biases": weights(192, 2),
            "rest": np.array([16, 64], np.int64),
            "zero": np.array([0], np.int64),
            "width": np.array([64], np.int64),
        },
        opset=18,
    )
    opened = folded(proto, tmp_path)
    assert not opened.unfolded
    assert "packed" in names(opened)


def test_a_sliced_table_that_gather_reads(tmp_path):
    proto = model(
        [node("Slice", "table zero half", "part"), node("Gather", "part i", "y")],
        {"i": (INT64, ["n"])},
        {"y": (F, ["n", 32])},
        {
            "table": weights((64, 32)),
            "zero": np.array([0], np.int64),
            "half": np.array([32], np.int64),
        },
    )
    report = flipguard_onnx.guard(save(proto, tmp_path), output=tmp_path / "out.onnx")
    assert report.coverage == 1


@pytest.mark.parametrize("computed", [True, False])
def test_constant_data_of_attention_is_a_weight_where_the_weights_are_computed(tmp_path, computed):
    """Beside constant weights nothing of it varies, and the weights are guarded."""
    attention = helper.make_node(
        "Attention", ["data", "a", "bias"], ["h"], domain="com.microsoft", num_heads=1
    )
    made = node("Reshape", "t s", "a") if computed else node("Identity", "v", "a")
    proto = model(
        [
            node("MatMul", "x w", "t"),
            made,
            attention,
            node("ReduceSum", "t", "u"),
            node("Add", "h u", "y"),
        ],
        {"x": (F, [16, 64])},
        {"y": (F, None)},
        {
            "w": weights((64, 24)),
            "v": weights((16, 24), 3),
            "data": weights((1, 8, 16), 1),
            "bias": weights(24, 2),
            "s": np.array([16, 24]),
        },
    )
    proto.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    opened = folded(proto, tmp_path)
    reasons = {each.name: each.reason for each in opened.unfolded}
    data = {"data": "it is the data of Attention, whose weights are computed"}
    assert reasons == (data if computed else {})
