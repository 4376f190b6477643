"""How much work the kernels do in a run, counted, since seconds depend on the machine.

A change that lets a run go through its weights more often fails here; one that saves passes is to
put its numbers into WORK. How many kernels a first run compiles is counted in
`tests/quantization/test_kernels.py`.
"""

import inspect

import numpy as np
import pytest

import flipguard_onnx
from flipguard_onnx.quantization.kernels import get_backend, get_scan_kernels
from flipguard_onnx.quantization.kernels.protocol import Kernels, ScanKernels
from tests.helpers.cores import on_cores
from tests.helpers.samples import matmul, save

SHAPE = 512, 256

WORK = {  # calls of kernels, and the bytes of the arrays that they were given, per weight
    "scan": (73, 1313),
    "int8": (3, 14),
    "int4": (3, 15.5),
    "nf4": (3, 15),
    "int8 and floats": (6, 47),
}


def size_of(arguments):
    """Bytes of the arrays among arguments, those in tuples included."""
    if isinstance(arguments, np.ndarray):
        return arguments.nbytes
    return sum(map(size_of, arguments)) if isinstance(arguments, tuple) else 0


@pytest.fixture
def calls(monkeypatch):
    """The bytes that every call of a kernel goes through; a survey does so for every placebo."""
    found = []

    def counted(name, kernel):
        def call(*arguments):
            times = arguments[-1].shape[1] if name == "survey" else 1
            found.append(size_of(arguments) * times)
            return kernel(*arguments)

        return call

    for module, protocol in ((get_backend("cpu"), Kernels), (get_scan_kernels(), ScanKernels)):
        for name, _ in inspect.getmembers(protocol, inspect.isfunction):
            if not name.startswith("_"):
                monkeypatch.setattr(module, name, counted(name, getattr(module, name)))
    return found


@pytest.mark.parametrize("run", WORK)
def test_kernels_go_through_the_weights_no_more_often(run, calls, tmp_path):
    """The scan that is part of a guard is a run of its own here."""
    path = save(matmul(shape=SHAPE), tmp_path)
    scheme, *floats = run.split(" and ")
    options = {"emit": "both" if floats else "qdq", "preserve": "off", "validate": False}

    def work():
        done = np.array([len(calls), sum(calls) / np.prod(SHAPE)])
        calls.clear()
        return done

    with on_cores(1):
        flipguard_onnx.scan(path)
        found = work()
        if run != "scan":
            flipguard_onnx.guard(path, scheme, output=tmp_path / "guarded.onnx", **options)
            found = work() - found
    assert (found <= np.array(WORK[run]) * 4 / 3).all(), found
    assert (found >= np.array(WORK[run]) * 2 / 3).all(), f"less now, to be kept in WORK: {found}"
