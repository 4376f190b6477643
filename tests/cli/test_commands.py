"""The command line: exit codes, one-line errors, output."""

import json
import subprocess
import sys

import numpy as np
import onnx
import pytest

from flipguard_onnx import __version__
from tests.helpers.command import call, one_line
from tests.helpers.samples import SAMPLES, matmul, save

FAST = ("--no-validate", "--preserve", "off")


@pytest.fixture
def sample(tmp_path):
    return save(SAMPLES["nested"](), tmp_path)


def test_the_model_alone_is_guarded_to_int8_beside_it(sample):
    result = call(sample)
    assert result.exit_code == 0, result.output
    onnx.checker.check_model(sample.with_name("model.flipguard-int8.onnx"))
    assert "guarded   12,288 weights in 3 tensors, 100.00% of all" in result.stdout
    assert "valid     on 8 inputs" in result.stdout


def test_report_as_json(sample, tmp_path):
    result = call("guard", sample, "--report", tmp_path / "r.json", "--seed", 5, "--quiet")
    assert result.exit_code == 0
    assert result.output == ""
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["seed"] == "5"
    assert report["coverage"] == 1.0
    assert [t["weights"] for t in report["tensors"]] == [4096] * 3
    assert report["validation"]["guarded_exact"][0]["output"] == "y"
    assert list(report["outputs"]) == [str(sample.with_name("model.flipguard-int8.onnx"))]


def test_inspect_writes_no_model(sample, tmp_path):
    result = call("inspect", sample, "--scheme", "nf4")
    assert result.exit_code == 0
    assert ["outer", "MatMul", "64x64", "nf4", "4,096"] in map(str.split, result.stdout.split("\n"))
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


@pytest.mark.parametrize("scheme", ["int8", "int4", "nf4", "fp4"])
def test_inspect_predicts_the_size(tmp_path, scheme):
    """All but nodes, names and metadata, which are no longer for a large weight."""
    overheads = []
    for rows in (256, 1024):
        source, output = save(matmul((rows, 256)), tmp_path), tmp_path / "out.onnx"
        call("inspect", source, "--scheme", scheme, "--report", tmp_path / "r.json")
        predicted = json.loads((tmp_path / "r.json").read_text())["output_bytes"]
        options = ("--scheme", scheme, "-o", output, "--seed", 1, "--force", *FAST)
        assert call(source, *options).exit_code == 0
        overheads.append(output.stat().st_size - predicted)
    assert 800 < overheads[0] < 1500  # the record of the options is about 500 of them
    assert abs(overheads[1] - overheads[0]) < 10


def test_verify(sample, tmp_path):
    assert call(sample, "-o", tmp_path / "out.onnx", "--scheme", "fp4").exit_code == 0
    result = call("verify", sample, tmp_path / "out.onnx")
    assert result.exit_code == 0
    assert "recorded as made from this original" in result.stdout
    assert "rounded to nearest at fp4" in result.stdout
    result = call("verify", sample, tmp_path / "out.onnx", "--max-drift", "0.05")
    assert "the outputs drift by" in one_line(result, 1)


def test_bad_files_get_one_line_and_exit_code_2(tmp_path):
    assert "cannot be read: No such file" in one_line(call("inspect", tmp_path / "none.onnx"))
    assert "Is a directory" in one_line(call("inspect", tmp_path))
    for name, content in (
        ("empty", b""),
        ("text", b"once upon a time"),
        ("zip", b"PK\3\4" + bytes(100)),
        ("cut", matmul().SerializeToString()[:-100]),
    ):
        path = tmp_path / f"{name}.onnx"
        path.write_bytes(content)
        message = one_line(call("inspect", path))
        assert str(path) in message
        assert "not an ONNX model" in message


def test_failed_validation_is_exit_code_1_and_leaves_nothing(sample, tmp_path):
    result = call("guard", sample, "--max-drift", "0.001", "--quiet")
    assert "the outputs drift by" in one_line(result, 1)
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


def test_bad_options_get_exit_code_2(sample):
    result = call("guard", sample, "--scheme", "int3")
    assert result.exit_code == 2
    assert "Invalid value for '--scheme': 'int3' is not one of 'int8', 'uint8'" in result.stderr
    assert "tau is 0.0" in one_line(call("guard", sample, "--tau", 0))
    assert "block size is 48" in one_line(call(sample, "--scheme", "nf4", "--block-size", 48))


def test_a_report_that_cannot_be_written_stops_the_run(sample, tmp_path):
    for path in (tmp_path / "none" / "r.json", tmp_path):
        message = one_line(call("guard", sample, "--report", path))
        assert message.endswith(f"{path}: the report cannot be written there\n")
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


def test_missing_external_data_is_named(tmp_path):
    path = save(matmul(), tmp_path, external=True)
    (tmp_path / "model.onnx.data").unlink()
    assert "tensor 'w' needs the data file 'model.onnx.data'" in one_line(call("inspect", path))


@pytest.mark.parametrize("location", ["../secret", "/etc/passwd", ""])
def test_external_data_outside_the_folder_is_refused(tmp_path, location):
    (tmp_path / "secret").write_bytes(bytes(70 * 33 * 4))
    (tmp_path / "in").mkdir()
    path = save(matmul(), tmp_path / "in", external=True)
    proto = onnx.load(path, load_external_data=False)
    proto.graph.initializer[0].external_data[0].value = location
    path.write_bytes(proto.SerializeToString())
    assert "allowed: a file under the model's folder" in one_line(call("inspect", path))


def test_wrong_length_of_external_data_is_refused(tmp_path):
    path = save(matmul(), tmp_path, external=True)
    (tmp_path / "model.onnx.data").write_bytes(bytes(100))
    assert "needs 9240 bytes" in one_line(call("inspect", path))


def test_nan_is_refused_unless_excluded(tmp_path):
    proto = SAMPLES["nested"]()
    values = np.full((64, 64), np.nan, np.float32)
    proto.graph.initializer[0].raw_data = values.tobytes()
    path = save(proto, tmp_path)
    assert "tensor 'outer' holds 4096 values" in one_line(call(path, "--quiet"))
    assert call(path, "--quiet", "--exclude", "outer", "--no-validate").exit_code == 0


def test_version_and_module():
    result = subprocess.run(
        [sys.executable, "-m", "flipguard_onnx", "--version"],
        check=True,
        capture_output=True,
        text=True,
    )
    assert result.stdout == f"flipguard-onnx, version {__version__}\n"
