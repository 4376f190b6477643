"""Results as JSON; `report.schema.json` beside this module describes all of them."""

import json
import math
from dataclasses import fields, is_dataclass
from typing import Any

FORMAT = 1  # of the reports; raised when one loses a field or changes what it means


def jsonable(result: Any) -> dict[str, Any]:
    """The fields of a dataclass as JSON types; numbers that are not finite become None.

    A dataclass inside it may have a method `as_json`, which returns the fields to write.
    """
    plain = _plain(result)
    assert isinstance(plain, dict)
    return plain


def dumped(value: Any) -> str:
    """As text for a file."""
    return json.dumps(value, indent=2, allow_nan=False)


def _plain(value: Any) -> Any:
    if hasattr(value, "as_json"):
        value = value.as_json()
    elif is_dataclass(value):
        value = {field.name: getattr(value, field.name) for field in fields(value)}
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
