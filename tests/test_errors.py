"""Refusals carry what they say: file, tensor, what was found, and what is allowed."""

import pickle
import zipfile

import numpy as np
import pytest

import flipguard_onnx
from flipguard_onnx.calibration.inputs import load_feeds
from flipguard_onnx.errors import (
    DriftError,
    FlipguardError,
    ModelError,
    OptionError,
    SchemeError,
    ValidationError,
)
from flipguard_onnx.io.model import open_model
from flipguard_onnx.io.publish import check_target
from flipguard_onnx.reports.validation import Drift
from flipguard_onnx.validation.drift import judge
from tests.helpers.hostile import MATRIX, changed, emptied, external, shape, written
from tests.helpers.samples import SAMPLES, F, matmul, model, node, save, weights


def refusal(function, *arguments, **options):
    with pytest.raises(FlipguardError) as info:
        function(*arguments, **options)
    error = info.value
    assert "\n" not in str(error)
    for part in (error.path, error.tensor, error.allowed):
        assert part is None or part in str(error)
    return error


def test_a_tensor_that_is_cut_off(tmp_path):
    path = written(changed(shape(64, 65)), tmp_path)
    error = refusal(open_model, path)
    assert isinstance(error, ModelError)
    assert (error.path, error.tensor, error.found) == (str(path), "outer", 16384)
    assert str(error) == (
        f"{path}: tensor 'outer' of FLOAT and shape [64, 65] needs 16640 bytes; found: 16384"
    )


def test_too_many_axes(tmp_path):
    path = written(changed(emptied(*[1] * 40)), tmp_path)
    error = refusal(open_model, path)
    assert (error.tensor, error.found, error.allowed) == ("outer", 40, "up to 32")
    assert str(error) == f"{path}: tensor 'outer' has 40 axes; allowed: up to 32"


@pytest.mark.parametrize("location", ["../secret", "{tensor}", "{0}", "{", "}"])
def test_data_outside_the_folder(tmp_path, location):
    """Whatever is in a name is shown as it is."""
    (tmp_path / "secret").write_bytes(bytes(64 * 64 * 4))
    (tmp_path / "in").mkdir()
    path = external(tmp_path / "in", location=location)
    error = refusal(open_model, path)
    assert (error.path, error.tensor, error.found) == (str(path), "w", location)
    assert repr(location) in str(error)
    if location == "../secret":
        assert error.allowed == "a file under the model's folder"


def test_a_name_with_braces(tmp_path):
    proto = matmul(MATRIX)
    proto.graph.initializer[0].name = proto.graph.node[0].input[1] = "{found} {x}"
    proto.graph.initializer[0].dims[0] = -1
    error = refusal(open_model, written(proto, tmp_path))
    assert "tensor '{found} {x}' has the shape [-1, 64]; allowed: sizes from 0 on" in str(error)


def test_nodes_and_values(tmp_path):
    proto = model(
        [node("MatMul", "x w", "y"), node("MatMul", "x w", "y")],
        {"x": (F, [2, 64])},
        {"y": (F, [2, 64])},
        {"w": weights(MATRIX)},
    )
    path = written(proto, tmp_path)
    error = refusal(open_model, path)
    assert (error.path, error.tensor) == (str(path), "y")
    assert str(error) == f"{path}: value 'y' is defined more than once"


def test_feeds_that_do_not_fit(tmp_path):
    data = tmp_path / "d.npz"
    np.savez(data, x=np.ones((2, 63), np.float32))
    proto = model([node("MatMul", "x w", "y")], {"x": (F, [2, 64])}, {"y": (F, None)})
    error = refusal(load_feeds, data, proto)
    assert (error.path, error.tensor) == (str(data), "x")
    assert (error.found, error.allowed) == ("float32 (2, 63)", "float32 (2, 64)")


@pytest.mark.parametrize("header", ["(", "((((", "{'descr': '<f4', (", "-" * 9000 + "1"])
def test_feeds_with_a_header_that_does_not_parse(tmp_path, header):
    data = tmp_path / "d.npz"
    with zipfile.ZipFile(data, "w") as archive:
        length = len(header).to_bytes(2, "little")
        archive.writestr("x.npy", b"\x93NUMPY\x01\x00" + length + header.encode())
    error = refusal(load_feeds, data, matmul(MATRIX))
    assert "not a readable .npz file" in str(error)
    assert error.path == str(data)


def test_a_target_that_exists(tmp_path):
    target = save(SAMPLES["nested"](), tmp_path)
    error = refusal(check_target, target, (), force=False)
    assert error.path == str(target)
    assert str(error) == f"{target}: exists already; --force overwrites it"


def test_an_option_with_an_unknown_value(tmp_path):
    path = save(matmul(MATRIX), tmp_path)
    error = refusal(flipguard_onnx.guard, path, "int9")
    assert isinstance(error, SchemeError)
    assert isinstance(error, OptionError)
    assert "int9" in str(error)


def test_nan(tmp_path):
    proto = matmul(MATRIX)
    proto.graph.initializer[0].raw_data = np.full(MATRIX, np.nan, np.float32).tobytes()
    error = refusal(flipguard_onnx.guard, save(proto, tmp_path))
    assert isinstance(error, ModelError)
    assert "tensor 'w' holds 4096 values that are NaN or infinite" in str(error)


def test_drift():
    drifts = [Drift("y", 10_000, 1.0, 0.0, relative, 0.0, None) for relative in (0.1, 0.9)]
    error = refusal(judge, drifts[:1], drifts[1:], max_drift=3)
    assert isinstance(error, DriftError)
    assert isinstance(error, ValidationError)
    assert "0.9000" in str(error)


def test_errors_pass_between_processes():
    error = ModelError("{tensor!r} has {found} of {size}", tensor="w", found=1, size=2).at("m.onnx")
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error) == "m.onnx: 'w' has 1 of 2"
    assert (again.path, again.tensor, again.found) == ("m.onnx", "w", 1)


def test_a_message_without_data_is_no_format():
    assert str(ModelError("{a} {").at("m{x}.onnx")) == "m{x}.onnx: {a} {"
