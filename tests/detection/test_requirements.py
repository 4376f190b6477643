"""What other runtimes ask of a quantized file."""

import hashlib
import json

import numpy as np
import onnx
import pytest
from ml_dtypes import int4
from onnx import numpy_helper

import flipguard_onnx
from flipguard_onnx.detection.requirements import REQUIREMENTS, inspect_for
from tests.helpers.command import call, one_line
from tests.helpers.samples import SAMPLES, F, conv, gather, matmul, model, node, save

BLOCKS = "4 bits in blocks of 64 or 128"
DEQUANTIZED = "DequantizeLinear reads the codes"
DIRECTLY = "DequantizeLinear directly before Conv, ConvTranspose, Gemm or MatMul"
INTEGERS = "integer activations, too"
OFFSET = "no zero points but 0"
POSITIVE = "constant scales above 0"
SIGNED = "signed codes"
STANDARD = "operators of the ONNX standard"
FLOATS = "weights of MatMul and Gemm, or integer activations, too: others become floats"


def written(proto, folder, scheme="int8", **options):
    output = folder / "out.onnx"
    source = save(proto, folder)
    options = {"seed": 1, "preserve": "off", "validate": False, "force": True} | options
    flipguard_onnx.guard(source, scheme, output=output, **options)
    return output


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def unmet(path, target):
    return {f.requirement: f.tensors for f in inspect_for(path, target).findings}


def dequantized(codes, scale=1.0, zero_point=None, **attributes):
    """Codes "c" [inputs, outputs] behind a DequantizeLinear, multiplied with the input."""
    initializers = {"c": codes, "s": np.float32(scale), "z": zero_point}
    initializers = {name: v for name, v in initializers.items() if v is not None}
    nodes = [node("DequantizeLinear", " ".join(initializers), "w", **attributes)]
    nodes.append(node("MatMul", "x w", "y"))
    rows, columns = codes.shape
    return model(nodes, {"x": (F, [2, rows])}, {"y": (F, [2, columns])}, initializers, opset=21)


def ones(dtype, *shape):
    return np.ones(shape, dtype)


def test_int8_meets_all_but_what_only_integer_activations_do(tmp_path):
    path = written(conv(), tmp_path)
    assert unmet(path, "tensorrt") == {}
    assert unmet(path, "openvino") == {FLOATS: ("w_quantized",)}
    assert unmet(path, "qnn") == {INTEGERS: ("w_quantized",)}
    result = call("inspect", path, "--target", "tensorrt")
    assert result.exit_code == 0
    assert "tensorrt: 1 quantized tensor; as far as the file shows it, all meet" in result.stdout


def test_integer_activations_are_what_qnn_asks_for(tmp_path):
    path = written(conv(), tmp_path, activations="int8", symmetric=True)
    for target in REQUIREMENTS:
        assert unmet(path, target) == {}


def test_an_activation_with_an_offset_is_named(tmp_path):
    path = written(conv(), tmp_path, activations="uint8")
    found = unmet(path, "tensorrt")
    assert "x" in found[SIGNED]
    assert "x" in found[OFFSET]
    assert unmet(path, "qnn") == {}


@pytest.mark.parametrize(("size", "fits"), [(32, False), (64, True), (128, True), (256, False)])
def test_blocks(tmp_path, size, fits):
    path = written(matmul((256, 32)), tmp_path, "int4", block_size=size)
    assert (BLOCKS not in unmet(path, "tensorrt")) == fits
    assert "no blocks" in unmet(path, "qnn")
    assert unmet(path, "openvino") == {}


def test_int4_has_negative_scales(tmp_path):
    """As soon as the extreme of a block is above 0 in some and below 0 in others."""
    found = unmet(written(matmul((256, 32)), tmp_path, "int4"), "tensorrt")
    assert found[POSITIVE] == ("w_quantized",)


def test_operators_of_onnxruntime_are_not_of_the_standard(tmp_path):
    path = written(matmul((2048, 1024)), tmp_path, "nf4", target="onnxruntime")
    for target in REQUIREMENTS:
        assert any(STANDARD in requirement for requirement in unmet(path, target))


def test_what_openvino_does_not_keep_as_integers(tmp_path):
    path = written(SAMPLES["tied_embedding"](), tmp_path, "int4")
    assert unmet(path, "openvino") == {}
    path = written(matmul((256, 32)), tmp_path, "nf4")
    assert [text[:11] for text in unmet(path, "openvino")] == ["no codebook"]


def test_codes_that_are_gathered_are_not_dequantized_first(tmp_path):
    path = written(gather(), tmp_path)
    assert unmet(path, "tensorrt") == {DEQUANTIZED: ("w_quantized",)}


@pytest.mark.parametrize(
    ("proto", "broken"),
    [
        (dequantized(ones(np.int8, 128, 4)), []),
        (dequantized(ones(np.uint8, 128, 4)), [SIGNED]),
        (dequantized(ones(np.int8, 128, 4), 0.0), [POSITIVE]),
        (dequantized(ones(np.int8, 128, 4), zero_point=ones(np.int8)), [OFFSET]),
        (dequantized(ones(int4, 128, 4), np.ones((2, 4)), axis=0, block_size=64), []),
        (
            dequantized(
                ones(int4, 128, 4),
                np.ones((2, 4)),
                np.zeros((2, 4), int4),
                axis=0,
                block_size=64,
            ),
            [],
        ),
        (
            dequantized(
                ones(int4, 128, 999),  # so many that they are not kept in the protobuf
                np.ones((2, 999)),
                ones(int4, 2, 999),
                axis=0,
                block_size=64,
            ),
            [OFFSET],
        ),
    ],
)
def test_files_that_others_wrote(tmp_path, proto, broken):
    onnx.checker.check_model(proto)
    assert list(unmet(save(proto, tmp_path), "tensorrt")) == broken


@pytest.mark.parametrize("target", REQUIREMENTS)
def test_files_that_nobody_should_have_written(tmp_path, target):
    """Nothing in them ends the look at them."""
    proto = dequantized(ones(np.int8, 4, 4), axis=9, block_size=64)
    proto.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.int8(1), "c"))
    assert inspect_for(save(proto, tmp_path), target).tensors == 1
    proto = dequantized(ones(np.int8, 4, 4), axis=[1], block_size="many")
    proto.graph.initializer[1].CopyFrom(numpy_helper.from_array(np.array("one"), "s"))
    assert inspect_for(save(proto, tmp_path), target).tensors == 1


def test_a_node_between_is_named(tmp_path):
    proto = dequantized(ones(np.int8, 128, 4))
    proto.graph.node[1].input[1] = "i"
    proto.graph.node.insert(1, node("Identity", "w", "i"))
    assert unmet(save(proto, tmp_path), "tensorrt") == {DIRECTLY: ("c",)}


def test_a_shorter_last_block_is_not_for_openvino(tmp_path):
    proto = dequantized(ones(int4, 100, 4), np.ones((2, 4)), axis=0, block_size=64)
    assert unmet(save(proto, tmp_path), "openvino") == {"whole blocks": ("c",)}


@pytest.mark.parametrize("scheme", ["int8", "nf4"])
def test_what_we_write_is_standard_by_default(tmp_path, scheme):
    path = written(SAMPLES["nested"](), tmp_path, scheme)
    for target in REQUIREMENTS:
        found = inspect_for(path, target)
        assert found.tensors == 3
        assert not any(STANDARD in finding.requirement for finding in found.findings)


def test_the_report(tmp_path):
    path = written(matmul((256, 32)), tmp_path, "int4")
    result = call("inspect", path, "--target", "tensorrt", "--report", tmp_path / "r.json")
    assert result.exit_code == 0
    assert f"{BLOCKS}: not w_quantized" in result.stdout
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["target"] == "tensorrt"
    assert {"requirement": BLOCKS, "tensors": ["w_quantized"]} in report["findings"]
    assert report["input_sha256"] == sha256(path)
    assert report["input_data_sha256"] == {}


def test_external_data_is_named_by_its_digest(tmp_path):
    proto = dequantized(ones(np.int8, 256, 32))
    path = save(proto, tmp_path, external=True)
    [data] = (file for file in tmp_path.iterdir() if file != path)
    found = inspect_for(path, "tensorrt")
    assert found.input_data_sha256 == {data.name: sha256(data)}
    first = found.render().splitlines()[0]
    assert first.endswith(f"sha256 {sha256(path)[:16]}, of its data {sha256(data)[:16]}")


def test_a_float_model_and_a_bad_file(tmp_path):
    result = call("inspect", save(matmul(), tmp_path), "--target", "qnn")
    assert "qnn: nothing is quantized in this file" in result.stdout
    missing = call("inspect", tmp_path / "none.onnx", "--target", "qnn")
    assert "cannot be read: No such file" in one_line(missing)
    assert call("inspect", tmp_path / "model.onnx", "--target", "x").exit_code == 2
