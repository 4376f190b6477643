"""The files of a command: which may be one, and what is said of those that are not there."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from flipguard_onnx import ModelError, guard, guard_many, verify
from flipguard_onnx.cli.paths import check_files
from tests.helpers.command import call, names, one_line
from tests.helpers.samples import matmul, save

FAST = ("--no-validate", "--preserve", "off")


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez("data.npz", x=np.ones((2, 70), np.float32))
    (tmp_path / "options.toml").write_text("include = ['w']\n")
    (tmp_path / "link").symlink_to(tmp_path)
    save(matmul(), tmp_path)
    return "model.onnx"


REFUSED = {  # what is given beside the model, and how the line begins
    ("--html", "o.onnx", "-o", "o.onnx"): "o.onnx: --html and the output are one file",
    ("--sbom", "link/o.onnx", "-o", "o.onnx"): "link/o.onnx: --sbom and the output are one",
    ("--report", "model.flipguard-int8.onnx"): "model.flipguard-int8.onnx: --report and the output",
    ("--report", "o-float.onnx", "-o", "o.onnx", "--emit", "both"): "o-float.onnx: --report and",
    ("--html", "x", "--report", "./x"): "x: --report and --html are one file",
    ("--html", "link/x", "--sbom", "x"): "link/x: --html and --sbom are one file",
    ("--report", "model.onnx"): "model.onnx: --report and the model are one file",
    ("--report", "data.npz", "--data", "data.npz"): "data.npz: --report and --data are one file",
    ("--html", "data.npz", "--data", "."): "data.npz: --html and --data are one file",
    ("--html", "options.toml"): "options.toml: --html and --config are one file",
    ("-o", "options.toml", "--force"): "options.toml: the output and --config are one file",
    ("-o", "data.npz", "--data", ".", "--force"): "data.npz: the output and --data are one file",
}


@pytest.mark.parametrize("arguments", REFUSED, ids=" ".join)
def test_no_file_is_two(source, tmp_path, arguments):
    """Not even under another spelling; nothing is done before that is known."""
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    result = call("guard", source, "--config", "options.toml", *arguments)
    line = one_line(result).removeprefix("flipguard-onnx: ")
    assert line.startswith(REFUSED[arguments])
    assert line.endswith("one file; each needs its own\n")
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def test_the_same_for_the_other_commands(source, tmp_path):
    one = "are one file; each needs its own\n"
    for command in (
        ("inspect", source, "--report", source),
        ("scan", source, "--report", "link/model.onnx"),
        ("verify", source, "out.onnx", "--report", "out.onnx"),
        ("verify", source, "out.onnx", "--data", "data.npz", "--report", "data.npz"),
        ("inspect", source, "--config", "options.toml", "--report", "options.toml"),
    ):
        assert one_line(call(*command)).endswith(one), command
    assert names(tmp_path) == ["data.npz", "link", "model.onnx", "options.toml"]


def test_the_same_for_many_models(source, tmp_path):
    (tmp_path / "in").mkdir()
    save(matmul(), tmp_path / "in", "a.onnx")
    for path in ("OUT/a.flipguard-int8.onnx", "OUT", "in/a.onnx"):
        line = one_line(call("guard", "in", "-o", "OUT", "--report", path, *FAST))
        assert line.startswith(f"flipguard-onnx: {path}: --report and the ")
    assert not (tmp_path / "OUT").exists()
    assert call("guard", "in", "-o", "OUT", "--report", "OUT.json", *FAST).exit_code == 0


def test_streams_may_be_shared(source):
    check_files({"--report": Path(os.devnull), "--html": Path(os.devnull)}, config="/dev/null")
    result = call("guard", source, *FAST, "--html", "/dev/null", "--report", "/dev/null")
    assert result.exit_code == 0, result.output


def test_reports_that_are_there_are_replaced_and_nothing_else(source, tmp_path):
    for name, content in (
        ("old.json", '{\n  "kind": "guard"\n}\n'),
        ("old.html", "<!doctype html>\n"),
        ("old.txt", "input     model.onnx  2.33 MB"),
        ("empty", ""),
    ):
        (tmp_path / name).write_text(content)
        assert call("inspect", source, "--report", name).exit_code == 0
        assert json.loads((tmp_path / name).read_text())["kind"] == "inspect"
    for name, content in (("mine.toml", "include = ['w']"), ("mine.json", '{"a": 1}')):
        (tmp_path / name).write_text(content)
        message = one_line(call("inspect", source, "--report", name))
        assert "exists and is no report" in message
        assert (tmp_path / name).read_text() == content


def test_data_that_are_not_there_are_named_first(source, tmp_path):
    """Whatever is at the output, and although nothing would be run."""
    line = "flipguard-onnx: none.npz: cannot be read: not a regular file, or not there\n"
    (tmp_path / "old.onnx").touch()
    save(matmul(), tmp_path, "other.onnx")
    for command in (
        ("guard", source, "-o", "old.onnx"),
        ("guard", source, "-o", "new.onnx", *FAST),
        ("guard", source, "other.onnx", "-o", "OUT"),
        ("verify", source, "other.onnx"),
    ):
        assert one_line(call(*command, "--data", "none.npz")) == line, command
    assert not (tmp_path / "OUT").exists()
    for run in (
        lambda: guard(source, output="old.onnx", data="none.npz"),
        lambda: guard_many([source], data="none.npz"),
        lambda: verify(source, "other.onnx", data="none.npz"),
    ):
        with pytest.raises(ModelError, match=r"^none\.npz: cannot be read"):
            run()


@pytest.mark.parametrize("option", ["--report", "--html", "--sbom"])
@pytest.mark.parametrize("place", ["/proc/report", "/dev/full"])
def test_no_model_appears_when_a_report_cannot_be_written(source, tmp_path, option, place):
    """Neither where no file can be made, which is seen first, nor where it does not fit."""
    save(matmul(), tmp_path, "old.onnx")
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    for target in (["-o", "new/o.onnx"], ["-o", "old.onnx", "--force"]):
        result = call("guard", source, *target, *FAST, "--quiet", option, place)
        reason = "No space left on device" if place == "/dev/full" else "No such file or directory"
        assert one_line(result) == (
            f"flipguard-onnx: {place}: the report cannot be written: {reason}\n"
        )
        assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before
        assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("place", ["/proc/report", "/dev/full"])
def test_every_command_names_the_report_that_it_cannot_write(source, tmp_path, place):
    other = save(matmul(), tmp_path, "other.onnx")
    for command in (
        ("inspect", source),
        ("scan", source),
        ("verify", source, source),
        ("guard", source, other, "-o", "OUT", *FAST),
    ):
        line = call(*command, "--quiet", "--report", place).stderr.splitlines()[-1]
        assert line.startswith(f"flipguard-onnx: {place}: the report cannot be written: ")
