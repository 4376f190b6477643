"""Results as JSON; the package's `report.schema.json` describes all of them."""

import json
import math
from dataclasses import asdict
from typing import Any

FORMAT = 1  # of the reports; raised when a field is removed or changes its meaning


def jsonable(result: Any) -> dict[str, Any]:
    """The fields of a dataclass as JSON types; numbers that are not finite become None."""
    converted = _converted(asdict(result))
    assert isinstance(converted, dict)
    return converted


def dumped(value: Any) -> str:
    """A JSON value as text for a file."""
    return json.dumps(value, indent=2, allow_nan=False)


def _converted(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _converted(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_converted(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
