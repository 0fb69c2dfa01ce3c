"""How fast this machine reads memory: prefetched vector reads on all threads, the ceiling of decode.

`python -m edgeattn.bandwidth [THREADS]` prints bytes per second; a process of its own leaves the caller's memory figures alone.
"""
import subprocess
import sys
import time

import numpy as np
import psutil
from numba import get_num_threads, njit, prange, set_num_threads

from edgeattn.kernels_cpu.simd import i32, load, prefetch, store, zeros
from edgeattn.kernels_cpu.steps import aligned

WORDS = 16     # int32 words of one cache line
LINE = i32(WORDS)
AHEAD = 1024   # words between a read and its prefetch
LARGEST = 512  # MiB; larger than any cache of the machines in view
LONGEST = 5.0  # seconds; a busy machine gets fewer repetitions


@njit(nogil=True)
def _read(words, first, second, count, out, slot):
    # Two streams a thread: one alone leaves bandwidth unused.
    a, b, c, d = zeros(LINE, 4)
    for i in range(0, count, 2 * WORDS):
        for line in range(2):
            prefetch(words, first + i + AHEAD + WORDS * line)
            prefetch(words, second + i + AHEAD + WORDS * line)
        a += load(LINE, words, first + i)
        b += load(LINE, words, first + i + WORDS)
        c += load(LINE, words, second + i)
        d += load(LINE, words, second + i + WORDS)
    store(out, slot * WORDS, a + b + c + d)


@njit(parallel=True, nogil=True)
def _read_all(words, threads, out):
    half = words.size // (2 * threads)
    for t in prange(threads):
        _read(words, 2 * t * half, (2 * t + 1) * half, half, out, t)


def stream_bandwidth(threads: int, repeats: int = 10) -> float:
    """Median bytes per second of reading a buffer of up to 512 MiB with `threads` threads."""
    previous = get_num_threads()
    set_num_threads(threads)
    mebibytes = max(64, min(LARGEST, psutil.virtual_memory().available >> 22))  # at most a quarter of what is free
    words = aligned(mebibytes * 2**18 // (64 * threads) * 64 * threads, np.int32)
    words[:] = 1  # touched, so that every page is memory of its own
    out, seconds, end = np.zeros(WORDS * threads, np.int32), [], time.perf_counter() + LONGEST
    while len(seconds) < 2 or len(seconds) <= repeats and time.perf_counter() < end:
        start = time.perf_counter()
        _read_all(words, threads, out)
        seconds.append(time.perf_counter() - start)
    set_num_threads(previous)
    return words.nbytes / float(np.median(seconds[1:]))  # the first one compiled


def measured_apart(threads: int) -> float:
    """stream_bandwidth in another process."""
    done = subprocess.run([sys.executable, "-m", "edgeattn.bandwidth", str(threads)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"measuring the memory bandwidth failed: {done.stderr.strip()}")
    return float(done.stdout)


if __name__ == "__main__":
    print(stream_bandwidth(int(sys.argv[1]) if len(sys.argv) > 1 else psutil.cpu_count(logical=False) or 1))
