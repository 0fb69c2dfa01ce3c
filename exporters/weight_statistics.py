"""What goes into every matrix of a checkpoint on calibration text: the text's hidden states are carried through it layer by layer."""
from collections.abc import Callable, Iterator

import numpy as np

from edgeattn.exporters.attention_statistics import HeadSums
from edgeattn.exporters.checkpoint import Checkpoint
from edgeattn.exporters.decoder import Decoder
from edgeattn.exporters.forward import embed, run_layer
from edgeattn.exporters.quantisers import Statistics

QKV = "self_attn.qkv_proj"
# {matrix of the checkpoint: the stored matrix that has its input}; k, v and up have the inputs of q and gate.
STORED = {"self_attn.q_proj": QKV, "self_attn.o_proj": "self_attn.o_proj", "mlp.gate_proj": "mlp.gate_up_proj",
          "mlp.down_proj": "mlp.down_proj"}


class Calibration:
    """Statistics of one layer at a time, in the order in which an export writes its matrices. In memory: the hidden states of all
    tokens, and one layer's statistics."""

    def __init__(self, checkpoint: Checkpoint, decoder: Decoder, sequences: list[np.ndarray], heads: bool = False,
                 progress: Callable[[int, int], None] | None = None):
        """sequences: token ids [n] int64 each. heads: whether `Statistics.heads` are wanted. progress(layers done, layers in all)."""
        self.layer, self.tokens = -1, sum(map(len, sequences))
        self._layers = _layers(checkpoint, decoder, sequences, heads)
        self._found: dict[str, Statistics] = {}
        self._progress, self._count = progress, decoder.num_layers

    def of(self, name: str) -> Statistics:
        """The statistics of initializer `name`'s input; layers that lie before are passed over."""
        while name not in self._found:
            self._found = next(self._layers)
            self.layer += 1
            if self._progress:
                self._progress(self.layer + 1, self._count)
        return self._found[name]


def _layers(checkpoint, decoder, sequences, heads) -> Iterator[dict[str, Statistics]]:
    hidden = [embed(checkpoint, decoder, tokens) for tokens in sequences]
    for layer in range(decoder.num_layers):
        sums = _Sums(f"model.layers.{layer}.", HeadSums(checkpoint, decoder, layer) if heads else None)
        for i, states in enumerate(hidden):
            *_, (_, hidden[i]) = run_layer(checkpoint, decoder, layer, states, sums.observe)
        yield sums.statistics()


class _Sums:
    def __init__(self, prefix, heads):
        self.prefix, self.sums, self.heads = prefix, {}, heads

    def observe(self, matrix, x):
        name = STORED.get(matrix.removeprefix(self.prefix))
        if name:
            hessian, magnitude, count = self.sums.get(name, (0, 0, 0))
            if count:
                hessian += x.T @ x
            else:
                hessian = x.T @ x
            self.sums[name] = hessian, magnitude + np.abs(x).sum(0), count + len(x)
            if self.heads and name == QKV:
                self.heads.add(x)

    def statistics(self):
        found = {}
        for name, (hessian, magnitude, count) in self.sums.items():
            np.divide(hessian, count, out=hessian)
            heads = self.heads.heads(hessian) if self.heads and name == QKV else ()
            found[f"{self.prefix}{name}.weight"] = Statistics(hessian, magnitude / np.float32(count), heads)
        return found
