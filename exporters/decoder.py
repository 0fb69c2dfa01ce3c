"""The decoder that every family here is: what may differ (`Decoder`), and its graph (`build`)."""
from dataclasses import dataclass

import numpy as np
from onnx import TensorProto

from edgeattn.exporters.checkpoint import Checkpoint
from edgeattn.exporters.graph import Graph, tensor_info
from edgeattn.exporters.rope import inverse_frequencies, tables
from edgeattn.exporters.weights import Formats

REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
HEAD_STEP = 16  # attention kernels read and write heads in whole vectors of up to this many floats


@dataclass(frozen=True)
class Decoder:
    """A pre-norm decoder with rotary grouped-query attention and a gated MLP."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    kv_heads: int
    head_dim: int
    epsilon: float
    max_position: int
    frequencies: np.ndarray     # [head_dim / 2] float64, radians per position
    tied: bool                  # the head is the embedding
    windows: tuple[int, ...]    # of each layer; 0 sees everything
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    activation: str = "silu"    # of the MLP's gate; "relu2" is max(gate, 0) ** 2
    sub_norms: bool = False     # a norm before each layer's o and down projection
    sparse_attention_output: bool = False  # only the larger half of every token's input of o is kept (BitNet a4.8)

    @property
    def window(self) -> int:
        """The window of the whole model: 0 when any layer sees everything."""
        return 0 if 0 in self.windows else max(self.windows)


def read_decoder(config: dict, *, windows: tuple[int, ...] | None = None, qkv_bias: bool = False, o_bias: bool = False,
                 mlp_bias: bool = False, qk_norm: bool = False, activation: str = "silu", sub_norms: bool = False,
                 sparse_attention_output: bool = False) -> Decoder:
    """The sizes that all families name alike, and what the family says differs. ValueError names what is not supported."""
    missing = [key for key in REQUIRED if not config.get(key)]
    if missing:
        raise ValueError(f"config.json lacks {missing}")
    if config.get("hidden_act", activation) != activation:
        raise ValueError(f"hidden_act {config['hidden_act']!r} is not supported; supported: [{activation!r}]")
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    kv_heads = config.get("num_key_value_heads") or heads
    if heads % kv_heads:
        raise ValueError(f"num_attention_heads must be a multiple of num_key_value_heads {kv_heads}, got {heads}")
    if head_dim % HEAD_STEP:
        raise ValueError(f"head_dim must be a multiple of {HEAD_STEP}, got {head_dim}; models with other heads are not supported")
    layers = config["num_hidden_layers"]
    return Decoder(config["vocab_size"], config["hidden_size"], config["intermediate_size"], layers, heads, kv_heads, head_dim,
                   config.get("rms_norm_eps", 1e-6), config["max_position_embeddings"], inverse_frequencies(config, head_dim),
                   bool(config.get("tie_word_embeddings", False)), windows or (0,) * layers, bool(qkv_bias), bool(o_bias),
                   bool(mlp_bias), qk_norm, activation, sub_norms, sparse_attention_output)


def build(decoder: Decoder, checkpoint: Checkpoint, formats: Formats, ctx_size: int) -> Graph:
    """The graph of the whole model. Every tensor is looked up now, so that a missing one is found before anything is written."""
    return _Builder(decoder, checkpoint, formats, ctx_size).build()


class _Builder:
    def __init__(self, decoder, checkpoint, formats, ctx_size):
        self.decoder, self.checkpoint, self.formats = decoder, checkpoint, formats
        self.graph = Graph()
        self.cos, self.sin = (self.graph.value(name, table)
                              for name, table in zip(("cos_table", "sin_table"), tables(decoder.frequencies, ctx_size)))

    def build(self):
        d, graph = self.decoder, self.graph
        self._declare()
        table = self._table("model.embed_tokens")
        hidden = table.embed(graph, "embedding", "token_ids")
        for layer in range(d.num_layers):
            hidden = self._layer(layer, hidden)
        rows = graph.add("Gather", "logit_rows_gather", [hidden, "logit_rows"], {"axis": 0}, domain="")
        last = self._norm("norm", rows, "model.norm.weight", d.hidden_size)
        if not d.tied:
            table = self._table("lm_head")
        table.project(graph, "head", last, outputs=["logits"])
        return graph

    def _table(self, name):
        d = self.decoder
        return self.formats.store(self.graph, f"{name}.weight", self._weights((name,), (d.vocab_size,), d.hidden_size), edge=True)

    def _declare(self):
        d, graph = self.decoder, self.graph
        graph.inputs = [tensor_info("token_ids", TensorProto.INT64, ["tokens"]), tensor_info("positions", TensorProto.INT64, ["tokens"]),
                        tensor_info("logit_rows", TensorProto.INT64, ["rows"])]
        graph.outputs = [tensor_info("logits", TensorProto.FLOAT, ["rows", d.vocab_size])]
        for layer in range(d.num_layers):
            for what in ("key", "value"):
                graph.inputs.append(tensor_info(f"past_{what}.{layer}", TensorProto.FLOAT, [d.kv_heads, "past", d.head_dim]))
                graph.outputs.append(tensor_info(f"present_{what}.{layer}", TensorProto.FLOAT, [d.kv_heads, "present", d.head_dim]))

    def _layer(self, layer, hidden):
        graph, prefix, node = self.graph, f"model.layers.{layer}", f"layers.{layer}"
        x = self._norm(f"{node}.input_norm", hidden, f"{prefix}.input_layernorm.weight", self.decoder.hidden_size)
        x = self._attention(layer, x, node, f"{prefix}.self_attn")
        hidden = graph.add("Add", f"{node}.attention_add", [hidden, x], domain="")
        x = self._norm(f"{node}.post_norm", hidden, f"{prefix}.post_attention_layernorm.weight", self.decoder.hidden_size)
        x = self._mlp(x, node, f"{prefix}.mlp")
        return graph.add("Add", f"{node}.mlp_add", [hidden, x], domain="")

    def _attention(self, layer, x, node, prefix):
        d, graph = self.decoder, self.graph
        q_width, kv_width = d.num_heads * d.head_dim, d.kv_heads * d.head_dim
        parts = tuple(f"{prefix}.{name}_proj" for name in "qkv")
        x = self._project(f"{node}.qkv", x, f"{prefix}.qkv_proj", parts, (q_width, kv_width, kv_width), d.hidden_size, d.qkv_bias)
        sizes = graph.value(f"{node}.split_sizes", np.array([q_width, kv_width, kv_width]))
        q, k, v = graph.add("Split", f"{node}.split", [x, sizes], {"axis": 1}, outputs=[f"{node}.{name}" for name in "qkv"], domain="")
        if d.qk_norm:
            q = self._head_norm(f"{node}.q_norm", q, f"{prefix}.q_norm.weight", d.num_heads)
            k = self._head_norm(f"{node}.k_norm", k, f"{prefix}.k_norm.weight", d.kv_heads)
        attributes = dict(num_heads=d.num_heads, kv_heads=d.kv_heads, head_dim=d.head_dim, rotary_dim=d.head_dim, interleaved=0,
                          scale=d.head_dim ** -0.5, window=d.windows[layer], layer=layer)
        out, _, _ = graph.add("cached_attention", f"{node}.attention",
                              [q, k, v, self.cos, self.sin, f"past_key.{layer}", f"past_value.{layer}", "positions"], attributes,
                              outputs=[f"{node}.attention.out", f"present_key.{layer}", f"present_value.{layer}"])
        if d.sub_norms:
            out = self._norm(f"{node}.attention_sub_norm", out, f"{prefix}.attn_sub_norm.weight", q_width)
        if d.sparse_attention_output:
            out = self._larger_half(f"{node}.larger_half", out, q_width)
        return self._project(f"{node}.o", out, f"{prefix}.o_proj", (f"{prefix}.o_proj",), (d.hidden_size,), q_width, d.o_bias)

    def _mlp(self, x, node, prefix):
        d = self.decoder
        parts, sizes = (f"{prefix}.gate_proj", f"{prefix}.up_proj"), (d.intermediate_size,) * 2
        x = self._project(f"{node}.gate_up", x, f"{prefix}.gate_up_proj", parts, sizes, d.hidden_size, d.mlp_bias)
        x = self.graph.add("gated_activation", f"{node}.activation", [x], {"activation": d.activation})
        if d.sub_norms:
            x = self._norm(f"{node}.ffn_sub_norm", x, f"{prefix}.ffn_sub_norm.weight", d.intermediate_size)
        down = f"{prefix}.down_proj"
        return self._project(f"{node}.down", x, down, (down,), (d.hidden_size,), d.intermediate_size, d.mlp_bias, d.activation == "relu2")

    def _project(self, node, x, name, parts, sizes, width, biased, many_zeros=False):
        """A projection; several parts become one, so that one kernel call computes them all."""
        stored = self.formats.store(self.graph, f"{name}.weight", self._weights(parts, sizes, width), many_zeros=many_zeros)
        bias = None
        if biased:
            vectors = [self.checkpoint.vector(f"{part}.bias", size) for part, size in zip(parts, sizes)]
            bias = self.graph.value(f"{name}.bias", np.concatenate(vectors))
        return stored.project(self.graph, node, x, bias)

    def _weights(self, parts, sizes, width):
        return [self.checkpoint.weight(f"{part}.weight", (size, width)) for part, size in zip(parts, sizes)]

    def _norm(self, node, x, weight, width):
        scale = self.graph.value(weight, self.checkpoint.vector(weight, width))
        return self.graph.add("RMSNormalization", node, [x, scale], {"axis": -1, "epsilon": self.decoder.epsilon}, domain="")

    def _larger_half(self, node, x, width):
        """The half of every row that is largest in magnitude; zeros elsewhere."""
        graph = self.graph
        size = graph.add("Abs", f"{node}.size", [x], domain="")
        count = graph.value(f"{node}.count", np.array([width // 2]))
        largest, _ = graph.add("TopK", f"{node}.top", [size, count], {"axis": -1}, outputs=2, domain="")
        last = graph.value(f"{node}.last", np.array([-1]))
        least = graph.add("ReduceMin", f"{node}.least", [largest, last], domain="")
        kept = graph.add("GreaterOrEqual", f"{node}.kept", [size, least], domain="")
        zero = graph.value(f"{node}.zero", np.float32([0]))
        return graph.add("Where", node, [kept, x, zero], domain="")

    def _head_norm(self, node, x, weight, heads):
        """RMS norm over every head on its own."""
        head_dim = self.decoder.head_dim
        split = self.graph.value(f"{node}.split_shape", np.array([-1, heads, head_dim]))
        merged = self.graph.value(f"{node}.merged_shape", np.array([-1, heads * head_dim]))
        x = self.graph.add("Reshape", f"{node}.split", [x, split], domain="")
        x = self._norm(node, x, weight, head_dim)
        return self.graph.add("Reshape", f"{node}.merge", [x, merged], domain="")
