"""Models that are too large to run: layers of them are."""

from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import flipguard_onnx
from flipguard_onnx import ValidationError
from flipguard_onnx.emit.weight_forms import Target
from flipguard_onnx.emit.writers import QdqWriter
from flipguard_onnx.graph.operands import SAMPLE_ROWS
from flipguard_onnx.graph.weights import find_weights
from flipguard_onnx.io.model import open_model
from flipguard_onnx.pipeline.options import GuardOptions
from flipguard_onnx.pipeline.plan import plan_weights
from flipguard_onnx.validation import layers as sampled
from flipguard_onnx.validation.validator import Validator
from tests.helpers.decoders import decoder
from tests.helpers.samples import SAMPLES, gather, model, node, save, weights

SCHEMES = ("int8", "int4", "nf4", "fp4")


def language_model(dtype=np.float32, layers=4, width=64):
    """An embedding, matrices one after the other, Gemm with a bias, a Conv at the end."""
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    nodes = [node("Gather", "table ids", "h0")]
    constants = {"table": weights((300, width), dtype=dtype)}
    for i in range(layers):
        nodes.append(node("MatMul", f"h{i} w{i}", f"h{i + 1}"))
        constants[f"w{i}"] = weights((width, width), i, dtype) * 3
    nodes += [
        node("Gemm", f"h{layers} g b", "row"),
        node("Unsqueeze", "row axes", "rows"),
        node("Conv", "rows k", "y", dilations=[2, 2]),
    ]
    constants |= {
        "g": weights((width, 32), 7, dtype),
        "b": weights((32,), 8, dtype),
        "k": weights((8, 1, 3, 3), 9, dtype),
        "axes": np.array([0, 1], np.int64),
    }
    return model(nodes, {"ids": (TensorProto.INT64, [24])}, {"y": (kind, None)}, constants, 21)


@pytest.fixture
def too_large(monkeypatch):
    """Whatever is guarded is taken for larger than memory."""
    whole = Validator.of

    def cut(*arguments, max_bytes, **options):
        return whole(*arguments, max_bytes=0, **options)

    monkeypatch.setattr(Validator, "of", cut)


def pick(proto, tmp_path, scheme="int8"):
    source = open_model(save(proto, tmp_path))
    found = find_weights(source.proto)[0]
    kinds = [plan.scheme for plan in plan_weights(found, GuardOptions(scheme=scheme))]
    return source, sampled.sample(source, found, kinds, Target("portable"))


@pytest.mark.parametrize("emit", ["qdq", "float", "both"])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_layers_of_every_kind_are_validated(tmp_path, too_large, scheme, emit, dtype):
    source = save(language_model(dtype), tmp_path)
    report = flipguard_onnx.guard(source, scheme, emit=emit, seed=1, output=tmp_path / "o.onnx")
    validation = report.validation
    outputs = {drift.output for drift in validation.guarded_exact}
    assert {"h0", "row", "y"} < outputs
    assert len(outputs & {"h1", "h2", "h3", "h4"}) == sampled.LAYERS_PER_KIND
    assert validation.layers == len(outputs)
    assert all(0 < drift.relative_l2 < 0.4 for drift in validation.guarded_exact)
    assert bool(validation.moved) == (emit != "qdq")
    assert f"sampled   {len(outputs)} layers: the model is too large" in report.render()


ALONE = """matmul matmul_left matmul_batched gemm_transposed gemm_alpha conv conv_transpose
    constant_through_chain initializer_as_input conv_old_opset bfloat16_cast"""
TOGETHER = "shared tied_embedding lstm nested"


@pytest.mark.parametrize("scheme", ["int4", "uint4", "nf4"])
def test_layers_have_the_forms_of_the_model_and_need_no_later_opset(tmp_path, too_large, scheme):
    """A decoder's matrices stay packed, whatever their size; one alone is no decoder."""
    proto = decoder()
    proto.opset_import[0].version = 17
    output = tmp_path / "o.onnx"
    report = flipguard_onnx.guard(
        save(proto, tmp_path), scheme, target="onnxruntime", output=output, preserve="off"
    )
    assert report.validation.layers
    assert onnx.load(output).opset_import[0].version == 17


@pytest.mark.parametrize("sample", ALONE.split())
def test_a_layer_computes_what_it_computes_in_the_model(tmp_path, too_large, sample):
    report = flipguard_onnx.guard(save(SAMPLES[sample](), tmp_path), seed=1)
    assert report.validation.layers == 1


def test_the_small_model_is_the_layer(tmp_path):
    source, layers = pick(gather(), tmp_path)
    cut = sampled.cut_out(source, layers, tmp_path / "cut")
    onnx.checker.check_model(str(cut.path))
    proto = onnx.load(cut.path)
    assert [n.op_type for n in proto.graph.node] == ["Gather"]
    (given,) = proto.graph.input
    assert [dim.dim_value for dim in given.type.tensor_type.shape.dim] == [SAMPLE_ROWS]
    assert np.array_equal(cut.array(cut.proto.graph.initializer[0]), weights((40, 48)))


def test_no_more_weights_than_allowed_but_one_layer_of_every_kind(tmp_path, monkeypatch):
    monkeypatch.setattr(sampled, "MAX_WEIGHTS", 1)
    _, layers = pick(language_model(), tmp_path)
    assert [layer.output for layer in layers] == ["h0", "h1", "row", "y"]


@pytest.mark.parametrize("sample", TOGETHER.split())
def test_what_cannot_be_run_alone_is_refused(tmp_path, too_large, sample):
    source = save(SAMPLES[sample](), tmp_path)
    with pytest.raises(ValidationError, match="no layer of it can be run alone"):
        flipguard_onnx.guard(source, seed=1)
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


def test_a_corrupted_layer_is_caught_and_nothing_is_left(tmp_path, too_large, monkeypatch):
    class Faulty(QdqWriter):
        def add_weight(self, name, scheme, flips):
            codes = flips.codes.copy()
            codes[:2] = codes[1::-1] + 1
            super().add_weight(name, scheme, replace(flips, codes=codes))

    monkeypatch.setattr("flipguard_onnx.pipeline.draw.QdqWriter", Faulty)
    source = save(language_model(), tmp_path)
    with pytest.raises(ValidationError, match="from what the codes stand for"):
        flipguard_onnx.guard(source, seed=1)
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


def test_verify_runs_the_same_layers(tmp_path, too_large):
    source = save(language_model(), tmp_path)
    flipguard_onnx.guard(source, "int4", seed=1, output=tmp_path / "o.onnx")
    result = flipguard_onnx.verify(source, tmp_path / "o.onnx")
    assert result.validation.layers == 6
    ids, out = {"ids": (TensorProto.INT64, [24])}, {"y": (TensorProto.FLOAT, None)}
    proto = model([node("Gather", "table ids", "y")], ids, out, {"table": weights((300, 64))})
    save(proto, tmp_path, "other.onnx")
    with pytest.raises(ValidationError, match="is not there"):
        flipguard_onnx.verify(source, tmp_path / "other.onnx")


def test_a_model_above_the_limit_is_not_run_whole(tmp_path):
    """1 MiB is the least that can be allowed; the model has 2."""
    source = save(language_model(width=360), tmp_path)
    assert source.stat().st_size > 1 << 20
    report = flipguard_onnx.guard(source, max_memory=1)
    assert report.validation.layers == 6
    assert report.preserve == "synthetic"
    assert report.preserve_note is None
    assert flipguard_onnx.guard(source, max_memory=64, force=True).validation.layers == 0
