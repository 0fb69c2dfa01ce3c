"""One layer of this runtime's attention over random queries, keys and values, and what a mask makes of the same in NumPy."""
import time

import numba
import numpy as np

from edgeattn.batch import COUNTS, Batch
from edgeattn.cache.kv_cache import KVCache
from edgeattn.cache.options import CacheOptions
from edgeattn.kernels_cpu import cached_attention, steps
from edgeattn.prefill_lists import write_lists
from edgeattn.prefill_plan import PrefillPlan

SEQUENCES = 8  # in a call, at most


class MaskLayer:
    """shape: (heads, kv_heads, head_dim). After calls: `seconds` of attention, `pairs` of query and key that it read, `error`: the largest
    distance of an output from the mask's, relative to that, over the last call."""

    def __init__(self, shape: tuple[int, int, int], options: CacheOptions, tokens: int, chunk: int, threads: int, window: int = 0,
                 seed: int = 0):
        (heads, kv_heads, head_dim), self._threads, self.chunk, self._window = shape, threads, chunk, window
        self.rng, self.seconds, self.pairs, self.error = np.random.default_rng(seed), 0.0, 0, 0.0
        self.cache, self._batch = KVCache(1, kv_heads, head_dim, tokens, options, chunk), Batch(chunk, 1, SEQUENCES)
        self._scale, self._held = head_dim ** -0.5, []
        self._parts = {name: steps.aligned((chunk, n * head_dim), np.float32)
                       for name, n in (("q", heads), ("k", kv_heads), ("v", kv_heads), ("out", heads))}
        angles = {name: steps.aligned((1, head_dim // 2), np.float32) for name in ("cos", "sin")}
        angles["cos"][:], angles["sin"][:], self._angles = 1, 0, angles  # every token stands at position 0: nothing turns
        tensors = {name: steps.Tensor.of(x, "tokens") for name, x in self._parts.items()}
        tensors |= {name: steps.Tensor.of(x) for name, x in angles.items()}
        about = dict(num_heads=heads, kv_heads=kv_heads, head_dim=head_dim, rotary_dim=head_dim, interleaved=0, scale=self._scale,
                     window=window, layer=0)
        self._workspace = steps.aligned(cached_attention.workspace_bytes(tensors, about, max(chunk, SEQUENCES), threads), np.uint8)
        extra = self._batch.arguments() | self.cache.arguments(0) | {"batch.selections": 0, "selection.group": -1, "prefill.sparse": 1,
                                                                     "workspace": self._workspace.ctypes.data}
        self._row = steps.make_row(cached_attention, tensors, about, COUNTS, extra).reshape(1, -1)

    def call(self, work: list, check: bool) -> None:
        """work: (sequence, tokens, PrefillPlan or None) of each sequence: append so many random tokens and attend."""
        self._batch.clear()
        self._held = [plan and write_lists([plan]) for _, _, plan in work]  # kernels read them until the call is over
        for i, (sequence, count, _) in enumerate(work):
            self.cache.append(sequence, count)
            self._batch.add(sequence, np.zeros(count, np.int64), np.arange(0), self.cache.probes_for(sequence, count))
            self._batch.prefill_lists[i] = 0 if self._held[i] is None else self._held[i].ctypes.data
        self._batch.positions[:] = 0
        tokens = int(self._batch.state[0])
        for name in "qkv":
            self._parts[name][:tokens] = self.rng.standard_normal(self._parts[name][:tokens].shape)
        numba.set_num_threads(self._threads)
        start = time.perf_counter()
        steps.run(self._row, self._batch.state)
        self.seconds += time.perf_counter() - start
        first = 0
        for sequence, count, plan in work:
            seen = self._seen(sequence, count, plan)
            self.pairs += int(seen.sum()) / len(seen)
            if check:
                self.error = max(self.error, self._distance(sequence, slice(first, first + count), seen))
            first += count
        for sequence, count, _ in work:
            self.cache.settle(sequence, count)

    def _seen(self, sequence, count, plan: PrefillPlan | None):
        """[kv_heads or 1, count, keys] bool: the mask."""
        if plan is not None:
            return plan.mask()
        distance = np.arange(sequence.length - count, sequence.length)[:, None] - np.arange(sequence.length)
        return ((distance >= 0) & (distance < (self._window or sequence.length)))[None]

    def _distance(self, sequence, rows, seen):
        q, out = (self._parts[name][rows].reshape(rows.stop - rows.start, self.cache.shape[1], -1, self.cache.head_dim).astype(np.float64)
                  for name in ("q", "out"))
        worst = 0.0
        for head in range(self.cache.shape[1]):
            k, v = self.cache.read(sequence, 0, head)  # as they are stored, which is what a mask says nothing about
            scores = np.where(seen[head % len(seen)][:, None], np.einsum("tgd,sd->tgs", q[:, head], k) * self._scale, -np.inf)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            expected = weights @ v / weights.sum(-1, keepdims=True)
            norms = np.linalg.norm(out[:, head] - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
            worst = max(worst, float(norms.mean()))
        return worst
