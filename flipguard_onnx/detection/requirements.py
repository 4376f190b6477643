"""What other runtimes ask of a quantized file, as far as the file shows it.

Sources: docs/runtimes.md.
"""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import reduce
from operator import mul
from pathlib import Path
from typing import Any

import numpy as np
from onnx import NodeProto, TensorProto, numpy_helper

from ..graph.operators import FLOATS
from ..graph.scopes import GraphIndex, Scope
from ..graph.traversal import STANDARD, attribute
from ..graph.weights import QUANTIZED, SMALL_FLOATS
from ..io.model import Model, open_model
from ..reports.guard import Finding, TargetInspection

SIGNED = {TensorProto.INT8, TensorProto.INT4, TensorProto.INT2, *SMALL_FLOATS}
FOUR_BITS = {TensorProto.INT4, TensorProto.UINT4}
FLOATS_OF_8_BITS = {*SMALL_FLOATS} - {TensorProto.FLOAT4E2M1}
CODES = {*QUANTIZED, *SMALL_FLOATS}
PRODUCTS = {"Conv", "ConvTranspose", "Gemm", "MatMul"}


@dataclass(frozen=True)
class Codes:
    """Constant integers and one node that reads them, or an activation and what makes it integers.

    Attributes
    ----------
    name, data_type, shape : of the integers; an activation's name, and no shape
    node : what reads them; for an activation its QuantizeLinear
    operators : the types of the nodes that read the result
    blocks_behind : whether one of these reads them in blocks
    on_integers : whether what these are multiplied with comes from a DequantizeLinear as well
    scale : None where it is not constant
    has_offset : whether there is a zero point that is not constant or not 0
    """

    name: str
    data_type: int
    shape: tuple[int, ...]
    node: NodeProto
    operators: frozenset[str]
    blocks_behind: bool
    on_integers: bool
    scale: Any
    has_offset: bool

    @property
    def dequantized(self) -> bool:
        """Whether a DequantizeLinear reads them."""
        return self.node.op_type == "DequantizeLinear" and self.node.domain in STANDARD

    @property
    def is_activation(self) -> bool:
        """Whether they are computed."""
        return self.node.op_type == "QuantizeLinear"

    @property
    def block_size(self) -> int:
        """How many share a scale; 0 without blocks."""
        return _integer(self.node, "block_size", 0)

    @property
    def axis(self) -> int:
        """The axis of the blocks, from 0."""
        return _integer(self.node, "axis", 1) % max(len(self.shape), 1)

    @property
    def length(self) -> int:
        """Of that axis."""
        return self.shape[self.axis] if self.shape else 1


Requirement = tuple[str, Callable[[Codes], bool]]  # in words, and whether it is met


def known(*contrib: str) -> Requirement:
    """Operators of the standard, or these of onnxruntime's, read the codes."""
    names = " or ".join(("operators of the ONNX standard", *contrib))
    return names, lambda codes: codes.node.domain in STANDARD or codes.node.op_type in contrib


INTEGERS: Requirement = (
    "integers (what it does with floats of 8 bits and fewer was not looked into)",
    lambda codes: codes.data_type not in SMALL_FLOATS,
)

REQUIREMENTS: dict[str, tuple[Requirement, ...]] = {
    "tensorrt": (
        known(),
        INTEGERS,
        (
            "DequantizeLinear reads the codes",
            lambda codes: (
                codes.dequantized or codes.is_activation or codes.node.domain not in STANDARD
            ),
        ),
        ("signed codes", lambda codes: codes.data_type in SIGNED),
        ("no zero points but 0", lambda codes: not codes.has_offset),
        (
            "constant scales above 0",
            lambda codes: (
                not codes.dequantized or (codes.scale is not None and bool(np.all(codes.scale > 0)))
            ),
        ),
        (
            "4 bits in blocks of 64 or 128",
            lambda codes: codes.data_type not in FOUR_BITS or codes.block_size in (64, 128),
        ),
        (
            "blocks along one of the last two axes",
            lambda codes: not codes.block_size or codes.axis >= len(codes.shape) - 2,
        ),
        (
            "DequantizeLinear directly before Conv, ConvTranspose, Gemm or MatMul",
            lambda codes: not codes.dequantized or codes.operators <= PRODUCTS,
        ),
    ),
    "qnn": (
        known("MatMulNBits"),
        INTEGERS,
        ("no blocks", lambda codes: not codes.block_size),
        (
            "integer activations, too",
            lambda codes: codes.is_activation or (codes.dequantized and codes.on_integers),
        ),
    ),
    "openvino": (
        known("MatMulNBits", "GatherBlockQuantized"),
        INTEGERS,
        (
            "whole blocks",
            lambda codes: not codes.block_size or codes.length % codes.block_size == 0,
        ),
        (
            "no blocks of codes that are looked up or reshaped",
            lambda codes: not codes.blocks_behind,
        ),
        (
            "no codebook, whose weights become floats when the file is loaded",
            lambda codes: codes.node.op_type != "Cast" or "Gather" not in codes.operators,
        ),
        (
            "weights of MatMul and Gemm, or integer activations, too: others become floats",
            lambda codes: (
                not codes.dequantized or codes.on_integers or codes.operators <= {"MatMul", "Gemm"}
            ),
        ),
    ),
}


def inspect_for(model: str | Path, target: str) -> TargetInspection:
    """What a runtime would not take, or not as integers, in a quantized file.

    Parameters
    ----------
    model : path of a quantized ONNX file, whoever wrote it
    target : a key of `REQUIREMENTS`

    Returns
    -------
    TargetInspection : the requirements that are not met, with the tensors that do not meet them

    Raises
    ------
    ModelError, UnsupportedModelError : as in `open_model`
    """
    source = open_model(model)
    found = list(_codes(source))
    findings = []
    for text, is_met in REQUIREMENTS[target]:
        names = dict.fromkeys(codes.name for codes in found if not is_met(codes))
        if names:
            findings.append(Finding(text, tuple(names)))
    tensors = len({codes.name for codes in found})
    return TargetInspection(
        str(source.path), source.sha256, source.data_sha256, target, tensors, tuple(findings)
    )


def _codes(model: Model) -> Iterator[Codes]:
    index = GraphIndex(model.proto)
    constants = {(id(s), name): tensor for s, name, tensor, _ in index.constants()}
    makers = index.makers()

    def constant(
        scope: Scope, node: NodeProto, place: int, types: Collection[int]
    ) -> TensorProto | None:
        name = node.input[place] if place < len(node.input) else ""
        tensor = constants.get((id(scope.owner(name)), name))
        return tensor if tensor is not None and tensor.data_type in types else None

    def decoder(scope: Scope, name: str) -> tuple[Scope, NodeProto] | None:
        found = makers.get((id(scope.owner(name)), name))
        return found if found and found[1].op_type == "DequantizeLinear" else None

    def scales(scope: Scope, node: NodeProto) -> Any:
        """Constant scales, or the product of two where a DequantizeLinear yields them."""
        parts = [constant(scope, node, 1, FLOATS)]
        if len(node.input) > 1 and (found := decoder(scope, node.input[1])):
            parts = [constant(*found, 0, FLOATS_OF_8_BITS), constant(*found, 1, FLOATS)]
        arrays = [model.array(tensor) for tensor in parts if tensor is not None]
        return reduce(mul, arrays) if len(arrays) == len(parts) else None

    for (owner, name), tensor in constants.items():
        if tensor.data_type not in CODES:
            continue
        for scope, node, place in index.readers((owner, name)):
            dequantizes = node.op_type == "DequantizeLinear"
            quantizes = node.op_type == "QuantizeLinear"
            if (dequantizes and place) or (quantizes and place != 2):
                continue  # a zero point; what is quantized only now
            uses = [use for output in node.output for use in index.readers((id(scope), output))]
            if uses and all(use.op_type == "DequantizeLinear" and at for _, use, at in uses):
                continue  # the scales of other codes
            zero = constant(scope, node, 2, CODES)
            given = len(node.input) > 2 and bool(node.input[2])
            yield Codes(
                node.input[0] if quantizes else name,
                tensor.data_type,
                () if quantizes else tuple(tensor.dims),
                node,
                frozenset(use.op_type for _, use, _ in uses),
                any(_integer(use, "block_size", 0) for _, use, _ in uses),
                all(
                    any(decoder(inner, name) for name in {*use.input} - {*node.output})
                    for inner, use, _ in uses
                ),
                scales(scope, node),
                given and (dequantizes or quantizes) and (zero is None or _any(model, zero)),
            )


def _integer(node: NodeProto, name: str, default: int) -> int:
    """An attribute; the default also where it is no integer."""
    value = attribute(node, name, default)
    return value if isinstance(value, int) else default


def _any(model: Model, tensor: TensorProto) -> bool:
    """Whether a tensor has a value that is not 0, packed or not."""
    if tensor.data_location == TensorProto.EXTERNAL:
        return bool(np.frombuffer(model.raw(tensor), np.uint8).any())
    return bool(numpy_helper.to_array(tensor).astype(np.int32).any())
