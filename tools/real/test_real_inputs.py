"""The inputs are what they claim to be, and the bench measures what guard() does by itself."""

import shutil
from pathlib import Path

import numpy as np
import pytest

for library in ("blingfire", "kaldi_native_fbank", "sklearn"):
    pytest.importorskip(library, reason=f"needs {library}")
if not shutil.which("espeak-ng"):
    pytest.skip("needs espeak-ng", allow_module_level=True)

import flipguard_onnx  # noqa: E402
from tools import real_inputs  # noqa: E402
from tools.attacks.measure import session  # noqa: E402
from tools.bench.remembered import remembered  # noqa: E402
from tools.fetch_models import path_of  # noqa: E402
from tools.real import samples  # noqa: E402
from tools.real.subjects import LINE, SUBJECTS, Subject, decoded  # noqa: E402

KNOWN = {subject.name: subject for subject in SUBJECTS}


def outputs(subject: Subject, count: int) -> list[np.ndarray]:
    """What the float model says to the first inputs that are judged on."""
    if not path_of(subject.name).exists():
        pytest.skip(f"python tools/fetch_models.py {subject.name}")
    run = session(path_of(subject.name))
    names = [output.name for output in run.get_outputs()]
    feeds = subject.feeds(1)[:count]
    return [subject.read(f, dict(zip(names, run.run(None, f), strict=True))) for f in feeds]


def test_the_parts_share_no_sentence_and_no_photograph():
    assert len(samples.sentences(1)) > 500
    assert not set(samples.sentences(0)) & set(samples.sentences(1))
    assert not set(samples.PHOTOGRAPHS[0]) & set(samples.PHOTOGRAPHS[1])
    assert not set(samples.VOICES[0]) & set(samples.VOICES[1])


def test_a_ctc_output_is_spelt_without_blanks_and_repetitions():
    path = [0, 3, 3, 0, 3, 5, 5, 0, 0]
    assert decoded(np.eye(6)[path]) == [3, 3, 5]


def test_the_recognizer_reads_most_lines():
    found = outputs(KNOWN["ppocr_rec"], 30)
    run = session(path_of("ppocr_rec"))
    listed = run.get_modelmeta().custom_metadata_map["character"].splitlines()
    characters = ["", *listed, " "]
    read = ["".join(characters[code] for code in decoded(rows)) for rows in found]
    right = [text for _, text in samples.lines(1, 30, *LINE)]
    assert np.mean([a == b for a, b in zip(read, right, strict=True)]) > 0.8


def test_the_voice_detector_hears_speech_after_the_silence():
    silent = [rows[:, 0] for rows in outputs(KNOWN["fsmn_vad"], 8)]  # class 0
    before = np.mean([rows[:20].mean() for rows in silent])
    amid = np.mean([rows[len(rows) // 3 : 2 * len(rows) // 3].mean() for rows in silent])
    assert before > 2 * amid


def test_statistics_that_are_remembered_change_nothing(tmp_path):
    source = path_of("fsmn_vad")
    if not source.exists():
        pytest.skip("python tools/fetch_models.py fsmn_vad")

    def written(name: str, scheme: str, seed: int) -> bytes:
        output = Path(tmp_path / name)
        flipguard_onnx.guard(source, scheme, seed=seed, output=output, validate=False)
        return output.read_bytes()

    alone = written("alone.onnx", "int4", 2)
    with remembered():
        written("first.onnx", "int8", 1)
        assert written("again.onnx", "int4", 2) == alone


def test_plain_codes_are_onnxruntimes_and_draws_beat_its_int8():
    if not path_of("fsmn_vad").exists():
        pytest.skip("python tools/fetch_models.py fsmn_vad")
    rows = list(real_inputs.measure(KNOWN["fsmn_vad"], ["int8", "nf4"], seeds=1))
    drift = {(row.scheme, row.weights, row.way): row.drift for row in rows}
    theirs = drift["nf4", "MatMul", "onnxruntime"]
    assert drift["nf4", "MatMul", "plain"] == pytest.approx(theirs, rel=1e-3)
    assert drift["int8", "all", "ours"] < drift["int8", "all", "onnxruntime"]
    assert drift["nf4", "all", "ours + data"] < drift["nf4", "all", "plain"]
    assert {row.way for row in rows} == {*real_inputs.WAYS, real_inputs.ONNXRUNTIME}
    assert f"{drift['nf4', 'all', 'plain']:.4f}" in real_inputs.table(rows)
