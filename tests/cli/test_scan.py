"""scan on several models and on folders: every one gets its verdict or its line."""

import shutil

import pytest

from tests.helpers.attacked import FOLDER
from tests.helpers.command import call, one_line
from tests.helpers.samples import F, matmul, model, node, save

ATTACKED = FOLDER / "mlp-standard-int4.onnx"


@pytest.fixture
def folder(tmp_path):
    """A model, a bad one, an attacked one below, and an output of an earlier run."""
    (tmp_path / "in" / "below").mkdir(parents=True)
    (tmp_path / "in" / "bad.onnx").write_text("no model")
    save(matmul(), tmp_path / "in", "good.onnx")
    save(matmul(), tmp_path / "in", "good.flipguard-int8.onnx")
    shutil.copy(ATTACKED, tmp_path / "in" / "below" / "evil.onnx")
    return tmp_path / "in"


def verdicts(result):
    """Model and verdict, in the order in which they are printed."""
    lines = result.stdout.splitlines()
    models = [line.split()[1].rsplit("/")[-1] for line in lines if line.startswith("input ")]
    found = [line.split()[1].strip(",") for line in lines if line.startswith("scan ")]
    return list(zip(models, found, strict=True))


@pytest.mark.parametrize("backwards", [False, True])
def test_one_that_cannot_be_read_stops_no_other(folder, backwards):
    models = [folder / "bad.onnx", folder / "none.onnx", ATTACKED, folder / "good.onnx"]
    result = call("scan", *(models[::-1] if backwards else models))
    expected = [(ATTACKED.name, "aligned"), ("good.onnx", "clean")]
    assert verdicts(result) == (expected[::-1] if backwards else expected)
    errors = [line for line in result.stderr.splitlines() if line.startswith("flipguard-onnx: ")]
    assert sorted(line.split(": ")[1] for line in errors) == sorted(map(str, models[:2]))
    assert result.exit_code == 2


def test_the_exit_code_is_the_highest(folder):
    assert call("scan", folder / "good.onnx", ATTACKED).exit_code == 1
    assert call("scan", ATTACKED, folder / "good.onnx").exit_code == 1
    assert call("scan", ATTACKED, folder / "good.onnx", "--fail-on", "never").exit_code == 0
    assert call("scan", folder / "bad.onnx", ATTACKED, "--fail-on", "never").exit_code == 2


def test_folders_are_searched_as_by_guard(folder, tmp_path):
    (tmp_path / "nothing").mkdir()
    result = call("scan", tmp_path / "nothing", folder, "--quiet")
    assert result.stdout == ""
    assert result.stderr.splitlines()[0].endswith("nothing: no .onnx file in this folder")
    assert f"{folder / 'bad.onnx'}: not an ONNX model" in result.stderr
    assert result.exit_code == 2
    (folder / "bad.onnx").unlink()
    result = call("scan", folder)
    assert verdicts(result) == [("evil.onnx", "aligned"), ("good.onnx", "clean")]
    assert result.exit_code == 1


def test_reports_are_for_one_model(folder, tmp_path):
    report = tmp_path / "r.json"
    message = one_line(call("scan", folder, "--format", "json", "--report", report))
    assert message.endswith("--report and --format are for one model, not 3\n")
    assert not report.exists()
    assert call("scan", folder / "below", "--format", "json", "--report", report).exit_code == 1
    assert report.exists()


def test_a_quiet_scan_says_what_it_could_not_judge(tmp_path):
    path = save(model([node("Relu", "x", "y")], {"x": (F, [2])}, {"y": (F, [2])}), tmp_path)
    result = call("scan", path, "--quiet")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr == f"flipguard-onnx: {path}: there are no weights to judge\n"
