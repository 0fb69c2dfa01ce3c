"""What was measured on a model itself: calibration.safetensors in its folder, and the head scores in it.

Tensors
    head_scores   [layers, kv_heads] float32: by how much the loss of a passkey's tokens rises (nats a token) when that KV head alone
                  is left with the first page and RECENT tokens
    key_components, thresholds, those of sparse prefill   see principal_components.py, calibrate_thresholds.py, calibrate_prefill.py
Metadata: format and version (FORMAT, VERSION), key (the model's fingerprint, of edgeattn.json), and for each tensor, under its name, JSON
that says how it was made. Tensors that this file does not know are kept when it is written again.
"""
import json
import math
import os
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from edgeattn.cache.eviction import drop_oldest
from edgeattn.cache.session import fingerprint
from edgeattn.folder import inside
from edgeattn.page_formats import PAGE

FILE, FORMAT, VERSION = "calibration.safetensors", "edgeattn calibration", "1"
RECENT = 256      # tokens that a streaming head keeps besides the first page
LENGTHS = (512, 1024, 2048)
FACTS = 4         # passkeys in a prompt
BRANCHES = 16     # heads that are tried in one forward call, at most

ADJECTIVES = "amber ancient bitter brave broken calm clever crooked distant eager early faded gentle golden hollow humble".split()
NOUNS = "anchor baker bridge candle engine farmer garden harbour ladder lantern mill orchard painter river sailor tower".split()
VERBS = "admired carried counted drew followed forgot guarded heard mended met moved noticed passed praised sold watched".split()
TIMES = "after dinner|at dawn|at night|before the storm|during the feast|in autumn|in silence|last week|on Sunday|with care".split("|")


# ---- the file ------------------------------------------------------------------------------------------------------
def load(folder, config: dict) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Tensors and metadata of a folder's calibration. config: its edgeattn.json.
    ValueError: there is none, it is another model's or another version's, or it is damaged."""
    path, again = inside(folder, FILE), f"run edgeattn calibrate -m {folder}"
    if not path.is_file():
        raise ValueError(f"{folder}: this model is not calibrated: {again}")
    try:
        with safe_open(path, "numpy") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged ({error}): remove it and {again}") from None
    if (metadata.get("format"), metadata.get("version")) != (FORMAT, VERSION):
        raise ValueError(f"{path}: not a calibration of version {VERSION}: {again}")
    if metadata.get("key") != fingerprint(config):
        raise ValueError(f"{path}: was made with another model than the one in this folder: {again}")
    return tensors, metadata


def load_heads(folder, config: dict, name: str, *rest: int) -> np.ndarray | None:
    """The tensor `name`, [layers, num_heads, *rest]; None where the folder has no calibration, or one without it.
    ValueError: as `load`, or it is of another shape or not finite."""
    if not (Path(folder) / FILE).is_file():
        return None
    found, shape = load(folder, config)[0].get(name), (config["model"]["num_layers"], config["model"]["num_heads"], *rest)
    if found is not None and (found.shape != shape or not np.isfinite(found).all()):
        raise ValueError(f"{Path(folder) / FILE}: {name} must be {list(shape)} finite numbers, got {list(found.shape)}: calibrate again: "
                         f"edgeattn calibrate -m {folder} --parts prefill")
    return found


def save(path, config: dict, tensors: dict[str, np.ndarray], about: dict[str, dict]) -> None:
    """Put tensors into the calibration at `path`, what else it holds of this model stays. about: {tensor's name: how it was made}.
    The file is replaced whole, or not at all: OSError."""
    path = Path(path)
    try:
        kept, metadata = load(path.parent, config) if path.name == FILE else ({}, {})
    except ValueError:  # none, or nothing in it is worth keeping
        kept, metadata = {}, {}
    metadata |= {"format": FORMAT, "version": VERSION, "key": fingerprint(config)} | {name: json.dumps(x) for name, x in about.items()}
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        save_file({name: np.ascontiguousarray(x) for name, x in (kept | tensors).items()}, part, metadata)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def head_classes(folder, config: dict, share: float) -> np.ndarray | None:
    """[layers, kv_heads] bool, True for the `share` of the KV heads that keep everything; None where all do. ValueError as `load`."""
    if share == 1:
        return None
    tensors, _ = load(folder, config)
    scores, shape = tensors.get("head_scores"), (config["model"]["num_layers"], config["model"]["kv_heads"])
    if scores is None or scores.shape != shape or not np.isfinite(scores).all():
        raise ValueError(f"{Path(folder) / FILE}: no usable head scores: run edgeattn calibrate -m {folder}")
    return best(scores, share)


def best(scores: np.ndarray, share: float) -> np.ndarray:
    """Like scores, bool: the highest `share` of them, rounded up; of equals the first."""
    count = math.ceil(share * scores.size - 1e-9)
    found = np.zeros(scores.size, bool)
    found[np.argsort(-scores, axis=None, kind="stable")[:count]] = True
    return found.reshape(scores.shape)


# ---- passkeys ------------------------------------------------------------------------------------------------------
def passkeys(tokenizer, length: int, seed: int, recent: int = RECENT) -> tuple[list[int], list[tuple[list[int], list[int]]]]:
    """(token ids of a text of `length` tokens with passkeys in it, [(ids that ask for one, ids of its answer)]).

    The keys lie evenly spread between the first page and the recent tokens, where only heads that see everything find them.
    """
    rng = np.random.default_rng([length, seed])
    names = [f"{ADJECTIVES[i // 16]} {NOUNS[i % 16]}" for i in rng.permutation(256)[:FACTS]]
    keys = [str(rng.integers(10_000, 100_000)) for _ in names]
    facts, asks, answers = ([tokenizer.encode(text, special=False) for text in texts] for texts in (
        [f" The pass key of the {name} is {key}." for name, key in zip(names, keys)],
        [f"\nThe pass key of the {name} is" for name in names], [f" {key}" for key in keys]))
    room = length - sum(map(len, facts))
    filler = tokenizer.encode(" ".join(_sentence(rng) for _ in range(length // 4)))[:room]
    reach = room - PAGE - recent
    if reach < 0 or len(filler) < room:
        raise ValueError(f"a passkey prompt of {length} tokens is too short or its text ends early; at least "
                         f"{length - reach} tokens are needed")
    ids, begin = [], 0
    for i, fact in enumerate(facts):
        place = PAGE + int(reach * (i + rng.random()) / FACTS)
        ids += [*filler[begin:place], *fact]
        begin = place
    return ids + filler[begin:], list(zip(asks, answers))


def _sentence(rng):
    first, second, verb = rng.choice(NOUNS), rng.choice(NOUNS), rng.choice(VERBS)
    return f"The {rng.choice(ADJECTIVES)} {first} {verb} the {rng.choice(ADJECTIVES)} {second} {rng.choice(TIMES)}."


def score_heads(model, prompts: list, recent: int = RECENT, progress=None) -> tuple[np.ndarray, float]:
    """(scores [layers, kv_heads] float32 as in the module's docstring, the mean loss when no head streams).

    A prompt is read once. Each question goes to a branch for each KV head, whose pages are shared but for those that head drops: so heads
    stream while a question is read and answered, and see everything before. progress(done, total) counts questions.
    """
    shape = model.cache.shape
    heads, total, done = [None, *np.ndindex(shape)], sum(len(asks) for _, asks in prompts), 0
    losses = np.zeros((total, len(heads)))
    for ids, asks in prompts:
        trunk = model.new_sequence()
        try:
            model.forward([(trunk, ids)], "none")
            for ask, answer in asks:
                each = 2 + (len(ask) + len(answer)) // PAGE  # pages of a branch's KV head: a copy, what follows, a page begun
                step = max(1, min(BRANCHES, model.cache.pools[0].free // (each * trunk.counts.size)))
                for first in range(0, len(heads), step):
                    some = heads[first:first + step]
                    losses[done, first:first + len(some)] = _branch_losses(model, trunk, some, ask, answer, recent)
                done += 1
                if progress:
                    progress(done, total)
        finally:
            model.free(trunk)
    mean = losses.mean(0)
    return (mean[1:] - mean[0]).reshape(shape).astype(np.float32), float(mean[0])


def _branch_losses(model, trunk, heads, ask, answer, recent):
    """Mean loss of the answer's tokens, one branch of the trunk for each head that streams (None: none does)."""
    branches = [model.fork(trunk) for _ in heads]
    try:
        for branch, head in zip(branches, heads):
            if head is not None:
                pages = np.zeros(model.cache.shape, np.int64)
                pages[head] = max(0, branch.length // PAGE - 1 - -(-recent // PAGE))
                drop_oldest(model.cache, branch, pages)
        if len(ask) > 1:
            model.forward([(branch, ask[:-1]) for branch in branches], "none")
        rows = model.forward([(branch, [ask[-1], *answer[:-1]]) for branch in branches], "all").astype(np.float64)
    finally:
        for branch in branches:
            model.free(branch)
    rows -= rows.max(-1, keepdims=True)
    wanted = np.tile(answer, len(heads))
    found = rows[np.arange(len(rows)), wanted] - np.log(np.exp(rows).sum(-1))
    return -found.reshape(len(heads), -1).mean(1)
