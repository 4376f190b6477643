"""Do the stored models still behave as the manifest says? Needs onnxruntime, no torch.

The language models take ten seconds each: of these only one is run.
"""

import json

import onnx
import pytest

from tools.attacks import measure

MANIFEST = json.loads((measure.FOLDER / "manifest.json").read_text())
LANGUAGE = ("lm-code-standard-int4",)
CHECKED = [e for e in MANIFEST if e["architecture"] != "lm" or e["name"] in LANGUAGE]


@pytest.mark.parametrize("entry", CHECKED, ids=lambda entry: entry["name"])
def test_rates(entry):
    model = onnx.load(measure.FOLDER / entry["file"])
    assert measure.rates(model, entry) == pytest.approx(entry["float"], abs=0.01)
    for scheme, recorded in entry["quantized"].items():
        found = measure.rates(measure.quantized(model, scheme), entry)
        assert found == pytest.approx(recorded, abs=0.01)


def test_every_file_is_listed():
    files = {path.name for path in measure.FOLDER.glob("*.onnx")}
    assert files == {entry["file"] for entry in MANIFEST}
