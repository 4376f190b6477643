"""Statistics of a model's inputs, gathered once for all that is done to it."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

from flipguard_onnx import activations


@contextmanager
def remembered() -> Iterator[None]:
    """Within, guard() makes the statistics of error feedback once for a model and its data.

    They depend on neither scheme nor seed, and take most of the time.
    """
    made: dict[str, activations.Activations] = {}
    original = activations.Activations

    def make(source, weights, folder, max_bytes, data):
        key = f"{source.sha256} {[w.name for w in weights]} {data}"
        if key not in made:
            made[key] = original(source, weights, folder, max_bytes, data)
        return made[key]

    with patch.object(activations, "Activations", make):
        yield
