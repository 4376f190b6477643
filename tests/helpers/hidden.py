"""Ways to hide the weights of a model from whoever looks at initializers only.

Each rewrites a model so that it computes the same, and that constant folding, or an optimizer like
onnxruntime's, brings the weights back.
"""

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

F = TensorProto.FLOAT


class Rewrite:
    """A model whose matrices are made anew: `form(rewrite, name, values)` says how.

    `add` adds a constant, `node` a node in front of the others; both return its name.
    """

    def __init__(self, proto, form):
        self.proto = onnx.ModelProto()
        self.proto.CopyFrom(proto)
        self.front = []
        graph = self.proto.graph
        for tensor in [t for t in graph.initializer if len(t.dims) == 2]:
            graph.initializer.remove(tensor)
            form(self, tensor.name, numpy_helper.to_array(tensor))
        nodes = [*self.front, *graph.node]
        del graph.node[:]
        graph.node.extend(nodes)

    def add(self, name, values):
        values = np.asarray(values)
        self.proto.graph.initializer.append(numpy_helper.from_array(values, name))
        return name

    def node(self, op, inputs, outputs, **attributes):
        outputs = [outputs] if isinstance(outputs, str) else outputs
        self.front.append(helper.make_node(op, inputs, outputs, **attributes))
        return outputs[0]


def integers(*values):
    return np.array(values, np.int64)


def branch(name, nodes, initializers=(), shape=None):
    """A graph without inputs that returns `name`."""
    output = helper.make_tensor_value_info(name, F, shape)
    return helper.make_graph(nodes, "branch", [], [output], initializers)


def flat(r, name, w):
    r.node("Reshape", [r.add(f"{name}.raw", w.reshape(-1)), r.add(f"{name}.s", w.shape)], name)


def flat_by_shape(r, name, w):
    """The shape is computed, too."""
    like = r.add(f"{name}.like", np.zeros(w.shape, np.int8))
    r.node("Shape", [like], f"{name}.s")
    r.node("Reshape", [r.add(f"{name}.raw", w.reshape(-1)), f"{name}.s"], name)


def flat_by_input(r, name, w):
    """The shape is that of an input, which the graph declares."""
    r.proto.graph.input[0].type.tensor_type.shape.dim[0].Clear()
    r.proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    r.node("Shape", [r.proto.graph.input[0].name], f"{name}.x", end=1)
    r.node("Mul", [f"{name}.x", r.add(f"{name}.t", integers(*w.shape))], f"{name}.s")
    r.node("Reshape", [r.add(f"{name}.raw", w.reshape(-1)), f"{name}.s"], name)


def mul_by_shape(r, name, w):
    """The factor is made from the shape of an activation, which follows from that of the input."""
    x = r.proto.graph.input[0]
    x.type.tensor_type.shape.dim[0].Clear()
    x.type.tensor_type.shape.dim[0].dim_value = 1
    r.node("Relu", [x.name], f"{name}.x")
    r.node("Shape", [f"{name}.x"], f"{name}.s", end=1)
    one = numpy_helper.from_array(np.ones(1, np.float32))
    r.node("ConstantOfShape", [f"{name}.s"], f"{name}.one", value=one)
    r.node("Mul", [r.add(f"{name}.raw", w), f"{name}.one"], name)


def cast_like(r, name, w):
    """Cast to the type of an input, whose values play no part."""
    r.node("CastLike", [r.add(f"{name}.raw", w), r.proto.graph.input[0].name], name)


def size(r, name, axis):
    """The size of an input on an axis, as a scalar; the batch's (axis 0) is open."""
    r.node("Shape", [r.proto.graph.input[0].name], f"{name}.s")
    return r.node("Gather", [f"{name}.s", r.add(f"{name}.i", np.int64(axis))], f"{name}.n")


def where_known_size(r, name, w):
    """As large as the input is on an axis that is not open, although another one is."""
    width = r.proto.graph.input[0].type.tensor_type.shape.dim[1].dim_value
    r.node("Equal", [size(r, name, 1), r.add(f"{name}.k", np.int64(width))], f"{name}.e")
    r.node("Where", [f"{name}.e", r.add(f"{name}.raw", w), r.add(f"{name}.other", w / 2)], name)


def if_known_size(r, name, w):
    """A Slice picks the size."""
    x = r.proto.graph.input[0]
    r.node("Shape", [x.name], f"{name}.s")
    places = [r.add(f"{name}.{k}", integers(v)) for k, v in (("b", -1), ("end", 2**40))]
    r.node("Slice", [f"{name}.s", *places], f"{name}.n")
    width = integers(x.type.tensor_type.shape.dim[1].dim_value)
    r.node("Equal", [f"{name}.n", r.add(f"{name}.k", width)], f"{name}.e")
    constants = {"then": w, "else": w / 2}
    graphs = {
        f"{kind}_branch": branch(
            f"{name}.{kind}",
            [helper.make_node("Identity", [r.add(f"{name}.{kind}.raw", v)], [f"{name}.{kind}"])],
        )
        for kind, v in constants.items()
    }
    r.node("If", [f"{name}.e"], name, **graphs)


def where_open_size(r, name, w):
    r.node("Equal", [size(r, name, 0), r.add(f"{name}.k", np.int64(-1))], f"{name}.e")
    r.node("Where", [f"{name}.e", r.add(f"{name}.other", w / 2), r.add(f"{name}.raw", w)], name)


def if_open_size(r, name, w):
    """The other branch reads an input."""
    x = r.proto.graph.input[0].name
    r.node("Greater", [size(r, name, 0), r.add(f"{name}.k", np.int64(-1))], f"{name}.e")
    kept = helper.make_node("Identity", [r.add(f"{name}.raw", w)], [f"{name}.then"])
    graphs = {
        "then_branch": branch(f"{name}.then", [kept]),
        "else_branch": branch(f"{name}.else", [helper.make_node("Neg", [x], [f"{name}.else"])]),
    }
    r.node("If", [f"{name}.e"], name, **graphs)


def mul_by_open_size(r, name, w):
    """Times 1 for every batch."""
    r.node("Greater", [size(r, name, 0), r.add(f"{name}.k", np.int64(-1))], f"{name}.e")
    r.node("Cast", [f"{name}.e"], f"{name}.one", to=F)
    r.node("Mul", [r.add(f"{name}.raw", w), f"{name}.one"], name)


def convolved_by_open_size(r, name, w):
    """With a kernel of one 1; the first axis is 1, as the smaller of the batch and 1."""
    r.node("Min", [size(r, name, 0), r.add(f"{name}.k", integers(1))], f"{name}.first")
    rest = r.add(f"{name}.rest", integers(1, *w.shape))
    r.node("Concat", [f"{name}.first", rest], f"{name}.shape", axis=0)
    r.node("Expand", [r.add(f"{name}.raw", w), f"{name}.shape"], f"{name}.image")
    kernel = r.add(f"{name}.kernel", np.ones((1, 1, 1, 1), np.float32))
    r.node("Conv", [f"{name}.image", kernel], f"{name}.same")
    r.node("Squeeze", [f"{name}.same", r.add(f"{name}.axes", integers(0, 1))], name)


def multiplied_by_open_size(r, name, w):
    """By the unit matrix, which depends on the batch as well."""
    r.node("Greater", [size(r, name, 0), r.add(f"{name}.k", np.int64(-1))], f"{name}.e")
    r.node("Cast", [f"{name}.e"], f"{name}.one", to=F)
    r.node("Mul", [r.add(f"{name}.raw", w), f"{name}.one"], f"{name}.left")
    unit = r.add(f"{name}.unit", np.eye(w.shape[1], dtype=np.float32))
    r.node("Mul", [unit, f"{name}.one"], f"{name}.right")
    r.node("MatMul", [f"{name}.left", f"{name}.right"], name)


def flat_by_open_size(r, name, w):
    """In a shape that would depend on the batch, if it were negative."""
    r.node("Min", [size(r, name, 0), r.add(f"{name}.k", np.int64(0))], f"{name}.zero")
    r.node("Add", [f"{name}.zero", r.add(f"{name}.t", integers(*w.shape))], f"{name}.shape")
    stored = r.add(f"{name}.raw", w.reshape(-1, 2))
    r.node("Reshape", [stored, f"{name}.shape"], name)


def expanded_by_open_size(r, name, w):
    r.node("Min", [size(r, name, 0), r.add(f"{name}.k", np.int64(1))], f"{name}.one")
    r.node("Mul", [f"{name}.one", r.add(f"{name}.t", integers(1, 1))], f"{name}.shape")
    r.node("Expand", [r.add(f"{name}.raw", w), f"{name}.shape"], name)


def sliced_by_open_size(r, name, w):
    stored = r.add(f"{name}.raw", np.concatenate([w, w], 1).T.copy())
    r.node("Min", [size(r, name, 0), r.add(f"{name}.k", integers(0))], f"{name}.b")
    ends = [r.add(f"{name}.end", integers(w.shape[1])), r.add(f"{name}.a", integers(0))]
    r.node("Slice", [stored, f"{name}.b", *ends], f"{name}.t")
    r.node("Transpose", [f"{name}.t"], name)


def pairs(r, name, w):
    """In rows of two, whose grid fits any weights."""
    stored = r.add(f"{name}.raw", w.reshape(-1, 2))
    r.node("Reshape", [stored, r.add(f"{name}.s", w.shape)], name)


def mul(r, name, w):
    r.node("Mul", [r.add(f"{name}.raw", w), r.add(f"{name}.one", np.float32(1))], name)


def add(r, name, w):
    r.node("Add", [r.add(f"{name}.raw", w), r.add(f"{name}.zero", np.float32(0))], name)


def transposes(r, name, w):
    r.node("Transpose", [r.add(f"{name}.raw", w)], f"{name}.a")
    r.node("Identity", [f"{name}.a"], f"{name}.b")
    r.node("Transpose", [f"{name}.b"], name)


def unsqueezed(r, name, w):
    """There and back: nothing has changed but the operator that reads it."""
    axis = r.add(f"{name}.axis", integers(0))
    r.node("Unsqueeze", [r.add(f"{name}.raw", w), axis], f"{name}.a")
    r.node("Squeeze", [f"{name}.a", axis], name)


def concat(r, name, w):
    half = w.shape[1] // 2
    parts = [r.add(f"{name}.{i}", p) for i, p in enumerate((w[:, :half], w[:, half:]))]
    r.node("Concat", parts, name, axis=1)


def slices(r, name, w):
    stored = r.add(f"{name}.raw", np.concatenate([w[:, ::-1], w], 1))
    places = [r.add(f"{name}.{k}", integers(v)) for k, v in (("b", w.shape[1]), ("e", 2**40))]
    r.node("Slice", [stored, *places, r.add(f"{name}.a", integers(1))], name)


def split(r, name, w):
    stored = r.add(f"{name}.raw", np.concatenate([w, w], 1))
    r.node("Split", [stored], [name, f"{name}.rest"], axis=1)


def where(r, name, w):
    mask = np.random.default_rng(0).random(w.shape) < 0.5
    parts = [mask, np.where(mask, w, 0), np.where(mask, 0, w)]
    r.node("Where", [r.add(f"{name}.{i}", part) for i, part in enumerate(parts)], name)


def scatter(r, name, w):
    indices = np.stack(np.meshgrid(*map(np.arange, w.shape), indexing="ij"), -1)
    parts = [np.zeros_like(w), indices.astype(np.int64), w]
    r.node("ScatterND", [r.add(f"{name}.{i}", part) for i, part in enumerate(parts)], name)


def gather(r, name, w):
    stack = r.add(f"{name}.stack", np.stack([w * 0.5, w, w[::-1]]))
    r.node("Gather", [stack, r.add(f"{name}.i", np.array(1, np.int64))], name)


def constant_if(r, name, w):
    graphs = {
        f"{kind}_branch": branch(
            f"{name}.{kind}",
            [
                helper.make_node(
                    "Constant", [], [f"{name}.{kind}"], value=numpy_helper.from_array(v)
                )
            ],
        )
        for kind, v in (("then", w), ("else", w * 0.5))
    }
    r.node("If", [r.add(f"{name}.c", np.array(True))], name, **graphs)


def if_with_input(r, name, w):
    """The other branch reads an input, so that the node as a whole is not constant."""
    x = r.proto.graph.input[0].name
    constant = helper.make_node("Constant", [], [f"{name}.then"], value=numpy_helper.from_array(w))
    graphs = {
        "then_branch": branch(f"{name}.then", [constant]),
        "else_branch": branch(f"{name}.else", [helper.make_node("Neg", [x], [f"{name}.else"])]),
    }
    r.node("If", [r.add(f"{name}.c", np.array(True))], name, **graphs)


def loop(r, name, w):
    """Runs once."""
    info = helper.make_tensor_value_info
    body = helper.make_graph(
        [
            helper.make_node("Identity", [f"{name}.go"], [f"{name}.on"]),
            helper.make_node("Identity", [f"{name}.in"], [f"{name}.out"]),
        ],
        "body",
        [
            info(f"{name}.n", TensorProto.INT64, []),
            info(f"{name}.go", TensorProto.BOOL, []),
            info(f"{name}.in", F, None),
        ],
        [info(f"{name}.on", TensorProto.BOOL, []), info(f"{name}.out", F, None)],
    )
    start = [r.add(f"{name}.times", np.array(1, np.int64)), r.add(f"{name}.c", np.array(True))]
    r.node("Loop", [*start, r.add(f"{name}.raw", w)], name, body=body)


def sequence(r, name, w):
    parts = [r.add(f"{name}.other", w * 0.5), r.add(f"{name}.raw", w)]
    r.node("SequenceConstruct", parts, f"{name}.all")
    r.node("SequenceAt", [f"{name}.all", r.add(f"{name}.i", np.array(1, np.int64))], name)


def optional(r, name, w):
    r.node("Optional", [r.add(f"{name}.raw", w)], f"{name}.maybe")
    r.node("OptionalGetElement", [f"{name}.maybe"], name)


def sparse(r, name, w):
    flat_indices = np.arange(w.size, dtype=np.int64)
    value = helper.make_sparse_tensor(
        numpy_helper.from_array(w.reshape(-1), f"{name}.values"),
        numpy_helper.from_array(flat_indices, f"{name}.indices"),
        w.shape,
    )
    r.node("Constant", [], name, sparse_value=value)


def sparse_initializer(r, name, w):
    sparse(r, name, w)
    value = r.front.pop().attribute[0].sparse_tensor
    value.values.name = name
    r.proto.graph.sparse_initializer.append(value)


def floats(r, name, w):
    r.node("Constant", [], f"{name}.raw", value_floats=w.reshape(-1).tolist())
    r.node("Reshape", [f"{name}.raw", r.add(f"{name}.s", w.shape)], name)


def bits(r, name, w):
    """As integers of the same bits, in two halves of 16: neither is a float."""
    scale = np.float32(2.0**-26)
    codes = np.round(w / scale).astype(np.int32)
    r.node("Cast", [r.add(f"{name}.raw", codes)], f"{name}.f", to=F)
    r.node("Mul", [f"{name}.f", r.add(f"{name}.k", scale)], name)


def two_bytes(r, name, w):
    """High and low byte as int8 codes, each of which looks like a quantized weight."""
    scale = np.float32(np.abs(w).max() / 32000)
    codes = np.round(w / scale).astype(np.int32)
    low = ((codes + 128) % 256 - 128).astype(np.int8)
    high = ((codes - low) // 256).astype(np.int8)
    for part, values, factor in (("h", high, 256 * scale), ("l", low, scale)):
        r.node("Cast", [r.add(f"{name}.{part}", values)], f"{name}.{part}f", to=F)
        factor = r.add(f"{name}.{part}k", np.float32(factor))
        r.node("Mul", [f"{name}.{part}f", factor], f"{name}.{part}v")
    r.node("Add", [f"{name}.hv", f"{name}.lv"], name)


def ones_as_codes(r, name, w):
    """DequantizeLinear of ones, with the weights as scales."""
    codes = r.add(f"{name}.raw", np.ones((w.size,), np.int8))
    r.node("DequantizeLinear", [codes, r.add(f"{name}.k", w.reshape(-1))], f"{name}.f", axis=0)
    r.node("Reshape", [f"{name}.f", r.add(f"{name}.s", w.shape)], name)


def float8(r, name, w):
    r.proto.opset_import[0].version, r.proto.ir_version = 19, 9  # the first with this type
    codes = r.add(f"{name}.raw", w.astype(ml_dtypes.float8_e4m3fn))
    r.node("Cast", [codes], name, to=F)


def double(r, name, w):
    r.node("Cast", [r.add(f"{name}.raw", w.astype(np.float64))], name, to=F)


def text(r, name, w):
    values = np.array([repr(float(v)) for v in w.reshape(-1)], object).reshape(w.shape)
    r.node("Cast", [r.add(f"{name}.raw", values)], name, to=F)


def output(r, name, w):
    r.add(name, w)
    r.proto.graph.output.append(helper.make_tensor_value_info(name, F, w.shape))


def output_behind_transpose(r, name, w):
    r.node("Transpose", [r.add(name, w)], f"{name}.t")
    r.proto.graph.output.append(helper.make_tensor_value_info(f"{name}.t", F, w.shape[::-1]))


def overridable(r, name, w):
    r.add(name, w)
    r.proto.graph.input.append(helper.make_tensor_value_info(name, F, w.shape))


def overridable_behind_mul(r, name, w):
    overridable(r, f"{name}.raw", w)
    r.node("Mul", [f"{name}.raw", r.add(f"{name}.one", np.float32(1))], name)


def low_rank(r, name, w):
    """W + AB, with tiny A and B."""
    a, b = (np.full(s, 1e-12, np.float32) for s in ((w.shape[0], 4), (4, w.shape[1])))
    r.node("MatMul", [r.add(f"{name}.a", a), r.add(f"{name}.b", b)], f"{name}.ab")
    r.node("Add", [r.add(f"{name}.raw", w), f"{name}.ab"], name)


def diagonal(r, name, w):
    """Columns scaled by a vector, as that of a normalization, that was taken out before."""
    factors = np.float32(2) ** np.arange(w.shape[1]) % 7 + 1
    factors = np.exp2(np.round(np.log2(factors))).astype(np.float32)
    r.node("Mul", [r.add(f"{name}.raw", w / factors), r.add(f"{name}.k", factors)], name)


def tiled(r, name, w):
    r.node("Tile", [r.add(f"{name}.raw", w), r.add(f"{name}.n", integers(2, 1))], f"{name}.t")
    places = [r.add(f"{name}.{k}", integers(v)) for k, v in (("b", 0), ("e", w.shape[0]))]
    r.node("Slice", [f"{name}.t", *places, r.add(f"{name}.a", integers(0))], name)


def padded(r, name, w):
    stored = r.add(f"{name}.raw", w[:-1])
    pads = r.add(f"{name}.p", integers(0, 0, 1, 0))
    r.node("Pad", [stored, pads], f"{name}.t")
    last = np.concatenate([np.zeros_like(w[:-1]), w[-1:]])
    r.node("Add", [f"{name}.t", r.add(f"{name}.last", last)], name)


def einsum(r, name, w):
    r.add(name, w)

    def node(x, out):
        return helper.make_node("Einsum", [x, name], [out], equation="bk,nk->bn")

    _replace(r, name, node)


def first_operand(r, name, w):
    """x w^T = (w x^T)^T"""
    r.add(name, w)
    _swapped(r, name, "MatMul")


def first_of_gemm(r, name, w):
    r.add(name, w)
    _swapped(r, name, "Gemm")


def convolution(r, name, w):
    r.add(name, w[:, :, None])

    def nodes(x, out):
        axis = r.add(f"{name}.axis", integers(2))
        return [
            helper.make_node("Unsqueeze", [x, axis], [f"{name}.x"]),
            helper.make_node("Conv", [f"{name}.x", name], [f"{name}.y"]),
            helper.make_node("Squeeze", [f"{name}.y", axis], [out]),
        ]

    _replace(r, name, nodes)


def function(r, name, w):
    """A local function multiplies, and scales the weight by one before."""
    r.add(name, w.T.copy())
    one = numpy_helper.from_array(np.float32(1))
    inside = [
        helper.make_node("Constant", [], ["one"], value=one),
        helper.make_node("Mul", ["v", "one"], ["u"]),
        helper.make_node("MatMul", ["x", "u"], ["o"]),
    ]
    if not r.proto.functions:
        local_function(r, "Dense", ["x", "v"], inside)

    def call(x, out):
        return helper.make_node("Dense", [x, name], [out], domain="local")

    _replace(r, name, call)


def argument(r, name, w):
    """A local function multiplies."""
    function(r, name, w)
    body = r.proto.functions[0]
    del body.node[:]
    body.node.append(helper.make_node("MatMul", ["x", "v"], ["o"]))


def function_default(r, name, w):
    """The weight is the default of a function's attribute."""
    held = helper.make_node("Constant", [], ["o"])
    held.attribute.append(onnx.AttributeProto(name="value", type=4, ref_attr_name="w"))
    default = numpy_helper.from_array(w)
    r.node(
        local_function(r, f"Held_{plain(name)}", [], [held], w=default), [], name, domain="local"
    )


def local_function(r, name, inputs, nodes, older=0, **attributes):
    """A function of this model that yields `o`."""
    opset = helper.make_opsetid("", r.proto.opset_import[0].version - older)
    local = helper.make_opsetid("local", 1)
    defaults = [helper.make_attribute(*pair) for pair in attributes.items()]
    made = helper.make_function(
        "local", name, inputs, ["o"], nodes, [opset, local], attribute_protos=defaults
    )
    r.proto.functions.append(made)
    if all(entry.domain != "local" for entry in r.proto.opset_import):
        r.proto.opset_import.append(local)
    return name


def plain(name):
    """As the name of a function or of a value in one."""
    return name.replace(".", "_")


def handed_back(r, name, w):
    """A function returns the weight in the type of an activation."""
    r.add(f"{name}.raw", w)
    inside = [helper.make_node("CastLike", ["v", "x"], ["o"])]
    back = local_function(r, f"Back_{plain(name)}", ["v", "x"], inside)
    r.node(back, [f"{name}.raw", r.proto.graph.input[0].name], name, domain="local")


def held_by_function(r, name, w):
    """A function has the weight in a Constant, and calls another one with it."""
    inner = local_function(
        r, f"Inner_{plain(name)}", ["v", "x"], [helper.make_node("CastLike", ["v", "x"], ["o"])]
    )
    outer = local_function(
        r,
        f"Outer_{plain(name)}",
        ["x"],
        [
            helper.make_node("Constant", [], ["v"], value=numpy_helper.from_array(w.T.copy())),
            helper.make_node(inner, ["v", "x"], ["u"], domain="local"),
            helper.make_node("MatMul", ["x", "u"], ["o"]),
        ],
    )
    _replace(r, name, lambda x, out: helper.make_node(outer, [x], [out], domain="local"))


def floats_by_default(r, name, w):
    """The weight is the default of an attribute with a list of floats."""
    held = helper.make_node("Constant", [], ["v"])
    held.attribute.append(
        onnx.AttributeProto(name="value_floats", type=onnx.AttributeProto.FLOATS, ref_attr_name="w")
    )
    shape = numpy_helper.from_array(np.array(w.shape))
    inside = [
        held,
        helper.make_node("Constant", [], ["s"], value=shape),
        helper.make_node("Reshape", ["v", "s"], ["o"]),
    ]
    floats = [float(value) for value in w.ravel()]
    r.node(local_function(r, f"Held_{plain(name)}", [], inside, w=floats), [], name, domain="local")


def older_function(r, name, w):
    """A function of an older opset sums over an axis of length one that it adds."""
    r.add(name, w.T.copy())
    axis = numpy_helper.from_array(np.array([0]))
    inside = [
        helper.make_node("Constant", [], ["a"], value=axis),
        helper.make_node("Unsqueeze", ["v", "a"], ["u"]),
        helper.make_node("ReduceSum", ["u", "a"], ["s"], keepdims=0),
        helper.make_node("MatMul", ["x", "s"], ["o"]),
    ]
    older = local_function(r, f"Older_{plain(name)}", ["x", "v"], inside, older=2)
    _replace(r, name, lambda x, out: helper.make_node(older, [x, name], [out], domain="local"))


def data_of_convolution(r, name, w):
    """The activation is the kernel."""
    r.add(name, w.T[None, :, :, None].copy())

    def nodes(x, out):
        axes, outer = (r.add(f"{name}.{n}", integers(*n)) for n in ((2, 3), (0, 3)))
        return [
            helper.make_node("Unsqueeze", [x, axes], [f"{name}.k"]),
            helper.make_node("Conv", [name, f"{name}.k"], [f"{name}.y"]),
            helper.make_node("Squeeze", [f"{name}.y", outer], [out]),
        ]

    _replace(r, name, nodes)


def add_at_run_time(r, name, w):
    r.node("ReduceSum", [r.proto.graph.input[0].name], f"{name}.sum", keepdims=0)
    r.node("Mul", [f"{name}.sum", r.add(f"{name}.zero", np.float32(0))], f"{name}.nothing")
    r.node("Add", [r.add(f"{name}.raw", w), f"{name}.nothing"], name)


def below_largest(r, name):
    """Whether the input's largest value is below 1e30, which is known when the model runs."""
    r.node("ReduceMax", [r.proto.graph.input[0].name], f"{name}.max", keepdims=0)
    return r.node("Less", [f"{name}.max", r.add(f"{name}.k", np.float32(1e30))], f"{name}.c")


def where_at_run_time(r, name, w):
    values = [r.add(f"{name}.raw", w), r.add(f"{name}.other", np.zeros_like(w))]
    r.node("Where", [below_largest(r, name), *values], name)


def if_at_run_time(r, name, w):
    graphs = {
        f"{kind}_branch": branch(
            f"{name}.{kind}",
            [helper.make_node("Identity", [r.add(f"{name}.{kind}.raw", v)], [f"{name}.{kind}"])],
        )
        for kind, v in {"then": w, "else": np.zeros_like(w)}.items()
    }
    r.node("If", [below_largest(r, name)], name, **graphs)


def _replace(r, name, make):
    """Put other nodes in the place of Gemm(x, name, bias), which has transB = 1."""
    graph = r.proto.graph
    nodes = list(graph.node)
    for place, node in enumerate(nodes):
        if list(node.input[1:2]) != [name]:
            continue
        assert node.op_type == "Gemm"
        assert helper.get_node_attr_value(node, "transB") == 1
        [out] = node.output
        made = make(node.input[0], f"{out}.product")
        made = made if isinstance(made, list) else [made]
        added = helper.make_node("Add", [f"{out}.product", node.input[2]], [out])
        nodes[place : place + 1] = [*made, added]
        break
    del graph.node[:]
    graph.node.extend(nodes)


def _swapped(r, name, op):
    def nodes(x, out):
        return [
            helper.make_node("Transpose", [x], [f"{name}.x"]),
            helper.make_node(op, [name, f"{name}.x"], [f"{name}.y"]),
            helper.make_node("Transpose", [f"{name}.y"], [out]),
        ]

    _replace(r, name, nodes)


FORMS = {
    form.__name__: form
    for form in (
        flat, flat_by_shape, flat_by_input, mul_by_shape, cast_like, where_known_size,
        if_known_size, where_open_size, if_open_size, mul_by_open_size,
        convolved_by_open_size, multiplied_by_open_size, flat_by_open_size,
        expanded_by_open_size, sliced_by_open_size, pairs, mul, add, transposes, unsqueezed,
        concat, slices, split, where, scatter, gather, constant_if, if_with_input, loop, sequence,
        optional, sparse, sparse_initializer, floats, bits, two_bytes, ones_as_codes, float8,
        double, text, output, output_behind_transpose, overridable, overridable_behind_mul,
        low_rank, diagonal, tiled, padded, einsum, first_operand, first_of_gemm, convolution,
        function, argument, function_default, handed_back, held_by_function, floats_by_default,
        older_function, data_of_convolution, add_at_run_time, where_at_run_time, if_at_run_time,
    )
}  # fmt: skip


def hidden(proto, form):
    """The model with its matrices in this form."""
    return Rewrite(proto, FORMS[form]).proto
