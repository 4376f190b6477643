"""--target portable: every weight reaches its readers by standard operators, int8 and int4 by
DequantizeLinear, in the form in which onnxruntime's own quantizer writes it."""

from collections import Counter

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import flipguard_onnx
from flipguard_onnx.graph.traversal import attribute, bodies, output_names
from flipguard_onnx.graph.weights import find_weights
from tests.emit.test_static_qdq import plain_static
from tests.helpers.samples import SAMPLES, F, model, node, save, weights
from tests.helpers.written import decoded, initializers

BEHIND = ("Reshape", "Transpose", "Slice", "Cast", "Mul", "Identity")  # a DequantizeLinear


def written(tmp_path, proto, scheme="int8", **options):
    path = tmp_path / "out.onnx"
    options = {"seed": 1, "preserve": "off", "output": path, "force": True} | options
    return path, flipguard_onnx.guard(save(proto, tmp_path), scheme, **options)


def decoders(proto):
    """The DequantizeLinear nodes of every graph and function, each with its body."""
    return [
        (body, n) for body in bodies(proto) for n in body.node if n.op_type == "DequantizeLinear"
    ]


@pytest.mark.parametrize("scheme", ["int8", "int4", "nf4", "fp4"])
@pytest.mark.parametrize("sample", SAMPLES)
def test_standard_operators_alone(tmp_path, sample, scheme):
    path, report = written(tmp_path, SAMPLES[sample](), scheme, validate=False)
    proto = onnx.load(path)
    domains = {n.domain for body in bodies(proto) for n in body.node}
    assert domains <= {"", "local"}  # the second is the samples' own functions
    for tensor in report.tensors:
        is_book = tensor.scheme in ("nf4", "fp4")
        assert set(tensor.forms) <= ({"folded"} if is_book else {"dequantize", "gather"})


@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize("sample", SAMPLES)
def test_every_reader_has_a_dequantize_linear_of_its_own(tmp_path, sample, scheme):
    path, _ = written(tmp_path, SAMPLES[sample](), scheme, validate=False)
    proto = onnx.load(path)
    found = decoders(proto)
    readers = Counter(name for body in bodies(proto) for n in body.node for name in n.input)
    readers.update(name for body in bodies(proto) for name in output_names(body))
    assert found
    for body, n in found:
        assert readers[n.output[0]] == 1
        held = {t.name for t in getattr(body, "initializer", ())}
        held |= {name for other in body.node for name in other.output}
        assert set(n.input) <= held, "in the graph that owns the codes"
    makers = {name: n for body in bodies(proto) for n in body.node for name in n.output}
    for tensor in proto.graph.initializer:
        if tensor.data_type in (onnx.TensorProto.INT8, onnx.TensorProto.INT4) and tensor.dims:
            reading = [n for body in bodies(proto) for n in body.node if tensor.name in n.input]
            assert {n.op_type for n in reading} <= {"DequantizeLinear", "Gather"}
            for n in (n for n in reading if n.op_type == "Gather"):
                following = [m for m in makers.values() if n.output[0] in m.input]
                assert [m.op_type for m in following] == ["DequantizeLinear"]


@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize(
    ("sample", "opset"),
    [("matmul", 17), ("conv_old_opset", 9), ("gather", 17), ("lstm_bidirectional", 17)],
)
def test_the_opset_is_the_lowest_that_will_do(tmp_path, sample, opset, scheme):
    path, _ = written(tmp_path, SAMPLES[sample](), scheme)
    (entry,) = onnx.load(path).opset_import
    needed = 21 if scheme == "int4" and sample == "matmul" else 10 if sample == "gather" else 13
    assert entry.version == max(opset, needed)


@pytest.mark.parametrize(
    ("sample", "scheme", "attributes"),
    [
        ("matmul", "int8", {"axis": 1}),
        ("gemm_transposed", "int8", {"axis": 0}),
        ("conv", "int8", {"axis": 0}),
        ("conv_transpose", "int8", {"axis": 1}),
        ("lstm", "int8", {"axis": 1}),
        # 70 inputs are no whole blocks: rows of output channels
        ("gemm", "int4", {"axis": 1, "block_size": 32}),
    ],
)
def test_the_axis_of_the_scales(tmp_path, sample, scheme, attributes):
    path, _ = written(tmp_path, SAMPLES[sample](), scheme)
    proto, arrays = onnx.load(path), initializers(path)
    for _, n in decoders(proto):
        codes, scale = arrays[n.input[0]], arrays[n.input[1]]
        assert {a.name: a.i for a in n.attribute} == attributes
        if scheme == "int8":
            assert scale.shape == (codes.shape[attributes["axis"]],)
            assert np.array_equal(arrays[n.input[2]], np.zeros(scale.shape, np.int8))


def test_a_gemm_at_4_bits_loses_trans_b(tmp_path):
    """onnxruntime fuses no DequantizeLinear with one that has it."""
    proto = model(
        [node("Gemm", "x w", "y", transB=1)],
        {"x": (F, ["n", 64])},
        {"y": (F, ["n", 33])},
        {"w": weights((33, 64))},
    )
    path, report = written(tmp_path, proto, "int4")
    decoder, gemm = onnx.load(path).graph.node
    assert (decoder.op_type, gemm.op_type) == ("DequantizeLinear", "Gemm")
    assert decoder.output[0] == gemm.input[1]
    assert attribute(gemm, "transB", 0) == 0
    assert report.validation.feeds == 8


@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("opset", [17, 21])
def test_16_bits_have_scales_in_16_bits_where_the_opset_has_them(tmp_path, scheme, dtype, opset):
    proto = SAMPLES["matmul"](dtype=dtype, opset=opset, ir_version=10)
    path, _ = written(tmp_path, proto, scheme)
    arrays = initializers(path)
    ((_, n),) = decoders(onnx.load(path))
    in_16_bits = dtype == np.float16 and (opset == 21 or scheme == "int4")
    assert arrays[n.input[1]].dtype == (np.float16 if in_16_bits else np.float32)
    casts = [m for m in onnx.load(path).graph.node if m.op_type == "Cast"]
    assert bool(casts) is (dtype == np.float16 and not in_16_bits)


def tied(width, opset=21):
    """A table of embeddings that a MatMul reads through a Transpose."""
    nodes = [
        node("Gather", "w i", "e"),
        node("Transpose", "w", "t", perm=[1, 0]),
        node("MatMul", "e t", "y"),
    ]
    inputs = {"i": (onnx.TensorProto.INT64, [2, 3])}
    outputs = {"y": (onnx.TensorProto.FLOAT, [2, 3, 40])}
    table = {"w": weights((40, width))}
    return model(nodes, inputs, outputs, table, opset=opset, ir_version=10)


@pytest.mark.parametrize("width", [64, 50])
@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_only_the_rows_that_are_looked_up_are_decoded(tmp_path, width, scheme):
    path, report = written(tmp_path, tied(width), scheme)
    assert report.tensors[0].forms == ("dequantize", "gather")
    graph, arrays = onnx.load(path).graph, initializers(path)
    tables = [n.input[0] for n in graph.node if n.op_type == "Gather"]
    (table,) = (name for name in tables if "scale" not in name)
    assert arrays[table].dtype == np.int8
    assert len(arrays[table]) == 40
    assert report.validation.feeds == 8


@pytest.mark.parametrize("scheme", ["int8", "int4", "nf4"])
@pytest.mark.parametrize("sample", ["matmul", "matmul_batched", "conv", "lstm_bidirectional"])
def test_codes_mean_what_the_grid_says(tmp_path, sample, scheme):
    """What a numpy decoder makes of codes and scales is within the largest step of the weights."""
    proto = SAMPLES[sample]()
    path, _ = written(tmp_path, proto, scheme, policy="none")
    arrays = initializers(path)
    for weight in find_weights(proto)[0]:
        values = numpy_helper.to_array(weight.tensor)
        step = np.abs(arrays[f"{weight.name}_scale"]).max()
        limit = {"int8": 0.5, "int4": 1.0, "nf4": 0.16}[scheme if sample[:3] == "mat" else "int8"]
        error = np.abs(decoded(path, weight) - values).max()
        assert 0 < error <= limit * step * 1.001


def three_layers():
    nodes = [
        node("Conv", "x c", "h", pads=[1, 1, 1, 1], name="conv"),
        node("Flatten", "h", "f"),
        node("Gemm", "f g b", "m", transB=1, name="gemm"),
        node("MatMul", "m w", "y", name="matmul"),
    ]
    constants = {
        "c": weights((8, 3, 3, 3)),
        "g": weights((40, 8 * 36), 1),
        "b": weights((40,), 2),
        "w": weights((40, 24), 3),
    }
    floats = onnx.TensorProto.FLOAT
    return model(nodes, {"x": (floats, [1, 3, 6, 6])}, {"y": (floats, [1, 24])}, constants)


@pytest.mark.parametrize("per_channel", [True, False])
def test_the_decoders_are_those_of_onnxruntimes_quantizer(tmp_path, per_channel):
    """Names, codes, scales, zero points and axes of `quantize_static`."""
    granularity = "channel" if per_channel else "tensor"
    path, _ = written(tmp_path, three_layers(), policy="none", granularity=granularity)

    theirs = tmp_path / "theirs.onnx"
    plain_static(
        tmp_path / "model.onnx",
        theirs,
        [{"x": np.random.default_rng(0).random((1, 3, 6, 6), np.float32)}],
        per_channel=per_channel,
        extra_options={"QDQDisableWeightAdjustForInt32Bias": True},
    )
    own, wanted = initializers(path), initializers(theirs)
    nodes, expected = (
        {n.output[0]: n for _, n in decoders(onnx.load(file))} for file in (path, theirs)
    )
    assert len(nodes) == 3
    for name, n in nodes.items():
        like = expected[name]
        assert (n.name, list(n.input)) == (like.name, list(like.input))
        for constant in n.input:
            assert own[constant].dtype == wanted[constant].dtype
            assert np.array_equal(own[constant], wanted[constant])
        if per_channel:
            assert attribute(n, "axis", 1) == attribute(like, "axis", 1)


@pytest.mark.parametrize("mode", ["linear", "nearest"])
def test_what_an_old_resize_computes_survives_the_conversion(tmp_path, mode):
    """onnx's converter leaves it with the coordinates of opset 11."""
    nodes = [
        node("Conv", "x c", "h", pads=[1, 1, 1, 1]),
        node("Resize", "h s", "y", mode=mode),
    ]
    constants = {"c": weights((8, 3, 3, 3)), "s": np.array([1, 1, 1.7, 2], np.float32)}
    floats = onnx.TensorProto.FLOAT
    shapes = {"x": (floats, [1, 3, 6, 6])}, {"y": (floats, [1, 8, 10, 12])}
    path, report = written(tmp_path, model(nodes, *shapes, constants, opset=10))
    assert onnx.load(path).opset_import[0].version == 13
    assert report.validation.guarded_exact[0].relative_l2 < 0.02
