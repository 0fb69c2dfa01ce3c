"""Queries, keys and values of a real model, recorded while it reads a text, to fill caches of other shapes with.

Thresholds, recall and reuse mean nothing on random numbers: attention over those has no structure. Layers and heads of the other shape take
those of the model in turn; what lies behind the text's end is the text again, less its first page.
"""
import numpy as np

from edgeattn.cache.options import CacheOptions
from edgeattn.graph import attributes
from edgeattn.page_formats import PAGE
from edgeattn.prefill_scheduler import PrefillOptions
from edgeattn.recording import held, record_queries
from edgeattn.runtime import Model
from edgeattn.scheduler import SparseOptions
from edgeattn.tokenizer import Tokenizer


class Recorded:
    """
    keys, values  [layers, kv_heads, pages, head_dim, 32], [layers, kv_heads, pages, 32, head_dim] float16, keys rotated
    queries       [steps, layers, heads, head_dim] float32, rotated, of decode steps behind the last key
    shape         (layers, heads, kv_heads, head_dim)
    """

    def __init__(self, folder, text: str, tokens: int = 7168, count: int = 32):
        model = Model.load(folder, cache=CacheOptions("f16", "f16"), ctx_size=tokens + count, sparse=SparseOptions("off"),
                           prefill=PrefillOptions("off"))
        ids = Tokenizer(folder).encode(text, special=False)
        if len(ids) < tokens + count:
            raise SystemExit(f"the text has {len(ids)} tokens, {tokens + count} are needed: give a longer one")
        sequence = model.new_sequence()
        model.forward([(sequence, ids[:tokens])], "none")
        layers, kv_heads = model.cache.shape
        k, v = (x.astype(np.float16) for x in held(model, sequence))
        shape = (layers, kv_heads, tokens // PAGE, PAGE, -1)
        self.keys, self.values = np.ascontiguousarray(k.reshape(shape).swapaxes(-1, -2)), v.reshape(shape)
        self.queries = np.stack([record_queries(model, sequence, ids[tokens + i:tokens + i + 1])[:, :, 0] for i in range(count)])
        self.shape = layers, self.queries.shape[2], kv_heads, self.queries.shape[3]

    def source(self, layer: int, head: int, first: int, pages: int):
        """As attention_case.fill wants it."""
        layers, kv_heads, count = self.keys.shape[:3]
        where = np.arange(first, first + pages)
        where = np.where(where < count, where, 1 + (where - 1) % (count - 1))
        return self.keys[layer % layers, head % kv_heads, where], self.values[layer % layers, head % kv_heads, where]

    def query(self, step: int, shape) -> np.ndarray:
        """[layers, 1, heads * head_dim] for a shape (layers, heads, kv_heads, head_dim)."""
        layers, heads, kv_heads, head_dim = shape
        group, own = heads // kv_heads, self.queries.shape[2] // self.keys.shape[1]
        h = np.arange(heads)
        source = h // group % self.keys.shape[1] * own + h % group % own
        q = self.queries[step % len(self.queries)][np.arange(layers) % self.queries.shape[1]][:, source]
        return np.ascontiguousarray(q.reshape(layers, 1, heads * head_dim))


def record_chunks(folder, text: str, depths, size: int = 512, threads: int | None = None):
    """(q [layers, heads, size, head_dim], k, v [layers, kv_heads, depth, head_dim], scale) of the chunk of a prompt that ends at each
    depth, float32, keys and values as a 16-bit cache holds them; the model reads everything."""
    depths = sorted(depths)
    if any(b - a < size for a, b in zip([0, *depths], depths)):
        raise SystemExit(f"depths must be at least {size} apart, and the first {size} or more, got {depths}")
    model = Model.load(folder, cache=CacheOptions("f16", "f16"), ctx_size=depths[-1], ubatch=size, threads=threads,
                       sparse=SparseOptions("off"), prefill=PrefillOptions("off"))
    ids = Tokenizer(folder).encode(text, special=False)
    if len(ids) < depths[-1] or model.ctx_size < depths[-1]:
        raise SystemExit(f"{depths[-1]} tokens are needed: the text has {len(ids)}, the export takes {model.ctx_size}")
    nodes = [attributes(node) for node in model.plan.graph.proto.graph.node if node.op_type == "cached_attention"]
    if any(node["window"] for node in nodes):
        raise SystemExit(f"{folder}: this model has sliding windows, beside which nothing is measured here")
    sequence = model.new_sequence()
    for depth in depths:
        if depth - size > sequence.length:
            model.forward([(sequence, ids[sequence.length:depth - size])], "none")
        yield record_queries(model, sequence, ids[depth - size:depth]), *held(model, sequence), nodes[0]["scale"]
