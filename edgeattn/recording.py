"""Queries, keys and values of a model's own attention, recorded while it computes tokens, for what is fitted to them."""
import numpy as np

from edgeattn.reference.cached_attention import rotate


def record_queries(model, sequence, ids) -> np.ndarray:
    """[layers, heads, tokens, head_dim] float32: the rotated queries of tokens that are appended and computed, at most model.ubatch of them."""
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
