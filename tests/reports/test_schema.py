"""The JSON reports and their published schema; `call` validates those of all tests."""

import json

import numpy as np
import pytest
from onnx import numpy_helper

from tests.helpers.command import VALIDATOR, call
from tests.helpers.samples import SAMPLES, matmul, save


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """One of every kind, of the richest sort, as the command line writes them."""
    folder = tmp_path_factory.mktemp("reports")
    source = save(SAMPLES["nested"](), folder, external=True)
    (folder / "bad.onnx").write_text("no model")
    guarded, report = folder / "out.onnx", folder / "r.json"
    commands = {
        "guard": (source, "--scheme", "int4", "-o", guarded, "--emit", "both"),
        "guard_many": (source, folder / "bad.onnx", "-o", folder / "many"),
        "inspect": ("inspect", source),
        "verify": ("verify", source, guarded),
        "scan": ("scan", source, "--format", "json"),
    }
    found = {}
    for kind, command in commands.items():
        result = call(*command, "--report", report)
        assert result.exit_code == (2 if kind == "guard_many" else 0), result.output
        found[kind] = json.loads(report.read_text())
    return found


def test_every_kind_of_report_follows_it(reports):
    for kind, report in reports.items():
        VALIDATOR.validate(report)
        assert (report["kind"], report["format_version"]) == (kind, 1)
    assert reports["guard"]["scan"]["kind"] == "scan"
    good, bad = sorted(reports["guard_many"]["models"], key=lambda model: model["code"])
    assert good["report"]["kind"] == "guard"
    assert bad["report"] is None


def test_it_is_strict(reports):
    """A field more, a field less, another type: refused, at every depth."""

    def objects(value):
        if isinstance(value, dict):
            yield value
        if isinstance(value, dict):  # options may hold anything
            value = [item for key, item in value.items() if key != "options"]
        else:
            value = value[:1]
        for item in value:
            if isinstance(item, dict | list):
                yield from objects(item)

    for report in reports.values():
        for place in objects(report):
            if not place or any("." in key for key in place):  # file names
                continue
            place["more"] = 1
            assert not VALIDATOR.is_valid(report)
            del place["more"]
            name, value = place.popitem()
            assert not VALIDATOR.is_valid(report)
            place[name] = {"of another type": 1}
            assert not VALIDATOR.is_valid(report)
            place[name] = value
        assert VALIDATOR.is_valid(report)


def test_numbers_that_are_not_finite_are_null(tmp_path):
    """Weights that lie on int8's levels are rounded without an error."""
    proto = matmul()
    levels = np.arange(70 * 33).reshape(70, 33) % 255 - 127
    levels[0] = 127
    values = (levels * 2**-7).astype(np.float32)
    proto.graph.initializer[0].CopyFrom(numpy_helper.from_array(values, "w"))
    report = tmp_path / "r.json"
    result = call(save(proto, tmp_path), "--policy", "none", "--report", report)
    assert result.exit_code == 0, result.output
    [row] = [line.split() for line in result.stdout.splitlines() if line.startswith("y ")][:1]
    assert row[1:] == ["nearest", "0.00000", "1.000000", "0", "inf", "100.0%"]
    [drift] = json.loads(report.read_text())["validation"]["plain_exact"]
    assert drift["relative_l2"] == 0
    assert drift["sqnr_db"] is None
