"""Tools for developing flipguard-onnx; README.md says what each is for."""

import os

for name in ("ORT_DISABLE_TELEMETRY", "ORT_TELEMETRY_DISABLED"):  # read by onnxruntime and genai
    os.environ.setdefault(name, "1")
