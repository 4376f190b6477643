"""Paths: what no output replaces, names that are hard to spell, folders without permission."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

from flipguard_onnx import ModelError, guard, inspect
from tests.helpers.command import call, names, one_line
from tests.helpers.samples import matmul, save, weights

PLAIN = ("--no-validate", "--preserve", "off", "--quiet")


@pytest.fixture
def source(tmp_path):
    return save(matmul(), tmp_path)


def spellings(source):
    """The same file under other names."""
    folder = source.parent
    (folder / "link.onnx").symlink_to(source)
    (folder / "hard.onnx").hardlink_to(source)
    (folder / "folder").symlink_to(folder)
    yield source
    yield folder / "link.onnx"
    yield folder / "hard.onnx"
    yield folder / "folder" / source.name
    yield folder / "folder" / ".." / folder.name / source.name
    yield Path(os.path.relpath(source))


def test_the_output_is_never_the_input(source):
    content = source.read_bytes()
    for output in spellings(source):
        message = one_line(call("guard", source, "-o", output, "--force", *PLAIN))
        assert message.endswith(": belongs to the input; the output needs another name\n")
        message = one_line(call("guard", output, "-o", source, "--force", *PLAIN))
        assert message.endswith(": belongs to the input; the output needs another name\n")
        assert source.read_bytes() == content
    assert names(source.parent) == ["folder", "hard.onnx", "link.onnx", "model.onnx"]


def test_a_report_is_never_the_input(source):
    content = source.read_bytes()
    for report in spellings(source):
        for command in (["guard", source, *PLAIN], ["inspect", source], ["scan", source]):
            message = one_line(call(*command, "--report", report))
            assert message.endswith(": --report and the model are one file; each needs its own\n")
        assert source.read_bytes() == content
    report = source.with_name("r.json")
    report.symlink_to(source.with_name("nothing"))
    assert "r.json: is a link" in one_line(call("inspect", source, "--report", report))
    report.unlink()
    for _ in range(2):
        assert call("inspect", source, "--report", report).exit_code == 0
    assert json.loads(report.read_text())["input"] == str(source)


def test_a_report_goes_into_a_pipe(source):
    command = [sys.executable, "-m", "flipguard_onnx", "inspect", source, "--quiet"]
    done = subprocess.run([*command, "--report", "/dev/stdout"], capture_output=True, check=True)
    assert json.loads(done.stdout)["input"] == str(source)


def test_case_is_what_the_file_system_makes_of_it(source):
    content = source.read_bytes()
    other = source.with_name("MODEL.onnx")
    same = other.exists()
    result = call("guard", source, "-o", other, "--force", *PLAIN)
    assert result.exit_code == (2 if same else 0)
    assert source.read_bytes() == content


def test_what_is_no_regular_file_is_no_output(source, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for output in (tmp_path / "pipe", tmp_path / "folder", Path("/dev/null")):
        message = one_line(call("guard", source, "-o", output, "--force", *PLAIN))
        assert message.endswith(f"{output}: is no regular file; the output needs another name\n")
    assert not Path("/dev/null").is_file()


def test_an_output_follows_no_link_out_of_its_folder(source, tmp_path):
    (tmp_path / "out").mkdir()
    outside = tmp_path / "outside.txt"
    outside.write_text("mine")
    for link, target in (("a.onnx", outside), ("b.onnx", tmp_path / "nothing")):
        output = tmp_path / "out" / link
        output.symlink_to(target)
        assert "exists already" in one_line(call("guard", source, "-o", output, *PLAIN))
        assert call("guard", source, "-o", output, "--force", *PLAIN).exit_code == 0
        assert not output.is_symlink()
    assert outside.read_text() == "mine"
    assert not (tmp_path / "nothing").exists()


def test_nothing_is_left_elsewhere_and_nothing_reported(source, tmp_path):
    """onnxruntime collects reports to its maker in the cache folder, and sends them later."""
    places = {name: tmp_path / name for name in ("HOME", "XDG_CACHE_HOME", "TMPDIR")}
    for folder in places.values():
        folder.mkdir()
    kernels = places["XDG_CACHE_HOME"] / "flipguard-onnx"
    kept = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flipguard-onnx"
    if kept.is_dir():
        shutil.copytree(kept, kernels)  # compiling them takes long
    output = source.with_name("guarded.onnx")
    command = [sys.executable, "-P", "-m", "flipguard_onnx", source, "-o", output, "--quiet"]
    environment = {"PATH": os.defpath, **{name: str(path) for name, path in places.items()}}
    if "PYTHONPATH" in os.environ:
        environment["PYTHONPATH"] = os.environ["PYTHONPATH"]
    subprocess.run(command, env=environment, check=True, cwd=Path(__file__).parents[1])
    assert output.exists()
    found = [path.relative_to(tmp_path) for place in places.values() for path in place.iterdir()]
    assert found == [kernels.relative_to(tmp_path)]


HARD = [
    "mit Leerzeichen",
    "模型 é",
    "-m",
    "--force",
    "a'b\"c",
    "[abc]",
    "*",
    "new\nline",
    "nul\x7f",
]


def test_names_that_are_hard_to_spell(tmp_path, monkeypatch):
    """All that a file may be called, as input, output, folder and report; with external data."""
    monkeypatch.chdir(tmp_path)
    for stem in HARD:
        folder, name = Path(stem), f"{stem}.onnx"
        folder.mkdir()
        save(matmul(), folder, name, external=True)
        options = ("--report", f"{stem}.json", "-o", f"{stem}/{stem}-o", "--preserve", "off")
        result = call("guard", *options, "--", folder / name)
        assert result.exit_code == 0, result.output
        report = json.loads((tmp_path / f"{stem}.json").read_text())
        assert report["input"] == f"{stem}/{name}"
        assert report["validation"]["feeds"] == 8
        assert list(report["outputs"]) == [f"{stem}/{stem}-o"]
        assert sorted(p.suffix for p in folder.iterdir()) == ["", ".data", ".data", ".onnx"]
    result = call("guard", "-o", "-o", *PLAIN, "--", *HARD)
    assert result.exit_code == 0, result.output
    wanted = {f"{stem}.flipguard-int8.onnx" for stem in HARD}
    assert {p.name for p in (tmp_path / "-o").iterdir() if p.suffix == ".onnx"} == wanted


def test_a_leading_dash_needs_the_usual_care_and_no_more(source, monkeypatch):
    monkeypatch.chdir(source.parent)
    source.rename("-m.onnx")
    assert call("./-m.onnx", *PLAIN).exit_code == 0
    assert call(*PLAIN, "-o", "-o.onnx", "--", "-m.onnx").exit_code == 0
    assert names(source.parent) == ["-m.flipguard-int8.onnx", "-m.onnx", "-o.onnx"]


def test_a_name_that_is_not_utf8(tmp_path):
    """onnxruntime opens no such path: refused in one line, or guarded without it."""
    path = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.onnx")
    source = save(matmul(), tmp_path).rename(path)
    message = one_line(call("guard", source, "--quiet"))
    assert "\\udcff.onnx: onnxruntime opens no path that is not UTF-8" in message
    assert "is not UTF-8" in one_line(call("guard", source, "--no-validate", "--quiet"))
    good = save(matmul(), tmp_path)
    output = os.fsdecode(os.fsencode(tmp_path) + b"/out\xfe.onnx")
    assert "out\\udcfe.onnx: onnxruntime" in one_line(call("guard", good, "-o", output))
    assert names(tmp_path) == ["model.onnx", "\udcff.onnx"]
    result = call("guard", source, *PLAIN[:-1], "--report", tmp_path / "r.json")
    assert result.exit_code == 0
    assert "\\udcff.flipguard-int8.onnx" in result.stdout
    assert json.loads((tmp_path / "r.json").read_text())["input"] == str(source)
    assert inspect(source).input == str(source)
    (tmp_path / "in").mkdir()
    external = save(matmul(), tmp_path / "in", external=True)
    message = one_line(call("guard", external, "-o", output, *PLAIN))
    assert message.endswith("out\\udcfe.onnx: a model with a data file needs a name in UTF-8\n")
    assert not Path(output).exists()


def test_a_name_that_is_too_long(source, tmp_path):
    output = tmp_path / ("n" * 300 + ".onnx")
    message = one_line(call("guard", source, "-o", output, *PLAIN))
    assert message.endswith("cannot be written: File name too long\n")
    (tmp_path / "in").mkdir()
    external = save(matmul(), tmp_path / "in", external=True)
    output = tmp_path / ("n" * 240 + ".onnx")  # with its digest the data file's name is too long
    message = one_line(call("guard", external, "-o", output, *PLAIN))
    assert message.endswith("cannot be written: File name too long\n")
    assert names(tmp_path) == ["in", "model.onnx"]


def test_given_inputs_are_not_overwritten(source, tmp_path):
    np.savez(tmp_path / "x.npz", x=weights((5, 2, 70), 3))
    content = (tmp_path / "x.npz").read_bytes()
    result = call(
        "guard", source, "--data", tmp_path / "x.npz", "-o", tmp_path / "x.npz", "--force"
    )
    assert "x.npz: the output and --data are one file" in one_line(result)
    with pytest.raises(ModelError, match=r"x\.npz: belongs to the input"):
        guard(source, data=tmp_path, output=tmp_path / "x.npz", force=True)
    assert (tmp_path / "x.npz").read_bytes() == content


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody without permission")
def test_no_permission(source):
    """As nobody, in a folder that is root's, of a file that is root's, below a folder that is."""
    folder = Path(tempfile.mkdtemp())
    try:
        folder.chmod(0o755)
        model = Path(shutil.copy(source, folder))
        closed = folder / "closed"
        closed.mkdir(mode=0o700)
        shutil.copy(source, closed)
        os.seteuid(65534)
        try:
            assert one_line(call("guard", model, *PLAIN)).endswith(
                f"{folder}: cannot be written: Permission denied\n"
            )
            message = one_line(call("guard", model, "-o", closed / "out.onnx", *PLAIN))
            assert message.endswith(f"{closed}/out.onnx: cannot be written: Permission denied\n")
            assert "Permission denied" in one_line(call("inspect", closed / "model.onnx"))
            report = call("inspect", model, "--report", folder / "r.json")
            assert "the report cannot be written there" in one_line(report)
            assert one_line(call("guard", folder, *PLAIN)).endswith(
                f"{closed}: cannot be searched: Permission denied\n"
            )
            many = call("guard", model, "other.onnx", "-o", folder / "out", *PLAIN)
            assert "cannot be made: Permission denied" in one_line(many)
        finally:
            os.seteuid(0)
        assert names(folder) == ["closed", "model.onnx"]
        assert names(closed) == ["model.onnx"]
        model.chmod(0o600)
        os.seteuid(65534)
        try:
            assert "cannot be read: Permission denied" in one_line(call("guard", model, *PLAIN))
        finally:
            os.seteuid(0)
    finally:
        shutil.rmtree(folder)


def test_an_output_in_a_folder_that_is_not_there(source, tmp_path):
    output = tmp_path / "new" / "folder" / "out.onnx"
    failed = call("guard", source, "-o", output, "--max-drift", "0.001", "--quiet")
    assert "drift" in one_line(failed, 1)
    message = one_line(call("guard", source, "-o", source / "out.onnx", *PLAIN))
    assert message.endswith("model.onnx: cannot be made: File exists\n")
    assert names(tmp_path) == ["model.onnx"], "a run that fails leaves nothing"
    assert call("guard", source, "-o", output, *PLAIN).exit_code == 0
    assert names(output.parent) == ["out.onnx"]
    with pytest.raises(ModelError, match="no such folder to write to"):
        guard(source, output=tmp_path / "none" / "out.onnx", validate=False)


def test_a_relative_output_is_relative_to_where_one_is(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert list(guard("model.onnx", output="out.onnx", validate=False).outputs) == ["out.onnx"]
    assert names(tmp_path) == ["model.onnx", "out.onnx"]
