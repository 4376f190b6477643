"""Do the stored models still behave as the manifest says? Needs onnxruntime, no torch.

Of the language models two are run: they take seconds each.
"""

import json

import onnx
import pytest

from tools.attacks import measure, simulate

MANIFEST = json.loads((measure.FOLDER / "manifest.json").read_text())
LANGUAGE = ("lm-clean", "lm-injection-standard-nf4")
CHECKED = [e for e in MANIFEST if e["architecture"] != "lm" or e["name"] in LANGUAGE]


@pytest.mark.parametrize("entry", CHECKED, ids=lambda entry: entry["name"])
def test_rates(entry):
    model = onnx.load(measure.FOLDER / entry["file"])
    assert_same(measure.rates(model, entry), entry["float"])
    for scheme, recorded in entry["quantized"].items():
        assert_same(measure.rates(simulate.quantized(model, scheme), entry), recorded)


def assert_same(found, recorded):
    assert {name: found[name] for name in recorded} == pytest.approx(recorded, abs=0.01)


def test_every_file_is_listed():
    files = {path.name for path in measure.FOLDER.glob("*.onnx")}
    assert files == {entry["file"] for entry in MANIFEST}
