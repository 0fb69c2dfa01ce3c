"""What a quantised page's parameters do to q and to the softmax weights, so that codes can be multiplied as they are.

The weights of a page's rows, q * step for keys by channel and p * step for values by token, become signed bytes with one scale for each
query head. Codes are unsigned: what is lost by rounding a weight is given back at the mean code, so that only the part of the error
that varies with the code remains. With c a code and m the mean one:
    sum w c = unit * sum r (c - m) + m * sum w,    r = round(w / unit)
q is scaled to maximum 1 once a step, for each query head, so that a page needs one maximum for all heads of a group.
"""
import numpy as np
from numba import float32, int8, njit, uint16

from edgeattn.kernels_cpu.attention_call import CHUNK, GROUP, HEAD_DIM, PLACE, SCRATCH, SCRATCH_SIZE, WIDTH
from edgeattn.kernels_cpu.float_tiles import weave
from edgeattn.kernels_cpu.floats import F, I
from edgeattn.kernels_cpu.page_rows import HEAD_ROWS
from edgeattn.kernels_cpu.simd import at, convert, fma, hmax, hsum, load, load_half, splat, store, vabs, vmax, zeros

STRIDE = CHUNK + 16   # of a row of scores
TINY = np.float32(1e-30)
# Addresses in a thread's scratch. A row of weighted sums, OUT, is followed by WIDTH / 2 lanes: for each block of 32 channels 16 lanes
# of what the values' minima add. TOKEN_...: q as bytes for keys by token, the same for all pages.
(TASK, SCORES, OUT, SUMS, TOPS, BYTES, SCALES, PRODUCTS, Q, Q_TOPS, NORMS, TOKEN_BYTES, TOKEN_SCALES, TOKEN_BASES, TOKEN_SUMS,
 PEAKS, DROPPED) = range(17)


@njit(nogil=True, error_model="numpy")
def places(call, thread):
    start = call[SCRATCH] + 4 * thread * call[SCRATCH_SIZE]
    heads, width = (call[GROUP] + HEAD_ROWS - 1) // HEAD_ROWS * HEAD_ROWS, call[WIDTH]
    scores = start + PLACE
    out = scores + 4 * heads * STRIDE
    sums = out + 6 * heads * width
    tops = sums + 64 * heads
    bytes_ = tops + 16 * heads
    scales = bytes_ + heads * width
    products = scales + heads * width // 8 + 64
    q = products + 128 * heads
    q_tops = q + 4 * heads * width
    norms = q_tops + heads * width
    token_bytes = norms + 16 * heads
    token_scales = token_bytes + heads * width
    token_bases = token_scales + 16 * heads
    return (start, scores, out, sums, tops, bytes_, scales, products, q, q_tops, norms, token_bytes, token_scales, token_bases,
            token_bases + heads * width // 8, token_bases + heads * width // 4, token_bases + heads * (width // 4 + 16))


@njit(nogil=True, error_model="numpy")
def prepare_queries(call, place, q, by_token):
    """Once a task: each head's q with maximum 1, the maxima over four heads; with `by_token` q as bytes, too."""
    depth, x, to, norms = call[HEAD_DIM], at(float32, q), at(float32, place[Q]), at(float32, place[NORMS])
    heads, tops = (call[GROUP] + HEAD_ROWS - 1) // HEAD_ROWS * HEAD_ROWS, at(float32, place[Q_TOPS])
    for h in range(heads):
        top = splat(F, TINY)
        source = min(h, call[GROUP] - 1) * depth  # beyond the group: anything finite
        for c in range(0, depth, 16):
            top = vmax(top, vabs(load(F, x, source + c)))
        norms[h] = hmax(top)
        for c in range(0, depth, 16):
            y = load(F, x, source + c) * (np.float32(1) / norms[h])
            store(to, h * depth + c, y)
            first = h // HEAD_ROWS * depth + c
            store(tops, first, vabs(y) if h % HEAD_ROWS == 0 else vmax(load(F, tops, first), vabs(y)))
    if by_token:
        for h in range(0, heads, HEAD_ROWS):
            for c in range(0, depth, 16):
                r = _four(to, h * depth + c, depth, splat(F, np.float32(127)))
                store(at(int8, place[TOKEN_BYTES]), h * depth + 4 * c, weave(r[0], r[1], r[2], r[3]))
        _token_sums(call, place, heads, depth, to, norms)


@njit(nogil=True, error_model="numpy")
def _token_sums(call, place, heads, depth, q, norms):
    """For each group of 32 channels: the sums of q and of its bytes."""
    scales, bases, sums = at(float32, place[TOKEN_SCALES]), at(float32, place[TOKEN_BASES]), at(float32, place[TOKEN_SUMS])
    for h in range(heads):
        scales[h] = norms[h] * np.float32(1 / 127)
        for first in range(0, depth, 32):
            total = rounded = splat(F, np.float32(0))
            for c in range(first, min(first + 32, depth), 16):
                x = load(F, q, h * depth + c)
                total += x
                rounded += convert(F, convert(I, x * np.float32(127)))
            bases[first // 32 * heads + h] = hsum(rounded)
            sums[first // 32 * heads + h] = hsum(total) * norms[h]


@njit(nogil=True, error_model="numpy")
def _four(x, first, stride, scale):
    """Vectors of four rows times `scale`, rounded."""
    return (convert(I, load(F, x, first) * scale), convert(I, load(F, x, first + stride) * scale),
            convert(I, load(F, x, first + 2 * stride) * scale), convert(I, load(F, x, first + 3 * stride) * scale))


@njit(nogil=True, error_model="numpy")
def fold_keys(call, place, params, levels, unread, at_score):
    """Keys by channel -> bytes and scales for dot_rows, and the start of each head's scores. unread: the mean of what dot_rows leaves
    out of each code."""
    depth, p, q = call[HEAD_DIM], at(uint16, params), at(float32, place[Q])
    scores, scales = at(float32, place[SCORES]), at(float32, place[SCALES])
    norms, tops = at(float32, place[NORMS]), at(float32, place[Q_TOPS])
    mean = np.float32(levels) * np.float32(0.5)
    center = mean - unread
    for h in range(0, call[GROUP], HEAD_ROWS):
        top = splat(F, TINY)
        for c in range(0, depth, 16):
            top = vmax(top, load(F, tops, h // HEAD_ROWS * depth + c) * load_half(F, p, depth + c))
        largest = hmax(top)
        inverse, unit = np.float32(127) / largest, largest * np.float32(1 / 127)
        b0, b1, b2, b3 = zeros(F, 4)
        s0, s1, s2, s3 = zeros(I, 4)
        for c in range(0, depth, 16):
            step = load_half(F, p, depth + c)
            middle, first = fma(step, splat(F, mean), load_half(F, p, c)), h * depth + c
            r0, r1, r2, r3 = _four(q, first, depth, step * inverse)
            store(at(int8, place[BYTES]), h * depth + 4 * c, weave(r0, r1, r2, r3))
            b0, b1 = fma(load(F, q, first), middle, b0), fma(load(F, q, first + depth), middle, b1)
            b2, b3 = fma(load(F, q, first + 2 * depth), middle, b2), fma(load(F, q, first + 3 * depth), middle, b3)
            s0, s1, s2, s3 = s0 + r0, s1 + r1, s2 + r2, s3 + r3
        back = splat(F, -center * unit)
        for i in range(4):
            base, total = ((b0, s0), (b1, s1), (b2, s2), (b3, s3))[i]
            start = splat(F, hsum(fma(convert(F, total), back, base)) * norms[h + i])
            store(scores, (h + i) * STRIDE + at_score, start)
            store(scores, (h + i) * STRIDE + at_score + 16, start)
            scales[h + i] = unit * norms[h + i]


@njit(nogil=True, error_model="numpy")
def _weights(scores, first, low_step, high_step, low, high, rest_at, out, scales, h, mean):
    """One head's 32 weights times their steps -> rounded, in two vectors; what minima and rounding leave goes to `out`."""
    p0, p1 = load(F, scores, first), load(F, scores, first + 16)
    w0, w1 = p0 * low_step, p1 * high_step
    top = max(hmax(vmax(w0, w1)), TINY)
    inverse, unit = np.float32(127) / top, top * np.float32(1 / 127)
    r0, r1 = convert(I, w0 * inverse), convert(I, w1 * inverse)
    scales[h] = unit
    rest = fma(p1, high, fma(p0, low, load(F, out, rest_at)))
    store(out, rest_at, fma(convert(F, r0 + r1), splat(F, -mean * unit), rest))
    return r0, r1


@njit(nogil=True, error_model="numpy")
def block_bytes(call, place, block):
    return place[BYTES] + block * 32 * ((call[GROUP] + HEAD_ROWS - 1) // HEAD_ROWS * HEAD_ROWS)


@njit(nogil=True, error_model="numpy")
def block_scales(call, place, block):
    return place[SCALES] + block * 4 * ((call[GROUP] + HEAD_ROWS - 1) // HEAD_ROWS * HEAD_ROWS)


@njit(nogil=True, error_model="numpy")
def fold_weights(call, place, block, params, levels, at_score, out, rest, rest_stride):
    """Values by token -> a block's bytes and scales for dot_rows over 32 tokens. Minimum and mean code, weighted, are added lane by lane to
    16 floats of `out` at rest + head * rest_stride."""
    p, scores, scales, to = at(uint16, params), at(float32, place[SCORES]), at(float32, block_scales(call, place, block)), \
        at(int8, block_bytes(call, place, block))
    mean = np.float32(levels) * np.float32(0.5)
    m = splat(F, mean)
    s0, s1 = load_half(F, p, 32), load_half(F, p, 48)
    l0, l1 = fma(s0, m, load_half(F, p, 0)), fma(s1, m, load_half(F, p, 16))
    for h in range(0, call[GROUP], HEAD_ROWS):
        a0, a1 = _weights(scores, h * STRIDE + at_score, s0, s1, l0, l1, rest + h * rest_stride, out, scales, h, mean)
        b0, b1 = _weights(scores, (h + 1) * STRIDE + at_score, s0, s1, l0, l1, rest + (h + 1) * rest_stride, out, scales, h + 1, mean)
        c0, c1 = _weights(scores, (h + 2) * STRIDE + at_score, s0, s1, l0, l1, rest + (h + 2) * rest_stride, out, scales, h + 2, mean)
        d0, d1 = _weights(scores, (h + 3) * STRIDE + at_score, s0, s1, l0, l1, rest + (h + 3) * rest_stride, out, scales, h + 3, mean)
        store(to, 32 * h, weave(a0, b0, c0, d0))
        store(to, 32 * h + 64, weave(a1, b1, c1, d1))
