"""A model that is larger than the memory in which it is written."""

from math import prod
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

ROWS = 512  # of made-up weights in memory at a time


def save_large(path, layers, width):
    """A chain of square MatMul, its weights in a data file beside it."""
    nodes, tensors, value = [], [], "x"
    with path.with_name(f"{path.name}.data").open("wb") as data:
        for number in range(layers):
            name = f"w{number}"
            tensors.append(random_tensor(data, name, (width, width), width**-0.5, number))
            nodes.append(helper.make_node("MatMul", [value, name], [f"h{number}"]))
            value = f"h{number}"
    inputs, outputs = (
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", width])]
        for name in ("x", value)
    )
    graph = helper.make_graph(nodes, "large", inputs, outputs, tensors)
    opset = [helper.make_opsetid("", 21)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=10), path)


def random_tensor(data, name, shape, deviation, seed, dtype=np.float32):
    """A matrix of Gaussian weights, appended to the open file `data`."""
    tensor = TensorProto(name=name, data_type=helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))
    tensor.dims.extend(shape)
    tensor.data_location = TensorProto.EXTERNAL
    length = prod(shape) * np.dtype(dtype).itemsize
    reference = {"location": Path(data.name).name, "offset": data.tell(), "length": length}
    for key, entry in reference.items():
        tensor.external_data.add(key=key, value=str(entry))
    rng = np.random.default_rng(seed)
    for start in range(0, shape[0], ROWS):
        rows = min(ROWS, shape[0] - start)
        values = rng.standard_normal((rows, shape[1]), dtype=np.float32)
        values *= np.float32(deviation)
        data.write(values.astype(dtype, copy=False).data)
    return tensor
