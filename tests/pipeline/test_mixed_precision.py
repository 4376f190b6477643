"""The tensors that cost the most at 4 bits stay at 8."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto

import flipguard_onnx
from flipguard_onnx.calibration.samples import Samples
from flipguard_onnx.emit.writers import decoded_values
from flipguard_onnx.graph.copies import IndexedModel
from flipguard_onnx.graph.weights import find_weights
from flipguard_onnx.io.model import open_model
from flipguard_onnx.pipeline.mixed_precision import SensitivityProbe, measure, most_sensitive
from flipguard_onnx.pipeline.options import GuardOptions
from flipguard_onnx.pipeline.plan import plan_weights
from flipguard_onnx.quantization.kernels import get_backend
from flipguard_onnx.quantization.rounding import Policy, quantize_tensor, tensor_key
from flipguard_onnx.reports.html import guard_html
from tests.helpers.command import call, names, one_line
from tests.helpers.samples import SAMPLES, initializer_as_input, matmul, model, node, save, weights

F = TensorProto.FLOAT
FIRST, SECOND, THIRD = "first [0]", "second", "third"


def branches(scale=(1.0, 0.01, 0.2), dtype=np.float32):
    """Three products of one input, added up; each counts for as much as its scale."""
    kind = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    tensors = {n: weights((64, 32), i, dtype) for i, n in enumerate((FIRST, SECOND, THIRD))}
    tensors |= {f"scale{i}": np.array(value, dtype) for i, value in enumerate(scale)}
    nodes = []
    for i, name in enumerate((FIRST, SECOND, THIRD)):
        nodes.append(onnx.helper.make_node("MatMul", ["x", name], [f"h{i}"]))
        nodes.append(node("Mul", f"h{i} scale{i}", f"m{i}"))
    nodes.append(node("Sum", "m0 m1 m2", "y"))
    return model(nodes, {"x": (kind, ["n", 64])}, {"y": (kind, ["n", 32])}, tensors)


def switched(tmp_path, proto, scheme="int4"):
    """The source, the sink with all its weights drawn, and what was drawn."""
    source = open_model(save(proto, tmp_path))
    graph, drawn = IndexedModel.of(source.proto), {}
    sink = SensitivityProbe(source, graph, tmp_path / "switched", 1 << 30)
    options = GuardOptions(scheme=scheme)
    for plan in plan_weights(graph.weights, options):
        weight, kind, blocks = plan.weight, plan.scheme, plan.blocks
        values = weight.canonical(source.array(weight.tensor))
        key, backend = tensor_key(1, weight.name), get_backend("cpu")
        flips = quantize_tensor(weight.name, values, kind, blocks, Policy(), key, backend)
        sink.add_weight(weight.name, kind, flips)
        drawn[weight.name] = weight.stored(decoded_values(flips))
    sink.save({})
    return source, sink, drawn


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_switch_is_the_drawn_weight(tmp_path, dtype):
    proto = branches((1, 1, 1), dtype)
    source, sink, drawn = switched(tmp_path, proto)
    session = onnxruntime.InferenceSession(sink.output.path, providers=["CPUExecutionProvider"])
    original = onnxruntime.InferenceSession(source.path, providers=["CPUExecutionProvider"])
    x = np.random.default_rng(0).standard_normal((5, 64)).astype(dtype)
    [expected] = original.run(None, {"x": x})
    assert np.array_equal(session.run(None, {"x": x} | sink.off)[0], expected)
    assert set(sink.switches) == {FIRST, SECOND, THIRD}
    for name, switch in sink.switches.items():
        [found] = session.run(None, {"x": x} | sink.off | {switch: np.ones((), dtype)})
        tensor = next(t for t in source.proto.graph.initializer if t.name == name)
        change = drawn[name] - source.array(tensor).astype(np.float32)
        wanted = expected.astype(np.float32) + x.astype(np.float32) @ change
        assert np.allclose(found, wanted, atol=1e-5 if dtype == np.float32 else 1e-2)
        assert not np.array_equal(found, expected)


def test_what_moves_the_outputs_costs(tmp_path):
    source, sink, _ = switched(tmp_path, branches())
    costs = measure(Samples(source, None), sink)
    assert costs[FIRST] > 10 * costs[THIRD] > 100 * costs[SECOND] > 0


def test_only_initializers_of_the_main_graph_have_switches(tmp_path):
    wanted = {"nested": {"outer"}, "constant_through_chain": set(), "function": {"w"}}
    for sample, switches in wanted.items():
        folder = tmp_path / sample
        folder.mkdir()
        source, sink, drawn = switched(folder, SAMPLES[sample]())
        main = {tensor.name for tensor in source.proto.graph.initializer}
        assert set(sink.switches) == {name for name in drawn if name in main} == switches
        assert set(measure(Samples(source, None), sink)) == switches


def test_an_initializer_that_is_an_input_too(tmp_path):
    source, sink, _ = switched(tmp_path, initializer_as_input())
    costs = measure(Samples(source, None), sink)
    assert list(costs) == ["w"]
    assert costs["w"] > 0


def test_the_share_is_not_exceeded(tmp_path):
    found = find_weights(branches())[0]
    costs = {FIRST: 9.0, SECOND: 3.0, THIRD: 1.0}
    assert most_sensitive(costs, found, 0.3) == ()
    assert most_sensitive(costs, found, 0.34) == ("first?[[]0]",)
    assert most_sensitive(costs, found, 0.99) == ("first?[[]0]", "second")


@pytest.mark.parametrize("scheme", ["int4", "nf4", "fp4"])
def test_the_most_sensitive_stays_at_8_bits(tmp_path, scheme):
    source = save(branches(), tmp_path)
    kinds, written = {}, []
    for number in range(2):
        output = tmp_path / f"{number}.onnx"
        report = flipguard_onnx.guard(source, scheme, int8_share=0.4, seed=1, output=output)
        kinds = {tensor.name: tensor.scheme for tensor in report.tensors}
        written.append(output.read_bytes())
    assert kinds == {FIRST: "int8", SECOND: scheme, THIRD: scheme}
    assert written[0] == written[1]
    kept = "first?[[]0] and the most sensitive tensors, up to 40% of the weights"
    assert f"int8      {kept}" in report.render()
    assert f"<dd>{kept}" in guard_html(report)
    entries = {p.key: p.value for p in onnx.load(output).metadata_props}
    assert entries["flipguard.int8_share"] == "0.4"
    whole = flipguard_onnx.guard(source, scheme, seed=1, output=tmp_path / "whole.onnx")
    assert drift(report) < drift(whole) / 2
    again = flipguard_onnx.verify(source, output)  # beside plain rounding of the same kind
    other = flipguard_onnx.verify(source, output, scheme)
    for found, expected in ((again, report), (other, whole)):
        baselines = (r.validation.plain_exact[0].relative_l2 for r in (found, expected))
        # at int4 nearest rounding in a guard is that on the grid which clips nothing
        assert next(baselines) == pytest.approx(next(baselines), rel=0.2 * (scheme == "int4"))


def drift(report):
    return report.validation.guarded_exact[0].relative_l2


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (
            ["--scheme", "int8", "--int8-share", "0.5"],
            "int8 share is for 4 or 2 bits: int8 has all at 8",
        ),
        (["--scheme", "int4", "--int8-share", "1"], "int8 share is 1.0"),
        (["--scheme", "int4", "--int8-share", "nan"], "int8 share is nan"),
    ],
)
def test_refusals(tmp_path, options, named):
    source = save(matmul(), tmp_path)
    assert named in one_line(call(source, *options))
    assert names(tmp_path) == ["model.onnx"]


def test_a_model_that_is_too_large_to_run(tmp_path):
    source = save(matmul((1024, 300)), tmp_path)
    options = "--scheme", "nf4", "--int8-share", 0.5, "--max-memory", 1, "--quiet"
    refused = one_line(call(source, *options))
    assert "has 1.2 MiB; allowed: up to --max-memory, 1 MiB" in refused
    assert names(tmp_path) == ["model.onnx"]
