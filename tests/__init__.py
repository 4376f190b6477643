"""Tests of the package and of the repository."""

import os

from flipguard_onnx.runtime.settings import NO_TELEMETRY

os.environ |= NO_TELEMETRY
