"""What guard() finds out about a model, found out once for all that is done to it."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

from flipguard_onnx.calibration import moments
from flipguard_onnx.pipeline import guard as pipeline


@contextmanager
def remembered() -> Iterator[None]:
    """Within, guard() scans a model, and makes the statistics of its error feedback, only once.

    They depend on neither scheme nor seed, and take most of the time.
    """
    made: dict[str, moments.MomentRecorder] = {}
    original = moments.MomentRecorder

    def make(samples, weights, folder, *others):
        key = f"{samples.source.sha256} {[w.name for w in weights]} {samples.data}"
        if key not in made:
            made[key] = original(samples, weights, folder, *others)
        return made[key]

    scans = {}
    scan = pipeline.scan_weights

    def scan_once(source, weights, skipped, say):
        key = source.sha256
        if key not in scans:
            scans[key] = scan(source, weights, skipped, say)
        return scans[key]

    with (
        patch.object(moments, "MomentRecorder", make),
        patch.object(pipeline, "scan_weights", scan_once),
    ):
        yield
