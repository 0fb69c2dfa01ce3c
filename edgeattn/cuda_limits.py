"""What does not run on a GPU yet, in one line each, before anything is loaded. The CPU has all of it."""
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module

from edgeattn.cache.budget import CachePlan
from edgeattn.cache.options import RELEASING, CacheOptions, evictions
from edgeattn.graph import attributes
from edgeattn.kernels_cuda import matmul_ternary, prefill_call
from edgeattn.kernels_cuda.attention_call import HEADS
from edgeattn.kernels_cuda.cached_attention import DEPTHS, MOST_DEPTH, most_rows, takes_fragments
from edgeattn.kernels_cuda.page_pool import HALVES, kinds_of
from edgeattn.kernels_cuda.select_pages import MOST_PAGES, SCORES
from edgeattn.ops import DOMAIN, OPS
from edgeattn.page_formats import PAGE
from edgeattn.policies import load_policy, policy_names
from edgeattn.views import VIEWS

STANDARD = {op.onnx for op in OPS.values() if op.onnx} | set(VIEWS)  # nodes of ONNX's own domain


@dataclass(frozen=True)
class Pages:
    """What kernels look at of the pages of a head.

    kinds  one of page_pool.py's; count: of a page list at most; rotated: whether keys are
    """
    head_dim: int = 64
    kinds: int = HALVES
    count: int = 0
    rotated: bool = False


def decode_refusal(policy, heads: int = 1, kv_heads: int = 1, pages: Pages = Pages()) -> str:
    """Why a decode policy's page selection cannot run there."""
    layer = next((i for i, source in enumerate(policy.sources(8)) if source == i), 7)
    scores = {about.get("score") for name, about in policy.operators(layer)}
    if not scores <= set(SCORES):
        return "the GPU's kernels do not score pages in this way yet"
    if pages.rotated and policy.index in ("components", "collisions"):
        return "the GPU's kernels multiply rotated keys with queries alone"
    return _sizes_refusal(heads, kv_heads, pages, MOST_PAGES)


def prefill_refusal(policy, correction: str | None = None, heads: int = 1, kv_heads: int = 1, pages: Pages = Pages()) -> str:
    """Why what a prefill policy chooses cannot be found there, or not be corrected."""
    kernels = [import_module(f"edgeattn.kernels_cuda.{name}") for name, _ in policy.operators()]
    if not kernels:
        return "the GPU has no kernels that choose in this way yet"
    if why := _sizes_refusal(heads, kv_heads, pages, prefill_call.MOST_PAGES):
        return why
    if pages.rotated and not all(getattr(kernel, "ROTATED", True) for kernel in kernels):
        return "the GPU's kernels that choose in this way read keys that are not rotated"
    found = [_pages_refusal("that choose in this way", pages, kernel.HEAD_DIMS, kernel.FRAGMENTS)
             for kernel in kernels if hasattr(kernel, "HEAD_DIMS")]
    if (correction := correction or policy.correction) != "none":
        found.append(_pages_refusal(f"of --prefill-correction {correction}", pages, DEPTHS, True))
    return next(filter(None, found), "")


def _pages_refusal(what, pages, depths, fragments):
    """fragments: whether tensor cores read the cache's pages as they are."""
    if pages.head_dim not in depths:
        return f"the GPU's kernels {what} take heads of {' or '.join(map(str, depths))} channels, this model's have {pages.head_dim}"
    if fragments and not takes_fragments(pages.kinds, pages.rotated):
        return f"the GPU's kernels {what} read caches of f16, or of codes for keys and values both"
    if not fragments and pages.rotated:
        return f"the GPU's kernels {what} read keys that are not rotated"
    return ""


def _heads_refusal(heads, kv_heads):
    return f"the GPU's kernels take {HEADS} query heads a KV head at most" if heads > HEADS * kv_heads else ""


def _sizes_refusal(heads, kv_heads, pages, most):
    if why := _heads_refusal(heads, kv_heads):
        return why
    return f"the GPU's kernels choose among {most * PAGE:,} tokens at most, the cache may hold {pages.count * PAGE:,}" \
        if pages.count > most else ""


def asked_refusal(sparse, prefill) -> str:
    """Why what is asked for by name (SparseOptions, PrefillOptions) cannot run there, whatever the model."""
    for flag, asked, refusal in (("--sparse-attention", sparse, decode_refusal),
                                 ("--sparse-prefill", prefill, lambda policy: prefill_refusal(policy, prefill.correction))):
        policy = None if asked.method == "auto" else asked.policy()
        if why := policy and refusal(policy):
            return f"{flag} {asked.method}: {why}: use {flag} off"
    return ""


def check(options: CacheOptions, about: dict, nodes: Iterable = ()) -> None:
    """ValueError: a model (edgeattn.json's "model", the nodes of its graph) or a cache that cannot be on the GPU."""
    progressive = options.progressive and _heads_refusal(about["num_heads"], about["kv_heads"])
    for why in (model_refusal(about, nodes), progressive and f"--kv-progressive: {progressive}: leave it out"):
        if why:
            raise ValueError(why)


def gives_way(options: CacheOptions, sparse, prefill, about: dict, plan: CachePlan) -> tuple[str, str]:
    """What the user chose (CacheOptions, their types settled, SparseOptions, PrefillOptions), and the cache's plan -> why sparse decode
    steps and sparse prompts give way, if they were not asked for by name. ValueError: chunks that are too long."""
    heads, kv_heads = about["num_heads"], about["kv_heads"]
    rotated = options.quantised and options.storage_policy().rotated
    pages = Pages(about["head_dim"], kinds_of(plan.formats), plan.max_pages, rotated)
    if plan.chunk > (most := most_rows(heads, kv_heads, pages.head_dim, pages.kinds, rotated)):
        raise ValueError(f"--ubatch-size {plan.chunk} is too large for this model's {kv_heads} KV heads on the GPU: choose {most} at most")
    policy = sparse.policy()
    dense = decode_refusal(policy, heads, kv_heads, pages) if policy else ""
    policy = prefill.policy()
    return dense, prefill_refusal(policy, prefill.correction, heads, kv_heads, pages) if policy else ""


def model_refusal(about: dict, nodes: Iterable = ()) -> str:
    """Why a model of these sizes (edgeattn.json's "model"), with these nodes, cannot run there."""
    if about["head_dim"] > MOST_DEPTH:
        return f"this model's heads have {about['head_dim']} channels, the GPU's kernels take {MOST_DEPTH} at most: use --device cpu"
    for node in nodes:
        if node.domain == DOMAIN and node.op_type == "matmul_ternary" and (why := matmul_ternary.refusal(attributes(node))):
            return why
        if node.domain != DOMAIN and (node.domain or node.op_type not in STANDARD):
            return f"the GPU has no kernel for this model's {node.op_type}: use --device cpu"
    return ""


def matrix_lines() -> list[str]:
    """What runs on the GPU, for people."""
    works, reads = ([name for name in policy_names(kind) if not refusal(load_policy(kind, name))]
                    for kind, refusal in (("decode", decode_refusal), ("prefill", prefill_refusal)))
    return [f"--device cuda: --kv-storage {' '.join(policy_names('storage'))} --kv-heads none {' '.join(policy_names('heads'))} "
            f"--kv-eviction none {' '.join(evictions())} {RELEASING}, any -ctk and -ctv, --kv-progressive",
            f"--device cuda: --sparse-attention off {' '.join(works)}; --sparse-prefill off {' '.join(reads)}, each with "
            "--prefill-correction tail and delta",
            "all other methods are refused there before a model is loaded"]
