"""Queries, keys and values of a real model, recorded while it reads a text, to fill caches of other shapes with.

Thresholds, recall and reuse mean nothing on random numbers: attention over those has no structure. Layers and heads of the other shape take
those of the model in turn; what lies behind the text's end is the text again, less its first page.
"""
import numpy as np

from edgeattn.cache.options import CacheOptions
from edgeattn.graph import attributes
from edgeattn.kernels_cpu import steps
from edgeattn.page_formats import PAGE
from edgeattn.reference.cached_attention import rotate
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
        model = Model.load(folder, cache=CacheOptions("f16", "f16"), ctx_size=tokens + count, sparse=SparseOptions("off"))
        ids = Tokenizer(folder).encode(text, special=False)
        if len(ids) < tokens + count:
            raise SystemExit(f"the text has {len(ids)} tokens, {tokens + count} are needed: give a longer one")
        sequence = model.new_sequence()
        model.forward([(sequence, ids[:tokens])], "none")
        layers, kv_heads = model.cache.shape
        pairs = [[model.cache.read(sequence, layer, head) for head in range(kv_heads)] for layer in range(layers)]
        k, v = (np.array([[pair[i] for pair in row] for row in pairs]).astype(np.float16) for i in range(2))
        shape = (layers, kv_heads, tokens // PAGE, PAGE, -1)
        self.keys, self.values = np.ascontiguousarray(k.reshape(shape).swapaxes(-1, -2)), v.reshape(shape)
        self.queries = np.stack([self._step(model, sequence, ids[tokens + i]) for i in range(count)])
        self.shape = layers, self.queries.shape[2], kv_heads, self.queries.shape[3]

    def _step(self, model, sequence, token):
        """[layers, heads, head_dim]: the rotated queries of one decode step."""
        found, batch, graph = [], model._batch, model.plan.graph
        nodes = iter([node for node in graph.proto.graph.node if node.op_type == "cached_attention"])
        model.cache.append(sequence, 1)
        batch.clear()
        batch.add(sequence, np.array([token]), np.array([0]))
        for step in model.plan.steps:
            if step.operator == "cached_attention":
                node = next(nodes)
                about, place = attributes(node), int(batch.positions[0])
                cos, sin = (graph.initializers[name][place:place + 1] for name in node.input[3:5])
                q = model.plan.view(node.input[0], batch.state).reshape(1, about["num_heads"], about["head_dim"])
                found.append(rotate(q, cos, sin, about["interleaved"])[0])
            steps.run(step.row.reshape(1, -1), batch.state)
        model.cache.settle(sequence, 1)
        return np.stack(found)

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
