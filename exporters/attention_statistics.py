"""What changes of a layer's q, k and v cost its attention, on calibration text: see `quantisers/boa.py`.

For head h, with attention a_ij of token i to j, and rotary turning keys and queries to where they stand:
    q   metric  the covariance under a_i of the keys, turned by -i: the second derivative of the divergence of softmax
    k   metric  the mean over i of a_ij (1 - a_ij) q_i q_i^T, turned by -j
    v   metric  W_o^T W_o of the head's columns; hessian the mean of z^T z, z = a x
summed over the query heads that share a key head. Means are over every STEP-th token.
"""
import numpy as np

from edgeattn.exporters.checkpoint import Checkpoint
from edgeattn.exporters.decoder import Decoder
from edgeattn.exporters.forward import queries_keys_values
from edgeattn.exporters.quantisers import Head
from edgeattn.exporters.rope import tables
from edgeattn.reference.cached_attention import rotate

STEP = 8


class HeadSums:
    """Of one layer. add(x) for every sequence, then heads(hessian)."""

    def __init__(self, checkpoint: Checkpoint, decoder: Decoder, layer: int):
        self.checkpoint, self.decoder, self.layer, self.count = checkpoint, decoder, layer, 0
        d = decoder
        self.q, self.k = np.zeros((d.num_heads, d.head_dim, d.head_dim)), np.zeros((d.kv_heads, d.head_dim, d.head_dim))
        self.v = np.zeros((d.kv_heads, d.hidden_size, d.hidden_size), np.float32)

    def add(self, x: np.ndarray) -> None:
        """x [tokens, hidden_size]: what goes into q, k and v."""
        d, tokens = self.decoder, len(x)
        q, k, _ = queries_keys_values(self.checkpoint, d, self.layer, x)
        cos, sin = tables(d.frequencies, tokens)
        q, k = (rotate(part.reshape(tokens, -1, d.head_dim), cos, sin).swapaxes(0, 1) for part in (q, k))
        at = np.arange(STEP - 1, tokens, STEP)
        window = d.windows[self.layer] or tokens
        distance = np.arange(tokens)[:, None] - np.arange(tokens)
        hidden = (distance < 0) | (distance >= window)
        for h in range(d.num_heads):
            g = h * d.kv_heads // d.num_heads
            scores = q[h] @ k[g].T * np.float32(d.head_dim ** -0.5)
            scores[hidden] = -np.inf
            a = np.exp(scores - scores.max(1, keepdims=True))
            a /= a.sum(1, keepdims=True)
            for i in at:
                self.q[h] += _moment(_turned(k[g, :i + 1], cos[i], sin[i]), a[i, :i + 1], centred=True)
                self.k[g] += _moment(_turned(q[h, i:], cos[i], sin[i]), a[i:, i] * (1 - a[i:, i]))
            mixed = a[at] @ x
            self.v[g] += mixed.T @ mixed
        self.count += len(at)

    def heads(self, hessian: np.ndarray) -> tuple[Head, ...]:
        """Of the rows of qkv_proj; hessian: the mean of x^T x."""
        d, prefix = self.decoder, f"model.layers.{self.layer}.self_attn"
        o = self.checkpoint.weight(f"{prefix}.o_proj.weight", (d.hidden_size, d.num_heads * d.head_dim)).read(0, d.hidden_size)
        o = o.reshape(d.hidden_size, d.kv_heads, -1, d.head_dim).astype(np.float64)
        metrics = [self._before_norm("q", self.q), self._before_norm("k", self.k), np.einsum("ngha,nghb->gab", o, o)]
        found, start = [], 0
        for metric, own in zip((m for part in metrics for m in part), [None] * (d.num_heads + d.kv_heads) + list(self.v)):
            found.append(Head(start, start + d.head_dim, metric, hessian if own is None else own / np.float32(self.count)))
            start += d.head_dim
        return tuple(found)

    def _before_norm(self, name, metrics):
        """With norms of q and k the rows come before their gains; that the rest of the norm turns with them is left out."""
        if not self.decoder.qk_norm:
            return metrics
        gain = self.checkpoint.vector(f"model.layers.{self.layer}.self_attn.{name}_norm.weight", self.decoder.head_dim)
        return metrics * np.outer(gain, gain)


def _turned(x, cos, sin):
    """x [n, head_dim], turned back by one position."""
    return rotate(x[:, None], cos[None], -sin[None])[:, 0]


def _moment(x, weights, centred=False):
    mean = weights @ x if centred else 0
    return (x * weights[:, None]).T @ x - (np.outer(mean, mean) if centred else 0)
