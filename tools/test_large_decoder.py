"""The decoder is one, and is guarded whole, in pieces, and after an interruption."""

import json
import math
import os
import signal
import subprocess
import time
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto

from tools.large_decoder import (
    SHAPES,
    Cost,
    extrapolated,
    guard_command,
    main,
    measured,
    write_decoder,
)

TINY = SHAPES["tiny"]


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    path = tmp_path_factory.mktemp("decoder") / "model.onnx"
    write_decoder(path, TINY)
    return path


def run(path, ids, past=None):
    """Logits, and the caches to go on with."""
    session = onnxruntime.InferenceSession(path)
    caches = [i for i in session.get_inputs() if i.name.startswith("past_key_values.")]
    dtype = {"tensor(float)": np.float32, "tensor(float16)": np.float16}[caches[0].type]
    empty = np.zeros((len(ids), TINY.kv_heads, 0, TINY.head_size), dtype)
    past = past or {i.name: empty for i in caches}
    begun = next(iter(past.values())).shape[2]
    feed = {
        "input_ids": ids,
        "attention_mask": np.ones((len(ids), begun + ids.shape[1]), np.int64),
        "position_ids": np.arange(begun, begun + ids.shape[1])[None].repeat(len(ids), 0),
    }
    names = [output.name for output in session.get_outputs()]
    found = dict(zip(names, session.run(None, feed | past), strict=True))
    return found.pop("logits"), {
        name.replace("present", "past_key_values"): values for name, values in found.items()
    }


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 1e-5), (np.float16, 1e-2)])
def test_logits_are_the_same_with_and_without_caches(tmp_path, dtype, tolerance):
    path = tmp_path / "model.onnx"
    write_decoder(path, TINY, dtype)
    onnx.checker.check_model(path, full_check=True)
    ids = np.random.default_rng(1).integers(0, TINY.vocabulary, (3, 9))
    whole, _ = run(path, ids)
    first, past = run(path, ids[:, :5])
    assert {values.shape for values in past.values()} == {(3, TINY.kv_heads, 5, TINY.head_size)}
    second, _ = run(path, ids[:, 5:], past)
    assert whole.dtype == dtype
    assert 0.05 < whole.std() < 5
    np.testing.assert_allclose(np.concatenate([first, second], 1), whole, atol=tolerance)


def test_what_comes_later_changes_nothing_before_it(decoder):
    ids = np.random.default_rng(1).integers(0, TINY.vocabulary, (1, 9))
    other = ids.copy()
    other[0, 5] = (ids[0, 5] + 1) % TINY.vocabulary
    logits, changed = run(decoder, ids)[0], run(decoder, other)[0]
    np.testing.assert_allclose(changed[:, :5], logits[:, :5], atol=1e-6)
    assert np.abs(changed - logits)[0, 5:].max(axis=1).min() > 1e-3


def test_tokens_are_told_apart_by_their_places(decoder):
    ids = np.random.default_rng(1).integers(0, TINY.vocabulary, (1, 9))
    swapped = ids[:, [1, 0, *range(2, 9)]]
    assert np.abs(run(decoder, ids)[0] - run(decoder, swapped)[0])[0, -1].max() > 1e-3


def test_weights_are_counted(tmp_path):
    path = tmp_path / "model.onnx"
    write_decoder(path, TINY, np.float16)
    initializers = onnx.load(path).graph.initializer
    weights = [t for t in initializers if t.data_type == TensorProto.FLOAT16 and t.dims]
    assert sum(math.prod(t.dims) for t in weights) == TINY.parameters
    known = {"llama-3.2-1b": 1_235_814_400, "llama-3-8b": 8_030_261_248}  # as published
    assert {name: SHAPES[name].parameters for name in known} == known


def cost(layers, **changed):
    sizes = {"parameters": 10 + layers, "model": 30 + 2 * layers, "output": 5, "disk": 7 * layers}
    stages = {"start": 1.0, "guarding": 3.0 * layers}
    others = {"wall": 1 + 3 * layers, "cpu": 1 + 4 * layers, "private": 100, "resident": 200}
    return Cost(layers=layers, stages=stages, **(sizes | others | changed))


def test_every_further_layer_costs_the_same():
    full = replace(TINY, layers=10)
    found = extrapolated(cost(2), cost(4, private=110), full)
    assert found == cost(10, private=110, parameters=full.parameters)


@pytest.mark.parametrize("memory", ["1024", "1"])  # whole; in pieces: the file has 1.1 MiB
def test_a_run_is_measured_and_leaves_nothing(tmp_path, memory):
    folder = tmp_path / "large"
    found = measured(folder, TINY, np.float32, ["--scheme", "int4", "--max-memory", memory])
    assert not list(folder.iterdir())
    assert 4 * TINY.parameters < found.model < 5 * TINY.parameters
    assert 0.5 * TINY.parameters < found.output < 1.5 * TINY.parameters
    assert found.disk > found.output
    assert 0 < found.cpu < 4 * found.wall
    assert found.resident > found.private > 50e6
    assert sum(found.stages.values()) == pytest.approx(found.wall)
    assert {"sampling token ids", "guarding", "validating"} <= found.stages.keys()


def test_a_run_that_was_killed_goes_on_to_the_same_file(decoder, tmp_path):
    files = {}
    for name in ("once", "resumed"):
        output, work = tmp_path / name / "model.onnx", tmp_path / f"{name}-work"
        output.parent.mkdir()
        options = ["--scheme", "int4", "--max-memory", "1", "--seed", "7", "--no-validate"]
        command = guard_command(decoder, output, work, options)
        if name == "resumed":
            kill(command, work)
            assert not output.exists()
            assert list(work.iterdir())
        subprocess.run(command, check=True, capture_output=True)
        assert not work.exists()
        files[name] = {file.name: file.read_bytes() for file in output.parent.iterdir()}
    assert files["resumed"] == files["once"]


def kill(command, work):
    """Start it, and end the process and its children once two weights were drawn."""
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
    while len([*work.glob("*/*")]) < 4:  # the seeds, the inputs and two weights
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def test_the_full_model_is_a_row_of_its_own(tmp_path, capsys):
    file = tmp_path / "costs.json"
    asked = ["--like", "tiny", "--layers", "1", "3", "--json", str(file)]
    main([str(tmp_path / "large"), *asked, "--", "--no-validate", "--preserve", "off"])
    rows = json.loads(file.read_text())["runs"]
    assert [row.pop("known") for row in rows] == ["measured", "measured", "extrapolated"]
    assert Cost(**rows[2]) == extrapolated(Cost(**rows[0]), Cost(**rows[1]), TINY)
    assert "| extrapolated |" in capsys.readouterr().out
