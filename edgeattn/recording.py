"""Queries, keys and values of a model's own attention, recorded while it computes tokens, for what is fitted to them."""
from dataclasses import dataclass

import numpy as np

from edgeattn.reference.cached_attention import rotate


def record_queries(model, sequence, ids) -> np.ndarray:
    """[layers, heads, tokens, head_dim] float32: rotated queries of tokens that are appended and computed, at most model.ubatch of them."""
    found = []

    def note(layer):
        tensors, about = model.attention_inputs(layer)
        places = np.arange(sequence.length - len(ids), sequence.length)
        cos, sin = (tensors[name][places, :about["rotary_dim"] // 2] for name in ("cos", "sin"))
        q = tensors["q"].reshape(len(ids), about["num_heads"], about["head_dim"])
        found.append(rotate(q, cos, sin, about["interleaved"]).swapaxes(0, 1))
    model.compute(sequence, ids, note)
    model.cache.settle(sequence, len(ids))
    return np.stack(found)


@dataclass(frozen=True)
class Chunk:
    """
    q     [layers, heads, n, head_dim] float32, rotated: the last n tokens of a prompt
    k, v  [layers, kv_heads, m, head_dim] float16: all its tokens, those too; keys rotated
    """
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray

    def group(self, layer: int, head: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(q [group, n, head_dim], k, v [1, m, head_dim]) float32 of one KV head."""
        group = self.q.shape[1] // self.k.shape[1]
        return self.q[layer, head * group:(head + 1) * group], *(x[layer, head:head + 1].astype(np.float32) for x in (self.k, self.v))


def record_chunk(model, ids) -> Chunk:
    """Of the end of a prompt that is read whole: model.ubatch tokens, or half of it if that is less."""
    sequence, size = model.new_sequence(), min(model.ubatch, len(ids) // 2)
    try:
        model.forward([(sequence, ids[:-size])], "none")
        return Chunk(record_queries(model, sequence, ids[-size:]), *(x.astype(np.float16) for x in held(model, sequence)))
    finally:
        model.free(sequence)


def held(model, sequence) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values in the cache, [layers, kv_heads, tokens, head_dim] float32, keys rotated."""
    layers, kv_heads = model.cache.shape
    pairs = [[model.cache.read(sequence, layer, head) for head in range(kv_heads)] for layer in range(layers)]
    return tuple(np.array([[pair[i] for pair in row] for row in pairs], np.float32) for i in range(2))
