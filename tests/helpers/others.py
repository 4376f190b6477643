"""onnxruntime's quantizers with the arguments of Olive, optimum and transformers.js.

Each takes a float model's path, and returns the codes of every weight by name.
"""

import ml_dtypes
import numpy as np
import onnx
from onnx import numpy_helper
from onnxruntime.quantization import QuantType
from onnxruntime.quantization.matmul_bnb4_quantizer import MatMulBnb4Quantizer
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
from onnxruntime.quantization.onnx_quantizer import ONNXQuantizer
from onnxruntime.quantization.quant_utils import QuantizationMode
from onnxruntime.quantization.registry import IntegerOpsRegistry


def eight_bits(path, kind, per_channel=False, reduce_range=False, **extra):
    """As optimum's ORTQuantizer and transformers.js's quantize.py do."""
    quantizer = ONNXQuantizer(
        onnx.load(path),
        per_channel,
        reduce_range,
        QuantizationMode.IntegerOps,
        static=False,
        weight_qType=kind,
        activation_qType=QuantType.QUInt8,
        tensors_range=None,
        nodes_to_quantize=[],
        nodes_to_exclude=[],
        op_types_to_quantize=list(IntegerOpsRegistry),
        extra_options=extra,
    )
    quantizer.quantize_model()
    return drawn(quantizer.model.model)


def nbits(path, bits=4, block=128, symmetric=True):
    """As Olive's OnnxBlockWiseRtnQuantization and transformers.js's quantize.py do."""
    quantizer = MatMulNBitsQuantizer(str(path), bits=bits, block_size=block, is_symmetric=symmetric)
    quantizer.process()
    graph = quantizer.model.model.graph
    tensors, found = {t.name: t for t in graph.initializer}, {}
    for node in graph.node:
        if node.op_type == "MatMulNBits":
            about = {a.name: a.i for a in node.attribute}
            packed = numpy_helper.to_array(tensors[node.input[1]])
            if bits == 4:
                packed = np.stack([packed & 15, packed >> 4], axis=-1)
            codes = packed.reshape(about["N"], -1)[:, : about["K"]].T.astype(np.int16)
            name = node.input[1].removesuffix(f"_Q{bits}")
            found[name] = codes - (symmetric << (bits - 1))
    return found


def bnb4(path):
    """As Olive's OnnxBnb4Quantization and transformers.js's quantize.py do."""
    quantizer = MatMulBnb4Quantizer(onnx.load(path), MatMulBnb4Quantizer.NF4, 64)
    quantizer.process()
    graph = quantizer.model.model.graph
    tensors, found = {t.name: t for t in graph.initializer}, {}
    for node in graph.node:
        if node.op_type == "MatMulBnb4":
            packed = numpy_helper.to_array(tensors[node.input[1]])
            codes = np.stack([packed >> 4, packed & 15], axis=-1).reshape(-1, 64)  # a block a row
            found[node.input[1].removesuffix("_Bnb4")] = codes.astype(np.int16)
    return found


def drawn(proto):
    """Name of each quantized weight -> its codes, laid out as in the file."""
    found = {}
    for tensor in proto.graph.initializer:
        if tensor.name.endswith("_quantized"):
            codes = numpy_helper.to_array(tensor)
            if codes.dtype in (ml_dtypes.int4, ml_dtypes.uint4):
                codes = codes.astype(np.int8)
            found[tensor.name.removesuffix("_quantized")] = codes.astype(np.int16)
    return found
