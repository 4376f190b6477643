"""Small models, one for every place and form in which a weight can stand."""

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

F = TensorProto.FLOAT


def weights(shape, seed=0, dtype=np.float32):
    return (np.random.default_rng(seed).standard_normal(shape) * 0.05).astype(dtype)


def model(nodes, inputs, outputs, initializers=(), opset=17, functions=(), ir_version=8):
    """inputs, outputs: name -> (type, shape); initializers: name -> array."""
    graph = helper.make_graph(
        nodes,
        "sample",
        [helper.make_tensor_value_info(n, t, s) for n, (t, s) in inputs.items()],
        [helper.make_tensor_value_info(n, t, s) for n, (t, s) in outputs.items()],
        [numpy_helper.from_array(a, n) for n, a in dict(initializers).items()],
    )
    imports = [helper.make_opsetid("", opset)]
    imports += [helper.make_opsetid(domain, 1) for domain in {f.domain for f in functions}]
    return helper.make_model(
        graph, opset_imports=imports, ir_version=ir_version, functions=list(functions)
    )


def node(op, inputs, outputs, **attributes):
    return helper.make_node(op, inputs.split(), outputs.split(), **attributes)


def matmul(shape=(70, 33), dtype=np.float32, **options):
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    return model(
        [node("MatMul", "x w", "y")],
        {"x": (kind, ["n", shape[0]])},
        {"y": (kind, ["n", shape[1]])},
        {"w": weights(shape, dtype=dtype)},
        **options,
    )


def matmul_left():
    return model(
        [node("MatMul", "w x", "y")],
        {"x": (F, [70, 5])},
        {"y": (F, [33, 5])},
        {"w": weights((33, 70))},
    )


def matmul_batched():
    return model(
        [node("MatMul", "x w", "y")],
        {"x": (F, [3, 4, 70])},
        {"y": (F, [3, 4, 33])},
        {"w": weights((3, 70, 33))},
    )


def gemm(trans_b=1, alpha=1.0, bias=True):
    inputs = "x w b" if bias else "x w"
    return model(
        [node("Gemm", inputs, "y", transB=trans_b, alpha=alpha)],
        {"x": (F, ["n", 70])},
        {"y": (F, ["n", 33])},
        {"w": weights((33, 70) if trans_b else (70, 33)), "b": weights((33,), 1)},
    )


def conv(opset=17):
    return model(
        [node("Conv", "x w", "y", group=2)],
        {"x": (F, [1, 16, 9, 9])},
        {"y": (F, [1, 32, 7, 7])},
        {"w": weights((32, 8, 3, 3))},
        opset=opset,
    )


def conv_transpose():
    return model(
        [node("ConvTranspose", "x w", "y")],
        {"x": (F, [1, 16, 9, 9])},
        {"y": (F, [1, 8, 11, 11])},
        {"w": weights((16, 8, 3, 3))},
    )


def gather(dtype=np.float32, width=48):
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    return model(
        [node("Gather", "w ids", "y")],
        {"ids": (TensorProto.INT64, ["n", "m"])},
        {"y": (kind, ["n", "m", width])},
        {"w": weights((40, width), dtype=dtype)},
    )


def recurrent(op="LSTM", directions=1):
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[op]
    direction = "bidirectional" if directions == 2 else "forward"
    return model(
        [node(op, "x w r", "y", hidden_size=16, direction=direction)],
        {"x": (F, [5, 1, 24])},
        {"y": (F, [5, directions, 1, 16])},
        {
            "w": weights((directions, gates * 16, 24)) * 5,
            "r": weights((directions, gates * 16, 16), 1) * 5,
        },
    )


def constant_through_chain():
    """A Constant node's weight behind Identity, Transpose and Cast."""
    value = numpy_helper.from_array(weights((33, 70), dtype=np.float16))
    return model(
        [
            node("Constant", "", "w", value=value),
            node("Identity", "w", "w1"),
            node("Transpose", "w1", "w2"),
            node("Cast", "w2", "w3", to=F),
            node("MatMul", "x w3", "y"),
        ],
        {"x": (F, ["n", 70])},
        {"y": (F, ["n", 33])},
    )


def bfloat16_cast():
    import ml_dtypes

    return model(
        [node("Cast", "w", "w1", to=F), node("MatMul", "x w1", "y")],
        {"x": (F, ["n", 70])},
        {"y": (F, ["n", 33])},
        {"w": weights((70, 33), dtype=ml_dtypes.bfloat16)},
    )


def tied_embedding():
    """One table: token embedding, and output projection through a Transpose."""
    return model(
        [
            node("Gather", "w ids", "h"),
            node("Transpose", "w", "wt"),
            node("MatMul", "h wt", "y"),
        ],
        {"ids": (TensorProto.INT64, ["n", "m"])},
        {"y": (F, ["n", "m", 96])},
        {"w": weights((96, 64))},
    )


def shared():
    """One weight, two MatMul, and a reader that is no weighted operator."""
    return model(
        [
            node("MatMul", "x w", "h"),
            node("MatMul", "h w", "h2"),
            node("ReduceMean", "w", "s", keepdims=0),
            node("Add", "h2 s", "y"),
        ],
        {"x": (F, ["n", 64])},
        {"y": (F, ["n", 64])},
        {"w": weights((64, 64))},
    )


def nested(opset=17):
    """Weights in both branches of an If, and one of the main graph that a branch reads."""

    def branch(name, seed):
        return helper.make_graph(
            [
                node("MatMul", f"x {name}", f"{name}_h"),
                node("MatMul", f"{name}_h outer", f"{name}_y"),
            ],
            name,
            [],
            [helper.make_tensor_value_info(f"{name}_y", F, ["n", 64])],
            [numpy_helper.from_array(weights((64, 64), seed), name)],
        )

    return model(
        [node("If", "flag", "y", then_branch=branch("a", 1), else_branch=branch("b", 2))],
        {"x": (F, ["n", 64]), "flag": (TensorProto.BOOL, [])},
        {"y": (F, ["n", 64])},
        {"outer": weights((64, 64), 3)},
        opset=opset,
    )


def loop():
    """A weight in the body of a Loop."""
    body = helper.make_graph(
        [node("MatMul", "h_in w", "h_out"), node("Identity", "go_in", "go_out")],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("go_in", TensorProto.BOOL, []),
            helper.make_tensor_value_info("h_in", F, None),
        ],
        [
            helper.make_tensor_value_info("go_out", TensorProto.BOOL, []),
            helper.make_tensor_value_info("h_out", F, None),
        ],
        [numpy_helper.from_array(weights((64, 64)) * 2, "w")],
    )
    return model(
        [node("Loop", "times go x", "y", body=body)],
        {"x": (F, ["n", 64])},
        {"y": (F, ["n", 64])},
        {"times": np.array(2, np.int64), "go": np.array(True)},
    )


def function(opset=21):
    """A weight inside a model-local function and one that is its argument."""
    value = numpy_helper.from_array(weights((64, 64), 1))
    body = helper.make_function(
        "local",
        "Twice",
        ["x", "v"],
        ["y"],
        [
            node("Constant", "", "u", value=value),
            node("MatMul", "x u", "h"),
            node("MatMul", "h v", "y"),
        ],
        [helper.make_opsetid("", opset)],
    )
    return model(
        [node("Twice", "x w", "y", domain="local")],
        {"x": (F, ["n", 64])},
        {"y": (F, ["n", 64])},
        {"w": weights((64, 64), 2)},
        opset=opset,
        functions=[body],
        ir_version=10,
    )


def view():
    """Conv weights that are sliced and unsqueezed before they are used."""
    return model(
        [
            node("Slice", "w zero end", "part"),
            node("Unsqueeze", "part axis", "kernel"),
            node("Conv", "x kernel", "y"),
        ],
        {"x": (F, [1, 24, 9])},
        {"y": (F, [1, 16, 9])},
        {
            "w": weights((32, 24)),
            "zero": np.array([0], np.int64),
            "end": np.array([16], np.int64),
            "axis": np.array([2], np.int64),
        },
    )


def initializer_as_input():
    """The layout of old exporters: every initializer is a graph input as well."""
    old = matmul(ir_version=3, opset=11)
    old.graph.input.append(helper.make_tensor_value_info("w", F, [70, 33]))
    return old


SAMPLES = {
    "matmul": matmul,
    "matmul_float16": lambda: matmul(dtype=np.float16, opset=21, ir_version=10),
    "matmul_left": matmul_left,
    "matmul_batched": matmul_batched,
    "gemm_transposed": gemm,
    "gemm": lambda: gemm(trans_b=0, bias=False),
    "gemm_alpha": lambda: gemm(alpha=0.5),
    "conv": conv,
    "conv_old_opset": lambda: conv(opset=9),
    "conv_transpose": conv_transpose,
    "gather": gather,
    "gather_float16": lambda: gather(np.float16),
    "gather_ragged": lambda: gather(width=50),
    "lstm": recurrent,
    "lstm_bidirectional": lambda: recurrent(directions=2),
    "gru": lambda: recurrent("GRU"),
    "rnn": lambda: recurrent("RNN"),
    "constant_through_chain": constant_through_chain,
    "bfloat16_cast": bfloat16_cast,
    "tied_embedding": tied_embedding,
    "shared": shared,
    "nested": nested,
    "loop": loop,
    "function": function,
    "function_old_opset": lambda: function(opset=17),
    "view": view,
    "initializer_as_input": initializer_as_input,
}


def save(proto, folder, name="model.onnx", external=False):
    path = folder / name
    if external:
        options = {"save_as_external_data": True, "location": f"{name}.data", "size_threshold": 0}
        onnx.save(proto, str(path), **options)
    else:
        onnx.save(proto, str(path))
    return path
