"""Qwen3: an RMS norm on every head of q and k before rotary, no biases by default."""
from edgeattn.exporters.decoder import Decoder, read_decoder
from edgeattn.exporters.families.qwen2 import windows


def describe(config: dict) -> Decoder:
    bias = config.get("attention_bias", False)
    config = {"head_dim": 128, **config}  # the family's default, not hidden_size / heads
    return read_decoder(config, windows=windows(config), qkv_bias=bias, o_bias=bias, qk_norm=True)
