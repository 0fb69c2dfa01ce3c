"""What methods of sparse prefill that can be calibrated are given, fitted to chunks of a model's own attention.

    sale_thresholds      [layers, num_heads] float32         policies/prefill/sale.py
    minference_patterns  [layers, num_heads, 3] int32        policies/prefill/minference.py
    sparge_attn          [layers, num_heads, 2] float32      policies/prefill/sparge_attn.py
    moa_spans            [layers, num_heads, 2] float32      policies/prefill/moa.py
all of them in calibration.safetensors. The query heads of one KV head are fitted at a time, which bounds what the trying takes; MoA's spans
are then shared out over all heads of the model.
"""
from collections.abc import Callable

import numpy as np

from edgeattn.policies.prefill import moa
from edgeattn.policies.prefill.minference import NAME as PATTERNS, Minference
from edgeattn.policies.prefill.moa import NAME as SPANS
from edgeattn.policies.prefill.sale import NAME as THRESHOLDS, Sale
from edgeattn.policies.prefill.sparge_attn import NAME as COVERS, SpargeAttn
from edgeattn.recording import record_chunk

LENGTHS = 1024, 2048, 4096  # tokens of the prompts, one of each; a chunk is the end of one
DENSITY = 0.5               # of all pairs, that MoA's spans read together


def fit_prefill(model, prompts: list, progress: Callable[[int, int], None] | None = None) -> dict[str, np.ndarray]:
    """prompts: token ids of texts, best of several lengths. progress(done, total) counts prompts and KV heads.
    ValueError: the model's cache does not keep keys as they are, or a prompt is shorter than two tokens."""
    if not model.cache.exact:
        raise ValueError("sparse prefill is fitted to exact keys: load the model with a KV cache of f16 or f32, without eviction")
    shape, chunks, found = model.cache.shape, [], []
    total = len(prompts) + shape[0] * shape[1]
    for ids in prompts:
        chunks.append(record_chunk(model, ids))
        if progress:
            progress(len(chunks), total)
    candidates = np.array([(alpha, beta) for alpha in moa.ALPHAS for beta in moa.BETAS])
    for layer, head in np.ndindex(shape):
        found.append(_fit(*zip(*(chunk.group(layer, head) for chunk in chunks)), model.attention_inputs(layer)[1]["scale"], candidates))
        if progress:
            progress(len(prompts) + len(found), total)
    made = {name: np.stack([x[name] for x in found]).reshape(shape[0], -1, *found[0][name].shape[1:]) for name in found[0]}
    lost, read = made.pop("lost"), found[0]["read"]
    made.pop("read")
    return made | {SPANS: candidates[moa.assign(lost, read, DENSITY)].astype(np.float32)}


def _fit(q, k, v, scale, candidates) -> dict[str, np.ndarray]:
    """Of one KV head's query heads, first dimension of each array but `read`. q, k, v: of each prompt"""
    lost, read = moa.losses(q, k, v, scale, candidates)
    return {THRESHOLDS: Sale.calibrate(q, k, v, scale)["sale_thresholds"], PATTERNS: Minference.calibrate(q, k, v, scale)["patterns"],
            COVERS: SpargeAttn.calibrate(q, k, v, scale)["sparge_attn"], "lost": lost, "read": read}
