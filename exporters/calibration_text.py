"""The text that a model is calibrated on: a file of the user's, or what the model itself says.

A model samples its own training distribution, so no file is needed (LLM-QAT, arXiv 2305.17888, begins from a random token too).
"""
from collections.abc import Callable
from pathlib import Path

import numpy as np

LENGTH = 512   # tokens
SEQUENCES = 32
SPOKEN = 16 * LENGTH  # tokens of cache for a model that says its text, in all sequences of a round
LEAST = 2048     # tokens of a text: fewer say too little about thousands of inputs
SEED = 0


def read_text(path: str | Path, folder: str | Path, vocab_size: int, longest: int) -> list[np.ndarray]:
    """Pieces of a text file spread evenly over it, as token ids [n] int64; `folder` has the tokenizer.json. ValueError: too short."""
    from tokenizers import Tokenizer
    if not (Path(folder) / "tokenizer.json").is_file():
        raise ValueError("the checkpoint has no tokenizer.json, which calibration text needs; leave --calibration out")
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not UTF-8 text") from None
    ids = np.array(Tokenizer.from_file(str(Path(folder) / "tokenizer.json")).encode(text, add_special_tokens=False).ids, np.int64)
    if len(ids) < LEAST:
        raise ValueError(f"{path}: {len(ids)} tokens are too few to calibrate on; give at least {LEAST}, or leave --calibration out")
    if ids.max() >= vocab_size:
        raise ValueError(f"{path}: the tokenizer gives token {ids.max()}, the model has {vocab_size}; they belong to different models")
    length = min(LENGTH, longest)
    count = min(SEQUENCES * LENGTH // length, len(ids) // length)
    starts = np.linspace(0, len(ids) - length, count).astype(np.int64)
    return [ids[start:start + length] for start in starts]


def own_text(folder: str | Path, progress: Callable[[int, int], None] | None = None) -> list[np.ndarray]:
    """What the exported model in `folder` says at temperature 1 after one random token: ids [n] int64. progress(tokens, tokens in all)."""
    from edgeattn.prefill_scheduler import PrefillOptions
    from edgeattn.runtime import Model
    from edgeattn.scheduler import SparseOptions
    model = Model.load(folder, sparse=SparseOptions("off"), prefill=PrefillOptions("off"))
    length, rng = min(LENGTH, model.ctx_size), np.random.default_rng(SEED)
    count = SEQUENCES * LENGTH // length
    together, done = max(1, min(count, model.ctx_size // -(-length // 32) // 32, 32)), []
    while len(done) < count:
        wanted = min(together, count - len(done))
        done += _say(model, length, wanted, rng, lambda new, before=len(done) * length: progress and progress(before + new, count * length))
    return done


def _say(model, length, count, rng, tell):
    about = model.config["model"]
    start = [] if about["bos_token_id"] is None else [about["bos_token_id"]]
    said = [[*start, int(token)] for token in rng.integers(0, about["vocab_size"], count)]
    sequences, fed = [model.new_sequence() for _ in said], [0] * count
    try:
        while len(said[0]) < length:
            logits = model.forward([(sequence, np.array(ids[n:])) for sequence, ids, n in zip(sequences, said, fed)])
            fed = [len(ids) for ids in said]
            for ids, token in zip(said, (logits + rng.gumbel(size=logits.shape)).argmax(-1)):
                ids.append(int(token))
            tell(count * len(said[0]))
    finally:
        for sequence in sequences:
            model.free(sequence)
    return [np.array(ids[:length], np.int64) for ids in said]
