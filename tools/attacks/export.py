"""torch parameters -> ONNX by hand, opset 17: every weight is one named initializer."""

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


class GraphBuilder:
    """Collects nodes and initializers; `add` returns the name of the new node's output."""

    def __init__(self):
        self.nodes, self.initializers = [], []

    def constant(self, name, value):
        """A named initializer from an array or a torch parameter."""
        value = value.detach().numpy() if hasattr(value, "detach") else value
        self.initializers.append(numpy_helper.from_array(np.asarray(value, order="C"), name))
        return name

    def half(self, name, value):
        """A named float16 initializer; returns the name of its float32 values."""
        value = value.detach().numpy() if hasattr(value, "detach") else value
        self.constant(name, value.astype(np.float16))
        return self.add("Cast", f"{name}.float", name, to=TensorProto.FLOAT)

    def add(self, kind, name, *inputs, **attributes):
        """A node whose output carries its name."""
        self.nodes.append(helper.make_node(kind, list(inputs), [name], name=name, **attributes))
        return name

    def split(self, name, outputs, *inputs, **attributes):
        """A `Split` into named parts."""
        self.nodes.append(helper.make_node("Split", list(inputs), outputs, name=name, **attributes))

    def model(self, title, given, returned):
        """`given` and `returned` are `(name, element type, shape)`."""
        graph = helper.make_graph(
            self.nodes,
            title,
            [helper.make_tensor_value_info(*given)],
            [helper.make_tensor_value_info(*returned)],
            self.initializers,
        )
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", 17)],
            ir_version=8,
            producer_name="flipguard-onnx attack bench",
        )
        onnx.checker.check_model(model, full_check=True)
        return model


def dense(g, name, x, layer):
    """`Gemm` with transB=1, as torch.onnx.export writes a Linear layer."""
    weight = g.constant(f"{name}.weight", layer.weight)
    bias = g.constant(f"{name}.bias", layer.bias)
    return g.add("Gemm", f"{name}.out", x, weight, bias, transB=1)


def classifier(net, title):
    """Digits classifier: pixels `[batch, 64]` -> logits `[batch, 10]`."""
    g, x = GraphBuilder(), "pixels"
    if net.convolutions:
        x = g.add("Reshape", "image", x, g.constant("image.shape", np.array([-1, 1, 8, 8])))
    for i, layer in enumerate(net.convolutions):
        names = g.constant(f"conv{i}.weight", layer.weight), g.constant(f"conv{i}.bias", layer.bias)
        x = g.add(
            "Conv",
            f"conv{i}.out",
            x,
            *names,
            kernel_shape=[3, 3],
            pads=[1, 1, 1, 1],
            strides=list(layer.stride),
        )
        x = g.add("Relu", f"conv{i}.relu", x)
    if net.convolutions:
        x = g.add("Flatten", "flat", x)
    for i, layer in enumerate(net.layers):
        x = dense(g, f"dense{i}", x, layer)
        if i + 1 < len(net.layers):
            x = g.add("Relu", f"dense{i}.relu", x)
    g.add("Identity", "logits", x)
    return g.model(
        title,
        ("pixels", TensorProto.FLOAT, ["batch", 64]),
        ("logits", TensorProto.FLOAT, ["batch", 10]),
    )
