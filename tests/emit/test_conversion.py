"""Graphs of older opsets, which onnx's converter brings to the one that a scheme needs."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper

from flipguard_onnx import UnsupportedModelError, guard
from tests.helpers.samples import F, model, node, save, weights

X = np.random.default_rng(6).standard_normal((4, 32)).astype(np.float32)

# onnxruntime has these among the standard operators; onnx never, or from a later opset on.
ADDED = {
    "SimplifiedLayerNormalization": (14, "x scale"),
    "LayerNormalization": (12, "x scale zero"),
}


def drift(source, output, feed):
    wanted, found = (onnxruntime.InferenceSession(p).run(None, feed)[0] for p in (source, output))
    return np.linalg.norm(wanted - found) / np.linalg.norm(wanted)


def normalized(operator, dtype=np.float32):
    opset, inputs = ADDED[operator]
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    constants = {"w": weights((32, 48)), "scale": np.linspace(0.5, 2, 32), "zero": np.zeros(32)}
    return model(
        [node(operator, inputs, "h", axis=-1, epsilon=1e-5), node("MatMul", "h w", "y")],
        {"x": (kind, ["b", 32])},
        {"y": (kind, ["b", 48])},
        {name: array.astype(dtype) for name, array in constants.items()},
        opset=opset,
    )


@pytest.mark.parametrize("options", [{}, {"target": "onnxruntime"}], ids=["portable", "ort"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("operator", ADDED)
def test_operators_that_onnxruntime_adds_to_the_standard_ones(tmp_path, operator, dtype, options):
    source, output = save(normalized(operator, dtype), tmp_path), tmp_path / "out.onnx"
    guard(source, scheme="int4", output=output, seed=1, **options)
    written = onnx.load(output)
    (kept,) = (each for each in written.graph.node if each.op_type == operator)
    assert kept.domain == ""
    assert [o.domain for o in written.opset_import if o.domain.startswith("flipguard")] == []
    assert 0 < drift(source, output, {"x": X.astype(dtype)}) < 0.2


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_constants_that_are_no_inputs_in_ir_version_3(tmp_path, scheme):
    proto = model(
        [node("Gemm", "x w b", "y")],
        {"x": (F, ["n", 32])},
        {"y": (F, ["n", 48])},
        {"w": weights((32, 48)), "b": weights((48,), 1)},
        opset=8,
        ir_version=3,
    )
    source, output = save(proto, tmp_path), tmp_path / "out.onnx"
    guard(source, scheme=scheme, output=output, seed=1)
    assert [value.name for value in onnx.load(output).graph.input] == ["x"]
    assert 0 < drift(source, output, {"x": X}) < 0.2


def test_what_cannot_be_converted_is_refused_with_advice_that_works(tmp_path):
    """A Scan of opset 8 goes over batches, and the converter leaves it as it is."""
    body = helper.make_graph(
        [node("MatMul", "s w", "m"), node("Add", "m i", "s2"), node("Identity", "s2", "o")],
        "body",
        [helper.make_tensor_value_info(name, F, [1, 24]) for name in "si"],
        [helper.make_tensor_value_info(name, F, [1, 24]) for name in ("s2", "o")],
    )
    scan = helper.make_node("Scan", ["", "s0", "x"], ["last", "y"], body=body, num_scan_inputs=1)
    proto = model(
        [scan],
        {"s0": (F, [2, 1, 24]), "x": (F, [2, 5, 1, 24])},
        {"last": (F, [2, 1, 24]), "y": (F, [2, 5, 1, 24])},
        {"w": 0.1 * weights((24, 24))},
        opset=8,
    )
    source, output = save(proto, tmp_path), tmp_path / "out.onnx"
    with pytest.raises(UnsupportedModelError, match="a Scan of before opset 9 ") as refusal:
        guard(source, output=output)
    assert str(refusal.value).endswith("; --target onnxruntime needs no conversion")
    report = guard(source, output=output, target="onnxruntime")
    assert report.coverage == 1
    with pytest.raises(UnsupportedModelError, match=r"no later one does$"):  # it needs one as well
        guard(source, "nf4", output=output, force=True, target="onnxruntime")
