"""What rounding a checkpoint's weights loses, without exporting it: the rounded weights run in transformers.

    python benchmarks/weights_quality.py CHECKPOINT --text book.txt --calibration own.txt rtn:3 gptq:3 gptq:3:64 gptq:2.5 gptq:2.5:32:lim

A setting is QUANTISER:BITS[:GROUP_SIZE[:MIXED]]. Perplexity, KL from the checkpoint (nats a token) and agreement on the first token are
over windows spread evenly over the text. Without --calibration the model says its own text, as in an export.
"""
import argparse
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from quality import windows
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from edgeattn.evaluation.kld import Divergence, loss
from edgeattn.exporters.checkpoint import concatenate, open_checkpoint
from edgeattn.exporters.decoder import build
from edgeattn.exporters.export import FORMAT_VERSION, describe_model, settle_quantiser
from edgeattn.exporters.families import read_architecture
from edgeattn.exporters.prepare import prepare
from edgeattn.exporters.quantisers import dequantise, load
from edgeattn.exporters.survey import PARTS
from edgeattn.exporters.targets import target_defaults
from edgeattn.exporters.weights import EDGE_BITS, Formats
from edgeattn.log_softmax import log_softmax


def logits(model, ids):
    with torch.no_grad():
        return model(torch.from_numpy(ids)[None]).logits[0].numpy()


def round_weights(model, folder, setting, text):
    """Replace the model's weights by what an export of this setting would hold; returns what edgeattn.json would say of mixed widths."""
    given = setting.split(":")
    quantiser, bits, size, mixed = given + ["32", "auto"][len(given) - 2:]
    source, precision = open_checkpoint(folder), f"int{float(bits):g}"
    decoder = read_architecture(source)
    formats = Formats(precision, int(size), settle_quantiser(quantiser, precision, text, mixed))
    build(decoder, source, formats, decoder.max_position)
    report = {"format_version": FORMAT_VERSION, "defaults": target_defaults("generic", precision),
              "model": describe_model(decoder, source, decoder.max_position)}
    with TemporaryDirectory() as work:
        source.copy_files(("tokenizer.json",), Path(work))
        prepared, _ = prepare(source, decoder, formats, text, mixed, Path(work), report,
                              lambda what, done, total: done == total and print(what, file=sys.stderr))
    tensors, method = model.state_dict(), load(formats.quantiser)
    for name in ("model.embed_tokens", *([] if decoder.tied else ["lm_head"])):
        put(tensors, [f"{name}.weight"], load("rtn"), EDGE_BITS, int(size), prepared, None)
    for stored in formats.stored:
        statistics = formats.statistics(stored) if method.NEEDS_STATISTICS else None
        prefix, _, name = stored.removesuffix(".weight").rpartition(".")
        parts = [f"{prefix}.{part}.weight" for part in PARTS.get(name, (name,))]
        put(tensors, parts, method, formats.widths.get(stored, int(formats.bits)), int(size), prepared, statistics)
    for name, tensor in tensors.items():
        if tensor.ndim == 1:  # norms and biases, which awq scales
            tensor.copy_(torch.from_numpy(prepared.vector(name, len(tensor))))
    return report.get("mixed")


def put(tensors, names, method, bits, size, checkpoint, statistics):
    """Round the tensors of these names as one matrix, as an export does."""
    whole = concatenate([checkpoint.weight(name, tuple(tensors[name].shape)) for name in names])
    codes = method.quantise(whole.read(0, whole.shape[0]), bits, size, statistics)
    rounded = torch.from_numpy(dequantise(*codes, bits)[:, :whole.shape[1]].copy())
    for name, rows in zip(names, rounded.split([len(tensors[name]) for name in names])):
        tensors[name].copy_(rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("settings", nargs="+", metavar="SETTING")
    parser.add_argument("--text", type=Path, required=True, help="text that the model has not seen, UTF-8")
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--windows", type=int, default=8)
    args = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(args.checkpoint, dtype=torch.float32).eval()
    ids = np.array(Tokenizer.from_file(str(args.checkpoint / "tokenizer.json")).encode(args.text.read_text(encoding="utf-8")).ids)
    parts = windows(ids, args.window, args.windows)
    expected = [log_softmax(logits(model, part)).astype(np.float32) for part in parts]
    base = float(np.exp(np.mean([loss(p, part, 0) for p, part in zip(expected, parts)])))
    print(f"checkpoint: perplexity {base:.2f} over {len(parts)} windows of {args.window} tokens", flush=True)
    for setting in args.settings:
        mixed = round_weights(model, args.checkpoint, setting, args.calibration)
        found = Divergence()
        for part, p in zip(parts, expected):
            found.begin()
            found.add(p, log_softmax(logits(model, part)), part, 0)
        about = f"  {mixed['bits']:.3f} bits, KL {mixed['predicted_kl']:.4f} predicted" if mixed else ""
        print(f"{setting:<20} perplexity {found.perplexity:.2f} ({100 * (found.perplexity / base - 1):+.1f} %)  "
              f"KL {found.mean:.4f}  same first token {found.same_top:.3f}{about}", flush=True)


if __name__ == "__main__":
    main()
