import json
import sys
from importlib.resources import files
from pathlib import Path

import jsonschema
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))  # `tools` is no installed package

from flipguard_onnx.cli import commands as cli

SCHEMA = json.loads((files("flipguard_onnx") / "report.schema.json").read_text())


@pytest.fixture(autouse=True)
def every_report_follows_its_schema(monkeypatch):
    """Whatever JSON a test has the command line write."""
    validator = jsonschema.Draft202012Validator(SCHEMA)
    dumped = cli.dumped

    def checked(value):
        text = dumped(value)
        if "kind" in value:  # SARIF is none of ours
            validator.validate(json.loads(text))
        return text

    monkeypatch.setattr(cli, "dumped", checked)
