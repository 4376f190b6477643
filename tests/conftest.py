import json
from importlib.resources import files

import jsonschema
import pytest

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
