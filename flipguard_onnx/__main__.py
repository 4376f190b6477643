"""`python -m flipguard_onnx`."""

from .cli import main

main()
