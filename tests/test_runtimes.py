"""What we write computes the same in other runtimes: onnx's reference evaluator and OpenVINO.

`python -m tools.runtimes` tries real models, and more runtimes.
"""

from functools import cache

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx.reference import ReferenceEvaluator
from onnx.version_converter import convert_version

import flipguard_onnx
from flipguard_onnx.calibration.samples import Samples
from flipguard_onnx.io.model import open_model
from tests.helpers.samples import SAMPLES, F, model, node, save, weights

INDICES = onnx.TensorProto.INT64
OPSET = 21  # the reference evaluator has no DequantizeLinear below 19
CHOSEN = (
    "matmul",
    "gemm_transposed",
    "conv",
    "conv_transpose",
    "gather",
    "gather_ragged",
    "lstm",
    "nested",
    "tied_embedding",
)


def two_ways():
    """One weight whose inputs and outputs change places, read by rows, and by columns."""
    nodes = [
        node("Gemm", "x w", "z", transB=1),
        node("Gemm", "z w", "y"),
        node("Gather", "w i", "r", axis=0),
        node("Gather", "w i", "c", axis=1),
    ]
    inputs = {"x": (F, [2, 128]), "i": (INDICES, [3])}
    outputs = {"y": (F, [2, 128]), "r": (F, [3, 128]), "c": (F, [64, 3])}
    return model(nodes, inputs, outputs, {"w": weights((64, 128))})


def columns():
    """Embeddings along the second axis, which then has the scales."""
    nodes = [node("Gather", "e i", "y", axis=1)]
    return model(nodes, {"i": (INDICES, [3])}, {"y": (F, [20, 3])}, {"e": weights((20, 40))})


def tied_columns():
    """The same, and a MatMul reads them as well: int4."""
    nodes = [node("Gather", "w i", "c", axis=1), node("MatMul", "x w", "y")]
    inputs = {"x": (F, [2, 64]), "i": (INDICES, [3])}
    outputs = {"c": (F, [64, 3]), "y": (F, [2, 40])}
    return model(nodes, inputs, outputs, {"w": weights((64, 40))})


def four_axes():
    nodes = [node("MatMul", "x w", "y")]
    constants = {"w": weights((1, 1, 40, 20))}
    return model(nodes, {"x": (F, [1, 1, 2, 40])}, {"y": (F, [1, 1, 2, 20])}, constants)


MODELS = {name: SAMPLES[name] for name in CHOSEN} | {
    "two ways": two_ways,
    "columns": columns,
    "tied columns": tied_columns,
    "four axes": four_axes,
}
FORMS = {
    "int8": {},
    "int8 per tensor": {"granularity": "tensor"},
    "int8 in blocks": {"granularity": "block"},
    "uint8": {"scheme": "uint8"},
    "int4": {"scheme": "int4"},
    "int4 per channel": {"scheme": "int4", "granularity": "channel"},
    "uint4": {"scheme": "uint4"},
    "nf4": {"scheme": "nf4"},
}


def reference(path, feed):
    return ReferenceEvaluator(str(path)).run(None, feed)


def openvino(path, feed):
    """Computing in float32, without quantizing activations."""
    core = pytest.importorskip("openvino").Core()
    settings = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
    model = core.compile_model(core.read_model(path), "CPU", settings)
    outputs = model(feed)
    return [outputs[index] for index in range(len(model.outputs))]


def exact(path, feed):
    """onnxruntime without optimizations, some of which quantize activations."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(path, options, ["CPUExecutionProvider"])
    return session.run(None, feed)


def far(outputs, wanted):
    """Whether outputs differ by more than the order of summation explains."""
    return any(
        np.linalg.norm(own - other) > 1e-5 * np.linalg.norm(other)
        for own, other in zip(outputs, wanted, strict=True)
    )


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """By sample and form: path, inputs and what onnxruntime computes; each written once."""

    @cache
    def write(sample, form):
        folder = tmp_path_factory.mktemp("written")
        source = save(convert_version(MODELS[sample](), OPSET), folder)
        path = folder / "out.onnx"
        options = {"seed": 1, "preserve": "off", "validate": False} | FORMS[form]
        flipguard_onnx.guard(source, output=path, **options)
        feed = Samples(open_model(source), None).require().feeds[0]
        wanted = exact(path, feed)
        assert far(wanted, exact(source, feed))  # or else nothing was quantized
        return path, feed, wanted

    return write


@pytest.mark.parametrize("sample", MODELS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("run", [reference, openvino])
def test_portable_files(written, run, form, sample):
    path, feed, wanted = written(sample, form)
    assert not far(run(path, feed), wanted)


@pytest.mark.parametrize(("op", "gates"), [("GRU", 3), ("LSTM", 4), ("RNN", 1)])
@pytest.mark.parametrize("run", [exact, openvino])
def test_recurrent_weights_beside_integer_activations(run, op, gates, tmp_path):
    """OpenVINO wants constants there, and else keeps codes as they are beside integers."""
    nodes = [node("MatMul", "x p", "h"), node(op, "h w r", "y", hidden_size=32)]
    shapes = {"p": (64, 64), "w": (1, gates * 32, 64), "r": (1, gates * 32, 32)}
    constants = {name: 4 * weights(shape, i) for i, (name, shape) in enumerate(shapes.items())}
    inputs, outputs = {"x": (F, [10, 1, 64])}, {"y": (F, [10, 1, 1, 32])}
    source = save(model(nodes, inputs, outputs, constants), tmp_path)
    path = tmp_path / "out.onnx"
    options = {"activations": "uint8", "preserve": "off", "validate": False}
    flipguard_onnx.guard(source, output=path, **options)
    feed = {"x": np.random.default_rng(0).standard_normal((10, 1, 64)).astype(np.float32)}
    (found,), (wanted,) = run(path, feed), exact(source, feed)
    assert 0 < np.linalg.norm(found - wanted) < 0.1 * np.linalg.norm(wanted)
