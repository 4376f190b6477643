"""find_weights: what is found, in which layout, and the reason for everything left alone."""

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from flipguard_onnx import UnsupportedModelError
from flipguard_onnx.graph.weights import find_weights
from tests.helpers.samples import SAMPLES, F, model, node, weights


def found(proto):
    return {w.name: w for w in find_weights(proto)[0]}


def reasons(proto):
    return {s.name: s.text for s in find_weights(proto)[1]}


@pytest.mark.parametrize(
    ("sample", "op", "rows"),
    [
        ("matmul", "MatMul", (1,)),
        ("matmul_left", "MatMul", (0,)),
        ("matmul_batched", "MatMul", (0, 2)),
        ("gemm", "Gemm", (1,)),
        ("gemm_transposed", "Gemm", (0,)),
        ("conv", "Conv", (0,)),
        ("conv_transpose", "ConvTranspose", (1,)),
        ("gather", "Gather", (0,)),
        ("lstm", "LSTM", (0, 1)),
        ("gru", "GRU", (0, 1)),
        ("rnn", "RNN", (0, 1)),
        ("constant_through_chain", "MatMul", (0,)),
        ("tied_embedding", "MatMul", (0,)),
        ("view", "Conv", (0,)),
        ("loop", "MatMul", (1,)),
        ("function", "MatMul", (1,)),
    ],
)
def test_operator_and_output_axes(sample, op, rows):
    weight = found(SAMPLES[sample]())["w"]
    assert (weight.op, weight.rows) == (op, rows)


@pytest.mark.parametrize("sample", SAMPLES)
def test_canonical_and_stored_are_inverse(sample):
    for weight in found(SAMPLES[sample]()).values():
        values = np.arange(weight.size).reshape(weight.shape)
        flat = weight.canonical(values)
        assert np.array_equal(weight.stored(flat), values)
        rows = flat.reshape(
            -1, np.prod([weight.shape[a] for a in weight.perm if a not in weight.rows], dtype=int)
        )
        index = tuple(0 if a in weight.rows else slice(None) for a in range(values.ndim))
        assert np.array_equal(rows[0], values[index].reshape(-1))


def test_every_reader_is_listed():
    uses = found(SAMPLES["shared"]())["w"].uses
    assert sorted((use.op, use.node.op_type) for use in uses) == [
        ("", "ReduceMean"),
        ("MatMul", "MatMul"),
        ("MatMul", "MatMul"),
    ]
    assert {use.node.op_type for use in found(SAMPLES["nested"]())["outer"].uses} == {"MatMul"}


def test_names_repeated_in_subgraphs_stay_apart():
    proto = SAMPLES["nested"]()
    for attribute in proto.graph.node[0].attribute:
        for name in ("a", "b"):
            text = attribute.g.SerializeToString()
            if attribute.g.name == name:
                attribute.g.ParseFromString(text)
                attribute.g.initializer[0].name = "same"
                attribute.g.node[0].input[1] = "same"
    assert set(found(proto)) == {"outer", "same", "same#2"}


def test_names_depend_on_no_order():
    def branch(name, seed):
        own = numpy_helper.from_array(weights((24, 24), seed), "own")
        result = helper.make_tensor_value_info(name, F, None)
        return helper.make_graph([node("MatMul", "x own", name)], name, [], [result], [own])

    proto = model(
        [
            node("If", "c", "a", then_branch=branch("o1", 1), else_branch=branch("o2", 2)),
            node("If", "c", "b", then_branch=branch("o3", 3), else_branch=branch("o4", 4)),
            node("MatMul", "a single", "d"),
            node("Add", "d b", "y"),
        ],
        {"x": (F, [8, 24]), "c": (TensorProto.BOOL, [])},
        {"y": (F, [8, 24])},
        {"single": weights((24, 24)), "own#2": weights((24, 24))},
    )
    before = found(proto)
    assert [*before] == ["single", "own", "own#3", "own#4", "own#5"]
    first, second, *others = proto.graph.node
    for each in (first, second):
        each.attribute.reverse()
    del proto.graph.node[:]
    proto.graph.node.extend([second, first, *others])
    after = found(proto)
    assert {name: w.tensor for name, w in before.items()} == {n: w.tensor for n, w in after.items()}


def test_reasons():
    proto = model(
        [
            node("MatMul", "x w", "h"),
            node("Add", "h bias", "h2"),
            node("Mul", "h2 factor", "h3"),
            node("Add", "h3 grid", "h4"),
            node("MatMul", "h4 tiny", "h5"),
            node("Cast", "h5", "h6", to=TensorProto.DOUBLE),
            node("MatMul", "h6 wide", "h7"),
            node("Identity", "out", "y2"),
            node("Cast", "h7", "y", to=F),
        ],
        {"x": (F, [8, 8])},
        {"y": (F, [8, 8]), "y2": (F, [8, 8])},
        {
            "w": weights((8, 8)),
            "bias": weights((8,)),
            "factor": np.float32(2),
            "grid": weights((8, 8)),
            "tiny": weights((8, 7)),
            "wide": weights((7, 16)).astype(np.float64),
            "out": weights((8, 8)),
            "unread": weights((8, 8)),
        },
    )
    proto.graph.node.append(node("MatMul", "x out", "h9"))
    assert set(found(proto)) == {"w", "out"}
    assert found(proto)["out"].others == ("a graph output",)
    assert reasons(proto) == {
        "bias": "1-D",
        "factor": "scalar",
        "grid": "feeds Add, no weighted operator",
        "tiny": "too small (fewer than 64 weights)",
        "wide": "unsupported type DOUBLE",
        "unread": "feeds nothing, no weighted operator",
    }


def test_computed_weights_are_listed():
    proto = model(
        [node("Relu", "w", "v"), node("Conv", "x v", "y")],
        {"x": (F, [1, 8, 5])},
        {"y": (F, [1, 16, 5])},
        {"w": weights((16, 8, 1))},
    )
    assert reasons(proto) == {
        "w": "feeds Relu, no weighted operator",
        "v": "not constant (weight of Conv)",
    }


def test_a_computed_weight_is_listed_once_for_all_its_readers():
    proto = model(
        [node("Gemm", "x z", "a"), node("Gemm", "a z", "b"), node("Gemm", "l b", "y")],
        {"x": (F, [16, 16]), "z": (F, [16, 16])},
        {"y": (F, [16, 16])},
        {"l": weights((16, 16))},
    )
    assert [(s.name, s.text) for s in find_weights(proto)[1]] == [
        ("z", "not constant (weight of Gemm)")
    ]
    assert [weight.name for weight in find_weights(proto)[0]] == ["l"]


@pytest.mark.parametrize(
    ("op", "inputs"),
    [("MatMulInteger", "q w zq"), ("DequantizeLinear", "w s"), ("Cast", "w")],
)
def test_quantized_models_are_recognised(op, inputs):
    attributes = {"to": F} if op == "Cast" else {}
    proto = model(
        [node(op, inputs, "y", **attributes)],
        {"q": (TensorProto.UINT8, [2, 64])},
        {"y": (TensorProto.INT32, None)},
        {
            "w": np.ones((64, 32), np.int8),
            "s": np.float32(0.1),
            "zq": np.uint8(0),
        },
    )
    with pytest.raises(UnsupportedModelError, match=f"already quantized: 2,048 .*{op}"):
        find_weights(proto)


def test_a_few_quantized_weights_among_floats_are_only_listed():
    proto = SAMPLES["matmul"]()
    proto.graph.initializer.append(numpy_helper.from_array(np.ones((8, 8), np.int8), "q"))
    proto.graph.node.append(node("DequantizeLinear", "q s", "f"))
    assert set(found(proto)) == {"w"}
    assert reasons(proto) == {"q": "already quantized (INT8, feeds DequantizeLinear)"}


def test_tensor_of_an_unknown_operator_is_left_alone():
    proto = model(
        [helper.make_node("Mixer", ["x", "w"], ["y"], domain="com.microsoft")],
        {"x": (F, [8, 64])},
        {"y": (F, [8, 64])},
        {"w": weights((64, 64))},
    )
    assert reasons(proto) == {"w": "feeds Mixer, no weighted operator"}


def test_the_reason_names_what_the_tensor_is_to_an_operator_with_weights():
    """Not that LSTM or Gemm had no weights, nor that a Scan had none inside."""
    proto = model(
        [
            helper.make_node("LSTM", ["x", "w", "r", "b", "", "h0", "c0"], ["y"], hidden_size=16),
            node("Gemm", "left right offset", "z"),
            node("Gemm", "z2 right both", "z3"),
            node("Mul", "z3 both", "z4"),
        ],
        {"x": (F, [5, 1, 24]), "z2": (F, [8, 24])},
        {"y": (F, None), "z": (F, None), "z4": (F, None)},
        {
            "w": weights((1, 64, 24)),
            "r": weights((1, 64, 16)),
            "b": weights((1, 128)),
            "h0": weights((1, 1, 16)),
            "c0": weights((1, 1, 16)),
            "left": weights((8, 24)),
            "right": weights((24, 8)),
            "offset": weights((8, 8)),
            "both": weights((1, 8)),
        },
    )
    assert set(found(proto)) == {"w", "r", "left", "right"}
    assert reasons(proto) == {
        "b": "bias of LSTM",
        "h0": "feeds LSTM, but not as its weight",
        "c0": "feeds LSTM, but not as its weight",
        "offset": "bias of Gemm",
        "both": "bias of Gemm",
    }


def test_a_tensor_of_which_a_scan_takes_slices_is_a_weight_but_no_state_is():
    body = helper.make_graph(
        [node("MatMul", "h slice", "h2"), node("Identity", "h2", "each")],
        "body",
        [helper.make_tensor_value_info(name, F, [8, 8]) for name in ("h", "slice")],
        [helper.make_tensor_value_info(name, F, [8, 8]) for name in ("h2", "each")],
    )
    proto = model(
        [node("Scan", "x layers", "y all", body=body, num_scan_inputs=1)],
        {},
        {"y": (F, [8, 8])},
        {"x": weights((8, 8)), "layers": weights((3, 8, 8))},
    )
    weight = found(proto)["layers"]
    assert (weight.op, weight.rows) == ("MatMul", (0, 2))
    assert reasons(proto)["x"] == "feeds Scan, through which weights are not followed"
