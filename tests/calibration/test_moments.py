"""What weights are multiplied with: recorded from the float model, on made-up inputs or given."""

import hashlib
import itertools
import math
import os
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

import flipguard_onnx
from flipguard_onnx import OptionError, UnsupportedModelError
from flipguard_onnx.calibration import moments
from flipguard_onnx.calibration.moments import RECORDING, MomentRecorder
from flipguard_onnx.calibration.samples import Samples
from flipguard_onnx.calibration.synthetic import input_range, synthetic_feeds
from flipguard_onnx.graph.weights import find_weights
from flipguard_onnx.io.model import open_model
from flipguard_onnx.quantization.error_feedback import InputMoments
from flipguard_onnx.runtime.session import open_session
from tests.helpers import decoders
from tests.helpers.command import call
from tests.helpers.samples import SAMPLES, matmul, model, node, save, weights

F = TensorProto.FLOAT
PLENTY = 1 << 30
RECURRENT = "recurrent: LSTM multiplies it with its own state"


def recorder(tmp_path, proto, data=None, max_bytes=PLENTY):
    source = open_model(save(proto, tmp_path))
    found = find_weights(source.proto)[0]
    folder = tmp_path / f"probe{max_bytes}"
    return MomentRecorder(Samples(source, data), found, folder, max_bytes), found


def given(tmp_path, **arrays):
    np.savez(tmp_path / "data.npz", **arrays)
    return tmp_path / "data.npz"


@pytest.fixture
def nothing_beside(monkeypatch):
    """However few inputs are given."""
    monkeypatch.setattr(moments, "ENOUGH", 0)


@pytest.mark.usefixtures("nothing_beside")
def test_second_moments_of_the_given_inputs(tmp_path):
    x = np.random.default_rng(0).standard_normal((10, 7, 70)).astype(np.float32)
    recorded, (weight,) = recorder(tmp_path, matmul(), given(tmp_path, x=x))
    inputs = recorded.of(weight)
    rows = x[:9].reshape(-1, 70).astype(np.float64)  # the tenth is kept for the comparison
    np.testing.assert_allclose(inputs.hessians[0][0], rows.T @ rows, rtol=1e-5, atol=1e-4)
    np.testing.assert_array_equal(inputs.fresh[0], x[9])


@pytest.mark.usefixtures("nothing_beside")
def test_many_rows_of_wide_inputs_are_added_up_in_turn(tmp_path):
    x = np.random.default_rng(0).standard_normal((10, 90, 1400)).astype(np.float32)
    recorded, (weight,) = recorder(tmp_path, matmul((1400, 30)), given(tmp_path, x=x))
    inputs = recorded.of(weight)
    rows = x.reshape(-1, 1400).astype(np.float64)
    kept = inputs.fresh.shape[1]
    assert 0 < kept < 200
    np.testing.assert_array_equal(inputs.fresh[0], rows[-kept:])
    expected = rows[:-kept].T @ rows[:-kept]
    np.testing.assert_allclose(inputs.hessians[0][0], expected, rtol=1e-5, atol=1e-4)


def test_made_up_inputs_count_as_few_rows_beside_few_given_ones(tmp_path):
    """A tenth of a row for each of the 70 columns, as large as those given, in all directions."""
    x = 100 * np.random.default_rng(0).standard_normal((9, 1, 70)).astype(np.float32)
    recorded, (weight,) = recorder(tmp_path, matmul(), given(tmp_path, x=x))
    rows = x[:8, 0].astype(np.float64)
    beside = recorded.of(weight).hessians[0][0] - rows.T @ rows
    assert np.trace(beside) == pytest.approx(7 * np.square(x[8]).sum(), rel=1e-3)
    assert np.linalg.eigvalsh(beside)[0] > 0.01 * np.trace(beside) / 70
    report = guard(tmp_path, matmul(), data=tmp_path / "data.npz")
    assert f"preserve  on data inputs ({report.preserve_note}): " in report.render()
    assert report.preserve_note == (
        "fewer than 16 rows per column of some weight, so made-up ones stand beside them"
    )


def test_texts_that_a_decoder_wrote_count_for_more(tmp_path, monkeypatch):
    """A row for each column."""
    ids = np.random.default_rng(0).integers(0, decoders.VOCABULARY, (4, 1, 9))
    data, found = given(tmp_path, input_ids=ids), []
    for prior in (0, moments.PRIOR_OF_TEXTS):
        monkeypatch.setattr(moments, "PRIOR_OF_TEXTS", prior)
        folder = tmp_path / str(prior)
        folder.mkdir()
        recorded, known = recorder(folder, decoders.decoder(), data)
        matrix = next(each for each in known if each.op == "MatMul")
        found.append(recorded.of(matrix))
    alone, together = (np.trace(inputs.hessians[0][0]) for inputs in found)
    power = np.square(found[0].fresh[0]).sum(axis=1).mean()
    columns = found[0].spans[0].stop
    assert together - alone == pytest.approx(columns * power, rel=1e-3)


def test_nothing_stands_beside_many_given_inputs(tmp_path):
    """Sixteen for every column."""
    x = np.random.default_rng(0).standard_normal((256, 5, 70)).astype(np.float32)
    recorded, (weight,) = recorder(tmp_path, matmul(), given(tmp_path, x=x))
    rows = x[:224].reshape(-1, 70).astype(np.float64)
    found = recorded.of(weight).hessians[0][0]
    np.testing.assert_allclose(found, rows.T @ rows, rtol=1e-4, atol=1e-3)
    assert recorded.note is None


@pytest.mark.parametrize("made_up", ["are refused", "overflow"])
def test_nothing_stands_beside_given_inputs_where_made_up_ones_will_not_do(tmp_path, made_up):
    """The index 0 alone is in a table, or exponentials of exponentials are infinite."""
    exponentials = [node("Exp", f"{a}", f"{b}") for a, b in itertools.pairwise("xabcd")]
    nodes, arrays = {
        "are refused": (
            [node("Cast", "i", "n", to=TensorProto.INT64), node("Gather", "t n", "d")],
            {"i": np.zeros((9, 1), np.float32)},
        ),
        "overflow": (exponentials, {}),
    }[made_up]
    proto = model(
        [*nodes, node("Mul", "x d", "z"), node("MatMul", "z w", "y")],
        {"x": (F, [1, 70])} | {name: (F, [1]) for name in arrays},
        {"y": (F, [1, 33])},
        {"w": weights((70, 33)), "t": np.ones(1, np.float32)},
    )
    x = np.random.default_rng(0).uniform(-0.1, 0.1, (9, 1, 70)).astype(np.float32)
    recorded, found = recorder(tmp_path, proto, given(tmp_path, x=x, **arrays))
    (weight,) = (each for each in found if each.name == "w")
    z = x if arrays else x * np.exp(np.exp(np.exp(np.exp(x))))
    rows = z[:8, 0].astype(np.float64)
    np.testing.assert_allclose(
        recorded.of(weight).hessians[0][0], rows.T @ rows, rtol=1e-3, atol=1e-6 * np.square(z).max()
    )
    assert (recorded.note is None) == (made_up == "are refused")


CONVOLUTIONS = {
    "plain": ((8, 6, 3, 3), {}),
    "strides and pads": ((8, 6, 3, 5), {"strides": [2, 1], "pads": [1, 0, 2, 3]}),
    "dilations": ((8, 6, 3, 2), {"dilations": [2, 3]}),
    "groups": ((8, 3, 3, 3), {"group": 2, "pads": [1, 1, 1, 1]}),
    "depthwise": ((6, 1, 5, 5), {"group": 6}),
    "same upper": ((8, 6, 4, 4), {"auto_pad": "SAME_UPPER", "strides": [2, 2]}),
    "same lower": ((8, 6, 4, 4), {"auto_pad": "SAME_LOWER", "strides": [3, 1]}),
    "valid": ((8, 6, 3, 3), {"auto_pad": "VALID"}),
    "one axis": ((8, 6, 5), {"strides": [2], "pads": [2, 1]}),
    "three axes": ((8, 6, 2, 3, 2), {"strides": [1, 2, 1]}),
}


@pytest.mark.parametrize("form", CONVOLUTIONS)
def test_patches_times_weights_are_the_convolution(tmp_path, form):
    shape, attributes = CONVOLUTIONS[form]
    sizes = [11, 12] if len(shape) == 4 else [6, 5, 7][: len(shape) - 2]
    x = np.random.default_rng(1).standard_normal((2, 6, *sizes)).astype(np.float32)
    proto = model(
        [node("Conv", "x w", "y", **attributes)],
        {"x": (F, [2, 6, *sizes])},
        {"y": (F, None)},
        {"w": weights(shape)},
    )
    recorded, (weight,) = recorder(tmp_path, proto, given(tmp_path, x=x))
    inputs = recorded.of(weight)
    path = str(tmp_path / "model.onnx")
    y = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"x": x})
    groups = attributes.get("group", 1)
    rows = weights(shape).reshape(groups, shape[0] // groups, -1)
    products = rows @ inputs.fresh.transpose(0, 2, 1)  # [groups, channels, samples and places]
    wanted = np.moveaxis(y[0], 1, 0).reshape(groups, shape[0] // groups, -1)
    np.testing.assert_allclose(products, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("sample", "recorded"),
    [
        ("matmul_left", True),
        ("gemm_transposed", True),
        ("shared", True),
        ("lstm", True),
        ("gather", False),
        ("nested", False),
        ("conv_transpose", False),
    ],
)
def test_what_can_be_recorded(tmp_path, sample, recorded):
    proto = SAMPLES[sample]()
    if not recorded:
        with pytest.raises(UnsupportedModelError, match="the inputs of no weight"):
            recorder(tmp_path, proto)
        return
    found, its_weights = recorder(tmp_path, proto)
    unknown = [found.of(w) for w in its_weights if not isinstance(found.of(w), InputMoments)]
    assert unknown == ([RECURRENT] if sample == "lstm" else [])


def test_less_memory_means_spans_and_more_passes_but_the_same_sums(tmp_path):
    proto = model(
        [node("MatMul", "x a", "h"), node("MatMul", "h b", "y")],
        {"x": (F, ["n", 300])},
        {"y": (F, ["n", 80])},
        {"a": weights((300, 200)), "b": weights((200, 80), 1)},
    )
    ample, its_weights = recorder(tmp_path, proto)
    tight, _ = recorder(tmp_path, proto, max_bytes=1_600_000)
    said = []
    tight.prepare(lambda stage, done, total: said.append((stage, done)))
    for weight in its_weights:
        one, other = ample.of(weight), tight.of(weight)
        assert len(one.spans) == 1
        assert [len(s) for s in other.spans] == (
            [128, 128, 44] if weight.name == "a" else [128, 72]
        )
        for span, hessian in zip(other.spans, other.hessians, strict=True):
            part = one.hessians[0][:, span.start : span.stop, span.start : span.stop]
            np.testing.assert_allclose(hessian, part, rtol=1e-5, atol=1e-3)
        np.testing.assert_array_equal(one.fresh, other.fresh)
    assert said.count(("recording what weights are multiplied with", 0)) == 2


def test_sums_in_float32_draw_as_well_as_sums_in_float64(tmp_path):
    """Many inputs with a large common mean and one column far larger than the others."""
    rng = np.random.default_rng(0)
    x = 3 + rng.standard_normal((400, 60, 70)) @ (rng.standard_normal((70, 70)) / 8)
    x[..., 5] *= 1000
    x = x.astype(np.float32)
    recorded, (weight,) = recorder(tmp_path, matmul(), given(tmp_path, x=x))
    inputs = recorded.of(weight)
    rows = x[:350].reshape(-1, 70).astype(np.float64)
    exact = replace(inputs, hessians=((rows.T @ rows)[None],))
    (order, factors), (exact_order, exact_factors) = inputs.factors[0], exact.factors[0]
    np.testing.assert_array_equal(order, exact_order)
    assert np.abs(factors - exact_factors).max() < 1e-3 * np.abs(exact_factors).max()


def decoder(vocabulary=50):
    """Says after every id the one that follows it, round in a circle."""
    following = np.roll(100 * np.eye(vocabulary, dtype=np.float32), 1, axis=1)
    return model(
        [node("Gather", "table ids", "h"), node("MatMul", "h w", "logits")],
        {"ids": (TensorProto.INT64, ["batch", "length"])},
        {"logits": (F, ["batch", "length", vocabulary])},
        {"table": np.eye(vocabulary, dtype=np.float32), "w": following},
    )


def test_token_ids_are_sampled_from_a_decoder(tmp_path):
    source = open_model(save(decoder(), tmp_path))
    session = open_session(source.path, exact=True, size=source.size)
    template = {"ids": np.zeros((1, 5), np.int64)}  # so many rounds make exact samples
    feeds = synthetic_feeds(source, session, template, samples=6, batch=3, seed=0)
    assert [feed["ids"].shape for feed in feeds] == [(3, 5)] * 2
    for feed in feeds:
        np.testing.assert_array_equal(np.diff(feed["ids"]) % 50, 1)
    assert len({first for feed in feeds for first in feed["ids"][:, 0]}) > 3
    again = synthetic_feeds(source, session, template, samples=6, batch=3, seed=0)
    np.testing.assert_array_equal(again[1]["ids"], feeds[1]["ids"])


def _normalized(nodes, constants):
    return model(
        [*nodes, node("MatMul", "h w", "y")],
        {"x": (F, ["n", 70])},
        {"y": (F, ["n", 33])},
        {"w": weights((70, 33)), **{k: np.array(v, np.float32) for k, v in constants.items()}},
    )


RANGES = {
    "nothing": ([node("Identity", "x", "h")], {}, (0, 1)),
    "subtract, divide": (
        [node("Sub", "x mean", "c"), node("Div", "c std", "h")],
        {"mean": 127.5, "std": 60.0},
        (127.5, 60),
    ),
    "multiply, add": (
        [node("Mul", "x k", "c"), node("Add", "b c", "h")],
        {"k": 1 / 128, "b": -1.0},
        (128, 128),
    ),
    "batch normalization": (
        [node("Mul", "x k", "c"), node("BatchNormalization", "c s b mean var", "h")],
        {"k": 0.5, "s": [1] * 70, "b": [0] * 70, "mean": [3] * 70, "var": [16] * 70},
        (6, 8),
    ),
    "times zero": ([node("Mul", "x k", "h")], {"k": 0.0}, (0, 1)),
}


@pytest.mark.parametrize("form", RANGES)
def test_the_graph_suggests_the_range_of_its_input(tmp_path, form):
    nodes, constants, expected = RANGES[form]
    source = open_model(save(_normalized(nodes, constants), tmp_path))
    assert input_range(source, "x") == pytest.approx(expected)


def test_made_up_images_fill_the_range_and_are_smooth(tmp_path):
    proto = model(
        [node("Sub", "x mean", "h"), node("Conv", "h w", "y")],
        {"x": (F, ["n", 3, 32, 32])},
        {"y": (F, None)},
        {"w": weights((8, 3, 3, 3)), "mean": np.float32(100)},
    )
    source = open_model(save(proto, tmp_path))
    template = {"x": np.zeros((1, 3, 32, 32), np.float32)}
    feeds = synthetic_feeds(source, None, template, samples=32, batch=1, seed=0)
    images = np.concatenate([feed["x"] for feed in feeds])
    assert images.mean() == pytest.approx(100, abs=0.01)
    assert images.std() == pytest.approx(1, abs=0.01)
    centred = images - images.mean(axis=(2, 3), keepdims=True)
    neighbours = (centred[:, :, :, 1:] * centred[:, :, :, :-1]).mean(axis=(1, 2, 3))
    assert np.median(neighbours) > 0.2
    assert neighbours.max() > 2 * max(neighbours.min(), 0.1)  # some smooth, some rough


def streaming(name, rows, kept="n"):
    """Adds what came before to its input, and hands it on."""
    return model(
        [node("Concat", f"{name} x", "all", axis=0), node("MatMul", "all w", "y")],
        {"x": (F, ["n", 70]), name: (F, [rows, 70])},
        {"y": (F, ["n", 33]), "all": (F, [kept, 70])},
        {"w": weights((70, 33))},
    )


@pytest.mark.parametrize(
    ("name", "rows", "kept", "zero"),
    [
        ("in_cache", 4, "n", True),
        ("past_key", "m", "n", True),
        ("state", 4, 4, True),
        ("in_cache", 4, 5, False),  # no output hands it on
        ("hidden_states", 4, 4, False),
        ("other", 4, 4, False),
    ],
)
def test_a_state_starts_at_zero(tmp_path, name, rows, kept, zero):
    source = open_model(save(streaming(name, rows, kept), tmp_path))
    feed = {"x": np.ones((3, 70), np.float32), name: np.ones((4, 70), np.float32)}
    made_up = synthetic_feeds(source, None, feed, 2, 1, 0)[0]
    assert made_up["x"].any()
    assert made_up[name].any() != zero


@pytest.mark.parametrize(("first", "feeds"), [("n", 2), (1, 32)])
def test_a_fixed_batch_of_one_means_more_feeds(tmp_path, first, feeds):
    proto = model(
        [node("MatMul", "x w", "y")],
        {"x": (F, [first, 9, 70])},
        {"y": (F, [first, 9, 33])},
        {"w": weights((70, 33))},
    )
    source = open_model(save(proto, tmp_path))
    made_up = synthetic_feeds(source, None, {"x": np.zeros((1, 9, 70))}, 32, 16, 0)
    assert len(made_up) == feeds
    assert sum(len(feed["x"]) for feed in made_up) == 32


@pytest.mark.parametrize(("rows", "at_a_time"), [(64, 16), (2048, 4), (10_000, 1)])
def test_long_samples_are_run_a_few_at_a_time(tmp_path, rows, at_a_time):
    """Attention over a batch of them would take more memory than there is."""
    proto = model(
        [node("MatMul", "x w", "y")],
        {"x": (F, ["n", rows, 70])},
        {"y": (F, ["n", rows, 33])},
        {"w": weights((70, 33))},
    )
    said = {}
    guard(tmp_path, proto, progress=lambda stage, _, total: said.update({stage: total}))
    samples = (128 if rows == 64 else 64) * 9 // 8  # at least 64, and 8,192 rows; one in 8 more
    assert said[RECORDING] == -(-samples // at_a_time)


def test_made_up_vectors_are_white(tmp_path):
    proto = model(
        [node("Gemm", "x w", "y")], {"x": (F, ["n", 64])}, {"y": (F, None)}, {"w": weights((64, 8))}
    )
    source = open_model(save(proto, tmp_path))
    template = {"x": np.zeros((1, 64), np.float32)}
    feeds = synthetic_feeds(source, None, template, samples=4096, batch=16, seed=0)
    vectors = np.concatenate([feed["x"] for feed in feeds])
    assert np.cov(vectors.T) == pytest.approx(np.eye(64), abs=0.1)


def guard(tmp_path, proto, **options):
    source = save(proto, tmp_path)
    options = {"seed": 1, "output": tmp_path / "out.onnx", "force": True} | options
    return flipguard_onnx.guard(source, **options)


def correlated(tmp_path, dtype=np.float32):
    """Inputs of 70 values that 12 determine."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((256, 5, 12)) @ rng.standard_normal((12, 70))
    return given(tmp_path, x=x.astype(dtype))


@pytest.mark.parametrize("scheme", ["int8", "int4", "nf4", "fp4"])
def test_guard_preserves_the_products_of_a_layer(tmp_path, scheme):
    """On correlated data, given as such; the report says what was done."""
    data, drift = correlated(tmp_path), {}
    for preserve in ("off", "data"):
        report = guard(tmp_path, matmul(), scheme=scheme, preserve=preserve, data=data)
        assert report.preserve == preserve
        drift[preserve] = report.validation.guarded_exact[0].relative_l2
    assert drift["data"] < 0.5 * drift["off"]
    (tensor,) = report.tensors
    assert tensor.preserved
    assert 0 < tensor.gain < 0.3
    assert "preserve  on data inputs: 1 of 1 tensor, 100.0% of the weights" in report.render()
    assert report.data_sha256 == hashlib.sha256(data.read_bytes()).hexdigest()
    written = onnx.load(tmp_path / "out.onnx")
    record = {entry.key: entry.value for entry in written.metadata_props}
    assert record["flipguard.data_sha256"] == report.data_sha256


def test_tensors_without_feedback_are_listed_with_the_reason(tmp_path):
    report = guard(tmp_path, SAMPLES["lstm"](), preserve="synthetic")
    unfed = [tensor for tensor in report.tensors if tensor.unfed]
    assert [tensor.unfed for tensor in unfed] == [RECURRENT]
    assert f"not in 1 tensor, {unfed[0].weights:,} weights: {RECURRENT}" in report.render()


def test_auto_takes_the_data_if_there_is_any_and_is_off_for_other_policies(tmp_path):
    data = given(tmp_path, x=np.ones((4, 70), np.float32))
    assert guard(tmp_path, matmul()).preserve == "synthetic"
    assert guard(tmp_path, matmul(), data=data).preserve == "data"
    assert guard(tmp_path, matmul(), policy="topk").preserve == "off"


def test_a_model_larger_than_the_memory_runs_in_pieces_with_the_same_moments(tmp_path):
    """A decoder, whose inputs are sampled from itself."""
    proto = decoder()
    whole, found = recorder(tmp_path, proto)
    pieces, _ = recorder(tmp_path, proto, max_bytes=1 << 13)
    assert whole.pieces == 1 < pieces.pieces
    for weight in found:
        a, b = whole.of(weight), pieces.of(weight)
        if isinstance(a, str):
            assert a == b
            continue
        np.testing.assert_array_equal(a.fresh, b.fresh)
        for span, hessian in zip(b.spans, b.hessians, strict=True):
            columns = slice(span.start, span.stop)
            np.testing.assert_array_equal(a.hessians[0][:, columns, columns], hessian)


def test_a_model_in_pieces_runs_once_whatever_the_order_of_its_initializers(tmp_path):
    """Its weights are drawn in the order in which their inputs are known."""
    shapes = {"c": (500, 310), "b": (400, 500), "a": (300, 400)}
    proto = model(
        [node("MatMul", "x a", "h"), node("MatMul", "h b", "k"), node("MatMul", "k c", "y")],
        {"x": (F, ["n", 300])},
        {"y": (F, ["n", 310])},
        {name: weights(shape, 1) for name, shape in shapes.items()},
    )
    said = []

    def progress(stage, done, total):
        if stage == "guarding":
            said.append(done)

    report = guard(tmp_path, proto, max_memory=1, progress=progress)
    assert [tensor.name for tensor in report.tensors] == ["c", "b", "a"]
    assert report.preserve == "synthetic"
    sizes = [4 * math.prod(shapes[name]) for name in "bac"]  # k comes last
    assert np.diff(said).tolist() == sizes


def test_the_estimate_is_shown_before_the_feedback_starts(tmp_path):
    said = []
    guard(tmp_path, matmul(), progress=lambda stage, done, total: said.append(stage))
    stages = [re.sub(r"about \d+ s", "about N s", stage) for stage in dict.fromkeys(said)]
    feedback = ["running the float model", "error feedback, about N s", "making up inputs"]
    recording = "recording what weights are multiplied with"
    assert stages[:6] == ["trying the inputs", *feedback, recording, "scanning"]


def test_the_file_does_not_depend_on_the_number_of_cores(tmp_path):
    """Of numba, the BLAS and onnxruntime, all at once: the process is bound to its cores."""
    proto = model(
        [node("MatMul", "x first", "h"), node("Relu", "h", "r"), node("MatMul", "r second", "y")],
        {"x": (F, ["n", 300])},
        {"y": (F, ["n", 200])},
        {"first": weights((300, 260)), "second": weights((260, 200), 1)},
    )
    source = save(proto, tmp_path)
    cores = sorted(os.sched_getaffinity(0))
    files = []
    for some in (cores[:1], cores):
        output = tmp_path / f"{len(some)}.onnx"
        program = (
            f"import os; os.sched_setaffinity(0, {some})\n"
            "import sys; from flipguard_onnx.cli import main; main(sys.argv[1:])"
        )
        arguments = [str(source), "--scheme", "int4", "--seed", "1", "-o", str(output)]
        subprocess.run([sys.executable, "-c", program, *arguments, "--quiet"], check=True)
        files.append(output.read_bytes())
    assert files[0] == files[1]


def test_a_model_that_does_not_run_on_made_up_inputs(tmp_path):
    proto = model(
        [node("Reshape", "x shape", "h"), node("MatMul", "h w", "y")],
        {"x": (F, ["n", "m"])},
        {"y": (F, [1000, 33])},
        {"w": weights((70, 33)), "shape": np.array([1000, 70])},
    )
    report = guard(tmp_path, proto, validate=False)
    assert report.preserve == "off"
    assert "does not run on these inputs" in report.preserve_note
    with pytest.raises(UnsupportedModelError, match="does not run on these inputs"):
        guard(tmp_path, proto, validate=False, preserve="synthetic")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preserve": "data"}, "needs inputs: give --data"),
        ({"preserve": "synthetic", "policy": "none"}, "is for the unbiased policy, not 'none'"),
        ({"preserve": "always"}, "allowed: auto, off, synthetic, data"),
        ({"int8": ("head*",), "scheme": "int4"}, "int8 pattern 'head.' names no weight"),
    ],
)
def test_what_is_asked_for_in_vain_is_refused(tmp_path, options, message):
    with pytest.raises(OptionError, match=message):
        guard(tmp_path, matmul(), **options)


def test_patterns_keep_weights_at_8_bits(tmp_path):
    proto = model(
        [node("MatMul", "x first", "h"), node("MatMul", "h second", "y")],
        {"x": (F, ["n", 64])},
        {"y": (F, ["n", 64])},
        {"first": weights((64, 64)), "second": weights((64, 64), 1)},
    )
    options = ("--scheme", "nf4", "--int8", "fir*", "-o", tmp_path / "out.onnx")
    result = call(save(proto, tmp_path), *options)
    assert result.exit_code == 0, result.output
    stored = {t.name: t.data_type for t in onnx.load(tmp_path / "out.onnx").graph.initializer}
    assert stored["first_quantized"] == TensorProto.INT8
    assert stored["second_quantized"] == TensorProto.UINT4
    record = {p.key: p.value for p in onnx.load(tmp_path / "out.onnx").metadata_props}
    assert record["flipguard.int8"] == "fir*"


def test_float16_models_are_preserved(tmp_path):
    proto = matmul(dtype=np.float16)
    assert proto.graph.input[0].type.tensor_type.elem_type == helper.np_dtype_to_tensor_dtype(
        np.dtype(np.float16)
    )
    report = guard(tmp_path, proto, scheme="int4", data=correlated(tmp_path, np.float16))
    assert report.preserve == "data"
    assert 0 < report.tensors[0].gain < 0.3


@pytest.mark.parametrize("given", [True, False])
def test_inputs_without_values_teach_nothing(tmp_path, given):
    proto = model(
        [node("MatMul", "x w", "a"), node("Conv", "z v", "b"), node("MatMul", "e u", "c")],
        {"x": (F, ["n", 32]), "z": (F, [0, 4, 10]), "e": (F, [0, 32])},
        {"a": (F, None), "b": (F, None), "c": (F, None)},
        {"w": weights((32, 48)), "v": weights((8, 4, 3)), "u": weights((32, 16), 1)},
    )
    x = np.random.default_rng(5).standard_normal((40, 32)).astype(np.float32)
    empty = {"z": np.zeros((0, 4, 10), np.float32), "e": np.zeros((0, 32), np.float32)}
    np.savez(tmp_path / "x.npz", x=x, **empty)
    report = flipguard_onnx.guard(
        save(proto, tmp_path), data=tmp_path / "x.npz" if given else None, seed=1
    )
    reasons = {tensor.name: tensor.unfed for tensor in report.tensors}
    assert reasons["v"] == reasons["u"] == "its inputs hold no values"
    assert reasons["w"] != reasons["v"]
    top1 = {drift.output: drift.top1 for drift in report.validation.guarded_exact}
    assert top1["c"] is None, "of no values, none is the largest"


def test_a_model_whose_inputs_are_all_empty(tmp_path):
    proto = model(
        [node("MatMul", "x w", "y")],
        {"x": (F, [0, 32])},
        {"y": (F, [0, 16])},
        {"w": weights((32, 16))},
    )
    (tensor,) = flipguard_onnx.guard(save(proto, tmp_path)).tensors
    assert tensor.unfed == "its inputs hold no values"
