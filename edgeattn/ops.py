"""The operator table: one name for the ONNX node, the reference, the CPU kernel and the CUDA kernel."""
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

from edgeattn.page_formats import PAGE, PageFormat

DOMAIN = "edgeattn"  # ONNX domain of our own operators
PANEL = 16           # outputs that one panel of block-quantised weights holds


@dataclass(frozen=True)
class Op:
    """`shapes` maps {input: shape} and attributes to {output: shape}; a dimension is an int or the name of a run-time
    count ("tokens", "rows")."""
    name: str                     # file name and function name everywhere; the op_type of nodes in our domain
    inputs: tuple[str, ...]       # in call order; a trailing "?" marks an optional one
    outputs: tuple[str, ...]
    attributes: tuple[str, ...]
    shapes: Callable[[dict, dict], dict]
    onnx: str = ""                # op_type in the standard domain, for operators that ONNX already has


def _same(name):
    return lambda s, a: {"out": s[name]}


def _cached_attention(s, a):
    return {"out": s["q"]}


def _seal_pages(s, a):
    f, n = _page_format(s["k"][1], a), s["k"][0]
    return {"k_codes": (n, f.k_bytes), "k_params": (n, f.k_params), "v_codes": (n, f.v_bytes), "v_params": (n, f.v_params)}


def _of_blocks(output):
    """For each head, block of 64 queries and page."""
    return lambda s, a: {output: (s["q"][0], -(-s["q"][1] // 64), -(-s["k"][1] // PAGE))}


def _page_format(head_dim, a):
    return PageFormat(head_dim, a["k_type"], a["v_type"], a.get("k_axis", "channel"), bool(a.get("one_group")), bool(a.get("separated")),
                      gate=a.get("gate", 16))


_FORMAT = ("k_type", "v_type", "k_axis", "one_group", "separated", "gate")


OPS = {op.name: op for op in (
    Op("embedding", ("ids", "weight"), ("out",), (), lambda s, a: {"out": (*s["ids"], s["weight"][1])}),
    Op("embedding_nbits", ("ids", "codes", "scales", "zero_points?"), ("out",), ("bits", "block_size", "K", "N"),
       lambda s, a: {"out": (*s["ids"], a["K"])}),
    Op("rms_normalization", ("x", "weight"), ("out",), ("epsilon",), _same("x"), onnx="RMSNormalization"),
    Op("add", ("x", "y"), ("out",), (), _same("x"), onnx="Add"),
    Op("gather_rows", ("x", "indices"), ("out",), (), lambda s, a: {"out": (*s["indices"], *s["x"][1:])}, onnx="Gather"),
    Op("gather_columns", ("x", "order"), ("out",), (), lambda s, a: {"out": (*s["x"][:-1], *s["order"])}, onnx="Gather"),
    Op("linear", ("x", "weight", "bias?"), ("out",), (), lambda s, a: {"out": (*s["x"][:-1], s["weight"][0])}),
    Op("matmul_nbits", ("x", "codes", "scales", "zero_points?", "bias?"), ("out",), ("bits", "block_size", "K", "N"),
       lambda s, a: {"out": (*s["x"][:-1], a["N"])}),
    Op("matmul_ternary", ("x", "codes", "scales", "bias?"), ("out",), ("bits", "activation_bits", "K", "N", "input_major"),
       lambda s, a: {"out": (*s["x"][:-1], a["N"])}),
    Op("gated_activation", ("x",), ("out",), ("activation",), lambda s, a: {"out": (*s["x"][:-1], s["x"][-1] // 2)}),
    Op("cached_attention", ("q", "k", "v", "cos", "sin", "past_key", "past_value", "positions"),
       ("out", "present_key", "present_value"),
       ("num_heads", "kv_heads", "head_dim", "rotary_dim", "interleaved", "scale", "window", "layer"), _cached_attention),
    Op("select_pages", ("q", "cos", "sin", "past_key", "positions", "components?"), ("pages", "counts"),
       ("num_heads", "kv_heads", "head_dim", "rotary_dim", "interleaved", "scale", "layer", "capacity", "share", "score", "combine",
        "budget", "fraction", "recent", "reach", "block", "blocks", "rank", "tables", "bits"),
       lambda s, a: {"pages": (a["kv_heads"], a["capacity"]), "counts": (a["kv_heads"],)}),
    Op("seal_pages", ("k", "v"), ("k_codes", "k_params", "v_codes", "v_params"), (*_FORMAT, "threshold", "refresh"), _seal_pages),
    Op("read_pages", ("k_codes", "k_params", "v_codes", "v_params"), ("k", "v"), ("head_dim", *_FORMAT),
       lambda s, a: {"k": (s["k_codes"][0], a["head_dim"], PAGE), "v": (s["k_codes"][0], PAGE, a["head_dim"])}),
    Op("antidiagonal_weights", ("q", "k", "mean"), ("weights",), ("scale", "stride"), _of_blocks("weights")),
    Op("score_excess", ("q", "k", "q_mean", "k_mean", "limits"), ("excess",), ("scale", "bits"), _of_blocks("excess")),
    Op("sample", ("logits", "history"), ("token",),
       ("temperature", "top_k", "top_p", "min_p", "repeat_penalty", "uniform"), lambda s, a: {"token": (1,)}),
)}


def load_kernel(name: str, device: str) -> Callable:
    """The function that runs operator `name` on "cpu", "cuda" or "reference"; ValueError when there is no such operator."""
    if name not in OPS:
        raise ValueError(f"unknown operator {name!r}; known operators: {sorted(OPS)}")
    folder = "reference" if device == "reference" else f"kernels_{device}"
    return getattr(import_module(f"edgeattn.{folder}.{name}"), name)
