"""What a node of a file's graph must be before it runs on kernels: they take addresses, and believe every shape and attribute.

A dimension of WANTED is an int, None for any, or the name of a run-time count. What is not one of a node's rows must be an initializer, and
what rows are looked up by must be the call's own input, whose numbers are known to be in range; those that columns are looked up by are
looked at.
"""
import math

from edgeattn.graph import attributes
from edgeattn.ops import OPS, PANEL

F32, F16, U8, I64 = ("float32",), ("float16",), ("uint8",), ("int64",)
LARGEST = 1 << 30
BLOCKS = (16, 32, 64, 128, 256)
# What else may be an attribute: {name: the values that are allowed}. Floats are finite.
ATTRIBUTES = {
    "bits": (1, 2, 3, 4, 8), "block_size": BLOCKS, "K": range(1, LARGEST), "N": range(1, LARGEST), "activation_bits": (4, 8),
    "input_major": (0, 1), "activation": ("silu", "gelu_tanh", "relu2"), "epsilon": float, "scale": float,
    "num_heads": range(1, 1 << 16), "kv_heads": range(1, 1 << 16), "head_dim": range(16, 4097, 16), "rotary_dim": range(16, 4097, 16),
    "interleaved": (0, 1), "window": range(LARGEST), "layer": range(1 << 16)}
OPTIONAL = {"epsilon", "input_major", "window", "interleaved"}
ROWS = ("x", "y", "q", "k", "v")                                # the inputs that are computed
CALLS = {"ids": "token_ids", "positions": "positions", "indices": "logit_rows"}  # the inputs that a call gives, by their names


def _panels(s, a, bias=False):
    if a["bits"] == 1 or a["bits"] == 3 and a["block_size"] < 32:
        raise ValueError(f"{a['bits']} bits in blocks of {a['block_size']}")
    panels, blocks = -(-a["N"] // PANEL), -(-a["K"] // a["block_size"])
    found = {"codes": ((panels, blocks, a["block_size"] * a["bits"] // 32, PANEL, 4), U8), "scales": ((panels, blocks, PANEL), F16),
             "zero_points": ((panels, blocks, PANEL), U8 + F16)}
    return found | ({"x": (("rows", a["K"]), F32), "bias": ((a["N"],), F32)} if bias else {"ids": (("tokens",), I64)})


def _ternary(s, a):
    if a["bits"] not in (1, 2) or a.get("input_major") and a["bits"] != 2 or a["K"] > 1 << 15:
        raise ValueError(f"ternary weights of {a['K']} inputs in {a['bits']} bits")
    panels, k = -(-a["N"] // PANEL), a["K"]
    codes = (-(-a["N"] // 256), -(-k // 16) * 16, 64) if a.get("input_major") else \
        (panels, -(-k // 128) * 8 if a["bits"] == 2 else -(-k // 40) * 2, PANEL, 4)
    return {"x": (("rows", k), F32), "codes": (codes, U8), "scales": ((a["N"],), F32), "bias": ((a["N"],), F32)}


def _attention(s, a):
    if a["num_heads"] % a["kv_heads"] or a["rotary_dim"] != a["head_dim"]:
        raise ValueError(f"{a['num_heads']} heads over {a['kv_heads']}, of {a['head_dim']} channels with {a['rotary_dim']} rotated")
    width, half = a["kv_heads"] * a["head_dim"], a["rotary_dim"] // 2
    return {"q": (("tokens", a["num_heads"] * a["head_dim"]), F32), "k": (("tokens", width), F32), "v": (("tokens", width), F32),
            "cos": ((s["cos"][0] if s["cos"] else 0, half), F32), "sin": ((s["cos"][0] if s["cos"] else 0, half), F32),
            "positions": (("tokens",), I64)}


WANTED = {
    "embedding": lambda s, a: {"ids": (("tokens",), I64), "weight": ((None, None), F32 + F16)},
    "embedding_nbits": _panels,
    "rms_normalization": lambda s, a: {"x": (("rows", *s["x"][1:]), F32), "weight": (s["x"][-1:], F32)},
    "add": lambda s, a: {"x": (("rows", *s["x"][1:]), F32), "y": (s["x"], F32)},
    "gather_rows": lambda s, a: {"x": (("tokens", None), F32), "indices": (("rows",), I64)},
    "gather_columns": lambda s, a: {"x": (("rows", None), F32), "order": ((None,), I64)},
    "linear": lambda s, a: {"x": (("rows", None), F32), "weight": ((None, *s["x"][1:]), F32 + F16), "bias": (s["weight"][:1], F32)},
    "matmul_nbits": lambda s, a: _panels(s, a, bias=True),
    "matmul_ternary": _ternary,
    "gated_activation": lambda s, a: {"x": (("rows", s["x"][-1] // 2 * 2), F32)},
    "cached_attention": _attention,
}


def check_node(graph, node, operator: str, values: dict, counts: tuple[str, ...]) -> None:
    """`check` of a node; values: what is computed before it, by name, each with shape and dtype. ValueError names the node."""
    tensors = {}
    for name, source in zip(OPS[operator].inputs, node.input):
        found = graph.initializers.get(source, values.get(source))
        if found is not None:
            tensors[name.rstrip("?")] = source, tuple(found.shape), str(found.dtype)
    try:
        check(operator, tensors, graph.initializers, attributes(node), counts)
        if operator == "gather_columns":
            _check_order(graph.initializers[tensors["order"][0]], tensors["x"][1][-1])
    except ValueError as error:
        raise ValueError(f"{graph.folder}: node {node.name[:80]!r} ({operator}) {error}; export the model again") from None


def check(operator: str, tensors: dict[str, tuple[str, tuple, str]], initializers, attributes: dict, counts: tuple[str, ...]) -> None:
    """Whether a kernel may run this node.

    tensors       {the operator's name of an input: (its name in the graph, shape, dtype)}, of those that are there
    initializers  the names of initializers
    counts        names of run-time counts: the first dimension of everything that is computed
    ValueError says what is wrong.
    """
    if operator not in WANTED:
        raise ValueError("is not an operator of exported graphs")
    for name in OPS[operator].attributes:
        if name not in OPTIONAL or name in attributes:
            _check_attribute(name, attributes.get(name))
    shapes = {name: shape for name, (_, shape, _) in tensors.items()}
    for name in OPS[operator].inputs:
        if name in ROWS and (name not in shapes or len(shapes[name]) < 2 or shapes[name][0] not in counts):
            raise ValueError(f"needs rows of numbers as {name}, got {shapes.get(name, 'nothing')}")
        shapes.setdefault(name.rstrip("?"), ())
    for name, (shape, types) in WANTED[operator](shapes, attributes).items():
        if name not in tensors:
            if f"{name}?" not in OPS[operator].inputs:
                raise ValueError(f"lacks its input {name}")
            continue
        source, found, dtype = tensors[name]
        if dtype not in types or not _fits(found, shape, name in ROWS):
            raise ValueError(f"needs {name} of shape {list(shape)} and type {' or '.join(types)}, got {list(found)} and {dtype}")
        if source != CALLS[name] if name in CALLS else name not in ROWS and source not in initializers:
            raise ValueError(f"needs {'the input ' + CALLS[name] if name in CALLS else 'an initializer'} as {name}, got {source!r}")


def _check_attribute(name, value):
    allowed = ATTRIBUTES[name]
    kind = allowed if isinstance(allowed, type) else type(allowed[0])
    if type(value) is not kind or not (math.isfinite(value) if kind is float else value in allowed):
        raise ValueError(f"has no valid attribute {name}, got {str(value)[:80]!r}")


def _check_order(order, width):
    if not order.size or order.min() < 0 or order.max() >= width:
        raise ValueError(f"needs columns from 0 to {width - 1} as order")


def _fits(found, wanted, rows):
    """Rows may be of any count where `wanted` begins with "rows"; which one, `check` has looked at."""
    if rows and wanted[0] == "rows":
        found, wanted = found[1:], wanted[1:]
    return len(found) == len(wanted) and all(b is None or a == b for a, b in zip(found, wanted))
