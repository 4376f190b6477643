"""Language models as torch's two exporters write them: all their weights, in every scheme.

tools/export_architectures.py makes the files; this needs neither torch nor transformers.
"""

from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, numpy_helper

import flipguard_onnx
from flipguard_onnx.graph.weights import find_weights

FOLDER = Path(__file__).parents[1] / "models" / "architectures"
FILES = sorted(path.name for path in FOLDER.glob("*.onnx"))
# Two layers, each with the projections of attention (fused into two in starcoderbase) and of the
# MLP (three where it is gated), and the output layer.
LINEAR = {
    "deepseek-coder": 15,
    "gemma": 15,
    "llama-3": 15,
    "phi-2": 13,
    "qwen2.5-coder": 15,
    "starcoder2": 13,
    "starcoderbase": 9,
}
EMBEDDINGS = {"starcoderbase": 2}  # its positions are learned; elsewhere 1
TIED = ("gemma", "qwen2.5-coder", "starcoder2", "starcoderbase")
SCHEMES = ("int8", "int4", "nf4")  # fp4 is nf4 with other levels
VOCABULARY = 256
# Mean error of the logits that rounding may leave, relative to their spread.
NOISE = {"int8": 0.05, "int4": 0.5, "nf4": 0.5}


def stem(file):
    return file.rsplit(".", 2)[0]


def constants(model):
    """Every float constant of two dimensions or more, by name."""
    assert not any(attr.HasField("g") for node in model.graph.node for attr in node.attribute)
    found = [(tensor.name, tensor) for tensor in model.graph.initializer]
    for node in model.graph.node:
        if node.op_type == "Constant":
            found += [(node.output[0], attr.t) for attr in node.attribute if attr.name == "value"]
    return {n: t for n, t in found if t.data_type == TensorProto.FLOAT and len(t.dims) > 1}


@cache
def original(file):
    """Its matrices and its logits."""
    return constants(onnx.load(FOLDER / file)), logits(FOLDER / file)


def logits(path):
    """For a batch of another size and length than the exporters saw, one row padded."""
    tokens = np.random.default_rng(1).integers(2, VOCABULARY, (3, 14))
    mask = np.ones_like(tokens)
    mask[0, :6] = 0
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    result = session.run(None, {"input_ids": tokens, "attention_mask": mask})[0]
    return result[mask.astype(bool)]


def test_every_architecture_is_there_from_both_exporters():
    assert set(FILES) == {f"{name}.{e}.onnx" for name in LINEAR for e in ("dynamo", "trace")}
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 3_000_000


# One scheme is enough for the second exporter and for the inputs' statistics; the others are tried
# on three of the models.
EVERY_SCHEME = ("llama-3.dynamo.onnx", "gemma.dynamo.onnx", "starcoder2.dynamo.onnx")
CASES = [(f, s) for f in FILES for s in SCHEMES if s == "int4" or f in EVERY_SCHEME]


@pytest.mark.parametrize(("file", "scheme"), CASES)
def test_all_matrices_are_guarded(tmp_path, file, scheme):
    output = tmp_path / "out.onnx"
    preserve = "auto" if scheme == "int4" else "off"
    report = flipguard_onnx.guard(FOLDER / file, scheme, output=output, seed=1, preserve=preserve)
    assert [drift.output for drift in report.validation.guarded_exact] == ["logits"]
    matrices, wanted = original(file)
    assert {t.name: t.shape for t in report.tensors} == {
        name: tuple(tensor.dims) for name, tensor in matrices.items()
    }
    assert {t.scheme for t in report.tensors if t.op == "MatMul"} == {scheme}
    assert {t.scheme for t in report.tensors if t.op == "Gather"} <= {"int8"}
    assert {s.text for s in report.skipped} == {"1-D", "scalar"}
    assert report.coverage > 0.97
    assert 0.2 < report.flips / report.weights < 0.4
    assert not matrices.keys() & constants(onnx.load(output)).keys()
    error = np.abs(logits(output) - wanted).mean() / wanted.std()
    assert 0 < error < NOISE[scheme]


@pytest.mark.parametrize("file", FILES)
def test_every_linear_layer_and_embedding_reads_a_weight(file):
    weights, _ = find_weights(onnx.load(FOLDER / file))
    readers = Counter(use.op for weight in weights for use in weight.uses)
    assert readers == {"MatMul": LINEAR[stem(file)], "Gather": EMBEDDINGS.get(stem(file), 1)}


@pytest.mark.parametrize("exporter", ["dynamo", "trace"])
@pytest.mark.parametrize("name", TIED)
def test_tied_embeddings_are_guarded_for_both_readers(name, exporter):
    model = onnx.load(FOLDER / f"{name}.{exporter}.onnx")
    tables = [w for w in find_weights(model)[0] if VOCABULARY in w.shape]
    readers = [sorted({use.op for use in table.uses}) for table in tables]
    if exporter == "dynamo":
        assert readers == [["Gather", "MatMul"]]
    else:  # it stores a transposed copy for the output layer
        assert sorted(readers) == [["Gather"], ["MatMul"]]
        table, copy = (numpy_helper.to_array(t.tensor) for t in tables)
        assert np.array_equal(table, copy.T)
