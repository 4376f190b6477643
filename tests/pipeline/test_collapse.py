"""Tensors that get another form: injected outliers, dead or live, and weights that int4 clips."""

import numpy as np
import onnxruntime
import pytest

import flipguard_onnx
from flipguard_onnx import ValidationError
from tests.helpers.command import call, names, one_line
from tests.helpers.samples import F, model, node, save

HIDDEN = 128
OUTLIERS = slice(0, HIDDEN, 32)  # the first weight of every block of 32


def with_outliers(factor, live=False, rows=slice(None)):
    """Two layers; in every block of the second, one weight is `factor` times the largest other.

    rows: the output channels of which that is so.

    It meets a hidden unit that is always 0, or always 1 with the effect taken off the bias.
    """
    rng = np.random.default_rng(0)
    first = rng.standard_normal((64, HIDDEN)).astype(np.float32) / 8
    second = rng.standard_normal((HIDDEN, 48)).astype(np.float32) / 12
    bias, shift = np.zeros(HIDDEN, np.float32), np.zeros(48, np.float32)
    if factor:
        first[:, OUTLIERS], bias[OUTLIERS] = 0, 1 if live else -1
        others = np.abs(second.reshape(-1, 32, 48)[:, 1:]).max(axis=1)
        second[OUTLIERS, rows] = factor * others[:, rows]
        shift -= second[OUTLIERS].sum(axis=0) if live else 0
    nodes = [
        node("Gemm", "x first bias", "h"),
        node("Relu", "h", "a"),
        node("Gemm", "a second shift", "y"),
    ]
    constants = {"first": first, "bias": bias, "second": second, "shift": shift}
    return model(nodes, {"x": (F, ["n", 64])}, {"y": (F, ["n", 48])}, constants)


def guarded(tmp_path, proto, scheme, **options):
    return flipguard_onnx.guard(
        save(proto, tmp_path), scheme, output=tmp_path / "out.onnx", seed=1, **options
    )


def drift(tmp_path):
    """Relative L2 of the guarded model's outputs, on inputs that the tool has not seen."""
    x = np.random.default_rng(7).standard_normal((200, 64)).astype(np.float32)
    wanted, found = (
        onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"x": x})[
            0
        ]
        for path in (tmp_path / "model.onnx", tmp_path / "out.onnx")
    )
    return np.linalg.norm(found - wanted) / np.linalg.norm(wanted)


@pytest.mark.parametrize("live", [False, True], ids=["dead", "live"])
@pytest.mark.parametrize("factor", [8, 64, 4096])
@pytest.mark.parametrize("scheme", ["int8", "int4", "nf4", "fp4"])
def test_an_injected_outlier_costs_no_function(tmp_path, scheme, factor, live):
    report = guarded(tmp_path, with_outliers(factor, live), scheme)
    assert drift(tmp_path) < 0.35
    assert all(tensor.product_error < 0.35 for tensor in report.tensors)


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_outliers_in_a_quarter_of_the_rows(tmp_path, scheme):
    """The other rows look sound."""
    guarded(tmp_path, with_outliers(4096, rows=slice(0, 12)), scheme)
    assert drift(tmp_path) < 0.35


def test_outliers_that_made_up_inputs_do_not_show(tmp_path):
    """Inputs that are always 0 in real data, but not in made-up ones, whose products look sound."""
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((64, 48)).astype(np.float32)
    matrix[::32] = 4096 * np.abs(matrix.reshape(2, 32, 48)).max(axis=1)
    nodes = [node("MatMul", "x w", "h"), node("MatMul", "h v", "y")]
    constants = {"w": matrix, "v": rng.standard_normal((48, 48)).astype(np.float32)}
    inputs, outputs = {"x": (F, ["n", 64])}, {"y": (F, ["n", 48])}
    report = guarded(tmp_path, model(nodes, inputs, outputs, constants), "int4")
    assert [tensor.name for tensor in report.tensors] == ["v"]
    (kept,) = [tensor for tensor in report.skipped if tensor.name == "w"]
    assert kept.detail == "at int4 outliers wipe out its other weights"


@pytest.mark.parametrize("scheme", ["int8", "int4", "nf4", "fp4"])
def test_an_honest_model_keeps_its_form(tmp_path, scheme):
    report = guarded(tmp_path, with_outliers(0), scheme)
    assert [tensor.scheme for tensor in report.tensors] == [scheme] * 2
    assert not any(tensor.fallback for tensor in report.tensors)
    assert max(tensor.product_error for tensor in report.tensors) < 0.25


def test_the_next_form_is_int8_and_then_float(tmp_path):
    (first, second) = guarded(tmp_path, with_outliers(30), "int4").tensors
    assert (first.scheme, first.fallback) == ("int4", None)
    assert second.scheme == "int8"
    assert second.fallback.startswith("at int4 its products would be off by ")
    report = guarded(tmp_path, with_outliers(4096), "int4", force=True)
    assert [tensor.name for tensor in report.tensors] == ["first"]
    (kept,) = [tensor for tensor in report.skipped if tensor.name == "second"]
    assert kept.text.startswith("left float: at int4 its products would be off by ")
    assert f"fallback  second: float, since {kept.detail}" in report.render()
    assert report.coverage < 0.6


def test_refuse_writes_nothing(tmp_path):
    source = save(with_outliers(512), tmp_path)
    arguments = (source, "--scheme", "int4", "--on-collapse", "refuse")
    line = one_line(call("guard", *arguments, "--quiet"), code=1)
    assert "'second': at int4 its products would be off by " in line
    assert "(allowed: 35%)" in line
    assert names(tmp_path) == ["model.onnx"]


def test_a_model_all_of_which_collapses(tmp_path):
    """With nothing guarded, there is nothing to write."""
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((64, 48)).astype(np.float32)
    matrix[::32] = 4096 * np.abs(matrix.reshape(2, 32, 48)).max(axis=1)
    nodes = [node("Mul", "x mask", "m"), node("MatMul", "m w", "y")]
    mask = np.ones(64, np.float32)
    mask[::32] = 0
    inputs, outputs = {"x": (F, ["n", 64])}, {"y": (F, ["n", 48])}
    proto = model(nodes, inputs, outputs, {"w": matrix, "mask": mask})
    with pytest.raises(ValidationError, match=r"model\.onnx: nothing is left to guard: left float"):
        guarded(tmp_path, proto, "int4")
    assert names(tmp_path) == ["model.onnx"]


def test_floats_for_another_quantizer_cannot_keep_it(tmp_path):
    with pytest.raises(ValidationError, match="'second': at int4 its products would be off"):
        guarded(tmp_path, with_outliers(512), "int4", emit="float")
    assert names(tmp_path) == ["model.onnx"]


def test_without_inputs_the_scan_tells(tmp_path):
    """Where errors are not fed forward, the products are not known."""
    report = guarded(tmp_path, with_outliers(512), "int4", preserve="off")
    (kept,) = [tensor for tensor in report.skipped if tensor.name == "second"]
    assert kept.detail == "at int4 outliers wipe out its other weights"
    assert drift(tmp_path) < 0.35


@pytest.mark.parametrize("scheme", ["int8", "int4", "nf4", "fp4"])
def test_a_tiny_row_that_a_later_factor_makes_large_is_kept(tmp_path, scheme):
    """A quantizer rounds it to 0; what depends on it would be lost."""
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((64, 128)).astype(np.float32) / 8
    matrix[:, :8] *= np.float32(2e-39)
    factors = np.ones(128, np.float32)
    factors[:8] = 5e37
    nodes = [node("MatMul", "x w", "h"), node("Mul", "h f", "g"), node("Mul", "g ten", "y")]
    constants = {"w": matrix, "f": factors, "ten": np.repeat(np.float32([100, 1]), [8, 120])}
    proto = model(nodes, {"x": (F, ["n", 64])}, {"y": (F, ["n", 128])}, constants)
    report = guarded(tmp_path, proto, scheme)
    (tensor,) = report.tensors
    assert tensor.scheme == {"int4": "int4"}.get(scheme, "int8")
    assert drift(tmp_path) < 0.2


def test_few_weights_are_no_sign_of_outliers(tmp_path):
    """A small honest tensor may have one weight that is much larger than the others."""
    rng = np.random.default_rng(0)
    small = rng.standard_normal((16, 16)).astype(np.float32)
    small[0] *= 400
    nodes = [node("MatMul", "x small", "h"), node("MatMul", "h large", "y")]
    constants = {"small": small, "large": rng.standard_normal((16, 96)).astype(np.float32)}
    proto = model(nodes, {"x": (F, ["n", 16])}, {"y": (F, ["n", 96])}, constants)
    report = guarded(tmp_path, proto, "int8")
    assert [tensor.name for tensor in report.tensors] == ["small", "large"]
    assert report.scan.verdict.level == "clean"


def with_clipped(count=4, other=0):
    """Two layers; in every block of the second, `count` of 32 weights are beyond int4's 7 steps.

    other: how many are as far out on the other side, besides the extreme.
    """
    rng = np.random.default_rng(0)
    first, second = (rng.uniform(-0.9, 0.9, (128, 128)).astype(np.float32) for _ in range(2))
    blocks = second.reshape(4, 32, 128)
    blocks[:, 0], blocks[:, 1 : 1 + count] = -1.0, 0.95
    np.clip(blocks[:, 1 + count :], -0.85, 0.85, out=blocks[:, 1 + count :])
    blocks[:, 1 + count : 1 + count + other] = -0.95
    nodes = [node("MatMul", "x first", "h"), node("MatMul", "h second", "y")]
    constants = {"first": first, "second": second}
    return model(nodes, {"x": (F, ["n", 128])}, {"y": (F, ["n", 128])}, constants)


CLIPPED = "12.9% of the weights of 'second' lie beyond the last level of int4"


@pytest.mark.parametrize("scheme", ["int4", "uint4", "nf4", "fp4", "mxfp4", "int2"])
def test_a_model_with_weights_that_int4_clips_gets_int8(tmp_path, scheme):
    """All of it, under any scheme of few bits, as the rounding errors of any layer may wake it."""
    report = guarded(tmp_path, with_clipped(), scheme)
    assert [(tensor.scheme, tensor.fallback) for tensor in report.tensors] == [
        ("int8", CLIPPED),
        ("int8", CLIPPED),
    ]
    assert f"fallback  2 tensors: int8, since {CLIPPED}" in report.render()
    assert report.scan.verdict.level == "clips"


@pytest.mark.parametrize("options", [{"scheme": "int8"}, {"scheme": "int4", "policy": "topk"}])
def test_what_is_at_int8_or_not_drawn_keeps_its_form(tmp_path, options):
    report = guarded(tmp_path, with_clipped(), **options)
    assert [tensor.scheme for tensor in report.tensors] == [options["scheme"]] * 2
    assert not any(tensor.fallback for tensor in report.tensors)


def test_weights_within_the_levels_keep_their_form(tmp_path):
    report = guarded(tmp_path, with_clipped(0), "int4")
    assert [tensor.scheme for tensor in report.tensors] == ["int4"] * 2


@pytest.mark.parametrize("options", [("--emit", "float"), ("--on-collapse", "refuse")])
def test_such_a_model_is_refused_where_it_cannot_get_int8(tmp_path, options):
    source = save(with_clipped(), tmp_path)
    line = one_line(call("guard", source, "--scheme", "int4", "--quiet", *options), code=1)
    assert line == f"flipguard-onnx: {source}: {CLIPPED}; allowed: --scheme int8\n"
    assert names(tmp_path) == ["model.onnx"]


@pytest.mark.parametrize("name", ["second", "the second[0]"])
def test_verify_compares_such_a_model_with_int8(tmp_path, name):
    proto = with_clipped()
    proto.graph.initializer[1].name = proto.graph.node[1].input[1] = name
    report = guarded(tmp_path, proto, "int4")
    assert report.tensors[1].name == name
    found = flipguard_onnx.verify(tmp_path / "model.onnx", tmp_path / "out.onnx")
    assert found.validation.allowed == pytest.approx(report.validation.allowed, rel=1e-6)


def test_the_page_says_what_such_a_model_got(tmp_path):
    source, page = save(with_clipped(), tmp_path), tmp_path / "report.html"
    output = tmp_path / "out.onnx"
    result = call("guard", source, "--scheme", "int4", "--output", output, "--html", page)
    assert result.exit_code == 0
    html = page.read_text()
    assert "32,768 weights in 2 tensors at int8, " in html
    assert "2 tensors: int8, since 12.9% of the weights of" in html


@pytest.mark.parametrize("policy", ["topk", "none"])
def test_refusing_needs_draws(tmp_path, policy):
    source = save(with_clipped(), tmp_path)
    options = ("--policy", policy, "--on-collapse", "refuse")
    line = one_line(call("guard", source, "--scheme", "int4", "--quiet", *options))
    assert "on collapse 'refuse' is for the unbiased policy" in line


def test_a_model_with_as_many_on_either_side_keeps_its_form(tmp_path):
    """As one that was trained for two or three values."""
    report = guarded(tmp_path, with_clipped(8, 8), "int4")
    assert report.scan.verdict.level == "clips"
    assert [tensor.scheme for tensor in report.tensors] == ["int4"] * 2
