"""Weights of a copy are those that would be found in it."""

import pytest

from flipguard_onnx.graph.copies import IndexedModel
from flipguard_onnx.graph.weights import find_weights
from tests.helpers.samples import SAMPLES


def place(weight):
    """Where a weight stands, told by what does not depend on the object."""
    uses = [(use.node.SerializeToString(), use.index, use.perm, use.op) for use in weight.uses]
    return weight.name, weight.tensor_name, weight.rows, uses


@pytest.mark.parametrize("sample", SAMPLES)
def test_they_are_those_that_would_be_found(sample):
    proto = SAMPLES[sample]()
    copy, found = IndexedModel.of(proto).copy()
    expected = find_weights(copy)[0]
    assert [place(weight) for weight in found.values()] == [place(w) for w in expected]
    for weight, other in zip(found.values(), expected, strict=True):
        assert weight.tensor is other.tensor
        assert weight.scope.body is other.scope.body
        assert [use.node for use in weight.uses] == [use.node for use in other.uses]
        assert all(a.node is b.node for a, b in zip(weight.uses, other.uses, strict=True))
        assert all(
            a.scope.body is b.scope.body for a, b in zip(weight.uses, other.uses, strict=True)
        )


def test_an_edit_of_the_copy_leaves_the_original_alone():
    proto = SAMPLES["matmul"]()
    before = proto.SerializeToString()
    copy, found = IndexedModel.of(proto).copy()
    weight = found["w"]
    weight.tensor.name = "other"
    weight.uses[0].node.input[1] = "other"
    assert proto.SerializeToString() == before
    assert copy.graph.initializer[0].name == "other"
