"""Models larger than the memory that there is: under a limit that loading them does not pass.

The limit is on the memory that a process may write to (RLIMIT_DATA); pages of mapped files, which
the system can drop, are not in it, virtual memory that nothing is in is not either.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.large import save_large
from tests.helpers.samples import F, model, node, save, weights

ROOT = Path(__file__).parents[2]
LIMIT = 400 << 20  # bytes
GUARD = """
import flipguard_onnx
report = flipguard_onnx.guard(path, {scheme!r}, seed=1, max_memory=128, preserve="off")
assert report.validation.layers > 0, "sampled layers were validated"
"""
LOAD = "import onnx; onnx.load(path); print('loaded')"


def under_the_limit(code, path, limit=LIMIT):
    """Run code in a process that may have no more memory than that to write to (-1: no limit)."""
    limited = (
        f"import resource; resource.setrlimit(resource.RLIMIT_DATA, ({limit}, {limit}))\n"
        f"path = {str(path)!r}\n"
    )
    one_thread = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "NUMBA", "OPENBLAS")}
    return subprocess.run(
        [sys.executable, "-c", limited + code],
        cwd=ROOT,
        env=os.environ | one_thread,
        capture_output=True,
        text=True,
    )


@pytest.fixture(
    scope="module",
    params=[("int8", 12, 3000), ("nf4", 70, 1250)],
    ids=["few large", "many moderate"],
)
def larger_than_memory(request, tmp_path_factory):
    """A scheme, and a model of so many square matrices."""
    scheme, *size = request.param
    path = tmp_path_factory.mktemp("big") / "big.onnx"
    save_large(path, *size)
    assert path.with_name("big.onnx.data").stat().st_size > LIMIT
    yield scheme, path
    path.with_name("big.onnx.data").unlink()


def test_loading_it_fails(larger_than_memory):
    """protobuf ends the process, or Python raises MemoryError."""
    _, path = larger_than_memory
    result = under_the_limit(LOAD, path)
    assert result.returncode != 0
    assert "loaded" not in result.stdout
    assert "loaded" in under_the_limit(LOAD, path, limit=-1).stdout


def test_it_is_guarded_and_validated(larger_than_memory):
    scheme, path = larger_than_memory
    result = under_the_limit(GUARD.format(scheme=scheme), path)
    assert result.returncode == 0, result.stderr
    assert list(path.parent.glob(f"big.flipguard-{scheme}.onnx*.data"))


def test_many_small_weights_take_little(tmp_path):
    """An unrolled mixture of experts: 1.6 MB. When the edits of a graph were carried out once per
    edit, it took 5.5 GB."""
    nodes = [node("MatMul", "x", f"y{i}") for i in range(400)]
    for i, each in enumerate(nodes):
        each.input.append(f"w{i}")
    constants = {f"w{i}": weights((32, 32), i) for i in range(400)}
    outputs = {f"y{i}": (F, [1, 32]) for i in range(400)}
    path = save(model(nodes, {"x": (F, [1, 32])}, outputs, constants), tmp_path)
    code = "import flipguard_onnx; flipguard_onnx.guard(path, 'nf4', policy='none', validate=False)"
    result = under_the_limit(code, path)
    assert result.returncode == 0, result.stderr
