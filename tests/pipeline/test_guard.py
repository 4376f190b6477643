"""guard() as a whole: every sample in every scheme is written, loads, runs and is right."""

import hashlib
import json
import math
import secrets
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

import flipguard_onnx
from flipguard_onnx import (
    GuardOptions,
    ModelError,
    OptionError,
    UnsupportedModelError,
    ValidationError,
)
from flipguard_onnx.reports.validation import pooled
from tests.helpers import oracles
from tests.helpers.command import names, workspaces
from tests.helpers.samples import SAMPLES, matmul, model, node, save, weights

SCHEMES = ("int8", "int4", "nf4", "fp4")

KERNEL_ERROR = 0.01  # relative L2: the kernel that onnxruntime fuses rounds its inputs to 8 bits


def run(path, feeds, exact=True):
    options = onnxruntime.SessionOptions()
    if exact:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


def decoded(rows, scheme):
    """What onnxruntime's own quantizer makes of a matrix, [rows, cols]."""
    if scheme == "int8":
        codes, scales = oracles.int8(rows, per_channel=True)
        return codes.reshape(rows.shape) * scales[:, None]
    if scheme == "int4":
        codes, scales = oracles.int4(rows)
        spread = np.repeat(scales.reshape(len(rows), -1), 32, axis=1)[:, : rows.shape[1]]
        return codes.reshape(rows.shape) * spread
    codes, absmax = oracles.bnb4(rows, scheme)
    return oracles.bnb4_decoded(codes, absmax, *rows.shape, scheme).reshape(rows.shape)


def guarded(tmp_path, proto, scheme="int8", **options):
    source = save(proto, tmp_path)
    options = {"seed": 1, "output": tmp_path / "out.onnx", "force": True} | options
    return flipguard_onnx.guard(source, scheme, **options)


def drift_ratio(validation):
    """Drift of all outputs, as a multiple of that of rounding to nearest."""
    return pooled(validation.guarded_exact) / pooled(validation.plain_exact)


def assert_validated(report, proto):
    """All outputs were compared, in both ways to run the graph.

    A draw doubles the squared error of a weight, so that its outputs drift about 1.4 times as far
    as those of rounding to nearest.
    """
    found = report.validation
    assert (found.feeds, found.layers) == (8, 0)
    for drifts in (found.plain_exact, found.plain_default, found.guarded_exact):
        assert [drift.output for drift in drifts] == [output.name for output in proto.graph.output]
        assert all(0 < drift.relative_l2 < 0.3 for drift in drifts)
    exact, default = pooled(found.guarded_exact), pooled(found.guarded_default)
    assert 0.99 * exact < default < 1.01 * math.hypot(exact, KERNEL_ERROR)
    assert 1.05 < drift_ratio(found) < 2.2


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("sample", SAMPLES)
def test_every_sample_is_guarded_and_valid(tmp_path, sample, scheme):
    proto = SAMPLES[sample]()
    report = guarded(tmp_path, proto, scheme)
    assert_validated(report, proto)
    assert 0.2 < report.flips / report.weights < 0.4  # a quarter of evenly spread weights
    left = onnx.load(tmp_path / "out.onnx")
    onnx.checker.check_model(left)
    names = {t.name for t in left.graph.initializer}
    assert not names & {"w", "r", "outer"}, "the float initializers are gone"


@pytest.mark.parametrize("sample", ["matmul", "gemm_transposed", "conv", "gather", "lstm"])
def test_int8_per_tensor(tmp_path, sample):
    proto = SAMPLES[sample]()
    report = guarded(tmp_path, proto, granularity="tensor")
    assert_validated(report, proto)
    scales = [t for t in onnx.load(tmp_path / "out.onnx").graph.initializer if "scale" in t.name]
    assert [list(t.dims) for t in scales] == [[]] * len(report.tensors)


@pytest.mark.parametrize("size", [16, 128])
@pytest.mark.parametrize("scheme", ["int4", "nf4", "fp4"])
def test_block_size(tmp_path, scheme, size):
    report = guarded(tmp_path, matmul((256, 32)), scheme, block_size=size)
    assert report.block_size == size
    scale = next(t for t in onnx.load(tmp_path / "out.onnx").graph.initializer if "scale" in t.name)
    assert np.prod(scale.dims) == 256 * 32 // size


@pytest.mark.parametrize("scheme", ["nf4", "fp4", "int4"])
@pytest.mark.parametrize("sample", ["matmul", "gemm_transposed", "gather", "tied_embedding"])
def test_a_portable_model_has_no_contrib_operator(tmp_path, sample, scheme):
    proto = SAMPLES[sample]()
    report = guarded(tmp_path, proto, scheme)
    assert_validated(report, proto)
    left = onnx.load(tmp_path / "out.onnx")
    assert {n.domain for n in left.graph.node} == {""}
    assert {entry.domain for entry in left.opset_import} == {""}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("transposed", [False, True])
def test_weights_that_run_equal_the_decoded_codes(tmp_path, scheme, transposed):
    """With the identity as input a MatMul returns its weights: exactly those of `decode`."""
    rows = weights((33, 70))
    proto = matmul()
    if transposed:
        proto = SAMPLES["gemm_transposed"]()
        proto.graph.initializer[1].CopyFrom(numpy_helper.from_array(np.zeros(33, "f"), "b"))
    proto.graph.initializer[0].CopyFrom(
        numpy_helper.from_array(rows if transposed else np.ascontiguousarray(rows.T), "w")
    )
    guarded(tmp_path, proto, scheme, policy="none")
    found = run(tmp_path / "out.onnx", {"x": np.eye(70, dtype=np.float32)})[0].T
    wanted = decoded(rows, scheme)
    assert np.array_equal(found, wanted)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_onnxruntime_makes_the_same_codes_of_the_moved_float_weights(tmp_path, scheme):
    guarded(tmp_path, matmul((128, 40)), scheme, emit="both")
    moved = onnx.load(tmp_path / "out-float.onnx")
    w = numpy_helper.to_array(moved.graph.initializer[0])
    assert not np.array_equal(w, weights((128, 40)))
    found = run(tmp_path / "out.onnx", {"x": np.eye(128, dtype=np.float32)})[0].T
    assert np.array_equal(found, decoded(np.ascontiguousarray(w.T), scheme))


def test_float_output_changes_nothing_but_the_weights(tmp_path):
    proto = SAMPLES["nested"]()
    proto.doc_string = "kept"
    proto.metadata_props.add(key="author", value="kept")
    guarded(tmp_path, proto, emit="float")
    moved = onnx.load(tmp_path / "out.onnx")
    ours = {p.key: p.value for p in moved.metadata_props}
    assert ours["author"] == "kept"
    assert ours["flipguard.seed"] == "1"
    for ours, theirs in zip(_tensors(moved), _tensors(proto), strict=True):
        assert not np.array_equal(numpy_helper.to_array(ours), numpy_helper.to_array(theirs))
        ours.CopyFrom(theirs)
    del moved.metadata_props[1:]
    assert moved == proto


def _tensors(proto):
    branches = [a.g for a in proto.graph.node[0].attribute]
    return [t for g in (proto.graph, *branches) for t in g.initializer]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_same_seed_same_bytes(tmp_path, scheme):
    digests = set()
    for name in ("a.onnx", "b.onnx"):
        guarded(tmp_path, SAMPLES["nested"](), scheme, output=tmp_path / name)
        digests.add((tmp_path / name).read_bytes())
    assert len(digests) == 1
    guarded(tmp_path, SAMPLES["nested"](), scheme, output=tmp_path / "c.onnx", seed=2)
    assert (tmp_path / "c.onnx").read_bytes() not in digests


def test_fresh_entropy_by_default_and_recorded(tmp_path):
    first = guarded(tmp_path, matmul(), seed=None)
    second = guarded(tmp_path, matmul(), seed=None)
    assert first.seed != second.seed
    assert first.seed.bit_length() > 64
    again = guarded(tmp_path, matmul(), seed=second.seed, output=tmp_path / "again.onnx")
    assert again.flips == second.flips
    assert (tmp_path / "again.onnx").read_bytes() == (tmp_path / "out.onnx").read_bytes()


def test_metadata_tells_how_to_repeat_the_run(tmp_path):
    source = save(matmul(), tmp_path)
    report = guarded(tmp_path, matmul(), "nf4", tau=0.5, seed=7)
    entries = {p.key: p.value for p in onnx.load(tmp_path / "out.onnx").metadata_props}
    options = json.loads(entries.pop("flipguard.options"))
    assert options == GuardOptions(scheme="nf4", tau=0.5).record()
    assert entries == {
        "flipguard.version": flipguard_onnx.__version__,
        "flipguard.scheme": "nf4",
        "flipguard.granularity": "block",
        "flipguard.block_size": "64",
        "flipguard.policy": "unbiased",
        "flipguard.tau": "0.5",
        "flipguard.preserve": "synthetic",
        "flipguard.seed": "7",
        "flipguard.input_sha256": hashlib.sha256(source.read_bytes()).hexdigest(),
        "flipguard.weights": "2310",
        "flipguard.flips": str(report.flips),
        "flipguard.coverage": "1.000000",
    }


@pytest.mark.parametrize("sample", ["matmul", "nested"])
def test_external_data_in_and_out(tmp_path, sample):
    (tmp_path / "in").mkdir()
    source = save(SAMPLES[sample](), tmp_path / "in", external=True)
    output = tmp_path / "out.onnx"
    report = flipguard_onnx.guard(source, "int8", seed=1, output=output, emit="both")
    assert_validated(report, SAMPLES[sample]())
    names = {"in"}
    for name in ("out.onnx", "out-float.onnx"):
        (data,) = tmp_path.glob(f"{name}.*.data")
        names |= {name, f"{name}.{hashlib.sha256(data.read_bytes()).hexdigest()[:16]}.data"}
    assert {p.name for p in tmp_path.iterdir()} == names
    inline = save(SAMPLES[sample](), tmp_path)
    flipguard_onnx.guard(inline, "int8", seed=1, output=tmp_path / "inline.onnx")
    feeds = {"x": weights((3, 70 if sample != "nested" else 64), 5)}
    if sample == "nested":
        feeds["flag"] = np.array(True)
    assert np.array_equal(run(output, feeds)[0], run(tmp_path / "inline.onnx", feeds)[0])


def test_a_model_in_memory(tmp_path):
    report = flipguard_onnx.guard(matmul(), seed=1, output=tmp_path / "out.onnx")
    assert_validated(report, matmul())
    assert names(tmp_path) == ["out.onnx"]
    with pytest.raises(OptionError, match="output must be given"):
        flipguard_onnx.guard(matmul())


def test_include_and_exclude(tmp_path):
    names = [t.name for t in guarded(tmp_path, SAMPLES["nested"](), exclude=("o*",)).tensors]
    assert sorted(names) == ["a", "b"]
    report = guarded(tmp_path, SAMPLES["nested"](), include=("a",))
    assert [t.name for t in report.tensors] == ["a"]
    assert {t.text for t in report.skipped} == {"not selected by --include"}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_not_finite_is_refused_by_name(tmp_path, value):
    bad = weights((70, 33))
    bad[3, 4] = value
    proto = matmul()
    proto.graph.initializer[0].CopyFrom(numpy_helper.from_array(bad, "w"))
    with pytest.raises(ModelError, match=r"tensor 'w' holds 1 values that are NaN or infinite"):
        guarded(tmp_path, proto)
    assert names(tmp_path) == ["model.onnx"]


def test_a_tokenizer_beside_the_model_is_not_replaced(tmp_path):
    source, tokenizer = save(matmul(), tmp_path), tmp_path / "tokenizer.json"
    tokenizer.write_text("{}")
    with pytest.raises(ModelError, match="belongs to the input"):
        flipguard_onnx.guard(source, output=tokenizer, force=True, validate=False)
    assert tokenizer.read_text() == "{}"


def test_outputs_are_not_overwritten_without_force(tmp_path):
    source = save(matmul(), tmp_path)
    before = source.read_bytes()
    flipguard_onnx.guard(source, seed=1)
    written = tmp_path / "model.flipguard-int8.onnx"
    with pytest.raises(ModelError, match="exists already"):
        flipguard_onnx.guard(source, seed=2)
    with pytest.raises(ModelError, match="belongs to the input"):
        flipguard_onnx.guard(source, output=source, force=True)
    (tmp_path / "link.onnx").symlink_to(source)
    with pytest.raises(ModelError, match="belongs to the input"):
        flipguard_onnx.guard(source, output=tmp_path / "link.onnx", force=True)
    assert source.read_bytes() == before
    assert written.exists()


def test_the_inputs_data_file_is_not_overwritten(tmp_path):
    """Neither one that an earlier run has named after the same output, nor the inputs for it."""
    source = save(matmul(), tmp_path, external=True)
    name = "model.onnx.0123456789abcdef.data"
    proto = onnx.load(source, load_external_data=False)
    proto.graph.initializer[0].external_data[0].value = name
    source.unlink()
    source = tmp_path / "renamed.onnx"
    source.write_bytes(proto.SerializeToString())
    (tmp_path / "model.onnx.data").rename(tmp_path / name)
    data = (tmp_path / name).read_bytes()
    with pytest.raises(ModelError, match=rf"{name}: belongs to the input"):
        flipguard_onnx.guard(source, output=tmp_path / "model.onnx", force=True)
    assert (tmp_path / name).read_bytes() == data
    np.savez(tmp_path / "x.npz", x=weights((5, 2, 70), 3))
    with pytest.raises(ModelError, match=r"x\.npz: belongs to the input"):
        flipguard_onnx.guard(source, data=tmp_path / "x.npz", output=tmp_path / "x.npz", force=True)


def test_a_corrupted_output_is_caught_and_nothing_is_left(tmp_path):
    """Two rows of codes change places between writing and validation, as by a faulty packing."""
    corrupted = []

    def corrupt(stage, done, _):
        if stage == "validating" and not done:
            [folder] = workspaces(tmp_path)
            [path] = folder.rglob("out.onnx")
            proto = onnx.load(path)
            [tensor] = [t for t in proto.graph.initializer if t.name == "w_quantized"]
            codes = numpy_helper.to_array(tensor)[[1, 0, *range(2, 70)]]
            tensor.CopyFrom(numpy_helper.from_array(codes, tensor.name))
            onnx.save(proto, path)
            corrupted.append(path)

    with pytest.raises(ValidationError, match=r"'y' differs by .* from what the codes stand"):
        guarded(tmp_path, matmul(), progress=corrupt)
    assert len(corrupted) == 1
    assert names(tmp_path) == ["model.onnx"]


def test_drift_beyond_the_bound_is_caught_and_nothing_is_left(tmp_path):
    with pytest.raises(ValidationError, match="the outputs drift by"):
        guarded(tmp_path, matmul(), max_drift=0.1)
    assert names(tmp_path) == ["model.onnx"]


def test_a_draw_that_drifts_too_far_is_drawn_again(tmp_path, monkeypatch):
    """Between the smallest and the largest drift of three draws lies a bound that some fail."""
    seeds = iter([1, 2, 3])
    monkeypatch.setattr(secrets, "randbits", lambda _: next(seeds))
    proto = SAMPLES["gather"]()
    ratio = {}
    for seed in (1, 2, 3):
        v = guarded(tmp_path, proto, seed=seed).validation
        ratio[seed] = drift_ratio(v)
    ordered = sorted(ratio, key=ratio.get)
    assert ratio[ordered[0]] < ratio[ordered[-1]]
    first_good = next(i for i, s in enumerate((1, 2, 3), 1) if s == ordered[0])
    sample = 1 + 8 / np.sqrt(sum(d.values for d in v.plain_exact))
    bound = (ratio[ordered[0]] + ratio[ordered[1]]) / 2 / sample
    report = guarded(tmp_path, proto, seed=None, max_drift=bound)
    assert report.draws == first_good
    assert report.seed == ordered[0]


def test_without_validation_no_runtime_is_needed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(OptionError, match="not installed: pip install onnxruntime"):
        guarded(tmp_path, matmul())
    assert guarded(tmp_path, matmul(), validate=False).validation is None


def test_verify_judges_any_two_models(tmp_path):
    guarded(tmp_path, matmul(), "int4")
    result = flipguard_onnx.verify(tmp_path / "model.onnx", tmp_path / "out.onnx")
    assert result.scheme == "int4"
    assert result.made_from is True


def test_an_original_is_known_by_its_data_files_too(tmp_path):
    """Two models with equal graphs and other weights are not the same original."""
    paths = []
    for folder in ("one", "other"):
        (tmp_path / folder).mkdir()
        paths.append(save(matmul(), tmp_path / folder, external=True))
    one, other = paths
    data = other.with_name("model.onnx.data")
    values = np.frombuffer(data.read_bytes(), np.float32) * np.float32(1.0001)
    data.write_bytes(values.tobytes())
    assert one.read_bytes() == other.read_bytes()
    shown = {flipguard_onnx.inspect(path).render().partition("sha256")[2] for path in paths}
    assert len(shown) == 2
    output = tmp_path / "out.onnx"
    flipguard_onnx.guard(one, seed=1, output=output)
    assert flipguard_onnx.verify(one, output).made_from is True
    assert flipguard_onnx.verify(other, output).made_from is False


def test_data_for_the_validation(tmp_path):
    x = weights((5, 2, 70), 3)
    np.savez(tmp_path / "x.npz", x=x)
    report = guarded(tmp_path, matmul(), data=tmp_path / "x.npz")
    assert report.validation.feeds == 5
    np.savez(tmp_path / "y.npz", y=x)
    with pytest.raises(ModelError, match="no array for input 'x'"):
        guarded(tmp_path, matmul(), data=tmp_path / "y.npz")


def test_unknown_options_are_named(tmp_path):
    for option, value in (
        ("scheme", "int3"),
        ("granularity", "row"),
        ("policy", "best"),
        ("emit", "all"),
    ):
        with pytest.raises(OptionError, match=f"{value}.*allowed"):
            guarded(tmp_path, matmul(), **{option: value})
    for option, value in (("tau", 0.0), ("ratio", 1.5), ("seed", -1), ("block_size", 48)):
        with pytest.raises(OptionError, match=f"{option.replace('_', ' ')} is {value}"):
            guarded(tmp_path, matmul(), "int4", **{option: value})


def test_nothing_to_guard_is_an_error(tmp_path):
    proto = model(
        [node("Add", "x w", "y")],
        {"x": (1, [70, 33])},
        {"y": (1, [70, 33])},
        {"w": weights((70, 33))},
    )
    with pytest.raises(UnsupportedModelError, match="nothing to guard: feeds Add"):
        guarded(tmp_path, proto)
