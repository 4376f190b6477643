"""A stored model as quantization leaves it: by codes, drawn, by GPTQ, by onnxruntime. No torch."""

import tempfile
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnxruntime.quantization.matmul_bnb4_quantizer import MatMulBnb4Quantizer
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
from onnxruntime.quantization.quantize import QuantFormat, QuantType, quantize_dynamic

from flipguard_onnx import guard
from flipguard_onnx.calibration.moments import record
from flipguard_onnx.calibration.samples import Samples
from flipguard_onnx.graph.weights import find_weights
from flipguard_onnx.io.model import open_model
from tools.attacks.quantizers import SCHEMES

NEAREST = 1e-6  # a tau this small leaves no weight to chance
MOST = 1 << 30  # bytes for the statistics of inputs


def weight_layouts(model):
    """Initializer name -> layout of every quantized weight.

    `rows`, `transposed`, or the kinds that stay at 8 bits: `convolution` and `embedding`.
    """
    known = {t.name for t in model.graph.initializer}
    found = {}
    for node in model.graph.node:
        if node.op_type == "MatMul" and node.input[1] in known:
            found[node.input[1]] = "transposed"
        elif node.op_type == "Gemm" and node.input[1] in known:
            trans = {a.name: a.i for a in node.attribute}.get("transB", 0)
            found[node.input[1]] = "rows" if trans else "transposed"
        elif node.op_type == "Conv" and node.input[1] in known:
            found[node.input[1]] = "convolution"
        elif node.op_type == "Gather" and node.input[0] in known:
            found[node.input[0]] = "embedding"
    return found


def quantized(model, scheme):
    """The model with every weight replaced by what its codes stand for.

    Conv and Gather have 8 bits under the 4-bit schemes, as the tool gives them.
    """
    return _with_rows(model, scheme, lambda rows, chosen: chosen.quantize(rows))


def drawn(model, scheme, seed):
    """The model with every weight rounded at random, without bias, to a neighbouring level."""
    rng = np.random.default_rng(seed)

    def draw(rows, chosen):
        groups = chosen.group(rows)
        scale = chosen.scale(groups)
        x = np.clip(
            np.divide(groups, scale, where=scale != 0, out=np.zeros_like(groups)),
            chosen.levels[0],
            chosen.levels[-1],
        )
        below = np.clip(np.searchsorted(chosen.levels, x, "right") - 1, 0, len(chosen.levels) - 2)
        low, high = chosen.levels[below], chosen.levels[below + 1]
        level = np.where(rng.random(x.shape) * (high - low) < x - low, high, low)
        return chosen.ungroup(level * scale, rows.shape)

    return _with_rows(model, scheme, draw)


def gptq(model, scheme, samples):
    """What error feedback on these samples, rounded to nearest, makes of the model."""
    with tempfile.TemporaryDirectory() as folder:
        data, done = as_data(samples, model, Path(folder)), Path(folder) / "done.onnx"
        guard(model, scheme, tau=NEAREST, preserve="data", data=data, output=done, validate=False)
        return onnx.load(done)


def input_moments(model, samples=None):
    """What every matrix of the model is multiplied with, as guard() records it, in graph order.

    samples: as `as_data` takes them; None: inputs that guard() makes up.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        onnx.save(model, folder / "victim.onnx")
        source = open_model(folder / "victim.onnx")
        data = None if samples is None else as_data(samples, model, folder)
        found = [weight for weight in find_weights(source.proto)[0] if weight.op != "Gather"]
        kind = "synthetic" if data is None else "data"
        recorded = record(
            Samples(source, data), found, folder / "probe", MOST, kind, optional=False
        )
        return [recorded.of(weight) for weight in found]


def as_data(samples, model, folder):
    """Inputs of a model as guard() takes them: an .npz file."""
    path = folder / "samples.npz"
    np.savez(path, **{model.graph.input[0].name: samples})
    return path


def _with_rows(model, scheme, change):
    model = in_float32(model)
    layouts = weight_layouts(model)
    for tensor in model.graph.initializer:
        layout = layouts.get(tensor.name)
        if layout is None:
            continue
        value = numpy_helper.to_array(tensor)
        rows = value.T if layout == "transposed" else value.reshape(value.shape[0], -1)
        wide = layout in ("convolution", "embedding") and SCHEMES[scheme].bits == 4
        rows = change(rows, SCHEMES["int8" if wide else scheme])
        value = rows.T if layout == "transposed" else rows.reshape(value.shape)
        value = np.ascontiguousarray(value, np.float32)
        tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    return model


def in_float32(model):
    """A copy whose initializers behind a Cast are float32, without the Cast."""
    model = onnx.ModelProto.FromString(model.SerializeToString())
    stored = {t.name: t for t in model.graph.initializer}
    for node in list(model.graph.node):
        if node.op_type == "Cast" and node.input[0] in stored:
            tensor = stored[node.input[0]]
            value = numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(value, node.output[0]))
            model.graph.node.remove(node)
    return model


DYNAMIC = {
    "int8": {"weight_type": QuantType.QInt8, "per_channel": True},
    "int8_tensor": {"weight_type": QuantType.QInt8},
    "uint8_tensor": {
        "weight_type": QuantType.QUInt8,
        "extra_options": {"WeightSymmetric": False},
    },
}
BLOCKWISE = {
    "int4": {"block_size": 32, "is_symmetric": True, "quant_format": QuantFormat.QDQ},
    "int4_g128": {"block_size": 128, "is_symmetric": True, "quant_format": QuantFormat.QDQ},
    "uint4_g128": {"block_size": 128, "is_symmetric": False, "quant_format": QuantFormat.QDQ},
    "int8_g32": {"block_size": 32, "is_symmetric": True, "bits": 8},
}
BNB4 = {"fp4": 0, "nf4": 1}


def onnxruntime_quantized(model, scheme):
    """The file that onnxruntime's own quantizer makes (in blocks it reads only MatMul).

    None of mxfp4 and nvfp4, which it has no quantizers for.
    """
    model = _gemm_as_matmul(in_float32(model))
    if scheme in DYNAMIC:
        with tempfile.TemporaryDirectory() as folder:
            plain, done = Path(folder) / "plain.onnx", Path(folder) / "done.onnx"
            onnx.save(model, plain)
            kinds = ["MatMul", "Conv"]
            quantize_dynamic(plain, done, op_types_to_quantize=kinds, **DYNAMIC[scheme])
            return onnx.load(done)
    if scheme in BLOCKWISE:
        worker = MatMulNBitsQuantizer(model, **BLOCKWISE[scheme])
    elif scheme in BNB4:
        worker = MatMulBnb4Quantizer(model, quant_type=BNB4[scheme], block_size=64)
    else:
        return None
    worker.process()
    return worker.model.model


def _gemm_as_matmul(model):
    """Rewrite `Gemm` with transB=1 as `MatMul` and `Add`."""
    turned, nodes = set(), []
    for node in model.graph.node:
        if node.op_type != "Gemm":
            nodes.append(node)
            continue
        x, weight, bias = node.input
        turned.add(weight)
        nodes.append(
            helper.make_node(
                "MatMul", [x, weight], [f"{node.name}.product"], name=f"{node.name}.product"
            )
        )
        nodes.append(
            helper.make_node("Add", [f"{node.name}.product", bias], node.output, name=node.name)
        )
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    for tensor in model.graph.initializer:
        if tensor.name in turned:
            value = np.ascontiguousarray(numpy_helper.to_array(tensor).T)
            tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    return model
