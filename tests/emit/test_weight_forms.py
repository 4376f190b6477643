"""Packed in memory, too: what decoders multiply, and large matrices at 4 bits; all else is unpacked
when the file is loaded."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

import flipguard_onnx
from tests.helpers.samples import F, matmul, model, node, save, tied_embedding, weights

PACKED_FORMS = {"int4": "nbits", "nf4": "bnb4"}


@pytest.mark.parametrize(("scheme", "kernel"), [("int4", "MatMulNBits"), ("nf4", "MatMulBnb4")])
@pytest.mark.parametrize("rows", [1023, 1024, 1030])  # the last is no whole number of blocks
def test_large_matrices_stay_packed(tmp_path, scheme, kernel, rows):
    path = tmp_path / "out.onnx"
    report = flipguard_onnx.guard(
        save(matmul((rows, 1024)), tmp_path),
        scheme,
        target="onnxruntime",
        seed=1,
        preserve="off",
        output=path,
    )
    packed = rows >= 1024
    assert (kernel in {n.op_type for n in onnx.load(path).graph.node}) is packed
    assert ("speed" in report.render()) is packed
    assert report.tensors[0].forms == (PACKED_FORMS[scheme] if packed else "folded",)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    (run,) = onnx.load(tmp_path / "optimized.onnx").graph.node
    assert (run.op_type == "MatMul") is not packed


def test_what_is_not_packed_is_not_called_slow(tmp_path):
    source = save(matmul((1024, 1024)), tmp_path)
    options = {"seed": 1, "preserve": "off", "output": tmp_path / "out.onnx", "force": True}
    portable = flipguard_onnx.guard(source, "nf4", **options)
    assert portable.tensors[0].forms == ("folded",)
    moved = flipguard_onnx.guard(source, "nf4", emit="float", **options)
    assert moved.tensors[0].forms == ()
    assert "speed" not in portable.render() + moved.render()


def test_what_onnxruntime_decodes_again_at_every_inference_is_said(tmp_path):
    source = save(matmul((256, 64)), tmp_path)
    options = {"seed": 1, "preserve": "off", "output": tmp_path / "out.onnx", "force": True}
    assert "session.disable_quant_qdq" in flipguard_onnx.guard(source, **options).render()
    folded = flipguard_onnx.guard(source, target="onnxruntime", **options)
    assert "speed" not in folded.render()


IDS = (TensorProto.INT64, ["n", "m"])
PAST = {"past": np.zeros(1, np.float32)}


def decoder(width=64, dtype=np.float32, of_the_head=False):
    """An embedding, a layer of each kind, and logits from the same table.

    of_the_head: the table is stored as the MatMul reads it, not as the Gather does
    """
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    layers = {"a": (width, 40), "b": (width, 40), "c": (width,)}
    gathered, multiplied = ("wt", "w") if of_the_head else ("w", "wt")
    return model(
        [
            node("Transpose", "w", "wt"),
            node("Gather", f"{gathered} ids", "h"),
            node("MatMul", "h a", "h1"),
            node("Reshape", "h1 flat", "h2"),
            node("Gemm", "h2 b c", "h3", transB=1),
            node("Shape", "h", "shape"),
            node("Reshape", "h3 shape", "h4"),
            node("MatMul", f"h4 {multiplied}", "y"),
        ],
        {"ids": IDS, "past": (F, [1])},
        {"y": (kind, ["n", "m", 96]), "h": (kind, ["n", "m", width])},
        {
            "w": weights((width, 96) if of_the_head else (96, width), dtype=dtype),
            **{name: weights(shape, 1, dtype) for name, shape in layers.items()},
            "flat": np.array([-1, 40]),
        },
    )


def run(path, **feed):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options, ["CPUExecutionProvider"]).run(None, feed)


def both_targets(tmp_path, proto, scheme, **options):
    """The file for onnxruntime, and the portable one with the same codes."""
    source = save(proto, tmp_path)
    paths = [tmp_path / f"{target}.onnx" for target in ("onnxruntime", "portable")]
    options = {"seed": 1, "preserve": "off", "validate": False} | options
    for path in paths:
        flipguard_onnx.guard(source, scheme, target=path.stem, output=path, **options)
    return paths


def assert_close(found, wanted):
    """Equal but for activations rounded to 8 bits."""
    found, wanted = found.astype(np.float32), wanted.astype(np.float32)
    assert np.linalg.norm(found - wanted) < 0.02 * np.linalg.norm(wanted)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("width", [64, 128, 70])  # the last is no whole number of blocks
@pytest.mark.parametrize("of_the_head", [False, True])
@pytest.mark.parametrize("scheme", ["int4", "int8"])
def test_a_decoder_stays_packed_with_its_table_stored_once(
    tmp_path, scheme, of_the_head, width, dtype
):
    path, portable = both_targets(tmp_path, decoder(width, dtype, of_the_head), scheme)
    graph = onnx.load(path).graph
    types = [n.op_type for n in graph.node]
    assert types.count("MatMulNBits") == 3
    assert types.count("GatherBlockQuantized") == 1
    assert not {"MatMul", "Gemm", "DequantizeLinear"} & {*types}
    packed = [t for t in graph.initializer if t.data_type == TensorProto.UINT8]
    assert len(packed) == 3
    ids = np.array([[3, 95, 0], [7, 7, 50]])
    logits, rows = run(path, ids=ids, **PAST)
    their_logits, their_rows = run(portable, ids=ids, **PAST)
    np.testing.assert_allclose(rows, their_rows, rtol=1e-3 if dtype == np.float16 else 1e-6)
    assert_close(logits, their_logits)


@pytest.mark.parametrize("scheme", ["int4", "int8"])
def test_portable_embeddings_are_decoded_row_by_row_whatever_their_layout(tmp_path, scheme):
    _, portable = both_targets(tmp_path, decoder(70, of_the_head=True), scheme)
    graph = onnx.load(portable).graph
    sizes = {t.name: np.prod(t.dims) for t in graph.initializer}
    (gather,) = (n for n in graph.node if n.op_type == "Gather" and "quantized" in n.input[0])
    assert sizes[gather.input[0]] >= 96 * 70


@pytest.mark.parametrize("target", ["onnxruntime", "portable"])
def test_a_gather_of_columns_is_decoded_column_by_column(tmp_path, target):
    proto = model(
        [node("Gather", "w ids", "y", axis=1)],
        {"ids": (TensorProto.INT64, ["n"])},
        {"y": (F, [40, "n"])},
        {"w": weights((40, 48))},
    )
    path = tmp_path / "out.onnx"
    report = flipguard_onnx.guard(save(proto, tmp_path), target=target, output=path)
    assert report.tensors[0].forms == ("gather",)


def test_a_decoder_stays_packed_at_nf4(tmp_path):
    path, portable = both_targets(tmp_path, decoder(), "nf4")
    types = [n.op_type for n in onnx.load(path).graph.node]
    assert types.count("MatMulBnb4") == 2
    ids = np.array([[3, 95, 0]])
    assert_close(run(path, ids=ids, **PAST)[0], run(portable, ids=ids, **PAST)[0])


@pytest.mark.parametrize(
    "options",
    [
        {"granularity": "block"},
        {"scheme": "uint8"},
        {"scheme": "uint8", "granularity": "tensor"},
        {"scheme": "uint8", "granularity": "block", "block_size": 16},
        {"scheme": "int4", "granularity": "channel"},
        {"scheme": "uint4"},
        {"scheme": "uint4", "block_size": 16},
        {"scheme": "uint4", "granularity": "channel"},
        {"scheme": "int2", "policy": "none"},
        {"scheme": "int2", "granularity": "channel", "policy": "none"},
        {"scheme": "uint2", "block_size": 16, "policy": "none"},
    ],
    ids=lambda options: " ".join(map(str, options.values())),
)
def test_a_decoder_stays_packed_in_every_integer_format(tmp_path, options):
    path, portable = both_targets(tmp_path, decoder(), options.pop("scheme", "int8"), **options)
    types = [n.op_type for n in onnx.load(path).graph.node]
    assert types.count("MatMulNBits") == 3
    ids = np.array([[3, 95, 0]])
    assert_close(run(path, ids=ids, **PAST)[0], run(portable, ids=ids, **PAST)[0])


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_int8_matrices_of_a_decoder(tmp_path, granularity):
    path = tmp_path / "out.onnx"
    report = flipguard_onnx.guard(
        save(tied_embedding(), tmp_path),
        granularity=granularity,
        target="onnxruntime",
        output=path,
    )
    assert report.tensors[0].forms == ("gather packed", "nbits")
    assert onnx.load(path).opset_import[0].version == 17


def test_a_model_with_caches_is_a_decoder(tmp_path):
    proto = matmul((64, 32))
    path = tmp_path / "out.onnx"
    options = {"target": "onnxruntime", "seed": 1, "output": path, "force": True}
    assert flipguard_onnx.guard(save(proto, tmp_path), **options).tensors[0].forms == ("folded",)
    cache = helper.make_tensor_value_info("past_key_values.0.key", F, [1, 2, "past", 4])
    proto.graph.input.append(cache)
    present = helper.make_tensor_value_info("present.0.key", F, [1, 2, "past", 4])
    proto.graph.output.append(present)
    proto.graph.node.append(node("Identity", cache.name, present.name))
    report = flipguard_onnx.guard(save(proto, tmp_path), validate=False, preserve="off", **options)
    assert report.tensors[0].forms == ("nbits",)


@pytest.mark.parametrize(
    "attributes", [{"alpha": 0.5}, {"beta": 2.0}, {"transA": 1}], ids=lambda a: next(iter(a))
)
def test_a_gemm_that_is_more_than_a_product_and_a_bias_is_not_packed(tmp_path, attributes):
    proto = decoder()
    next(n for n in proto.graph.node if n.op_type == "Gemm").attribute.extend(
        helper.make_attribute(name, value) for name, value in attributes.items()
    )
    proto.graph.input.append(helper.make_tensor_value_info("d", F, [40]))
    path, _ = both_targets(tmp_path, proto, "int4")
    assert "Gemm" in {n.op_type for n in onnx.load(path).graph.node}


@pytest.mark.parametrize("scheme", ["int4", "int8"])
def test_the_branches_of_a_merged_decoder_share_packed_matrices(tmp_path, scheme):
    """As in decoder_model_merged.onnx: both branches read the matrices of the graph around them."""

    def branch(name, op):
        product = [node("MatMul", "h w1", f"{name}1"), node(op, f"{name}1", name)]
        result = helper.make_tensor_value_info(name, F, ["n", "m", 96])
        return helper.make_graph(product, name, [], [result])

    other = branch("t", "Abs")
    proto = model(
        [
            node("Gather", "w ids", "h"),
            node("Transpose", "w", "w1"),
            node("If", "use_cache", "y", then_branch=branch("s", "Neg"), else_branch=other),
        ],
        {"ids": IDS, "use_cache": (TensorProto.BOOL, [])},
        {"y": (F, ["n", "m", 96])},
        {"w": weights((96, 64))},
    )
    path, portable = both_targets(tmp_path, proto, scheme)
    for use_cache in (False, True):
        feed = {"ids": np.array([[3, 95]]), "use_cache": np.array(use_cache)}
        assert_close(run(path, **feed)[0], run(portable, **feed)[0])
