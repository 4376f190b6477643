"""The package's shape: imports point one way, heavy libraries stay in their rooms."""

import ast
from pathlib import Path

import pytest

import flipguard_onnx

PACKAGE = Path(flipguard_onnx.__file__).parent
ROOMS = {  # library -> modules that may import it
    "click": {"arguments.py", "cli.py", "config.py"},
    "onnxruntime": {"child.py"},
    "cyclonedx": {"sbom.py"},
    "distributed": {"workers.py"},
    "jinja2": {"page.py"},
    "numba": {"kernels/__init__.py", "kernels/cpu.py", "kernels/cuda.py", "kernels/survey.py"},
}
LAYERS = [  # a module imports only from layers below its own
    {
        "arguments.py",
        "errors.py",
        "integers.py",
        "interrupt.py",
        "jsonable.py",
        "kernels/scalar.py",
        "wire.py",
    },
    {"child.py", "config.py", "disk.py"},
    {"intake.py"},
    {"runtime.py", "publish.py", "workers.py"},
    {"kernels/cpu.py", "kernels/cuda.py"},
    {"kernels/survey.py"},
    {"kernels/__init__.py", "schemes/blocks.py"},
    {"metrics.py"},
    {"schemes/affine.py", "schemes/codebook.py"},
    {"schemes/__init__.py"},
    {"model.py", "feedback.py"},
    {"scopes.py", "feeds.py", "flip.py"},
    {"weights.py", "synthetic.py"},
    {"tables.py"},
    {"findings.py"},
    {"activations.py", "parts.py"},
    {"rewrite.py"},
    {"qdq.py"},
    {"emit.py", "validate.py", "options.py", "sampled.py", "settled.py", "page.py"},
    {"report.py", "alignment.py", "sarif.py", "sensitivity.py", "trial.py"},
    {"detection.py", "html.py", "sbom.py", "static.py"},
    {"pipeline.py"},
    {"fleet.py", "verification.py"},
    {"__init__.py"},
    {"cli.py"},
    {"__main__.py"},
]
MODULES = sorted(str(p.relative_to(PACKAGE)) for p in PACKAGE.rglob("*.py"))


def imports(module):
    """Top-level libraries and package modules that a module imports, TYPE_CHECKING aside."""
    tree = ast.parse((PACKAGE / module).read_text())
    package = Path(module).parent
    libraries, modules = set(), set()
    guarded = [
        child
        for n in ast.walk(tree)
        if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"
        for child in ast.walk(n)
    ]
    for found in ast.walk(tree):
        if found in guarded:
            continue
        if isinstance(found, ast.Import):
            libraries.update(alias.name.split(".")[0] for alias in found.names)
        elif isinstance(found, ast.ImportFrom) and found.level == 0:
            libraries.add(found.module.split(".")[0])
        elif isinstance(found, ast.ImportFrom):
            base = package if found.level == 1 else package.parent
            for alias in found.names:
                name = f"{base / (found.module or '')}".replace(".", "/").strip("/")
                stem = f"{name}/{alias.name}".strip("/")
                candidates = [f"{stem}.py", f"{name}.py", f"{name}/__init__.py", "__init__.py"]
                modules.add(next(c for c in candidates if c in MODULES))
    return libraries, modules


def test_every_module_has_a_layer():
    assert sorted(m for layer in LAYERS for m in layer) == MODULES


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_downwards(module):
    level = next(i for i, layer in enumerate(LAYERS) if module in layer)
    below = set().union(*LAYERS[:level])
    libraries, modules = imports(module)
    if module != "cli.py":  # cli and __init__ name each other: __init__ loads on first use
        modules -= {"__init__.py"}
    assert modules <= below | {module}
    for library, rooms in ROOMS.items():
        assert library not in libraries or module in rooms


def test_schemes_and_kernels_know_nothing_of_onnx():
    for module in MODULES:
        if module.startswith(("schemes/", "kernels/")):
            assert not imports(module)[0] & {"onnx", "onnxruntime"}


def test_public_names():
    assert sorted(flipguard_onnx.__all__) == [
        "DeviceError",
        "FlipguardError",
        "ModelError",
        "OptionError",
        "SchemeError",
        "UnsupportedModelError",
        "ValidationError",
        "der",
        "guard",
        "guard_many",
        "inspect",
        "scan",
        "verify",
    ]
    for name in flipguard_onnx.__all__:
        assert getattr(flipguard_onnx, name)
    with pytest.raises(AttributeError, match="nothing_like_that"):
        _ = flipguard_onnx.nothing_like_that


def test_modules_stay_short():
    long = {m: n for m in MODULES if (n := len((PACKAGE / m).read_text().splitlines())) > 400}
    assert not long
