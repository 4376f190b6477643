"""The real models: guarded in every scheme, and our codes against onnxruntime's on their weights.

They are downloaded by `python tools/fetch_models.py`; what is not there is skipped by name.
"""

import numpy as np
import onnx
import pytest
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)
from onnxruntime.quantization.matmul_bnb4_quantizer import MatMulBnb4Quantizer
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

import flipguard_onnx
from flipguard_onnx import DriftError
from flipguard_onnx.calibration.inputs import made_up_feeds
from flipguard_onnx.emit import weight_forms as qdq
from flipguard_onnx.formats import FLOAT4
from flipguard_onnx.graph.weights import find_weights
from flipguard_onnx.io.model import file_sha256, open_model
from flipguard_onnx.quantization.kernels import get_backend
from flipguard_onnx.quantization.rounding import Policy, quantize_tensor
from flipguard_onnx.quantization.schemes import SCHEMES
from tests.helpers import oracles
from tests.helpers.command import call, one_line
from tests.helpers.real import FLOAT_MODELS, INTEGER_MODELS, downloaded

SLOW = ("ddddocr", "ppocr_det", "ppocr_rec", "open_nsfw")  # to run for statistics; magika has Convs

TWO_BITS = ("int2", "uint2")

CASES = [
    (name, scheme)
    for name in FLOAT_MODELS
    for scheme in SCHEMES
    if scheme not in TWO_BITS
    and (
        scheme not in ("nf4", "fp4", "fp8", *FLOAT4)
        or name not in (*SLOW, "minilm")  # int4 with other levels
    )
]


@pytest.mark.parametrize(("name", "scheme"), CASES)
def test_guarded_in_every_scheme(tmp_path, name, scheme):
    source = downloaded(name)
    before = file_sha256(source)
    output = tmp_path / "out.onnx"
    fed = scheme == "int4" and name not in SLOW  # one scheme is enough for the statistics
    preserve = "auto" if fed else "off"
    report = flipguard_onnx.guard(source, scheme, preserve=preserve, output=output)
    outputs = [each.name for each in onnx.load(source).graph.output]
    assert [drift.output for drift in report.validation.guarded_exact] == outputs
    assert report.coverage > 0.98
    assert report.scan.verdict.level == "clean"
    assert 0.1 < report.flips / report.weights < 0.4
    assert output.stat().st_size < 0.45 * source.stat().st_size
    assert file_sha256(source) == before
    assert [p.name for p in tmp_path.iterdir()] == ["out.onnx"]


@pytest.mark.parametrize("preserve", ["auto", "off"])
@pytest.mark.parametrize("scheme", TWO_BITS)
def test_a_model_that_two_bits_ruin_is_not_written(tmp_path, scheme, preserve):
    source, output = downloaded("fsmn_vad"), tmp_path / "out.onnx"
    with pytest.raises(DriftError):
        flipguard_onnx.guard(source, scheme, preserve=preserve, output=output, seed=1)
    assert not list(tmp_path.iterdir())


def test_layers_that_two_bits_would_ruin_get_int8(tmp_path):
    output = tmp_path / "out.onnx"
    report = flipguard_onnx.guard(downloaded("minilm"), "uint2", output=output, seed=1)
    replaced = [tensor for tensor in report.tensors if tensor.fallback]
    assert len(replaced) > 10
    assert {tensor.scheme for tensor in replaced} == {"int8"}


@pytest.mark.parametrize("name", INTEGER_MODELS)
def test_quantized_models_are_refused_in_one_line(name):
    assert "already quantized" in one_line(call("inspect", downloaded(name)))


def plain(weight, values, scheme, flat=False):
    blocks = weight.blocks(SCHEMES[scheme].block_size, flat)
    key, backend = np.uint64(0), get_backend("cpu")
    return quantize_tensor(
        weight.name,
        weight.canonical(values),
        SCHEMES[scheme],
        blocks,
        Policy("none"),
        key,
        backend,
    )


def assert_same_int8(source, target, at_least):
    """Every int8 weight of onnxruntime's output has our codes and scales."""
    theirs = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(target).graph.initializer}
    model = open_model(source)
    compared = 0
    for weight in find_weights(model.proto)[0]:
        codes = theirs.get(f"{weight.name}_quantized")
        if codes is None or codes.dtype != np.int8:
            continue  # onnxruntime left it, or made uint8 of an embedding
        scale = theirs[f"{weight.name}_scale"].reshape(-1)
        flips = plain(weight, model.array(weight.tensor), "int8", flat=scale.size == 1)
        assert np.array_equal(codes, weight.stored(flips.codes))
        assert np.array_equal(scale, flips.grid.scale)
        compared += weight.size
    assert compared > at_least


# quantize_dynamic ignores per_channel for Conv
@pytest.mark.parametrize(("name", "per_channel"), [("minilm", True), ("open_nsfw", False)])
def test_int8_codes_equal_quantize_dynamic(tmp_path, name, per_channel):
    source, target = downloaded(name), tmp_path / "dynamic.onnx"
    options = {"WeightSymmetric": True}
    kind = QuantType.QInt8
    quantize_dynamic(
        source, target, per_channel=per_channel, weight_type=kind, extra_options=options
    )
    assert_same_int8(source, target, 5_000_000)


@pytest.mark.parametrize("per_channel", [True, False])
def test_int8_codes_equal_quantize_static(tmp_path, per_channel):
    class Feeds(CalibrationDataReader):
        feeds = iter(next(made_up_feeds(onnx.load(downloaded("magika")), 0)))

        def get_next(self):
            return next(self.feeds, None)

    source, target = downloaded("magika"), tmp_path / "static.onnx"
    kind = QuantType.QInt8
    quantize_static(source, target, Feeds(), per_channel=per_channel, weight_type=kind)
    assert_same_int8(source, target, 700_000)


@pytest.mark.parametrize("scheme", ["int4", "nf4", "fp4"])
def test_4_bit_codes_equal_onnxruntimes(scheme):
    model = open_model(downloaded("minilm"))
    compared = 0
    for weight in find_weights(model.proto)[0]:
        if weight.op != "MatMul":
            continue
        values = model.array(weight.tensor)
        flips = plain(weight, values, scheme, flat=scheme != "int4")
        rows = np.ascontiguousarray(values.T)
        if scheme == "int4":
            codes, scales = oracles.int4(rows)
        else:
            codes, scales = oracles.bnb4(rows, scheme)
        ours = flips.codes if scheme == "int4" else SCHEMES[scheme].stored[flips.codes]
        assert np.array_equal(ours, codes)
        assert np.array_equal(flips.grid.scale, scales)
        compared += weight.size
    assert compared > 5_000_000


@pytest.mark.parametrize("scheme", [s for s in SCHEMES if s not in ("fp8", *FLOAT4, *TWO_BITS)])
def test_onnxruntimes_tools_turn_the_moved_model_into_our_codes(tmp_path, monkeypatch, scheme):
    """The float model that we write, put through onnxruntime's own quantizer of that format."""
    monkeypatch.setattr(qdq, "MIN_PACKED", 0)  # all in the kernels' layouts, which are theirs
    moved, output = tmp_path / "out-float.onnx", tmp_path / "out.onnx"
    target = "portable" if scheme == "uint8" else "onnxruntime"
    options = {"output": output, "emit": "both", "target": target}
    flipguard_onnx.guard(downloaded("fsmn_vad"), scheme, **options)
    theirs = tmp_path / "theirs.onnx"
    if scheme in ("int8", "uint8"):
        options = {"WeightSymmetric": scheme == "int8"}
        kind = QuantType.QInt8 if scheme == "int8" else QuantType.QUInt8
        quantize_dynamic(moved, theirs, per_channel=True, weight_type=kind, extra_options=options)
        suffix, model = "quantized", onnx.load(theirs)
    elif scheme in ("int4", "uint4"):
        symmetric, layout = scheme == "int4", QuantFormat.QOperator
        quantizer = MatMulNBitsQuantizer(
            str(moved), block_size=32, is_symmetric=symmetric, quant_format=layout
        )
        quantizer.process()
        suffix, model = "Q4", quantizer.model.model
    else:
        quantizer = MatMulBnb4Quantizer(onnx.load(moved), SCHEMES[scheme].bnb4_type, 64)
        quantizer.process()
        suffix, model = "Bnb4", quantizer.model.model
    found = {t.name: t for t in model.graph.initializer}
    compared = 0
    for ours in onnx.load(output).graph.initializer:
        their = found.get(ours.name.removesuffix("quantized") + suffix)
        if ours.name.endswith("_quantized") and their is not None and len(ours.dims) <= 3:
            array = onnx.numpy_helper.to_array(their)
            assert onnx.numpy_helper.to_array(ours).tobytes() == array.tobytes()
            compared += 1
    assert compared == 12
