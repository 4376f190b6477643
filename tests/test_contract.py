"""What the package shows to those who import it, and what it imports itself and when.

Which module may import which is import-linter's (`lint-imports`).
"""

import subprocess
import sys
from pathlib import Path

import pytest

import flipguard_onnx

PACKAGE = Path(flipguard_onnx.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))
HEAVY = ("numpy", "onnx", "onnxruntime", "numba", "jinja2", "cyclonedx", "distributed")


def run(code, *arguments):
    """Run code in a fresh process; what it prints."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def loaded_by(code, *arguments):
    """The heavy libraries that code has loaded when it ends."""
    last = f"\nimport sys; print(*[name for name in {HEAVY} if name in sys.modules])"
    return set(run(code + last, *arguments).splitlines()[-1].split())


def command(*arguments):
    return (
        "import sys\n"
        "from flipguard_onnx.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as end: assert end.code == 0, end.code",
        *arguments,
    )


@pytest.mark.parametrize(("given", "then"), [(None, "16"), ("20", "20")])
def test_threads_for_matrix_products_soon_sleep(monkeypatch, given, then):
    name = "OPENBLAS_THREAD_TIMEOUT"
    monkeypatch.delenv(name, raising=False)
    if given:
        monkeypatch.setenv(name, given)
    said = f"print(os.environ[{name!r}], 'numpy' in sys.modules)"
    shown = "import os\nfrom flipguard_onnx.cli.commands import scan\n"
    shown += f"scan.callback = lambda **_: {said}\n"
    code, *arguments = command("scan", "pyproject.toml")
    assert run(shown + code, *arguments).split() == [then, "False"]


def test_public_names():
    assert sorted(flipguard_onnx.__all__) == [
        "BatchReport",
        "DeviceError",
        "DriftError",
        "FlipguardError",
        "GuardOptions",
        "GuardReport",
        "Inspection",
        "ModelError",
        "ModelOutcome",
        "OptionError",
        "RunError",
        "Scan",
        "SchemeError",
        "UnsupportedModelError",
        "ValidationError",
        "Verification",
        "der",
        "guard",
        "guard_many",
        "inspect",
        "scan",
        "verify",
    ]
    for name in flipguard_onnx.__all__:
        assert getattr(flipguard_onnx, name).__name__ == name
    with pytest.raises(AttributeError, match="nothing_like_that"):
        _ = flipguard_onnx.nothing_like_that


def test_help_and_version_load_nothing_heavy():
    assert loaded_by("import flipguard_onnx") == set()
    for arguments in (["--help"], ["guard", "--help"], ["scan", "--help"], ["--version"]):
        assert loaded_by(*command(*arguments)) == set()


def test_inspect_loads_neither_kernels_nor_onnxruntime():
    model = PACKAGE.parent / "models" / "silero_vad.onnx"
    assert loaded_by(*command("inspect", model, "--quiet")) == {"numpy", "onnx"}


def test_every_module_loads_without_the_extras():
    """They are imported inside functions, but for the two modules that exist for one of them."""
    code = (
        "import importlib, pkgutil, sys\n"
        "for name in ('onnxruntime', 'cyclonedx', 'distributed'):\n"
        "    sys.modules[name] = None\n"
        "import flipguard_onnx\n"
        "for module in pkgutil.walk_packages(flipguard_onnx.__path__, 'flipguard_onnx.'):\n"
        "    if module.name not in sys.argv[1:]:\n"
        "        importlib.import_module(module.name)\n"
        "        print(module.name)"
    )
    left_out = ["__main__", "reports.sbom", "runtime.worker"]
    names = run(code, *(f"flipguard_onnx.{name}" for name in left_out)).split()
    assert len(names) == len(MODULES) - 1 - len(left_out)  # nor is the package itself among them
