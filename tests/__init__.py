"""Tests of the package and of the repository."""

import os

for name in ("ORT_DISABLE_TELEMETRY", "ORT_TELEMETRY_DISABLED"):  # read by onnxruntime and genai
    os.environ.setdefault(name, "1")
