"""What is built and installed: its files, its metadata, a run from where nothing can be written."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from flipguard_onnx import __version__
from tests.helpers.samples import matmul, save

ROOT = Path(__file__).parents[1]
NAMESPACE = ("unshare", "--mount", "sh", "-ec")


def run(*command, **options):
    environment = dict(os.environ)
    environment.pop("PYTHONPATH", None)  # it would find the source
    options = {"env": environment, "check": True, "capture_output": True, "text": True} | options
    return subprocess.run([str(part) for part in command], **options)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The wheel, built from the sdist, and the sdist."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT)
    [wheel], [sdist] = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return wheel, sdist


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """A fresh environment with the wheel; its dependencies are those of this environment."""
    folder = tmp_path_factory.mktemp("fresh")
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    python = folder / "bin" / "python"
    site = Path(run(python, "-c", "import site; print(site.getsitepackages()[0])").stdout.strip())
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", built[0])
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder


def test_what_is_in_the_wheel_and_the_sdist(built):
    package = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "flipguard_onnx").rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    assert {"flipguard_onnx/py.typed", "flipguard_onnx/report.schema.json"} <= package
    with zipfile.ZipFile(built[0]) as wheel:
        assert {name for name in wheel.namelist() if ".dist-info/" not in name} == package
        [metadata] = [name for name in wheel.namelist() if name.endswith("/METADATA")]
        assert f"\nVersion: {__version__}\n" in wheel.read(metadata).decode()
    with tarfile.open(built[1]) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert package | {"README.md", "SECURITY.md", "docs/guide.md"} <= names
    assert not any(name.startswith("models/") for name in names)


def test_the_commands_are_there(installed, tmp_path):
    for command in (["flipguard-onnx"], ["python", "-m", "flipguard_onnx"]):
        program = installed / "bin" / command[0]
        result = run(program, *command[1:], "--version", cwd=tmp_path)
        assert result.stdout == f"flipguard-onnx, version {__version__}\n"
    where = "import flipguard_onnx; print(flipguard_onnx.__file__)"
    found = run(installed / "bin" / "python", "-c", where, cwd=tmp_path).stdout
    assert found.startswith(str(installed))


def can_mount():
    return shutil.which("unshare") and not subprocess.run([*NAMESPACE, "true"]).returncode


@pytest.mark.skipif(not can_mount(), reason="needs root, for a read-only mount")
@pytest.mark.parametrize("home", ["writable", "read-only"])
def test_an_installation_that_is_read_only(installed, tmp_path, home):
    """Compiled kernels stay in the user's cache; where that is read-only nothing is left."""
    source = save(matmul(), tmp_path)
    for name in ("writable", "read-only", "tmp"):
        (tmp_path / name).mkdir()
    script = (
        'for place in "$1" "$2"; do mount --bind "$place" "$place"; '
        'mount -o remount,ro,bind "$place"; if touch "$place/x"; then exit 9; fi; done; '
        'shift 2; "$@"'
    )
    environment = {"XDG_CACHE_HOME": tmp_path / home, "TMPDIR": tmp_path / "tmp"}
    result = run(
        *(*NAMESPACE, script, "sh", installed, tmp_path / "read-only"),
        *(installed / "bin" / "flipguard-onnx", source, "--policy", "none", "--no-validate"),
        env=environment | {"PATH": os.defpath, "NUMBA_OPT": "1"},  # to compile quickly
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert source.with_name("model.flipguard-int8.onnx").exists()
    places = {path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("*.nbi")}
    assert places == ({"writable"} if home == "writable" else set())
    assert list((tmp_path / "tmp").iterdir()) == []
