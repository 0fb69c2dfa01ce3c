"""GPTQ with attention-aware Hessians (after BoA, arXiv 2406.13474): q, k and v are rounded for what attention makes of them.

A change D of a head's rows costs tr(R D C D^T), with R and C from `exporters/attention_statistics.py`. GPTQ's compensation along a row
needs C alone. R says besides what rows still to come can make up for, so a head's rows are rounded one after another; heads side by side.
"""
import numpy as np

from edgeattn.exporters.quantisers import dequantise, gptq

NEEDS_STATISTICS = NEEDS_HEADS = True
ZERO_POINTS = None


def quantise(weight, bits, block_size, statistics):
    codes, scales, _ = gptq.quantise(weight, bits, block_size, statistics)
    together = {}
    for head in statistics.heads:  # those of equal hessians and sizes side by side
        together.setdefault((id(head.hessian), head.stop - head.start), []).append(head)
    for heads in together.values():
        rows = np.array([np.arange(head.start, head.stop) for head in heads])
        codes[rows], scales[rows] = _heads(weight[rows], bits, block_size, heads[0].hessian, np.array([head.metric for head in heads]))
    return codes, scales, None


def _heads(rest, bits, block_size, hessian, metrics):
    """rest [heads, rows, K], used up; metrics [heads, rows, rows] -> codes and scales of it."""
    factors, (order, columns), k = _factors(metrics), gptq.factorise(hessian), rest.shape[2]
    found = []
    for i in range(rest.shape[1]):
        codes, scales, _ = gptq.quantise_columns(rest[:, i], bits, block_size, hessian, order, columns)
        error = (rest[:, i] - dequantise(codes, scales, None, bits)[:, :k]) / factors[:, i, i, None]
        rest[:, i + 1:] -= factors[:, i, i + 1:, None] * error[:, None]
        found.append((codes, scales))
    return tuple(np.stack(part, axis=1) for part in zip(*found))


def _factors(metrics):
    damped, rows = metrics.copy(), metrics.shape[1]
    mean = np.trace(metrics, axis1=1, axis2=2) / rows
    damped[:, np.arange(rows), np.arange(rows)] += np.where(mean > 0, gptq.DAMPING * mean, 1)[:, None]
    return gptq.inverse_factor(damped).astype(np.float32)
