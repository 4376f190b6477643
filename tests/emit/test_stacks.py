"""Stacks of matrices, of which a model picks some when it runs, as in a mixture of experts.

What is written is compared with codes that are computed here, one weight at a time.
"""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import flipguard_onnx
from flipguard_onnx.calibration.weight_inputs import weight_input
from flipguard_onnx.graph.weights import find_weights
from tests.helpers import naive
from tests.helpers.samples import F, model, node, save, weights
from tests.helpers.written import require_rounded, run

HALF, INT64, BOOL = TensorProto.FLOAT16, TensorProto.INT64, TensorProto.BOOL
E, K, N = 3, 70, 33  # experts, inputs (no whole number of blocks), outputs
SCHEMES = ["int8", "int4", "nf4"]


def stack(shape, dtype=np.float32):
    """Channels of different sizes, along every axis."""
    values = weights(shape) * 4
    for axis, length in enumerate(shape):
        sizes = 2.0 ** np.random.default_rng(axis).integers(-2, 3, length)
        values = values * np.expand_dims(sizes, [a for a in range(len(shape)) if a != axis])
    return values.astype(dtype)


def picked(nodes, x=(5, K), index=(1,), w=(E, K, N), dtype=np.float32, **constants):
    """x and a stack w; `index` is the shape of the input that says which matrices are picked."""
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    return model(
        nodes,
        {"x": (kind, x), "e": (INT64, index)},
        {"y": (kind, None)},
        {"w": stack(w, dtype), "zero": np.array([0]), **constants},
        ir_version=10,
        opset=21,
    )


PRODUCT = [node("MatMul", "x m", "y")]
CONV = [node("Conv", "x m", "y")]
TWO = np.array([2])


def squeezed(*nodes, **options):
    return picked([node("Gather", "w e", "p"), node("Squeeze", "p zero", "m"), *nodes], **options)


def in_a_loop():
    """The number of the iteration picks."""
    declared = helper.make_tensor_value_info
    body = helper.make_graph(
        [
            node("Gather", "w i", "m"),
            node("MatMul", "h m", "t"),
            node("Tanh", "t", "next"),
            node("Identity", "go", "on"),
        ],
        "body",
        [declared("i", INT64, []), declared("go", BOOL, []), declared("h", F, None)],
        [declared("on", BOOL, []), declared("next", F, None)],
    )
    yes, times = np.array(True), np.array(E)
    loop = node("Loop", "times yes x", "y", body=body)
    return picked([loop], w=(E, K, K), yes=yes, times=times)


def scanned():
    """Slices along the second axis, one after the other."""
    declared = helper.make_tensor_value_info
    body = helper.make_graph(
        [node("MatMul", "h m", "t"), node("Tanh", "t", "next")],
        "body",
        [declared("h", F, [5, K]), declared("m", F, [K, K])],
        [declared("next", F, [5, K])],
    )
    scan = node("Scan", "x w", "y", body=body, num_scan_inputs=1, scan_input_axes=[1])
    return picked([scan], w=(K, E, K))


def in_a_function():
    """The stack is the argument of a function."""
    body = helper.make_function(
        "local",
        "Layer",
        ["x", "v", "i"],
        ["y"],
        [node("Gather", "v i", "m"), node("MatMul", "x m", "y")],
        [helper.make_opsetid("", 21)],
    )
    proto = picked([node("Layer", "x w e", "y", domain="local")], index=())
    proto.functions.append(body)
    proto.opset_import.append(helper.make_opsetid("local", 1))
    return proto


MATMUL = node("MatMul", "x m", "y")

MODELS = {  # the model, the axis that is summed over, and whether only what is picked is decoded
    "by_number": (lambda: picked([node("Gather", "w e", "m"), MATMUL], index=()), (1,), True),
    "squeezed": (lambda: squeezed(MATMUL), (1,), True),
    "reshaped": (
        lambda: picked(
            [node("Gather", "w e", "p"), node("Reshape", "p shape", "m"), MATMUL],
            shape=np.array([K, N]),
        ),
        (1,),
        True,
    ),
    "transposed_behind": (
        lambda: squeezed(node("Transpose", "m", "t"), node("MatMul", "x t", "y"), w=(E, N, K)),
        (2,),
        True,
    ),
    "transposed_with_a_batch": (
        lambda: picked(
            [
                node("Gather", "w e", "p"),
                node("Transpose", "p", "m", perm=[0, 2, 1]),
                MATMUL,
            ],
            x=(4, 5, K),
            index=(4,),
            w=(E, N, K),
        ),
        (2,),
        True,
    ),
    "transposed_before": (
        lambda: picked(
            [
                node("Transpose", "w", "t", perm=[0, 2, 1]),
                node("Gather", "t e", "p"),
                node("Squeeze", "p zero", "m"),
                MATMUL,
            ],
            w=(E, N, K),
        ),
        (2,),
        True,
    ),
    "of_each_token": (
        lambda: picked([node("Gather", "w e", "m"), MATMUL], x=(4, 1, K), index=(4,)),
        (1,),
        True,
    ),
    "on_the_left": (
        lambda: squeezed(node("MatMul", "m x", "y"), x=(K, 5), w=(E, N, K)),
        (2,),
        True,
    ),
    "half": (lambda: squeezed(MATMUL, dtype=np.float16), (1,), True),
    "two_levels": (
        lambda: picked(
            [node("Gather", "w e", "l"), node("Gather", "l e", "m"), MATMUL],
            index=(),
            w=(E, E, K, N),
        ),
        (2,),
        True,
    ),
    "einsum": (
        lambda: picked(
            [node("Gather", "w e", "m"), node("Einsum", "m x", "y", equation="beck,bk->bec")],
            x=(4, K),
            index=(4, 2),
            w=(E, N, K),
        ),
        (2,),
        True,
    ),
    "gemm": (
        lambda: squeezed(node("Gemm", "x m b", "y", transB=1), w=(E, N, K), b=weights((N,), 1)),
        (2,),
        True,
    ),
    "conv": (
        lambda: squeezed(node("Conv", "x m", "y"), x=(1, 6, 9), w=(E, 8, 6, 3)),
        (2, 3),
        True,
    ),
    "in_a_loop": (in_a_loop, (1,), True),
    "scanned": (scanned, (0,), False),
    "in_a_function": (in_a_function, (1,), True),
}


def feed_for(proto):
    rng, feed = np.random.default_rng(0), {}
    for value in proto.graph.input:
        kind = value.type.tensor_type
        shape = [dim.dim_value for dim in kind.shape.dim]
        if value.name == "e":
            feed["e"] = rng.integers(0, E, shape)
        else:
            dtype = helper.tensor_dtype_to_np_dtype(kind.elem_type)
            feed[value.name] = rng.standard_normal(shape).astype(dtype)
    return feed


@pytest.mark.parametrize("target", ["portable", "onnxruntime"])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", MODELS)
def test_every_channel_of_every_matrix_is_quantized_on_its_own(tmp_path, name, scheme, target):
    make, contracted, by_part = MODELS[name]
    proto, path = make(), tmp_path / "out.onnx"
    options = {"policy": "none", "target": target, "validate": False, "output": path}
    report = flipguard_onnx.guard(save(proto, tmp_path), scheme, **options)
    (tensor,) = report.tensors
    used = "int8" if name == "conv" else scheme
    whole = "dequantize" if target == "portable" and used != "nf4" else "folded"
    assert tensor.scheme == used
    assert tensor.forms == ("gather" if by_part and used != "nf4" else whole,)
    close = 2e-3 if name == "half" else 1e-5
    require_rounded(path, proto, feed_for(proto), used, contracted, close, 2 * close)


@pytest.mark.parametrize("target", ["portable", "onnxruntime"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_columns_of_a_matrix_that_are_picked(tmp_path, scheme, target):
    """As of a head that is stored as a MatMul reads it, and of no whole number of blocks."""
    nodes = [node("MatMul", "x w", "z"), node("Gather", "w e", "y", axis=1)]
    proto = picked(nodes, index=(2, 2), w=(K, N))
    path = tmp_path / "out.onnx"
    options = {"policy": "none", "target": target, "validate": False, "output": path}
    report = flipguard_onnx.guard(save(proto, tmp_path), scheme, **options)
    assert ("gather" in report.tensors[0].forms) is (scheme != "nf4")
    feed = feed_for(proto)
    wanted = naive.rounded(stack((K, N)), scheme, 0)[:, feed["e"]]
    assert np.allclose(run(path, feed), wanted, rtol=1e-6, atol=0)


def test_codes_are_stored_once_two_to_a_byte(tmp_path):
    path = tmp_path / "out.onnx"
    flipguard_onnx.guard(save(MODELS["squeezed"][0](), tmp_path), "int4", output=path)
    sizes = {t.name: len(t.raw_data) for t in onnx.load(path).graph.initializer}
    padded = E * N * 96  # whole blocks of 32
    assert sizes["w_quantized"] == padded // 2
    assert sum(sizes.values()) < padded // 2 + 4 * padded // 32 + 200


def test_a_table_of_three_axes_whose_rows_are_activations_stays_a_table(tmp_path):
    """It is picked from and multiplied, but with a weight."""
    proto = squeezed(node("MatMul", "m v", "y"), w=(E, N, K), v=weights((K, 16)))
    found = {w.name: (w.op, w.rows) for w in find_weights(proto)[0]}
    assert found == {"w": ("Gather", (0,)), "v": ("MatMul", (1,))}


@pytest.mark.parametrize(
    "name", [n for n in MODELS if not n.startswith(("in_a", "scan", "conv", "gemm", "einsum"))]
)
def test_what_all_matrices_are_multiplied_with_is_recorded(name):
    """Its products with the matrix that is picked are the output."""
    proto = MODELS[name][0]()
    (weight,) = find_weights(proto)[0]
    found = weight_input(weight.uses[0], weight, [proto.graph])
    if name == "reshaped":
        assert found == "not read as it is stored"
        return
    feed = feed_for(proto)
    (rows,) = found.rows(feed[found.value], 1000, np.random.default_rng(0))
    matrices = weight.canonical(numpy_helper.to_array(weight.tensor)).reshape(-1, N, K)
    place = feed["e"] * E + feed["e"] if name == "two_levels" else feed["e"]
    samples = rows.reshape(np.size(place), -1, K)
    products = samples @ matrices[place].reshape(-1, N, K).transpose(0, 2, 1)
    output = run(proto, feed)
    output = output.T if name == "on_the_left" else output
    assert np.allclose(output.reshape(products.shape), products, rtol=1e-3, atol=1e-3)


def test_what_is_picked_is_not_rounded_again_beside_integers(tmp_path):
    """Integer activations: onnxruntime's quantizer would take it for one of them."""
    product = node("MatMul", "x m", "h")
    proto = squeezed(product, node("MatMul", "h v", "y"), v=weights((N, 24)))
    path = tmp_path / "out.onnx"
    report = flipguard_onnx.guard(
        save(proto, tmp_path), activations="uint8", preserve="off", output=path
    )
    assert report.integers.weight_only == {"w": "onnxruntime leaves this MatMul float"}
    assert list(product.input) in [list(n.input) for n in onnx.load(path).graph.node]
    drift, *_ = report.validation.guarded_exact
    assert drift.relative_l2 < 0.05


def test_stacks_alone_do_not_run_in_integers(tmp_path):
    source = save(squeezed(MATMUL), tmp_path)
    with pytest.raises(flipguard_onnx.UnsupportedModelError, match="no weight feeds MatMul"):
        flipguard_onnx.guard(source, activations="uint8", output=tmp_path / "out.onnx")


@pytest.mark.parametrize(
    ("proto", "fed"),
    [
        (picked([node("Gather", "w e", "p"), node("Unsqueeze", "p zero", "m"), *PRODUCT]), True),
        (picked([node("Unsqueeze", "w two", "m"), *PRODUCT], x=(12, 8), w=(12, 8), two=TWO), False),
        (picked([node("Unsqueeze", "w two", "m"), *CONV], x=(1, 8, 9), w=(12, 8), two=TWO), False),
        (picked([node("Gather", "w e", "m"), *CONV], x=(1, 5, 8, 8), w=(E, 5, 4, 3)), False),
        (picked([node("Gather", "w e", "m"), *CONV], x=(1, 4, 8), index=(), w=(E, 5, 4, 3)), True),
    ],
)
def test_errors_are_fed_forward_only_where_it_is_known_how_the_weight_is_read(tmp_path, proto, fed):
    source = save(proto, tmp_path)
    report = flipguard_onnx.guard(source, "int8", output=tmp_path / "out.onnx", seed=1)
    (tensor,) = report.tensors
    assert (tensor.gain is not None) == fed
