"""The check that ends every export, and `edgeattn verify`: logits of the exported folder against its checkpoint.

The export runs in our runtime, or node by node in NumPy when the model is large; the checkpoint in transformers when it is
installed and the model small, else in NumPy. When they differ much, the two NumPy runs are compared layer
by layer, each layer on the checkpoint's own input, and the first layer that differs too much is named.
"""
import hashlib
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from edgeattn.exporters.checkpoint import Checkpoint, open_checkpoint
from edgeattn.exporters.decoder import Decoder
from edgeattn.exporters.families import read_architecture
from edgeattn.exporters.forward import forward
from edgeattn.exporters.interpret import interpret
from edgeattn.exporters.oracle import torch_logits
from edgeattn.exporters.weights import bits_of
from edgeattn.log_softmax import log_softmax
from edgeattn.runtime import Model, read_config

PROMPT = "The keeper of the lighthouse climbed the stairs each evening to light the lamp, and counted the ships that passed."
PROMPT_TOKENS = 24
TORCH_BYTES = 128 << 20  # of float32 weights: above it, torch's copies would dominate an export's memory
MAPPED_BYTES = 200 << 20  # of an export's weights, on top of twice its largest tensor: above it, they are not mapped whole
# Root-mean-square error of the logits, in standard deviations of the checkpoint's, above which layers are compared one by one;
# and what is too much in one: the error of what it adds to the hidden state, relative to it. Unrelated logits differ by 1.4.
OTHER_LIMITS = {"fp32": (1e-3, 1e-3), "fp16": (2e-2, 1e-2), "ternary": (0.2, 0.2)}
LIMITS = {8: (0.1, 0.1), 4: (0.6, 0.4), 3: (0.9, 0.6), 2: (1.3, 0.9)}


def check(folder: str | Path, source: Checkpoint, decoder: Decoder, device: str = "cpu") -> dict:
    """Compare an export with its checkpoint on a fixed prompt: the figures for edgeattn.json. ValueError names the layer at fault."""
    folder = Path(folder)
    config = read_config(folder)
    tokens = prompt_tokens(folder, config["model"])
    reference, logits = checkpoint_logits(source, decoder, tokens)
    on_cpu = device == "cpu"
    engine, got = exported_logits(folder, tokens, _largest_bytes(source)) if on_cpu else (device, _runtime_logits(folder, tokens, device))
    report = {"checkpoint_in": reference, "export_in": engine, "tokens": len(tokens), **compare(got, logits)}
    # Whatever the precision of the embedding and head, ternary layers round activations: a float on an edge may go either way.
    ternary = "ternary" in config["weights"].values()
    own = _limits("ternary" if ternary else config["precision"])
    limit, layer_limit = own if ternary or config.get("rounded", True) else min(own, LIMITS[8])  # imported codes add no error of their own
    if not report["rms_error"] <= limit:
        where = faulty_layer(folder, source, decoder, tokens, layer_limit) or _faulty_engine(folder, engine, got, tokens, own[0])
        if where:  # otherwise many layers, each within its precision, add up
            raise ValueError(f"the exported logits differ from those of {source.folder} by {report['rms_error']:.2g} of their standard "
                             f"deviation ({config['precision']}): {where}")
    return report


def verify(folder: str | Path, checkpoint: str | Path | None = None, device: str = "cpu") -> dict:
    """The files against their recorded sha256, then the check against the checkpoint, or without one against stock onnxruntime."""
    folder = Path(folder)
    config = read_config(folder)
    for name, digest in config["files"].items():
        if not (folder / name).is_file() or sha256(folder / name) != digest:
            raise ValueError(f"{folder / name}: missing or changed since the export; export the model again")
    if checkpoint is not None:
        source = open_checkpoint(checkpoint)
        return check(folder, source, read_architecture(source), device)
    tokens = prompt_tokens(folder, config["model"])
    given = [] if device == "cpu" else [device]
    got, expected = _runtime_logits(folder, tokens, *given), _onnxruntime_logits(folder, tokens)
    return {"export_in": "edgeattn", "against": "onnxruntime", "tokens": len(tokens), **compare(got, expected)}


def compare(got: np.ndarray, expected: np.ndarray) -> dict:
    """Figures of two logits [n, vocab]: errors in standard deviations of the expected ones, top-1 agreement, mean KL in nats."""
    got, expected = got.astype(np.float64), expected.astype(np.float64)
    error, spread = got - expected, expected.std()
    p, q = log_softmax(expected), log_softmax(got)
    return {"max_error": float(np.abs(error).max() / spread), "rms_error": float(np.sqrt(np.square(error).mean()) / spread),
            "top1": float((got.argmax(-1) == expected.argmax(-1)).mean()), "mean_kl": float((np.exp(p) * (p - q)).sum(-1).mean())}


def divergence(folder: Path, source: Checkpoint, decoder: Decoder, tokens: np.ndarray) -> float:
    """Mean KL from the checkpoint to the export on tokens [n], in nats a token."""
    tokens = tokens[:read_config(folder)["model"]["ctx_size"]]
    return compare(exported_logits(folder, tokens, _largest_bytes(source))[1], checkpoint_logits(source, decoder, tokens)[1])["mean_kl"]


def prompt_tokens(folder: Path, about: dict) -> np.ndarray:
    """The fixed prompt in the model's tokens [n] int64, or any fixed tokens for a model without a tokenizer; cut to its context."""
    count, vocab_size = min(PROMPT_TOKENS, about["ctx_size"]), about["vocab_size"]
    if (folder / "tokenizer.json").is_file():
        from tokenizers import Tokenizer
        ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(PROMPT).ids[:count]
        if ids and max(ids) < vocab_size:
            return np.array(ids, np.int64)
    return (np.arange(count, dtype=np.int64) * 7919 + 11) % vocab_size


def checkpoint_logits(source: Checkpoint, decoder: Decoder, tokens: np.ndarray) -> tuple[str, np.ndarray]:
    """(where it ran, logits [n, vocab]) of the checkpoint."""
    small = not source.quantised_by and 4 * sum(map(_size, source.tensors.values())) <= TORCH_BYTES
    if small and find_spec("torch") and find_spec("transformers"):
        logits = torch_logits(source.folder, tokens)
        if logits is not None:
            return "transformers", logits
    for _, logits in forward(source, decoder, tokens):
        pass
    return "numpy", logits


def exported_logits(folder: Path, tokens: np.ndarray, largest_bytes: int) -> tuple[str, np.ndarray]:
    """(where it ran, logits [n, vocab]) of the export."""
    if (folder / "model.onnx.data").stat().st_size <= 2 * largest_bytes + MAPPED_BYTES:
        return "edgeattn", _runtime_logits(folder, tokens)
    feeds = _feeds(read_config(folder)["model"], tokens)
    return "numpy", interpret(folder, feeds, ["logits"])["logits"]


def faulty_layer(folder: Path, source: Checkpoint, decoder: Decoder, tokens: np.ndarray, limit: float) -> str | None:
    """The first node whose part of the hidden state differs, each given the checkpoint's own input; None when none does."""
    expected, previous, faults = forward(source, decoder, tokens), [np.float32(0)], []
    wanted = {"embedding", "head", *(f"layers.{i}.{part}_add" for i in range(decoder.num_layers) for part in ("attention", "mlp"))}

    def observe(name, got):
        if name not in wanted:
            return got
        _, hidden = next(expected)
        base = previous[0] if name.startswith("layers.") else np.float32(0)
        error = np.linalg.norm(got - hidden) / max(np.linalg.norm(hidden - base), 1e-30)
        if not error <= limit:
            faults.append(f"{name.removesuffix('_add')} differs (relative error {error:.2g}, limit {limit:g})")
        previous[0] = hidden
        return hidden
    interpret(folder, _feeds(read_config(folder)["model"], tokens), ["logits"], observe)
    return faults[0] if faults else None


def _faulty_engine(folder, engine, got, tokens, limit):
    exact = interpret(folder, _feeds(read_config(folder)["model"], tokens), ["logits"])["logits"]
    return f"every layer is right in NumPy, but not in {engine}" if not compare(got, exact)["rms_error"] <= limit else None


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _limits(precision):
    return OTHER_LIMITS.get(precision) or LIMITS[max(width for width in LIMITS if width <= bits_of(precision))]


def _largest_bytes(source):
    return 4 * max(map(_size, source.tensors.values()))


def _size(tensor):
    return int(np.prod(tensor.shape, dtype=np.int64))


def _runtime_logits(folder, tokens, device="cpu"):
    model = Model.load(folder, ctx_size=len(tokens), device=device)
    return model.forward([(model.new_sequence(), tokens)], "all")


def _onnxruntime_logits(folder, tokens):
    import onnxruntime
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    return session.run(["logits"], _feeds(read_config(folder)["model"], tokens))[0]


def _feeds(model, tokens):
    """The graph's inputs for a first call that wants every row's logits."""
    empty = np.zeros((model["kv_heads"], 0, model["head_dim"]), np.float32)
    rows = np.arange(len(tokens))
    past = {f"past_{what}.{layer}": empty for what in ("key", "value") for layer in range(model["num_layers"])}
    return {"token_ids": tokens, "positions": rows, "logit_rows": rows, **past}
