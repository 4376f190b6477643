"""Graphs that put unusual things together, each allowed by the standard.

Weights are -1, 0 and 1 times a power of two for each output channel. These stand on the levels of
int8 and int4 whatever the draw, so that a guarded model computes exactly what its original does.
"""

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tests.helpers.samples import F, model, node

BOOL, DOUBLE, HALF, INT64 = (
    TensorProto.BOOL,
    TensorProto.DOUBLE,
    TensorProto.FLOAT16,
    TensorProto.INT64,
)

info = helper.make_tensor_value_info


def exact(shape, axis=-1, seed=0, dtype=np.float32, unit=0.0625):
    """Weights that rounding does not change, with output channels along the axis."""
    rng = np.random.default_rng(seed)
    signs = rng.choice([-1.0, 0.0, 1.0], shape, p=[0.4, 0.2, 0.4])
    powers = 2.0 ** rng.integers(0, 3, shape[axis])
    places = [1] * len(shape)
    places[axis] = -1
    return (signs * powers.reshape(places) * unit).astype(dtype)


def integers(*values):
    return np.array(values, np.int64)


def constant(name, values):
    return node("Constant", "", name, value=numpy_helper.from_array(np.asarray(values)))


def graph(nodes, outputs, inputs=(), initializers=()):
    """A subgraph; inputs and outputs: name -> type, of unknown shape, or (type, shape)."""

    def declared(values):
        pairs = dict(values).items()
        return [info(n, *(t if isinstance(t, tuple) else (t, None))) for n, t in pairs]

    tensors = [numpy_helper.from_array(v, n) for n, v in dict(initializers).items()]
    return helper.make_graph(nodes, "g", declared(inputs), declared(outputs), tensors)


def loop_body(nodes, result, initializers=()):
    """The body of a Loop with one state, `h`, and `result` as its next value."""
    return graph(
        [node("Identity", "go", "on"), *nodes],
        {"on": (BOOL, []), result: F},
        {"i": (INT64, []), "go": (BOOL, []), "h": F},
        initializers,
    )


def function_in_if_in_loop():
    """A function with a weight of its own, called in a branch inside a Loop's body."""
    function = helper.make_function(
        "local",
        "Twice",
        ["x", "v"],
        ["y"],
        [
            constant("u", exact((24, 24), seed=1)),
            node("MatMul", "x u", "t"),
            node("MatMul", "t v", "y"),
        ],
        [helper.make_opsetid("", 17)],
    )
    call = node("Twice", "h w", "a", domain="local")
    branches = {
        "then_branch": graph([call], {"a": F}),
        "else_branch": graph([node("MatMul", "h w", "b")], {"b": F}),
    }
    body = loop_body([node("If", "c", "next", **branches)], "next")
    return model(
        [node("Loop", "times yes x", "y", body=body)],
        {"x": (F, ["n", 24]), "c": (BOOL, [])},
        {"y": (F, ["n", 24])},
        {"times": np.array(2, np.int64), "yes": np.array(True), "w": exact((24, 24), seed=2)},
        functions=[function],
    )


def table_read_three_ways():
    """Rows, columns and, through a Transpose, rows again of one table."""
    return model(
        [
            node("Gather", "w ids", "h"),
            node("Transpose", "w", "wt"),
            node("MatMul", "h wt", "z"),
            node("Softmax", "z", "p", axis=-1),
            node("MatMul", "p w", "y"),
        ],
        {"ids": (INT64, ["n", "m"])},
        {"y": (F, ["n", "m", 32])},
        {"w": exact((40, 32), axis=0)},
    )


def subnormal_scales():
    """float16 weights of which some channels are so small that their scales are subnormal."""
    small = exact((32, 24), dtype=np.float16)
    small[:, ::3] = np.sign(small[:, ::3]) * np.float16(2**-13)
    small[:, 1::3] = np.sign(small[:, 1::3]) * np.float16(2**-22)
    return model(
        [node("MatMul", "x w", "h"), node("Mul", "h k", "y")],
        {"x": (HALF, ["n", 32])},
        {"y": (HALF, ["n", 24])},
        {"w": small, "k": np.where(np.arange(24) % 3 == 1, 16384, 1).astype(np.float16)},
    )


def shared_with_a_branch():
    """One weight read by the main graph and in a branch of a branch."""
    inner = {
        "then_branch": graph([node("MatMul", "h w", "a")], {"a": F}),
        "else_branch": graph([node("Gemm", "h w", "b", transB=1)], {"b": F}),
    }
    outer = {
        "then_branch": graph([node("If", "d", "e", **inner)], {"e": F}),
        "else_branch": graph([node("Identity", "h", "f")], {"f": F}),
    }
    return model(
        [node("MatMul", "x w", "h"), node("If", "c", "y", **outer)],
        {"x": (F, ["n", 32]), "c": (BOOL, []), "d": (BOOL, [])},
        {"y": (F, ["n", 32])},
        {"w": exact((32, 32))},
    )


def quantized_beside_float():
    """A weight in QDQ form, one in MatMulBnb4's, and a float one."""
    rng = np.random.default_rng(0)
    bnb4 = node("MatMulBnb4", "h b absmax", "z", domain="com.microsoft")
    settings = {"K": 32, "N": 32, "block_size": 16, "quant_type": 1}
    bnb4.attribute.extend(helper.make_attribute(k, v) for k, v in settings.items())
    proto = model(
        [
            node("DequantizeLinear", "codes scales", "q", axis=1),
            node("MatMul", "x q", "h"),
            bnb4,
            node("MatMul", "z w", "y"),
        ],
        {"x": (F, ["n", 32])},
        {"y": (F, ["n", 24])},
        {
            "codes": rng.integers(-127, 128, (32, 32)).astype(np.int8),
            "scales": np.full(32, 0.001, np.float32),
            "b": rng.integers(0, 256, 512).astype(np.uint8),
            "absmax": np.full(64, 0.1, np.float32),
            "w": exact((32, 24)),
        },
    )
    proto.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return proto


def functions_with_defaults():
    """Functions in functions; the inner one's attribute is the outer one's, which has a default."""

    def reference(name, target):
        attribute = onnx.AttributeProto(name=target, type=onnx.AttributeProto.FLOAT)
        attribute.ref_attr_name = name
        return attribute

    gemm = node("Gemm", "x w", "y", transB=1)
    gemm.attribute.append(reference("gain", "alpha"))
    opset = helper.make_opsetid("", 17)
    default = helper.make_attribute("gain", 3.0)
    inner = helper.make_function(
        "local", "Inner", ["x", "w"], ["y"], [gemm], [opset], attribute_protos=[default]
    )
    call = node("Inner", "x w", "h", domain="local")
    call.attribute.append(reference("strength", "gain"))
    own = node("Inner", "h w", "y", domain="local")
    outer = helper.make_function(
        "local",
        "Outer",
        ["x", "w"],
        ["y"],
        [call, own],
        [opset, helper.make_opsetid("local", 1)],
        attribute_protos=[helper.make_attribute("strength", 0.5)],
    )
    return model(
        [
            node("Outer", "x w", "z", domain="local"),
            node("Outer", "z w", "y", domain="local", strength=2.0),
        ],
        {"x": (F, ["n", 32])},
        {"y": (F, ["n", 32])},
        {"w": exact((32, 32), axis=0)},
        functions=[inner, outer],
    )


def only_functions():
    """The main graph is one call; all weights are inside."""
    opset = helper.make_opsetid("", 17)
    layer = helper.make_function(
        "local",
        "Layer",
        ["x"],
        ["y"],
        [constant("w", exact((32, 32))), node("MatMul", "x w", "h"), node("Relu", "h", "y")],
        [opset],
    )
    whole = helper.make_function(
        "local",
        "Whole",
        ["x"],
        ["y"],
        [
            node("Layer", "x", "a", domain="local"),
            node("Layer", "a", "b", domain="local"),
            constant("v", exact((24, 32), axis=0, seed=1)),
            node("Gemm", "b v", "y", transB=1),
        ],
        [opset, helper.make_opsetid("local", 1)],
    )
    return model(
        [node("Whole", "x", "y", domain="local")],
        {"x": (F, ["n", 32])},
        {"y": (F, ["n", 24])},
        functions=[layer, whole],
    )


def scan_twice():
    """A Scan through a stack of matrices, backwards, whose body reads another one from outside."""
    body = graph(
        [
            node("MatMul", "state layer", "h"),
            node("MatMul", "h w", "t"),
            node("Tanh", "t", "next"),
            node("Identity", "next", "seen"),
        ],
        {"next": F, "seen": F},
        {"state": F, "layer": F},
    )
    scan = node("Scan", "x stack", "y all", body=body, num_scan_inputs=1)
    scan.attribute.append(helper.make_attribute("scan_input_directions", [1]))
    return model(
        [scan],
        {"x": (F, [4, 24])},
        {"y": (F, [4, 24]), "all": (F, [3, 4, 24])},
        {"stack": exact((3, 24, 24), axis=0), "w": exact((24, 24), seed=1)},
    )


def experts():
    """Matrices of two stacks, one of them transposed, that an input picks, and a Loop in turn."""
    body = loop_body([node("Gather", "c i", "m"), node("MatMul", "h m", "next")], "next")
    return model(
        [
            node("Gather", "a number", "p"),
            node("Squeeze", "p zero", "q"),
            node("MatMul", "x q", "h1"),
            node("Gather", "b number", "r"),
            node("Reshape", "r shape", "s"),
            node("Gemm", "h1 s", "h2", transB=1),
            node("Loop", "times yes h2", "y", body=body),
        ],
        {"x": (F, ["n", 40]), "number": (INT64, [1])},
        {"y": (F, ["n", 32])},
        {
            "a": exact((3, 40, 24)),
            "b": exact((3, 32, 24), axis=1, seed=1),
            "c": exact((2, 32, 32), seed=2),
            "zero": integers(0),
            "shape": integers(32, 24),
            "times": np.array(2, np.int64),
            "yes": np.array(True),
        },
    )


def lstm_with_everything():
    """Both directions, peepholes, lengths of sequences, and a state to start from."""
    lstm = node("LSTM", "x w r b lens h c p", "y last", hidden_size=16, direction="bidirectional")
    rng = np.random.default_rng(0)
    return model(
        [lstm],
        {
            "x": (F, [5, 2, 24]),
            "lens": (TensorProto.INT32, [2]),
            "h": (F, [2, 2, 16]),
            "c": (F, [2, 2, 16]),
        },
        {"y": (F, [5, 2, 2, 16]), "last": (F, [2, 2, 16])},
        {
            "w": exact((2, 64, 24), axis=1),
            "r": exact((2, 64, 16), axis=1, seed=1),
            "b": rng.standard_normal((2, 128)).astype(np.float32),
            "p": rng.standard_normal((2, 48)).astype(np.float32),
        },
    )


def conv_of_a_reshaped_constant():
    return model(
        [
            constant("flat", exact((12, 36), axis=0).reshape(-1)),
            constant("shape", integers(12, 4, 3, -1)),
            node("Reshape", "flat shape", "w"),
            node("Conv", "x w", "y", pads=[1, 1, 1, 1]),
        ],
        {"x": (F, [1, 4, 8, 8])},
        {"y": (F, [1, 12, 8, 8])},
    )


def grouped_conv_transpose():
    """Its output_shape decides on the padding."""
    return model(
        [node("ConvTranspose", "x w b", "y", group=4, strides=[2, 2], output_shape=[15, 16])],
        {"x": (F, [1, 16, 8, 8])},
        {"y": (F, [1, 24, 15, 16])},
        {"w": exact((16, 6, 3, 3), axis=1), "b": np.linspace(-1, 1, 24, dtype=np.float32)},
    )


def depthwise():
    """Along one axis, dilated, with a missing bias; then one in three axes."""
    return model(
        [
            helper.make_node("Conv", ["x", "w", ""], ["h"], group=16, dilations=[2], pads=[2, 2]),
            node("Reshape", "h shape", "v"),
            node("Conv", "v u", "y", strides=[1, 2, 2], auto_pad="SAME_UPPER"),
        ],
        {"x": (F, [1, 16, 32])},
        {"y": (F, [1, 8, 4, 2, 4])},
        {
            "w": np.where(exact((16, 1, 3), axis=0) < 0, -0.25, 0.25).astype(np.float32),
            "shape": integers(1, 4, 4, 4, 8),
            "u": exact((8, 4, 3, 3, 3), axis=0, seed=1),
        },
    )


def constant_on_the_left():
    """A stack of matrices from the left, one matrix from the left, and a vector between."""
    return model(
        [
            node("MatMul", "stack x", "h"),
            node("MatMul", "h v", "z"),
            node("MatMul", "w z", "y"),
        ],
        {"x": (F, [3, 32, 5])},
        {"y": (F, [16, 24])},
        {
            "stack": exact((3, 24, 32), axis=1),
            "v": np.linspace(-1, 1, 5, dtype=np.float32),
            "w": exact((16, 3), axis=0, seed=1),
        },
    )


def gemms():
    """All transpositions, factors, and forms of the third input."""
    return model(
        [
            node("Gemm", "x w row", "a", alpha=0.5, beta=2.0),
            node("Gemm", "a v column", "b", transA=1, transB=1, alpha=-1.0, beta=0.5),
            node("Gemm", "b u scalar", "c", beta=0.0),
            helper.make_node("Gemm", ["c", "t", ""], ["y"], transB=1),
        ],
        {"x": (F, [8, 32])},
        {"y": (F, [24, 12])},
        {
            "w": exact((32, 24)),
            "row": np.linspace(-1, 1, 24, dtype=np.float32).reshape(1, 24),
            "v": exact((16, 8), axis=0, seed=1),
            "column": np.linspace(-1, 1, 24, dtype=np.float32).reshape(24, 1),
            "u": exact((16, 20), seed=2),
            "scalar": np.array(3, np.float32),
            "t": exact((12, 20), axis=0, seed=3),
        },
    )


def old_opset(opset=7):
    """Attributes that became inputs since; every initializer is an input as well."""
    constants = {
        "w": exact((8, 3, 3, 3), axis=0),
        "b": np.linspace(-1, 1, 8, dtype=np.float32),
        **{name: np.linspace(0.5, 1, 8, dtype=np.float32) for name in ("s", "t", "m", "d")},
        "v": exact((200, 16), seed=1),
        "c": np.float32([0.5]),
    }
    proto = model(
        [
            node("Pad", "x", "p", mode="constant", pads=[0, 0, 1, 1, 0, 0, 1, 1]),
            node("Conv", "p w b", "h"),
            node("BatchNormalization", "h s t m d", "n", epsilon=1e-5),
            node("Upsample", "n", "u", mode="nearest", scales=[1.0, 1.0, 2.0, 2.0])
            if opset == 7
            else node("Upsample", "n scales", "u", mode="nearest"),
            node("AveragePool", "u", "q", kernel_shape=[2, 2], strides=[2, 2]),
            node("Slice", "q", "r", axes=[2, 3], starts=[0, 0], ends=[5, 5]),
            node("Flatten", "r", "f"),
            node("Gemm", "f v c", "g"),
            node("Dropout", "g", "k", ratio=0.5),
            node("Unsqueeze", "k", "y", axes=[0]),
        ],
        {"x": (F, [1, 3, 6, 6])},
        {"y": (F, [1, 1, 16])},
        constants | ({} if opset == 7 else {"scales": np.float32([1, 1, 2, 2])}),
        opset=opset,
        ir_version=3,
    )
    types = [(t.name, t.data_type, t.dims) for t in proto.graph.initializer]
    proto.graph.input.extend(info(name, kind, dims) for name, kind, dims in types)
    return proto


def bfloat16():
    """bfloat16 weights, cast where they are read."""
    return model(
        [
            node("Cast", "w", "u", to=F),
            node("MatMul", "x u", "h"),
            node("Cast", "v", "t", to=F),
            node("Transpose", "t", "s"),
            node("MatMul", "h s", "y"),
        ],
        {"x": (F, ["n", 32])},
        {"y": (F, ["n", 16])},
        {
            "w": exact((32, 24), dtype=ml_dtypes.bfloat16),
            "v": exact((16, 24), axis=0, seed=1, dtype=ml_dtypes.bfloat16),
        },
    )


def double():
    """A model in float64, beside one float32 weight."""
    return model(
        [
            node("MatMul", "x w", "h"),
            node("Cast", "h", "g", to=F),
            node("MatMul", "g v", "y"),
        ],
        {"x": (DOUBLE, ["n", 32])},
        {"y": (F, ["n", 16])},
        {"w": exact((32, 24), dtype=np.float64), "v": exact((24, 16), seed=1)},
    )


def weights_as_outputs():
    """A weight that is an output, one nobody reads, and one that an input may replace."""
    proto = model(
        [node("MatMul", "x w", "h"), node("MatMul", "h v", "y")],
        {"x": (F, ["n", 32]), "v": (F, [24, 16])},
        {"y": (F, ["n", 16]), "w": (F, [32, 24])},
        {"w": exact((32, 24)), "v": exact((24, 16), seed=1), "nobody": exact((32, 32), seed=2)},
    )
    return proto


LONG = "x" * 300

ODD_NAMES = {"model/layer 0/../{w}:0", "Gewichte üß 重み", f"/{LONG}", "a\"b'c\\d%s<b>&"}


def odd_names():
    """Spaces, slashes, quotes, braces, dots, other alphabets, and 300 characters."""
    names = sorted(ODD_NAMES)
    values = ["in put", "h/1:0", "h\t2", "ω", "y {}"]
    nodes = [
        helper.make_node("MatMul", [values[i], name], [values[i + 1]], name=f"node {LONG} {i}")
        for i, name in enumerate(names)
    ]
    return model(
        nodes,
        {values[0]: (F, ["batch size", 32])},
        {values[-1]: (F, ["batch size", 32])},
        {name: exact((32, 32), seed=i) for i, name in enumerate(names)},
    )


def nothing_in_it():
    """A scalar input, a constant of size zero that is concatenated, and a matrix without rows."""
    return model(
        [
            node("Concat", "x none", "c", axis=0),
            node("MatMul", "c w", "h"),
            node("Mul", "h gain", "g"),
            node("MatMul", "g empty", "e"),
            node("Concat", "g e", "y", axis=1),
        ],
        {"x": (F, ["n", 32]), "gain": (F, [])},
        {"y": (F, ["n", 24])},
        {
            "none": np.zeros((0, 32), np.float32),
            "w": exact((32, 24)),
            "empty": np.zeros((24, 0), np.float32),
        },
    )


def missing_inputs():
    """Optional inputs that are not there, and an optional output in the middle."""
    return model(
        [
            helper.make_node("Conv", ["x", "w", ""], ["h"], name=""),
            helper.make_node("Clip", ["h", "", "six"], ["k"]),
            helper.make_node("Resize", ["k", "", "", "sizes"], ["r"], mode="nearest"),
            node("Reshape", "r rows", "s"),
            helper.make_node(
                "LSTM", ["s", "u", "v", "", "", "", ""], ["", "", "c"], hidden_size=16
            ),
            node("Reshape", "c flat", "q"),
            helper.make_node("Gemm", ["q", "t", ""], ["y"]),
        ],
        {"x": (F, [1, 4, 6, 6])},
        {"y": (F, [1, 24])},
        {
            "w": exact((8, 4, 3, 3), axis=0),
            "six": np.array(6, np.float32),
            "sizes": integers(1, 8, 8, 8),
            "rows": integers(8, 1, 64),
            "u": exact((1, 64, 64), axis=1, seed=1),
            "v": exact((1, 64, 16), axis=1, seed=2),
            "flat": integers(1, 16),
            "t": exact((16, 24), seed=3),
        },
    )


def sparse():
    """A sparse initializer beside a dense one."""
    dense = exact((32, 24))
    places = np.flatnonzero(dense)
    proto = model(
        [node("MatMul", "x w", "h"), node("MatMul", "h v", "y")],
        {"x": (F, ["n", 32])},
        {"y": (F, ["n", 16])},
        {"v": exact((24, 16), seed=1)},
    )
    values = numpy_helper.from_array(dense.reshape(-1)[places], "w")
    indices = numpy_helper.from_array(places.astype(np.int64), "")
    proto.graph.sparse_initializer.append(
        helper.make_sparse_tensor(values, indices, list(dense.shape))
    )
    return proto


def two_layouts_in_branches():
    """Each branch reads one weight the other way, and one of them through views."""
    branches = {
        "then_branch": graph([node("MatMul", "x w", "a")], {"a": F}),
        "else_branch": graph(
            [
                node("Transpose", "w", "t", perm=[1, 0]),
                node("Unsqueeze", "t last", "k"),
                node("Unsqueeze", "x last", "x3"),
                node("Conv", "x3 k", "z"),
                node("Squeeze", "z last", "b"),
            ],
            {"b": F},
            initializers={"last": integers(2)},
        ),
    }
    return model(
        [node("If", "c", "y", **branches)],
        {"x": (F, ["n", 32]), "c": (BOOL, [])},
        {"y": (F, ["n", 32])},
        {"w": exact((32, 32))},
    )


def sequence_map():
    """A body that is run on each part of a sequence, and reads a weight from outside."""
    body = graph(
        [node("MatMul", "part w", "t"), node("Relu", "t", "out")],
        {"out": (F, ["k", 24])},
        {"part": (F, ["k", 32])},
    )
    return model(
        [
            node("SplitToSequence", "x two", "parts", axis=0),
            node("SequenceMap", "parts", "mapped", body=body),
            node("ConcatFromSequence", "mapped", "h", axis=0),
            node("MatMul", "h v", "y"),
        ],
        {"x": (F, [6, 32])},
        {"y": (F, [6, 16])},
        {"two": np.array(2, np.int64), "w": exact((32, 24)), "v": exact((24, 16), seed=1)},
    )


def words():
    """Strings beside numbers."""
    lookup = helper.make_node(
        "LabelEncoder",
        ["word"],
        ["id"],
        domain="ai.onnx.ml",
        keys_strings=["a", "b"],
        values_int64s=[1, 2],
        default_int64=0,
    )
    proto = model(
        [lookup, node("Gather", "e id", "h"), node("Add", "h x", "z"), node("MatMul", "z w", "y")],
        {"word": (TensorProto.STRING, ["n"]), "x": (F, ["n", 32])},
        {"y": (F, ["n", 24])},
        {"e": exact((8, 32), axis=0), "w": exact((32, 24), seed=1)},
    )
    proto.opset_import.append(helper.make_opsetid("ai.onnx.ml", 2))
    return proto


def loop_that_never_runs():
    """Its body would multiply what does not fit; another runs as often as an input says."""
    return model(
        [
            node("Loop", "never yes x", "a", body=loop_body([node("MatMul", "h w", "n1")], "n1")),
            node("Loop", "times yes a", "b", body=loop_body([node("MatMul", "h v", "n2")], "n2")),
            node("MatMul", "b u", "y"),
        ],
        {"x": (F, [2, 32]), "times": (INT64, [])},
        {"y": (F, [2, 24])},
        {
            "never": np.array(0, np.int64),
            "yes": np.array(True),
            "w": exact((16, 16)),
            "v": exact((32, 32), seed=1),
            "u": exact((32, 24), seed=2),
        },
    )


def bare():
    return model(
        [node("MatMul", "x w", "h"), node("MatMul", "h v", "y")],
        {"x": (F, ["n", 33])},
        {"y": (F, ["n", 15])},
        {"w": exact((33, 21)), "v": exact((21, 15), seed=1)},
    )


def external(folder):
    """Data at odd offsets and of odd lengths, one byte after the other, in a folder below."""
    proto = bare()
    (folder / "data").mkdir(exist_ok=True)
    blob = b"\x7f" * 3
    for tensor in proto.graph.initializer:
        raw = tensor.raw_data
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        entries = {"location": "data/w.bin", "offset": len(blob), "length": len(raw)}
        for key, value in entries.items():
            tensor.external_data.add(key=key, value=str(value))
        blob += raw + b"\x7f" * 5
    (folder / "data" / "w.bin").write_bytes(blob)
    onnx.save(proto, folder / "model.onnx")
    return folder / "model.onnx"


def unsorted():
    """A node that stands before those it reads."""
    proto = bare()
    nodes = [*proto.graph.node][::-1]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    return proto
