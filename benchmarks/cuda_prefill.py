"""Prompts that read a part, choosing included, beside dense ones and torch's attention, on the GPU at hand, in one run.

    python benchmarks/cuda_prefill.py        (where edgeattn is not installed: sh benchmarks/gpu.sh python3 benchmarks/cuda_prefill.py)

One layer of 32 query heads over 8 KV heads of 128 channels, random queries, keys and values: they have no structure, so that thresholds
are set to what makes their method read a part of it. Ours writes the new tokens, chooses and attends; torch attends alone. A prompt with
nothing before it, and chunks behind cached tokens. Medians of CUDA events, of the whole and of each kernel. Attention over what was
chosen is compared with float32 on some rows; "read" is the part of the pairs of query and key.
"""
import argparse
import json
import math
import warnings
from importlib import import_module

import numpy as np
import torch
from cuda_attention import ABOUT, HEAD_DIM, HEADS, KV_HEADS, fill, torch_us
from cuda_kernels import median_us

from edgeattn.kernels_cuda import cached_attention, device, steps
from edgeattn.kernels_cuda.paged_cache import PagedCache
from edgeattn.kernels_cuda.prefill_call import LIST_ROW, QUERIES, list_ints, most_blocks
from edgeattn.page_formats import PAGE, PageFormat
from edgeattn.policies import load_policy
from edgeattn.prefill_lists import CORRECTIONS

SETTINGS = [("auto", {"fraction": 0.19}), ("auto", {"fraction": 0.1}), ("xattention", {"tau": 0.05}),
            ("xattention", {"tau": 0.05, "stride": 16}), ("sale", {"threshold": 0.35}), ("minference", {"n_v": 500, "n_s": 112}),
            ("dhsa", {"density": 0.03}), ("flex_prefill", {"gamma": 0.03, "budget": 64}),
            ("sample_attention", {"columns": 0.02, "slashes": 0.01}), ("sparge_attn", {"fraction": 0.03}),
            ("pbs_attn", {"tau": 0.03}), ("dhsa_chunks", {"budget": 4096}), ("hip", {}),
            *(("streaming", given) for given in ({}, {"correction": "delta"}, {"correction": "tail"}))]  # mostly at most a fifth


class Prompt:
    """The newest `tokens` of a sequence behind `depth` others."""

    def __init__(self, depth, tokens):
        xp, self.tokens, self.depth = device.cupy(), tokens, depth
        self.cache = PagedCache([PageFormat(HEAD_DIM)], KV_HEADS, [depth], [tokens])
        fill(self.cache.pools[0])
        self.max_pages = self.cache.tables.shape[2]
        self.tensors = {name: xp.asarray(torch.randn(tokens, n * HEAD_DIM, device="cuda"))
                        for name, n in {"q": HEADS, "k": KV_HEADS, "v": KV_HEADS}.items()}
        self.tensors |= {"out": xp.zeros((tokens, HEADS * HEAD_DIM), np.float32),
                         "cos": xp.ones((depth + tokens, HEAD_DIM // 2), np.float32),
                         "sin": xp.zeros((depth + tokens, HEAD_DIM // 2), np.float32)}
        self.positions, self.stats = depth + xp.arange(tokens, dtype=np.int64), xp.zeros((1, 2), np.int64)
        self.chunks = xp.zeros((1, 3), np.int64)
        self.lists = xp.zeros(most_blocks(tokens) * list_ints(KV_HEADS, self.max_pages, self.max_pages * PAGE), np.int32)
        self.place = xp.asarray([self.lists.data.ptr], np.int64)

    def launches(self, policy, correction):
        """Of a policy, or of dense attention."""
        extra = {"batch.positions": self.positions.data.ptr}
        if policy is None:
            return self.cache.launches(cached_attention, self.tensors, ABOUT, extra)
        extra |= {"batch.chunks": self.chunks.data.ptr, "batch.prefill_lists": self.place.data.ptr, "prefill.stats": self.stats.data.ptr,
                  "prefill.correction": CORRECTIONS[correction]}
        own = {"pages": self.max_pages, "columns": min(policy.single_keys(None, HEADS // KV_HEADS), self.max_pages * PAGE)}
        found, bucket = [], self.cache.bucket
        self.cache.bucket = lambda: bucket() | {"listed": True}
        for name, about in policy.operators():
            kernel = import_module(f"edgeattn.kernels_cuda.{name}")
            found += self.cache.launches(kernel, self.tensors, ABOUT | about | own, extra)
        found += self.cache.launches(cached_attention, self.tensors, ABOUT, extra)
        self.cache.bucket = bucket
        return found

    def error(self, listed, correction):
        """Of 64 rows, against float32 over what they read."""
        rows = torch.randint(0, self.tokens, (64,), device="cuda")
        expected = self.attend(rows, listed, correction == "tail")
        if correction == "delta":
            first = rows // QUERIES * QUERIES
            expected += self.attend(first, False) - self.attend(first, True)
        got = torch.as_tensor(self.tensors["out"], device="cuda")[rows].flatten()
        return float((got - expected).norm() / expected.norm())

    def attend(self, rows, listed, tail=False):
        k, v = (torch.as_tensor(x, device="cuda") for x in self.cache.read(0))
        q = torch.as_tensor(self.tensors["q"], device="cuda").reshape(self.tokens, KV_HEADS, -1, HEAD_DIM)[rows]
        scores = torch.einsum("rhgd,hmd->rhgm", q, k) * HEAD_DIM ** -0.5
        seen = torch.arange(k.shape[1], device="cuda") <= (self.depth + rows)[:, None]
        seen = seen[:, None].repeat(1, KV_HEADS, 1)
        whole = seen
        if listed:
            seen = seen.clone()
            lists, blocks = self.lists.get(), -(-self.tokens // QUERIES)
            for i, row in enumerate(rows.tolist()):
                for head in range(KV_HEADS):
                    begin, count, alone, columns = lists[LIST_ROW * (head * blocks + row // QUERIES):][:LIST_ROW]
                    pages = torch.zeros(self.max_pages, dtype=torch.bool)
                    pages[torch.as_tensor(lists[begin:begin + count]).long()] = True
                    keys = pages.repeat_interleave(PAGE)[:k.shape[1]]
                    keys[torch.as_tensor(lists[alone:alone + columns]).long()] = True
                    seen[i, head] &= keys.cuda()
        if tail:  # pages that are seen whole and not read count as their means
            full = k.shape[1] // PAGE
            by_page = [x[..., :full * PAGE].unflatten(-1, (full, PAGE)) for x in (whole, seen)]
            means = [x[:, :full * PAGE].unflatten(1, (full, PAGE)).mean(2) for x in (k, v)]
            pages = torch.einsum("rhgd,hmd->rhgm", q, means[0]) * HEAD_DIM ** -0.5 + math.log(PAGE)
            scores = torch.cat([scores, pages], -1)
            seen, v = torch.cat([seen, by_page[0].all(-1) & ~by_page[1].any(-1)], -1), torch.cat([v, means[1]], 1)
        weights = torch.softmax(scores.masked_fill(~seen[:, :, None], float("-inf")), -1)
        return torch.einsum("rhgm,hmd->rhgd", weights, v).flatten()


def measure(prompt, settings, repeat, torch_times):
    """torch_times: us of torch's back ends where they do the same, else nothing."""
    for name, options in [("dense", {}), *settings]:
        correction, given = options.get("correction", "none"), {key: x for key, x in options.items() if key != "correction"}
        policy = None if name == "dense" else load_policy("prefill", name, given)
        launches = prompt.launches(policy, correction)
        prompt.tensors["out"].fill(np.nan)
        prompt.stats.fill(0)
        steps.run(launches)
        device.cupy().cuda.Device().synchronize()
        read, pairs = prompt.stats.get()[0].tolist() if policy else (1, 1)
        error = prompt.error(policy is not None, correction)
        us = median_us(lambda i: steps.run(launches), repeat)
        parts = {}
        for launch in launches:
            part = launch.function.name
            parts[part] = parts.get(part, 0) + median_us(lambda i: steps.run([launch]), repeat)
        label = " ".join([name, *(f"{key} {value}" for key, value in options.items())])
        beside = ", ".join(f"{other / us:.2f}x {backend}" for backend, other in torch_times.items())
        print(f"{prompt.depth:>7} {prompt.tokens:>6} {label:>28} {100 * read / pairs:6.1f} % {us / 1e3:9.3f} ms {beside:>26} "
              f"error {error:.1e}  " + ", ".join(f"{key} {x / 1e3:.3f}" for key, x in parts.items()), flush=True)
        yield dict(depth=prompt.depth, tokens=prompt.tokens, setting=label, read=read / pairs, us=us, torch_us=torch_times, error=error,
                   parts=parts)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, nargs="*", default=[32768])
    parser.add_argument("--chunk", type=int, nargs="*", default=[512, 2048], help="tokens of chunks behind --depth others")
    parser.add_argument("--depth", type=int, nargs="*", default=[4096, 30720])
    parser.add_argument("-r", "--repeat", type=int, default=7)
    parser.add_argument("--json")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", message="For dense input")
    print(device.about(), f"torch {torch.__version__}")
    print(f"{'behind':>7} {'tokens':>6} {'':>28} {'read':>8} {'':>12} {'of torch':>26}")
    found = []
    for depth, tokens in [(0, tokens) for tokens in args.prompts] + [(depth, tokens) for depth in args.depth for tokens in args.chunk]:
        torch_times = {} if depth else torch_us(tokens, 1, args.repeat, tokens)
        found += measure(Prompt(depth, tokens), SETTINGS, args.repeat, torch_times)
        device.cupy().get_default_memory_pool().free_all_blocks()
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(dict(device=device.about(), results=found), file, indent=1)


if __name__ == "__main__":
    main()
