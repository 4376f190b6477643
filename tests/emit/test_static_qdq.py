"""Activations in integers: the codes are the guarded ones, whatever onnxruntime makes of it."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantType,
    quantize_static,
)

import flipguard_onnx
from flipguard_onnx import OptionError, UnsupportedModelError, ValidationError, runtime
from tests.helpers import oracles
from tests.helpers.attacked import FOLDER, MANIFEST, classifier_rates
from tests.helpers.command import call, names, one_line
from tests.helpers.samples import F, matmul, model, node, save, weights
from tests.helpers.written import initializers

TYPES = {"int8": QuantType.QInt8, "uint8": QuantType.QUInt8, "int16": QuantType.QInt16}
CALIBRATED_ON = 64  # images


class Reader(CalibrationDataReader):
    def __init__(self, feeds):
        self._feeds = iter(feeds)

    def get_next(self):
        return next(self._feeds, None)


def convolution(bias, weight=None, **constants):
    """Conv with a bias, Relu, and with `constants` a Concat of the result and c."""
    last = [node("Concat", "r c", "y", axis=1)] if constants else [node("Relu", "h", "y")]
    nodes = [node("Conv", "x w b", "h"), *([node("Relu", "h", "r")] if constants else []), *last]
    w = weights((16, 8, 3, 3)) if weight is None else weight
    return model(
        nodes,
        {"x": (F, [1, 8, 6, 6])},
        {"y": (F, [1, 17 if constants else 16, 4, 4])},
        {"w": w, "b": bias, **constants},
    )


def decoders(path):
    """Codes, scales and zero points of what a graph decodes, by the float tensor's name."""
    graph, arrays = onnx.load(path).graph, initializers(path)
    return {
        n.input[0].removesuffix("_quantized"): tuple(arrays[name] for name in n.input)
        for n in graph.node
        if n.op_type == "DequantizeLinear" and n.input[0] in arrays
    }


def decoded_bias(path):
    """What the codes of the bias `b` stand for."""
    codes, scale, *_ = decoders(path)["b"]
    return codes * scale


def plain_static(source, output, feeds, activations="uint8", **options):
    """onnxruntime's static quantizer, alone."""
    extra = options.pop("extra_options", {})
    quantize_static(
        source,
        output,
        Reader(feeds),
        activation_type=TYPES[activations],
        weight_type=QuantType.QInt8,
        calibrate_method=CalibrationMethod.MinMax,
        extra_options=extra,
        **options,
    )


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Images to calibrate on, without their labels."""
    pixels = np.load(FOLDER / "digits-test.npz")["pixels"][:CALIBRATED_ON]
    path = tmp_path_factory.mktemp("digits") / "digits.npz"
    np.savez(path, pixels=pixels[:, None])
    return path, [{"pixels": image[None]} for image in pixels]


@pytest.mark.parametrize("activations", ["uint8", "int8", "int16"])
@pytest.mark.parametrize(
    ("name", "granularity"),
    [("cnn-standard-int8", "channel"), ("cnn-standard-int8-tensor", "tensor")],
)
def test_no_attack_wakes_up_in_integers(tmp_path, digits, name, granularity, activations):
    entry, (data, feeds) = MANIFEST[name], digits
    source = FOLDER / entry["file"]
    per_channel = granularity == "channel"
    plain_static(source, tmp_path / "plain.onnx", feeds, activations, per_channel=per_channel)
    plain = classifier_rates(tmp_path / "plain.onnx")
    assert plain["attack"] > 0.95, "the control: it is an attack"
    before = classifier_rates(source)
    for given in (data, None):
        output = tmp_path / f"{given is None}.onnx"
        report = flipguard_onnx.guard(
            source,
            granularity=granularity,
            activations=activations,
            data=given,
            seed=1,
            output=output,
        )
        after = classifier_rates(output)
        assert after["attack"] <= before["attack"] + 0.02
        assert after["accuracy"] >= 0.97 * before["accuracy"]
        assert report.integers.weight_only == {}
        assert report.integers.inputs == ("data" if given else "synthetic")
        assert len(decoders(output)) == 8  # four weights and their biases


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_codes_and_scales_are_those_of_the_guarded_float_model(tmp_path, granularity):
    """Told by onnxruntime's own quantizer, from the float model that was written beside."""
    source = FOLDER / "cnn-clean.onnx"
    flipguard_onnx.guard(
        source,
        granularity=granularity,
        activations="uint8",
        emit="both",
        seed=1,
        output=tmp_path / "out.onnx",
    )
    floats, found = initializers(tmp_path / "out-float.onnx"), decoders(tmp_path / "out.onnx")
    before = initializers(source)
    checked = 0
    for name, values in floats.items():
        if values.ndim < 2:
            continue
        rows = values.reshape(len(values), -1)
        codes, scales = oracles.int8(rows, per_channel=granularity == "channel")
        assert np.array_equal(found[name][0].reshape(-1), codes)
        assert np.array_equal(found[name][1].reshape(-1), scales)
        assert not found[name][2].any()
        old, _ = oracles.int8(before[name].reshape(rows.shape), granularity == "channel")
        checked += int(np.sum(codes != old))
    assert checked > 1000, "flipped"


def test_a_bias_that_would_enlarge_a_scale(tmp_path):
    """Its channel's weights are so small that the bias overflows at the step of their products."""
    w = weights((16, 8, 3, 3))
    w[3] *= 1e-9
    source = save(convolution(np.full(16, 5.0, np.float32), w), tmp_path)
    feeds = [{"x": np.random.default_rng(0).standard_normal((1, 8, 6, 6)).astype(np.float32)}]
    plain_static(source, tmp_path / "plain.onnx", feeds, per_channel=True)
    _, scales = oracles.int8(w.reshape(16, -1), per_channel=True)
    changed = decoders(tmp_path / "plain.onnx")["w"][1] != scales
    assert list(np.flatnonzero(changed)) == [3], "the control: onnxruntime enlarges that scale"
    report = flipguard_onnx.guard(source, activations="uint8", seed=1, output=tmp_path / "out.onnx")
    assert "does not fit into 32 bits" in report.integers.weight_only["w"]
    assert report.integers.floats == ("b",)
    written = initializers(tmp_path / "out.onnx")
    assert np.array_equal(decoded_bias(tmp_path / "out.onnx"), np.full(16, 5.0, np.float32))
    assert np.array_equal(written["w_scale"].reshape(-1), scales)
    assert written["w_quantized"].dtype == np.int8
    assert "bias beside it" in report.render()


def test_the_bias_of_a_channel_of_zeros_is_not_rounded(tmp_path):
    """Its scale is arbitrary, so an attacker could choose how far its bias is rounded."""
    w = weights((16, 8, 3, 3))
    w[3] = 0
    bias = np.full(16, 0.004, np.float32)
    source = save(convolution(bias, w), tmp_path)
    feeds = [{"x": np.random.default_rng(0).standard_normal((1, 8, 6, 6)).astype(np.float32)}]
    plain_static(source, tmp_path / "plain.onnx", feeds, per_channel=True)
    codes, scales, _ = decoders(tmp_path / "plain.onnx")["b"]
    assert abs(codes[3] * scales[3] - 0.004) > 0.001, "the control: onnxruntime moves it"
    report = flipguard_onnx.guard(source, activations="uint8", seed=1, output=tmp_path / "out.onnx")
    assert report.integers.floats == ("b",)
    assert np.array_equal(decoded_bias(tmp_path / "out.onnx"), bias)


def test_constants_that_nobody_guards_stay_float(tmp_path):
    constant = weights((1, 1, 4, 4), 5)
    source = save(convolution(weights((16,), 1), c=constant), tmp_path)
    feeds = [{"x": np.ones((1, 8, 6, 6), np.float32)}]
    plain_static(source, tmp_path / "plain.onnx", feeds)
    assert "c" in decoders(tmp_path / "plain.onnx"), "the control: onnxruntime rounds it"
    report = flipguard_onnx.guard(source, activations="uint8", seed=1, output=tmp_path / "out.onnx")
    assert report.integers.floats == ("c",)
    assert np.array_equal(initializers(tmp_path / "out.onnx")["c"], constant)
    assert set(decoders(tmp_path / "out.onnx")) == {"w", "b"}


def test_excluded_weights_stay_float(tmp_path):
    nodes = [node("MatMul", "x v", "h"), node("MatMul", "h w", "y")]
    v, w = weights((24, 24)), weights((24, 24), 1)
    source = save(
        model(nodes, {"x": (F, [4, 24])}, {"y": (F, [4, 24])}, {"v": v, "w": w}), tmp_path
    )
    report = flipguard_onnx.guard(
        source, activations="uint8", exclude=("v",), seed=1, output=tmp_path / "out.onnx"
    )
    assert [tensor.name for tensor in report.tensors] == ["w"]
    assert np.array_equal(initializers(tmp_path / "out.onnx")["v"], v)


def test_what_the_static_quantizer_does_not_reach_is_guarded_all_the_same(tmp_path):
    nodes = [
        node("Gather", "table ids", "e"),
        node("LSTM", "e w r", "h", hidden_size=16),
        node("MatMul", "h m", "y"),
    ]
    constants = {
        "table": weights((40, 24)),
        "w": weights((1, 64, 24)) * 5,
        "r": weights((1, 64, 16), 1) * 5,
        "m": weights((16, 24), 2),
    }
    inputs, outputs = {"ids": (TensorProto.INT64, [5, 1])}, {"y": (F, [5, 1, 1, 24])}
    source = save(model(nodes, inputs, outputs, constants), tmp_path)
    report = flipguard_onnx.guard(source, activations="uint8", seed=1, output=tmp_path / "out.onnx")
    assert report.integers.weight_only == {
        "table": "onnxruntime leaves this Gather float",
        "w": "onnxruntime leaves this LSTM float",
        "r": "onnxruntime leaves this LSTM float",
    }
    written = initializers(tmp_path / "out.onnx")
    assert not set(constants) & set(written)
    assert all(written[f"{name}_quantized"].dtype == np.int8 for name in constants)


@pytest.fixture
def meddler(monkeypatch):
    """onnxruntime's static quantizer with a fault: `meddle` edits the graph that it writes."""
    original, faults = runtime.quantize_static, []

    def faulty(path, result, *rest):
        original(path, result, *rest)
        proto = onnx.load(result)
        for fault in faults:
            fault({tensor.name: tensor for tensor in proto.graph.initializer})
        onnx.save(proto, result)

    monkeypatch.setattr(runtime, "quantize_static", faulty)
    return faults.append


def edited(name, edit):
    def fault(tensors):
        values = numpy_helper.to_array(tensors[name]).copy()
        edit(values.reshape(-1))
        tensors[name].CopyFrom(numpy_helper.from_array(values, name))

    return fault


def one_code(values):
    values[7] ^= 1


def one_scale(values):
    values[2] = np.nextafter(values[2], np.float32(1))


@pytest.mark.parametrize(
    ("name", "edit", "reason"),
    [
        ("w_quantized", one_code, "onnxruntime chose other codes for 1 weights"),
        ("w_scale", one_scale, "onnxruntime chose other scales"),
    ],
)
def test_other_codes_are_found_and_replaced(tmp_path, meddler, name, edit, reason):
    source = save(convolution(weights((16,), 1)), tmp_path)
    options = {"activations": "uint8", "seed": 1}
    flipguard_onnx.guard(source, **options, output=tmp_path / "right.onnx")
    meddler(edited(name, edit))
    report = flipguard_onnx.guard(source, **options, output=tmp_path / "out.onnx")
    assert report.integers.weight_only == {"w": reason}
    right, written = initializers(tmp_path / "right.onnx"), initializers(tmp_path / "out.onnx")
    assert np.array_equal(written["w_quantized"], right["w_quantized"])
    assert np.array_equal(written["w_scale"].reshape(-1), right["w_scale"].reshape(-1))


def test_a_constant_of_unknown_origin_is_refused(tmp_path, meddler):
    source = save(convolution(weights((16,), 1)), tmp_path)
    before = names(tmp_path)

    def fault(tensors):
        tensors["b_quantized"].name = "other"

    meddler(fault)
    with pytest.raises(
        ValidationError, match=r"onnx\.checker: Nodes in a graph must be topologically sorted"
    ):
        flipguard_onnx.guard(source, activations="uint8", output=tmp_path / "out.onnx")
    assert names(tmp_path) == before


@pytest.mark.parametrize("calibration", ["minmax", "entropy", "percentile"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_settings_reach_onnxruntime_and_the_file(tmp_path, calibration, symmetric):
    source = save(convolution(weights((16,), 1)), tmp_path)
    output = tmp_path / "out.onnx"
    options = ["--activations", "int8", "--calibration", calibration, "--seed", 1, "-o", output]
    result = call("guard", source, *options, *(["--symmetric"] if symmetric else []))
    assert result.exit_code == 0, result.output
    assert f"int8 activations, {calibration} on 40 made-up inputs, which are" in result.output
    written = onnx.load(output)
    record = {entry.key: entry.value for entry in written.metadata_props}
    assert record["flipguard.calibration"] == calibration
    assert record["flipguard.symmetric"] == str(symmetric)
    arrays = initializers(output)
    zeros = [arrays[n.input[2]] for n in written.graph.node if n.op_type == "QuantizeLinear"]
    assert all(zero.dtype == np.int8 for zero in zeros)
    assert any(zero != 0 for zero in zeros) is not symmetric
    again = call("verify", source, output)
    assert again.exit_code == 0, again.output


def test_minmax_covers_the_whole_range_and_percentile_does_not(tmp_path):
    source = save(convolution(weights((16,), 1)), tmp_path)
    x = np.random.default_rng(0).standard_normal((6, 1, 8, 6, 6)).astype(np.float32)
    np.savez(tmp_path / "x.npz", x=x)
    found = {}
    for calibration in ("minmax", "percentile"):
        output = tmp_path / f"{calibration}.onnx"
        flipguard_onnx.guard(
            source,
            activations="uint8",
            calibration=calibration,
            data=tmp_path / "x.npz",
            seed=1,
            output=output,
        )
        [first] = [n for n in onnx.load(output).graph.node if n.input[0] == "x"]
        found[calibration] = float(initializers(output)[first.input[1]])
    np.testing.assert_allclose(found["minmax"], np.ptp(x) / 255, rtol=1e-6)
    assert 0.99 * found["minmax"] < found["percentile"] < found["minmax"]


@pytest.mark.parametrize("calibration", ["entropy", "percentile"])
def test_samples_that_no_batch_divides_are_counted_all_the_same(tmp_path, calibration):
    source, data = save(matmul(), tmp_path), tmp_path / "x.npz"
    np.savez(data, x=np.random.default_rng(0).standard_normal((41, 70)).astype(np.float32))
    options = {"activations": "uint8", "calibration": calibration, "data": data, "seed": 1}
    report = flipguard_onnx.guard(source, output=tmp_path / "out.onnx", **options)
    assert report.integers.feeds == 41


def test_inputs_of_several_shapes_cannot_be_counted(tmp_path):
    graph = [node("MatMul", "x w", "y")], {"x": (F, ["n", "m", 70])}, {"y": (F, ["n", "m", 33])}
    source = save(model(*graph, {"w": weights((70, 33))}), tmp_path)
    for rows in (3, 4):
        values = np.random.default_rng(0).standard_normal((2, rows, 70)).astype(np.float32)
        (tmp_path / "data").mkdir(exist_ok=True)
        np.savez(tmp_path / "data" / f"{rows}.npz", x=values)
    options = ["--activations", "uint8", "--data", tmp_path / "data", "--seed", 1]
    result = call("guard", source, *options, "--calibration", "entropy")
    assert result.exit_code == 2
    assert "calibration 'entropy' takes inputs of one shape; allowed: such" in result.output
    assert call("guard", source, *options).exit_code == 0


def test_a_folder_of_inputs_is_all_of_its_files(tmp_path):
    source = save(convolution(weights((16,), 1)), tmp_path)
    x = np.random.default_rng(0).standard_normal((6, 1, 8, 6, 6)).astype(np.float32)
    np.savez(tmp_path / "all.npz", x=x)
    folder = tmp_path / "inputs"
    folder.mkdir()
    np.savez(folder / "a.npz", x=x[:4])
    np.savez(folder / "b.npz", x=x[4:])
    outputs = []
    for data in (tmp_path / "all.npz", folder):
        output = tmp_path / f"{data.stem}.onnx"
        report = flipguard_onnx.guard(source, activations="uint8", data=data, seed=1, output=output)
        assert (report.integers.inputs, report.integers.feeds) == ("data", 6)
        proto = onnx.load(output)
        entries = {e.key: e.value for e in proto.metadata_props}
        assert entries["flipguard.data_sha256"] == report.data_sha256
        del proto.metadata_props[:]
        outputs.append((proto.SerializeToString(deterministic=True), report.data_sha256))
    assert outputs[0][0] == outputs[1][0]
    assert outputs[0][1] != outputs[1][1]
    empty = tmp_path / "empty"
    empty.mkdir()
    found = one_line(call("guard", source, "--data", empty, "--quiet", "-o", tmp_path / "no.onnx"))
    assert "a folder without .npz files" in found


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"activations": "uint8", "scheme": "int4"},
            "scheme int8 per channel or tensor, not 'int4'",
        ),
        ({"activations": "uint8", "emit": "float"}, "activations go with emit 'qdq' or 'both'"),
        ({"activations": "uint4"}, "activations 'uint4' is unknown; allowed: int8, uint8, int16"),
        ({"calibration": "mean"}, "calibration 'mean' is unknown; allowed: minmax, entropy"),
        ({"symmetric": True}, "symmetric goes with activations"),
    ],
)
def test_options_that_do_not_fit(tmp_path, options, message):
    source = save(convolution(weights((16,), 1)), tmp_path)
    with pytest.raises(OptionError, match=message):
        flipguard_onnx.guard(source, output=tmp_path / "out.onnx", **options)
    assert names(tmp_path) == [source.name]


def test_a_model_larger_than_the_memory_is_refused(tmp_path):
    w = weights((1024, 512))
    nodes = [node("MatMul", "x w", "y")]
    source = save(model(nodes, {"x": (F, [1, 1024])}, {"y": (F, [1, 512])}, {"w": w}), tmp_path)
    with pytest.raises(UnsupportedModelError, match="allowed: up to 1,048,576"):
        flipguard_onnx.guard(
            source, activations="uint8", max_memory=1, output=tmp_path / "out.onnx"
        )


def test_weights_in_branches_are_out_of_reach(tmp_path):
    source = FOLDER.parent / "silero_vad.onnx"
    output = tmp_path / "out.onnx"
    found = one_line(call("guard", source, "--activations", "uint8", "--quiet", "-o", output))
    assert "no weight feeds MatMul, Gemm, Conv, ConvTranspose in the main graph" in found
    assert names(tmp_path) == []
