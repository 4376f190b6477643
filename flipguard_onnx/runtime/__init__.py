"""onnx's and onnxruntime's C++ code, run in a child process.

`session` is the client, `worker` the child, `pool` runs one task for many models.
"""

from .session import (
    RemoteError,
    Session,
    check,
    converted,
    inlined,
    open_session,
    preprocess,
    quantize_static,
    require_openable,
)

__all__ = [
    "RemoteError",
    "Session",
    "check",
    "converted",
    "inlined",
    "open_session",
    "preprocess",
    "quantize_static",
    "require_openable",
]
