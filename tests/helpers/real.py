"""The real models that `python tools/fetch_models.py` downloads."""

import json
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "models"
LISTED = json.loads((FOLDER / "downloads.json").read_text())
MODELS = [entry for entry in LISTED if entry["member"].endswith(".onnx")]
FLOAT_MODELS = [entry["name"] for entry in MODELS if not entry.get("prequantized")]
INTEGER_MODELS = [entry["name"] for entry in MODELS if entry.get("prequantized")]


def downloaded(name):
    """The path of the model; the test is skipped where it was not downloaded."""
    assert name in FLOAT_MODELS + INTEGER_MODELS
    path = FOLDER / "downloaded" / f"{name}.onnx"
    if not path.exists():
        pytest.skip(f"{path.name} is not there; python tools/fetch_models.py {name}")
    return path
