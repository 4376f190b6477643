"""Guard quantized ONNX models against quantization-conditioned backdoors.

The public names load on first use, so that the command line answers `--help` at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .detection.scan import scan
    from .errors import (
        DeviceError,
        FlipguardError,
        ModelError,
        OptionError,
        SchemeError,
        UnsupportedModelError,
        ValidationError,
    )
    from .metrics import der
    from .pipeline.batch import guard_many
    from .pipeline.guard import guard, inspect
    from .pipeline.verify import verify

_HOME = {
    "guard": ".pipeline.guard",
    "guard_many": ".pipeline.batch",
    "inspect": ".pipeline.guard",
    "verify": ".pipeline.verify",
    "scan": ".detection.scan",
    "der": ".metrics",
    "FlipguardError": ".errors",
    "ModelError": ".errors",
    "OptionError": ".errors",
    "UnsupportedModelError": ".errors",
    "SchemeError": ".errors",
    "DeviceError": ".errors",
    "ValidationError": ".errors",
}

__all__ = [
    "DeviceError",
    "FlipguardError",
    "ModelError",
    "OptionError",
    "SchemeError",
    "UnsupportedModelError",
    "ValidationError",
    "der",
    "guard",
    "guard_many",
    "inspect",
    "scan",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name], __name__), name)
