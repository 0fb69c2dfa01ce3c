"""A checkpoint run in NumPy, straight from its safetensors and apart from our graph: what an export is checked against."""
from collections.abc import Callable, Iterator

import numpy as np

from edgeattn.exporters.checkpoint import Checkpoint
from edgeattn.exporters.decoder import Decoder
from edgeattn.exporters.rope import tables
from edgeattn.reference.cached_attention import cached_attention
from edgeattn.reference.matmul_ternary import quantise_tokens
from edgeattn.reference.rms_normalization import rms_normalization

SLAB_BYTES = 4 << 20  # of float32 weights in memory at a time


def forward(checkpoint: Checkpoint, decoder: Decoder, tokens: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """tokens [n] int64 -> (node name, hidden [n, hidden_size]) after every sum into the hidden state, then ("head", logits [n, vocab])."""
    d, hidden = decoder, embed(checkpoint, decoder, tokens)
    yield "embedding", hidden
    for layer in range(d.num_layers):
        for name, hidden in run_layer(checkpoint, d, layer, hidden):
            yield name, hidden
    yield "head", head(checkpoint, d, hidden)


def embed(checkpoint: Checkpoint, decoder: Decoder, tokens: np.ndarray) -> np.ndarray:
    """tokens [n] int64 -> hidden [n, hidden_size] float32."""
    table = checkpoint.weight("model.embed_tokens.weight", (decoder.vocab_size, decoder.hidden_size))
    return np.concatenate([table.read(int(t), int(t) + 1) for t in tokens])


def head(checkpoint: Checkpoint, decoder: Decoder, hidden: np.ndarray) -> np.ndarray:
    """hidden [n, hidden_size] after the last layer -> logits [n, vocab] float32."""
    table = "model.embed_tokens" if decoder.tied else "lm_head"
    return _linear(checkpoint, table, _norm(checkpoint, decoder, hidden, "model.norm"), decoder.vocab_size, False)


def run_layer(checkpoint: Checkpoint, decoder: Decoder, layer: int, hidden: np.ndarray,
              observe: Callable[[str, np.ndarray], None] | None = None) -> Iterator[tuple[str, np.ndarray]]:
    """One layer's part of `forward`. observe(matrix, x [n, K]) sees what goes into every matrix, named as in the checkpoint."""
    prefix, observe = f"model.layers.{layer}", observe or (lambda *_: None)
    x = _norm(checkpoint, decoder, hidden, f"{prefix}.input_layernorm")
    hidden = hidden + _attention(checkpoint, decoder, layer, x, observe)
    yield f"layers.{layer}.attention_add", hidden
    x = _norm(checkpoint, decoder, hidden, f"{prefix}.post_attention_layernorm")
    hidden = hidden + _mlp(checkpoint, decoder, f"{prefix}.mlp", x, observe)
    yield f"layers.{layer}.mlp_add", hidden


def queries_keys_values(checkpoint: Checkpoint, d: Decoder, layer: int, x: np.ndarray,
                        observe: Callable[[str, np.ndarray], None] | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x [n, hidden_size] after its norm -> q, k and v [n, heads * head_dim], before rotary."""
    prefix = f"model.layers.{layer}.self_attn"
    q, k, v = (_linear(checkpoint, f"{prefix}.{name}_proj", x, heads * d.head_dim, d.qkv_bias, observe)
               for name, heads in (("q", d.num_heads), ("k", d.kv_heads), ("v", d.kv_heads)))
    if d.qk_norm:
        q, k = (_norm(checkpoint, d, part.reshape(len(x), -1, d.head_dim), f"{prefix}.{name}_norm").reshape(len(x), -1)
                for name, part in (("q", q), ("k", k)))
    return q, k, v


def _attention(checkpoint, d, layer, x, observe):
    prefix, tokens = f"model.layers.{layer}.self_attn", len(x)
    q, k, v = queries_keys_values(checkpoint, d, layer, x, observe)
    empty = np.zeros((d.kv_heads, 0, d.head_dim), np.float32)
    out, _, _ = cached_attention(q, k, v, *tables(d.frequencies, tokens), empty, empty, np.arange(tokens), num_heads=d.num_heads,
                                 kv_heads=d.kv_heads, head_dim=d.head_dim, rotary_dim=d.head_dim, scale=d.head_dim ** -0.5,
                                 window=d.windows[layer])
    if d.sub_norms:
        out = _norm(checkpoint, d, out, f"{prefix}.attn_sub_norm")
    if d.sparse_attention_output:
        out = np.where(np.abs(out) >= np.sort(np.abs(out))[:, -(out.shape[1] // 2), None], out, np.float32(0))
    return _linear(checkpoint, f"{prefix}.o_proj", out, d.hidden_size, d.o_bias, observe)


def _mlp(checkpoint, d, prefix, x, observe):
    gate, up = (_linear(checkpoint, f"{prefix}.{name}_proj", x, d.intermediate_size, d.mlp_bias, observe)
                for name in ("gate", "up"))
    if d.activation == "relu2":
        x = np.square(np.maximum(gate, 0)) * up
    else:
        with np.errstate(over="ignore"):  # exp of a very negative gate's opposite: the quotient is right, zero
            x = gate / (1 + np.exp(-gate)) * up
    if d.sub_norms:
        x = _norm(checkpoint, d, x, f"{prefix}.ffn_sub_norm")
    return _linear(checkpoint, f"{prefix}.down_proj", x, d.hidden_size, d.mlp_bias, observe)


def _norm(checkpoint, d, x, name):
    return rms_normalization(x, checkpoint.vector(f"{name}.weight", x.shape[-1]), epsilon=d.epsilon)


def _linear(checkpoint, name, x, size, biased, observe=None):
    if observe:
        observe(name, x)
    weight = checkpoint.weight(f"{name}.weight", (size, x.shape[1]))
    step = max(SLAB_BYTES // (4 * x.shape[1]), 1)
    if weight.ternary:  # the rounding of what goes in is part of the model
        rounded, factor = quantise_tokens(x, weight.ternary.activation_bits)
        x = rounded / factor
    out = np.concatenate([x @ weight.read(start, min(start + step, size)).T for start in range(0, size, step)], axis=1)
    return out + checkpoint.vector(f"{name}.bias", size) if biased else out
