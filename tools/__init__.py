"""Tools for developing flipguard-onnx; README.md says what each is for."""

import os

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read when onnxruntime is imported
