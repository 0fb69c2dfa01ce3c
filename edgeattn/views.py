"""Nodes that only name a part of each row, or divide rows anew: they cost nothing."""
import math

import numpy as np

from edgeattn.graph import attributes

VIEWS = ("Split", "Reshape", "Identity")


def is_view(node, source: tuple, initializers: dict[str, np.ndarray]) -> bool:
    """Whether a node is one; source: the shape of its first input, rows first."""
    if node.domain or node.op_type not in VIEWS or not node.output:
        return False
    if node.op_type == "Identity":
        return True
    sizes = initializers.get(node.input[1]) if len(node.input) > 1 else None
    if sizes is None or sizes.dtype != np.int64 or sizes.ndim != 1 or len(source) < 2:
        return False
    row, target = math.prod(source[1:]), sizes.tolist()
    if node.op_type == "Split":
        return (attributes(node).get("axis", 0) in (1, -1) and len(source) == 2 and len(target) == len(node.output)
                and min(target) > 0 and sum(target) == row)
    if len(target) < 2 or target[0] not in (0, -1) or 0 in target[1:] or min(target) < -1 or target[1:].count(-1) > 1:
        return False
    known = math.prod(n for n in target[1:] if n > 0)
    return known == row if -1 not in target[1:] else target[0] == 0 and row % known == 0


def view_shapes(node, source: tuple, initializers: dict[str, np.ndarray]) -> list[tuple]:
    """The shapes of a view's outputs, one behind the other in each row."""
    if node.op_type == "Identity":
        return [source]
    target = initializers[node.input[1]].tolist()
    if node.op_type == "Split":
        return [(source[0], width) for width in target]
    known = math.prod(n for n in target[1:] if n > 0)  # rows stay rows: only what follows the first dimension is divided anew
    return [(source[0], *(n if n > 0 else math.prod(source[1:]) // known for n in target[1:]))]
