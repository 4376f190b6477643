"""The text report: which options it shows, and what its figures compare."""

from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic

from flipguard_onnx import GuardOptions, guard
from flipguard_onnx.reports.scan import Budget, Skipped, SkipReason
from flipguard_onnx.reports.words import percent
from tests.helpers.samples import F, matmul, model, node, save, weights


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    source = save(matmul(), tmp_path_factory.mktemp("text"))
    return guard(source, "int4", seed=1, preserve="off")


def test_options_are_shown_where_they_differ_from_the_defaults(report):
    assert report.changed_options == ("scheme", "preserve")  # other lines show them
    assert "options" not in report.render()
    asked = GuardOptions(include=("a*", "b"), exclude=("c",), target="onnxruntime", max_memory=64)
    changed = replace(report, options=asked.record(), changed_options=asked.changed())
    shown = "options   --include a* --include b --exclude c --target onnxruntime --max-memory 64\n"
    assert shown in changed.render()
    assert changed.to_dict()["options"]["include"] == ["a*", "b"]


def test_it_says_when_no_weight_got_the_scheme(report):
    assert "scheme    int4, one scale per block of 32 weights\n" in report.render()
    others = tuple(replace(t, scheme="int8", grid="int8 channel") for t in report.tensors)
    shown = "weights; but no weight got it: all are int8, one scale per channel\n"
    assert shown in replace(report, tensors=others).render()


def test_feedback_that_could_not_run_is_named_with_what_that_costs_at_4_bits(report):
    [tensor] = report.tensors
    assert "preserve" not in report.render()  # nobody wanted it
    without = replace(report, preserve_note="the inputs of no weight can be recorded")
    cost = f"at 4 bits that costs accuracy: weights are off by {tensor.weight_error:.1%} "
    assert cost in without.render()
    at_8_bits = replace(without, tensors=(replace(tensor, scheme="int8"),))
    assert "costs accuracy" not in at_8_bits.render()


def test_the_budget_is_a_share_of_the_weights(report):
    [w] = onnx.load(report.input).graph.initializer
    total = np.abs(numpy_helper.to_array(w).astype(np.float64)).sum()
    assert report.budget.total == pytest.approx(total)
    assert report.scan.alignments[2].budget.total == pytest.approx(total)
    nearest, chosen, random = map(percent, report.budget.shares)
    assert f"worth {nearest} of the weights' total magnitude" in report.render()
    assert f"after the guard {chosen}, beside {random} of random error" in report.render()
    both = Budget(5, 1, 3, 100) + Budget(5, 1, 4, 100)
    assert both == Budget(10, 2, 5, 200)
    assert both.shares == (0.05, 0.01, 0.025)
    assert Budget(0, 0, 0, 0).shares == (0, 0, 0)


def test_what_is_above_0_is_not_shown_as_0():
    assert [percent(share) for share in (0, 1e-9, 4.9e-5, 5.1e-5, 1)] == [
        "0.00%",
        "<0.01%",
        "<0.01%",
        "0.01%",
        "100.00%",
    ]


def test_a_low_coverage_is_a_warning_with_its_main_reason(report):
    assert report.coverage == 1
    assert "warning" not in report.render()
    weights = report.weights
    few = Skipped("few", (weights // 18,), SkipReason.ONE_AXIS)
    many = Skipped("many", (7, 7), SkipReason.TOO_SMALL, "64")
    more = Skipped("more", (weights, 1), SkipReason.TOO_SMALL, "64")
    assert "warning" not in replace(report, skipped=(few, many)).render()
    low = replace(report, skipped=(few, many, more))
    [line] = [each for each in low.render().splitlines() if each.startswith("warning")]
    assert line == (
        f"warning   {1 - low.coverage:.2%} of all float values are not guarded; "
        f"the largest part, {weights + 49:,} values: too small (fewer than 64 weights)"
    )


@pytest.mark.parametrize(
    ("op", "shape", "granularity", "grid"),
    [
        ("Gather", (60, 32), "channel", "uint8 tensor"),
        ("Gather", (60, 32), "tensor", "uint8 tensor"),
        ("MatMul", (3, 32, 32), "channel", "channels along other axes"),
        ("Conv", (8, 4, 3, 3), "channel", "int8 tensor"),
        ("Conv", (8, 4, 3, 3), "tensor", None),
        ("MatMul", (32, 32), "channel", None),
    ],
)
def test_weights_that_quantize_dynamic_rounds_on_another_grid(
    tmp_path, op, shape, granularity, grid
):
    """What is said is what it does."""
    picks = op == "Gather"
    inputs = {"Conv": (1, 4, 8, 8), "MatMul": (3, 5, 32)}
    x = (TensorProto.INT64, [5]) if picks else (F, inputs[op])
    nodes = [node(op, "w x" if picks else "x w", "y")]
    source = save(model(nodes, {"x": x}, {"y": (F, None)}, {"w": weights(shape, 1)}), tmp_path)
    made = guard(source, granularity=granularity, emit="float", preserve="off", seed=1)
    assert [tensor.dynamic for tensor in made.tensors] == [grid]
    assert (f"rounds 1 tensor, {made.weights:,} weights on another grid" in made.render()) == bool(
        grid
    )
    [moved] = made.outputs
    per_channel = granularity == "channel"
    target = tmp_path / "dynamic.onnx"
    quantize_dynamic(moved, target, per_channel=per_channel, weight_type=QuantType.QInt8)
    found = {t.name: numpy_helper.to_array(t) for t in onnx.load(target).graph.initializer}
    guarded = found["w_zero_point"].dtype == np.int8 and found["w_scale"].size == (
        made.tensors[0].weights // columns(op, shape) if per_channel else 1
    )
    assert guarded == (grid is None)
    quantized = guard(source, granularity=granularity, preserve="off", output=tmp_path / "q.onnx")
    assert "quantize_dynamic" not in quantized.render()


def columns(op, shape):
    """Weights of an output channel."""
    return int(np.prod(shape[1:])) if op in ("Gather", "Conv") else shape[-2]


def test_the_bound_of_the_drift(report):
    [nearest] = report.validation.plain_exact
    bound = 3 * (1 + 8 / nearest.values**0.5) * nearest.relative_l2
    assert report.validation.allowed == pytest.approx(bound)
    assert f"allowed: up to {bound:.5f} (--max-drift 3" in report.render()
