"""onnxruntime's own quantizers, called thinly.

Every function takes `weights` [rows, cols], one row per output channel, float32 or float16, and
returns (codes, scales), both flat, in row order; codes as the file stores them.
"""

import numpy as np
import onnx
import onnx.helper as oh
import onnx.numpy_helper as nh
import onnxruntime as ort
from onnxruntime.capi import _pybind_state as native
from onnxruntime.quantization import QuantFormat, QuantType, quantize_dynamic, quantize_static
from onnxruntime.quantization.calibrate import CalibrationDataReader
from onnxruntime.quantization.matmul_bnb4_quantizer import MatMulBnb4Quantizer
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
from onnxruntime.quantization.neural_compressor.weight_only import (
    pad_tensor,
    quant_tensor_k_quant_cpu,
    rtn_quantize,
)
from onnxruntime.quantization.quant_utils import quantize_data

BNB4 = {"fp4": 0, "nf4": 1}
SYMMETRIC = {"WeightSymmetric": True, "ActivationSymmetric": False}


def int8(weights, per_channel):
    """`quantize_data`, which onnxruntime's int8 quantizers call per row or once for the tensor."""
    return _by_data(weights if per_channel else [weights], onnx.TensorProto.INT8)


def uint8(weights, per_channel, reduce_range=False, symmetric=False):
    """The same for QUInt8; returns the zero points, too."""
    parts = weights if per_channel else [weights]
    return _by_data(parts, onnx.TensorProto.UINT8, symmetric, reduce_range)


def _by_data(parts, kind, symmetric=True, reduce_range=False):
    results = [quantize_data(part, kind, symmetric, reduce_range) for part in parts]
    codes = np.concatenate([codes.reshape(-1) for _, _, codes in results])
    found = codes, np.array([scale for _, scale, _ in results])
    if kind != onnx.TensorProto.UINT8:
        return found
    return *found, np.array([zero for zero, _, _ in results])


def int4(weights, block=32):
    """`quantize_qdq_matmul_4bits`: the 4-bit QDQ form."""
    codes, scales, _ = _qdq(weights, block, symmetric=True)
    return _signed(codes), scales


def uint4(weights, block=32):
    """The same with zero points, which it returns, too."""
    return _qdq(weights, block, symmetric=False)


def _qdq(weights, block, symmetric):
    cols, rows = weights.T.shape
    per_row = -(-cols // block)
    packed = np.zeros((cols * rows + 1) // 2, np.uint8)
    scales = np.zeros((per_row, rows), weights.dtype)
    zero_points = np.zeros((per_row * rows + 1) // 2, np.uint8)
    native.quantize_qdq_matmul_4bits(
        packed, weights.T.copy(), scales, zero_points, block, rows, cols, symmetric
    )
    codes = _low_nibble_first(packed)[: cols * rows].reshape(cols, rows)
    zeros = _low_nibble_first(zero_points)[: per_row * rows].reshape(per_row, rows)
    return codes.T.reshape(-1), scales.T.reshape(-1), zeros.T.reshape(-1)


def int8_blocks(weights, block=32):
    """`quantize_matmul_8bits`: the MatMulNBits form at 8 bits."""
    codes, scales, _ = _nbits(weights, block, 8, symmetric=True)
    return codes.astype(np.int16) - 128, scales


def uint8_blocks(weights, block=32):
    """The same with zero points, which it returns, too."""
    return _nbits(weights, block, 8, symmetric=False)


def _nbits(weights, block, bits, symmetric):
    """`quantize_matmul_<bits>bits`: unsigned codes, scales and zero points."""
    cols, rows = weights.T.shape
    per_row, per_byte = -(-cols // block), 8 // bits
    padded = np.ascontiguousarray(np.pad(weights.T, ((0, per_row * block - cols), (0, 0))))
    packed = np.zeros((rows, per_row, block // per_byte), np.uint8)
    scales = np.zeros((rows, per_row), weights.dtype)
    zeros = np.zeros((rows, -(-per_row // per_byte)), np.uint8)
    quantize = getattr(native, f"quantize_matmul_{bits}bits")
    quantize(packed, padded, scales, zeros, block, rows, cols, symmetric)
    codes, zeros = (
        np.stack([each >> shift & (1 << bits) - 1 for shift in range(0, 8, bits)], axis=-1)
        for each in (packed, zeros)
    )
    codes, zeros = (each.reshape(rows, -1) for each in (codes, zeros))
    return codes[:, :cols].reshape(-1), scales.reshape(-1), zeros[:, :per_row].reshape(-1)


def int2(weights, block=32):
    """`quantize_matmul_2bits`: the MatMulNBits form at 2 bits."""
    codes, scales, _ = _nbits(weights, block, 2, symmetric=True)
    return codes.astype(np.int8) - 2, scales


def uint2(weights, block=32):
    """The same with zero points, which it returns, too."""
    return _nbits(weights, block, 2, symmetric=False)


def k_quant(weights, bits, block=32):
    """`quant_tensor_k_quant_cpu` on a matrix as a model holds it; returns the zero points, too."""
    cols = weights.shape[1]
    stored = np.ascontiguousarray(weights.T)
    padded = pad_tensor(stored, block, -(-cols // block))
    with np.errstate(all="ignore"):
        codes, scales, zeros = quant_tensor_k_quant_cpu(padded.T, bits, block)
        scales = scales.astype(weights.dtype)
    return codes.reshape(len(weights), -1)[:, :cols].reshape(-1), scales[:, 0], zeros[:, 0]


def symmetric_int4(weights, block=32):
    """`quantize_data` for QInt4, block by block: absmax / 7.5."""
    blocks = [row[k : k + block] for row in weights for k in range(0, len(row), block)]
    codes, scales = _by_data(blocks, onnx.TensorProto.INT4)
    return codes.astype(np.int8), scales


def int4_matmul_nbits(weights, block=32):
    """`quantize_matmul_4bits`: the MatMulNBits form; rounds w * (1 / s) + 8 instead."""
    codes, scales, _ = _nbits(weights, block, 4, symmetric=True)
    return codes.astype(np.int8) - 8, scales


def bnb4(weights, kind, block=64):
    """`quantize_matmul_bnb4`: nf4 or fp4, flat blocks over the rows."""
    rows, cols = weights.shape
    packed = np.zeros((weights.size + 1) // 2, np.uint8)
    absmax = np.zeros(-(-weights.size // block), weights.dtype)
    native.quantize_matmul_bnb4(packed, weights.copy(), absmax, block, BNB4[kind], rows, cols)
    return _high_nibble_first(packed)[: weights.size], absmax


def public_dynamic(weights, per_channel, folder):
    """`quantize_dynamic` on a model file, QInt8, symmetric weights."""
    source, target = _saved(weights, folder)
    quantize_dynamic(
        source, target, per_channel=per_channel, weight_type=QuantType.QInt8,
        extra_options=SYMMETRIC,
    )  # fmt: skip
    return _int8_of(onnx.load(target))


def public_static(weights, per_channel, folder):
    """`quantize_static` on a model file, QDQ, QInt8, symmetric weights."""
    source, target = _saved(weights, folder)
    quantize_static(
        source, target, _OneFeed(weights), quant_format=QuantFormat.QDQ, per_channel=per_channel,
        weight_type=QuantType.QInt8, extra_options=SYMMETRIC,
    )  # fmt: skip
    return _int8_of(onnx.load(target))


def public_int4(weights, folder, block=32):
    """`MatMulNBitsQuantizer`, QDQ form, on a model file."""
    quantizer = MatMulNBitsQuantizer(
        _saved(weights, folder)[0],
        block_size=block,
        is_symmetric=True,
        quant_format=QuantFormat.QDQ,
    )
    quantizer.process()
    tensors = _initializers(quantizer.model.model)
    packed = np.frombuffer(tensors["w_DQ_Q4"].raw_data, np.uint8)
    codes = _signed(_low_nibble_first(packed)[: weights.size]).reshape(weights.T.shape)
    return codes.T.reshape(-1), nh.to_array(tensors["w_DQ_scales"]).T.reshape(-1)


def public_bnb4(weights, kind, folder, block=64):
    """`MatMulBnb4Quantizer` on a model file."""
    quantizer = MatMulBnb4Quantizer(onnx.load(_saved(weights, folder)[0]), BNB4[kind], block)
    quantizer.process()
    tensors = _initializers(quantizer.model.model)
    codes = _high_nibble_first(nh.to_array(tensors["w_Bnb4"]))[: weights.size]
    return codes, nh.to_array(tensors["w_absmax"])


def public_k_quant(weights, folder, block=32):
    """`rtn_quantize` with the algorithm k_quant on a model file; returns the zero points, too."""
    model = onnx.load(_saved(weights, folder)[0])
    tensors = _initializers(
        rtn_quantize(model, num_bits=4, group_size=block, algorithm="k_quant").model
    )
    rows, cols = weights.shape
    codes = _low_nibble_first(nh.to_array(tensors["w_Q4G32"]).reshape(-1)).reshape(rows, -1)
    scales = nh.to_array(tensors["w_scale"])
    zeros = _low_nibble_first(nh.to_array(tensors["w_zp"]).reshape(-1))[: scales.size]
    return codes[:, :cols].reshape(-1), scales.reshape(-1), zeros


def bnb4_decoded(codes, absmax, rows, cols, kind, block=64):
    """What MatMulBnb4 multiplies by: the operator run on the identity, back in row order."""
    padded = np.append(codes, np.zeros(codes.size % 2, np.uint8))
    packed = (padded[0::2] << 4 | padded[1::2]).astype(np.uint8)
    node = oh.make_node(
        "MatMulBnb4", ["x", "b", "s"], ["y"], domain="com.microsoft",
        K=cols, N=rows, block_size=block, quant_type=BNB4[kind],
    )  # fmt: skip
    weights = {"b": packed, "s": absmax.astype(np.float32)}
    session = ort.InferenceSession(_model(node, cols, rows, weights).SerializeToString())
    return session.run(None, {"x": np.eye(cols, dtype=np.float32)})[0].T.reshape(-1)


class _OneFeed(CalibrationDataReader):
    def __init__(self, weights):
        self.feeds = iter([{"x": np.ones((1, weights.shape[1]), weights.dtype)}])

    def get_next(self):
        return next(self.feeds, None)


def _saved(weights, folder):
    node = oh.make_node("MatMul", ["x", "w"], ["y"])
    model = _model(node, weights.shape[1], weights.shape[0], {"w": weights.T.copy()})
    onnx.save(model, folder / "model.onnx")
    return str(folder / "model.onnx"), str(folder / "quantized.onnx")


def _model(node, cols, rows, tensors):
    kind = oh.np_dtype_to_tensor_dtype(tensors["w"].dtype) if "w" in tensors else 1
    graph = oh.make_graph(
        [node],
        "g",
        [oh.make_tensor_value_info("x", kind, [None, cols])],
        [oh.make_tensor_value_info("y", kind, [None, rows])],
        [nh.from_array(value, name) for name, value in tensors.items()],
    )
    opsets = [oh.make_opsetid("", 21), oh.make_opsetid("com.microsoft", 1)]
    return oh.make_model(graph, opset_imports=opsets, ir_version=10)


def _initializers(model):
    return {tensor.name: tensor for tensor in model.graph.initializer}


def _int8_of(model):
    tensors = _initializers(model)
    codes = nh.to_array(tensors["w_quantized"]).T.reshape(-1)
    return codes, nh.to_array(tensors["w_scale"]).reshape(-1)


def _low_nibble_first(packed):
    return np.stack([packed & 15, packed >> 4], axis=1).reshape(-1)


def _high_nibble_first(packed):
    return np.stack([packed >> 4, packed & 15], axis=1).reshape(-1)


def _signed(nibbles):
    return ((nibbles.astype(np.int8) + 8) % 16 - 8).astype(np.int8)


ORACLES = {
    "int8-channel": lambda w: int8(w, per_channel=True),
    "int8-tensor": lambda w: int8(w, per_channel=False),
    "int8-block": int8_blocks,
    "int8-reduced": lambda w: _by_data(w, onnx.TensorProto.INT8, reduce_range=True),
    "uint8-channel": lambda w: uint8(w, per_channel=True),
    "uint8-tensor": lambda w: uint8(w, per_channel=False),
    "uint8-block": uint8_blocks,
    "uint8-127.5": lambda w: uint8(w, per_channel=True, symmetric=True),
    "uint8-reduced": lambda w: uint8(w, per_channel=False, reduce_range=True),
    "int4": int4,
    "int4-7.5": symmetric_int4,
    "int4-channel": lambda w: int4(w, w.shape[1]),
    "uint4-k_quant": lambda w: k_quant(w, 4),
    "uint4-k_quant-128": lambda w: k_quant(w, 4, 128),
    "uint8-k_quant": lambda w: k_quant(w, 8),
    "int2": int2,
    "uint2": uint2,
    "uint4": uint4,
    "uint4-channel": lambda w: uint4(w, w.shape[1]),
    "nf4": lambda w: bnb4(w, "nf4"),
    "fp4": lambda w: bnb4(w, "fp4"),
}
PUBLIC = {
    "int8-channel": lambda w, folder: public_dynamic(w, True, folder),
    "int8-tensor": lambda w, folder: public_dynamic(w, False, folder),
    "int8-channel-static": lambda w, folder: public_static(w, True, folder),
    "int8-tensor-static": lambda w, folder: public_static(w, False, folder),
    "int4": public_int4,
    "nf4": lambda w, folder: public_bnb4(w, "nf4", folder),
    "fp4": lambda w, folder: public_bnb4(w, "fp4", folder),
}
