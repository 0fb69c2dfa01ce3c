"""Tiny random Hugging Face checkpoints, made with transformers, whose every parameter is random: the oracle of the exporters.

A zero bias or a norm of ones would hide an exporter that forgets it, so those are random too, and the prompts of the tests are
longer than the sliding window and the original rope length.
"""
from pathlib import Path

import torch
import transformers

SIZES = dict(vocab_size=150, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, head_dim=16, max_position_embeddings=256, rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=2,
             pad_token_id=None, tie_word_embeddings=False)

LLAMA3_ROPE = dict(rope_type="llama3", rope_theta=10000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                   original_max_position_embeddings=16)

# Name of the case: (model_type, what it sets besides SIZES)
FAMILIES = {
    "llama": ("llama", {}),
    "llama_bias": ("llama", dict(attention_bias=True, mlp_bias=True, tie_word_embeddings=True)),
    "llama3_rope": ("llama", dict(rope_parameters=LLAMA3_ROPE)),
    "llama_linear_rope": ("llama", dict(rope_parameters=dict(rope_type="linear", rope_theta=10000.0, factor=4.0))),
    "mistral": ("mistral", dict(sliding_window=8)),
    "qwen2": ("qwen2", dict(tie_word_embeddings=True)),
    "qwen2_window": ("qwen2", dict(use_sliding_window=True, sliding_window=8, max_window_layers=1)),
    "qwen3": ("qwen3", {}),
    "bitnet": ("bitnet", dict(attention_bias=True, rope_parameters=dict(rope_type="default", rope_theta=10000.0))),  # in floats
}


def tiny_model(case: str, seed: int = 0, **sizes) -> transformers.PreTrainedModel:
    """The random float32 model of a case of FAMILIES; `sizes` override."""
    model_type, options = FAMILIES[case]
    config = transformers.AutoConfig.for_model(model_type, **{**SIZES, **options, **sizes})
    config._attn_implementation = "eager"
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.5)
            else:  # large enough for attention to have an opinion
                parameter.normal_(0, 1.5 / parameter.shape[-1] ** 0.5)
    return model


def save_tiny(case: str, folder: Path, seed: int = 0, shard: str = "1GB", **sizes) -> transformers.PreTrainedModel:
    """Write the case's checkpoint to `folder` in shards of at most that size; returns the model."""
    model = tiny_model(case, seed, **sizes)
    model.save_pretrained(folder, max_shard_size=shard)
    return model


def torch_logits(model: transformers.PreTrainedModel, tokens):
    """tokens [n] int64 -> logits [n, vocab] float32, as NumPy."""
    with torch.no_grad():
        return model(torch.as_tensor(tokens)[None]).logits[0].float().numpy()
