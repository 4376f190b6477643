"""The ML-BOM: valid, complete, the same for the same run, and only beside a model that passed."""

import hashlib
import json
import os
import re
import sys

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from tests.helpers.command import call, names, one_line
from tests.helpers.samples import SAMPLES, matmul, save


def sha256(path):
    return {"alg": "SHA-256", "content": hashlib.sha256(path.read_bytes()).hexdigest()}


def guarded(source, *options):
    result = call(source, "--sbom", source.with_name("bom.json"), "--seed", 1, *options)
    assert result.exit_code == 0, result.output
    text = source.with_name("bom.json").read_text()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    return json.loads(text)


def test_what_was_written_from_what_by_whom(tmp_path):
    source = save(SAMPLES["nested"](), tmp_path, external=True)
    bom = guarded(source, "--emit", "both", "--report", tmp_path / "r.json")
    report = json.loads((tmp_path / "r.json").read_text())
    subject, moved = bom["metadata"]["component"], bom["components"][0]
    for model, name in ((subject, "-int8.onnx"), (moved, "-int8-float.onnx")):
        assert model["type"] == "machine-learning-model"
        assert model["name"] == f"model.flipguard{name}"
        [data] = model["components"]
        [ancestor] = model["pedigree"]["ancestors"]
        for component in (model, data, ancestor, *ancestor["components"]):
            assert component["hashes"] == [sha256(tmp_path / component["name"])]
        assert ancestor["name"] == "model.onnx"
        assert ancestor["type"] == "machine-learning-model"
        [part] = ancestor["components"]
        assert part["name"] == "model.onnx.data"
    files = {path: sha256(tmp_path / path)["content"] for path in report["outputs_sha256"]}
    assert report["outputs_sha256"] == files
    assert len(files) == 4
    references = re.findall('"bom-ref": (.*)', (tmp_path / "bom.json").read_text())
    assert len(references) == len(set(references)) == 5
    [tool] = bom["metadata"]["tools"]["components"]
    assert (tool["name"], tool["version"]) == ("flipguard-onnx", report["version"])
    found = {item["name"]: item["value"] for item in subject["properties"]}
    assert found["flipguard:seed"] == "1"
    assert found["flipguard:scheme"] == "int8"
    assert found["flipguard:input_sha256"] == report["input_sha256"]
    assert found["flipguard:scan"] == report["scan"]["verdict"]["level"]
    [drift] = report["validation"]["guarded_exact"]
    [plain] = report["validation"]["plain_exact"]
    assert found["flipguard:drift"] == f"{drift['relative_l2']:.6g}"
    assert found["flipguard:drift_plain"] == f"{plain['relative_l2']:.6g}"


def test_the_same_run_gives_the_same_bom(tmp_path):
    """In another folder, at another time; and another run another one."""
    folders = [tmp_path / name for name in "abc"]
    for folder in folders:
        folder.mkdir()
    sources = [save(matmul(), folder) for folder in folders]
    first, second = (guarded(source, "--preserve", "off") for source in sources[:2])
    assert first == second
    other = guarded(sources[2], "--preserve", "off", "--tau", 0.5)
    assert other["serialNumber"] != first["serialNumber"]
    assert not any("BomRef." in (folder / "bom.json").read_text() for folder in folders)
    unchecked = guarded(sources[0], "--no-validate", "--force")
    found = {p["name"]: p["value"] for p in unchecked["metadata"]["component"]["properties"]}
    assert found["flipguard:drift"] == "not validated"


@pytest.mark.parametrize("name", ['w"<b>\x1b[2J\n', "模型 é", "a b"])
def test_names_are_data(tmp_path, name):
    bom = guarded(save(matmul(), tmp_path, f"{name}.onnx"), "--no-validate", "--preserve", "off")
    assert bom["metadata"]["component"]["name"] == f"{name}.flipguard-int8.onnx"


def test_a_name_that_is_not_utf8(tmp_path):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.onnx")
    bom = guarded(save(matmul(), tmp_path).rename(path), "--no-validate", "--preserve", "off")
    [ancestor] = bom["metadata"]["component"]["pedigree"]["ancestors"]
    assert ancestor["name"] == "\udcff.onnx"


def test_a_run_that_fails_leaves_none(tmp_path):
    source = save(SAMPLES["nested"](), tmp_path)
    command = (source, "--sbom", tmp_path / "b.json", "--quiet")
    message = one_line(call(*command, "--max-drift", 0.001), 1)
    assert "the outputs drift by" in message
    assert names(tmp_path) == ["model.onnx"]


def test_what_is_asked_for_in_vain(tmp_path, monkeypatch):
    source = save(matmul(), tmp_path)
    assert "for one model" in one_line(call(tmp_path, "--sbom", tmp_path / "b.json"))
    assert "--sbom and the model are one file" in one_line(call(source, "--sbom", source))
    monkeypatch.delitem(sys.modules, "flipguard_onnx.reports.sbom", raising=False)
    monkeypatch.setitem(sys.modules, "cyclonedx.model", None)
    message = one_line(call(source, "--sbom", tmp_path / "b.json"))
    assert message.endswith("not installed: pip install 'cyclonedx-python-lib>=11'\n")
    assert names(tmp_path) == ["model.onnx"]
