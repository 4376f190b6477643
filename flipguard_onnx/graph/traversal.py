"""Walk a model: graphs, subgraphs, function bodies, and the tensors in them."""

from collections.abc import Iterator
from typing import Any

from onnx import (
    AttributeProto,
    FunctionProto,
    GraphProto,
    ModelProto,
    NodeProto,
    TensorProto,
    helper,
)

STANDARD = ("", "ai.onnx")  # names of the domain of the standard operators


def attribute(node: NodeProto, name: str, default: Any) -> Any:
    """The value of a node's attribute, or the default."""
    for candidate in node.attribute:
        if candidate.name == name:
            return helper.get_attribute_value(candidate)
    return default


def opset_of(entity: ModelProto | FunctionProto) -> int:
    """The version of the standard operators; above all others for a function without any."""
    versions = [o.version for o in entity.opset_import if o.domain in STANDARD]
    return max(versions, default=1 << 31)


def graphs(proto: ModelProto) -> Iterator[GraphProto]:
    """The main graph and every subgraph in If, Loop and Scan nodes, functions included."""

    def nested(body: GraphProto | FunctionProto) -> Iterator[GraphProto]:
        for node in body.node:
            for attribute in node.attribute:
                for graph in subgraphs(attribute):
                    yield graph
                    yield from nested(graph)

    yield proto.graph
    yield from nested(proto.graph)
    for function in proto.functions:
        yield from nested(function)


def bodies(proto: ModelProto) -> list[GraphProto | FunctionProto]:
    """Every graph, subgraph and function body."""
    return [*graphs(proto), *proto.functions]


def output_names(body: GraphProto | FunctionProto) -> list[str]:
    """The names of what a graph or a function returns."""
    if isinstance(body, GraphProto):
        return [value.name for value in body.output]
    return list(body.output)


def tensors(proto: ModelProto) -> Iterator[TensorProto]:
    """Every initializer, then every tensor in a node's attribute."""
    for graph in graphs(proto):
        yield from graph.initializer
    yield from attribute_tensors(proto)


def attribute_tensors(proto: ModelProto) -> Iterator[TensorProto]:
    """The tensors in Constant nodes and the like, functions included."""
    for body in bodies(proto):
        for node in body.node:
            for attribute in node.attribute:
                if attribute.HasField("t"):
                    yield attribute.t


def subgraphs(attribute: AttributeProto) -> list[GraphProto]:
    """The graphs that an attribute holds."""
    return [attribute.g] if attribute.HasField("g") else list(attribute.graphs)
