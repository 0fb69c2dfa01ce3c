"""Attention alone, over a cache filled with given keys and values: what crossovers and benchmarks time."""
import time

import numba
import numpy as np

from edgeattn.batch import COUNTS, Batch
from edgeattn.cache.kv_cache import KVCache
from edgeattn.cache.options import CacheOptions
from edgeattn.kernels_cpu import cached_attention, select_pages, steps
from edgeattn.kernels_cpu.selections import SLOTS
from edgeattn.page_formats import PAGE

ROOM = 64  # tokens behind the depth


def fill(cache, sequence, tokens: int, source) -> None:
    """Append tokens to a sequence without computing them. source(layer, head, first page, pages) -> K [pages, head_dim, 32] and V
    [pages, 32, width] float16, for whole pages."""
    floats, start = cache.pools[0].pages, sequence.length // PAGE
    width = cache.pools[0].format.width
    k, v = floats.k.view(np.float16).reshape(-1, cache.head_dim, PAGE), floats.v.view(np.float16).reshape(-1, PAGE, width)
    while sequence.length < tokens:
        count = min(cache.plan.chunk // PAGE * PAGE, tokens - sequence.length)
        cache.append(sequence, count)
        pages = -(-sequence.length // PAGE) - start
        for layer, head in np.ndindex(cache.shape):
            where = sequence.tables[layer, head, start:start + pages] // 4
            k[where], v[where] = source(layer, head, start, pages)
        start += count // PAGE
        cache.settle(sequence, count)


def random_source(rng, head_dim: int, width: int):
    """Standard normal keys and values, from 8 pages again and again."""
    k, v = (rng.standard_normal((8, *shape)).astype(np.float16) for shape in ((head_dim, PAGE), (PAGE, width)))
    return lambda layer, head, first, pages: (k[(layer + head + np.arange(pages)) % 8], v[(layer + head + np.arange(pages)) % 8])


class AttentionCase:
    """A model's attention, and its page selection where there is a scheduler: `layers` of one token with `depth` others before it, or of a
    chunk of `tokens` of a prompt.

    shape  (layers, heads, kv_heads, head_dim)
    step() times all layers once; the tokens stay the same, and the cache does not grow, but lists take each step for the next token's.
    """

    def __init__(self, options: CacheOptions, shape, depth: int, threads: int, scheduler=None, source=None, tokens: int = 1):
        layers, heads, kv_heads, head_dim = shape
        rng, context = np.random.default_rng(0), depth + tokens + ROOM
        self.threads = threads
        self.scheduler, selection = scheduler, scheduler and scheduler.selection_plan(context)
        self.cache = KVCache(layers, kv_heads, head_dim, context, options, 512, selection=selection)
        self.sequence, self.batch, self.tokens = self.cache.new_sequence(), Batch(tokens, 1, 1), tokens
        fill(self.cache, self.sequence, depth, source or random_source(rng, head_dim, self.cache.pools[0].format.width))
        if tokens > 1:  # one token takes the place of the last
            self.cache.append(self.sequence, tokens)
        self.queries = rng.standard_normal((layers, tokens, heads * head_dim)).astype(np.float32)
        self._fused = steps.aligned((tokens, (heads + 2 * kv_heads) * head_dim), np.float32)
        self._fused[:] = rng.standard_normal(self._fused.shape)
        self._out = steps.aligned((tokens, heads * head_dim), np.float32)
        self._cos, self._sin = (steps.aligned((1, head_dim // 2), np.float32) for _ in range(2))
        self._cos[:] = 1
        self.attributes = dict(num_heads=heads, kv_heads=kv_heads, head_dim=head_dim, rotary_dim=head_dim, interleaved=0,
                               scale=head_dim ** -0.5, window=0)
        if scheduler:
            scheduler.prepare(1, self.cache.plan.max_pages)
        self._make_rows(layers, threads)

    def _make_rows(self, layers, threads):
        q_width, kv_width = self._out.shape[1], self.attributes["kv_heads"] * self.attributes["head_dim"]
        parts = {"q": self._fused[:, :q_width], "k": self._fused[:, q_width:q_width + kv_width], "v": self._fused[:, q_width + kv_width:],
                 "cos": self._cos, "sin": self._sin, "out": self._out}
        tensors = {name: steps.Tensor(x.ctypes.data, ("tokens", *x.shape[1:]), self._fused.shape[1] if name in "qkv" else x.shape[1])
                   for name, x in parts.items()}
        for name in ("cos", "sin"):  # one row, which is that of position 0
            x = parts[name]
            tensors[name] = steps.Tensor(x.ctypes.data, (self.cache.plan.max_pages * PAGE, x.shape[1]), x.shape[1])
        self._inputs = {name: parts[name] for name in ("q", "k", "v", "cos", "sin")}
        size = select_pages.workspace_bytes(tensors, self.attributes | {"score": "rank"}, self.tokens, threads)
        self._workspace = steps.aligned(size, np.uint8)
        self.rows, self.attention = [], []
        for layer in range(layers):
            extra = self.batch.arguments() | {"selection.group": -1} | self.cache.arguments(layer)
            extra |= {"workspace": self._workspace.ctypes.data, "prefill.sparse": int(self.tokens > 1)}
            extra |= self.scheduler.arguments(layer) if self.scheduler else {}
            found = [(select_pages, about) for _, about in (self.scheduler.operators(layer) if self.scheduler else ())]
            for kernel, about in [*found, (cached_attention, {})]:
                row = steps.make_row(kernel, tensors, self.attributes | {"layer": layer} | about, COUNTS, extra)
                self.rows.append((layer, kernel is cached_attention, row.reshape(1, -1)))

    def step(self, queries=None, prefill=None) -> tuple[float, float]:
        """(seconds of selections, seconds of attention) over all layers. queries: [layers, tokens, heads * head_dim], the same again if
        None. prefill: a PrefillScheduler that chooses what a chunk reads."""
        self.batch.clear()
        self.batch.add(self.sequence, np.zeros(self.tokens, np.int64), np.zeros(1, np.int64), sparse=self.scheduler is not None)
        self.batch.positions[:] = 0
        if self.sequence.selection is not None:
            self.sequence.selection[..., SLOTS] -= self.sequence.selection[..., SLOTS] > 0
        spent = [0.0, 0.0]
        numba.set_num_threads(self.threads)  # the workspace is sized for this many
        for layer, attends, row in self.rows:
            self._fused[:, :self._out.shape[1]] = (self.queries if queries is None else queries)[layer]
            start = time.perf_counter()
            if prefill:
                prefill.choose(layer, self.cache, self.batch, [(0, self.sequence, 0, self.tokens, False)], self._inputs, self.attributes)
                spent[0] += time.perf_counter() - start
                start = time.perf_counter()
            steps.run(row, self.batch.state)
            spent[attends] += time.perf_counter() - start
        return tuple(spent)
