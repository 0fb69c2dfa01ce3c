"""How well each layer of a checkpoint bears 2 bits, and what attention-aware Hessians and LUQ's entropy know of that.

    python benchmarks/weights_layers.py CHECKPOINT --text BOOK [--layers 0 1]

Of every layer alone: the entropy of its outputs over 100 clusters (LUQ, arXiv 2509.23729; by k-means, 4,096 tokens); KL from the checkpoint
(nats a token, over 384 tokens) with all its matrices at 2 bits by rtn, and with q, k and v alone by gptq and by boa, calibrated on 3,072
tokens.
"""
import argparse
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from edgeattn.exporters.check import compare
from edgeattn.exporters.checkpoint import Weight, concatenate, open_checkpoint
from edgeattn.exporters.families import read_architecture
from edgeattn.exporters.forward import embed, head, run_layer
from edgeattn.exporters.quantisers import dequantise, load
from edgeattn.exporters.survey import PARTS, Replaced
from edgeattn.exporters.weight_statistics import Calibration

LENGTH, CALIBRATED, CLUSTERED, PROBE = 512, 6, 8, 384  # tokens of a sequence; sequences; sequences; tokens
CLUSTERS, ROUNDS, BITS, BLOCK = 100, 20, 2, 32


def through(checkpoint, decoder, layer, hidden):
    *_, (_, hidden) = run_layer(checkpoint, decoder, layer, hidden)
    return hidden


def entropy(x):
    """Nats, of which cluster a row of x is in."""
    centres = np.random.default_rng(0).choice(x, CLUSTERS, replace=False)
    for _ in range(ROUNDS):
        nearest = (np.square(centres).sum(1) / 2 - x @ centres.T).argmin(1)
        for i in np.unique(nearest):
            centres[i] = x[nearest == i].mean(0)
    share = np.bincount(nearest) / len(x)
    return -(share[share > 0] * np.log(share[share > 0])).sum()


def rounded(weight, method, statistics=None):
    codes = load(method).quantise(weight, BITS, BLOCK, statistics)
    return dequantise(*codes, BITS)[:, :weight.shape[1]]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--layers", type=int, nargs="+", help="default: all")
    args = parser.parse_args()
    source = open_checkpoint(args.checkpoint)
    decoder, ids = read_architecture(source), np.array(
        Tokenizer.from_file(str(args.checkpoint / "tokenizer.json")).encode(args.text.read_text(encoding="utf-8")).ids, np.int64)
    sequences, probe = ids[:CLUSTERED * LENGTH].reshape(-1, LENGTH), ids[-PROBE:]
    states, hidden = [embed(source, decoder, probe)], [embed(source, decoder, tokens) for tokens in sequences]
    for layer in range(decoder.num_layers):
        states.append(through(source, decoder, layer, states[-1]))
    expected = head(source, decoder, states[-1])

    def kl(layer, values):
        changed, x = Replaced(source, values), states[layer]
        for i in range(layer, decoder.num_layers):
            x = through(changed, decoder, i, x)
        return compare(head(source, decoder, x), expected)["mean_kl"]
    statistics = Calibration(source, decoder, list(sequences[:CALIBRATED]), heads=True).of
    print("layer  entropy  all rtn   q, k, v gptq     boa")
    for layer in range(decoder.num_layers):
        hidden = [through(source, decoder, layer, x) for x in hidden]
        if args.layers and layer not in args.layers:
            continue
        prefix = f"model.layers.{layer}."
        matrices = {name: source.weight(name, tensor.shape) for name, tensor in source.tensors.items()
                    if name.startswith(prefix) and len(tensor.shape) == 2}
        whole = {name: rounded(weight.read(0, weight.shape[0]), "rtn") for name, weight in matrices.items()}
        parts: dict[str, Weight] = {name: matrices[name] for name in (f"{prefix}self_attn.{part}.weight" for part in PARTS["qkv_proj"])}
        qkv, about, attention = concatenate(list(parts.values())), statistics(f"{prefix}self_attn.qkv_proj.weight"), []
        for method in ("gptq", "boa"):
            rows = rounded(qkv.read(0, qkv.shape[0]), method, about)
            ends = np.cumsum([part.shape[0] for part in parts.values()])[:-1]
            attention.append(kl(layer, dict(zip(parts, np.split(rows, ends)))))
        figures = f"{entropy(np.concatenate(hidden)):8.3f} {kl(layer, whole):8.4f} {attention[0]:14.5f} {attention[1]:7.5f}"
        print(f"{layer:5} {figures}", flush=True)


if __name__ == "__main__":
    main()
