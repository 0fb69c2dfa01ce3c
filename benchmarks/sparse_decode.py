"""Sparse decode over depth: what a step's attention takes by method, and whole steps of a model.

    python benchmarks/sparse_decode.py NANO --text book.txt --model FOLDER --out sparse_decode

NANO is an export whose keys, values and queries fill the caches (recorded.py); FOLDER, an export of the shape that is timed, for whole
steps (its weights may be random). Methods take turns within a round, so that drifts of the machine meet all alike; medians over rounds.
Writes OUT.json and OUT.png, and the tables to stdout.
"""
import argparse
import json
import time
from pathlib import Path
from statistics import median

import numba
import numpy as np
from recorded import Recorded

from edgeattn.apps.table import markdown
from edgeattn.attention_case import AttentionCase, fill
from edgeattn.cache.options import CacheOptions
from edgeattn.kernels_cpu.selections import ALL, COUNT, HEADER
from edgeattn.page_formats import PAGE
from edgeattn.runtime import Model, read_config
from edgeattn.scheduler import Scheduler, SparseOptions

LLAMA = 16, 32, 8, 64  # Llama-3.2-1B: layers, heads, KV heads, head_dim


def scheduler(method, args, layers, kv_heads):
    if method == "off":
        return None
    options = {"budget": args.budget} | ({"fraction": 0.0} if args.fraction is None else {"fraction": args.fraction})
    made = Scheduler(SparseOptions(method, options, 0), layers, kv_heads)
    made.load(args.nano, read_config(args.nano))  # what other shapes can use of it: planes, no shares
    return made


def touched(case, figures) -> tuple[float, float]:
    """(bytes of pages read at a step, bytes of their index or parameters that selection read)."""
    cache, sequence = case.cache, case.sequence
    pages = cache.stored_bytes(sequence)
    if case.scheduler is None:
        return pages, 0
    read = figures["read"] * pages
    scored = case.scheduler.policy.index == "bounds"
    held = int((-(-sequence.counts // PAGE)).sum()) * len(case.scheduler.groups) / len(case.scheduler.sources)
    return read, held * 4 * cache.head_dim * scored


def attention_rows(args, recorded):
    """{"depth", "method", "select_ms", "attend_ms", "read", "page_bytes", "index_bytes", "mass"} of attention alone;
    mass: of each layer."""
    rows = []
    for depth in args.depths:
        cases = {method: AttentionCase(CacheOptions(args.type, args.type), args.shape, depth, args.threads,
                                       scheduler(method, args, args.shape[0], args.shape[2]), recorded.source) for method in args.methods}
        times, masses = {method: [] for method in cases}, {method: [] for method in cases}
        for step in range(args.rounds + 1):
            query = recorded.query(step, args.shape)
            for method, case in cases.items():
                times[method].append(case.step(query))
                if step and case.scheduler and args.own:
                    masses[method].append(mass_found(case, recorded, args.shape, query))
                if not step and case.scheduler:
                    case.scheduler.figures()  # compiled, indexed
        for method, case in cases.items():
            select, attend = (1e3 * median(t[i] for t in times[method][1:]) for i in range(2))
            figures = case.scheduler.figures() if case.scheduler else {"read": 1.0}
            page_bytes, index_bytes = touched(case, figures)
            rows.append({"depth": depth, "method": method, "select_ms": select, "attend_ms": attend, "read": float(figures["read"]),
                         "page_bytes": float(page_bytes), "index_bytes": float(index_bytes),
                         "mass": np.mean(masses[method], 0).round(4).tolist() if masses[method] else [1.0] * args.shape[0]})
            print(json.dumps(rows[-1]), flush=True)
    return rows


def mass_found(case, recorded, shape, query) -> list[float]:
    """Of each layer, the part of the softmax weight that lies on the pages that its lists name, over all query heads."""
    layers, heads, kv_heads, head_dim = shape
    pages, found = case.sequence.length // PAGE, []
    for layer in range(layers):
        source, parts = case.scheduler.sources[layer], []
        for head in range(kv_heads):
            row = None if source is None else case.sequence.selection[case.scheduler.groups.index(source), head]
            if row is None or row[COUNT] == ALL:
                parts.append(1.0)
                continue
            keys = recorded.source(layer, head, 0, pages)[0].astype(np.float32)
            q = query[layer].reshape(kv_heads, -1, head_dim)[head]
            scores = np.einsum("hc,pct->hpt", q, keys) * head_dim ** -0.5
            weights = np.exp(scores - scores.max((1, 2), keepdims=True)).sum(2)
            chosen = row[HEADER:HEADER + row[COUNT]]
            parts.append(float((weights[:, chosen[chosen < pages]].sum(1) / weights.sum(1)).mean()))
        found.append(float(np.mean(parts)))
    return found


def model_rows(args, recorded):
    """{"depth", "method", "tokens_s", "read"} of whole decode steps."""
    rows, models = [], {}
    context = max(args.depths) + 256
    for method in args.whole:
        made = scheduler(method, args, 1, 1)
        sparse = SparseOptions("off") if made is None else SparseOptions(method, made.options.options, 0)
        model = Model.load(args.model, cache=CacheOptions(args.type, args.type), ctx_size=context, threads=args.threads, sparse=sparse)
        models[method] = model, model.new_sequence()
    for depth in args.depths:
        for model, sequence in models.values():
            fill(model.cache, sequence, -(-depth // PAGE) * PAGE, recorded.source)
        times = {method: [] for method in models}
        for _ in range(args.rounds + 1):
            for method, (model, sequence) in models.items():
                start = time.perf_counter()
                for _ in range(3):
                    model.forward([(sequence, [1])])
                times[method].append((time.perf_counter() - start) / 3)
        for method, (model, sequence) in models.items():
            figures = model.scheduler.figures() if model.scheduler else {"read": 1.0}
            rows.append({"depth": depth, "method": method, "tokens_s": 1 / median(times[method][1:]), "read": float(figures["read"])})
            print(json.dumps(rows[-1]), flush=True)
            model.truncate(sequence, sequence.length // PAGE * PAGE)
    return rows


def plot(attention, whole, path):
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    sides = [(attention, lambda r: r["select_ms"] + r["attend_ms"], "attention of a step, ms")]
    sides += [(whole, lambda r: r["tokens_s"], "decode, tokens/s")] if whole else []
    figure, axes = pyplot.subplots(1, len(sides), figsize=(5.5 * len(sides), 4.2), squeeze=False)
    for axis, (rows, value, label) in zip(axes[0], sides):
        for i, method in enumerate(dict.fromkeys(row["method"] for row in rows)):
            points = [(row["depth"], value(row)) for row in rows if row["method"] == method]
            axis.plot(*zip(*points), marker="o", markersize=3, linestyle="-" if i < 10 else ":",
                      label="dense" if method == "off" else method)
        axis.set_xscale("log", base=2)
        depths = sorted({row["depth"] for row in rows})
        axis.set_xticks(depths, [f"{depth / 1024:g}K" if depth % 512 == 0 else f"{depth:,}" for depth in depths])
        axis.set_xlabel("tokens in the context")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    axes[0, 0].set_yscale("log")
    axes[0, -1].set_ylim(bottom=0 if whole else None)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def table(rows, cell) -> str:
    depths = list(dict.fromkeys(row["depth"] for row in rows))
    lines = [["method", *(f"{depth:,}" for depth in depths)]]
    for method in dict.fromkeys(row["method"] for row in rows):
        lines.append(["dense" if method == "off" else method, *(
            cell(next(row for row in rows if (row["method"], row["depth"]) == (method, depth))) for depth in depths)])
    return markdown(lines)


def mass_table(rows) -> str:
    layers = range(len(rows[0]["mass"]))
    return markdown([["method", "read", "mean", *map(str, layers)],
                     *([row["method"], f"{100 * row['read']:.1f} %", f"{np.mean(row['mass']):.3f}", *(f"{x:.2f}" for x in row["mass"])]
                       for row in rows)])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("nano", type=Path, help="an export with heads of 64, whose attention is recorded")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--model", type=Path, help="an export of the shape that is timed; without it attention alone")
    parser.add_argument("--depths", type=int, nargs="+", default=[512, 2048, 4096, 8192, 16384, 32768, 65536])
    parser.add_argument("--methods", nargs="+", default=["off", "auto", "quest", "sink_window", "oracle", "random"])
    parser.add_argument("--whole", nargs="+", default=["off", "auto"], help="methods of whole steps")
    parser.add_argument("--own", action="store_true", help="attention of NANO's own shape, with all of its calibration; tells softmax "
                        "weights too, which at 7168 tokens are those of the recorded text")
    parser.add_argument("--budget", type=int, default=2048)
    parser.add_argument("--fraction", type=float, help="of the context, where that is more (0)")
    parser.add_argument("--type", default="int4", help="of keys and values")
    parser.add_argument("-t", "--threads", type=int, default=2)
    parser.add_argument("-r", "--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path("sparse_decode"))
    args = parser.parse_args()
    numba.set_num_threads(args.threads)
    recorded = Recorded(args.nano, args.text.read_text(encoding="utf-8"))
    args.shape = recorded.shape if args.own else LLAMA
    attention = attention_rows(args, recorded)
    whole = model_rows(args, recorded) if args.model else []
    args.out.with_suffix(".json").write_text(json.dumps({"args": {k: str(v) for k, v in vars(args).items()}, "attention": attention,
                                                         "whole": whole}, indent=1))
    plot(attention, whole, args.out.with_suffix(".png"))
    print("\nAttention of a step, ms (of which selection):\n")
    print(table(attention, lambda r: f"{r['select_ms'] + r['attend_ms']:.2f} ({r['select_ms']:.2f})"))
    print("\nMB read of pages + to select:\n")
    print(table(attention, lambda r: f"{r['page_bytes'] / 1e6:.1f} + {r['index_bytes'] / 1e6:.1f}"))
    if args.own:  # queries ask for what was recorded before them
        print(f"\nSoftmax weight on what is read, by layer, at {max(args.depths):,}:\n")
        print(mass_table([row for row in attention if row["depth"] == max(args.depths)]))
    if whole:
        print("\nDecode, tokens/s:\n")
        print(table(whole, lambda r: f"{r['tokens_s']:.1f}"))


if __name__ == "__main__":
    main()
