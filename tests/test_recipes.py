"""The recipes in examples/, run as they are; what cannot be run says what it lacks."""

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import jsonschema
import onnx
import pytest
import yaml
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from flipguard_onnx import __version__, verify
from tests.helpers.attacked import FOLDER as ATTACKED
from tests.helpers.command import SCHEMA, names
from tests.helpers.samples import matmul, save

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
BIN = Path(sys.executable).parent
WORKFLOW = EXAMPLES / "github-workflow.yml"


def run(*command, code=0, cwd=None, **environment):
    """A command as a person in `cwd` gives it."""
    path = f"{BIN}:{os.environ['PATH']}"
    result = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=os.environ | {"PATH": path} | {k: str(v) for k, v in environment.items()},
        capture_output=True,
        text=True,
    )
    assert result.returncode == code, result.stdout + result.stderr
    return result.stdout + result.stderr


def require_valid(folder, report, bom):
    """The report and the BOM of a guard."""
    jsonschema.Draft202012Validator(SCHEMA).validate(json.loads((folder / report).read_text()))
    validator = JsonStrictValidator(SchemaVersion.V1_6)
    assert validator.validate_str((folder / bom).read_text()) is None


def test_make(tmp_path):
    save(matmul(), tmp_path, "encoder.onnx")
    make = ("make", "-f", EXAMPLES / "Makefile")
    run(*make, "encoder.int8.onnx", "encoder.scan.sarif", cwd=tmp_path)
    assert verify(tmp_path / "encoder.onnx", tmp_path / "encoder.int8.onnx").made_from
    require_valid(tmp_path, "encoder.report.json", "encoder.cdx.json")
    assert json.loads((tmp_path / "encoder.scan.sarif").read_text())["version"] == "2.1.0"
    assert "is up to date" in run(*make, "encoder.int8.onnx", cwd=tmp_path)
    (tmp_path / "broken.onnx").write_text("no model")
    run(*make, "broken.int8.onnx", cwd=tmp_path, code=2)
    assert not (tmp_path / "broken.int8.onnx").exists()


def test_the_workflow_follows_its_schema():
    run("check-jsonschema", "--builtin-schema", "vendor.github-workflows", WORKFLOW)


@pytest.mark.parametrize("name", ["mlp-clean", "mlp-standard-int4"])
def test_the_commands_of_the_workflow(tmp_path, name):
    """A clean model is guarded; of an attacked one the first step fails and leaves its findings."""
    shutil.copy(ATTACKED / f"{name}.onnx", tmp_path / "model.onnx")
    [job] = yaml.safe_load(WORKFLOW.read_text())["jobs"].values()
    install, scan, guard = [step["run"] for step in job["steps"] if "run" in step]
    assert install == "pip install 'flipguard-onnx[cpu,sbom]'"
    shell = ("bash", "--noprofile", "--norc", "-eo", "pipefail", "-c")  # GitHub's
    run(*shell, scan, cwd=tmp_path, code=int(name != "mlp-clean"))
    [sarif] = [s["with"]["sarif_file"] for s in job["steps"] if "sarif" in s.get("uses", "")]
    results = json.loads((tmp_path / sarif).read_text())["runs"][0]["results"]
    assert {r["level"] for r in results} == {"none" if name == "mlp-clean" else "error"}
    if name == "mlp-clean":
        run(*shell, guard, cwd=tmp_path)
        require_valid(tmp_path / "dist", "report.json", "model.cdx.json")
        onnx.checker.check_model(tmp_path / "dist" / "model.int8.onnx")


def git(folder, *command):
    who = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
    return run("git", *who, *command, cwd=folder)


@pytest.mark.skipif(
    not os.environ.get("RECIPES"), reason="takes a minute to build an environment: RECIPES=1"
)
def test_pre_commit(tmp_path):
    """The hook as published, in a repository of its own; its environment comes from PyPI."""
    hooks, project = tmp_path / "hooks", tmp_path / "project"
    files = ("pyproject.toml", "README.md", "LICENSE", ".pre-commit-hooks.yaml")
    shutil.copytree(ROOT / "flipguard_onnx", hooks / "flipguard_onnx")
    for file in files:
        shutil.copy(ROOT / file, hooks)
    project.mkdir()
    for folder in (hooks, project):
        git(folder, "init", "-q")
    git(hooks, "add", "-A")
    git(hooks, "commit", "-qm", "release")
    git(hooks, "tag", f"v{__version__}")
    written = (EXAMPLES / "pre-commit-config.yaml").read_text()
    address = "https://github.com/OWNER/flipguard-onnx"
    assert address in written
    (project / ".pre-commit-config.yaml").write_text(written.replace(address, str(hooks)))
    run("pre-commit", "validate-manifest", ROOT / ".pre-commit-hooks.yaml")

    def commit(code):
        git(project, "add", "-A")
        quick = {"NUMBA_OPT": 0}  # to compile
        home = {"PRE_COMMIT_HOME": tmp_path / "cache"}
        return run("pre-commit", "run", cwd=project, code=code, **home, **quick)

    shutil.copy(ATTACKED / "mlp-clean.onnx", project)
    (project / "mlp-clean.flipguard-int8.onnx").write_text("what guard wrote")
    assert "flipguard-onnx scan" in (passed := commit(0))
    assert passed.splitlines()[-1].endswith("Passed")
    shutil.copy(ATTACKED / "mlp-standard-int4.onnx", project)
    output = commit(1)
    assert "Failed" in output
    assert "scan      aligned, int4" in output


def olive_output(folder):
    """A folder as Olive 0.13 leaves it, with a model that has external data."""
    folder.mkdir()
    save(matmul(), folder, external=True)
    config = {"type": "onnxmodel", "config": {"model_path": str(folder / "model.onnx")}}
    (folder / "model_config.json").write_text(json.dumps(config))
    for name in ("footprint.json", "output_footprint.json", "run_history.txt", "tokenizer.json"):
        (folder / name).write_text("{}")


def test_after_olive(tmp_path):
    """On a folder of Olive's layout: olive-ai itself needs torch."""
    olive_output(tmp_path / "olive")
    run(sys.executable, EXAMPLES / "after_olive.py", "olive", "guarded", cwd=tmp_path)
    written = [name for name in names(tmp_path / "guarded") if not name.endswith(".data")]
    assert written == ["model.onnx", "model_config.json", "tokenizer.json"]
    config = json.loads((tmp_path / "guarded" / "model_config.json").read_text())
    model = config["config"]["model_path"]
    assert model == str(tmp_path / "guarded" / "model.onnx")
    assert verify(tmp_path / "olive" / "model.onnx", model).made_from


@pytest.mark.skipif(not find_spec("olive"), reason="needs olive-ai, and with it torch")
def test_after_olive_itself(tmp_path):
    workflow = {
        "input_model": {"type": "ONNXModel", "model_path": str(ATTACKED / "mlp-clean.onnx")},
        "passes": {"peephole": {"type": "OnnxPeepholeOptimizer"}},
        "output_dir": "olive",
        "cache_dir": "cache",
    }
    (tmp_path / "workflow.json").write_text(json.dumps(workflow))
    olive = (sys.executable, "-m", "olive", "run", "--config", "workflow.json")
    run(*olive, cwd=tmp_path, OLIVE_DISABLE_TELEMETRY=1)
    run(sys.executable, EXAMPLES / "after_olive.py", "olive", "guarded", cwd=tmp_path)
    assert names(tmp_path / "guarded") == ["model.onnx", "model_config.json"]
    assert str(tmp_path / "olive") not in (tmp_path / "guarded" / "model_config.json").read_text()
    assert verify(tmp_path / "olive" / "model.onnx", tmp_path / "guarded" / "model.onnx").made_from


MISSING = [name for name in ("torch", "onnxscript") if not find_spec(name)]


@pytest.mark.skipif(bool(MISSING), reason=f"needs {' and '.join(MISSING)}")
def test_after_torch(tmp_path):
    output = run(sys.executable, EXAMPLES / "after_torch.py", cwd=tmp_path)
    assert "2 tensors" in output
    assert names(tmp_path) == ["module.int8.onnx"]
    onnx.checker.check_model(tmp_path / "module.int8.onnx")


@pytest.mark.skipif(not shutil.which("openssl"), reason="needs openssl")
def test_signing(tmp_path):
    """As written; afterwards no change to the folder goes unnoticed."""
    save(matmul(), tmp_path, external=True)
    run("sh", EXAMPLES / "sign.sh", cwd=tmp_path)
    dist = tmp_path / "dist"
    assert len(names(dist)) == 3
    check = (EXAMPLES / "sign.sh").read_text().splitlines()[-1]
    run("sh", "-c", check, cwd=tmp_path)
    [data] = dist.glob("*.data")
    content = data.read_bytes()
    data.write_bytes(content[:-1] + b"x")
    run("sh", "-c", check, cwd=tmp_path, code=1)
    data.write_bytes(content)
    (dist / "new").touch()
    run("sh", "-c", check, cwd=tmp_path, code=1)
    (dist / "new").unlink()
    (dist / "model.cdx.json").unlink()
    run("sh", "-c", check, cwd=tmp_path, code=1)
