"""The compensation token: one pseudo-slot that stands for what a KV head has dropped (RazorAttention, arXiv 2407.15891).

Of each layer and KV head a sequence may hold, as float32: the number n of dropped tokens, their mean key [head_dim] (rotated), their
mean value [head_dim]. It is attended with ln n added to its score; exact if all dropped keys are equal.
"""
import numpy as np
from numba import float32, int64, njit

from edgeattn.kernels_cpu.attention_call import COMPENSATION, GROUP, HEAD_DIM, KV_HEADS, LAYER, NUM_HEADS, ROTATED
from edgeattn.kernels_cpu.attention_softmax import LOWEST_SCORE
from edgeattn.kernels_cpu.floats import F
from edgeattn.kernels_cpu.simd import at, fma, hsum, load, splat, store


@njit(nogil=True, error_model="numpy")
def compensation_of(call, sequence, head, row, h):
    """(score, weight, address of the mean value) for query head `h` of the group in a row of q; weight 0 where nothing was dropped."""
    base, depth = at(int64, call[COMPENSATION])[sequence] if call[COMPENSATION] else 0, call[HEAD_DIM]
    if base == 0:
        return LOWEST_SCORE, np.float32(0), base
    held = at(float32, base + 4 * (call[LAYER] * call[KV_HEADS] + head) * (1 + 2 * depth))
    if held[0] <= 0:
        return LOWEST_SCORE, np.float32(0), base
    q, total = at(float32, call[ROTATED]), splat(F, np.float32(0))
    first = (row * call[NUM_HEADS] + head * call[GROUP] + h) * depth
    for d in range(0, depth, 16):
        total = fma(load(F, q, first + d), load(F, held, 1 + d), total)
    mean = base + 4 * ((call[LAYER] * call[KV_HEADS] + head) * (1 + 2 * depth) + 1 + depth)
    return hsum(total) + np.log(held[0]), np.float32(1), mean


@njit(nogil=True, error_model="numpy")
def finish_row(call, sequence, head, row, member, total, best, out, first, result, to):
    """The output of one row, for the `member`-th head of the group: its weighted sums, from out[first] on, over the sum of weights `total`,
    the compensation token included. best: the score whose weight is 1."""
    depth, scale = call[HEAD_DIM], np.float32(1)
    extra, weight, mean = compensation_of(call, sequence, head, row, member)
    if weight > 0:
        top = max(extra, best)
        weight, scale = np.exp(extra - top), np.exp(best - top)
        total = total * scale + weight
    for c in range(0, depth, 16):
        x = load(F, out, first + c) * (scale / total)
        if weight > 0:
            x = fma(load(F, at(float32, mean), c), splat(F, weight / total), x)
        store(result, to + c, x)
