"""Weights of a copy of a model: found once in the original, and pointed to in every copy."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from onnx import GraphProto, ModelProto

from .scopes import Scope, Use
from .traversal import bodies
from .weights import Weight, find_weights


@dataclass(frozen=True)
class IndexedModel:
    """A graph, and the weights that were found in it."""

    proto: ModelProto
    weights: tuple[Weight, ...]

    @classmethod
    def of(cls, proto: ModelProto) -> "IndexedModel":
        """A graph whose weights are looked for now."""
        return cls(proto, tuple(find_weights(proto)[0]))

    def copy(self) -> tuple[ModelProto, dict[str, Weight]]:
        """A graph to edit, and its weights by name; their data stays where it is."""
        copy = ModelProto()
        copy.CopyFrom(self.proto)
        return copy, weights_in_copy(self.weights, self.proto, copy)


def weights_in_copy(
    weights: Iterable[Weight], proto: ModelProto, copy: ModelProto
) -> dict[str, Weight]:
    """The weights of `proto` by name, as they stand in an equal copy of it.

    Walking the two side by side is all that it takes: who reads what need not be found anew.
    """
    weights = list(weights)  # they hold the nodes of `proto`, whose ids are looked up below
    twins: dict[int, Any] = {}
    for body, twin in zip(bodies(proto), bodies(copy), strict=True):
        twins[id(body)] = twin
        twins.update((id(a), b) for a, b in zip(body.node, twin.node, strict=True))
        if isinstance(body, GraphProto) and isinstance(twin, GraphProto):
            pairs = zip(body.initializer, twin.initializer, strict=True)
            twins.update((id(a), b) for a, b in pairs)
    scopes: dict[int, Scope] = {}

    def moved(scope: Scope) -> Scope:
        if id(scope) not in scopes:
            parent = scope.parent and moved(scope.parent)
            scopes[id(scope)] = replace(scope, body=twins[id(scope.body)], parent=parent)
        return scopes[id(scope)]

    def use_in_copy(use: Use) -> Use:
        behind = use.behind and use_in_copy(use.behind)
        return replace(use, scope=moved(use.scope), node=twins[id(use.node)], behind=behind)

    found = {}
    for weight in weights:
        node = weight.node and twins[id(weight.node)]
        tensor = twins[id(weight.tensor)] if node is None else _value(node)
        found[weight.name] = replace(
            weight,
            scope=moved(weight.scope),
            tensor=tensor,
            node=node,
            uses=tuple(map(use_in_copy, weight.uses)),
        )
    return found


def _value(node: Any) -> Any:
    """The tensor of a Constant node."""
    return next(attribute.t for attribute in node.attribute if attribute.name == "value")
