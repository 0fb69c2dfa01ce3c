"""What an exported folder's weights are: formats, bytes, parameters, and how much of them one token reads."""
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from edgeattn.graph import attributes, read_graph
from edgeattn.ops import OPS

TABLES = ("cos", "sin")                # rotary tables are no parameters
ROWS = ("embedding", "embedding_nbits")  # read one row a token
PACKED = ("codes", "scales", "zero_points")


@dataclass
class Use:
    """One initializer: bytes, parameters it stands for, bytes a token reads of it, how its values are stored."""
    name: str
    bytes: int
    params: int
    token_bytes: int
    format: str


class Weights:
    """Every initializer of an export, by name, and the graph's nodes by operator."""

    def __init__(self, folder: Path):
        graph = read_graph(Path(folder))
        self.nodes = Counter(node.op_type for node in graph.proto.graph.node)
        self.uses: dict[str, Use] = {}
        for node in graph.proto.graph.node:
            for role, name in zip(_roles(node), node.input):
                if name in graph.initializers and graph.initializers[name].dtype != "int64":  # those are shapes
                    try:
                        self._add(node, role, name, graph.initializers[name])
                    except (LookupError, TypeError, ArithmeticError):
                        raise ValueError(f"{folder}: node {node.name[:80]!r} is not as exports have it; export the model again") from None
        self.bytes = sum(array.nbytes for array in graph.initializers.values())

    def _add(self, node, role, name, array):
        about = attributes(node)
        rows = about["N"] if role in PACKED and node.op_type in ROWS else array.shape[0] if array.ndim else 1
        one_row = role in TABLES or node.op_type in ROWS
        token_bytes = array.nbytes // rows if one_row else array.nbytes
        params = 0 if role in (*TABLES, "scales", "zero_points") else about["N"] * about["K"] if role == "codes" else array.size
        packed = "ternary" if "activation_bits" in about else f"int{about.get('bits')}/{about.get('block_size')}"
        kind = packed if role in PACKED else "table" if role in TABLES else str(array.dtype)
        use = self.uses.setdefault(name, Use(name, array.nbytes, params, 0, kind))
        use.token_bytes = max(use.token_bytes, token_bytes)  # a tied embedding is read whole, by the head

    @property
    def params(self) -> int:
        return sum(use.params for use in self.uses.values())

    @property
    def token_bytes(self) -> int:
        """Bytes of weights that one decoded token reads."""
        return sum(use.token_bytes for use in self.uses.values())

    def by_format(self) -> dict[str, tuple[int, int, int]]:
        """{format: (tensors, parameters, bytes)}, the largest first; codes and their scales count together."""
        found: dict[str, tuple[int, int, int]] = {}
        for use in self.uses.values():
            n, params, size = found.get(use.format, (0, 0, 0))
            found[use.format] = (n + bool(use.params), params + use.params, size + use.bytes)
        return dict(sorted(found.items(), key=lambda item: -item[1][2]))


def _roles(node):
    """What each input of a node is called; standard operators only carry plain weights."""
    op = OPS.get(node.op_type)
    return [name.rstrip("?") for name in op.inputs] if op else ["weight"] * len(node.input)
