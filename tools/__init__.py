"""Tools for developing flipguard-onnx; README.md says what each is for."""
