"""A folder as `edgeattn export` writes it, of a named shape, with random weights: `python random_export.py llama-3.2-1b FOLDER [int4]`.

It takes seconds, and speed does not depend on the values. Nothing is quantised: codes are random bytes, steps such that activations stay
near one.
"""
import json
import sys
from pathlib import Path

import numpy as np
from random_checkpoint import SHAPES, write_tokenizer

from edgeattn.exporters.checkpoint import Weight
from edgeattn.exporters.decoder import build
from edgeattn.exporters.export import FORMAT_VERSION, describe_model
from edgeattn.exporters.families import read_architecture
from edgeattn.exporters.functions import functions
from edgeattn.exporters.targets import target_defaults
from edgeattn.exporters.weights import Formats


class Source:
    """A checkpoint of which only the shapes are asked."""

    def __init__(self, config):
        self.folder = self.described_by = Path("random")
        self.config, self.tensors = config, range(config["num_hidden_layers"])

    def weight(self, name, shape):
        return Weight(shape, lambda start, stop: np.zeros((stop - start, shape[1]), np.float32))

    def vector(self, name, size):
        return np.ones(size, np.float32)

    def read_json(self, name):
        return {}


def write_export(shape: str, folder: Path, precision: str = "int4", ctx_size: int = 40960, seed: int = 0) -> Path:
    """The folder, written unless it is there."""
    folder = Path(folder)
    if (folder / "edgeattn.json").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    config, formats, rng = SHAPES[shape], Formats(precision, 32), np.random.default_rng(seed)
    source = Source(config)
    decoder = read_architecture(source)
    graph = build(decoder, source, formats, min(ctx_size, decoder.max_position))
    graph._streams = [(specs, slabs if specs[0].dtype != "uint8" else _random(specs, rng)) for specs, slabs in graph._streams]
    graph.write(folder, functions(graph.nodes))
    write_tokenizer(folder, config)
    report = {"format_version": FORMAT_VERSION, "architecture": config["model_type"], "source": {"name": shape}, "precision": precision,
              "group_size": 32, "model": describe_model(decoder, source, min(ctx_size, decoder.max_position)), "weights": formats.used,
              "target": "generic", "defaults": target_defaults("generic", precision), "files": {}, "verify": {}}
    (folder / "edgeattn.json").write_text(json.dumps(report))
    return folder


def _random(specs, rng):
    """Codes, then steps of which the product with K codes has a spread near one."""
    codes, scales = specs
    bits, k = codes.shape[2], 32 * codes.shape[1]  # in blocks of 32
    spread = 2 ** bits / 12 ** 0.5 * k ** 0.5

    def slabs():
        yield rng.integers(0, 256, codes.shape, np.uint8), np.full(scales.shape, 1 / spread, np.float16)
    return slabs


if __name__ == "__main__":
    print(write_export(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:]))
