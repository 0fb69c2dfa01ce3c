"""Runs attention over a KVCache as a model's layers do, and says what the reference makes of the same pages."""
import numpy as np

from edgeattn.batch import COUNTS, Batch
from edgeattn.kernels_cpu import cached_attention as kernel, steps
from edgeattn.kernels_cpu.page_pool import POOLS, RELEASED
from edgeattn.kernels_cpu.steps import Tensor, aligned
from edgeattn.page_formats import BITS, PAGE
from edgeattn.reference.cached_attention import cached_attention as reference, rotate
from edgeattn.reference.read_pages import read_pages
from edgeattn.reference.seal_pages import seal_pages

EXACT = 3e-5    # float32 sums, in another order, of values of size 4 and of codes times steps around minima
# Of an output's norm: over quantised pages q, softmax weights and in prefill keys and values are rounded to 127 steps. A page left out of
# 40: 0.16
ROUNDED = 0.08


def hadamard(depth):
    """Orthonormal: blocks of the largest power of two that divides depth."""
    size = depth & -depth
    block = np.ones((1, 1))
    while len(block) < size:
        block = np.block([[block, block], [block, -block]])
    return np.kron(np.eye(depth // size), block / size ** 0.5).astype(np.float32)


def dequantise(cache, sequence, layer, head):
    """Keys and values [slots, head_dim] float32 of the pages as the format says, by the reference alone; NaN where pages are released."""
    count, depth = int(sequence.counts[layer, head]), cache.head_dim
    pages = sequence.tables[layer, head, :-(-count // PAGE)]
    k, v = np.full((2, len(pages), PAGE, depth), np.nan, np.float32)
    for i, pool in enumerate(cache.pools):
        here = np.flatnonzero((pages != RELEASED) & (pages % POOLS == i))
        if len(here):
            k[here], v[here] = page_values(pool, pages[here] // POOLS)
    return k.reshape(-1, depth)[:count], v.reshape(-1, depth)[:count]


def page_values(pool, numbers):
    """K and V [pages, 32, head_dim]."""
    f, (k, k_params, v, v_params) = pool.format, [array[numbers] for array in pool.pages.arrays().values()]
    about, deltas = dict(k_axis=f.k_axis, one_group=f.one_group, separated=f.separated), f.k_type == "delta"
    other = np.zeros((len(k), f.head_dim, PAGE), np.float32)  # for sides that are floats the reference gets something else
    other = seal_pages(other, other.transpose(0, 2, 1), k_type="int2", v_type="int2", **about)
    (keys, key_params), k_type = ((k, k_params), f.k_type) if BITS[f.k_type] < 16 or deltas else (other[:2], "int2")
    (values, value_params), v_type = ((v, v_params), f.v_type) if BITS[f.v_type] < 16 else (other[2:], "int2")
    keys, values = read_pages(keys, key_params, values, value_params, head_dim=f.head_dim, k_type=k_type, v_type=v_type, gate=f.gate,
                              **about)
    if BITS[f.k_type] >= 16 and not deltas:
        keys = k.view(f"f{BITS[f.k_type] // 8}").reshape(-1, f.head_dim, PAGE)
    if BITS[f.v_type] >= 16:
        values = v.view(f"f{BITS[f.v_type] // 8}").reshape(-1, PAGE, f.width)[..., :f.head_dim]
    return keys.transpose(0, 2, 1), values


def page_bytes(cache, sequence):
    """The bytes of all full pages, list by list."""
    return [[[array[entry // POOLS].tobytes() for array in cache.pools[entry % POOLS].pages.arrays().values()]
             for entry in table[:count // PAGE]]
            for table, count in zip(sequence.tables.reshape(-1, cache.plan.max_pages), sequence.counts.ravel())]


class Driver:
    """Layers of attention over one cache; `group` query heads a KV head. Without `rotary` the angles are 0.

    forward() checks each output against the reference over the pages' own values.
    """

    def __init__(self, cache, group=2, *, rotary=True, window=0, tolerance=EXACT):
        self.cache, self.group, self.window, self.tolerance = cache, group, window, tolerance
        (self.layers, self.kv_heads), self.depth, chunk = cache.shape, cache.head_dim, cache.plan.chunk
        heads, self.scale = self.kv_heads * group, self.depth ** -0.5
        self.batch = Batch(chunk, 1, 8)
        turns = np.arange(4 * cache.tokens)[:, None] / 10000 ** (np.arange(self.depth // 2) / (self.depth // 2)) * rotary
        self.cos, self.sin = np.cos(turns).astype(np.float32), np.sin(turns).astype(np.float32)
        self.q, self.k, self.v, self.out = (aligned((chunk, n * self.depth), np.float32)
                                            for n in (heads, self.kv_heads, self.kv_heads, heads))
        tensors = {name: Tensor.of(getattr(self, name), "tokens") for name in ("q", "k", "v", "out")}
        tensors |= {"cos": Tensor.of(self.cos), "sin": Tensor.of(self.sin)}
        about = dict(num_heads=heads, kv_heads=self.kv_heads, head_dim=self.depth, rotary_dim=self.depth, interleaved=0, scale=self.scale,
                     window=window)
        self.workspace = aligned(kernel.workspace_bytes(tensors, about, max(chunk, 8), 2), np.uint8)
        extra = self.batch.arguments() | {"batch.selections": 0, "selection.group": -1, "selection.capacity": 0, "prefill.sparse": 1,
                                          "workspace": self.workspace.ctypes.data}
        self.rows = np.array([steps.make_row(kernel, tensors, about | {"layer": layer}, COUNTS, cache.arguments(layer) | extra)
                              for layer in range(self.layers)])
        self.turn = hadamard(self.depth) if cache.arguments(0)["cache.keys_rotated"] else np.eye(self.depth, dtype=np.float32)

    def random(self, tokens):
        """q, k, v [layers, tokens, heads, head_dim] of standard normal numbers."""
        return [np.random.default_rng().standard_normal((self.layers, tokens, n, self.depth), np.float32)
                for n in (self.kv_heads * self.group, self.kv_heads, self.kv_heads)]

    def forward(self, work, check=True, settle=True, probes=None, lists=None):
        """work: [(sequence, (q, k, v))] -> outputs like q. One forward call; `probes`: as the cache asks; lists: an address for each
        sequence of what its tokens read, 0 for everything."""
        self.batch.clear()
        for sequence, (q, _, _) in work:
            self.cache.append(sequence, q.shape[1])
            wanted = self.cache.probes_for(sequence, q.shape[1]) if probes is None else probes
            self.batch.add(sequence, np.zeros(q.shape[1], np.int64), np.arange(0), wanted)
        self.batch.prefill_lists[:len(work)] = lists or 0
        tokens, outputs = int(self.batch.state[0]), []
        for layer in range(self.layers):
            for name, i in (("q", 0), ("k", 1), ("v", 2)):
                getattr(self, name)[:tokens] = np.concatenate([parts[i][layer].reshape(len(parts[i][layer]), -1) for _, parts in work])
            steps.run(self.rows[layer:layer + 1], self.batch.state)
            outputs.append(self.out[:tokens].copy())
        ends = np.cumsum([parts[0].shape[1] for _, parts in work])[:-1]
        found = [part.reshape(parts[0].shape) for part, (_, parts) in zip(np.split(np.stack(outputs), ends, 1), work)]
        for out, (sequence, parts) in zip(found, work):
            if check:
                self.check(sequence, parts, out)
            if settle:
                self.cache.settle(sequence, parts[0].shape[1])
        return found

    def fill(self, sequence, tokens, chunk=None, **options):
        """`tokens` random ones, in chunks. -> k, v."""
        parts = self.random(tokens)
        for start in range(0, tokens, chunk or self.cache.plan.chunk):
            stop = min(tokens, start + (chunk or self.cache.plan.chunk))
            self.forward([(sequence, [x[:, start:stop] for x in parts])], **options)
        return parts[1:]

    def rotated(self, x, sequence):
        """The newest tokens' q or k [tokens, heads, head_dim] as attention uses it."""
        where = slice(sequence.length - len(x), sequence.length)
        return rotate(x, self.cos[where], self.sin[where]) @ self.turn

    def check(self, sequence, parts, out):
        q, k, v = parts
        n = q.shape[1]
        for layer in range(self.layers):
            queries, new = self.rotated(q[layer], sequence), self.rotated(k[layer], sequence)
            for head in range(self.kv_heads):
                own = slice(head * self.group, (head + 1) * self.group)
                keys, values = dequantise(self.cache, sequence, layer, head)
                np.testing.assert_allclose(keys[-n:], new[:, head], rtol=2 ** -10, atol=1e-5)
                np.testing.assert_allclose(values[-n:], v[layer, :, head], rtol=2 ** -10, atol=1e-6)
                held = None if sequence.compensation is None else sequence.compensation[layer, head]
                expected = self.attention(queries[:, own], keys, values, held)
                self.compare(out[layer, :, own], expected, len(self.cache.pools) > 1)

    def compare(self, got, expected, rounded):
        if rounded:
            error = np.linalg.norm(got - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
            most = 1 if len(error) == 1 else 5  # of many rows some are short
            assert error.max() < most * ROUNDED and error.mean() < ROUNDED, f"relative errors {error.ravel()}"
        else:
            np.testing.assert_allclose(got, expected, rtol=0, atol=self.tolerance)

    def attention(self, q, keys, values, held=None):
        """What the newest len(q) tokens of one KV head get, [tokens, group, head_dim]: the reference's answer; where pages are released
        (NaN) or a compensation token `held` stands for dropped ones, the same over what is left. q: as `rotated` returns it."""
        n = len(q)
        if held is not None and held[0] or np.isnan(keys).any():
            values = [np.nan_to_num(values), *([] if held is None else [held[None, -self.depth:]])]
            return self.weights(q, keys, held) @ np.concatenate(values)
        past = keys[None, :-n], values[None, :-n]
        out, _, _ = reference(q.reshape(n, -1), keys[-n:], values[-n:], self.cos, self.sin, *past, np.arange(n), num_heads=self.group,
                              kv_heads=1, head_dim=self.depth, rotary_dim=0, scale=self.scale, window=self.window)
        return out.reshape(q.shape)

    def weights(self, q, keys, held=None):
        """Softmax weights [tokens, group, slots] of the newest len(q) tokens, 0 for what they do not see and for NaN keys; one slot more
        for a compensation token."""
        n, slots = len(q), len(keys)
        scores = np.einsum("tgd,sd->tgs", q.astype(np.float64), np.nan_to_num(keys)) * self.scale
        distance = (slots - n + np.arange(n))[:, None] - np.arange(slots)
        hidden = (distance < 0) | ((distance >= self.window) if self.window else False) | np.isnan(keys[:, 0])
        scores[np.broadcast_to(hidden[:, None], scores.shape)] = -np.inf
        if held is not None:
            with np.errstate(divide="ignore"):
                extra = q @ held[1:1 + self.depth] * self.scale + np.log(held[0])
            scores = np.concatenate([scores, extra[..., None]], -1)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        return weights / weights.sum(-1, keepdims=True)
