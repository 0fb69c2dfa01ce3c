"""Llama 2, 3, 3.1 and 3.2, TinyLlama, SmolLM2: the plain decoder, with biases where the config asks for them."""
from edgeattn.exporters.decoder import Decoder, read_decoder


def describe(config: dict) -> Decoder:
    bias = config.get("attention_bias", False)
    return read_decoder(config, qkv_bias=bias, o_bias=bias, mlp_bias=config.get("mlp_bias", False))
