"""The documentation: it builds, and what it shows is what happens."""

import contextlib
import io
import re
import shutil
import subprocess
import sys
from pathlib import Path

from flipguard_onnx.cli.commands import main
from flipguard_onnx.cli.config_file import configured
from tests.helpers.command import call, one_line
from tests.helpers.samples import matmul, save

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def blocks(page):
    """(language, content) of the fenced blocks of a page, in order."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", (DOCS / page).read_text(), re.M | re.S)


def test_the_pages_build_without_warnings(tmp_path):
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", DOCS, tmp_path]
    built = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert built.returncode == 0, built.stderr
    published = (tmp_path / "report.schema.json").read_text()
    assert published == (ROOT / "flipguard_onnx" / "report.schema.json").read_text()
    assert "Guard a model against" in (tmp_path / "reference.html").read_text()


def test_the_guide_runs_as_written(tmp_path, monkeypatch):
    """Block after block, each printing what stands below it."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "models" / "silero_vad.onnx", tmp_path)
    names, compared = {}, 0
    found = blocks("guide.md")
    for (language, code), (below, wanted) in zip(found, [*found[1:], ("", "")], strict=True):
        if language != "python":
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, "guide.md", "exec"), names)
        if below == "text":
            assert printed.getvalue() == wanted
            compared += 1
    assert compared == 4


def test_the_configuration_that_is_shown(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    [shown] = [code for language, code in blocks("pipelines.md") if language == "toml"]
    [refusal] = [code for language, code in blocks("pipelines.md") if language == "text"]
    Path("flipguard.toml").write_text(shown)
    file, settings = configured(main, "guard", None)
    assert str(file) == "flipguard.toml"
    assert settings == {
        "scheme": "int4",
        "int8": ["lm_head.weight"],
        "max_drift": 2.0,
        "report": "guard.json",
        "sbom": "model.cdx.json",
    }
    Path("flipguard.toml").write_text(shown + "tau = 1\n")
    assert one_line(call("scan", save(matmul(), tmp_path))) == refusal
