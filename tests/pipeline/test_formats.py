"""Every format is written in every form, and decodes to what its codes stand for."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto
from onnx.reference import ReferenceEvaluator

import flipguard_onnx
from flipguard_onnx.detection.requirements import inspect_for
from flipguard_onnx.errors import UnsupportedModelError, ValidationError
from tests.helpers import naive
from tests.helpers.forms import CHOICES, MORE
from tests.helpers.samples import SAMPLES, F, model, node, save, weights

FORMATS = {
    "int8 g32": {"granularity": "block"},
    "int8 g64 /127": {"granularity": "block", "block_size": 64, "scale": 127.0},
    "int8 channel 7 bits": {"reduce_range": True},
    "uint8 channel": {"scheme": "uint8"},
    "uint8 tensor": {"scheme": "uint8", "granularity": "tensor"},
    "uint8 g32": {"scheme": "uint8", "granularity": "block"},
    "int4 channel": {"scheme": "int4", "granularity": "channel"},
    "int4 /7": {"scheme": "int4", "scale": 7.0},
    "uint4": {"scheme": "uint4"},
    "uint4 g16": {"scheme": "uint4", "block_size": 16},
    "uint4 k_quant": {"scheme": "uint4", "scale": "k_quant"},
    "uint8 g32 k_quant": {"scheme": "uint8", "granularity": "block", "scale": "k_quant"},
    "uint4 channel": {"scheme": "uint4", "granularity": "channel"},
    "int2": {"scheme": "int2", "policy": "none"},  # drawn, random weights would get int8
    "int2 channel": {"scheme": "int2", "granularity": "channel", "policy": "none"},
    "uint2": {"scheme": "uint2", "policy": "none"},
    "uint2 g16": {"scheme": "uint2", "block_size": 16, "policy": "none"},
    "fp8 channel": {"scheme": "fp8"},
    "fp8 tensor": {"scheme": "fp8", "granularity": "tensor"},
    "mxfp4": {"scheme": "mxfp4"},
    "mxfp4 /6": {"scheme": "mxfp4", "scale": 6.0},
    "nvfp4": {"scheme": "nvfp4"},
}
CHOSEN = (
    "matmul",
    "matmul_float16",
    "matmul_batched",
    "gemm_transposed",
    "conv",
    "gather_ragged",
    "lstm",
    "tied_embedding",
)
INT8 = "int8 channel"  # of weights that have no kernel at 4 bits or in blocks


@pytest.mark.parametrize("target", ["portable", "onnxruntime"])
@pytest.mark.parametrize("sample", CHOSEN)
@pytest.mark.parametrize("grid", FORMATS)
def test_files_hold_what_the_codes_stand_for(tmp_path, grid, sample, target):
    """The validation compares the file with the float graph and decoded weights, or refuses."""
    source, output = save(SAMPLES[sample](), tmp_path), tmp_path / "out.onnx"
    options = {"target": target, "output": output, "seed": 1} | FORMATS[grid]
    report = flipguard_onnx.guard(source, **options)
    assert {tensor.grid for tensor in report.tensors} <= {grid, INT8}
    assert report.grid == grid
    if not sample.startswith(("conv", "gather", "lstm")):
        assert any(tensor.grid == grid for tensor in report.tensors)
    limit = 0.6 if "int2" in grid else 0.3
    assert all(0 < drift.relative_l2 < limit for drift in report.validation.guarded_exact)
    verified = flipguard_onnx.verify(source, output)
    assert (verified.scheme, verified.made_from) == (report.scheme, True)


@pytest.mark.parametrize("options", [{}, {"scheme": "uint8"}], ids=["int8", "uint8"])
@pytest.mark.parametrize("behind", ["Reshape", "Transpose"])
def test_an_embedding_is_right_in_a_session_with_default_options(tmp_path, behind, options):
    """onnxruntime moves the DequantizeLinear behind a Reshape, and would take int8 for uint8."""
    attributes = {"perm": [1, 0]} if behind == "Transpose" else {}
    shape = [] if attributes else ["s"]
    nodes = [node("Gather", "w i", "e"), node(behind, " ".join(["e", *shape]), "r", **attributes)]
    nodes.append(node("MatMul", "r v", "y"))
    width = 6 if attributes else 32
    constants = {"w": weights((40, 32)), "v": weights((width, 8)), "s": np.array([-1, 32])}
    inputs, outputs = {"i": (TensorProto.INT64, [6])}, {"y": (F, [None, 8])}
    source = save(model(nodes, inputs, outputs, constants), tmp_path)
    output = tmp_path / "out.onnx"
    flipguard_onnx.guard(source, granularity="tensor", output=output, seed=1, **options)
    feed = {"i": np.array([3, 0, 39, 7, 7, 21])}
    found, wanted = (
        onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, feed)[0]
        for path in (output, source)
    )
    assert np.linalg.norm(found - wanted) < 0.05 * np.linalg.norm(wanted)


def ternary(sizes=(96, 160)):
    """Weights of a network that was trained for the values -1, 0 and 1, and some noise."""
    rng = np.random.default_rng(0)
    values = rng.integers(-1, 2, sizes) + 0.004 * rng.standard_normal(sizes)
    shapes = {"x": (F, ["n", sizes[0]])}, {"y": (F, ["n", sizes[1]])}
    return model([node("MatMul", "x w", "y")], *shapes, {"w": 0.05 * values.astype(np.float32)})


@pytest.mark.parametrize("target", ["portable", "onnxruntime"])
@pytest.mark.parametrize("scheme", ["int2", "uint2"])
def test_2_bits_are_kept_where_they_carry_the_weights_and_only_there(tmp_path, scheme, target):
    options = {"target": target, "output": tmp_path / "out.onnx", "seed": 1, "force": True}
    report = flipguard_onnx.guard(save(ternary(), tmp_path), scheme, max_drift=9, **options)
    assert report.tensors[0].grid == scheme
    assert report.tensors[0].product_error < 0.25
    assert report.validation.guarded_exact[0].relative_l2 < 0.25
    report = flipguard_onnx.guard(save(SAMPLES["matmul"](), tmp_path), scheme, **options)
    assert report.tensors[0].grid == INT8
    assert "products would be off" in report.render()
    assert report.validation.guarded_exact[0].relative_l2 < 0.05
    with pytest.raises(ValidationError, match="products would be off"):
        flipguard_onnx.guard(save(SAMPLES["matmul"](), tmp_path), scheme, emit="float", **options)


def test_zero_points_are_written_in_the_type_of_the_codes(tmp_path):
    types = {}
    for scheme in ("uint8", "uint4", "uint2", "int8"):
        source, output = save(SAMPLES["matmul"](), tmp_path), tmp_path / f"{scheme}.onnx"
        flipguard_onnx.guard(source, scheme, policy="none", output=output)
        graph = onnx.load(output).graph
        (decoder,) = (n for n in graph.node if n.op_type == "DequantizeLinear")
        by_name = {tensor.name: tensor.data_type for tensor in graph.initializer}
        types[scheme] = by_name[decoder.input[0]], by_name[decoder.input[2]]
    assert types == {
        "uint8": (TensorProto.UINT8,) * 2,
        "uint4": (TensorProto.UINT4,) * 2,
        "uint2": (TensorProto.UINT2,) * 2,
        "int8": (TensorProto.INT8,) * 2,
    }


@pytest.mark.parametrize("form", ["mxfp4", "mxfp4-6", "nvfp4"])
def test_files_with_4_bit_floats_mean_the_same_to_onnx(tmp_path, form):
    """The published form, which onnxruntime does not run, and the floats, quantized again."""
    source, output = save(SAMPLES["matmul"](), tmp_path), tmp_path / "out.onnx"
    choice, options = (CHOICES | MORE)[form], {"emit": "both", "output": output, "seed": 1}
    report = flipguard_onnx.guard(source, choice.name, scale=choice.divisor, **options)
    onnx.checker.check_model(output, full_check=True)
    types = {tensor.data_type for tensor in onnx.load(output).graph.initializer}
    assert TensorProto.FLOAT4E2M1 in types
    with pytest.raises(Exception, match="DequantizeLinear"):
        onnxruntime.InferenceSession(output, providers=["CPUExecutionProvider"])
    (moved,) = onnx.load(tmp_path / "out-float.onnx").graph.initializer
    values = onnx.numpy_helper.to_array(moved)
    columns = [b.decoded for b in naive.quantize(form, values.T, choice.filled.block_size)]
    wanted = np.concatenate(columns).reshape(values.T.shape).T
    rows = values.shape[0]
    (found,) = ReferenceEvaluator(str(output)).run(None, {"x": np.eye(rows, dtype=np.float32)})
    np.testing.assert_array_equal(found.reshape(rows, -1), wanted)
    assert "onnxruntime has no kernel" in report.render()
    assert "validated with their values as float32" in report.render()


@pytest.mark.parametrize("scheme", ["fp8", "mxfp4", "nvfp4"])
def test_small_floats_are_known_as_quantized(tmp_path, scheme):
    source, output = save(SAMPLES["matmul"](), tmp_path), tmp_path / "out.onnx"
    flipguard_onnx.guard(source, scheme, output=output)
    with pytest.raises(UnsupportedModelError, match="already quantized"):
        flipguard_onnx.guard(output, output=tmp_path / "again.onnx")
    assert flipguard_onnx.scan(output).verdict.level == "not judged"
    found = inspect_for(output, "tensorrt")
    assert [finding.tensors for finding in found.findings][:1] == [("w_quantized",)]
    assert found.findings[0].requirement.startswith("integers")
    assert onnx.load(output).ir_version >= {"fp8": 9, "mxfp4": 11, "nvfp4": 11}[scheme]
