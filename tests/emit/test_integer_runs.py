"""What onnxruntime makes of our QDQ graphs when it loads them: nothing is rounded anew."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

import flipguard_onnx
from flipguard_onnx.graph.weights import find_weights
from tests.emit.test_static_qdq import convolution
from tests.helpers.real import downloaded
from tests.helpers.samples import F, model, node, save, weights
from tests.helpers.written import decoded, initializers

SHAPE = [1, 8, 6, 6]
TINY = 1e-12  # of the other channels' weights: any bias overflows beside it


def loaded(path):
    """The graph that runs, and its constants by name, after onnxruntime's optimizer."""
    target = path.with_suffix(".optimized.onnx")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(target)
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return onnx.load(target).graph, initializers(target)


def weights_that_run(path):
    """By node: the constant of two or more dimensions that it multiplies with."""
    graph, constants = loaded(path)
    found = {}
    for n in graph.node:
        held = [constants[name] for name in n.input if name in constants]
        held = [values for values in held if values.ndim > 1]
        if held and n.op_type in ("Conv", "FusedConv", "Gemm", "QLinearConv", "QGemm"):
            (found[n.name],) = held
    return found


def guarded(tmp_path, proto, **options):
    source = save(proto, tmp_path)
    path = tmp_path / "out.onnx"
    return path, flipguard_onnx.guard(source, activations="uint8", seed=1, output=path, **options)


def one_tiny_channel():
    w = weights((16, 8, 3, 3))
    w[3] *= TINY
    return w


def test_weight_only_codes_are_not_rounded_when_loaded(tmp_path):
    proto = convolution(np.full(16, 5.0, np.float32), one_tiny_channel())
    path, report = guarded(tmp_path, proto, target="onnxruntime")
    assert list(report.integers.weight_only) == ["w"]
    (found,) = weights_that_run(path).values()
    (weight,) = find_weights(onnx.load(tmp_path / "model.onnx"))[0]
    assert np.array_equal(found, decoded(path, weight))
    proto = onnx.load(path)
    (conv,) = (n for n in proto.graph.node if n.op_type == "Conv")
    conv.input[2] = "b"
    proto.graph.initializer.append(numpy_helper.from_array(np.full(16, 5.0, np.float32), "b"))
    onnx.save(proto, tmp_path / "constant.onnx")
    (found,) = weights_that_run(tmp_path / "constant.onnx").values()
    assert found.dtype == np.int8, "the control: with a constant bias onnxruntime rounds the weight"
    assert np.any(found != initializers(path)["w_quantized"])


def test_weight_only_codes_are_those_that_run(tmp_path):
    proto = convolution(np.full(16, 5.0, np.float32), one_tiny_channel())
    path, report = guarded(tmp_path, proto)
    assert list(report.integers.weight_only) == ["w"]
    graph, constants = loaded(path)
    (conv,) = (n for n in graph.node if n.op_type in ("Conv", "FusedConv"))
    (decoder,) = (n for n in graph.node if n.output[0] == conv.input[1])
    found = [constants[name] for name in decoder.input[:2]]
    written = initializers(path)
    assert np.array_equal(found[0], written["w_quantized"])
    assert np.array_equal(found[1], written["w_scale"])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("op", "shape", "x", "y"),
    [
        ("Conv", (16, 8, 3, 3), SHAPE, [1, 16, 4, 4]),
        ("ConvTranspose", (8, 6, 3, 3), SHAPE, [1, 6, 8, 8]),
        ("Gemm", (24, 20), [4, 24], [4, 20]),
    ],
)
def test_excluded_weights_are_not_rounded_when_loaded(tmp_path, op, shape, x, y, bias):
    constants = {"v": weights(shape), "w": weights((y[-1], 24), 1)}
    if bias:
        constants["b"] = weights((y[1],), 2)
    nodes = [node(op, "x v b" if bias else "x v", "h"), node("MatMul", "h w", "y")]
    path, _ = guarded(
        tmp_path, model(nodes, {"x": (F, x)}, {"y": (F, [*y[:-1], 24])}, constants), exclude=("v",)
    )
    graph, found = loaded(path)
    assert np.any([np.array_equal(values, constants["v"]) for values in found.values()])
    assert op in {n.op_type for n in graph.node}


def test_a_bias_far_below_the_step_of_the_result_keeps_nothing_from_integers(tmp_path):
    bias = weights((16,), 1)
    bias[3] = 1e-7
    path, report = guarded(tmp_path, convolution(bias, one_tiny_channel()))
    assert (report.integers.weight_only, report.integers.floats) == ({}, ())
    (found,) = weights_that_run(path).values()
    assert np.array_equal(found, initializers(path)["w_quantized"])


def test_sums_beside_convolutions_run_in_integers(tmp_path):
    nodes = [
        node("Conv", "x w b", "h", pads=[1, 1, 1, 1]),
        node("Relu", "x", "r"),
        node("Add", "h r", "s"),
        node("Add", "s c", "t"),
        node("Conv", "t v", "y"),
    ]
    constants = {
        "w": weights((8, 8, 3, 3)),
        "b": weights((8,), 1),
        "c": weights((1, 8, 1, 1), 2),
        "v": weights((16, 8, 3, 3), 3),
    }
    proto = model(nodes, {"x": (F, SHAPE)}, {"y": (F, [1, 16, 4, 4])}, constants)
    path, report = guarded(tmp_path, proto)
    kinds = [n.op_type for n in loaded(path)[0].node]
    assert (kinds.count("QLinearAdd"), kinds.count("Add")) == (1, 1)
    assert report.integers.floats == ()
    assert np.array_equal(initializers(path)["c"], constants["c"])


@pytest.mark.parametrize("tiny", [1, TINY])
def test_the_factor_of_a_bias(tmp_path, tiny):
    w = weights((24, 20))
    w[:, 3] *= tiny
    bias = np.full(20, 0.7, np.float32)
    nodes = [node("Gemm", "x w b", "y", beta=3.0)]
    proto = model(nodes, {"x": (F, [4, 24])}, {"y": (F, [4, 20])}, {"w": w, "b": bias})
    path, report = guarded(tmp_path, proto)
    assert len(report.integers.weight_only) == (tiny < 1)
    run = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = run.run(None, {"x": np.zeros((4, 24), np.float32)})
    assert np.allclose(found, 2.1, atol=0.02)


@pytest.mark.parametrize(
    ("name", "weight_only"),
    [("magika", 0), ("fsmn_vad", 0), ("minilm", 3), ("lac", 5)],
)
def test_real_models_in_integers(tmp_path, name, weight_only):
    path = tmp_path / "out.onnx"
    report = flipguard_onnx.guard(downloaded(name), activations="uint8", seed=1, output=path)
    assert len(report.integers.weight_only) == weight_only
    assert report.coverage > 0.98
    outputs = [value.name for value in onnx.load(path).graph.output]
    assert [drift.output for drift in report.validation.guarded_exact] == outputs
    assert sum(report.outputs.values()) < 0.3 * report.input_bytes
    codes = {v.tobytes() for v in initializers(path).values() if v.dtype == np.int8}
    found = weights_that_run(path)
    assert all(values.tobytes() in codes for values in found.values() if values.dtype == np.int8)
