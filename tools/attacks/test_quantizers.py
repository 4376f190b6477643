"""Are our codes onnxruntime's codes? Run: python -m pytest tools/attacks/test_quantizers.py"""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization.matmul_bnb4_quantizer import MatMulBnb4Quantizer
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
from onnxruntime.quantization.quantize import QuantFormat, QuantType, quantize_dynamic

from tools.attacks.quantizers import FP4_CODES, SCHEMES

SHAPES = [(24, 64), (10, 100), (33, 70)]


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
@pytest.mark.parametrize("name", ["int8", "int8_tensor"])
def test_int8(name, shape, tmp_path):
    rows = random_rows(shape, 1)
    onnx.save(one_matmul(np.ascontiguousarray(rows.T)), tmp_path / "a.onnx")
    quantize_dynamic(
        tmp_path / "a.onnx",
        tmp_path / "b.onnx",
        weight_type=QuantType.QInt8,
        per_channel=name == "int8",
    )
    theirs = initializers(onnx.load(tmp_path / "b.onnx"))
    codes, scale = SCHEMES[name].encode(rows)
    np.testing.assert_array_equal(theirs["w_quantized"].T, codes - 127)
    np.testing.assert_array_equal(theirs["w_scale"].reshape(-1), scale.reshape(-1))


@pytest.mark.parametrize("shape", SHAPES)
def test_int4(shape):
    rows = random_rows(shape, 2)
    quantizer = MatMulNBitsQuantizer(
        one_matmul(np.ascontiguousarray(rows.T)),
        block_size=32,
        is_symmetric=True,
        quant_format=QuantFormat.QDQ,
    )
    quantizer.process()
    theirs = list(initializers(quantizer.model.model).values())
    codes, scale = SCHEMES["int4"].encode(rows)
    (their_codes,) = [a for a in theirs if a.shape == rows.T.shape]
    (their_scale,) = [a for a in theirs if a.dtype == np.float32]
    np.testing.assert_array_equal(their_codes.astype(int).T, codes - 8)
    np.testing.assert_array_equal(their_scale.T.reshape(-1), scale.reshape(-1))


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
    limit = np.abs(high) < scheme.ungroup(
        np.broadcast_to(np.abs(scale) * scheme.top * 0.9, scheme.group(rows).shape), shape
    )
    moved = np.where(frozen | ~limit, rows, past).astype(np.float32)
    assert (scheme.encode(moved)[0] != codes)[~frozen & limit].all()


def test_all_zero_group():
    for scheme in SCHEMES.values():
        assert (scheme.quantize(np.zeros((3, 64), np.float32)) == 0).all()
