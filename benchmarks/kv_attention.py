"""Decode attention over the KV cache by its types: time of a step, bytes read, and the rate against plain reads of as many bytes.

    python benchmarks/kv_attention.py --depths 4096 16384 --types f16 int8 int4 int3 int2

One token, all layers of a model's shape (Llama-3.2-1B's by default), random keys and values. Types take turns within a round, so that
drifts of the machine meet all of them alike; medians over rounds. Appending and sealing are timed over 32 tokens, a page.
"""
import argparse
import statistics
import time

import numba
import numpy as np

from edgeattn.bandwidth import measured_apart
from edgeattn.batch import COUNTS, Batch
from edgeattn.cache.kv_cache import KVCache
from edgeattn.cache.options import CacheOptions
from edgeattn.kernels_cpu import cached_attention, steps

DELTA_THRESHOLD = 3.05  # of random keys, blocks of 16 channels: 0.6 of the deltas are left out


class Case:
    """A cache of one type filled to a depth, and a table of attention steps over its layers."""

    def __init__(self, kind, depth, layers, heads, kv_heads, head_dim, threads):
        rng = np.random.default_rng(0)
        k_type, _, v_type = kind.partition("/")
        self.cache = KVCache(layers, kv_heads, head_dim, depth + 64, CacheOptions(
            k_type, v_type or k_type.replace("delta", "f16"), "delta" if k_type == "delta" else "kivi", delta_threshold=DELTA_THRESHOLD), ubatch=512)
        self.sequence, self.batch = self.cache.new_sequence(), Batch(1, 1, 1)
        floats = self.cache.pools[0].pages
        while self.sequence.length < depth:
            count = min(512, depth - self.sequence.length)
            self.cache.append(self.sequence, count)
            fresh = self.sequence.tables[(self.sequence.tables >= 0) & (self.sequence.tables % 4 == 0)] // 4
            for array in (floats.k, floats.v):
                x = rng.standard_normal((8, array.shape[1] // 2)).astype(np.float16).view(np.uint8)
                array[fresh] = x[rng.integers(0, 8, len(fresh))]
            self.cache.settle(self.sequence, count)
        rows = (heads + 2 * kv_heads) * head_dim
        self._arrays = [steps.aligned((1, rows), np.float32), steps.aligned((1, heads * head_dim), np.float32),
                        *(steps.aligned((1, head_dim // 2), np.float32) for _ in "cs")]
        self._arrays[0][:] = rng.standard_normal((1, rows))
        self._arrays[2][:] = 1
        self.attributes = dict(num_heads=heads, kv_heads=kv_heads, head_dim=head_dim, rotary_dim=head_dim, interleaved=0,
                               scale=head_dim ** -0.5, window=0)
        self._make_rows(layers, threads)

    def _make_rows(self, layers, threads):
        fused, out, cos, sin = self._arrays
        q_width, kv_width = out.shape[1], self.attributes["kv_heads"] * self.attributes["head_dim"]
        parts = {"q": fused[:, :q_width], "k": fused[:, q_width:q_width + kv_width], "v": fused[:, q_width + kv_width:], "cos": cos,
                 "sin": sin, "out": out}
        tensors = {name: steps.Tensor(x.ctypes.data, ("tokens", *x.shape[1:]), fused.shape[1] if name in "qkv" else x.shape[1])
                   for name, x in parts.items()}
        self._workspace = steps.aligned(cached_attention.workspace_bytes(tensors, self.attributes, 1, threads), np.uint8)
        none = {"batch.selections": 0, "selection.group": -1, "selection.capacity": 0, "workspace": self._workspace.ctypes.data}
        self.rows = np.zeros((layers, steps.WIDTH), np.int64)
        for layer in range(layers):
            extra = self.batch.arguments() | none | self.cache.arguments(layer)
            self.rows[layer, 0] = cached_attention.step.address
            row = steps.resolve(cached_attention.ARGS, tensors, self.attributes | {"layer": layer}, COUNTS, extra)
            self.rows[layer, 1:1 + len(row)] = row

    def step(self):
        """Seconds of attention over all layers for one token, which stays in the last slot; the cache does not grow."""
        self.batch.clear()
        self.batch.add(self.sequence, np.zeros(1, np.int64), np.zeros(1, np.int64))
        self.batch.positions[0] = 0
        start = time.perf_counter()
        steps.run(self.rows, self.batch.state)
        return time.perf_counter() - start

    def append_page(self):
        """Seconds that a page of decoded tokens spends in append and settle."""
        start = time.perf_counter()
        for _ in range(32):
            self.cache.append(self.sequence, 1)
            self.cache.settle(self.sequence, 1)
        return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depths", type=int, nargs="+", default=[4096, 16384])
    parser.add_argument("--types", nargs="+", default=["f16", "int8", "int4", "int3", "int2"])
    parser.add_argument("--shape", type=int, nargs=4, default=[16, 32, 8, 64], metavar=("LAYERS", "HEADS", "KV_HEADS", "HEAD_DIM"))
    parser.add_argument("-t", "--threads", type=int, default=2)
    parser.add_argument("-r", "--rounds", type=int, default=9)
    args = parser.parse_args()
    numba.set_num_threads(args.threads)
    print("| depth | type | step ms | MB read | GB/s | of plain reads | against f16 | append + seal a token, ms |\n|" + "---|" * 8)
    for depth in args.depths:
        cases = {kind: Case(kind, depth, *args.shape, args.threads) for kind in args.types}
        for case in cases.values():
            case.step()
        times, reads = {kind: [] for kind in cases}, []
        for _ in range(args.rounds):
            reads.append(measured_apart(args.threads))
            for kind, case in cases.items():
                times[kind].append(statistics.median(case.step() for _ in range(5)))
        plain, base = statistics.median(reads), statistics.median(times[args.types[0]])
        for kind, case in cases.items():
            seconds, size = statistics.median(times[kind]), case.cache.touched_bytes(case.sequence)
            page = statistics.median(case.append_page() for _ in range(1)) / 32
            print(f"| {depth} | {kind} | {1e3 * seconds:.2f} | {size / 1e6:.1f} | {size / seconds / 1e9:.1f} | {100 * size / seconds / plain:.0f} % | "
                  f"{base / seconds:.2f}x | {1e3 * page:.3f} |", flush=True)


if __name__ == "__main__":
    main()
