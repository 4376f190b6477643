"""A bounded run of the fuzzer, random structures, and whether the fuzzer sees what is wrong."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from tests.helpers import fuzz
from tests.helpers.command import call
from tests.helpers.hostile import files
from tests.helpers.samples import F, save

SECONDS = 20


def test_mutated_models_end_in_one_of_three_ways():
    counts, findings = fuzz.run(SECONDS, seed=0)
    assert not findings, "\n".join(findings)
    assert counts["guard 0"]
    assert counts["guard 2"]


GOOD = {"code": 0, "exception": "", "stdout": "done\n", "stderr": "guarding ...\n"}
LINE = "flipguard-onnx: wrong\n"


@pytest.mark.parametrize(
    ("change", "after", "wrong"),
    [
        ({}, {"m": b"1"}, None),
        ({"code": 2, "stderr": LINE}, {"m": b"1"}, None),
        ({"code": 3, "stderr": LINE}, {"m": b"1"}, "exit code 3"),
        ({"exception": "KeyError('w')"}, {"m": b"1"}, "raises KeyError('w')"),
        ({"code": 1, "stderr": "Traceback\n" + LINE}, {"m": b"1"}, "2 lines on stderr"),
        ({"code": 1, "stderr": "", "stdout": ""}, {"m": b"1"}, "0 lines on stderr"),
        ({"stdout": f"<html>{fuzz.MARKUP}"}, {"m": b"1"}, "prints markup"),
        ({"stderr": "RuntimeWarning: overflow\n"}, {"m": b"1"}, "exit code 0 with"),
        ({"stdout": "\x1b[2J"}, {"m": b"1"}, "prints what is not printable"),
        ({}, {"m": b"2"}, "the input has changed"),
        ({}, {"m": b"1", "other": b""}, "writes ['other']"),
        ({}, {"m": b"1", "model.flipguard-int8.onnx": b""}, None),
        ({"code": 1, "stderr": LINE}, {"m": b"1", "x": b""}, "leaves ['x']"),
    ],
)
def test_the_fuzzer_sees_what_is_wrong(tmp_path, change, after, wrong):
    after = {tmp_path / name: content for name, content in after.items()}
    found = fuzz.problem("guard", GOOD | change, {tmp_path / "m": b"1"}, after)
    assert found is None if wrong is None else found.startswith(wrong)


def test_a_scan_may_end_with_a_verdict():
    outcome = GOOD | {"code": 1, "stderr": ""}
    assert fuzz.problem("scan", outcome, {}, {}) is None
    assert fuzz.problem("guard", outcome, {}, {}) == "0 lines on stderr: []"


def test_a_case_is_the_same_every_time(tmp_path):
    contents = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        arguments = fuzz.make_case(3, 5, tmp_path / name)
        contents.append(((tmp_path / name / "model.onnx").read_bytes(), arguments[2:]))
    assert contents[0] == contents[1]


NAMES = st.sampled_from(["x", "w", "a", "b", "c", "y", ""])
DIMS = st.lists(st.sampled_from([0, 1, 2, 8, 64, 65]), max_size=4)
ARRAYS = st.builds(
    lambda shape, kind, seed: (np.random.default_rng(seed).standard_normal(shape)).astype(kind),
    DIMS.filter(lambda dims: np.prod(dims) < 70_000),
    st.sampled_from([np.float32, np.float16, np.float64, np.int64, np.int8]),
    st.integers(0, 9),
)
ATTRIBUTES = st.dictionaries(
    st.sampled_from(["perm", "axis", "to", "transA", "transB", "alpha", "group", "hidden_size"]),
    st.one_of(
        st.integers(-2, 3), st.floats(-1, 1), st.lists(st.integers(-1, 3), min_size=1, max_size=4)
    ),
    max_size=2,
)
OPERATORS = [
    *("MatMul", "Gemm", "Conv", "ConvTranspose", "LSTM", "GRU", "RNN", "Gather", "Identity"),
    *("Transpose", "Cast", "Slice", "Split", "Concat", "Unsqueeze", "Reshape", "Add", "F"),
]


@st.composite
def graphs(draw, depth=0):
    nodes = []
    for _ in range(draw(st.integers(1, 5))):
        op = draw(st.sampled_from(OPERATORS))
        attributes = draw(ATTRIBUTES)
        if depth < 2 and draw(st.integers(0, 5)) == 0:
            op = "If"
            attributes = {name: draw(graphs(depth + 1)) for name in ("then_branch", "else_branch")}
        inputs, outputs = draw(st.lists(NAMES, max_size=4)), draw(st.lists(NAMES, max_size=2))
        nodes.append(
            helper.make_node(op, inputs, outputs, "n", "", "f" * (op == "F"), **attributes)
        )
    value = helper.make_tensor_value_info
    return helper.make_graph(
        nodes,
        "g",
        [] if depth else [value("x", draw(st.sampled_from([F, TensorProto.INT64])), ["n", 64])],
        [value(draw(NAMES), F, None)],
        [
            numpy_helper.from_array(array, name)
            for name, array in draw(st.dictionaries(NAMES, ARRAYS, max_size=3)).items()
        ],
    )


@st.composite
def models(draw):
    imports = [helper.make_opsetid("", draw(st.sampled_from([7, 13, 17, 21])))]
    imports.append(helper.make_opsetid("f", 1))
    body = draw(graphs(depth=1))
    function = helper.make_function("f", "F", ["x"], ["y"], body.node, imports)
    return helper.make_model(draw(graphs()), opset_imports=imports, functions=[function])


@given(models(), st.sampled_from(fuzz.SCHEMES), st.sampled_from(["inspect", "guard"]))
@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_graphs_of_any_structure(tmp_path, proto, scheme, command):
    for path in tmp_path.iterdir():
        path.unlink()
    path = save(proto, tmp_path)
    before = files(tmp_path)
    result = call(command, path, "--scheme", scheme)
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert result.exit_code in (0, 1, 2)
    if result.exit_code:
        lines = [line for line in result.stderr.splitlines() if not line.endswith(" ...")]
        assert len(lines) == 1, result.stderr
        assert lines[0].startswith("flipguard-onnx: ")
        assert files(tmp_path) == before
