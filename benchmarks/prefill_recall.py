"""What methods of sparse prefill find on a model's own attention, and what their choosing takes.

    python benchmarks/prefill_recall.py FOLDER --text book.txt --settings benchmarks/prefill_settings.json --out prefill_recall.jsonl

A model reads a text, dense; of the chunk of 512 tokens that ends at each depth, queries, keys and values of all layers are recorded. Each
setting of --settings, which is a file of kv_quality.py's, plans that chunk; what it says of the cache and of corrections counts for nothing
here. Methods that need a calibration take the folder's. Figures:

    density         pairs that a plan reads, of those that a causal mask leaves: by query head, and as kernels read them, pages of all query
                    heads of a KV head together (union)
    mass, least     softmax weight on what a query head's plan reads: mean over queries, heads and layers, and the least of all queries
    error           relative error of a query's output, mean over queries, heads and layers: of the plan alone, with Delta Attention's
                    correction and with mean pages for what is not read (edgeattn/prefill_corrections.py)
    choosing        time of the plan, of the time of a dense attention of the same chunk in NumPy (float32, all keys, masked), which kernels
                    do several times as fast: benchmarks/prefill_choosing.py has the share that counts

--union takes mass and errors of what the kernels read. --out keeps results, one line a setting and depth; what it holds is not run again.
"""
import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
from recorded import record_chunks

from edgeattn.apps.table import markdown
from edgeattn.policies import load_policy
from edgeattn.prefill_corrections import delta, tail
from edgeattn.prefill_plan import QUERIES
from edgeattn.runtime import read_config

FIGURES = "density", "union", "mass", "least", "error", "error_delta", "error_tail", "choosing"


class Chunk:
    """Recorded attention of one depth. q [layers, heads, n, d], k, v [layers, kv_heads, m, d]"""

    def __init__(self, q, k, v, scale):
        self.q, self.k, self.v, self.scale, self.depth = q, k, v, scale, k.shape[2]
        self.seen = np.arange(self.depth) <= np.arange(q.shape[2])[:, None] + self.depth - q.shape[2]

    def attend(self, layer, plan=None):
        """(output [heads, n, d], lse [heads, n], softmax weight on the plan [heads, n], output on the plan, seconds of the dense part)."""
        q, k, v = self.q[layer], self.k[layer], self.v[layer]
        mask = None if plan is None else plan.mask()
        dense, found = np.empty_like(q), np.empty_like(q)
        lse, mass, seconds = np.empty(q.shape[:2]), np.empty(q.shape[:2]), 0.0
        for head in range(len(q)):
            own, start = head * len(k) // len(q), time.perf_counter()
            scores = np.where(self.seen, q[head] @ k[own].T * np.float32(self.scale), -np.inf)
            top = scores.max(1, keepdims=True)
            weights = np.exp(scores - top, out=scores)
            total = weights.sum(1, keepdims=True)
            dense[head] = weights @ v[own] / total
            seconds += time.perf_counter() - start
            lse[head] = (np.log(total.astype(np.float64)) + top)[:, 0]
            if mask is not None:
                weights *= mask[head * len(mask) // len(q)]
                part = np.maximum(weights.sum(1, keepdims=True), np.finfo(np.float32).tiny)
                found[head], mass[head] = weights @ v[own] / part, (part / total)[:, 0]
        return dense, lse, mass, found, seconds


def evaluate(chunk, policy, assets, union) -> dict:
    """FIGURES of a method on a chunk, and the density and mass of each layer."""
    found, chosen_s, dense_s, layers = {name: [] for name in FIGURES[:-1]}, 0.0, 0.0, len(chunk.q)
    for layer in range(layers):
        q, k, v = chunk.q[layer], chunk.k[layer], chunk.v[layer]
        start = time.perf_counter()
        plan = policy.select(q, k, chunk.scale, layer, assets)
        chosen_s += time.perf_counter() - start
        joined = plan.union(len(k))
        taken = joined if union else plan
        dense, lse, mass, out, seconds = chunk.attend(layer, taken)
        dense_s += seconds
        pair = out, lse + np.log(np.maximum(mass, 1e-300))
        outs = {"error": out, "error_delta": delta(*pair, q, k, v, chunk.scale)[0],
                "error_tail": tail(*pair, q, k, v, taken, chunk.scale)[0]}
        norms = np.maximum(np.linalg.norm(dense, axis=-1), 1e-30)
        row = {"density": plan.density(), "union": joined.density(), "mass": mass.mean(), "least": mass.min()}
        row |= {name: (np.linalg.norm(x - dense, axis=-1) / norms).mean() for name, x in outs.items()}
        for name, value in row.items():
            found[name].append(float(value))
    means = {name: min(values) if name == "least" else float(np.mean(values)) for name, values in found.items()}
    return means | {"choosing": chosen_s / dense_s, "choosing_ms": 1e3 * chosen_s / layers, "dense_ms": 1e3 * dense_s / layers,
                    "layers": {name: np.round(found[name], 4).tolist() for name in ("density", "mass")}}


def measure(args, wanted, rows):
    """Rows for what is wanted, [(name, method, options, depth)], added to `rows` and to the file."""
    config = read_config(args.folder)
    policies = {name: load_policy("prefill", method, options) for name, method, options, _ in wanted}
    assets = {name: policy.load(args.folder, config) for name, policy in policies.items()}
    text = args.text.read_text(encoding="utf-8")
    for chunk in (Chunk(*x) for x in record_chunks(args.folder, text, args.depths, args.chunk, args.threads)):
        for name, method, options, depth in wanted:
            if depth != chunk.depth:
                continue
            row = {"name": name, "method": method, "options": options, "depth": depth, "of": of(args),
                   **evaluate(chunk, policies[name], assets[name], args.union)}
            rows.append(row)
            with args.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(f"{depth:6,} {name}: density {row['density']:.3f}, mass {row['mass']:.4f}, {row['choosing_ms']:.0f} ms of "
                  f"{row['dense_ms']:.0f}", file=sys.stderr, flush=True)


def settings(path) -> list[tuple[str, str, dict]]:
    """(name, method, its options) of a file of kv_quality.py's, each method and options once."""
    found = {}
    for name, fields in json.loads(path.read_text(encoding="utf-8")).items():
        options = {field.removeprefix("prefill_"): value for field, value in fields.items() if field.startswith("prefill_")}
        options.pop("correction", None)
        if "prefill" in fields:
            found.setdefault(key(fields["prefill"], options, 0), (name, fields["prefill"], options))
    return list(found.values())


def of(args) -> str:
    """What results of one file must have in common to stand beside each other."""
    return " ".join(map(str, [args.folder.resolve().name, args.text.name, args.chunk, *["union"] * args.union]))


def key(method, options, depth) -> str:
    return json.dumps([method, options, depth], sort_keys=True)


def table(rows) -> str:
    heads = "setting", "tokens", "density", "union", "mass", "least", "error", "delta", "tail", "choosing"
    lines = [list(heads)]
    for row in rows:
        shares = [f"{100 * row[name]:.1f} %" for name in ("density", "union")] + [f"{row[name]:.4f}" for name in ("mass", "least")]
        shares += [f"{row[name]:.3f}" for name in ("error", "error_delta", "error_tail")] + [f"{100 * row['choosing']:.1f} %"]
        lines.append([row["name"], f"{row['depth']:,}", *shares])
    return markdown(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="an export")
    parser.add_argument("--text", type=Path, required=True, help="at least as many tokens as the greatest depth")
    parser.add_argument("--settings", type=Path, required=True, help='JSON: {NAME: {"prefill": METHOD, "prefill_OPTION": value, ...}, ...}')
    parser.add_argument("--depths", type=int, nargs="+", default=[2048, 4096, 7168], help="tokens up to the end of a chunk")
    parser.add_argument("--chunk", type=int, default=512, help=f"tokens; a multiple of {QUERIES}")
    parser.add_argument("--union", action="store_true", help="mass and errors of the pages that any query head of a KV head asks for")
    parser.add_argument("-t", "--threads", type=int, help="of the model that is recorded; NumPy's are OPENBLAS_NUM_THREADS")
    parser.add_argument("--out", type=Path, default=Path("prefill_recall.jsonl"))
    args = parser.parse_args()
    wanted = [(*setting, depth) for depth in args.depths for setting in settings(args.settings)]
    rows = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.is_file() else []
    rows = [row for row in rows if row["of"] == of(args)]
    held = {key(row["method"], row["options"], row["depth"]) for row in rows}
    missing = [x for x in wanted if key(*x[1:]) not in held]
    if missing:
        measure(args, missing, rows)
    order = {key(*x[1:]): place for place, x in enumerate(wanted)}
    rows = sorted((row for row in rows if key(row["method"], row["options"], row["depth"]) in order),
                  key=lambda row: order[key(row["method"], row["options"], row["depth"])])
    print(table(rows))


if __name__ == "__main__":
    main()
