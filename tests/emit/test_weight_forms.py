"""4 bits in memory, too, where that saves enough; elsewhere unpacked when the file is loaded."""

import onnx
import onnxruntime
import pytest

import flipguard_onnx
from tests.helpers.samples import matmul, save

PACKED_FORMS = {"int4": "dequantize", "nf4": "bnb4"}


@pytest.mark.parametrize(
    ("scheme", "kernel"), [("int4", "DequantizeLinear"), ("nf4", "MatMulBnb4")]
)
@pytest.mark.parametrize("rows", [1023, 1024, 1030])  # the last is no whole number of blocks
def test_large_matrices_stay_packed(tmp_path, scheme, kernel, rows):
    path = tmp_path / "out.onnx"
    report = flipguard_onnx.guard(
        save(matmul((rows, 1024)), tmp_path),
        scheme,
        target="onnxruntime",
        seed=1,
        preserve="off",
        output=path,
    )
    packed = rows >= 1024
    assert (kernel in {n.op_type for n in onnx.load(path).graph.node}) is packed
    assert ("speed" in report.render()) is packed
    assert report.tensors[0].forms == (PACKED_FORMS[scheme] if packed else "folded",)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    (run,) = onnx.load(tmp_path / "optimized.onnx").graph.node
    assert (run.op_type == "MatMul") is not packed


def test_what_is_not_packed_is_not_called_slow(tmp_path):
    source = save(matmul((1024, 1024)), tmp_path)
    options = {"seed": 1, "preserve": "off", "output": tmp_path / "out.onnx", "force": True}
    portable = flipguard_onnx.guard(source, "nf4", **options)
    assert portable.tensors[0].forms == ("folded",)
    moved = flipguard_onnx.guard(source, "nf4", emit="float", **options)
    assert moved.tensors[0].forms == ()
    assert "speed" not in portable.render() + moved.render()


def test_what_onnxruntime_decodes_again_at_every_inference_is_said(tmp_path):
    source = save(matmul((256, 64)), tmp_path)
    options = {"seed": 1, "preserve": "off", "output": tmp_path / "out.onnx", "force": True}
    assert "session.disable_quant_qdq" in flipguard_onnx.guard(source, **options).render()
    folded = flipguard_onnx.guard(source, target="onnxruntime", **options)
    assert "speed" not in folded.render()
