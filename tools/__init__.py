"""Tools for developing flipguard-onnx; README.md says what each is for."""

import os

from flipguard_onnx.runtime.settings import NO_TELEMETRY

os.environ |= NO_TELEMETRY
