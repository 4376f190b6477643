"""The examples in docstrings do what they show."""

import doctest
import shutil
from importlib import import_module
from pathlib import Path

import pytest

import flipguard_onnx

PACKAGE = Path(flipguard_onnx.__file__).parent
SILERO = PACKAGE.parent / "models" / "silero_vad.onnx"
WITH_EXAMPLES = [  # the others are not imported
    path.relative_to(PACKAGE.parent).with_suffix("").as_posix().replace("/", ".")
    for path in sorted(PACKAGE.rglob("*.py"))
    if ">>> " in path.read_text()
]


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_examples(name, tmp_path, monkeypatch):
    """Run where the examples find the model that the repository has, and may write."""
    (tmp_path / "models").mkdir()
    shutil.copy(SILERO, tmp_path / "models")
    monkeypatch.chdir(tmp_path)
    results = doctest.testmod(import_module(name.removesuffix(".__init__")))
    assert results.attempted > 0
    assert results.failed == 0
