"""One token from one row of logits, without sorting the vocabulary.

Tokens are ranked only as far as the filters reach: a histogram of the distances to the largest logit finds a threshold that a
few more than the wanted number pass; those are sorted, and the number grows when it was not enough. NaN counts as -inf.
"""
import numpy as np
from numba import carray, cfunc, float32, float64, int64, njit

from edgeattn.kernels_cpu.floats import F, exp
from edgeattn.kernels_cpu.parallel import call_worker, worker
from edgeattn.kernels_cpu.simd import at, hmax, hsum, load, splat, vmax
from edgeattn.kernels_cpu.steps import STEP, call

ARGS = ("logits", "logits.0", "history", "history.0", "settings", "token", "top_k", "workspace")
(LOGITS, VOCAB, HISTORY, HISTORY_SIZE, SETTINGS, TOKEN, TOP_K, WORKSPACE) = range(len(ARGS))
TEMPERATURE, TOP_P, MIN_P, REPEAT_PENALTY, UNIFORM = range(5)  # in `settings`, float64
BINS, FINE = 4096, 64  # of the histogram; in one unit of logits
FIRST = 128            # ranked at first
GROW = 8               # and then each time so many times as many


def sample(logits, history, *, temperature, top_k, top_p, min_p, repeat_penalty, uniform):
    settings = np.array([temperature, top_p, min_p, repeat_penalty, uniform], np.float64)
    token = np.zeros(1, np.int64)
    tensors = dict(logits=np.ascontiguousarray(logits, np.float32), history=np.ascontiguousarray(history, np.int64), settings=settings,
                   token=token)
    call(step, ARGS, tensors, dict(top_k=int(top_k)), workspace_bytes=workspace_bytes)
    return token


def workspace_bytes(tensors, attributes, rows, threads):
    """A copy of the logits, the histogram, ranked keys and room to sort them."""
    vocab = tensors["logits"].shape[0]
    return 8 * BINS + 4 * vocab + 64 + 16 * vocab


@njit(nogil=True, error_model="numpy")
def _key(logit, token):
    """int64 that orders by falling logit, then by token; 0 and -0 are equal."""
    bits = np.int64(np.float32(logit + np.float32(0)).view(np.int32))
    return ((-bits if bits >= 0 else bits & 0x7FFFFFFF) << 32) + token


@njit(nogil=True, error_model="numpy")
def _number(logit):
    """-inf for NaN, which has no rank: past it a maximum is lost, and the bins of larger logits would be negative."""
    return logit if logit == logit else np.float32(-np.inf)


@njit(nogil=True, error_model="numpy")
def _bin(top, logit):
    distance = (top - logit) * np.float32(FINE)
    return np.int64(distance) if distance < np.float32(BINS - 1) else np.int64(BINS - 1)  # in this form also for inf - inf


@njit(nogil=True, error_model="numpy")
def _places(a):
    """Histogram, logits after the penalty, ranked tokens, room to sort them."""
    keys = a[WORKSPACE] + 8 * BINS + (4 * a[VOCAB] + 63) // 64 * 64
    return at(int64, a[WORKSPACE]), at(float32, a[WORKSPACE] + 8 * BINS), at(int64, keys), at(int64, keys + 8 * a[VOCAB])


@njit(nogil=True, error_model="numpy")
def _penalize(logits, given, vocab, history, size, penalty):
    """A copy of the logits in which those of seen tokens are smaller, once each."""
    for i in range(vocab):
        logits[i] = _number(given[i])
    for i in range(size):
        token = history[i]
        logits[token] = _number(given[token] / penalty if given[token] > 0 else given[token] * penalty)


@njit(nogil=True, error_model="numpy")
def _largest(logits, vocab):
    """The first of the largest."""
    best = splat(F, np.float32(-np.inf))
    for i in range(0, vocab - 15, 16):
        best = vmax(best, load(F, logits, i))
    top = hmax(best)
    for i in range(vocab // 16 * 16, vocab):
        top = max(top, logits[i])
    for i in range(vocab):
        if logits[i] == top:
            return i
    return 0


@njit(nogil=True, error_model="numpy")
def _sum_of_exponentials(logits, vocab, top, scale):
    """Sum of exp((logit - top) * scale): blocks in float32 lanes, added up in float64."""
    total = 0.0
    for start in range(0, vocab, 1024):
        lanes, stop = splat(F, np.float32(0)), min(vocab, start + 1024)
        for i in range(start, stop - 15, 16):
            lanes += exp((load(F, logits, i) - splat(F, top)) * scale)
        total += hsum(lanes)
        for i in range(start + (stop - start) // 16 * 16, stop):
            total += np.exp((logits[i] - top) * scale)
    return total


@njit(nogil=True, error_model="numpy")
def _sort(keys, spare, n):
    """Ascending, by merging runs of twice the length each round."""
    run = 1
    while run < n:
        for start in range(0, n, 2 * run):
            middle, end = min(start + run, n), min(start + 2 * run, n)
            i, j = start, middle
            for to in range(start, end):
                if j >= end or (i < middle and keys[i] <= keys[j]):
                    spare[to] = keys[i]
                    i += 1
                else:
                    spare[to] = keys[j]
                    j += 1
        for i in range(n):
            keys[i] = spare[i]
        run *= 2


@worker
def rank(a, wanted, top, task, thread):
    """Sort at least `wanted` tokens, the most likely ones; `top` is the first of them. Their number goes to the first bin."""
    bins, logits, ranked, spare = _places(a)
    best = logits[top]
    for i in range(BINS):
        bins[i] = 0
    for i in range(a[VOCAB]):
        bins[_bin(best, logits[i])] += 1
    limit, passing, count = np.int64(0), bins[0], np.int64(0)
    while passing < wanted:
        limit += 1
        passing += bins[limit]
    for i in range(a[VOCAB]):
        if _bin(best, logits[i]) <= limit:
            ranked[count] = _key(logits[i], i)
            count += 1
    _sort(ranked, spare, count)
    for i in range(count):
        ranked[i] &= 0xFFFFFFFF
    bins[0] = count


@njit(nogil=True, error_model="numpy")
def _kept(a, address, top):
    """How many of the ranked tokens pass top-k, top-p and min-p."""
    bins, logits, ranked, _ = _places(a)
    settings, vocab = at(float64, a[SETTINGS]), a[VOCAB]
    limit = a[TOP_K] if 0 < a[TOP_K] < vocab else vocab
    if limit == vocab and settings[TOP_P] >= 1 and settings[MIN_P] <= 0:
        return vocab
    total = 0.0
    if limit == vocab:
        total = _sum_of_exponentials(logits, vocab, logits[top], np.float32(1))
    else:
        for i in range(limit):
            total += np.exp(np.float64(logits[ranked[i]]) - logits[top])
    before, i = 0.0, np.int64(0)
    while i < limit:
        if i == bins[0]:
            call_worker(rank(), address, min(GROW * i, vocab), top, 0, 0)
        p = np.exp(np.float64(logits[ranked[i]]) - logits[top])
        if i and (before >= settings[TOP_P] * total or p < settings[MIN_P]):
            return i
        before += p
        i += 1
    return limit


@njit(nogil=True, error_model="numpy")
def _choose(a, address):
    settings, vocab = at(float64, a[SETTINGS]), a[VOCAB]
    bins, logits, ranked, _ = _places(a)
    _penalize(logits, at(float32, a[LOGITS]), vocab, at(int64, a[HISTORY]), a[HISTORY_SIZE], np.float32(settings[REPEAT_PENALTY]))
    top = _largest(logits, vocab)
    if settings[TEMPERATURE] <= 0:
        return top
    call_worker(rank(), address, min(max(FIRST, a[TOP_K]), vocab), top, 0, 0)
    kept, scale = _kept(a, address, top), 1 / settings[TEMPERATURE]
    total, passed = 0.0, 0.0
    if kept == vocab:
        total = _sum_of_exponentials(logits, vocab, logits[top], np.float32(scale))
    else:
        for i in range(kept):
            total += np.exp((np.float64(logits[ranked[i]]) - logits[top]) * scale)
    for i in range(kept):
        if i == bins[0]:
            call_worker(rank(), address, min(GROW * i, vocab), top, 0, 0)
        passed += np.exp((np.float64(logits[ranked[i]]) - logits[top]) * scale)
        if passed > settings[UNIFORM] * total:
            return ranked[i]
    return ranked[kept - 1]


@cfunc(STEP, cache=True)
def step(a, state):
    at(int64, a[TOKEN])[0] = _choose(a, carray(a, 1).ctypes.data)
