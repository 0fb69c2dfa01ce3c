"""BitNet b1.58 (arXiv 2504.12285): norms before o and down, squared ReLU; its weights are ternary when quantization_config says so."""
from edgeattn.exporters.decoder import Decoder, read_decoder


def describe(config: dict) -> Decoder:
    bias, about = config.get("attention_bias", False), config.get("quantization_config") or {}
    return read_decoder({"rms_norm_eps": 1e-5, **config}, qkv_bias=bias, o_bias=bias, activation="relu2", sub_norms=True,
                        sparse_attention_output=about.get("activation_bits") == 4)
