"""Guard quantized ONNX models against quantization-conditioned backdoors.

`guard` writes a guarded model, `guard_many` many of them; `inspect` shows what would be guarded,
`scan` tells whether a float model was prepared for a quantizer, `verify` compares any quantized
model with its original, `der` is the figure by which defences are compared.

The public names load on first use, so that the command line answers `--help` at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .detection.scan import scan
    from .errors import (
        DeviceError,
        DriftError,
        FlipguardError,
        ModelError,
        OptionError,
        RunError,
        SchemeError,
        UnsupportedModelError,
        ValidationError,
    )
    from .metrics import der
    from .pipeline.batch import guard_many
    from .pipeline.guard import guard, inspect
    from .pipeline.options import GuardOptions
    from .pipeline.verify import verify
    from .reports.batch import BatchReport, ModelOutcome
    from .reports.guard import GuardReport, Inspection
    from .reports.scan import Scan
    from .reports.validation import Verification

_MODULES = {
    "detection.scan": ("scan",),
    "errors": (
        "DeviceError",
        "DriftError",
        "FlipguardError",
        "ModelError",
        "OptionError",
        "RunError",
        "SchemeError",
        "UnsupportedModelError",
        "ValidationError",
    ),
    "metrics": ("der",),
    "pipeline.batch": ("guard_many",),
    "pipeline.guard": ("guard", "inspect"),
    "pipeline.options": ("GuardOptions",),
    "pipeline.verify": ("verify",),
    "reports.batch": ("BatchReport", "ModelOutcome"),
    "reports.guard": ("GuardReport", "Inspection"),
    "reports.scan": ("Scan",),
    "reports.validation": ("Verification",),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "BatchReport",
    "DeviceError",
    "DriftError",
    "FlipguardError",
    "GuardOptions",
    "GuardReport",
    "Inspection",
    "ModelError",
    "ModelOutcome",
    "OptionError",
    "RunError",
    "Scan",
    "SchemeError",
    "UnsupportedModelError",
    "ValidationError",
    "Verification",
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
    return getattr(import_module(f".{_HOME[name]}", __name__), name)
