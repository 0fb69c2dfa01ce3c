"""Principal components of a model's keys, for selections that score keys by their first few (policies/decode/loki.py).

Tensor key_components of calibration.safetensors: [layers, kv_heads, head_dim, head_dim] float32, one component a row, the one along which
keys are longest first. Keys are taken as attention reads them, rotated by their positions, and no mean is taken off (arXiv 2406.02542).
"""
from pathlib import Path

import numpy as np

from edgeattn import calibration

NAME = "key_components"
ORTHONORMAL = 1e-4  # how far products of two components may be off


def measure_components(model, prompts: list, progress=None) -> np.ndarray:
    """prompts: token ids of texts. progress(done, total) counts them. ValueError: the model's cache does not keep keys as they are."""
    if not model.cache.exact:
        raise ValueError("principal components are of exact keys: load the model with a KV cache of f16 or f32, without eviction")
    shape, depth = model.cache.shape, model.cache.head_dim
    moments = np.zeros((*shape, depth, depth))
    for done, ids in enumerate(prompts):
        sequence = model.new_sequence()
        try:
            model.forward([(sequence, ids)], "none")
            for head in np.ndindex(shape):
                keys = model.cache.read(sequence, *head)[0].astype(np.float64)
                moments[head] += keys.T @ keys
        finally:
            model.free(sequence)
        if progress:
            progress(done + 1, len(prompts))
    found = np.linalg.eigh(moments)[1][..., ::-1].swapaxes(-1, -2)
    largest = np.take_along_axis(found, np.abs(found).argmax(-1)[..., None], -1)
    return np.ascontiguousarray(found * np.sign(largest), np.float32)  # a component's sign is no one's choice


def save_components(folder, config: dict, components: np.ndarray, tokens: int) -> None:
    """tokens: in the texts that were read."""
    calibration.save(Path(folder) / calibration.FILE, config, {NAME: components}, {NAME: {"tokens": tokens}})


def load_components(folder, config: dict) -> np.ndarray:
    """ValueError: the folder has none, or they are damaged."""
    about = config["model"]
    found = calibration.load(folder, config)[0].get(NAME)
    shape = about["num_layers"], about["kv_heads"], about["head_dim"], about["head_dim"]
    good = found is not None and found.shape == shape and np.isfinite(found).all()
    if not good or np.abs(found @ found.swapaxes(-1, -2) - np.eye(shape[-1])).max() > ORTHONORMAL:
        raise ValueError(f"{Path(folder) / calibration.FILE}: no usable principal components of keys: run edgeattn calibrate -m {folder}")
    return np.ascontiguousarray(found, np.float32)
