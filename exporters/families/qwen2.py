"""Qwen2 and Qwen2.5: biases on q, k and v; a sliding window in the layers from `max_window_layers` on, when switched on."""
from edgeattn.exporters.decoder import Decoder, read_decoder


def windows(config: dict) -> tuple[int, ...]:
    """The window of every layer; 0 sees everything."""
    layers = config.get("num_hidden_layers", 0)
    window = config.get("sliding_window", 4096) if config.get("use_sliding_window") else None
    kinds = config.get("layer_types") or ["sliding_attention" if i >= config.get("max_window_layers", 28) else "full_attention"
                                          for i in range(layers)]
    return tuple((window or 0) if kind == "sliding_attention" else 0 for kind in kinds)


def describe(config: dict) -> Decoder:
    return read_decoder(config, windows=windows(config), qkv_bias=True)
