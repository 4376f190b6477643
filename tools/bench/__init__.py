"""The bench: attacked and clean models under every defence; see `python -m tools.evaluate`."""
