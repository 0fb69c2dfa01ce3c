"""Times matmul_nbits against the memory: python benchmarks/cpu_kernels.py [-t THREADS] [--repeats N]

For few tokens the limit is reading the weights, so each line gives the share of a plain prefetched parallel read measured in
the same rounds, turn by turn, beside GFLOP/s. Medians, best in brackets. Weights rotate through enough copies
that no cache holds them.
"""
import argparse
import time

import numpy as np
from numba import carray, cfunc, get_num_threads, set_num_threads, threading_layer

from edgeattn.kernels_cpu import LEVEL
from edgeattn.kernels_cpu.matmul_nbits import ARGS, step, workspace_bytes
from edgeattn.kernels_cpu.parallel import parallel, worker
from edgeattn.kernels_cpu.simd import i32, load, prefetch, store, zeros
from edgeattn.kernels_cpu.steps import STEP, WIDTH, Tensor, aligned, i32_at, resolve, run, thread_count

I16 = i32(16)
SHAPES = [  # tokens, N, K, bits, block size
    (1, 8192, 2048, 4, 32), (1, 2048, 8192, 4, 32), (1, 16384, 2048, 4, 32), (1, 3072, 2048, 4, 32), (1, 2048, 2048, 4, 32),
    (1, 128256, 2048, 8, 32), (1, 8192, 2048, 4, 64), (1, 8192, 2048, 4, 128), (4, 8192, 2048, 4, 32),
    (512, 8192, 2048, 4, 32), (512, 2048, 8192, 4, 32), (512, 16384, 2048, 4, 32), (512, 3072, 2048, 4, 32), (128, 8192, 2048, 4, 32),
    (512, 8192, 2048, 4, 128), (512, 8192, 2048, 8, 32), *((tokens, 8192, 2048, 4, 32) for tokens in (2, 3, 5, 6, 7, 8, 12, 16, 17, 24))]
FEW = 24  # tokens at most that weights are read for from memory, and lines give the share of its speed
FOOTPRINT = 200 << 20  # bytes of weights to rotate through


@worker
def read(a, _, parts, part, thread):
    """Sum int32 words from address a[0], a[1] of them (a multiple of 64 a part), to a[2]."""
    args = carray(a, 3)
    words, count = i32_at(args[0], args[1]), args[1] // parts // 64 * 64
    s0, s1, s2, s3 = zeros(I16, 4)
    for i in range(count * part, count * (part + 1), 64):
        for line in range(4):
            prefetch(words, i + 1024 + 16 * line)
        s0 += load(I16, words, i)
        s1 += load(I16, words, i + 16)
        s2 += load(I16, words, i + 32)
        s3 += load(I16, words, i + 48)
    store(i32_at(args[2], 16 * parts), 16 * part, s0 + s1 + s2 + s3)


@cfunc(STEP, cache=True)
def read_step(a, state):
    parallel(read(), carray(a, WIDTH).ctypes.data, 0, thread_count(), thread_count())


def rows(step, arguments):
    table = np.zeros((1, WIDTH), np.int64)
    table[0, :len(arguments) + 1] = step.address, *arguments
    return table


def problem(tokens, n, k, bits, size):
    """Calls over copies of random weights: [(matmul, plain read)], bytes of one copy."""
    rng, attributes = np.random.default_rng(0), dict(bits=bits, block_size=size, K=k, N=n)
    shape = (n // 16, k // size, size * bits // 32, 16, 4)
    x, out = aligned((tokens, k), np.float32), aligned((tokens, n), np.float32)
    x[:] = rng.standard_normal(x.shape)
    nbytes = n * k * bits // 8 + n * k // size * 2
    calls = []
    for _ in range(max(1, FOOTPRINT // nbytes) if tokens <= FEW else 1):
        block = aligned(nbytes, np.uint8)
        block[:n * k * bits // 8] = rng.integers(0, 256, 4096, np.uint8).repeat(n * k * bits // 8 // 4096)
        codes, scales = block[:n * k * bits // 8].reshape(shape), block[n * k * bits // 8:].view(np.uint16).reshape(n // 16, -1, 16)
        scales[:] = np.float16(0.01).view(np.uint16)
        tensors = {name: Tensor.of(v, rows="tokens" if name in ("x", "out") else None)
                   for name, v in dict(x=x, out=out, codes=codes, scales=scales).items()}
        scratch = aligned(workspace_bytes(tensors, attributes, tokens, get_num_threads()), np.uint8)
        matmul = rows(step, resolve(ARGS, tensors, attributes, ("tokens",), {"workspace": scratch.ctypes.data}))
        sums = aligned(16 * get_num_threads(), np.int32)
        calls.append((matmul, rows(read_step, [block.ctypes.data, nbytes // 4, sums.ctypes.data]), (x, out, block, scratch, sums)))
    return calls, nbytes


def seconds(table, state):
    start = time.perf_counter()
    run(table, state)
    return time.perf_counter() - start


def measure(shape, repeats):
    tokens, n, k, bits, size = shape
    calls, nbytes = problem(*shape)
    state = np.array([tokens], np.int64)
    times = [[], []]
    for i in range(repeats + 2):
        for which in (0, 1):  # different copies, so that neither finds the other's in a cache
            spent = seconds(calls[(i + which * len(calls) // 2) % len(calls)][which], state)
            if i >= 2:
                times[which].append(spent)
    median, best = (np.array([f(t) for t in times]) for f in (np.median, np.min))
    gbs, gflops = nbytes / 1e9, 2e-9 * tokens * n * k
    share = f"{gbs / median[0]:6.1f} ({gbs / best[0]:5.1f}) {gbs / median[1]:6.1f} ({gbs / best[1]:5.1f}) {median[1] / median[0]:6.2f}"
    return f"{gflops / median[0]:8.0f} ({gflops / best[0]:4.0f}) " + (share if tokens <= FEW else "")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-t", "--threads", type=int, default=0, help="threads (default: all)")
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--shapes", help="only those whose tokens are in this comma-separated list")
    options = parser.parse_args()
    if options.threads:
        set_num_threads(options.threads)
    print(f"{LEVEL}, {get_num_threads()} threads")
    print(f"{'tokens':>6} {'N':>6} {'K':>5} bits block  {'GFLOP/s':>8} (best) {'GB/s':>6} (best) {'read':>6} (best)   share")
    for shape in SHAPES:
        if not options.shapes or str(shape[0]) in options.shapes.split(","):
            print(f"{shape[0]:6} {shape[1]:6} {shape[2]:5} {shape[3]:4} {shape[4]:5}  {measure(shape, options.repeats)}", flush=True)
    print(f"threading layer: {threading_layer()}")


if __name__ == "__main__":
    main()
