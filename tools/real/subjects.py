"""The real models with inputs prepared as each wants them, and what agreement means for each."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path

import blingfire
import kaldi_native_fbank as fbank
import numpy as np
from PIL import Image

from tools.attacks.measure import session
from tools.fetch_models import path_of
from tools.real import samples

Feed = dict[str, np.ndarray]
Rows = np.ndarray  # [compared things, values]

CLS, SEP, UNKNOWN = 101, 102, 100  # ids of BERT's vocabulary
TOKENS = 32
PIXELS_BGR = np.array([104, 117, 123], np.float32)  # open_nsfw's means
LINE = (320, 48)
FRAMES = 96
CHUNK, CONTEXT = 512, 64  # samples


@dataclass(frozen=True)
class Subject:
    """A model with real inputs.

    feeds: of part 0 (equal shapes, for --data) and of part 1 (to judge on).
    read: the outputs of one run -> what is compared, one row per thing.
    scores: rows of the float model and of another, one pair per feed -> named shares of agreement.
    """

    name: str
    inputs: str
    feeds: Callable[[int], list[Feed]]
    read: Callable[[Feed, Feed], Rows]
    scores: Callable[[Sequence[Rows], Sequence[Rows]], dict[str, float]]


def _token_feeds(part: int) -> list[Feed]:
    """Sentences as they are; for part 0 running text in windows of TOKENS."""
    model = blingfire.load_model(str(Path(blingfire.__file__).with_name("bert_base_tok.bin")))

    def ids(text: str) -> list[int]:
        return blingfire.text_to_ids(model, text, 4096, UNKNOWN, no_padding=True).tolist()

    if part == 0:
        text = ids(" ".join(samples.sentences(0)[:700]))
        step = TOKENS - 2
        cut = [text[i : i + step] for i in range(0, len(text) - step, step)][:300]
    else:
        cut = [ids(sentence) for sentence in samples.sentences(1)[:200]]
    tokens = [np.array([[CLS, *part_of, SEP]], np.int64) for part_of in cut]
    return [{"input_ids": t, "attention_mask": np.ones_like(t)} for t in tokens]


def _embedding(feed: Feed, outputs: Feed) -> Rows:
    """Mean of the token vectors under the attention mask."""
    vectors = next(v for v in outputs.values() if v.ndim == 3)
    mask = feed["attention_mask"][:, :, None]
    return (vectors * mask).sum(1) / mask.sum(1)


def _cosine(expected: Sequence[Rows], found: Sequence[Rows]) -> dict[str, float]:
    a, b = np.concatenate(expected), np.concatenate(found)
    cosines = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    return {"cosine": float(cosines.mean())}


def _photograph_feeds(part: int) -> list[Feed]:
    """open_nsfw: 256 x 256, the middle 224 x 224 of it, through JPEG, BGR less its mean."""
    feeds = []
    for image in samples.photographs(part, 96):
        stored = BytesIO()
        resized = image.resize((256, 256), Image.Resampling.BILINEAR).crop((16, 16, 240, 240))
        resized.save(stored, "JPEG")
        pixels = np.asarray(Image.open(stored), np.float32)[:, :, ::-1] - PIXELS_BGR
        feeds.append({"input:0": pixels[None].copy()})
    return feeds


def _log_odds(feed: Feed, outputs: Feed) -> Rows:
    """Of the two classes: their probabilities are as good as 0 and 1."""
    logs = np.log(np.maximum(outputs["outputs"], 1e-30))
    return logs - logs[:, ::-1]


def _line_feeds(part: int) -> list[Feed]:
    feeds = []
    for image, _ in samples.lines(part, 96, *LINE):
        pixels = np.asarray(image, np.float32)[:, :, ::-1] / 127.5 - 1
        feeds.append({"x": pixels.transpose(2, 0, 1)[None].copy()})
    return feeds


def decoded(rows: Rows) -> list[int]:
    """The classes that a CTC output spells: repetitions and blanks (0) left out."""
    best = rows.argmax(1)
    return [int(c) for c, before in zip(best, [0, *best[:-1]], strict=True) if c and c != before]


def _spelt(expected: Sequence[Rows], found: Sequence[Rows]) -> dict[str, float]:
    same = [decoded(a) == decoded(b) for a, b in zip(expected, found, strict=True)]
    return _top1(expected, found) | {"lines": float(np.mean(same))}


def _top1(expected: Sequence[Rows], found: Sequence[Rows]) -> dict[str, float]:
    a, b = np.concatenate(expected), np.concatenate(found)
    return {"top-1": float(np.mean(a.argmax(1) == b.argmax(1)))}


def _mean_and_scale(path: Path) -> np.ndarray:
    """[2, 400]: what is added to the features, and what then multiplies them; Kaldi's text."""
    lines = [line.split() for line in path.read_text().splitlines()]
    return np.array([line[3:-1] for line in lines if line and line[0] == "<LearnRateCoef>"], float)


def features(wave: np.ndarray) -> np.ndarray:
    """Log mel energies as FSMN-VAD wants them, float32 [frames, 5 * 80]: five frames in a row."""
    options = fbank.FbankOptions()
    options.frame_opts.samp_freq = samples.RATE
    options.frame_opts.dither = 0
    options.frame_opts.window_type = "hamming"
    options.mel_opts.num_bins = 80
    options.energy_floor = 0
    bank = fbank.OnlineFbank(options)
    bank.accept_waveform(samples.RATE, (wave * 32768).tolist())
    mel = np.stack([bank.get_frame(i) for i in range(bank.num_frames_ready)])
    mel = np.concatenate([mel[:1], mel[:1], mel, mel[-1:], mel[-1:]])
    stacked = np.concatenate([mel[i : len(mel) - 4 + i] for i in range(5)], axis=1)
    shift, scale = _mean_and_scale(path_of("fsmn_vad.mvn"))
    return ((stacked + shift) * scale).astype(np.float32)


def _feature_feeds(part: int) -> list[Feed]:
    """Whole utterances with empty caches; for part 0 pieces of FRAMES."""
    cache = {f"in_cache{i}": np.zeros((1, 128, 19, 1), np.float32) for i in range(4)}
    found = [features(wave) for wave in samples.speech(part, 60)]
    if part == 0:
        found = [f[i : i + FRAMES] for f in found for i in range(0, len(f) - FRAMES, FRAMES)]
    return [{"speech": f[None], **cache} for f in found]


def _chunk_feeds(part: int) -> list[Feed]:
    """Chunks of an utterance one after the other, each with the state the float model was in."""
    run = session(path_of("silero_vad"))
    feeds = []
    for wave in samples.speech(part, 12):
        state = np.zeros((2, 1, 128), np.float32)
        padded = np.pad(wave, (CONTEXT, 0))
        for i in range(0, len(wave) - CHUNK, CHUNK):
            feed = {"input": padded[None, i : i + CONTEXT + CHUNK], "state": state}
            feeds.append(feed | {"sr": np.array(samples.RATE, np.int64)})
            state = run.run(["stateN"], feeds[-1])[0]
    return feeds


def _decided(expected: Sequence[Rows], found: Sequence[Rows]) -> dict[str, float]:
    """Speech or not: the one probability above a half."""
    a, b = np.concatenate(expected), np.concatenate(found)
    return {"decision": float(np.mean((a > 0.5) == (b > 0.5)))}


def _heard(expected: Sequence[Rows], found: Sequence[Rows]) -> dict[str, float]:
    """The class of every frame, and speech or not: class 0 is silence."""
    silence = [[rows[:, :1] for rows in some] for some in (expected, found)]
    return _top1(expected, found) | _decided(*silence)


def _output(name: str, feed: Feed, outputs: Feed) -> Rows:
    return outputs[name].reshape(-1, outputs[name].shape[-1])


SUBJECTS = (
    Subject("minilm", "200 sentences", _token_feeds, _embedding, _cosine),
    Subject("open_nsfw", "96 crops of photographs", _photograph_feeds, _log_odds, _top1),
    Subject(
        "ppocr_rec", "96 rendered lines", _line_feeds, partial(_output, "fetch_name_0"), _spelt
    ),
    Subject("fsmn_vad", "60 utterances", _feature_feeds, partial(_output, "logits"), _heard),
    Subject("silero_vad", "12 utterances", _chunk_feeds, partial(_output, "output"), _decided),
)
