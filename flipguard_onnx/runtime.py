"""The one place that loads models into onnxruntime."""

from pathlib import Path
from typing import Any

from .errors import ValidationError, first_line


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
    if exact:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ValidationError(f"{path.name}: does not load: {first_line(error)}") from None
