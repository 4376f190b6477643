"""Einsum and Gemm with a constant operand on either side.

What is written is compared with codes that are computed here, one weight at a time.
"""

import numpy as np
import pytest
from onnx import numpy_helper

import flipguard_onnx
from flipguard_onnx.calibration.weight_inputs import weight_input
from flipguard_onnx.graph.weights import find_weights
from tests.helpers.samples import F, model, node, save, weights
from tests.helpers.written import require_rounded, run

SIZES = {"b": 3, "e": 2, "h": 5, "d": 14, "k": 70, "n": 33, "m": 24, "s": 4}


def einsum(equation, index, before=None):
    """before: the equation's axes of the constant in the order in which it is stored."""
    terms = equation.replace(" ", "").partition("->")[0].split(",")
    shapes = [[SIZES[label] for label in term.replace("...", "bs")] for term in terms]
    names = "w x" if index == 0 else "x w"
    nodes = [node("Einsum", names, "y", equation=equation)]
    stored = shapes[index]
    if before:
        stored = [SIZES[label] for label in before]
        perm = [before.index(label) for label in terms[index]]
        nodes = [node("Transpose", "w", "t", perm=perm), nodes[0]]
        nodes[1].input[index] = "t"
    return model(nodes, {"x": (F, shapes[1 - index])}, {"y": (F, None)}, {"w": weights(stored)})


def gemm(trans_a, trans_b, index=0):
    shapes = [(70, 33) if trans_a else (33, 70), (5, 70) if trans_b else (70, 5)]
    names = "w x b" if index == 0 else "x w b"
    return model(
        [node("Gemm", names, "y", transA=trans_a, transB=trans_b, alpha=0.5)],
        {"x": (F, shapes[1 - index])},
        {"y": (F, [33, 5])},
        {"w": weights(shapes[index]) * 3, "b": weights((1, 5), 1)},
    )


MODELS = {  # the model, the axes that are summed over, and whether its inputs are recorded
    "product": (lambda: einsum("bk,kn->bn", 1), (0,), True),
    "on_the_left": (lambda: einsum("nk,kb->nb", 0), (1,), True),
    "first_but_behind": (lambda: einsum("kn,bk->bn", 0), (0,), True),
    "batches": (lambda: einsum("...k,kn->...n", 1), (0,), True),
    "result_left_out": (lambda: einsum("bk, kn", 1), (0,), True),
    "result_turned": (lambda: einsum("bsk,nk->nbs", 1), (1,), True),
    "heads_joined": (lambda: einsum("bshd,hdm->bsm", 1), (0, 1), True),
    "heads_joined_transposed": (lambda: einsum("bshd,hdm->bsm", 1, "dmh"), (0, 2), True),
    "heads_split": (lambda: einsum("bsk,khd->bhsd", 1), (0,), True),
    "all_experts": (lambda: einsum("bk,ekn->ben", 1), (1,), True),
    "a_matrix_each": (lambda: einsum("ebk,ekn->ebn", 1), (1,), False),
    "summed_alone": (lambda: einsum("bks,kn->bn", 1), (0,), False),
    "gemm": (lambda: gemm(0, 0), (1,), True),
    "gemm_trans_a": (lambda: gemm(1, 0), (0,), True),
    "gemm_trans_b": (lambda: gemm(0, 1), (1,), True),
    "gemm_trans_both": (lambda: gemm(1, 1), (0,), True),
}


def feed_for(proto):
    shape = [dim.dim_value for dim in proto.graph.input[0].type.tensor_type.shape.dim]
    return {"x": np.random.default_rng(0).standard_normal(shape).astype(np.float32)}


@pytest.mark.parametrize("target", ["portable", "onnxruntime"])
@pytest.mark.parametrize("scheme", ["int8", "int4", "nf4"])
@pytest.mark.parametrize("name", MODELS)
def test_each_output_channel_is_quantized_on_its_own(tmp_path, name, scheme, target):
    make, contracted, _ = MODELS[name]
    proto, path = make(), tmp_path / "out.onnx"
    options = {"policy": "none", "target": target, "validate": False, "output": path}
    report = flipguard_onnx.guard(save(proto, tmp_path), scheme, **options)
    (tensor,) = report.tensors
    assert tensor.scheme == scheme
    require_rounded(path, proto, feed_for(proto), scheme, contracted, 1e-5, 1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_what_the_constant_is_multiplied_with(name):
    """Its products with the constant's rows are the outputs."""
    make, _, is_recorded = MODELS[name]
    proto = make()
    (weight,) = find_weights(proto)[0]
    found = weight_input(weight.uses[0], weight, [proto.graph])
    assert isinstance(found, str) is not is_recorded
    if not is_recorded:
        assert found == "inputs of Einsum are not recorded here"
        return
    feed = feed_for(proto)
    (rows,) = found.rows(feed["x"], 1000, np.random.default_rng(0))
    matrix = weight.canonical(numpy_helper.to_array(weight.tensor)).reshape(-1, rows.shape[1])
    products = rows @ matrix.T
    output = run(proto, feed)
    if name.startswith("gemm"):
        products = 0.5 * products + weights((1, 5), 1).T
    assert output.size == products.size
    assert np.allclose(np.sort(output, None), np.sort(products, None), rtol=1e-4, atol=1e-5)
    assert np.allclose(output.sum(), products.sum(), rtol=1e-4, atol=1e-5)


def test_what_a_convolution_multiplies_a_transposed_constant_with():
    """Kernel, inputs, outputs, as TensorFlow has them: columns are in the stored order."""
    w = weights((3, 5, 8, 16))
    proto = model(
        [node("Transpose", "w", "t", perm=[3, 2, 0, 1]), node("Conv", "x t", "y")],
        {"x": (F, [1, 8, 9, 9])},
        {"y": (F, None)},
        {"w": w},
    )
    (weight,) = find_weights(proto)[0]
    feed = feed_for(proto)
    found = weight_input(weight.uses[0], weight, [proto.graph])
    (rows,) = found.rows(feed["x"], 1000, np.random.default_rng(0))
    products = weight.canonical(w).reshape(16, -1) @ rows.T
    assert np.allclose(run(proto, feed).reshape(16, -1), products, atol=1e-5)
