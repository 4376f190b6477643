"""Numbers at the edge of their types: a right result or a clear refusal, in every scheme."""

from contextlib import suppress

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper

import flipguard_onnx
from tests.helpers.command import call
from tests.helpers.hostile import refused
from tests.helpers.samples import F, matmul, model, node, save

SCHEMES = ("int8", "int4", "nf4", "fp4")
SHAPE = (70, 33)  # ragged against every block size


def filled(values, dtype=np.float32):
    """A MatMul whose weight has these values."""
    array = np.broadcast_to(np.asarray(values, dtype), SHAPE)
    proto = matmul(SHAPE, dtype, opset=21, ir_version=10)
    proto.graph.initializer[0].CopyFrom(numpy_helper.from_array(array.copy(), "w"))
    return proto


def noise(scale, dtype=np.float32):
    return filled(np.random.default_rng(0).standard_normal(SHAPE) * scale, dtype)


def one_large(large, small):
    values = np.full(SHAPE, small, np.float32)
    values[0, 0] = large
    return filled(values)


EDGES = {
    "zeros": lambda: filled(0.0),
    "minus zeros": lambda: filled(-0.0),
    "constant": lambda: filled(0.7),
    "constant float16": lambda: filled(0.7, np.float16),
    "denormal": lambda: noise(1e-41),
    "smallest denormal": lambda: filled(1e-45),
    "denormal float16": lambda: noise(1e-7, np.float16),
    "large": lambda: filled(1e36),
    "large float16": lambda: noise(10_000, np.float16),
    "1e38 beside 1e-38": lambda: one_large(1e38, 1e-38),
    "1e-38 beside -1e38": lambda: one_large(-1e38, 1e-38),
    "1e30": lambda: noise(1e30),
    "1e-30": lambda: noise(1e-30),
}


LOST = {
    "denormal",
    "smallest denormal",
    "denormal float16",
    "1e38 beside 1e-38",
    "1e-38 beside -1e38",
}


def decoded(path):
    """The weight that the written file stands for: MatMul of the identity, in onnxruntime."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    kind = np.float16 if "16" in session.get_inputs()[0].type else np.float32
    return session.run(None, {"x": np.eye(SHAPE[0], dtype=kind)})[0].astype(np.float64)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_every_weight_lands_on_a_level_beside_it(tmp_path, edge, scheme):
    path = save(EDGES[edge](), tmp_path)
    out = tmp_path / "out.onnx"
    with suppress(flipguard_onnx.ValidationError):
        flipguard_onnx.guard(path, scheme, output=out, validate=False, preserve="off", seed=3)
    if not out.exists():  # its only weight would be lost
        assert edge in LOST
        return
    proto = onnx.load(path)
    wanted = numpy_helper.to_array(proto.graph.initializer[0]).astype(np.float64)
    found = decoded(str(out))
    assert np.isfinite(found).all()
    # the coarsest gap of any grid here is a third of the largest weight of the block
    limit = np.abs(wanted).max() * (0.34 if scheme != "int8" else 0.02)
    # and no scale is finer than the smallest number that onnxruntime takes for one
    finest = 6e-8 if "float16" in edge else np.finfo(np.float32).tiny
    assert np.abs(found - wanted).max() <= max(limit, 128 * finest)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("edge", EDGES)
def test_the_whole_run_ends_well_or_in_one_line(tmp_path, edge, scheme):
    path = save(EDGES[edge](), tmp_path)
    result = call(path, "--scheme", scheme, "--seed", 3, "--quiet")
    if result.exit_code == 0:
        assert result.output == ""
    else:
        assert result.exit_code == (2 if "made-up inputs" in result.stderr else 1)
        assert refused(path, "--scheme", scheme, "--seed", 3, code=result.exit_code)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_nan_and_infinity_are_refused_by_name(tmp_path, value, dtype):
    values = np.ones(SHAPE, dtype)
    values[3, 4] = value
    message = refused(save(filled(values, dtype), tmp_path))
    assert "tensor 'w' holds 1 values that are NaN or infinite" in message


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_what_would_overflow_when_its_level_is_rounded_up_is_refused(tmp_path, dtype, scheme):
    path = save(filled(np.finfo(dtype).max, dtype), tmp_path)
    message = refused(path, "--scheme", scheme)
    assert "tensor 'w' holds 2310 values that are NaN or infinite, or beyond" in message


def test_nan_in_bfloat16(tmp_path):
    values = np.full(SHAPE, np.nan, ml_dtypes.bfloat16)
    proto = model(
        [node("Cast", "w", "w1", to=F), node("MatMul", "x w1", "y")],
        {"x": (F, ["n", SHAPE[0]])},
        {"y": (F, ["n", SHAPE[1]])},
        {"w": values},
    )
    assert "tensor 'w' holds 2310 values" in refused(save(proto, tmp_path))


def test_excluded_nan_is_left_as_it_is(tmp_path):
    proto = matmul(SHAPE)
    values = np.full((33, 64), np.nan, np.float32)
    proto.graph.initializer.append(numpy_helper.from_array(values, "bad"))
    proto.graph.node.append(node("MatMul", "y bad", "z"))
    proto.graph.output.append(helper.make_tensor_value_info("z", F, ["n", 64]))
    path = save(proto, tmp_path)
    options = ("--exclude", "bad", "--no-validate", "--preserve", "off")
    assert call(path, *options, "-o", tmp_path / "o.onnx").exit_code == 0
    kept = next(t for t in onnx.load(tmp_path / "o.onnx").graph.initializer if t.name == "bad")
    assert kept.raw_data == values.tobytes()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("shape", [(0, 64), (64, 0), (0, 0), (1, 1), (1, 64), (64, 1), (5, 13)])
def test_empty_and_tiny_tensors(tmp_path, scheme, shape):
    proto = matmul(shape)
    path = save(proto, tmp_path)
    options = ("--scheme", scheme, "--seed", 1, "--no-validate", "--preserve", "off")
    if np.prod(shape) < 64:
        assert "nothing to guard: too small (fewer than 64 weights)" in refused(path, *options)
        return
    result = call(path, *options, "-o", tmp_path / "out.onnx")
    assert result.exit_code == 0, result.output
    session = onnxruntime.InferenceSession(
        tmp_path / "out.onnx", providers=["CPUExecutionProvider"]
    )
    found = session.run(None, {"x": np.eye(shape[0], dtype=np.float32)})[0]
    wanted = numpy_helper.to_array(proto.graph.initializer[0])
    assert np.abs(found - wanted).max() <= 0.34 * np.abs(wanted).max()


def test_scalars_are_listed(tmp_path):
    proto = matmul(SHAPE)
    proto.graph.initializer.append(numpy_helper.from_array(np.float32(2), "two"))
    proto.graph.node.append(node("Mul", "y two", "z"))
    proto.graph.output.append(helper.make_tensor_value_info("z", F, ["n", 33]))
    result = call("inspect", save(proto, tmp_path))
    assert "1 tensor, 1 value: scalar" in result.stdout
