"""GuardOptions: one place for every option, and what is made from it."""

import json
import typing
from dataclasses import fields, replace

import onnx
import pytest

from flipguard_onnx import DeviceError, GuardOptions, OptionError, SchemeError, guard, verify
from flipguard_onnx.cli.commands import main
from flipguard_onnx.formats import BLOCK_SIZES
from flipguard_onnx.io.model import open_model
from flipguard_onnx.pipeline.options import GuardKeywords, Range, described
from flipguard_onnx.pipeline.verify import recorded_options
from tests.helpers.command import call
from tests.helpers.samples import SAMPLES, F, model, node, save, weights

NOT_DEFAULT = GuardOptions(
    scheme="int4",
    granularity="block",
    block_size=64,
    scale=7.0,
    include=("a*", "b"),
    exclude=("c",),
    target="onnxruntime",
    tau=0.5,
    preserve="off",
    int8=("head*",),
    int8_share=0.25,
    max_drift=2.0,
    max_memory=64,
)


def test_the_keywords_for_type_checkers_are_the_fields():
    hints = typing.get_type_hints(GuardOptions)
    assert hints.pop("scheme") is str
    assert typing.get_type_hints(GuardKeywords) == hints


def test_every_option_is_described_in_the_docstring():
    for item in fields(GuardOptions):
        assert f"{item.name} " in GuardOptions.__doc__ or f"{item.name}," in GuardOptions.__doc__


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"scheme": "int5"},
            SchemeError,
            "scheme 'int5' is unknown; allowed: int8, uint8, int4, uint4, int2, uint2, nf4, fp4, "
            "fp8, mxfp4, nvfp4",
        ),
        ({"policy": "x"}, SchemeError, "policy 'x' is unknown; allowed: unbiased, topk, none"),
        ({"device": "tpu"}, DeviceError, "device 'tpu' is unknown; allowed: auto, cpu, cuda"),
        ({"granularity": "row"}, OptionError, "granularity 'row' is unknown; allowed: tensor, "),
        ({"emit": "x"}, OptionError, "emit 'x' is unknown; allowed: qdq, float, both"),
        ({"tau": 0}, OptionError, "tau is 0; allowed: above 0, up to 1"),
        ({"tau": 1.5}, OptionError, "tau is 1.5; allowed: above 0, up to 1"),
        ({"ratio": float("nan")}, OptionError, "ratio is nan; allowed: above 0, up to 1"),
        ({"seed": -1}, OptionError, "seed is -1; allowed: 0 or more"),
        ({"seed": 1.5}, OptionError, "seed is 1.5; allowed: 0 or more"),
        ({"max_memory": 0}, OptionError, "max memory is 0; allowed: 1 or more"),
        ({"max_drift": 0.0}, OptionError, "max drift is 0.0; allowed: above 0"),
        ({"max_drift": float("inf")}, OptionError, "max drift is inf; allowed: above 0"),
        ({"include": "conv*"}, OptionError, "include is 'conv*'; allowed: a sequence of patterns"),
        ({"force": "yes"}, OptionError, "force is 'yes'; allowed: true or false"),
        ({"scheme": "int4", "block_size": 48}, OptionError, "block size is 48; allowed: 16, 32, "),
        ({"block_size": 32}, SchemeError, "int8 has one scale per channel; allowed: --granularity"),
        (
            {"scheme": "int4", "scale": 9},
            OptionError,
            "scale is 9; allowed: 2.0, 4.0, 6.0, 7.0, 7.5, 8.0, 127.0, 127.5, 128.0, k_quant",
        ),
        ({"scheme": "int4", "scale": 6}, SchemeError, "no scale 6; allowed: 8, 7.5, 7"),
        (
            {"scheme": "int4", "scale": "k"},
            OptionError,
            "scale 'k' is unknown; allowed: 2.0, 4.0",
        ),
        (
            {"scheme": "uint4", "scale": "k_quant", "emit": "both"},
            SchemeError,
            "scale 'k_quant' goes with emit 'qdq' and policy unbiased or none",
        ),
        (
            {"scheme": "uint4", "scale": "k_quant", "policy": "topk"},
            SchemeError,
            "scale 'k_quant' goes with emit 'qdq' and policy unbiased or none",
        ),
        (
            {"scheme": "int4", "scale": 7.5, "emit": "float"},
            SchemeError,
            "7.5 goes with emit 'qdq'",
        ),
        ({"int8_share": 0.25}, SchemeError, "int8 share is for 4 or 2 bits: int8 has all at 8"),
        ({"int8": ("w",)}, SchemeError, "int8 patterns are for 4 or 2 bits: int8 has all at 8"),
        ({"ratio": 0.3}, SchemeError, "ratio 0.3 is for the topk policy, not 'unbiased'"),
        ({"ratio": 0.3, "policy": "none"}, SchemeError, "ratio 0.3 is for the topk policy, not"),
        ({"tau": 0.5, "policy": "topk"}, SchemeError, "tau 0.5 is for the unbiased policy, not 't"),
        ({"calibration": "entropy"}, OptionError, "calibration 'entropy' goes with activations"),
        (
            {"scheme": "int4", "int8_share": 1},
            OptionError,
            "int8 share is 1; allowed: 0 or more",
        ),
        ({"preserve": "data"}, OptionError, "preserve 'data' needs inputs: give --data"),
        ({"preserve": "synthetic", "policy": "none"}, SchemeError, "is for the unbiased policy"),
        ({"symmetric": True}, OptionError, "symmetric goes with activations"),
        ({"activations": "int8", "scheme": "nf4"}, SchemeError, "activations go with scheme int8"),
        (
            {"activations": "int8", "emit": "float"},
            OptionError,
            "activations go with emit 'qdq'",
        ),
    ],
)
def test_what_is_not_allowed_is_named(options, error, message):
    with pytest.raises(error) as refused:
        GuardOptions(**options)
    assert type(refused.value) is error
    assert message in str(refused.value)


def test_defaults_are_not_refused_where_they_have_no_effect():
    assert GuardOptions(policy="topk", tau=1.0, ratio=0.3).ratio == 0.3
    assert GuardOptions(policy="none", tau=1, ratio=0.1, calibration="minmax").policy == "none"
    assert GuardOptions(policy="unbiased", tau=0.5, activations="int8", calibration="entropy")


def test_the_advice_for_a_run_without_inputs_is_all_it_takes():
    for options, advice in (
        ({}, "--no-validate"),
        ({"validate": False}, ""),
        ({"preserve": "synthetic"}, "--no-validate, --preserve off"),
        ({"activations": "int8", "validate": False}, "no --activations"),
        ({"scheme": "int4", "int8_share": 0.2}, "--no-validate, no --int8-share"),
    ):
        assert GuardOptions(**options).without_inputs == advice


def test_lists_of_patterns_are_kept_as_tuples():
    assert GuardOptions(include=["a", "b"]).include == ("a", "b")


@pytest.mark.parametrize(
    ("limits", "inside", "outside", "words"),
    [
        (Range(0), [0, 1e9], [-1, float("inf"), float("nan")], "0 or more"),
        (Range(0, low_open=True), [1e-9], [0], "above 0"),
        (Range(0, 1, low_open=True), [0.5, 1], [0, 1.1], "above 0, up to 1"),
        (Range(0, 1, high_open=True), [0, 0.99], [1, -0.1], "0 or more, below 1"),
    ],
)
def test_ranges(limits, inside, outside, words):
    assert all(value in limits for value in inside)
    assert not any(value in limits for value in outside)
    assert str(limits) == words


def test_a_record_gives_back_the_options():
    record = json.loads(json.dumps(NOT_DEFAULT.record()))
    assert GuardOptions.from_record(record) == NOT_DEFAULT
    assert not {"data", "force", "seed"} & record.keys()
    assert GuardOptions(data="x.npz", seed=1, force=True).changed() == ()
    assert GuardOptions(max_drift=3, exclude=["c"]).changed() == ("exclude",)
    with pytest.raises(OptionError, match="the record has the option 'evil', unknown"):
        GuardOptions.from_record(record | {"evil": 1})


def test_the_command_line_has_every_option_with_its_default():
    options = {option.name: option for option in main.commands["guard"].params}
    for name, default, about in described():
        option = options[name]
        assert option.default == (default if default != () else option.default)
        assert option.help == about.help
        assert option.group == about.group
    assert options["block_size"].help.startswith("Weights of a block: 16, 32, 64, 128 or 256.")
    assert BLOCK_SIZES == (16, 32, 64, 128, 256)


def test_help_is_grouped_and_ends_with_examples():
    lines = call("guard", "--help").output.splitlines()
    sections = [line for line in lines if line.endswith(":") and not line.startswith(" ")]
    assert sections == [
        "Model and output:",
        "Format:",
        "Protection:",
        "Accuracy:",
        "Running:",
        "Reports:",
        "Other:",
    ]
    assert [line.split()[0] for line in lines[-3:]] == ["flipguard-onnx"] * 3


@pytest.mark.parametrize("flag", [True, False])
def test_a_file_may_switch_the_validation_off(tmp_path, flag):
    source = save(SAMPLES["matmul"](), tmp_path)
    (tmp_path / "o.toml").write_text(
        f"preserve = 'off'\n[guard]\nno-validate = {str(flag).lower()}"
    )
    done = call("guard", source, "--config", tmp_path / "o.toml")
    assert done.exit_code == 0
    assert ("not validated" in done.output) == flag


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_what_is_written_records_how_to_repeat_it(tmp_path, scheme):
    source = save(SAMPLES["gemm_alpha"](), tmp_path)
    asked = GuardOptions(scheme=scheme, exclude=("b",), target="onnxruntime", max_memory=99)
    first = guard(source, output=tmp_path / "first.onnx", **asked.keywords())
    recorded = recorded_options(open_model(tmp_path / "first.onnx"))
    assert recorded == asked
    assert first.options == asked.record()
    again = replace(recorded, seed=first.seed)
    guard(source, output=tmp_path / "again.onnx", **again.keywords())
    assert (tmp_path / "again.onnx").read_bytes() == (tmp_path / "first.onnx").read_bytes()


def two_layers():
    return model(
        [node("MatMul", "x a", "h"), node("MatMul", "h b", "y")],
        {"x": (F, ["n", 40])},
        {"y": (F, ["n", 20])},
        {"a": weights((40, 30), 1), "b": weights((30, 20), 2)},
    )


@pytest.mark.parametrize("options", [{"exclude": ("b",)}, {"include": ("a",)}])
def test_verify_compares_with_a_baseline_that_leaves_the_same_tensors_float(tmp_path, options):
    source = save(two_layers(), tmp_path)
    part = guard(source, output=tmp_path / "part.onnx", **options)
    assert [tensor.name for tensor in part.tensors] == ["a"]
    result = verify(source, tmp_path / "part.onnx")
    assert result.validation == part.validation
    whole = verify(source, tmp_path / "part.onnx", "int8")
    assert whole.validation.plain_exact != part.validation.plain_exact


@pytest.mark.parametrize("record", ["{", "[]", "1", '{"tau": "x"}', '{"evil": 1}', '{"tau": 7}'])
def test_a_record_that_lies_is_one_line(tmp_path, record):
    source = save(SAMPLES["matmul"](), tmp_path)
    guard(source, output=tmp_path / "o.onnx", validate=False, preserve="off")
    whole = onnx.load(tmp_path / "o.onnx")
    for entry in whole.metadata_props:
        if entry.key == "flipguard.options":
            entry.value = record
    onnx.save(whole, tmp_path / "lies.onnx")
    refused = call("verify", source, tmp_path / "lies.onnx")
    assert refused.exit_code == 2
    assert "its record of options cannot be read" in refused.stderr
    assert refused.stderr.count("\n") == 1
