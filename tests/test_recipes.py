"""The recipes in examples/, run as they are; what cannot be run says what it lacks."""

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import jsonschema
import numpy as np
import onnx
import pytest
import yaml
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from onnxruntime.quantization import QuantType
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

from flipguard_onnx import __version__, verify
from tests.helpers.attacked import FOLDER as ATTACKED
from tests.helpers.command import SCHEMA, names
from tests.helpers.others import drawn, eight_bits
from tests.helpers.samples import matmul, save

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
EXPORTS = ROOT / "models" / "exports"
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


def program(name, package):
    """A mark for tests that run another tool, which may be in an environment of its own."""
    path = f"{BIN}:{os.environ['PATH']}"
    reason = f"needs {name} on the PATH: pip install {package}, which brings torch"
    return pytest.mark.skipif(not shutil.which(name, path=path), reason=reason)


def example(name):
    """The commands of a script."""
    return (EXAMPLES / name).read_text()


def guards(script):
    """The lines of a script that call the guard, as a script."""
    lines = [line for line in script.splitlines() if line.startswith(("flipguard-onnx", "cd "))]
    return "\n".join(["set -e", *lines])


def types(path):
    return {node.op_type for node in onnx.load(path).graph.node}


@program("olive", "olive-ai")
def test_before_olive(tmp_path):
    """Its codes are those that were drawn: tests/pipeline/test_other_quantizers.py."""
    shutil.copy(EXPORTS / "optimum" / "model.onnx", tmp_path / "float.onnx")
    shutil.copy(EXAMPLES / "before_olive.json", tmp_path)
    run("sh", "-c", example("before_olive.sh"), cwd=tmp_path, OLIVE_DISABLE_TELEMETRY=1)
    found, moved = (tmp_path / name for name in ("quantized/model.onnx", "moved.onnx"))
    assert "MatMulNBits" in types(found)
    assert "GatherBlockQuantized" not in types(found)  # the table stays a float
    given = MatMulNBitsQuantizer(str(moved), block_size=128, is_symmetric=True)
    given.process()
    wanted = {t.name: t.raw_data for t in given.model.model.graph.initializer}
    codes = {t.name: t.raw_data for t in onnx.load(found).graph.initializer if "_Q4" in t.name}
    assert len(codes) == 15
    assert codes.items() <= wanted.items()


@program("optimum-cli", "'optimum-onnx[onnxruntime]'")
def test_before_optimum(tmp_path):
    shutil.copytree(EXPORTS / "optimum", tmp_path / "float")
    run("sh", "-c", example("before_optimum.sh"), cwd=tmp_path)
    assert (tmp_path / "quantized" / "config.json").exists()
    found = drawn(onnx.load(tmp_path / "quantized" / "model_quantized.onnx"))
    moved = tmp_path / "moved" / "model.onnx"
    wanted = eight_bits(moved, QuantType.QInt8, WeightSymmetric=True)
    assert found.keys() == wanted.keys()
    assert all(np.array_equal(codes, wanted[name]) for name, codes in found.items())


def test_the_commands_before_optimum(tmp_path):
    """Without Optimum: both leave a folder that can be quantized in the float one's place."""
    shutil.copytree(EXPORTS / "optimum", tmp_path / "float")
    run("sh", "-c", guards(example("before_optimum.sh")), cwd=tmp_path)
    assert set(names(tmp_path / "moved")) == set(names(tmp_path / "float"))
    before, half, after = (
        {t.name: t.raw_data for t in onnx.load(tmp_path / name / "model.onnx").graph.initializer}
        for name in ("float", "matrices", "moved")
    )
    [table] = [name for name in after if after[name] != half[name]]
    assert table == "model.embed_tokens.weight"
    assert half[table] == before[table]
    assert sum(half[name] != before[name] for name in before) == 15


def generated(folder):
    """Twelve tokens by onnxruntime-genai."""
    genai = pytest.importorskip("onnxruntime_genai", reason="needs onnxruntime-genai")
    model = genai.Model(str(folder))
    settings = genai.GeneratorParams(model)
    settings.set_search_options(max_length=12)
    generator = genai.Generator(model, settings)
    generator.append_tokens(genai.Tokenizer(model).encode("def "))
    while not generator.is_done():
        generator.generate_next_token()
    return generator.get_sequence(0)


def test_the_command_after_genai(tmp_path):
    """What is written is loaded in the place of the builder's folder."""
    shutil.copytree(EXPORTS / "genai", tmp_path / "float")
    run("sh", "-c", guards(example("after_genai.sh")), cwd=tmp_path)
    assert "MatMulNBits" in types(tmp_path / "guarded" / "model.onnx")
    before, after = generated(tmp_path / "float"), generated(tmp_path / "guarded")
    assert len(after) == 12
    assert list(after[:3]) == list(before[:3])  # the prompt
    refused = run("flipguard-onnx", "guarded/model.onnx", cwd=tmp_path, code=2)
    assert "already quantized" in refused


BUILDER = [n for n in ("onnxruntime_genai", "torch", "transformers") if not find_spec(n)]


@pytest.fixture
def checkpoint(tmp_path):
    """A tiny Llama with random weights, as transformers saves it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**json.loads((EXPORTS / "optimum" / "config.json").read_text()))
    LlamaForCausalLM(config).save_pretrained(tmp_path / "checkpoint")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EXPORTS / "optimum" / name, tmp_path / "checkpoint")


@pytest.mark.skipif(bool(BUILDER), reason=f"needs {', '.join(BUILDER)}")
def test_after_genai(checkpoint, tmp_path):
    run("sh", "-c", example("after_genai.sh"), cwd=tmp_path)
    assert len(generated(tmp_path / "guarded")) == 12


LOAD = """
from optimum.onnxruntime import ORTModelForCausalLM
import torch

for folder in ("float", "guarded"):
    model = ORTModelForCausalLM.from_pretrained(folder)
    found = model.generate(torch.tensor([[5, 6, 7]]), max_length=12, min_length=12, do_sample=False)
    print(found.tolist()[0])
"""


@program("optimum-cli", "'optimum-onnx[onnxruntime]'")
@pytest.mark.skipif(bool(BUILDER), reason=f"needs {', '.join(BUILDER)}")
def test_after_optimum(checkpoint, tmp_path):
    """What is written is loaded in the place of Optimum's folder."""
    run("sh", "-c", example("after_optimum.sh"), cwd=tmp_path)
    assert names(tmp_path / "guarded") == names(tmp_path / "float")
    assert verify(*(tmp_path / name / "model.onnx" for name in ("float", "guarded"))).made_from
    python = Path(shutil.which("optimum-cli")).parent / "python"
    said = run(python, "-c", LOAD, cwd=tmp_path).splitlines()
    before, after = (json.loads(line) for line in said if line.startswith("["))
    assert len(after) == 12
    assert after[:3] == before[:3]  # the prompt


@pytest.fixture
def repository(tmp_path):
    """As transformers.js lays it out, with what the commands of its recipe write."""
    folder = tmp_path / "models" / "decoder"
    shutil.copytree(EXPORTS / "optimum", folder)
    (folder / "onnx").mkdir()
    (folder / "model.onnx").rename(folder / "onnx" / "model.onnx")
    run("sh", "-c", example("transformers_js.sh"), cwd=tmp_path)
    return tmp_path


def test_the_files_of_transformers_js(repository):
    folder = repository / "models" / "decoder" / "onnx"
    assert names(folder) == ["model.onnx", "model_q4.onnx", "model_quantized.onnx"]  # no .data
    for name in ("model_q4.onnx", "model_quantized.onnx"):
        assert "MatMulNBits" in types(folder / name)
        assert verify(folder / "model.onnx", folder / name).made_from


MODULES = ROOT / "node_modules"


@pytest.mark.skipif(
    not (shutil.which("node") and (MODULES / "@huggingface" / "transformers").exists()),
    reason="needs node, and in the repository's root "
    "npm install --no-save --ignore-scripts @huggingface/transformers",
)
def test_transformers_js_loads_them(repository):
    (repository / "node_modules").symlink_to(MODULES)
    (repository / "load.mjs").write_text(example("transformers_js.mjs"))
    said = run("node", "load.mjs", cwd=repository).splitlines()
    assert [line.split()[:2] for line in said] == [["q4", '"def'], ["q8", '"def']]
    assert min(map(len, said)) > 20


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
