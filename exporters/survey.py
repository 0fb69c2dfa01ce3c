"""What choosing widths needs to know of a checkpoint's matrices: what rounding them does to the logits, how their layers behave."""
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from edgeattn.exporters.check import compare
from edgeattn.exporters.checkpoint import Checkpoint, Weight
from edgeattn.exporters.decoder import Decoder
from edgeattn.exporters.forward import embed, head, run_layer
from edgeattn.exporters.mixed import WIDTHS, Matrix
from edgeattn.exporters.quantisers import dequantise, load
from edgeattn.exporters.weight_statistics import Calibration

Tell = Callable[[int, int], None]
PROBE = 256  # tokens
PARTS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


class Survey:
    """Fills in those fields of `matrices` that a method of choosing widths NEEDS: each is a function here."""

    def __init__(self, source: Checkpoint, decoder: Decoder, weights: dict[str, Weight], sequences: list[np.ndarray], quantiser: str,
                 block_size: int):
        """weights: {initializer: what is stored there}. sequences: calibration text, whose last tokens are the probe."""
        self.source, self.decoder, self.weights, self.block_size = source, decoder, weights, block_size
        self.probe, self.method = sequences[-1][:PROBE], load(quantiser)
        self.statistics = Calibration(source, decoder, sequences[:-1] or sequences, getattr(self.method, "NEEDS_HEADS", False)).of
        self.matrices = [Matrix(name, int(name.split(".")[2]), int(np.prod(w.shape))) for name, w in weights.items()]
        self._rows = {"q_proj": decoder.num_heads * decoder.head_dim, "k_proj": decoder.kv_heads * decoder.head_dim,
                      "gate_proj": decoder.intermediate_size}

    def divergence(self, tell: Tell) -> None:
        states = [embed(self.source, self.decoder, self.probe)]
        for layer in range(self.decoder.num_layers):
            states.append(self._through(self.source, layer, states[-1]))
        expected = head(self.source, self.decoder, states[-1])
        for i, matrix in enumerate(self.matrices):
            rounded, hidden = Replaced(self.source, self._rounded(matrix.name)), states[matrix.layer]
            for layer in range(matrix.layer, self.decoder.num_layers):
                hidden = self._through(rounded, layer, hidden)
            matrix.divergence = compare(head(self.source, self.decoder, hidden), expected)["mean_kl"]
            tell(i + 1, len(self.matrices))

    def _rounded(self, stored):
        """{tensor of the checkpoint: what is left of it at the narrowest width}."""
        weight, statistics = self.weights[stored], self.statistics(stored) if self.method.NEEDS_STATISTICS else None
        codes = self.method.quantise(weight.read(0, weight.shape[0]), WIDTHS[0], self.block_size, statistics)
        whole, out = dequantise(*codes, WIDTHS[0])[:, :weight.shape[1]], {}
        prefix, _, name = stored.removesuffix(".weight").rpartition(".")
        for part in PARTS.get(name, (name,)):
            rows = self._rows.get(part, len(whole))
            out[f"{prefix}.{part}.weight"], whole = whole[:rows], whole[rows:]
        return out

    def similarity(self, tell: Tell) -> None:
        hidden = embed(self.source, self.decoder, self.probe)
        for layer in range(self.decoder.num_layers):
            before, hidden = hidden, self._through(self.source, layer, hidden)
            cosine = (before * hidden).sum(-1) / np.maximum(np.linalg.norm(before, axis=-1) * np.linalg.norm(hidden, axis=-1), 1e-30)
            self._set(layer, similarity=float(cosine.mean()))
            tell(layer + 1, self.decoder.num_layers)

    def tail(self, tell: Tell) -> None:
        for layer in range(self.decoder.num_layers):
            parts = [self.weights[m.name] for m in self.matrices if m.layer == layer]
            w = np.concatenate([part.read(0, part.shape[0]).reshape(-1) for part in parts])
            self._set(layer, tail=float((w > w.mean() + w.std()).mean()))
            tell(layer + 1, self.decoder.num_layers)

    def _set(self, layer, **fields):
        self.matrices = [replace(m, **fields) if m.layer == layer else m for m in self.matrices]

    def _through(self, checkpoint, layer, hidden):
        *_, (_, hidden) = run_layer(checkpoint, self.decoder, layer, hidden)
        return hidden


class Replaced:
    """The checkpoint with other values in some matrices, {name: [N, K]}."""

    def __init__(self, source, values):
        self._source, self._values = source, values

    def __getattr__(self, name):
        return getattr(self._source, name)

    def weight(self, name, shape):
        values = self._values.get(name)
        return self._source.weight(name, shape) if values is None else Weight(shape, lambda start, stop: values[start:stop])
