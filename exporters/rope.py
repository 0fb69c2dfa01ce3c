"""Rotary position embedding: the frequencies that a config asks for, and their cos and sin tables (arXiv 2104.09864)."""
import math

import numpy as np

TYPES = ("default", "linear", "llama3", "divided")


def inverse_frequencies(config: dict, head_dim: int) -> np.ndarray:
    """Radians per position of every rotated pair: [head_dim / 2] float64. Reads `rope_parameters` (transformers 5) or
    `rope_theta` and `rope_scaling` (before)."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if any(isinstance(value, dict) for value in rope.values()):
        raise ValueError("rope parameters that differ between layers are not supported")
    if kind not in TYPES:
        raise ValueError(f"rope type {kind!r} is not supported; supported: {list(TYPES)}")
    if rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) != 1.0:
        raise ValueError("partial rotary embedding (partial_rotary_factor) is not supported")
    theta = float(rope.get("rope_theta", config.get("rope_theta", 10000.0)))
    frequencies = theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if kind == "linear":
        return frequencies / rope["factor"]
    if kind == "divided":  # GGUF's form of llama3
        divisors = np.array(rope["divisors"])
        if divisors.shape != frequencies.shape or not (np.isfinite(divisors) & (divisors > 0)).all():
            raise ValueError(f"the rope frequencies' divisors must be {len(frequencies)} positive numbers, got {len(divisors)}")
        return frequencies / divisors
    return frequencies if kind == "default" else _llama3(frequencies, rope, config)


def _llama3(frequencies, rope, config):
    """Slow down the waves that the original context held less than `low_freq_factor` times, and blend up to `high_freq_factor`."""
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    context = rope.get("original_max_position_embeddings",
                       config.get("original_max_position_embeddings", config["max_position_embeddings"]))
    turns = context * frequencies / (2 * math.pi)
    blend = np.clip((turns - low) / (high - low), 0, 1)
    return frequencies * (blend + (1 - blend) / rope["factor"])


def tables(frequencies: np.ndarray, ctx_size: int) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin of every position: [ctx_size, len(frequencies)] float32, computed in float64."""
    angles = np.arange(ctx_size, dtype=np.float64)[:, None] * frequencies
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
