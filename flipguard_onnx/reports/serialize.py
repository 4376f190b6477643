"""Results as JSON; the package's `report.schema.json` describes all of them."""

import json
import math
from dataclasses import fields, is_dataclass
from typing import Any

FORMAT = 1  # of the reports; raised when a field is removed or changes its meaning


def jsonable(result: Any) -> dict[str, Any]:
    """The fields of a dataclass as JSON types; numbers that are not finite become None.

    A dataclass inside it may have a method `as_json`, which returns the fields to write.
    """
    converted = _converted(result)
    assert isinstance(converted, dict)
    return converted


def dumped(value: Any) -> str:
    """A JSON value as text for a file."""
    return json.dumps(value, indent=2, allow_nan=False)


def _converted(value: Any) -> Any:
    if hasattr(value, "as_json"):
        value = value.as_json()
    elif is_dataclass(value):
        value = {field.name: getattr(value, field.name) for field in fields(value)}
    if isinstance(value, dict):
        return {key: _converted(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_converted(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
