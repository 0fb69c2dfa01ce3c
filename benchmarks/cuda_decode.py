"""One decode step on a GPU, end to end: `python benchmarks/cuda_decode.py [FOLDER]` (sh benchmarks/gpu.sh python3 benchmarks/cuda_decode.py
where edgeattn is not installed). Without FOLDER an export of the 1B shape with random 4-bit weights is made in a temporary folder.

ours    a step as `generate` runs it: the host's part, the copy, the graph, the choice of the greedy token and its way back
graph   the graph alone between two CUDA events, medians
torch   the same shape in transformers, float16, torch.compile, static cache, between two events, greedy token included

Depths are filled with random pages, as benchmarks/worker.py does: what a step costs does not depend on what stands in them.
"""
import argparse
import gc
import json
import tempfile
import time
from pathlib import Path

import numpy as np
from cuda_kernels import copy_bandwidth, median_us, time_in_kernels
from random_checkpoint import SHAPES
from random_export import write_export

from edgeattn.cache.options import CacheOptions
from edgeattn.kernels_cuda import device
from edgeattn.page_formats import PAGE
from edgeattn.prefill_scheduler import PrefillOptions
from edgeattn.runtime import Model
from edgeattn.scheduler import SparseOptions

CASES = ["f16:off:0", "int4:off:0", "f16:off:32768", "int4:off:32768", "int4:auto:32768"]
GREEDY = dict(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, repeat_penalty=1.0, uniform=0.0)
NOTHING = np.zeros(0, np.int64)


def fill(model, sequence, depth):
    """Random keys and values for whole pages, then quantised as the cache would; other ones for each chunk, as no pages score alike."""
    xp, cache, rng = device.cupy(), model.cache, np.random.default_rng(0)
    floats = cache.pools[0].pages
    while sequence.length < depth:
        with model.backend.stream:
            for array in (floats.k, floats.v) if cache.options.quantised or sequence.length == 0 else ():
                halves = array.view(np.uint16)
                for start in range(0, len(halves), 4096):
                    part = halves[start:start + 4096]  # of either sign, from 0.5 to 2
                    part[...] = xp.asarray(rng.integers(0, 1 << 16, part.shape, np.uint16) & 0x87ff | 0x3800)
        count = min(cache.plan.chunk // PAGE * PAGE, depth - sequence.length)
        cache.append(sequence, count)
        cache.settle(sequence, count)
    model.wait()


def ours(folder, kind, sparse, depth, repeat):
    model = Model.load(folder, cache=CacheOptions(kind, kind), ctx_size=depth + 1024, device="cuda", sparse=SparseOptions(sparse, {}, 0),
                       prefill=PrefillOptions("off"))
    sequence = model.new_sequence()
    if depth:
        fill(model, sequence, depth)
    else:
        model.forward([(sequence, [1, 2, 3])], "none")
    token, spent = 1, []
    for _ in range(repeat + 10):
        start = time.perf_counter()
        row = model.forward([(sequence, [token])], fetch=False)[-1]
        token = row.sample(GREEDY, NOTHING)
        spent.append(time.perf_counter() - start)
    table, = model.plan.items
    bucket = model.backend.bucket(model._batch.state)
    with model.backend.stream:
        graph_us = median_us(lambda i: table.graphs[bucket].launch(model.backend.stream), repeat)
    profiled = time_in_kernels(lambda: table.graphs[bucket].launch(model.backend.stream), model.backend.stream)
    found = dict(cache=kind, sparse=sparse, depth=depth, step_us=1e6 * float(np.median(spent[10:])), graph_us=graph_us,
                 kernels=len(table.launches[bucket]), in_kernels=profiled and profiled[0], each=profiled and profiled[1],
                 weights=model.backend.weight_bytes, kv=model.cache.stored_bytes(sequence))
    return found


def theirs(shape, depths, repeat):
    """us of a step of transformers' model, compiled, for each depth."""
    import torch
    import transformers
    config = SHAPES[shape]
    plain = {name: value for name, value in config.items() if name not in ("architectures", "torch_dtype", "rope_scaling", "rope_theta")}
    made = transformers.AutoConfig.for_model(**plain, rope_parameters=config["rope_scaling"] | {"rope_theta": config["rope_theta"]})
    with torch.device("cuda"):
        model = transformers.AutoModelForCausalLM.from_config(made, dtype=torch.float16).eval()
    step, token = torch.compile(model, mode="reduce-overhead", fullgraph=True), torch.ones((1, 1), dtype=torch.long, device="cuda")
    for depth in depths:
        cache, times = transformers.StaticCache(config=made, max_cache_len=depth + 1024), []
        with torch.inference_mode():
            model(input_ids=token, past_key_values=cache, use_cache=True)  # makes the cache's memory, outside of what is compiled
            for layer in cache.layers:
                layer.cumulative_length.fill_(max(depth, 1))

            def run(cache=cache):
                return step(input_ids=token, past_key_values=cache, use_cache=True).logits[0, -1].argmax()
            for _ in range(5):
                run()
            torch.cuda.synchronize()
            for _ in range(repeat):
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                run()
                end.record()
                end.synchronize()
                times.append(1e3 * start.elapsed_time(end))
        yield depth, float(np.median(times))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", help="an export of the 1B shape")
    parser.add_argument("--shape", default="llama-3.2-1b", choices=SHAPES)
    parser.add_argument("-r", "--repeat", type=int, default=50)
    parser.add_argument("--engines", nargs="+", choices=("ours", "torch"), default=["ours", "torch"])
    parser.add_argument("--cases", nargs="+", default=CASES,
                        help="cache type:sparse attention, from the first token on:depth")
    parser.add_argument("--json", help="also write the figures there")
    args = parser.parse_args()
    cases = [(kind, sparse, int(depth)) for kind, sparse, depth in (case.split(":") for case in args.cases)]
    figures = {"device": device.about(), "copy_gbs": copy_bandwidth(20), "steps": [], "torch": {}}
    print(figures["device"], f"copy {figures['copy_gbs']:.0f} GB/s", flush=True)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(args.folder) if args.folder else write_export(args.shape, Path(made) / "export")
        for kind, sparse, depth in cases if "ours" in args.engines else ():
            found = ours(folder, kind, sparse, depth, args.repeat)
            figures["steps"].append(found)
            gc.collect()
            device.cupy().get_default_memory_pool().free_all_blocks()
            rate = (found["weights"] + (found["kv"] if sparse == "off" else 0)) / found["graph_us"] / 1e3
            share = f"{found['in_kernels']:.1%}" if found["in_kernels"] else "not known"
            print(f"{kind} {sparse:>5} depth {depth:>6}: step {found['step_us']:7.1f} us, graph {found['graph_us']:7.1f} us of "
                  f"{found['kernels']} kernels, one of which runs {share} of the time; {rate:.0f} GB/s", flush=True)
            longest = sorted((found["each"] or {}).items(), key=lambda x: -x[1])[:8]
            print("    " + ", ".join(f"{name} {us:.0f}" for name, us in longest), flush=True)
    save(args.json, figures)
    if "torch" in args.engines:
        for depth, us in theirs(args.shape, sorted({depth for _, _, depth in cases}), args.repeat):
            figures["torch"][depth] = us
            ratios = ", ".join(f"{s['cache']} {s['sparse']} {us / s['step_us']:.2f}x" for s in figures["steps"] if s["depth"] == depth)
            print(f"torch float16 compiled, depth {depth}: {us:.1f} us; ours against it: {ratios}", flush=True)
            save(args.json, figures)


def save(path, figures):
    if path:
        Path(path).write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
