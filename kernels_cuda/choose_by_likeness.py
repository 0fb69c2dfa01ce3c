"""Lists of what a prompt reads, by mean keys and queries where these speak for their tokens: policies/prefill/sparge_attn.py has the
reference."""
import numpy as np

from edgeattn.kernels_cuda import compile, prefill_call
from edgeattn.kernels_cuda.steps import Launch

OWN = "prefill.sparge_attn", "similarity", "part", "fraction"
ARGS = (*prefill_call.ARGS, *OWN, "pages", "trusts")  # trusts: whether every mean speaks for its tokens, where heads are not calibrated
FOR_PROMPTS = True        # launched where some sequence has lists
WORKSPACE_ROWS = "tokens"


def _sizes(kv_heads: int, head_dim: int, places: int, pages: int) -> list[int]:
    """Bytes of means of pages, means of all keys, and likeness."""
    sizes = 4 * pages * kv_heads * head_dim, 4 * places * kv_heads * head_dim, 4 * pages * kv_heads
    return [-(-size // 256) * 256 for size in sizes]


def workspace_bytes(tensors, attributes, rows, threads) -> int:
    """attributes["pages"]: of all sequences that have lists, at most."""
    kv_heads, head_dim, pages = (int(attributes[name]) for name in ("kv_heads", "head_dim", "pages"))
    return sum(_sizes(kv_heads, head_dim, prefill_call.most_blocks(rows), pages))


def launches(a: dict[str, int], most: dict) -> list[Launch]:
    prefill_call.check(a)
    (blocks, kv_heads, sequences), pages = prefill_call.blocks_grid(a, most), prefill_call.pages_of(a, most)
    sizes = _sizes(kv_heads, a["head_dim"], prefill_call.most_blocks(most[a["q.rows"]]), a["pages"])
    means, centers, likeness = (a["workspace"] + sum(sizes[:i]) for i in range(3))
    asked = a["prefill.sparge_attn"] or not a["trusts"]
    own = *prefill_call.choice_args(a), *(np.int64(x) for x in (means, centers, likeness if asked else 0, a["pages"]))

    def launch(name, grid, threads, *last, shared=0):
        kernel = compile.function("choose_by_likeness", name, shared + prefill_call.STATIC if shared else 0)
        return Launch(kernel, grid, threads, (*own, *(np.int64(x) for x in last)), shared, overlap=True)
    tell = [launch("center_keys", (-(-a["head_dim"] // 32), kv_heads, sequences), 256, 0),
            launch("page_likeness", (pages, kv_heads, sequences), 128, 0)] if asked else []
    return [prefill_call.write(a, most), prefill_call.mean_keys(a, most, means), *tell,
            launch("choose_by_likeness", (blocks, kv_heads, sequences), prefill_call.THREADS, *(a[name] for name in OWN), shared=5 * pages)]
