"""What the activations of a ternary checkpoint allow: zeros that a kernel could skip, and perplexity at other roundings.

    python benchmarks/ternary_activations.py CHECKPOINT --text book.txt

NumPy only, no kernels: the checkpoint as exporters/forward.py runs it, with its rounding of activations replaced. "tokens at 8 bits" is
the choice of EdgeQAT (arXiv 2402.10787), a width for every token: here the tokens that int4 rounds worst, or any, get 8 bits.
"""
import argparse
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import Progress

from edgeattn.exporters import forward as forward_module
from edgeattn.exporters.checkpoint import open_checkpoint
from edgeattn.exporters.families import read_architecture
from edgeattn.log_softmax import log_softmax
from edgeattn.reference.matmul_ternary import quantise_tokens


class Zeros:
    """The model's own rounding, counting: zeros before it and after it, by the kind of layer."""

    def __init__(self, decoder):
        self.counts, self.call = {}, 0
        self.kinds = ("q", "k", "v", "o", "gate", "up", "down")

    def __call__(self, x, bits):
        rounded, factor = quantise_tokens(x, bits)
        seen = self.counts.setdefault(self.kinds[self.call % len(self.kinds)], np.zeros(3))
        seen += (x == 0).sum(), (rounded == 0).sum(), x.size
        self.call += 1
        return rounded, factor


def narrow(bits_of_all, share=None, choose="worst", seed=0):
    """Rounding of the inputs of q, k, v, gate and up to int4; a share of the tokens keeps 8 bits."""
    rng, calls = np.random.default_rng(seed), [0]

    def rounding(x, bits):
        at, calls[0] = calls[0] % 7, calls[0] + 1
        if at in (3, 6):  # o and down
            return quantise_tokens(x, 8)
        low, low_factor = quantise_tokens(x, bits_of_all)
        if not share:
            return low, low_factor
        high, high_factor = quantise_tokens(x, 8)
        error = np.square(low / low_factor - x).mean(1) / np.square(x).mean(1) if choose == "worst" else rng.random(len(x))
        wide = (error >= np.quantile(error, 1 - share))[:, None]
        return np.where(wide, high, low), np.where(wide, high_factor, low_factor)
    return rounding


def perplexity(source, decoder, windows, rounding, advance):
    kept, forward_module.quantise_tokens = forward_module.quantise_tokens, rounding
    try:
        losses = []
        for ids in windows:
            *_, (_, logits) = forward_module.forward(source, decoder, ids)
            losses.append(-log_softmax(logits[:-1])[np.arange(len(ids) - 1), ids[1:]])
            advance()
        return float(np.exp(np.concatenate(losses).mean()))
    finally:
        forward_module.quantise_tokens = kept


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--text", type=Path, required=True, help="text that the model has not seen, UTF-8")
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=8)
    args = parser.parse_args()
    from tokenizers import Tokenizer
    source = open_checkpoint(args.checkpoint)
    decoder = read_architecture(source)
    ids = np.array(Tokenizer.from_file(str(args.checkpoint / "tokenizer.json")).encode(args.text.read_text(encoding="utf-8")).ids)
    step = len(ids) // args.windows
    windows = [ids[i * step:i * step + args.window] for i in range(args.windows)]
    dense, sparse = replace(decoder, sparse_attention_output=False), replace(decoder, sparse_attention_output=True)
    zeros = Zeros(decoder)
    runs = [("as the checkpoint rounds, all of the input of o", dense, zeros), ("int8, larger half into o", sparse, quantise_tokens_8),
            ("int4 into q, k, v, gate, up", dense, narrow(4)), ("the same, larger half into o (a4.8)", sparse, narrow(4)),
            *((f"int4, {share:.0%} of the tokens at 8 bits, {choose}", dense, narrow(4, share, choose))
              for share in (0.25, 0.5) for choose in ("worst", "any"))]
    with Progress(console=Console(file=sys.stderr)) as progress:
        task = progress.add_task("windows", total=len(runs) * len(windows))
        found = [(name, perplexity(source, about, windows, rounding, lambda: progress.advance(task))) for name, about, rounding in runs]
    for name, value in found:
        print(f"{name:48} perplexity {value:.2f}")
    for kind, (before, after, total) in zeros.counts.items():
        print(f"into {kind:5} {before / total:6.1%} zeros, {after / total:6.1%} once rounded")
    return 0


def quantise_tokens_8(x, bits):
    return quantise_tokens(x, 8)


if __name__ == "__main__":
    sys.exit(main())
