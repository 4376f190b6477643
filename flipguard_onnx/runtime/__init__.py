"""onnx's and onnxruntime's C++ code, run in a child process.

`session` is the client, `worker` the child, `messages` what they exchange, `settings` what the
child is told and may use. `pool` runs one task for many models.
"""

from .session import (
    Child,
    RemoteError,
    Session,
    check,
    converted,
    evaluate,
    inferred,
    inlined,
    open_session,
    preprocess,
    quantize_static,
    require_openable,
    shared_child,
    tokenized,
)
from .settings import Limits, StaticQuantization

__all__ = [
    "Child",
    "Limits",
    "RemoteError",
    "Session",
    "StaticQuantization",
    "check",
    "converted",
    "evaluate",
    "inferred",
    "inlined",
    "open_session",
    "preprocess",
    "quantize_static",
    "require_openable",
    "shared_child",
    "tokenized",
]
