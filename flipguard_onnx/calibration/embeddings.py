"""Decoders that take embeddings, as those of vision-language models do, and the table of these.

Beside such a decoder (`inputs_embeds` [batch, length, width]) exporters put a small model that
looks token ids up in a table [vocabulary, width]. Where it is missing, the matrix that yields the
logits serves: in most models both are the same.
"""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from ..errors import FlipguardError
from ..graph.operators import FLOATS
from ..graph.weights import find_weights
from ..io.model import Model, open_model
from .inputs import Input, signature
from .text_model import TextModel

TAKEN = "inputs_embeds"

Table = npt.NDArray[np.floating]


def text_model(source: Model) -> TextModel | None:
    """What there is to know of a model that takes token ids, or embeddings of them.

    Raises UnsupportedModelError for an input that is no tensor of numbers.
    """
    if text := TextModel.of(source.proto):
        return text
    inputs = signature(source.proto)
    taken = [i for i in inputs if _takes_embeddings(i)]
    if len(taken) != 1:
        return None
    width = int(taken[0].dims[2])
    table = next(_tables_beside(source, width), None)
    if table is None:
        table = next(_heads(source, width), None)
    if table is None:
        return None
    return TextModel.of_embeddings(source.proto, inputs, taken[0], table)


def _takes_embeddings(wanted: Input) -> bool:
    is_row = len(wanted.dims) == 3 and isinstance(wanted.dims[2], int)
    return TAKEN in wanted.name.lower() and is_row and wanted.dtype.kind not in "biu"


def _tables_beside(source: Model, width: int) -> Iterator[Table]:
    """Tables of that width in the models for embeddings in the same folder."""
    for path in sorted(source.path.parent.glob("*embed*.onnx")):
        if path.name == source.path.name:
            continue
        try:
            beside = open_model(path, digests=False)
        except FlipguardError:
            continue
        read = {node.input[0] for node in beside.proto.graph.node if node.op_type == "Gather"}
        for tensor in beside.proto.graph.initializer:
            is_table = len(tensor.dims) == 2 and tensor.dims[1] == width
            if tensor.name in read and is_table and tensor.data_type in FLOATS:
                yield beside.array(tensor)


def _heads(source: Model, width: int) -> Iterator[Table]:
    """Matrices that may yield the logits, [vocabulary, width]."""
    shapes = (value.type.tensor_type.shape.dim for value in source.proto.graph.output)
    vocabularies = {dims[2].dim_value for dims in shapes if len(dims) == 3}
    for weight in find_weights(source.proto, partly=True)[0]:
        rows = weight.layout.canonical_shape[0]
        if len(weight.shape) == 2 and weight.size == rows * width and rows in vocabularies:
            yield source.array(weight.tensor).transpose(weight.perm)
