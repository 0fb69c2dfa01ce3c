"""Prompts on a GPU, or on an emulated one, that read what its kernels choose: for tests of what they choose."""
from importlib import import_module

import numpy as np
from prefill_driver import structured

from edgeattn.kernels_cuda.prefill_call import LIST_ROW, QUERIES, list_ints, most_blocks
from edgeattn.page_formats import PAGE, PageFormat
from edgeattn.prefill_corrections import delta
from edgeattn.prefill_lists import CORRECTIONS
from edgeattn.prefill_plan import PrefillPlan, attend

RNG = np.random.default_rng()
LAST = 2  # blocks at the end of a prompt that read everything
# query heads, KV heads, channels; cached tokens, new ones, of which sequences what is chosen is read
SHAPES = [((8, 2, 64), [500], [200], [0]), ((8, 2, 128), [1003], [130], [0]), ((7, 1, 64), [0, 700, 37], [300, 129, 1], [0, 1]),
          ((4, 4, 128), [640, 96, 900], [64, 70, 100], [0, 2]), ((3, 1, 80), [450], [70], [0])]


class Prompts:
    """Sequences with `lengths` cached tokens get `new` ones; all whose new tokens are `listed` read what is chosen. even: weights have no
    structure, so that what is left out matters."""

    def __init__(self, types, heads, kv_heads, head_dim, lengths, new, listed, whole, even=False):
        from edgeattn.kernels_cuda import device
        from edgeattn.kernels_cuda.paged_cache import PagedCache
        xp, self.listed, self.whole = device.cupy(), listed, whole
        floats = "f32" if types == "f32" else "f16"
        formats = [PageFormat(head_dim, floats, floats)] + ([] if types == floats else [PageFormat(head_dim, types, types)])
        self.cache, self.heads, self.kv_heads, self.head_dim = PagedCache(formats, kv_heads, lengths, new), heads, kv_heads, head_dim
        self.lengths, self.new, found = lengths, new, []
        for s, (past, n) in enumerate(zip(lengths, new)):
            q, k, v = structured(RNG, heads, kv_heads, past + n, head_dim)
            if even:
                q, k = (RNG.standard_normal(x.shape, np.float32) for x in (q, k))
            self.cache.fill(s, k[:, :past], v[:, :past])
            if len(formats) > 1 and past // PAGE > 2:
                self.cache.seal(s, 1, past // PAGE - 1)
            found.append([x[:, past:].swapaxes(0, 1).reshape(n, -1) for x in (q, k, v)])
        self.q = [rows.reshape(n, heads, head_dim).swapaxes(0, 1) for (rows, _, _), n in zip(found, new)]
        self.tensors = {name: xp.asarray(np.concatenate(x)) for name, x in zip("qkv", zip(*found))}
        most = max(past + n for past, n in zip(lengths, new))
        self.tensors |= {"cos": xp.ones((most, head_dim // 2), np.float32), "sin": xp.zeros((most, head_dim // 2), np.float32),
                         "out": xp.full(self.tensors["q"].shape, np.nan, np.float32)}
        self.positions = xp.asarray(np.concatenate([np.arange(past, past + n) for past, n in zip(lengths, new)]))
        self.about = dict(num_heads=heads, kv_heads=kv_heads, head_dim=head_dim, rotary_dim=head_dim, scale=head_dim ** -0.5)
        self.max_pages = self.cache.tables.shape[2]

    def run(self, policy, correction="none", assets=None):
        """-> of each sequence that has lists, what it reads of KV heads (PrefillPlan); out; pairs that are read and all of them."""
        from edgeattn.kernels_cuda import cached_attention, device, steps
        xp, blocks, pages = device.cupy(), 0, 0
        room = min(policy.single_keys(assets, self.heads // self.kv_heads), self.max_pages * PAGE)
        chunks, addresses = np.zeros((len(self.new), 3), np.int64), np.zeros(len(self.new), np.int64)
        each = list_ints(self.kv_heads, self.max_pages, room)
        lists = xp.full(most_blocks(sum(self.new)) * each, -7, np.int32)
        for s in self.listed:
            chunks[s], addresses[s] = (blocks, pages, LAST * self.whole), lists.data.ptr + 4 * blocks * each
            blocks, pages = blocks - -self.new[s] // QUERIES, pages - -(self.lengths[s] + self.new[s]) // PAGE
        stats, held = xp.zeros((1, 2), np.int64), [xp.asarray(chunks), xp.asarray(addresses)]
        fitted = {f"prefill.{name}": xp.asarray(x) for name, x in (assets or {}).items()}
        extra = {"batch.chunks": held[0].data.ptr, "batch.prefill_lists": held[1].data.ptr, "prefill.stats": stats.data.ptr,
                 "batch.positions": self.positions.data.ptr, "prefill.correction": CORRECTIONS[correction]}
        extra |= {name: x.data.ptr for name, x in fitted.items()}
        own = {"pages": max(pages, self.max_pages), "columns": room}
        launches, bucket = [], self.cache.bucket
        self.cache.bucket = lambda: bucket() | {"listed": True}
        for name, attributes in policy.operators():
            kernel = import_module(f"edgeattn.kernels_cuda.{name}")
            launches += self.cache.launches(kernel, self.tensors, self.about | attributes | own, extra)
        launches += self.cache.launches(cached_attention, self.tensors, self.about, extra)
        self.cache.bucket = bucket
        steps.run(launches)
        xp.cuda.get_current_stream().synchronize()
        found, lists = {}, lists.get()
        for s in self.listed:
            own, count = lists[(addresses[s] - lists_start(addresses, self.listed)) // 4:], -(-self.new[s] // QUERIES)
            m = self.lengths[s] + self.new[s]
            blocks, columns = (np.zeros((self.kv_heads * count, size), bool) for size in (-(-m // PAGE), m))
            for row, about in enumerate(own[:LIST_ROW * self.kv_heads * count].reshape(-1, LIST_ROW)):
                for marks, (begin, size) in zip((blocks[row], columns[row]), about.reshape(2, 2)):
                    numbers = own[begin:begin + size]
                    assert (np.diff(numbers) > 0).all()
                    marks[numbers] = True
            blocks, columns = (x.reshape(self.kv_heads, count, -1) for x in (blocks, columns))
            found[s] = PrefillPlan(blocks, columns if room else None, self.new[s], m)
        return found, self.tensors["out"].get(), stats.get()[0]

    def lines(self, policy):
        """What choose_by_lines has found of each sequence that has lists: (verticals, slashes) [kv_heads, tokens] bool."""
        from edgeattn.kernels_cuda import choose_by_lines
        pages = max(sum(-(-(self.lengths[s] + self.new[s]) // PAGE) for s in self.listed), self.max_pages)
        places = choose_by_lines.offsets(self.heads, self.kv_heads, self.head_dim, most_blocks(sum(self.new)), pages)
        scratch, first, found = self.cache._held[f"{places[-1]} bytes"].get(), 0, {}
        for s in self.listed:
            m, bits = self.lengths[s] + self.new[s], []
            for offset in places[3:5]:
                words = scratch[offset:offset + 4 * self.kv_heads * pages].reshape(self.kv_heads, -1)
                bits.append(np.unpackbits(words[:, 4 * first:], axis=1, bitorder="little")[:, :m].astype(bool))
            found[s], first = bits, first - -m // PAGE
        return found

    def close(self, s, out, plan, scale, correction="none"):
        """The relative error of a sequence's outputs."""
        k, v = self.keys(s)
        expected = attend(self.q[s].astype(np.float64), k, v, plan, scale)
        if correction == "delta":
            expected = delta(*expected, self.q[s], k, v, scale)
        return np.linalg.norm(self.rows(s, out) - expected[0]) / np.linalg.norm(expected[0])

    def keys(self, s):
        return self.cache.read(s)

    def rows(self, s, out):
        first = sum(self.new[:s])
        return out[first:first + self.new[s]].reshape(self.new[s], self.heads, -1).swapaxes(0, 1)


def pairs_of(plan):
    return plan.density() * len(plan.blocks) * (plan.queries * (plan.keys - plan.queries) + plan.queries * (plan.queries + 1) // 2)


def lists_start(addresses, listed):
    return addresses[listed[0]]
