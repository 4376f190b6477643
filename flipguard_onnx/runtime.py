"""The one place that loads models into onnxruntime."""

import os
from pathlib import Path
from typing import Any

from .errors import ModelError, ValidationError, first_line


def open_session(path: Path, exact: bool) -> Any:
    """An onnxruntime session on the CPU.

    exact: DequantizeLinear is folded to float32 at load, so that weights count as they are stored.
    Raises ValidationError when onnxruntime is missing or does not load the file.
    """
    try:
        import onnxruntime
    except ImportError:
        raise ValidationError(
            "onnxruntime is not installed; install flipguard-onnx[cpu] or [gpu], "
            "or write unvalidated with --no-validate --preserve off"
        ) from None
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if len(cores := os.sched_getaffinity(0)) < (os.cpu_count() or 1):
        options.intra_op_num_threads = len(cores)  # by itself it takes all, and moves off ours
    if exact:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ValidationError(f"{path.name}: does not load: {first_line(error)}") from None


def require_openable(*paths: Path) -> None:
    """Raise ModelError for a path that onnxruntime cannot be given."""
    for path in paths:
        try:
            str(path).encode()
        except UnicodeEncodeError:
            raise ModelError(
                f"{path}: onnxruntime opens no path that is not UTF-8; allowed: another name, "
                "or to go without (--no-validate --preserve off)"
            ) from None
