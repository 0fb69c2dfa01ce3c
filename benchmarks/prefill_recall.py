"""What methods of sparse prefill find on a model's own attention, and what their choosing takes.

    python benchmarks/prefill_recall.py FOLDER --text book.txt --settings settings.json --out prefill_recall.jsonl

A model reads a text, dense; of the chunk of 512 tokens that ends at each depth, queries, keys and values of all layers are recorded. Each
method plans that chunk with the options of --settings, {"method": [{"option": value}, ...], ...}, or with its own defaults. Among them,
"calibrate": {...} are settings of its calibration. Figures:

    density         pairs that a plan reads, of those that a causal mask leaves: by query head, and as kernels read them, pages of all query
                    heads of a KV head together (union)
    mass, least     softmax weight on what a query head's plan reads: mean over queries, heads and layers, and the least of all queries
    error           relative error of a query's output, mean over queries, heads and layers: of the plan alone, with Delta Attention's
                    correction and with mean pages for what is not read (edgeattn/prefill_corrections.py)
    choosing        time of the plan, of the time of a dense attention of the same chunk in NumPy (float32, all keys, masked), which kernels
                    do several times as fast: benchmarks/prefill_choosing.py has the share that counts

--union takes mass and errors of what the kernels read. --calibration TEXT calibrates methods that can be on the same depths of another
text. --out keeps results, one line a method, setting and depth; what it holds is not run again.
"""
import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
from recorded import record_chunks

from edgeattn.policies import load_policy, policy_names
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


def assets_of(policy, how, args, config, calibration):
    """What the method is given: its calibration on recorded attention where it has one, else what the folder holds. ValueError: nothing."""
    calibrate = getattr(type(policy), "calibrate", None)
    if how and not (calibrate and calibration):
        raise ValueError("it cannot be calibrated" if calibration else "give --calibration TEXT")
    if calibrate is None or not calibration:
        return policy.load(args.folder, config)
    scale, layers = calibration[0].scale, range(len(calibration[0].q))
    layers = [calibrate(*([getattr(chunk, name)[layer] for chunk in calibration] for name in "qkv"), scale, **how) for layer in layers]
    return {name: np.stack([layer[name] for layer in layers]) for name in layers[0]}


def record(args, text) -> list[Chunk]:
    return [Chunk(*x) for x in record_chunks(args.folder, text.read_text(encoding="utf-8"), args.depths, args.chunk, args.threads)]


def measure(args, wanted, rows):
    """Rows for what is wanted, [(method, options, depth)], added to `rows` and to the file."""
    config, assets, failed = read_config(args.folder), {}, set()
    calibration = record(args, args.calibration) if args.calibration else None
    for chunk in record(args, args.text):
        for method, options, depth in wanted:
            name = name_of(method, options)
            if depth != chunk.depth or name in failed:
                continue
            try:
                policy = load_policy("prefill", method, {option: value for option, value in options.items() if option != "calibrate"})
                if name not in assets:
                    assets[name] = assets_of(policy, options.get("calibrate", {}), args, config, calibration)
            except ValueError as error:
                print(f"{name}: left out: {error}", file=sys.stderr, flush=True)
                failed.add(name)
                continue
            calibrated = bool(calibration) and hasattr(type(policy), "calibrate")
            row = {"method": method, "options": options, "depth": depth, "of": of(args), "calibrated": calibrated,
                   **evaluate(chunk, policy, assets[name], args.union)}
            rows.append(row)
            with args.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(f"{depth:6,} {name}: density {row['density']:.3f}, mass {row['mass']:.4f}, {row['choosing_ms']:.0f} ms of "
                  f"{row['dense_ms']:.0f}", file=sys.stderr, flush=True)


def of(args) -> str:
    """What results of one file must have in common to stand beside each other."""
    names = [args.folder.resolve().name, args.text.name, args.chunk, *["union"] * args.union]
    names += [args.calibration.name] if args.calibration else []
    return " ".join(map(str, names))


def name_of(method, options) -> str:
    return method + "".join(f" {name}={value}" for name, value in options.items())


def key(method, options, depth) -> str:
    return json.dumps([method, options, depth], sort_keys=True)


def table(rows) -> str:
    heads = "method", "setting", "tokens", "density", "union", "mass", "least", "error", "delta", "tail", "choosing"
    lines = ["| " + " | ".join(heads) + " |", "|---|---|" + "---:|" * (len(heads) - 2)]
    for row in rows:
        shares = [f"{100 * row[name]:.1f} %" for name in ("density", "union")] + [f"{row[name]:.4f}" for name in ("mass", "least")]
        shares += [f"{row[name]:.3f}" for name in ("error", "error_delta", "error_tail")] + [f"{100 * row['choosing']:.1f} %"]
        setting = ", ".join(f"{name} {value}" for name, value in row["options"].items()) or "default"
        setting += ", calibrated" * row["calibrated"]
        lines.append(f"| {row['method']} | {setting} | {row['depth']:,} | " + " | ".join(shares) + " |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="an export")
    parser.add_argument("--text", type=Path, required=True, help="at least as many tokens as the greatest depth")
    parser.add_argument("--settings", type=Path,
                        help='JSON: {"streaming": [{"recent": 16}, {}], ...}; methods that it lacks run with their defaults')
    parser.add_argument("--methods", nargs="+", default=policy_names("prefill"), choices=policy_names("prefill"), metavar="NAME",
                        help=f"of {', '.join(policy_names('prefill'))} (all)")
    parser.add_argument("--depths", type=int, nargs="+", default=[2048, 4096, 7168], help="tokens up to the end of a chunk")
    parser.add_argument("--chunk", type=int, default=512, help=f"tokens; a multiple of {QUERIES}")
    parser.add_argument("--union", action="store_true", help="mass and errors of the pages that any query head of a KV head asks for")
    parser.add_argument("--calibration", type=Path, metavar="TEXT", help="another text, to calibrate on")
    parser.add_argument("-t", "--threads", type=int, help="of the model that is recorded; NumPy's are OPENBLAS_NUM_THREADS")
    parser.add_argument("--out", type=Path, default=Path("prefill_recall.jsonl"))
    args = parser.parse_args()
    settings = json.loads(args.settings.read_text()) if args.settings else {}
    if set(settings) - set(policy_names("prefill")):
        parser.error(f"{args.settings}: no method is named {sorted(set(settings) - set(policy_names('prefill')))[0]}")
    wanted = [(method, options, depth) for depth in args.depths for method in args.methods for options in settings.get(method, [{}])]
    rows = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.is_file() else []
    rows = [row for row in rows if row["of"] == of(args)]
    held = {key(row["method"], row["options"], row["depth"]) for row in rows}
    missing = [x for x in wanted if key(*x) not in held]
    if missing:
        measure(args, missing, rows)
    order = {key(*x): place for place, x in enumerate(wanted)}
    rows = sorted((row for row in rows if key(row["method"], row["options"], row["depth"]) in order),
                  key=lambda row: order[key(row["method"], row["options"], row["depth"])])
    print(table(rows))


if __name__ == "__main__":
    main()
