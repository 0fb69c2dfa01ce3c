"""Lists of what a prompt reads, by a learnt gate: policies/prefill/seer_attention.py has the reference."""
import numpy as np

from edgeattn.kernels_cuda import compile, prefill_call
from edgeattn.kernels_cuda.steps import Launch

MATRICES = "prefill.gate_q", "prefill.gate_k", "prefill.gate_cos", "prefill.gate_sin"  # the last two: 0 where the model's tables serve
OWN = *MATRICES, "prefill.gate_q.width", "prefill.gate_cos.width", "threshold", "fraction"
ARGS = (*prefill_call.ARGS, *OWN, "pages")
FOR_PROMPTS = True        # launched where some sequence has lists
WORKSPACE_ROWS = "tokens"
ROWS = 8                  # of a tile


def _sizes(about: dict, places: int) -> list[int]:
    """Bytes of pooled keys and queries, and of what the gate makes of them."""
    heads, kv_heads, head_dim, width, pages = (int(about[name]) for name in (
        "num_heads", "kv_heads", "head_dim", "prefill.gate_q.width", "pages"))
    blocks = pages // 2 + places  # of two pages, the last one of a sequence of one
    sizes = blocks * kv_heads * 3 * head_dim, places * heads * head_dim, blocks * kv_heads * width, places * heads * width
    return [-(-4 * size // 256) * 256 for size in sizes]


def workspace_bytes(tensors, attributes, rows, threads) -> int:
    """attributes["pages"]: of all sequences that have lists, at most."""
    return sum(_sizes(attributes, prefill_call.most_blocks(rows)))


def launches(a: dict[str, int], most: dict) -> list[Launch]:
    prefill_call.check(a)
    (blocks, kv_heads, sequences), pages, heads = prefill_call.blocks_grid(a, most), prefill_call.pages_of(a, most), a["num_heads"]
    sizes, both = _sizes(a, prefill_call.most_blocks(most[a["q.rows"]])), -(-pages // 2)
    own = *(a["workspace"] + sum(sizes[:i]) for i in range(4)), *(a[name] for name in OWN), 0
    args = *prefill_call.choice_args(a), *(np.int64(x) for x in own)

    def launch(name, grid, threads, shared=0):
        kernel = compile.function("choose_by_gate", name, shared + prefill_call.STATIC if shared else 0)
        return Launch(kernel, grid, threads, args, shared, overlap=True)
    return [prefill_call.write(a, most), launch("pool_keys", (both, kv_heads, sequences), 128),
            launch("pool_queries", (blocks, heads, sequences), 128),
            launch("map_pools", (-(-max(both, blocks) // ROWS), kv_heads + heads, sequences), 128),
            launch("choose_by_gate", (blocks, kv_heads, sequences), prefill_call.THREADS, 4 * a["prefill.gate_q.width"] + 5 * pages)]
