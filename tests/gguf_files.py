"""Writes a model of transformers as a GGUF file with the `gguf` package, with the weights that its blocks stand for."""
import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

NAMES = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
         "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
         "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
FACTORS = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}  # where blocks have their float16 factors


def blocks(weight, kind: Type, rng):
    """(bytes, the weights that they stand for): quantised where the package can, else random codes under sensible factors, smaller
    than the weights: random minima give every block a mean, which makes a model sensitive."""
    try:
        raw = gguf.quants.quantize(weight, kind)
    except NotImplementedError:
        elements, size = gguf.GGML_QUANT_SIZES[kind]
        raw = rng.integers(0, 256, (weight.size // elements, size), dtype=np.uint8)
        for at in FACTORS[kind.name]:
            raw[:, at:at + 2] = rng.uniform(0.5, 1, (len(raw), 1)).astype(np.float16).view(np.uint8)
        spread = gguf.quants.dequantize(raw, kind).std()
        for at in FACTORS[kind.name]:
            raw[:, at:at + 2] = (raw[:, at:at + 2].copy().view(np.float16) * np.float16(0.4 * weight.std() / spread)).view(np.uint8)
        raw = raw.reshape(len(weight), -1)
    return raw, gguf.quants.dequantize(raw, kind).reshape(weight.shape)


def paired(weight, heads):
    """Rows of each head from halves (transformers) to pairs (llama in GGUF)."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def halved(weight, heads):
    return weight.reshape(heads, -1, 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(model, path, kind_of, vocabulary=None, **extra) -> dict[str, np.ndarray]:
    """Write the model; kind_of(name) is the Type of each matrix. Returns the weights as the file has them, by transformers' names.
    `vocabulary(writer)` adds a tokenizer; `extra` are settings of the architecture."""
    config, rng, exact = model.config, np.random.default_rng(), {}
    writer = gguf.GGUFWriter(path, config.model_type)
    settings(writer, config)
    for key, value in extra.items():
        writer.add_uint32(key.format(arch=config.model_type), value)
    if config.rope_parameters["rope_type"] == "llama3":
        rotary = model.model.rotary_emb.inv_freq.numpy()
        plain = config.rope_parameters["rope_theta"] ** (-np.arange(0, config.head_dim, 2) / config.head_dim)
        writer.add_tensor("rope_freqs.weight", (plain / rotary).astype(np.float32))
    if config.rope_parameters["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_parameters["factor"])
    (vocabulary or (lambda w: w.add_tokenizer_model("no_vocab")))(writer)
    for name, parameter in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values, (module, kind) = parameter.float().numpy(), name.rsplit(".", 1)
        stem = TOP.get(module) or f"blk.{module.split('.')[2]}.{NAMES[module.split('.', 3)[3]]}"
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(stem.split(".")[-1])
        heads = heads if config.model_type == "llama" else None
        values = paired(values, heads) if heads else values
        if values.ndim == 1:
            writer.add_tensor(f"{stem}.{kind}", values)
            continue
        raw, values = blocks(np.ascontiguousarray(values), kind_of(name), rng)
        writer.add_tensor(f"{stem}.{kind}", raw, raw_dtype=kind_of(name))
        exact[name] = np.ascontiguousarray(halved(values, heads) if heads else values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return exact


def settings(writer, config):
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def nano_vocabulary(tokenizer: dict, pre: str, template: str):
    """A function that writes a byte-level tokenizer.json."""
    def add(writer):
        tokens = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)
        special = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
        tokens = [next((name for name, i in special.items() if i == at), token) for at, token in enumerate(tokens)]
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(tokens)
        writer.add_token_types([gguf.TokenType.CONTROL if token in special else gguf.TokenType.NORMAL for token in tokens])
        writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in tokenizer["model"]["merges"]])
        writer.add_eos_token_id(special["<|im_end|>"])
        writer.add_add_bos_token(False)
        writer.add_chat_template(template)
    return add


def small_vocabulary(writer):
    """SentencePiece: letters, a few pieces, bytes."""
    tokens = ["<unk>", "<s>", "</s>", "▁", "t", "h", "e", "th", "▁the", "the", "a", "n", "d", "an", "and", "▁and"]
    kinds = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL] + [gguf.TokenType.NORMAL] * 13
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * 3 + [-float(i) for i in range(13)])
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
