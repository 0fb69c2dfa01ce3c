"""Mistral: a sliding window in every layer, unless the config sets it to null."""
from edgeattn.exporters.decoder import Decoder, read_decoder


def describe(config: dict) -> Decoder:
    window = config.get("sliding_window", 4096) or 0  # the first release's config relies on this default
    return read_decoder(config, windows=(window,) * config.get("num_hidden_layers", 0))
