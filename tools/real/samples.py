"""Real text, photographs, lines of rendered text and speech, from what is installed anyway.

Text: the docstrings of Python's standard library. Photographs: those that scikit-learn and
matplotlib ship. Speech: espeak-ng. Everything comes in two disjoint parts, 0 to give to the tool
and 1 to judge on.
"""

import ast
import subprocess
import sysconfig
import tempfile
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
import sklearn.datasets
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageFont
from scipy.io import wavfile
from scipy.signal import resample_poly

RATE = 16000
FONTS = (
    "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono", "DejaVuSerif",
    "DejaVuSerif-Italic", "STIXGeneral", "cmr10",
)  # fmt: skip
VOICES = (("en-us", "en-gb", "de", "fr"), ("en-gb-scotland", "en-us-nyc", "es", "it"))
PHOTOGRAPHS = (("china.jpg",), ("flower.jpg", "grace_hopper.jpg"))


@cache
def sentences(part: int) -> list[str]:
    """Sentences of docstrings; the parts share no module, and none of what modules copied."""
    found = []
    modules = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    for module in modules[part::2]:
        tree = ast.parse(module.read_text(encoding="utf-8"))
        kinds = ast.Module, ast.ClassDef, ast.FunctionDef
        for node in ast.walk(tree):
            text = ast.get_docstring(node) if isinstance(node, kinds) else None
            for sentence in " ".join((text or "").split()).split(". "):
                if 5 <= len(sentence.split()) <= 60 and sentence.isascii():
                    found.append(sentence.rstrip(".") + ".")
    mixed = np.random.default_rng(part).permutation(list(dict.fromkeys(found))).tolist()
    known = set(sentences(0)) if part else set()
    return [sentence for sentence in mixed if sentence not in known]


def photographs(part: int, count: int) -> list[Image.Image]:
    """Random crops, some of them mirrored, darker or brighter."""
    folders = (
        Path(matplotlib.get_data_path()) / "sample_data",
        Path(sklearn.datasets.__file__).parent / "images",
    )
    paths = [f / n for n in PHOTOGRAPHS[part] for f in folders if (f / n).exists()]
    rng = np.random.default_rng(part)
    crops = []
    for number in range(count):
        image = Image.open(paths[number % len(paths)]).convert("RGB")
        side = int(min(image.size) * rng.uniform(0.3, 1))
        left, top = (int(rng.integers(0, length - side + 1)) for length in image.size)
        crop = image.crop((left, top, left + side, top + side))
        if rng.random() < 0.5:
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        crops.append(ImageEnhance.Brightness(crop).enhance(rng.uniform(0.6, 1.3)))
    return crops


def lines(part: int, count: int, width: int, height: int) -> list[tuple[Image.Image, str]]:
    """Rendered words with their text, in various fonts, colours and degrees of sharpness."""
    fonts = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    rng = np.random.default_rng(part)
    found = []
    for sentence in sentences(part)[:count]:
        paper, ink = rng.integers(170, 256, 3), rng.integers(0, 100, 3)
        size = int(rng.integers(22, 34))
        font = ImageFont.truetype(fonts / f"{rng.choice(FONTS)}.ttf", size)
        text = sentence
        while font.getlength(text) > width - 16:
            text = text.rpartition(" ")[0] or text[:-1]
        image = Image.new("RGB", (width, height), tuple(map(int, paper)))
        place = int(rng.integers(2, 14)), height // 2
        ImageDraw.Draw(image).text(place, text, tuple(map(int, ink)), font, anchor="lm")
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0, 1)))
        noisy = np.asarray(image) + rng.normal(0, rng.uniform(0, 8), (height, width, 3))
        found.append((Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)), text))
    return found


def speech(part: int, count: int) -> list[np.ndarray]:
    """Utterances with silence around them and noise below, -1..1 at RATE.

    Raises FileNotFoundError without espeak-ng.
    """
    rng = np.random.default_rng(part)
    found = []
    spoken_ones = [s for s in sentences(part) if len(s) < 120 and s[0].isalpha()]
    for number, sentence in enumerate(spoken_ones[:count]):
        voice = VOICES[part][number % len(VOICES[part])]
        manner = ["-s", str(rng.integers(120, 220)), "-p", str(rng.integers(20, 80))]
        with tempfile.NamedTemporaryFile(suffix=".wav") as file:
            command = ["espeak-ng", "-v", voice, *manner, "-w", file.name, sentence]
            subprocess.run(command, check=True)
            rate, samples = wavfile.read(file.name)
        spoken = resample_poly(samples / 32768, RATE, rate)
        silence = np.zeros(int(rng.uniform(0.3, 1) * RATE))
        wave = np.concatenate([silence, spoken, silence])
        noise = rng.standard_normal(len(wave)) * spoken.std() * 10 ** -rng.uniform(0.5, 2)
        found.append((0.5 * wave + noise).astype(np.float32))
    return found
