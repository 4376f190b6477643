"""Write the JSON Schema of the reports, made from their dataclasses.

python -m tools.schema > flipguard_onnx/report.schema.json
"""

import inspect
import json
import re
import types
from dataclasses import MISSING, fields, is_dataclass
from enum import EnumType
from typing import Any, Union, get_args, get_origin, get_type_hints

from flipguard_onnx.reports.batch import BatchReport
from flipguard_onnx.reports.guard import GuardReport, Inspection, TargetInspection
from flipguard_onnx.reports.scan import Scan
from flipguard_onnx.reports.serialize import FORMAT
from flipguard_onnx.reports.validation import Verification

REPORTS = (GuardReport, BatchReport, Inspection, TargetInspection, Verification, Scan)
PLAIN = {str: "string", int: "integer", bool: "boolean", type(None): "null"}


def schema() -> dict[str, Any]:
    """Draft 2020-12; one definition per dataclass."""
    found: dict[str, Any] = {}
    kinds = [_reference(report, found) for report in REPORTS]
    _as_written(found)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"urn:flipguard-onnx:report:{FORMAT}",
        "title": "Reports of flipguard-onnx",
        "description": "What --report and scan --format json write. `kind` tells which report it "
        "is. `format_version` is raised when a field is removed or changes its meaning, but not "
        "when one is added: take the schema from the version that wrote the report. Numbers that "
        "are not finite are null.",
        "oneOf": kinds,
        "$defs": dict(sorted(found.items())),
    }


def _as_written(found: dict[str, Any]) -> None:
    """What to_dict() adds to the fields or writes in another way."""
    report = found["GuardReport"]
    report["properties"] |= {
        "seed": report["properties"]["seed"] | {"type": ["string", "null"], "pattern": "^[0-9]+$"},
        "weights": {"type": "integer"},
        "flips": {"type": "integer"},
        "coverage": {"type": "number"},
    }
    report["required"] += ["weights", "flips", "coverage"]
    skipped = found["Skipped"]
    del skipped["properties"]["detail"]  # part of the reason
    skipped["required"].remove("detail")
    batch = found["BatchReport"]
    batch["properties"] |= {
        "code": {"type": "integer"},
        "models": batch["properties"].pop("outcomes"),
    }
    batch["required"].remove("outcomes")
    batch["required"] += ["code", "models"]


def _reference(kind: type, found: dict[str, Any]) -> dict[str, Any]:
    if kind.__name__ not in found:
        found[kind.__name__] = {}  # it may hold others of its kind
        found[kind.__name__] = _object(kind, found)
    return {"$ref": f"#/$defs/{kind.__name__}"}


def _object(kind: type, found: dict[str, Any]) -> dict[str, Any]:
    assert is_dataclass(kind)
    hints = get_type_hints(kind)
    description, attributes = _documentation(kind)
    properties = {}
    for field in fields(kind):
        if field.init:
            described = {"description": attributes[field.name]} if attributes else {}
            properties[field.name] = described | _type(hints[field.name], found)
        else:
            assert field.default is not MISSING
            properties[field.name] = {"const": field.default}
    return {
        "description": description,
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _documentation(kind: type) -> tuple[str, dict[str, str]]:
    """A docstring without its section Attributes, and what that says of each field."""
    head, _, section = inspect.cleandoc(kind.__doc__ or "").partition("Attributes\n----------\n")
    entries = re.findall(r"^(\w+) : (.+(?:\n .*)*)", section, re.MULTILINE)
    return head.strip(), {name: " ".join(text.split()) for name, text in entries}


def _type(hint: Any, found: dict[str, Any]) -> dict[str, Any]:
    if hint is Any:
        return {}
    if hint is float:
        return {"type": ["number", "null"]}
    if isinstance(hint, EnumType):
        return {"type": "string"}
    if hint in PLAIN:
        return {"type": PLAIN[hint]}
    if is_dataclass(hint):
        assert isinstance(hint, type)
        return _reference(hint, found)
    origin, inner = get_origin(hint), get_args(hint)
    if origin is tuple:
        assert inner[1:] == (...,), hint
        return {"type": "array", "items": _type(inner[0], found)}
    if origin is dict:
        assert inner[0] is str, hint
        return {"type": "object", "additionalProperties": _type(inner[1], found)}
    assert origin in (Union, types.UnionType), hint
    options = [_type(option, found) for option in inner if option is not type(None)]
    if len(options) == 1 and "type" in options[0]:
        [only] = options
        names = only["type"] if isinstance(only["type"], list) else [only["type"]]
        return only | {"type": list(dict.fromkeys([*names, "null"]))}
    return {"anyOf": [*options, {"type": "null"}]}


if __name__ == "__main__":
    print(json.dumps(schema(), indent=2))
