"""Where the axes of a tensor are after operators that move its values and change none."""

from collections.abc import Callable

from onnx import NodeProto

from .operators import CHAIN, FLOATS, VIEWS
from .traversal import STANDARD, attribute

Axes = tuple[int | None, ...]  # for each axis of a value that of the stored tensor; None is added

Integers = Callable[[int, str], list[int] | None]

# Operators whose output has the values of their first input (Concat: of all), at other places.
MOVES = (*CHAIN, "CastLike", "Gather", *(op for op in VIEWS if op not in ("Reshape", "Flatten")))


def moved_axes(node: NodeProto, axes: Axes, integers: Integers) -> Axes | None:
    """The axes of what a node yields; None where they are those of no tensor before it.

    Parameters
    ----------
    node : reads the value as its first input, a Concat as any
    axes : of the value that it reads
    integers : the constant integers of an input, given its index, or of the attribute with a name;
        None where neither is there

    Examples
    --------
    >>> from onnx import helper
    >>> moved_axes(helper.make_node("Transpose", ["x"], ["y"]), (0, 1, 2), lambda *_: None)
    (2, 1, 0)
    """
    op = node.op_type
    if node.domain not in STANDARD:
        return None
    if op == "Cast":
        return axes if attribute(node, "to", 0) in FLOATS else None
    if op in ("Identity", "Slice", "Split", "Concat", "Expand", "Tile", "Pad"):
        return axes
    if op == "Transpose":
        order = attribute(node, "perm", list(reversed(range(len(axes)))))
        fits = sorted(order) == list(range(len(axes)))
        return tuple(axes[axis] for axis in order) if fits else None
    if op == "Unsqueeze" and (added := integers(1, "axes")):
        places = {place % (len(axes) + len(added)) for place in added}
        old = iter(axes)
        total = range(len(axes) + len(added))
        made = tuple(None if place in places else next(old, None) for place in total)
        return made if len(places) == len(added) else None
    if op == "Squeeze" and axes and (dropped := integers(1, "axes")):
        places = {place % len(axes) for place in dropped}
        return tuple(old for place, old in enumerate(axes) if place not in places)
    return None
