"""AWQ (arXiv 2306.00978): inputs that are large on calibration text get finer weights, by a scale that is moved into what comes before.

Column j of a matrix is multiplied by s[j] = magnitude[j]^alpha, and the norm or the projection that makes input j is divided by it: the
same model, no new operator. alpha is searched for every matrix, to minimise the error of its output; the rounding is `rtn`'s.
"""
from collections.abc import Callable

import numpy as np

from edgeattn.exporters.checkpoint import Checkpoint, Weight, concatenate
from edgeattn.exporters.decoder import Decoder
from edgeattn.exporters.quantisers import Statistics, dequantise
from edgeattn.exporters.quantisers.rtn import quantise  # once the scales are moved

NEEDS_STATISTICS = False  # `fold` has used them
ZERO_POINTS = None
ALPHAS = np.linspace(0, 1, 11)


class Folded:
    """A checkpoint with scales moved between its tensors; `columns`, `rows` and `vectors` are {tensor: factors}."""

    def __init__(self, source: Checkpoint):
        self._source, self.columns, self.rows, self.vectors = source, {}, {}, {}

    def __getattr__(self, name):
        return getattr(self._source, name)

    def weight(self, name: str, shape: tuple[int, int]) -> Weight:
        weight = self._source.weight(name, shape)
        columns, rows = self.columns.get(name, np.float32(1)), self.rows.get(name, np.ones(shape[0], np.float32))
        return Weight(shape, lambda start, stop: weight.read(start, stop) * columns * rows[start:stop, None])

    def vector(self, name: str, size: int) -> np.ndarray:
        return self._source.vector(name, size) * self.vectors.get(name, np.float32(1))


def fold(source: Checkpoint, decoder: Decoder, statistics: Callable[[str], Statistics], bits: Callable[[str], int],
         block_size: int) -> Folded:
    """The checkpoint, rescaled for weights of bits(initializer); statistics(initializer) is asked layer by layer."""
    d, out = decoder, Folded(source)
    q_width, kv_width = d.num_heads * d.head_dim, d.kv_heads * d.head_dim
    for layer in range(d.num_layers):
        prefix = f"model.layers.{layer}"
        attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"

        def search(stored, parts, width, share=1):
            read = concatenate([source.weight(f"{part}.weight", (rows, width)) for part, rows in parts.items()])
            name = f"{stored}.weight"
            scale = _search(read.read(0, read.shape[0]), statistics(name), bits(name), block_size, share, d.head_dim)
            out.columns |= {f"{part}.weight": scale for part in parts}
            return scale
        scale = search(f"{attention}.qkv_proj", {f"{attention}.{n}_proj": w for n, w in (("q", q_width), ("k", kv_width), ("v", kv_width))},
                       d.hidden_size)
        out.vectors[f"{prefix}.input_layernorm.weight"] = 1 / scale
        share = d.num_heads // d.kv_heads  # query heads that read one value head: their inputs of o must agree
        scale = search(f"{attention}.o_proj", {f"{attention}.o_proj": d.hidden_size}, q_width, share)
        if d.sub_norms:
            out.vectors[f"{attention}.attn_sub_norm.weight"] = 1 / scale
        else:
            _divide_rows(out, f"{attention}.v_proj", scale.reshape(d.kv_heads, share, d.head_dim)[:, 0].reshape(-1))
        scale = search(f"{mlp}.gate_up_proj", {f"{mlp}.{n}_proj": d.intermediate_size for n in ("gate", "up")}, d.hidden_size)
        out.vectors[f"{prefix}.post_attention_layernorm.weight"] = 1 / scale
        scale = search(f"{mlp}.down_proj", {f"{mlp}.down_proj": d.hidden_size}, d.intermediate_size)
        if d.sub_norms:
            out.vectors[f"{mlp}.ffn_sub_norm.weight"] = 1 / scale
        else:
            _divide_rows(out, f"{mlp}.up_proj", scale)
    return out


def _divide_rows(folded, name, scale):
    folded.rows[f"{name}.weight"] = folded.vectors[f"{name}.bias"] = 1 / scale


def _search(weight, statistics, bits, block_size, share, head_dim):
    """The scale [K] with the least error tr(D H D^T). With share > 1, that many neighbouring heads of K have one scale."""
    magnitude = statistics.magnitude.astype(np.float64)
    if share > 1:
        heads = magnitude.reshape(-1, share, head_dim)
        magnitude = np.broadcast_to(heads.mean(1, keepdims=True), heads.shape).reshape(-1)
    best, least = np.ones(len(magnitude), np.float32), np.inf
    for alpha in ALPHAS:
        scale = np.maximum(magnitude, 1e-4 * max(magnitude.max(), 1e-30)) ** alpha
        scale = (scale / np.sqrt(scale.max() * scale.min())).astype(np.float32)
        codes = quantise(weight * scale, bits, block_size)
        change = dequantise(*codes, bits)[:, :weight.shape[1]] / scale - weight
        loss = np.einsum("ij,ij->", change @ statistics.hessian, change)
        if loss < least:
            best, least = scale, loss
    return best
