"""Decoders that were merged into one If: their weights are read in its branches alone."""

import numpy as np
import pytest
from onnx import TensorProto, helper

import flipguard_onnx
from flipguard_onnx.calibration.branches import at_the_start
from flipguard_onnx.io.model import open_model
from tests.helpers.decoders import decoder
from tests.helpers.samples import save


def merged(flag="use_cache_branch"):
    """decoder(), all of whose nodes stand in both branches of an If."""
    proto = decoder()
    graph = proto.graph
    values, nodes = list(graph.output), list(graph.node)
    branches = {}
    for branch in ("then_branch", "else_branch"):
        made = {name: f"{branch}.{name}" for node in nodes for name in node.output}
        inner = []
        for node in nodes:
            copy = type(node)()
            copy.CopyFrom(node)
            copy.input[:] = [made.get(name, name) for name in node.input]
            copy.output[:] = [made[name] for name in node.output]
            inner.append(copy)
        outputs = [helper.make_tensor_value_info(made[v.name], 1, None) for v in values]
        branches[branch] = helper.make_graph(inner, branch, [], outputs)
    del graph.node[:]
    graph.node.append(helper.make_node("If", [flag], [v.name for v in values], **branches))
    graph.input.append(helper.make_tensor_value_info(flag, TensorProto.BOOL, [1]))
    return proto


def guarded(tmp_path, proto):
    source, output = save(proto, tmp_path), tmp_path / "out.onnx"
    return flipguard_onnx.guard(source, "int4", output=output, seed=1, force=True)


def test_errors_are_fed_forward_as_in_the_decoder_that_starts_a_text(tmp_path):
    apart, together = guarded(tmp_path, decoder()), guarded(tmp_path, merged())
    assert together.preserve == "synthetic"
    assert {t.name: (t.flips, t.preserved) for t in together.tensors} == {
        t.name: (t.flips, t.preserved) for t in apart.tensors
    }
    assert all(t.preserved for t in together.tensors if t.op == "MatMul")


@pytest.mark.parametrize("goes_on", [False, True])
def test_given_texts_that_go_on_leave_the_model_as_it_is(tmp_path, goes_on):
    source = open_model(save(merged(), tmp_path))
    feed = {"use_cache_branch": np.array([goes_on])}
    started, bodies = at_the_start(source, [feed])
    assert (started is source) == goes_on
    assert len(bodies) == 1 + (not goes_on)
    assert ("If" in {node.op_type for node in started.proto.graph.node}) == goes_on


def test_an_if_on_something_else_stays(tmp_path):
    source = open_model(save(merged("condition"), tmp_path))
    assert at_the_start(source, [])[0] is source
