"""Thresholds of attention scores, fitted on the model itself, for values that decode leaves out (Top-Theta, arXiv 2502.08363).

    thresholds   [layers, num_heads, 2] float32 in calibration.safetensors: alpha and beta; of n tokens those pages are kept that hold a
                 score (q . k times the softmax scale) of alpha + beta * ln n at least

A row of scores tells what its threshold should have been: the one that a wanted part of the pages pass, a page being worth its best token.
At each length the mean over rows is taken and, as in the paper, a tenth of their standard deviation more; a line in ln n is fitted to
these.
"""
from pathlib import Path

import numpy as np

from edgeattn.calibration import FILE, load, save
from edgeattn.page_formats import PAGE
from edgeattn.recording import record_queries

LENGTHS = (256, 512, 1024, 2048, 4096)  # tokens at which rows are sampled, as far as a prompt reaches
ROWS = 16                               # the last ones before each length


def load_thresholds(folder, config: dict) -> np.ndarray:
    """ValueError: as calibration.load, or the model's calibration has no usable thresholds."""
    about, again = config["model"], f"run edgeattn calibrate -m {folder}"
    tensors, _ = load(folder, config)
    found, shape = tensors.get("thresholds"), (about["num_layers"], about["num_heads"], 2)
    if found is None:
        raise ValueError(f"{Path(folder) / FILE}: no thresholds in it: {again}")
    if found.shape != shape or found.dtype != np.float32 or np.isnan(found).any():
        raise ValueError(f"{Path(folder) / FILE}: thresholds must be {list(shape)} float32 without NaN, got {list(found.shape)} "
                         f"{found.dtype}: {again}")
    return np.ascontiguousarray(found)


def save_thresholds(model, thresholds: np.ndarray, **how) -> None:
    """Into the model's folder. how: whatever JSON can hold."""
    save(model.folder / FILE, model.config, {"thresholds": thresholds}, {"thresholds": {"method": "top-theta", **how}})


def fit_thresholds(model, prompts: list, kept: float = 0.1) -> np.ndarray:
    """Thresholds by which each query head keeps a part `kept` of the pages, from token ids of texts. The model: one that keeps everything,
    in 16 bits. ValueError: no prompt is as long as the first of LENGTHS, or `kept` is not a part."""
    if not 0 < kept <= 1:
        raise ValueError(f"kept must be a part of the pages, more than 0 and at most 1, got {kept}")
    found = {n: rows for n in LENGTHS for rows in [[_sample(model, ids[:n], kept) for ids in prompts if len(ids) >= n]] if rows}
    if not found:
        raise ValueError(f"thresholds need prompts of {LENGTHS[0]} tokens at least, the longest has {max(map(len, prompts), default=0)}")
    each = {n: np.concatenate(rows, -1) for n, rows in found.items()}  # [layers, heads, samples]
    points = np.stack([x.mean(-1) + 0.1 * x.std(-1) for x in each.values()], -1)
    logs = np.log(list(each))
    around = logs - logs.mean()
    slope = (points @ around) / max(float(around @ around), 1e-9)
    return np.stack([points.mean(-1) - slope * logs.mean(), slope], -1).astype(np.float32)


def _sample(model, ids, kept):
    """[layers, heads, ROWS]: the scores that the last rows' thresholds should be."""
    sequence = model.new_sequence()
    try:
        model.compute(sequence, ids[:-ROWS])
        queries = record_queries(model, sequence, ids[-ROWS:])
        return np.stack([_limits(model, sequence, layer, q, kept) for layer, q in enumerate(queries)])
    finally:
        model.free(sequence)


def _limits(model, sequence, layer, q, kept):
    """[heads, rows]: the smallest score with which a page is among the kept part of each row. q [heads, rows, head_dim]"""
    (heads, rows), kv_heads = q.shape[:2], model.cache.shape[1]
    q = q * np.float32(model.attention_inputs(layer)[1]["scale"])
    found = np.zeros((heads, rows))
    for head in range(kv_heads):
        keys, _ = model.cache.read(sequence, layer, head)
        for h in range(head * heads // kv_heads, (head + 1) * heads // kv_heads):
            for i in range(rows):
                scores = keys[:len(keys) - rows + i + 1] @ q[h, i]
                best = np.maximum.reduceat(scores, np.arange(0, len(scores), PAGE))
                found[h, i] = np.sort(best)[-max(1, int(np.ceil(kept * len(best))))]
    return found
