"""What a person is told: the model, what is wrong with it, and advice that works."""

import re

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from flipguard_onnx import ModelError, ValidationError
from flipguard_onnx.pipeline.run import naming
from tests.helpers.command import call, names, one_line
from tests.helpers.samples import SAMPLES, F, matmul, model, node, save, weights

FAST = ("--no-validate", "--preserve", "off")


def no_shape_fits():
    nodes = [node("Reshape", "x shape", "h"), node("MatMul", "h w", "y")]
    initializers = {"w": weights((70, 33)), "shape": np.array([1000, 70])}
    return model(nodes, {"x": (F, ["n", "m"])}, {"y": (F, [1000, 33])}, initializers)


def strings():
    proto = matmul()
    proto.graph.input.append(helper.make_tensor_value_info("s", TensorProto.STRING, [1]))
    return proto


def sequence():
    proto = matmul()
    proto.graph.input.append(helper.make_tensor_sequence_value_info("s", F, None))
    return proto


def unknown_operator():
    proto = matmul()
    proto.graph.node.append(node("Plugin", "y", "z", domain="mine"))
    proto.opset_import.append(helper.make_opsetid("mine", 1))
    return proto


def infinite():
    nodes = [node("MatMul", "x w", "h"), node("Log", "zero", "l"), node("Add", "h l", "y")]
    initializers = {"w": weights((70, 33)), "zero": np.zeros(33, np.float32)}
    return model(nodes, {"x": (F, ["n", 70])}, {"y": (F, ["n", 33])}, initializers)


CANNOT = "the original cannot be run"

UNUSABLE = {
    no_shape_fits: "the original does not run on made-up inputs (",
    infinite: "the original does not run on made-up inputs (output 'y' holds NaN or infinity)",
    strings: f"{CANNOT} (input 's' holds strings; allowed: tensors of real numbers)",
    sequence: f"{CANNOT} (input 's' is no tensor; allowed: tensors of real numbers)",
    unknown_operator: f"{CANNOT} (does not load: ",
}


@pytest.mark.parametrize("made", UNUSABLE, ids=lambda made: made.__name__)
def test_a_model_without_usable_inputs_is_refused_early_with_advice_that_works(tmp_path, made):
    source = save(made(), tmp_path)
    result = call("guard", source)
    message = result.stderr.splitlines()[-1]
    assert result.exit_code == 2
    assert message.startswith(f"flipguard-onnx: {source}: {UNUSABLE[made]}")
    assert not {"scanning ...", "guarding ...", "writing ..."} & set(result.stderr.splitlines())
    real = made in (no_shape_fits, infinite)
    data = "give real ones with --data or " if real else ""
    assert message.endswith(f"; {data}go without inputs (--no-validate)")
    assert call("guard", source, "--no-validate", "--quiet").exit_code == 0
    written = tmp_path / "model.flipguard-int8.onnx"
    message = one_line(call("verify", source, written))
    assert UNUSABLE[made] in message
    assert message.endswith("; give real ones with --data\n" if real else ")\n")


def test_the_advice_follows_what_needs_inputs(tmp_path):
    source = save(no_shape_fits(), tmp_path)
    options = ("--scheme", "int4", "--int8-share", 0.5, "--no-validate", "--quiet")
    assert one_line(call(source, *options)).endswith(
        "; give real ones with --data or go without inputs (no --int8-share)\n"
    )
    np.savez(tmp_path / "d.npz", x=np.ones((3, 5), np.float32))
    message = one_line(call(source, "--data", tmp_path / "d.npz", "--quiet"))
    assert ": the original does not run on the inputs of --data (" in message
    assert message.endswith("; go without inputs (--no-validate)\n")
    assert names(tmp_path) == ["d.npz", "model.onnx"]


@pytest.mark.parametrize("option", ["include", "exclude", "int8"])
def test_a_pattern_that_names_nothing_is_refused(tmp_path, option):
    source = save(SAMPLES["nested"](), tmp_path)
    command = (source, "--scheme", "int4", f"--{option}", "o*", f"--{option}", "nomatch*")
    for name in ("guard", "inspect"):
        line = one_line(call(name, *command))
        assert line.startswith(f"flipguard-onnx: {source}: {option} pattern 'nomatch*' names no ")
    assert names(tmp_path) == ["model.onnx"]


def test_a_pattern_may_name_what_is_skipped_anyway(tmp_path):
    source = save(SAMPLES["gemm_alpha"](), tmp_path)
    result = call("guard", source, "--exclude", "b", *FAST)
    assert result.exit_code == 0, result.output
    assert "options   --exclude b\n" in result.stdout


def test_verify_keeps_the_patterns_of_a_model_of_which_layers_are_run(tmp_path):
    nodes = [node("MatMul", "x w", "h"), node("MatMul", "h v", "y")]
    inputs, outputs = {"x": (F, ["n", 600])}, {"y": (F, ["n", 600])}
    initializers = {"w": weights((600, 600)), "v": weights((600, 600), 1)}
    source = save(model(nodes, inputs, outputs, initializers), tmp_path)
    out = tmp_path / "o.onnx"
    options = ("-o", out, "--exclude", "v", "--max-memory", 1, "--preserve", "off")
    assert call("guard", source, *options).exit_code == 0
    result = call("verify", source, out)
    assert result.exit_code == 0, result.output
    assert "sampled   1 layers" in result.stdout


def test_verify_names_the_inputs_by_which_models_differ(tmp_path):
    source = save(matmul(), tmp_path)
    proto = matmul()
    proto.graph.input[0].name = proto.graph.node[0].input[0] = "other"
    other = save(proto, tmp_path, "other.onnx")
    line = one_line(call("verify", source, other))
    assert line == (
        f"flipguard-onnx: {other}: is no form of {source}: its inputs lack 'x' and have 'other' "
        "besides\n"
    )


def test_verify_says_where_nothing_is_quantized(tmp_path):
    source = save(matmul(), tmp_path)
    result = call("verify", source, source, "--report", tmp_path / "r.json")
    assert result.exit_code == 0
    said = "warning   nothing in the guarded model is quantized: it holds no integer weights\n"
    assert said in result.stdout
    for scheme in ("int8", "int4", "nf4"):
        out = tmp_path / f"{scheme}.onnx"
        assert call(source, "-o", out, "--scheme", scheme, *FAST).exit_code == 0
        assert "warning" not in call("verify", source, out).stdout


def test_errors_name_the_model_and_no_hidden_file(tmp_path):
    place = tmp_path / "a b" / "model.onnx"
    hidden = f"{tmp_path}/.flipguard-0123456789abcdef/files/1/qdq/model.onnx"
    with pytest.raises(ValidationError) as told, naming(place):
        raise ValidationError("does not load: {found}", found=f"Load from {hidden} failed: x")
    assert str(told.value) == f"{place}: does not load: Load from {place} failed: x"
    with pytest.raises(ModelError) as told, naming(place):
        raise ModelError("is bad", path="other.onnx")
    assert str(told.value) == "other.onnx: is bad"


def test_small_files_have_small_units(tmp_path):
    source = save(matmul((16, 16)), tmp_path)
    result = call(source, *FAST)
    size = (tmp_path / "model.flipguard-int8.onnx").stat().st_size
    assert size < 10_000
    assert re.search(
        rf"written .*int8\.onnx  {size / 1e3:.2f} kB \(\d+% of the input\)", result.stdout
    )
    assert f"  {source.stat().st_size / 1e3:.2f} kB, sha256" in result.stdout
    onnx.checker.check_model(source)


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        ("--scheme int4", "int4, one scale per block of 32 weights"),
        (
            "--scheme int4 --scale 7",
            "int4, one scale per block of 32 weights, largest magnitude / 7",
        ),
        (
            "--scheme uint4 --scale k_quant",
            "uint4, one scale per block of 32 weights, with zero points, by k_quant",
        ),
        ("--scheme uint4 --granularity channel", "uint4, one scale per channel, with zero points"),
        ("--scheme uint8 --reduce-range", "uint8, one scale per channel, with zero points, 7 bits"),
    ],
)
def test_the_report_says_how_scales_are_made(tmp_path, options, shown):
    assert f"scheme    {shown}\n" in call(save(matmul(), tmp_path), *options.split(), *FAST).stdout


def test_the_report_says_that_no_weight_got_the_scheme(tmp_path):
    source = save(SAMPLES["conv_transpose"](), tmp_path)
    shown = "32 weights; but no weight got it: all are int8, one scale per channel\n"
    assert shown in call(source, "--scheme", "int4", *FAST).stdout


@pytest.mark.parametrize("options", [(), ("--activations", "uint8")], ids=["weights", "integers"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_named_before_inputs_are_asked_for(
    tmp_path, value, options
):
    w = weights((70, 33))
    w[3, 4] = value
    nodes = [node("MatMul", "x w", "y")]
    proto = model(nodes, {"x": (F, ["n", 70])}, {"y": (F, ["n", 33])}, {"w": w})
    message = one_line(call("guard", save(proto, tmp_path), "--quiet", *options))
    assert "tensor 'w' holds 1 values that are NaN or infinite" in message
    assert "--data" not in message


def test_a_weight_that_overflows_when_rounded_is_named_with_advice_that_works(tmp_path):
    """Nearest rounding makes 1 of the 0.6 steps of each weight beside it: 0.95 times 1.54 of it."""
    w = weights((70, 33))
    w[:, 5] = 0.6 / 127 * 2.5e38
    w[0, 5] = 2.5e38
    constants = {
        "v": weights((70, 33), 1),
        "w": w,
        "least": np.float32(0),
        "most": np.float32(0.95),
    }
    nodes = [
        node("Mul", "x least", "zeros"),
        node("Add", "zeros most", "ones"),
        node("MatMul", "ones w", "h"),
        node("MatMul", "x v", "z"),
    ]
    outputs = {"h": (F, ["n", 33]), "z": (F, ["n", 33])}
    proto = model(nodes, {"x": (F, ["n", 70])}, outputs, constants)
    source = save(proto, tmp_path)
    message = one_line(call("guard", source, "--quiet"), code=1)
    assert message == (
        f"flipguard-onnx: {source}: rounded to nearest, output 'h' holds NaN or infinity; "
        "tensor 'w' holds 2.5e+38 (--exclude NAME leaves it as it is)\n"
    )
    assert call("guard", source, "--quiet", "--exclude", "w").exit_code == 0
