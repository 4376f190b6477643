"""Two decoders merged into one, as the one that starts a text.

optimum and transformers.js merge the decoder that starts a text with the one that goes on from its
caches: the main graph is an If on `use_cache_branch`, and both branches read the same weights.
"""

from collections.abc import Sequence
from dataclasses import replace

from onnx import GraphProto, ModelProto, NodeProto, helper

from ..graph.traversal import attribute
from ..io.model import Model
from .embeddings import text_model
from .inputs import Feed


def at_the_start(source: Model, given: Sequence[Feed]) -> tuple[Model, list[GraphProto]]:
    """The model with the branch in its main graph that starts a text.

    Parameters
    ----------
    source : the model
    given : feeds that it will run on; one that goes on from caches leaves it as it is

    Returns
    -------
    The model, and the bodies in `source` whose values its main graph has: that of `source`, and
    the branches taken.
    """
    main = source.proto.graph
    text = text_model(source)
    flag = text.cache_flag if text else None
    if flag is None or any(feed[flag].any() for feed in given):
        return source, [main]
    proto = ModelProto()
    proto.CopyFrom(source.proto)
    graph = proto.graph
    taken: list[GraphProto] = []
    known = {value.name for value in main.input} | {tensor.name for tensor in main.initializer}
    known |= {name for node in main.node for name in node.output}
    del graph.node[:]
    for node in main.node:
        branch = attribute(node, "else_branch", None) if node.input[:1] == [flag] else None
        made = _names(branch) - set(node.output) if branch else known
        if branch is None or made & known:  # two branches may use the same names
            graph.node.append(node)
            continue
        known |= made
        taken.append(branch)
        graph.initializer.extend(branch.initializer)
        graph.node.extend(branch.node)
        graph.node.extend(_renamed(branch, node))
    return (replace(source, proto=proto) if taken else source), [main, *taken]


def _names(branch: GraphProto) -> set[str]:
    """What is made in a branch."""
    made = {name for node in branch.node for name in node.output}
    return made | {tensor.name for tensor in branch.initializer}


def _renamed(branch: GraphProto, node: NodeProto) -> list[NodeProto]:
    """Nodes that give what a branch returns the names that the If has for it."""
    pairs = ((value.name, name) for value, name in zip(branch.output, node.output, strict=True))
    return [helper.make_node("Identity", [a], [b]) for a, b in pairs if b and a != b]
