"""Find the weights of a model: what each is, how its rows lie, and every place that reads it.

A weight is a constant float tensor that reaches the weight input of an operator of `ROLES`,
directly or through Identity, Transpose and Cast, in whatever graph, subgraph or model-local
function. What else is constant and float is listed with the reason why it is left alone.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import FunctionProto, GraphProto, ModelProto, NodeProto, TensorProto, helper

from .errors import UnsupportedModelError
from .model import subgraphs
from .schemes import Blocks

# Weight inputs by operator; the order decides whose layout a shared tensor gets.
ROLES = {
    "MatMul": (1, 0),
    "Gemm": (1,),
    "Conv": (1,),
    "ConvTranspose": (1,),
    "LSTM": (1, 2),
    "GRU": (1, 2),
    "RNN": (1, 2),
    "Gather": (0,),
}
VIEWS = ("Slice", "Split", "Concat", "Unsqueeze", "Squeeze", "Reshape", "Flatten")
FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)
QUANTIZED = (TensorProto.INT8, TensorProto.UINT8, TensorProto.INT4, TensorProto.UINT4)
SMALLEST = 64  # weights; the scales of a smaller tensor would outweigh what it saves


@dataclass(frozen=True)
class Scope:
    """A graph or the body of a model-local function; names resolve through its parents."""

    body: GraphProto | FunctionProto
    parent: "Scope | None" = None
    defined: set[str] = field(default_factory=set)

    def owner(self, name: str) -> "Scope | None":
        """The innermost scope from here outwards that defines the name."""
        scope: Scope | None = self
        while scope and name not in scope.defined:
            scope = scope.parent
        return scope


@dataclass(frozen=True)
class Use:
    """One place that reads a weight: input `index` of `node`, an operator of kind `op`.

    perm: the operand's axes in terms of the stored tensor's. elem_type: the operand's type.
    direct: the operand is the weight itself, not a slice or reshaping of it, nor the argument of a
    function. op "" is any other reader, which is handed the dequantized tensor.
    """

    scope: Scope
    node: NodeProto
    index: int
    op: str
    perm: tuple[int, ...]
    elem_type: int
    direct: bool = True

    def output_axes(self) -> tuple[int, ...]:
        """The stored tensor's axes that number output channels, in the order of the operand."""
        rank = len(self.perm)
        if not self.direct:
            return (0,)
        if self.op == "MatMul":
            contracted = rank - 1 if self.index == 0 else max(rank - 2, 0)
            axes: tuple[int, ...] = tuple(a for a in range(rank) if a != contracted)
        elif self.op == "Gemm":
            axes = (0,) if attribute(self.node, "transB", 0) else (1,)
        elif self.op == "ConvTranspose":
            axes = (1,)
        elif self.op in ("LSTM", "GRU", "RNN"):
            axes = (0, 1)
        elif self.op == "Gather":
            axes = (attribute(self.node, "axis", 0) % rank,)
        else:
            axes = (0,)
        return tuple(self.perm[a] for a in axes)


@dataclass(frozen=True)
class Weight:
    """A constant tensor that can be guarded. `name` is unique in the model.

    node: the Constant node that holds it, None for an initializer.
    op: the operator whose layout it has. rows: the stored axes that number its output channels.
    """

    name: str
    scope: Scope
    tensor: TensorProto
    node: NodeProto | None
    op: str
    rows: tuple[int, ...]
    uses: tuple[Use, ...]

    @property
    def tensor_name(self) -> str:
        """The name in the graph, where subgraphs may repeat it."""
        return self.node.output[0] if self.node else self.tensor.name

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.dims)

    @property
    def size(self) -> int:
        return prod(self.shape)

    @property
    def perm(self) -> tuple[int, ...]:
        """Axes in canonical order: those of the output channels, then all others."""
        return self.rows + tuple(a for a in range(len(self.shape)) if a not in self.rows)

    def blocks(self, size: int | None, flat: bool) -> Blocks:
        """Cut the canonical matrix into blocks: None takes whole rows; `flat` runs across rows."""
        rows = 1 if flat else prod(self.shape[a] for a in self.rows)
        cols = self.size // rows
        return Blocks(rows, cols, min(size or cols, cols))

    def canonical(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Stored layout to flat rows of output channels."""
        return np.ascontiguousarray(values.transpose(self.perm)).reshape(-1)

    def stored(self, flat: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Flat rows of output channels back to the stored layout (a view)."""
        shape = tuple(self.shape[a] for a in self.perm)
        return flat.reshape(shape).transpose(np.argsort(self.perm))


@dataclass(frozen=True)
class Skipped:
    """A tensor that is not guarded, and why."""

    name: str
    shape: tuple[int, ...]
    reason: str

    @property
    def size(self) -> int:
        """How many values it has; 0 for one that is computed."""
        return prod(self.shape) if self.shape or self.reason == "scalar" else 0


def find_weights(
    proto: ModelProto, include: tuple[str, ...] = (), exclude: tuple[str, ...] = ()
) -> tuple[list[Weight], list[Skipped]]:
    """All weights of the model and all float tensors that are left alone.

    include, exclude: shell patterns over tensor names; what fails them is skipped.
    Raises UnsupportedModelError when most of the model's weights are quantized already.
    """
    reader = _Readers(proto)
    weights: list[Weight] = []
    skipped: list[Skipped] = []
    quantized: dict[str, int] = defaultdict(int)
    seen: dict[str, int] = defaultdict(int)
    for scope, plain_name, tensor, node in reader.constants():
        seen[plain_name] += 1
        name = plain_name if seen[plain_name] == 1 else f"{plain_name}#{seen[plain_name]}"
        shape = tuple(tensor.dims)
        uses = tuple(reader.uses(scope, plain_name, tuple(range(len(shape))), tensor.data_type))
        if tensor.data_type in QUANTIZED and prod(shape) >= SMALLEST and len(shape) > 1:
            reader_op = uses[0].node.op_type if uses else "nothing"
            quantized[reader_op] += prod(shape)
            kind = TensorProto.DataType.Name(tensor.data_type)
            skipped.append(Skipped(name, shape, f"already quantized ({kind}, feeds {reader_op})"))
        elif tensor.data_type in (*FLOATS, TensorProto.DOUBLE):
            roles = sorted((use for use in uses if use.op), key=_priority)
            reason = _why_not(tensor, uses, roles, reader.is_output(scope, plain_name))
            if not reason and include and not any(fnmatchcase(name, p) for p in include):
                reason = "not selected by --include"
            if not reason and any(fnmatchcase(name, p) for p in exclude):
                reason = "excluded by --exclude"
            if reason:
                skipped.append(Skipped(name, shape, reason))
            else:
                op, rows = roles[0].op, roles[0].output_axes()
                weights.append(Weight(name, scope, tensor, node, op, rows, uses))
    skipped.extend(reader.computed_weights())
    if sum(quantized.values()) > sum(weight.size for weight in weights):
        readers = ", ".join(sorted(quantized))
        raise UnsupportedModelError(
            f"already quantized: {sum(quantized.values()):,} weights are integers (read by "
            f"{readers}); allowed: a float model, so guard the one that this was made from"
        )
    return weights, skipped


def attribute(node: NodeProto, name: str, default: Any) -> Any:
    """The value of a node's attribute, or the default."""
    for candidate in node.attribute:
        if candidate.name == name:
            return helper.get_attribute_value(candidate)
    return default


def _priority(use: Use) -> tuple[bool, int]:
    return not use.direct, list(ROLES).index(use.op)


def _why_not(
    tensor: TensorProto, uses: tuple[Use, ...], roles: list[Use], is_output: bool
) -> str | None:
    rank, size = len(tensor.dims), prod(tensor.dims)
    if rank < 2:
        return "1-D" if rank else "scalar"
    if not roles:
        readers = sorted({use.node.op_type for use in uses})
        return f"feeds {', '.join(readers) or 'nothing'}, no weighted operator"
    if tensor.data_type not in FLOATS:
        return f"unsupported type {TensorProto.DataType.Name(tensor.data_type)}"
    if size < SMALLEST:
        return f"too small (fewer than {SMALLEST} weights)"
    if is_output:
        return "is a graph output"
    return None


class _Readers:
    """Who reads which value, across graphs, subgraphs and functions."""

    def __init__(self, proto: ModelProto) -> None:
        self.scopes: list[Scope] = []
        self.functions: dict[tuple[str, str], Scope] = {}
        self._edges: dict[tuple[int, str], list[tuple[Scope, NodeProto, int]]] = defaultdict(list)
        self._outputs: set[tuple[int, str]] = set()
        for function in proto.functions:
            scope = self._enter(function, None)
            self.functions[function.domain, function.name] = scope
        self._enter(proto.graph, None)
        for scope in self.scopes:
            self._connect(scope)

    def _enter(self, body: GraphProto | FunctionProto, parent: Scope | None) -> Scope:
        scope = Scope(body, parent)
        self.scopes.append(scope)
        if isinstance(body, GraphProto):
            scope.defined.update(value.name for value in body.input)
            scope.defined.update(tensor.name for tensor in body.initializer)
        else:
            scope.defined.update(body.input)
        for node in body.node:
            scope.defined.update(node.output)
            for attr in node.attribute:
                for graph in subgraphs(attr):
                    self._enter(graph, scope)
        return scope

    def _connect(self, scope: Scope) -> None:
        for node in scope.body.node:
            for index, name in enumerate(node.input):
                if owner := scope.owner(name):
                    self._edges[id(owner), name].append((scope, node, index))
        if isinstance(scope.body, GraphProto):
            names = [value.name for value in scope.body.output]
        else:
            names = list(scope.body.output)
        for name in names:
            if owner := scope.owner(name):
                self._outputs.add((id(owner), name))

    def constants(self) -> Iterator[tuple[Scope, str, TensorProto, NodeProto | None]]:
        """Every initializer and every Constant node's tensor."""
        for scope in self.scopes:
            if isinstance(scope.body, GraphProto):
                for tensor in scope.body.initializer:
                    yield scope, tensor.name, tensor, None
            for node in scope.body.node:
                for attr in node.attribute:
                    if node.op_type == "Constant" and attr.name == "value":
                        yield scope, node.output[0], attr.t, node

    def is_output(self, scope: Scope, name: str) -> bool:
        """Whether the value, or one that merely renames or casts it, leaves its graph."""
        if (id(scope), name) in self._outputs:
            return True
        return any(
            node.op_type in ("Identity", "Transpose", "Cast")
            and self.is_output(reader, node.output[0])
            for reader, node, _ in self._edges[id(scope), name]
        )

    def uses(self, scope: Scope, name: str, perm: tuple[int, ...], elem_type: int) -> Iterator[Use]:
        """Where the value ends up, seen through Identity, Transpose and Cast."""
        for reader, node, index in self._edges[id(scope), name]:
            if node.domain not in ("", "ai.onnx"):
                op = self._role(reader, node, index)
                yield Use(reader, node, index, op, perm, elem_type, direct=False)
            elif node.op_type == "Identity":
                yield from self.uses(reader, node.output[0], perm, elem_type)
            elif node.op_type == "Transpose":
                order = attribute(node, "perm", list(reversed(range(len(perm)))))
                turned = tuple(perm[axis] for axis in order)
                yield from self.uses(reader, node.output[0], turned, elem_type)
            elif node.op_type == "Cast" and attribute(node, "to", 0) in FLOATS:
                yield from self.uses(reader, node.output[0], perm, attribute(node, "to", 0))
            else:
                op = self._role(reader, node, index)
                direct = node.op_type not in VIEWS
                yield Use(reader, node, index, op, perm, elem_type, direct)

    def _role(self, scope: Scope, node: NodeProto, index: int) -> str:
        """The weighted operator that this input serves, itself or behind views and functions."""
        if node.op_type in ROLES and node.domain in ("", "ai.onnx"):
            return node.op_type if index in ROLES[node.op_type] else ""
        if function := self.functions.get((node.domain, node.op_type)):
            behind = [(function, str(function.body.input[index]))]
        elif node.op_type in VIEWS and (index == 0 or node.op_type == "Concat"):
            behind = [(scope, name) for name in node.output]
        else:
            return ""
        axes = tuple(range(8))  # only the operators matter here
        uses = (use for inner, name in behind for use in self.uses(inner, name, axes, 0))
        ops = [use.op for use in uses if use.op not in ("", "Gather")]
        return min(ops, key=list(ROLES).index, default="")

    def computed_weights(self) -> Iterator[Skipped]:
        """Weight inputs that no constant reaches: what is computed cannot be guarded."""
        constant = {(id(scope), name) for scope, name, _, _ in self.constants()}
        makers = {
            (id(scope), name): (scope, node)
            for scope in self.scopes
            for node in scope.body.node
            for name in node.output
        }

        def is_constant(scope: Scope, name: str) -> bool:
            key = (id(scope.owner(name)), name)
            if key in constant or key not in makers:
                return key in constant
            maker_scope, maker = makers[key]
            if maker.op_type not in (*VIEWS, "Identity", "Transpose", "Cast"):
                return False
            return is_constant(maker_scope, maker.input[0])

        for scope in self.scopes:
            for node in scope.body.node:
                if node.op_type in ("MatMul", "Gather") or node.op_type not in ROLES:
                    continue
                for index in ROLES[node.op_type]:
                    if not is_constant(scope, node.input[index]):
                        reason = f"not constant (weight of {node.op_type})"
                        yield Skipped(node.input[index], (), reason)
