"""Options from flipguard.toml and pyproject.toml: which file counts, what wins, what is refused."""

import json
import os

import pytest

from flipguard_onnx.cli.commands import main
from flipguard_onnx.cli.config_file import configured
from tests.helpers.command import call, names, one_line
from tests.helpers.samples import matmul, save

FAST = ("--no-validate", "--preserve", "off")


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return save(matmul(), tmp_path)


def report(tmp_path, *command):
    result = call(*command, "--report", tmp_path / "r.json")
    assert result.exit_code == 0, result.output
    return result.stdout, json.loads((tmp_path / "r.json").read_text())


def test_a_file_gives_options_and_the_report_names_it(source, tmp_path):
    (tmp_path / "flipguard.toml").write_text(
        'scheme = "nf4"\nno-validate = true\npreserve = "off"\ninclude = ["w", "[vw]"]\n'
        '[guard]\nblock-size = 32\n[inspect]\nblock-size = 128\n[scan]\nfail-on = "never"\n'
    )
    text, found = report(tmp_path, source)
    assert text.startswith("config    flipguard.toml\ninput     ")
    assert found["config"] == "flipguard.toml"
    assert (found["scheme"], found["block_size"], found["validation"]) == ("nf4", 32, None)
    for command in (
        ("inspect", source),
        ("scan", source, "--format", "json"),
        ("guard", source.parent, "-o", tmp_path / "out"),
    ):
        text, found = report(tmp_path, *command)
        assert text.startswith("config    flipguard.toml\n")
        assert found["config"] == "flipguard.toml"
    assert configured(main, "guard", None)[1]["block_size"] == 32
    assert configured(main, "inspect", None)[1]["block_size"] == 128
    assert configured(main, "inspect", None)[1]["include"] == ["w", "[vw]"]
    assert configured(main, "scan", None)[1]["fail_on"] == "never"


def test_flags_win(source, tmp_path):
    (tmp_path / "flipguard.toml").write_text('scheme = "nf4"\ninclude = ["v"]\n[guard]\ntau = 0.5')
    assert "include pattern 'v' names no tensor" in one_line(call(source, *FAST))
    flags = ("--scheme", "int4", "--tau", "1", "--include", "w", *FAST)
    _, found = report(tmp_path, "guard", source, *flags)
    assert (found["scheme"], found["tau"]) == ("int4", 1.0)


def test_which_file_counts(source, tmp_path):
    """Nothing; pyproject.toml where it has our table; flipguard.toml before it; --config."""
    assert report(tmp_path, "inspect", source)[1]["config"] is None
    project = tmp_path / "pyproject.toml"
    project.write_text("[project]\nname = 'x'\n[tool.ruff]\nline-length = 100\n")
    assert report(tmp_path, "inspect", source)[1]["config"] is None
    project.write_text("[tool.flipguard-onnx]\nscheme = 'fp4'\n")
    _, found = report(tmp_path, "inspect", source)
    assert (found["config"], found["scheme"]) == ("pyproject.toml", "fp4")
    (tmp_path / "flipguard.toml").touch()
    _, found = report(tmp_path, "inspect", source)
    assert (found["config"], found["scheme"]) == ("flipguard.toml", "int8")
    _, found = report(tmp_path, "inspect", source, "--config", project)
    assert (found["config"], found["scheme"]) == (str(project), "fp4")
    other = tmp_path / "other.toml"
    other.write_text("scheme = 'int4'")
    _, found = report(tmp_path, "--config", other, source, *FAST)
    assert (found["config"], found["scheme"]) == (str(other), "int4")
    text, _ = report(tmp_path, "inspect", source, "--config", os.devnull)
    assert text.startswith("config    /dev/null\n")


REFUSED = {
    "scheme = 'int3'": "scheme: 'int3' is not one of 'int8', 'uint8', 'int4', ",
    "Scheme = 'int4'": "Scheme is unknown; allowed: ",
    "max_drift = 2": "max_drift is unknown; allowed: ",
    "help = true": "help is unknown; allowed: ",
    "config = 'x.toml'": "config is unknown; allowed: ",
    "models = ['x.onnx']": "models is unknown; allowed: ",
    "seed = 1": "seed comes from no file: who knows it can prepare a model",
    "max-drift = '2'": "max-drift is '2'; allowed: a number",
    "max-drift = true": "max-drift is True; allowed: a number",
    "max-drift = 0": "max-drift: 0.0 is not in the range x>0.",
    "jobs = 1.5": "jobs is 1.5; allowed: an integer",
    "jobs = 0": "jobs: 0 is not in the range x>=1.",
    "force = 1": "force is 1; allowed: true or false",
    "force = 'yes'": "force is 'yes'; allowed: true or false",
    "output = 3": "output is 3; allowed: a string",
    "output = {a = 1}": "output is {'a': 1}; allowed: a string",
    "include = 'w'": "include is 'w'; allowed: a list of strings",
    "include = ['w', 1]": "include is ['w', 1]; allowed: a list of strings",
    "scheme = ['int4']": "scheme is ['int4']; allowed: a string",
    "guard = 'int4'": "guard is 'int4'; allowed: a table",
    "[scan]\ntau = 1": "scan.tau is unknown; allowed: fail-on, format, quiet, report",
    "[scan]\nformat = 'pdf'": "scan.format: 'pdf' is not one of 'text', 'json', 'sarif', 'html'.",
    "[tool.flipguard-onnx]\nscheme = 'int4'": "tool is unknown; allowed: ",
    "scheme": "is no TOML: ",
    "\0": "is no TOML: ",
    "jobs = " + 9999 * "[": "is no TOML: ",
    'output = ["\\u001b[2J"]': r"output is ['\x1b[2J']; allowed: a string",
}


@pytest.mark.parametrize("content", REFUSED, ids=lambda content: content[:30])
def test_what_is_refused(source, tmp_path, content):
    """In whatever table, whichever command runs; nothing is written."""
    (tmp_path / "flipguard.toml").write_text(content)
    for command in ("guard", "inspect"):
        message = one_line(call(command, source))
        assert message.startswith(f"flipguard-onnx: flipguard.toml: {REFUSED[content]}"), message
    assert names(tmp_path) == ["flipguard.toml", "model.onnx"]


def test_files_that_cannot_be_read(source, tmp_path):
    message = one_line(call("inspect", source, "--config", "none.toml"))
    assert message == "flipguard-onnx: none.toml: cannot be read: No such file or directory\n"
    assert "Is a directory" in one_line(call("inspect", source, "--config", tmp_path))
    (tmp_path / "flipguard.toml").write_bytes(b"scheme = '\xff'")
    assert "flipguard.toml: is no TOML: 'utf-8' codec" in one_line(call("inspect", source))
    project = tmp_path / "pyproject.toml"
    for content, key in (("tool = 1", "tool"), ("[tool]\nflipguard-onnx = 1", "flipguard-onnx")):
        project.write_text(content)
        message = one_line(call("inspect", source, "--config", project))
        assert message.endswith(f"pyproject.toml: {key} is 1; allowed: a table\n")
