"""Are our codes onnxruntime's codes? Run: python -m pytest tools/attacks/test_quantizers.py"""

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnxruntime.quantization.matmul_bnb4_quantizer import MatMulBnb4Quantizer
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
from onnxruntime.quantization.quantize import quantize_dynamic

from tools.attacks.quantizers import FP4_CODES, SCHEMES
from tools.attacks.simulate import BLOCKWISE, DYNAMIC

SHAPES = [(24, 64), (10, 100), (33, 70), (5, 300)]


def one_matmul(weight):
    """A model `y = x @ weight` with weight `[K, N]`."""
    k, n = weight.shape
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="matmul")],
        "one_matmul",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, k])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, n])],
        [numpy_helper.from_array(weight, "w")],
    )
    opsets = [helper.make_opsetid("", 21)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def initializers(model):
    """Name -> array (4-bit types unpacked by onnx)."""
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}


def random_rows(shape, seed):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", DYNAMIC)
def test_8_bits_per_row_and_tensor(name, shape, tmp_path):
    rows = random_rows(shape, 1)
    onnx.save(one_matmul(np.ascontiguousarray(rows.T)), tmp_path / "a.onnx")
    quantize_dynamic(tmp_path / "a.onnx", tmp_path / "b.onnx", **DYNAMIC[name])
    theirs = initializers(onnx.load(tmp_path / "b.onnx"))
    codes, scale = SCHEMES[name].encode(rows)
    levels = theirs["w_quantized"].astype(int) - theirs["w_zero_point"].astype(int)
    np.testing.assert_array_equal(levels.T, SCHEMES[name].levels[codes])
    np.testing.assert_array_equal(theirs["w_scale"].reshape(-1), scale.reshape(-1))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", [name for name in BLOCKWISE if SCHEMES[name].bits == 4])
def test_4_bit_integers_in_blocks(name, shape):
    rows = random_rows(shape, 2)
    quantizer = MatMulNBitsQuantizer(one_matmul(np.ascontiguousarray(rows.T)), **BLOCKWISE[name])
    quantizer.process()
    theirs = initializers(quantizer.model.model)
    scheme = SCHEMES[name]
    codes, scale = scheme.encode(rows)
    their_codes, their_scale = theirs["w_DQ_Q4"].astype(int).T, theirs["w_DQ_scales"].T
    if "w_DQ_zero_points" in theirs:
        zero = np.repeat(theirs["w_DQ_zero_points"].astype(int).T, scheme.block, 1)
        their_codes = their_codes - zero[:, : rows.shape[1]]
    np.testing.assert_array_equal(their_codes, scheme.levels[codes])
    np.testing.assert_array_equal(their_scale.reshape(-1), scale.reshape(-1))


@pytest.mark.parametrize("shape", SHAPES)
def test_int8_in_blocks(shape):
    rows = random_rows(shape, 2)
    options = BLOCKWISE["int8_g32"]
    quantizer = MatMulNBitsQuantizer(one_matmul(np.ascontiguousarray(rows.T)), **options)
    quantizer.process()
    theirs = initializers(quantizer.model.model)
    codes, scale = SCHEMES["int8_g32"].encode(rows)
    their_codes = theirs["w_Q8"].reshape(shape[0], -1)[:, : shape[1]]
    np.testing.assert_array_equal(their_codes, codes)
    np.testing.assert_array_equal(theirs["w_scales"].reshape(-1), scale.reshape(-1))


@pytest.mark.parametrize("shape", SHAPES)
def test_mxfp4(shape):
    """onnxruntime has no quantizer for it; so by the specification, and onnx's reference."""
    rows = random_rows(shape, 6)
    rows[0, :10] = [8, *np.arange(0.25, 2.5, 0.25)]  # in steps, with every tie below 4
    rows[1, :4] = [7.9, 5, -5, 6.5]
    codes, scale = SCHEMES["mxfp4"].encode(rows)
    largest = np.abs(SCHEMES["mxfp4"].group(rows)).max(1, keepdims=True)
    np.testing.assert_array_equal(scale, np.exp2(np.floor(np.log2(largest)) - 2))
    steps = rows / SCHEMES["mxfp4"].ungroup(np.repeat(scale, 32, 1), shape)
    levels = SCHEMES["mxfp4"].levels[codes]
    np.testing.assert_array_equal(steps.astype(ml_dtypes.float4_e2m1fn).astype(np.float32), levels)
    np.testing.assert_array_equal(_by_reference(steps), levels)


@pytest.mark.parametrize("shape", SHAPES)
def test_nvfp4(shape):
    """By the formula of its only quantizer, and onnx's reference."""
    rows = random_rows(shape, 7)
    rows[0, :8] = np.array([448, 0.25, -0.75, 1.25, 1.75, 2.5, -3.5, 5])  # of 448 / 6 steps
    rows[0, 1:8] *= np.float32(448 / 6)
    rows[1, :16] = 0
    rows[2, :16] *= 1e-4
    scheme = SCHEMES["nvfp4"]
    codes, scale = scheme.encode(rows)
    shares = np.abs(scheme.group(rows)).max(1, keepdims=True) / np.abs(rows).max() * 448
    in_8_bits = np.clip(shares, 2.0**-9, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float64)
    in_8_bits[shares == 0] = 1
    np.testing.assert_allclose(scale, in_8_bits * np.abs(rows).max() / 2688, rtol=1e-6)
    steps = rows / scheme.ungroup(np.repeat(scale, 16, 1), shape)
    levels = scheme.levels[codes]
    np.testing.assert_array_equal(steps.astype(ml_dtypes.float4_e2m1fn).astype(np.float32), levels)
    np.testing.assert_array_equal(_by_reference(steps), levels)


def _by_reference(steps):
    """What onnx's reference implementation of QuantizeLinear makes of these."""
    node = helper.make_node(
        "QuantizeLinear", ["x", "one"], ["y"], output_dtype=TensorProto.FLOAT4E2M1
    )
    graph = helper.make_graph(
        [node],
        "fp4",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, steps.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT4E2M1, steps.shape)],
        [numpy_helper.from_array(np.float32(1), "one")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)])
    return ReferenceEvaluator(model).run(None, {"x": steps})[0].astype(np.float32)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_bnb4(name, shape):
    rows = random_rows(shape, 3)
    quantizer = MatMulBnb4Quantizer(
        one_matmul(np.ascontiguousarray(rows.T)), quant_type=int(name == "nf4"), block_size=64
    )
    quantizer.process()
    theirs = initializers(quantizer.model.model)
    packed = theirs["w_Bnb4"]
    their_codes = np.stack([packed >> 4, packed & 15], 1).reshape(-1)[: rows.size]
    codes, scale = SCHEMES[name].encode(rows)
    if name == "fp4":
        size = np.abs(codes - 7)
        codes = FP4_CODES[size] + 8 * (rows < 0)
    np.testing.assert_array_equal(their_codes, codes.reshape(-1))
    np.testing.assert_array_equal(theirs["w_absmax"], scale.reshape(-1))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", SCHEMES)
def test_cells_keep_codes_and_no_more(name, shape):
    """Anywhere inside its cell a weight keeps its code; a little outside it changes."""
    scheme = SCHEMES[name]
    rows = random_rows(shape, 4)
    codes, scale = scheme.encode(rows)
    low, high, frozen = scheme.cells(rows)
    assert (low <= rows + 1e-6).all()
    assert (rows <= high + 1e-6).all()
    rng = np.random.default_rng(5)
    width = high - low
    inside = low + width * np.clip(rng.random(shape), 1e-3, 1 - 1e-3)
    moved = np.where(frozen, rows, inside).astype(np.float32)
    np.testing.assert_array_equal(scheme.encode(moved)[0], codes)
    np.testing.assert_array_equal(scheme.encode(moved)[1], scale)
    past = (high + 1e-3 * width).astype(np.float32)
    groups = scheme.group(rows.astype(np.float64))
    end = scheme.ungroup(np.broadcast_to(scheme.ends(groups, scale)[1], groups.shape), shape)
    limit = high < end - 1e-2 * width
    moved = np.where(frozen | ~limit, rows, past).astype(np.float32)
    assert (scheme.encode(moved)[0] != codes)[~frozen & limit].all()


@pytest.mark.parametrize("name", ["uint4_g128", "uint8_tensor"])
def test_both_ends_are_frozen_where_they_set_a_zero_point(name):
    scheme, rows = SCHEMES[name], random_rows((3, 256), 8)
    groups, frozen = scheme.group(rows), scheme.group(scheme.cells(rows)[2])
    assert frozen.sum(1).tolist() == [2] * len(groups)
    assert frozen[np.arange(len(groups)), groups.argmin(1)].all()
    assert frozen[np.arange(len(groups)), groups.argmax(1)].all()


def test_all_zero_group():
    for scheme in SCHEMES.values():
        assert (scheme.quantize(np.zeros((3, 64), np.float32)) == 0).all()
