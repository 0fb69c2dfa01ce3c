"""What choosing takes when a chunk of a prompt is read sparsely, of the time of a dense attention of the same chunk.

    python benchmarks/prefill_choosing.py --depths 4096 16384 32768 -t 1

One layer of a model's shape (Llama-3.2-1B's by default), a chunk of 512 tokens that ends at each depth, random keys and values: what these
methods take to choose does not hang on the numbers. All by KV head, in turns within a round, medians over rounds:

    dense     attention that reads everything, as the cache's types make it
    estimate  the operator that scores alone, from the pages where they lie
    choosing  all of it: rotation, the plan, the lists that attention reads
"""
import argparse
import statistics
import time

import numba
import numpy as np

from edgeattn.attention_case import AttentionCase
from edgeattn.cache.options import CacheOptions
from edgeattn.kernels_cpu import antidiagonal_weights, score_excess
from edgeattn.prefill_scheduler import Keys, PrefillOptions, PrefillScheduler

CHUNK = 512
SETTINGS = [("auto", {}), ("xattention", {"stride": 8}), ("xattention", {"stride": 16}), ("sale", {"bits": 4}), ("sale", {"bits": 8})]


def estimate(policy, q, keys, scale):
    """Run a policy's operator as the policy does; False where it has none."""
    stored, n = keys.stored(), q.shape[1]
    if hasattr(policy, "stride"):
        antidiagonal_weights.run(q, stored, stored.mean(n), scale, policy.stride)
    elif hasattr(policy, "bits"):
        score_excess.run(q, stored, q.mean(1), stored.mean(n), np.zeros(q.shape[:2]), scale, policy.bits)
    else:
        return False
    return True


def measure(depth, args):
    shape = (1, *args.shape)
    case = AttentionCase(CacheOptions(args.type, args.type), shape, depth - CHUNK, args.threads, tokens=CHUNK)
    schedulers = [PrefillScheduler(PrefillOptions(method, options, 0), 1) for method, options in SETTINGS]
    rng = np.random.default_rng(0)
    q, new = (rng.standard_normal(size, np.float32) for size in ((shape[1], CHUNK, shape[3]), (CHUNK, shape[2], shape[3])))
    keys, dense, times = Keys(case.cache, case.sequence, 0, new), [], [([], []) for _ in schedulers]
    for _ in range(args.rounds + 1):
        dense.append(case.step()[1])
        for scheduler, (alone, whole) in zip(schedulers, times):
            start = time.perf_counter()
            if estimate(scheduler.policy, q, keys, case.attributes["scale"]):
                alone.append(time.perf_counter() - start)
            whole.append(case.step(prefill=scheduler)[0])
    dense, *found = (1e3 * statistics.median(x[1:]) / shape[2] if x else None for x in (dense, *(x for pair in times for x in pair)))
    for (method, options), alone, whole in zip(SETTINGS, found[::2], found[1::2]):
        one = f"{alone:.2f} | {100 * alone / dense:.1f} %" if alone else "|"
        about = ", ".join(f"{name} {value}" for name, value in options.items())
        print(f"| {depth:,} | {method} | {about} | {dense:.1f} | {one} | {whole:.2f} | {100 * whole / dense:.1f} % |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depths", type=int, nargs="+", default=[4096, 16384, 32768])
    parser.add_argument("--type", default="int4", help="of keys and values")
    parser.add_argument("--shape", type=int, nargs=3, default=[32, 8, 64], metavar=("HEADS", "KV_HEADS", "HEAD_DIM"))
    parser.add_argument("-t", "--threads", type=int, default=2)
    parser.add_argument("-r", "--rounds", type=int, default=7)
    args = parser.parse_args()
    numba.set_num_threads(args.threads)
    print("| depth | method | options | dense, ms | estimate | of dense | choosing | of dense |\n|" + "---|" * 8)
    for depth in args.depths:
        measure(depth, args)


if __name__ == "__main__":
    main()
