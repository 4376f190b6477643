"""An attacked model in many disguises: what a quantizer can wake is guarded, or refused."""

import json
import re

import numpy as np
import onnx
import onnxruntime
import pytest

from flipguard_onnx.opening import open_folded
from tests.helpers.attacked import FOLDER
from tests.helpers.command import call, one_line
from tests.helpers.hidden import FORMS, hidden
from tests.helpers.samples import F, model, node, save, weights

ATTACKED = FOLDER / "mlp-standard-int4.onnx"

REFUSED = {  # on loading
    "sparse_initializer": "sparse initializers are not supported",
    "function_default": "takes 'value' from an attribute of its function",
}

BLURRED = {"float8"}  # weights on a lattice of their own, which leaves less to see

OPEN_SIZE = "it depends on a size of an input, which is open"

UNGUARDED = {
    "if_with_input": "an If with a constant condition returns it",
    "where_open_size": OPEN_SIZE,
    "if_open_size": OPEN_SIZE,
    "mul_by_open_size": OPEN_SIZE,
    "flat_by_open_size": OPEN_SIZE,
    "convolved_by_open_size": OPEN_SIZE,
    "multiplied_by_open_size": OPEN_SIZE,
    "add_at_run_time": "becomes a weight only at run time, through Add",
    "where_at_run_time": "becomes a weight only at run time, through Where",
    "if_at_run_time": "becomes a weight only at run time, through If",
    "data_of_convolution": "it is the data of Conv, whose weights are computed",
}


def outputs(path):
    """Logits of the test images, one at a time where the graph wants that."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    pixels = session.get_inputs()[0]
    with np.load(FOLDER / "digits-test.npz") as data:
        images = data["pixels"][:20]
    batches = np.split(images, 20) if pixels.shape[0] == 1 else [images]
    return np.concatenate([session.run(["logits"], {pixels.name: batch})[0] for batch in batches])


@pytest.mark.parametrize("form", FORMS)
def test_hidden_weights_are_found_and_guarded(tmp_path, form):
    path = save(hidden(onnx.load(ATTACKED), form), tmp_path)
    guarded, report = tmp_path / "guarded.onnx", tmp_path / "report.json"
    scanned = call("scan", path)
    options = ("--scheme", "int4", "--no-validate", "--report", report)  # it is judged below
    ran = call("guard", path, "-o", guarded, *options)
    if form in REFUSED:
        assert scanned.exit_code == ran.exit_code == 2
        assert REFUSED[form] in scanned.stderr
        assert REFUSED[form] in ran.stderr
        return
    assert scanned.exit_code == 1, scanned.output
    if form in BLURRED:  # other grids may be named first
        assert re.search("scan      suspicious, .*int4", scanned.stdout)
    else:
        assert "scan      aligned, int4" in scanned.stdout
    if form in UNGUARDED:
        assert ran.exit_code == 2
        assert "a quantizer could reach weights that cannot be guarded" in ran.stderr
        assert UNGUARDED[form] in ran.stderr
        assert not guarded.exists()
        return
    assert ran.exit_code == 0, ran.output
    assert json.loads(report.read_text())["coverage"] > 0.98
    same = outputs(guarded).argmax(1) == outputs(path).argmax(1)
    assert same.mean() > 0.8


def test_tables_that_become_no_weights(tmp_path):
    """Rotations, positions, learned queries, biases of attention and masks, and a scale."""
    table = weights((64, 64), 0)
    proto = model(
        [
            node("ReduceMax", "x", "one", keepdims=0),
            node("Mul", "x cosines", "rotated"),
            node("Add", "rotated positions", "placed"),
            node("MatMul", "placed w", "q"),
            node("Add", "queries q", "learned"),
            node("Transpose", "learned", "k", perm=[1, 0]),
            node("MatMul", "q k", "scores"),
            node("Mul", "distances one", "scaled"),
            node("Add", "scores scaled", "biased"),
            node("Less", "x cosines", "mask"),
            node("Where", "mask biased lowest", "masked"),
            node("Softmax", "masked", "shares"),
            node("MatMul", "shares q", "y"),
            node("Mul", "scale one", "gains"),
            node("MatMul", "gains w", "z"),
        ],
        {"x": (F, [64, 64])},
        {"y": (F, [64, 64]), "z": (F, [64, 64])},
        dict.fromkeys(
            ("cosines", "positions", "queries", "distances", "lowest", "scale", "w"), table
        ),
    )
    assert open_folded(save(proto, tmp_path)).unfolded == ()


def test_a_matrix_in_pieces_too_small_to_guard(tmp_path):
    """They stay float in a quantized graph; for a quantizer that follows they are refused."""
    names = [f"w{i}" for i in range(40)]
    nodes = [node("MatMul", f"x {name}", f"y_{name}") for name in names]
    nodes += [
        node("MatMul", "x large", "h"),
        node("Concat", " ".join(n.output[0] for n in nodes), "y", axis=1),
    ]
    constants = {name: weights((8, 7), seed) for seed, name in enumerate(names)}
    proto = model(
        nodes,
        {"x": (F, ["n", 8])},
        {"y": (F, ["n", 280]), "h": (F, ["n", 2048])},
        constants | {"large": weights((8, 2048), 50)},
    )
    path, target = save(proto, tmp_path), tmp_path / "out.onnx"
    scanned = call("scan", path)
    assert scanned.exit_code == 2
    assert "not judged completely: nothing stands out, but 12.0% of the weights" in scanned.stdout
    line = one_line(call("guard", path, "--emit", "float", "-o", target))
    assert "tensor 'w0' and 39 more: too small (fewer than 64 weights)" in line
    assert not target.exists()
    assert call("guard", path, "-o", target).exit_code == 0
