"""CUDA attention over the paged cache beside torch's scaled_dot_product_attention, on the GPU at hand, in one run.

    python benchmarks/cuda_attention.py        (where edgeattn is not installed: sh benchmarks/gpu.sh python3 benchmarks/cuda_attention.py)

Decode: one token of one sequence, 32 query heads over 8 KV heads of 128 channels. Ours rotates q and k, writes the token, attends and
merges; with "quest" it chooses the pages before that. torch attends alone, by the fastest of its back ends. Both are chains of calls in a
CUDA graph, over different layers' keys and values, larger together than twice the L2; medians of CUDA events over replays, for each call.
Each is compared with float32 on the same keys and values first. Beside the time stand the bytes that a step touches, and what those would
take at the bandwidths of two Jetsons.
Prefill: a whole prompt with nothing before it.
"""
import argparse
import json
import warnings

import numpy as np
import torch
from cuda_kernels import median_us
from torch.nn.attention import SDPBackend, sdpa_kernel

from edgeattn.backend_cuda import Step
from edgeattn.kernels_cuda import cached_attention, device, read_pages, select_pages, steps
from edgeattn.kernels_cuda.fused_steps import fuse
from edgeattn.kernels_cuda.page_pool import POOLS
from edgeattn.kernels_cuda.paged_cache import COUNT, HEADER, PagedCache
from edgeattn.page_formats import PAGE, PageFormat

HEADS, KV_HEADS, HEAD_DIM, WINDOW = 32, 8, 128, 128
JETSONS = {"Orin Nano Super": 102, "AGX Orin": 205}  # GB/s
ABOUT = dict(num_heads=HEADS, kv_heads=KV_HEADS, head_dim=HEAD_DIM, rotary_dim=HEAD_DIM, scale=HEAD_DIM ** -0.5)
SELECT = dict(score="bound", combine="head", fraction=0.0, recent=5, reach=1.0, reuse=0.0, block=1)


def fill(pages):
    """Random pages: floats of size 1, codes of any value, minima and steps that make them about that."""
    xp, f = device.cupy(), pages.format
    for array, bits in ((pages.k, f.k_type), (pages.v, f.v_type)):
        if bits == "f16":
            values = xp.asarray(torch.randn(array.size // 2, device="cuda", dtype=torch.float16))
            array.view(np.float16)[:] = values.reshape(array.shape[0], -1)
        else:
            array[:] = xp.asarray(torch.randint(0, 256, array.shape, device="cuda", dtype=torch.uint8))
    for array, halves, kind in ((pages.k_params, (2, f.head_dim), f.k_type), (pages.v_params, (-1, 2, PAGE), f.v_type)):
        if array.size:
            levels = 2 ** int(kind[3:]) - 1
            x = torch.rand(len(array), array.shape[1], device="cuda")
            both = x.reshape(len(array), *halves) if halves[0] > 0 else x.reshape(len(array), -1, 2, PAGE)
            both[..., 0, :] = -1.5 - both[..., 0, :]
            both[..., 1, :] = (3 + both[..., 1, :]) / levels
            array[:] = xp.asarray(x.half()).view(np.uint16)


class Decode:
    """One layer's step over a cache of `depth` tokens; the first page and the newest stay halves. `of`: a cache of as many layers as are
    timed."""

    def __init__(self, of, layer, budget):
        xp, self.cache, self.depth, self.budget, self.sealed = device.cupy(), of.cache, of.depth, budget, of.sealed
        self.first = layer * KV_HEADS
        fused = xp.asarray(torch.randn(1, (HEADS + 2 * KV_HEADS) * HEAD_DIM, device="cuda"))
        self.tensors = {"q": fused[:, :HEADS * HEAD_DIM], "k": fused[:, HEADS * HEAD_DIM:(HEADS + KV_HEADS) * HEAD_DIM],
                        "v": fused[:, (HEADS + KV_HEADS) * HEAD_DIM:], "out": xp.zeros((1, HEADS * HEAD_DIM), np.float32),
                        "cos": of.cos, "sin": of.sin}
        extra = {"batch.positions": of.positions.data.ptr, "selection.shares": of.shares.data.ptr, "selection.stats": 0, "batch.index": 0,
                 "layer": layer, "selection.group": layer if budget else -1}
        chosen = {n: self.tensors[n] for n in ("q", "cos", "sin")}, ABOUT | SELECT | {"budget": budget}
        kinds = [(select_pages, *chosen)] * bool(budget) + [(cached_attention, self.tensors, ABOUT)]
        self.steps = [Step("", kernel.__name__.rsplit(".", 1)[1], kernel, self.cache.arguments(kernel, given, about, extra), 0)
                      for kernel, given, about in kinds]
        self.most = self.cache.bucket() | {"sparse": bool(budget)}
        self.launches = self.made(fuse(self.steps, self.most))

    def made(self, some):
        return [launch for step in some for launch in step.kernel.launches(step.arguments, self.most)]


class Layers:
    """A cache of several layers with random pages; `cases`: a step of each, and for its first one what it should give."""

    def __init__(self, types, depth, layers, budget=0):
        xp, (k_type, v_type) = device.cupy(), (types.split("/") * 2)[:2]
        formats = [PageFormat(HEAD_DIM)] + ([PageFormat(HEAD_DIM, k_type, v_type)] if types != "f16" else [])
        self.depth, self.budget = depth, budget
        self.cache = PagedCache(formats, KV_HEADS * layers, [depth - 1], [1], budget // PAGE + 8 if budget else 0)
        for pages in self.cache.pools:
            fill(pages)
        self.sealed = (depth - WINDOW) // PAGE if types != "f16" else 1
        self.cache.entries[0, :, 1:self.sealed] += self.sealed > 1
        self.cache.tables.set(self.cache.entries)
        self.cache.sealed.fill(self.sealed)
        self.positions, self.shares = xp.zeros(1, np.int64), xp.ones(KV_HEADS * layers, np.float32)
        self.cos, self.sin = xp.ones((depth, HEAD_DIM // 2), np.float32), xp.zeros((depth, HEAD_DIM // 2), np.float32)
        self.cases = [Decode(self, layer, budget) for layer in range(layers)]
        self.tensors, self.launches = self.cases[0].tensors, self.cases[0].launches

    def lists(self):
        rows = self.cache.selection.get()[0, 0, :KV_HEADS]
        return [row[HEADER:HEADER + row[COUNT]] for row in rows] if self.budget else [np.arange(-(-self.depth // PAGE))] * KV_HEADS

    def touched(self):
        """Bytes that a step reads of the cache."""
        def pages(entries):
            return sum(page_format.page_bytes * int((entries % POOLS == pool).sum()) for pool, page_format in enumerate(self.cache.formats))
        read = sum(pages(self.cache.entries[0, h, chosen]) for h, chosen in enumerate(self.lists()))
        return read + (KV_HEADS * self.sealed * 4 * HEAD_DIM if self.budget else 0)

    def check(self):
        """Relative error against float32 over the pages read, and which part of the chosen pages is right."""
        steps.run(self.launches)
        device.cupy().cuda.Device().synchronize()
        q = torch.as_tensor(self.tensors["q"], device="cuda").reshape(KV_HEADS, -1, HEAD_DIM)
        out, right = [], []
        for h, chosen in enumerate(self.lists()):
            k, v = (torch.as_tensor(x, device="cuda") for x in read_pages.run(self.cache.table, HEAD_DIM, self.cache.entries[0, h, chosen]))
            last = (self.depth - 1) % PAGE + 1
            k, v = (x.reshape(-1, HEAD_DIM)[:len(x) * PAGE - PAGE + last] for x in (k.transpose(1, 2), v))
            out.append(torch.softmax(q[h] @ k.T * HEAD_DIM ** -0.5, -1) @ v)
            if self.budget:
                right.append(self._right(h, q[h].double(), chosen))
        expected, got = torch.cat(out).flatten(), torch.as_tensor(self.tensors["out"], device="cuda").flatten()
        return float((got - expected).norm() / expected.norm()), float(np.mean(right)) if right else None

    def _right(self, head, q, chosen):
        entries = self.cache.entries[0, head, 1:self.sealed] // POOLS
        params = self.cache.pools[1].k_params[device.cupy().asarray(entries)].view(np.float16)
        low, step = torch.as_tensor(params, device="cuda").double().reshape(-1, 2, HEAD_DIM).unbind(1)
        half = step * (2 ** int(self.cache.formats[1].k_type[3:]) - 1) / 2
        scores = ((low + half) @ q.T + half @ q.abs().T).max(1).values
        last = min(self.sealed, -(-self.depth // PAGE) - SELECT["recent"])
        free = chosen[(chosen > 0) & (chosen < last)].tolist()
        best = (torch.topk(scores[:last - 1], len(free)).indices + 1).tolist()
        return len(set(best) & set(free)) / len(free)


def chain_us(layers, repeat):
    graph = steps.Graph([launch for case in layers.cases for launch in case.launches])
    with graph.stream:
        return median_us(lambda i: graph.launch(), repeat, len(layers.cases))


def torch_us(depth, copies, repeat, queries=1):
    """us of each of torch's back ends."""
    found, kv = {}, KV_HEADS
    shapes = (HEADS, queries), (kv, depth), (kv, depth)
    tensors = [tuple(torch.randn(1, n, m, HEAD_DIM, device="cuda", dtype=torch.float16) for n, m in shapes)
               for _ in range(copies)]
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
        try:
            with sdpa_kernel(backend):
                def run():
                    for q, k, v in tensors:
                        torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=queries > 1, enable_gqa=True)
                run()
                torch.cuda.synchronize()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    run()
            times = []
            for _ in range(repeat + 3):
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                graph.replay()
                end.record()
                end.synchronize()
                times.append(start.elapsed_time(end) * 1e3 / copies)
            found[backend.name.lower().replace("_attention", "")] = float(np.median(times[3:]))
        except RuntimeError:  # does not take grouped heads
            continue
    print("torch: " + ", ".join(f"{name} {us:.1f} us" for name, us in found.items()))
    return found


def fastest(found):
    """(us, back end)"""
    return min((us, name) for name, us in found.items())


def decode(depths, types, budget, repeat, l2):
    print(f"\ndecode, batch 1, {HEADS}/{KV_HEADS} heads of {HEAD_DIM}, medians of {repeat} replays\n"
          f"{'depth':>7} {'cache':>12} {'us':>8} {'x torch':>8} {'error':>8} {'right':>6} {'MB':>8} {'GB/s':>6}  "
          + "  ".join(f"us at {speed} GB/s" for speed in JETSONS.values()))
    for depth in depths:
        copies = max(2, min(24, -(-2 * l2 // (depth * 4 * KV_HEADS * HEAD_DIM))))
        reference, backend = fastest(torch_us(depth, copies, repeat))
        print(f"{depth:>7} {'torch ' + backend:>12} {reference:8.1f}")
        for name, chosen in [*((t, 0) for t in types), *((t, budget) for t in types if t != "f16" and budget and depth > 2 * budget)]:
            layers = Layers(name, depth, copies if name == "f16" else min(4 * copies, 24), chosen)
            error, right = layers.check()
            us, touched = chain_us(layers, repeat), layers.touched()
            label = name + (" quest" if chosen else "")
            chosen_right = "" if right is None else f"{right:.3f}"
            print(f"{depth:>7} {label:>12} {us:8.1f} {reference / us:8.2f} {error:8.1e} {chosen_right:>6} {touched / 1e6:8.2f} "
                  f"{touched / us / 1e3:6.0f}  " + "  ".join(f"{touched / speed / 1e3:12.0f}" for speed in JETSONS.values()), flush=True)
            yield dict(depth=depth, cache=label, us=us, torch_us=reference, torch_backend=backend, error=error, touched_bytes=touched)
            del layers
            device.cupy().get_default_memory_pool().free_all_blocks()


def prefill(tokens, types, repeat):
    """A prompt of `tokens`, nothing before it."""
    xp = device.cupy()
    reference, backend = fastest(torch_us(tokens, 1, repeat, tokens))
    print(f"\nprefill of {tokens} tokens\n{'torch ' + backend:>12} {reference / 1e3:8.2f} ms")
    for name in types:
        cache = PagedCache([PageFormat(HEAD_DIM)], KV_HEADS, [0], [tokens])
        heads = {"q": HEADS, "k": KV_HEADS, "v": KV_HEADS}
        tensors = {name: xp.asarray(torch.randn(tokens, n * HEAD_DIM, device="cuda")) for name, n in heads.items()}
        tensors |= {"out": xp.zeros((tokens, HEADS * HEAD_DIM), np.float32), "cos": xp.ones((tokens, HEAD_DIM // 2), np.float32),
                    "sin": xp.zeros((tokens, HEAD_DIM // 2), np.float32)}
        positions = xp.arange(tokens, dtype=np.int64)
        launches = cache.launches(cached_attention, tensors, ABOUT, {"batch.positions": positions.data.ptr})
        steps.run(launches)
        device.cupy().cuda.Device().synchronize()
        q, k, v = (torch.as_tensor(tensors[n], device="cuda").reshape(tokens, -1, HEAD_DIM).transpose(0, 1)[None] for n in "qkv")
        rows = torch.randint(0, tokens, (64,), device="cuda")
        scores = q[:, :, rows] @ k.repeat_interleave(HEADS // KV_HEADS, 1).transpose(2, 3) * HEAD_DIM ** -0.5
        scores.masked_fill_(torch.arange(tokens, device="cuda") > rows[:, None], float("-inf"))
        expected = torch.softmax(scores, -1) @ v.repeat_interleave(HEADS // KV_HEADS, 1)
        got = torch.as_tensor(tensors["out"], device="cuda").reshape(tokens, HEADS, HEAD_DIM)[rows].transpose(0, 1)[None]
        error = float((got - expected).norm() / expected.norm())
        us = median_us(lambda i: steps.run(launches), repeat)
        flops = 2 * tokens * tokens * HEADS * HEAD_DIM
        print(f"{name:>12} {us / 1e3:8.2f} ms, {us / reference:.2f} of torch's time, {flops / us / 1e6:.0f} TFLOP/s, error {error:.1e}",
              flush=True)
        yield dict(prefill=tokens, cache=name, us=us, torch_us=reference, torch_backend=backend, error=error)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depths", type=int, nargs="*", default=[4096, 16384, 32768, 131072])
    parser.add_argument("--types", nargs="*", default=["f16", "int8", "int4", "int2"])
    parser.add_argument("--budget", type=int, default=2048, help="tokens that a KV head reads where pages are chosen; 0: none are")
    parser.add_argument("--prefill", type=int, nargs="*", default=[32768])
    parser.add_argument("-r", "--repeat", type=int, default=30)
    parser.add_argument("--json")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", message="For dense input")
    about = device.about()
    print(about, f"torch {torch.__version__}")
    found = list(decode(args.depths, args.types, args.budget, args.repeat, about["l2_bytes"]))
    for tokens in args.prefill:
        found += prefill(tokens, ["f16"], max(3, args.repeat // 5))
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(dict(device=about, results=found), file, indent=1)


if __name__ == "__main__":
    main()
