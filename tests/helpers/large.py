"""A model that is larger than the memory in which it is written."""

import numpy as np
import onnx
from onnx import TensorProto, helper

ROWS = 512  # of made-up weights in memory at a time


def save_large(path, layers, width):
    """A chain of square MatMul, its weights in a data file beside it."""
    nodes, tensors, value = [], [], "x"
    with path.with_name(f"{path.name}.data").open("wb") as data:
        for number in range(layers):
            tensor = TensorProto(name=f"w{number}", data_type=TensorProto.FLOAT)
            tensor.dims.extend((width, width))
            tensor.data_location = TensorProto.EXTERNAL
            reference = {
                "location": f"{path.name}.data",
                "offset": data.tell(),
                "length": 4 * width * width,
            }
            for key, entry in reference.items():
                tensor.external_data.add(key=key, value=str(entry))
            rng = np.random.default_rng(number)
            for start in range(0, width, ROWS):
                rows = min(ROWS, width - start)
                values = rng.standard_normal((rows, width), dtype=np.float32)
                values /= np.float32(width**0.5)
                data.write(values.data)
            tensors.append(tensor)
            nodes.append(helper.make_node("MatMul", [value, tensor.name], [f"h{number}"]))
            value = f"h{number}"
    inputs, outputs = (
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", width])]
        for name in ("x", value)
    )
    graph = helper.make_graph(nodes, "large", inputs, outputs, tensors)
    opset = [helper.make_opsetid("", 21)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=10), path)
