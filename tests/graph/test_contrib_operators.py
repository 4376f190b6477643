"""Operators of com.microsoft with weights: found, written and run by onnxruntime."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

import flipguard_onnx
from flipguard_onnx import ModelError, ValidationError
from flipguard_onnx.calibration.weight_inputs import weight_input
from flipguard_onnx.emit.weight_forms import Target
from flipguard_onnx.graph.operators import OPERATORS, operator_of
from flipguard_onnx.graph.weights import find_weights
from flipguard_onnx.io.model import open_model
from flipguard_onnx.quantization.schemes import SCHEMES
from flipguard_onnx.validation import layers
from tests.helpers.command import call
from tests.helpers.samples import F, model, save, weights
from tests.helpers.written import decoded

CONTRIB = "com.microsoft"
OPSET = 21  # that has 4-bit integers


def contrib(op, inputs, x, y, constants, **attributes):
    """One node; `inputs` may hold "-" for one that is left out. x, y: shapes by name."""
    names = ["" if name == "-" else name for name in inputs.split()]
    single = helper.make_node(op, names, list(y), domain=CONTRIB, **attributes)
    shapes = ({name: (F, shape) for name, shape in each.items()} for each in (x, y))
    proto = model([single], *shapes, constants, OPSET, ir_version=10)
    proto.opset_import.add(domain=CONTRIB, version=1)
    return proto


def fused_matmul(index=1, trans_a=0, trans_b=0, batch=()):
    """A weight on the right (or, with index 0, on the left), of 70 inputs and 33 outputs."""
    shapes = [(5, 70), (70, 33)] if index else [(33, 70), (70, 5)]
    turned = [s[::-1] if t else s for s, t in zip(shapes, (trans_a, trans_b), strict=True)]
    return contrib(
        "FusedMatMul",
        "x w" if index else "w x",
        {"x": [*batch, *turned[1 - index]]},
        {"y": [*batch, 5, 33] if index else [*batch, 33, 5]},
        {"w": weights((*batch, *turned[index]))},
        transA=trans_a,
        transB=trans_b,
        alpha=0.5,
    )


def fused_matmul_batch_first(trans_b):
    """The weight's batch axis is not the first one: transBatchB moves it there."""
    return contrib(
        "FusedMatMul",
        "x w",
        {"x": [3, 5, 70]},
        {"y": [3, 5, 33]},
        {"w": weights((33, 3, 70) if trans_b else (70, 3, 33))},
        transBatchB=1,
        transB=trans_b,
    )


def attention(**attributes):
    return contrib(
        "Attention",
        "x w b",
        {"x": [2, 6, 32]},
        {"y": [2, 6, 32]},
        {"w": weights((32, 96)) * 8, "b": weights((96,), 1)},
        num_heads=4,
        **attributes,
    )


def experts(fused=1, **attributes):
    """Four experts, two of which a router picks for each of 5 inputs."""
    constants = {"w1": weights((4, 24 * fused, 16)) * 8, "w2": weights((4, 16, 24), 1) * 8}
    shapes = {"x": [5, 16], "p": [5, 4]}
    attributes = {"activation_type": "relu", "k": 2} | attributes
    return contrib("MoE", "x p w1 - w2", shapes, {"y": [5, 16]}, constants, **attributes)


def fused_gemm(trans_b=0):
    shape = (33, 70) if trans_b else (70, 33)
    constants = {"w": weights(shape), "b": weights((33,), 1)}
    shapes = {"x": [5, 70]}, {"y": [5, 33]}
    return contrib("FusedGemm", "x w b", *shapes, constants, activation="Relu", transB=trans_b)


def fused_conv(group=1):
    constants = {"w": weights((24, 16 // group, 3, 3)), "b": weights((24,), 1)}
    shapes = {"x": [1, 16, 9, 9]}, {"y": [1, 24, 7, 7]}
    attributes = {"activation": "Relu", "kernel_shape": [3, 3], "group": group}
    return contrib("FusedConv", "x w b", *shapes, constants, **attributes)


def transpose_matmul():
    """FusedMatMul under its old name."""
    proto = fused_matmul(trans_b=1)
    proto.graph.node[0].op_type = "TransposeMatMul"
    return proto


def conv_transpose():
    """What is cut off at the borders is an input."""
    constants = {"w": weights((16, 12, 3, 3)), "pads": np.array([1, 0, 1, 0])}
    shapes = {"x": [1, 16, 9, 9]}, {"y": [1, 24, 17, 19]}
    attributes = {"group": 2, "kernel_shape": [3, 3], "strides": [2, 2]}
    return contrib("ConvTransposeWithDynamicPads", "x w pads", *shapes, constants, **attributes)


def causal_conv():
    """Of what came before, it keeps what the kernel needs."""
    constants = {"w": weights((24, 1, 4)), "b": weights((24,), 1)}
    inputs = {"x": [2, 24, 9], "past": [2, 24, 3]}
    outputs = {"y": [2, 24, 9], "state": [2, 24, 3]}
    return contrib("CausalConvWithState", "x w b past", inputs, outputs, constants, ndim=1)


def embedded():
    """Tables of 90 words, 12 positions and 2 segments; the indices are 32-bit integers."""
    tables = {"words": weights((90, 32)), "places": weights((12, 32), 1) * 2}
    tables |= {"segments": weights((2, 32), 2), "gain": weights((32,), 3) + 1, "b": weights((32,))}
    proto = contrib(
        "EmbedLayerNormalization",
        "ids segment words places segments gain b",
        {"ids": [2, 6], "segment": [2, 6]},
        {"y": [2, 6, 32], "mask": [2]},
        tables,
    )
    for value in (*proto.graph.input, proto.graph.output[1]):
        value.type.tensor_type.elem_type = TensorProto.INT32
    return proto


MODELS = {
    "fused_gemm": (fused_gemm, {"w": (1,)}),
    "fused_gemm_trans_b": (lambda: fused_gemm(1), {"w": (0,)}),
    "fused_conv": (fused_conv, {"w": (0,)}),
    "fused_conv_grouped": (lambda: fused_conv(2), {"w": (0,)}),
    "transpose_matmul": (transpose_matmul, {"w": (0,)}),
    "conv_transpose": (conv_transpose, {"w": (1,)}),
    "causal_conv": (causal_conv, {"w": (0,)}),
    "embedded": (embedded, {"words": (0,), "places": (0,), "segments": (0,)}),
    "fused_matmul": (fused_matmul, {"w": (1,)}),
    "fused_matmul_trans_a": (lambda: fused_matmul(trans_a=1), {"w": (1,)}),
    "fused_matmul_trans_b": (lambda: fused_matmul(trans_b=1), {"w": (0,)}),
    "fused_matmul_left": (lambda: fused_matmul(0), {"w": (0,)}),
    "fused_matmul_left_trans_a": (lambda: fused_matmul(0, trans_a=1), {"w": (1,)}),
    "fused_matmul_left_trans_b": (lambda: fused_matmul(0, trans_b=1), {"w": (0,)}),
    "fused_matmul_batched": (lambda: fused_matmul(batch=(3,)), {"w": (0, 2)}),
    "fused_matmul_batched_trans_b": (
        lambda: fused_matmul(trans_b=1, batch=(3,)),
        {"w": (0, 1)},
    ),
    "fused_matmul_batched_batch_first": (lambda: fused_matmul_batch_first(0), {"w": (1, 2)}),
    "fused_matmul_batched_batch_first_trans_b": (
        lambda: fused_matmul_batch_first(1),
        {"w": (0, 1)},
    ),
    "attention": (attention, {"w": (1,)}),
    "attention_causal": (lambda: attention(unidirectional=1), {"w": (1,)}),
    "experts": (experts, {"w1": (0, 1), "w2": (0, 1)}),
    "experts_swiglu": (
        lambda: experts(fused=2, activation_type="swiglu", swiglu_fusion=1),
        {"w1": (0, 1), "w2": (0, 1)},
    ),
}


def run(path, feed):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, feed)[0]


def feed_for(proto):
    rng, feed = np.random.default_rng(0), {}
    for value in proto.graph.input:
        kind = value.type.tensor_type
        shape = [dim.dim_value for dim in kind.shape.dim]
        if kind.elem_type == TensorProto.INT32:
            feed[value.name] = rng.integers(0, 2, shape, np.int32)
        else:
            feed[value.name] = rng.standard_normal(shape).astype(np.float32)
    return feed


@pytest.mark.parametrize("name", MODELS)
def test_output_axes(name):
    make, rows = MODELS[name]
    assert {w.name: w.rows for w in find_weights(make())[0]} == rows


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("scheme", ["int8", "int4", "fp4"])
@pytest.mark.parametrize("target", ["portable", "onnxruntime"])
def test_the_written_file_computes_what_its_codes_stand_for(tmp_path, name, scheme, target):
    proto = MODELS[name][0]()
    path = tmp_path / "out.onnx"
    options = {"seed": 1, "target": target, "preserve": "off", "validate": False}
    report = flipguard_onnx.guard(save(proto, tmp_path), scheme, output=path, **options)
    four_bits = proto.graph.node[0].op_type in ("FusedMatMul", "TransposeMatMul")
    assert report.tensors
    for tensor in report.tensors:
        assert tensor.scheme == (scheme if four_bits else "int8")
        folds = target == "onnxruntime" or tensor.scheme == "fp4"
        assert tensor.forms == ("folded" if folds else "dequantize",)
        assert tensor.flips
    feed = feed_for(proto)
    before = run(proto.SerializeToString(), feed)
    for weight in find_weights(proto)[0]:
        weight.tensor.CopyFrom(numpy_helper.from_array(decoded(path, weight), weight.name))
    expected = run(proto.SerializeToString(), feed)
    assert np.allclose(run(path, feed), expected, rtol=1e-4, atol=1e-5)
    assert not np.allclose(before, expected, rtol=1e-4, atol=1e-5), "the control: codes differ"


def test_a_third_matrix_of_experts_is_found():
    """onnxruntime runs it on GPUs only."""
    proto = experts()
    proto.graph.node[0].input.extend(["", "w3"])
    proto.graph.initializer.append(numpy_helper.from_array(weights((4, 24, 16), 2), "w3"))
    assert {w.name: w.rows for w in find_weights(proto)[0]}["w3"] == (0, 1)


@pytest.mark.parametrize("name", [n for n in MODELS if "batched" not in n and "conv" not in n])
def test_the_inputs_of_a_weight(name):
    """Their products with the weight are the outputs; those of experts are not recorded."""
    proto = MODELS[name][0]()
    weight, *_ = find_weights(proto)[0]
    found = weight_input(weight.uses[0], weight, [proto.graph])
    reasons = {"experts": "mixture of experts", "embedded": "inputs of EmbedLayerNormalization"}
    if isinstance(found, str):
        assert found.startswith(reasons[name.partition("_")[0]])
        return
    feed = feed_for(proto)
    (rows,) = found.rows(feed[found.value], 1000, np.random.default_rng(0))
    if name.startswith("attention"):
        assert np.array_equal(rows, feed["x"].reshape(-1, 32))
        return
    matrix = weight.canonical(numpy_helper.to_array(weight.tensor)).reshape(33, 70)
    products = 0.5 * rows @ matrix.T
    if name.startswith("fused_gemm"):
        products = np.maximum(2 * products + weights((33,), 1), 0)
    output = run(proto.SerializeToString(), feed)
    assert np.allclose(output if output.shape == (5, 33) else output.T, products, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_layers_run_alone(tmp_path, name):
    source = open_model(save(MODELS[name][0](), tmp_path))
    found = find_weights(source.proto)[0]
    schemes = [SCHEMES["int8"]] * len(found)
    if name.startswith(("experts", "embedded", "causal")) or "batched" in name:
        with pytest.raises(ValidationError, match="no layer of it can be run alone"):
            layers.sample(source, found, schemes, Target("portable"))
        return
    chosen = layers.sample(source, found, schemes, Target("portable"))
    cut = layers.cut_out(source, chosen, tmp_path / "cut")
    proto = onnx.load(cut.path)
    assert run(cut.path, feed_for(proto)).size > 0


def test_inspect_lists_them(tmp_path):
    for make, names in ((fused_matmul, "w"), (attention, "w"), (experts, "w1 w2")):
        proto = make()
        result = call("inspect", save(proto, tmp_path))
        assert result.exit_code == 0, result.output
        lines = [line.split() for line in result.output.splitlines()]
        listed = [line[0] for line in lines if line[1:2] == [proto.graph.node[0].op_type]]
        assert listed == names.split()


def test_operators_are_looked_up_with_their_domain():
    for operator in OPERATORS:
        assert operator_of(helper.make_node(operator.name, [], [], domain=operator.domain)) is (
            operator
        )
        assert operator_of(helper.make_node(operator.name, [], [], domain="com.example")) is None
    assert operator_of(helper.make_node("MatMul", [], [], domain="ai.onnx")) is OPERATORS[0]
    assert operator_of(helper.make_node("Attention", [], [])) is None  # without weights
    assert len({operator.name for operator in OPERATORS}) == len(OPERATORS)


def test_their_attributes_are_checked(tmp_path):
    proto = fused_matmul()
    del proto.graph.node[0].attribute[:]
    proto.graph.node[0].attribute.append(helper.make_attribute("transB", 1.0))
    with pytest.raises(ModelError, match="'transB' as FLOAT; allowed: INT"):
        open_model(save(proto, tmp_path))
