"""Stream-read bandwidth: how fast plain, prefetched vector reads go through memory. `python stream_read.py [THREADS]`.

The ceiling for decode, whose time is one pass over the weights. Needs edgeattn installed (its vector layer).
"""
import sys
import time

import numpy as np
from numba import njit, prange, set_num_threads

from edgeattn.kernels_cpu.simd import i32, load, prefetch, store, zeros
from edgeattn.kernels_cpu.steps import aligned

WORDS = 16  # int32 words of one cache line
LINE = i32(WORDS)
AHEAD = 1024  # words between a read and its prefetch


@njit(nogil=True)
def _read(words, first, second, count, out, slot):
    """Two streams of `count` words."""
    a, b, c, d = zeros(LINE, 4)
    for i in range(0, count, 2 * WORDS):
        for line in range(2):
            prefetch(words, first + i + AHEAD + WORDS * line)
            prefetch(words, second + i + AHEAD + WORDS * line)
        a += load(LINE, words, first + i)
        b += load(LINE, words, first + i + WORDS)
        c += load(LINE, words, second + i)
        d += load(LINE, words, second + i + WORDS)
    store(out, slot * 16, a + b + c + d)


@njit(parallel=True, nogil=True)
def stream_read(words, threads, out):
    """Read all of words [n] int32, n a multiple of 64 * threads, from `threads` threads. out [16 * threads] int32: sums."""
    half = words.size // (2 * threads)
    for t in prange(threads):
        _read(words, 2 * t * half, (2 * t + 1) * half, half, out, t)


class Stream:
    """Repeated reads of one large buffer."""

    def __init__(self, threads: int, megabytes: int = 768):
        set_num_threads(threads)
        self.words = aligned(megabytes * 2**18 // (64 * threads) * 64 * threads, np.int32)
        self.words[:] = np.arange(self.words.size, dtype=np.int32)  # touched, so that every page is its own memory
        self.out, self.threads = np.zeros(16 * threads, np.int32), threads
        self.measure(2)

    def measure(self, repeats: int = 10) -> float:
        """Median bytes per second of `repeats` reads."""
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            stream_read(self.words, self.threads, self.out)
            seconds.append(time.perf_counter() - start)
        return self.words.nbytes / float(np.median(seconds))


if __name__ == "__main__":
    stream = Stream(int(sys.argv[1]) if len(sys.argv) > 1 else 2)
    print(f"{stream.measure(20) / 1e9:.1f} GB/s")
