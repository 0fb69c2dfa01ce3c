"""From the seconds that peers.py measured to a Markdown table."""
import os
import platform
from pathlib import Path
from statistics import median

from edgeattn.apps.table import markdown

KNOWN = {"edgeattn": "edgeattn", "llama_cpp": "llama.cpp", "onnxruntime_genai": "onnxruntime-genai", "transformers": "transformers"}


class _Names:
    """What people call an engine, its variant behind it."""

    def __getitem__(self, name):
        engine, _, variant = name.partition(":")
        return KNOWN[engine] + (f" {variant}" if variant else "")


NAMES = _Names()


def environment(threads: int, device: str = "cpu") -> dict:
    """The machine, in words."""
    info = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":", 1)[1].strip() for line in info if line.startswith("model name")), platform.machine())
    flags = next((line.split(":", 1)[1].split() for line in info if line.startswith(("flags", "Features"))), [])
    known = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "amx_int8", "asimddp", "i8mm")
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"cpu": cpu, "cores": os.cpu_count(), "threads": threads, "features": [flag for flag in known if flag in flags],
            "memory_gib": round(total / 2**30, 1), "system": f"{platform.system()} {platform.release()}",
            "python": platform.python_version(), "gpu": _gpu() if device == "cuda" else ""}


def _gpu():
    from edgeattn.kernels_cuda.device import about
    return about()["name"]


def summarise(config: dict, args, depths: list[int], engines: dict, samples: dict) -> list[dict]:
    """Rows of {"name", "unit", "better": "more" | "less" | "", engine: value}, medians of the repetitions."""
    stream = median(samples["stream"]["stream"]) / 1e9
    kv = {name: _kv_bytes(config, about) for name, about in engines.items()}
    rows = []
    for depth in depths:
        rows += _speed_rows(args, depth, engines, samples, stream, kv)
    rows.append({"name": "stream read, prefetched", "unit": "GB/s", "better": ""} | {name: stream for name in engines})

    def row(name, unit, value):
        rows.append({"name": name, "unit": unit, "better": "less"} | {engine: value(about) for engine, about in engines.items()})
    row("weights read per token", "MB", lambda about: about["weight_bytes"] / 1e6)
    rows.append({"name": "cache per token", "unit": "kB", "better": "less"} | {name: size / 1e3 for name, size in kv.items()})
    row("peak resident memory", "MB", lambda about: about["memory"]["peak"] / 1e6)
    row("mapped from files, at the end", "MB", lambda about: about["memory"]["mapped"] / 1e6)
    row("anonymous, at the end", "MB", lambda about: about["memory"]["anonymous"] / 1e6)
    row("load, files in the page cache", "s", lambda about: about["load_s"])
    row("first token after it", "s", lambda about: about["first_token_s"])
    return rows


def _kv_bytes(config, about):
    head_dim = config.get("head_dim", config["hidden_size"] // config["num_attention_heads"])
    return 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * head_dim * about["kv_element_bytes"]


def _speed_rows(args, depth, engines, samples, stream, kv):
    prefill = None if not args.p else {name: median(times[0] for times in samples[name][f"pp{args.p}@{depth}"]) for name in engines}
    runs = {name: samples[name][f"tg{args.n}@{depth}"] for name in engines}
    decode = {name: median(args.n / sum(times) for times in runs[name]) for name in engines}
    weights = {name: engines[name]["weight_bytes"] * decode[name] / 1e9 for name in engines}
    cache = {name: kv[name] * (depth + args.n / 2) * decode[name] / 1e9 for name in engines}
    at = f" @ d{depth}" if depth else ""
    rows = [{"name": f"pp{args.p}{at}", "unit": "tok/s", "better": "more"} | {name: args.p / prefill[name] for name in engines}] \
        if prefill else []
    if prefill and not depth:
        rows.append({"name": f"time to first token, {args.p}", "unit": "ms", "better": "less"}
                    | {name: 1e3 * prefill[name] for name in engines})
    rows.append({"name": f"tg{args.n}{at}", "unit": "tok/s", "better": "more"} | decode)
    for share, q in (("p50", 0.5), ("p95", 0.95)):
        rows.append({"name": f"tg{args.n}{at}, {share}", "unit": "ms/token", "better": "less"}
                    | {name: 1e3 * _quantile(sum(runs[name], []), q) for name in engines})
    rows.append({"name": f"weights read{at}", "unit": "share of stream", "better": ""}
                | {name: weights[name] / stream for name in engines})
    if depth and not args.fill:
        rows.append({"name": f"weights and cache read once{at}", "unit": "share of stream", "better": ""}
                    | {name: (weights[name] + cache[name]) / stream for name in engines})
    return rows


def _quantile(values, q):
    return sorted(values)[min(len(values) - 1, int(q * len(values)))]


def render(args, machine: dict, engines: dict, left_out: dict, rows: list[dict]) -> str:
    """The table with the machine and the versions above it."""
    own = [name for name in engines if name.startswith("edgeattn")][-1:]  # the last is compared with the others
    peers = [name for name in engines if name not in own] if own else []
    head = ["", "unit", *(NAMES[name] for name in engines), *(f"{NAMES[own[0]]} against {NAMES[name]}" for name in peers)]
    where = ", ".join(filter(None, (machine.get("gpu"), machine["cpu"])))
    lines = [f"{where}, {machine['cores']} cores ({' '.join(machine['features'])}), {machine['threads']} threads, "
             f"{machine['memory_gib']} GiB, {machine['system']}, Python {machine['python']}; {args.shape}, random weights; "
             f"medians of {args.r}, engines alternating; other processes used {machine['busy_with_others']:.2f} of a core meanwhile.", ""]
    lines += [f"- {NAMES[name]}: {about['version']}; {about['formats']}; {about['settings']}" for name, about in engines.items()]
    lines += [f"- {NAMES[name]}'s memory in MB: " + ", ".join(f"{part} {size / 1e6:.0f}" for part, size in about["memory"]["parts"].items())
              for name, about in engines.items() if about["memory"]["parts"]]
    lines += [f"- {NAMES[name]} is left out: {why}" for name, why in left_out.items()]
    return "\n".join([*lines, "", markdown([head, *(_cells(row, engines, own, peers) for row in rows)])])


def _cells(row, engines, own, peers):
    cells = [row["name"], row["unit"], *(_number(row[name], row["unit"]) for name in engines)]
    return cells + [f"{row[own[0]] / row[peer]:.2f}x" if row["better"] else "" for peer in peers]


def _number(value, unit):
    if unit.startswith("share"):
        return f"{100 * value:.0f} %"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
