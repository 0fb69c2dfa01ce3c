"""Decode attention over the KV cache by its types: time of a step, bytes read, and the rate against plain reads of as many bytes.

    python benchmarks/kv_attention.py --depths 4096 16384 --types f16 int8 int4 int3 int2

One token, all layers of a model's shape (Llama-3.2-1B's by default), random keys and values. Types take turns within a round, so that
drifts of the machine meet all of them alike; medians over rounds. Appending and sealing are timed over 32 tokens, a page.
"""
import argparse
import statistics
import time

import numba

from edgeattn.attention_case import AttentionCase
from edgeattn.bandwidth import measured_apart
from edgeattn.cache.options import CacheOptions
from edgeattn.page_formats import PAGE

DELTA_THRESHOLD = 3.05  # of random keys, blocks of 16 channels: 0.6 of the deltas are left out


def options(kind):
    k_type, _, v_type = kind.partition("/")
    storage = "delta" if k_type == "delta" else "kivi"
    return CacheOptions(k_type, v_type or k_type.replace("delta", "f16"), storage, delta_threshold=DELTA_THRESHOLD)


def append_page(case):
    """Seconds that a page of decoded tokens spends in append and settle."""
    start = time.perf_counter()
    for _ in range(PAGE):
        case.cache.append(case.sequence, 1)
        case.cache.settle(case.sequence, 1)
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
        cases = {kind: AttentionCase(options(kind), args.shape, depth, args.threads) for kind in args.types}
        for case in cases.values():
            case.step()
        times, reads = {kind: [] for kind in cases}, []
        for _ in range(args.rounds):
            reads.append(measured_apart(args.threads))
            for kind, case in cases.items():
                times[kind].append(statistics.median(case.step()[1] for _ in range(5)))
        plain, base = statistics.median(reads), statistics.median(times[args.types[0]])
        for kind, case in cases.items():
            seconds, size = statistics.median(times[kind]), case.cache.touched_bytes(case.sequence)
            page = append_page(case) / PAGE
            print(f"| {depth} | {kind} | {1e3 * seconds:.2f} | {size / 1e6:.1f} | {size / seconds / 1e9:.1f} | "
                  f"{100 * size / seconds / plain:.0f} % | {base / seconds:.2f}x | {1e3 * page:.3f} |", flush=True)


if __name__ == "__main__":
    main()
