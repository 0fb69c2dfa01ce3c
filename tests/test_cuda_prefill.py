"""What kernels choose for prompts against the policies in NumPy, on keys as the pages hold them, and attention over what was chosen."""
import numpy as np
import pytest
from cuda_device import needs_cuda
from prefill_driver import structured

from edgeattn.kernels_cuda.prefill_call import LIST_ROW, QUERIES, most_blocks
from edgeattn.page_formats import PAGE, PageFormat
from edgeattn.policies import load_policy
from edgeattn.prefill_plan import PrefillPlan, attend, causal

pytestmark = needs_cuda
RNG = np.random.default_rng()
LAST = 2
METHODS = {"auto": ("auto", {"budget": 256, "least": 64, "fraction": 0.2, "recent": 3}, 0.01),
           "strides of 8": ("xattention", {"tau": 0.6}, 0.02), "strides of 16": ("xattention", {"tau": 0.5, "stride": 16}, 0.02),
           "strides of 32": ("xattention", {"tau": 0.4, "stride": 32, "recent": 1}, 0.02),
           "scan": ("sale", {"threshold": 0.05, "bits": 8}, 0.02)}  # policy, options, part of the pages that may differ


class Prompts:
    """Sequences with `lengths` cached tokens get `new` ones; all whose new tokens are `listed` read what is chosen."""

    def __init__(self, types, heads, kv_heads, head_dim, lengths, new, listed, whole):
        from edgeattn.kernels_cuda import device
        from edgeattn.kernels_cuda.paged_cache import PagedCache
        xp, self.listed, self.whole = device.cupy(), listed, whole
        floats = "f32" if types == "f32" else "f16"
        formats = [PageFormat(head_dim, floats, floats)] + ([] if types == floats else [PageFormat(head_dim, types, types)])
        self.cache, self.heads, self.kv_heads, self.head_dim = PagedCache(formats, kv_heads, lengths, new), heads, kv_heads, head_dim
        self.lengths, self.new, found = lengths, new, []
        for s, (past, n) in enumerate(zip(lengths, new)):
            q, k, v = structured(RNG, heads, kv_heads, past + n, head_dim)
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

    def run(self, policy):
        """-> of each sequence that has lists, pages [kv_heads, query blocks, pages] bool; out."""
        from importlib import import_module
        from edgeattn.kernels_cuda import cached_attention, device, steps
        xp, blocks, pages = device.cupy(), 0, 0
        chunks, addresses, each = np.zeros((len(self.new), 3), np.int64), np.zeros(len(self.new), np.int64), \
            self.kv_heads * (LIST_ROW + self.max_pages)
        lists = xp.full(most_blocks(sum(self.new)) * each, -7, np.int32)
        for s in self.listed:
            chunks[s], addresses[s] = (blocks, pages, LAST * self.whole), lists.data.ptr + 4 * blocks * each
            blocks, pages = blocks - -self.new[s] // QUERIES, pages - -(self.lengths[s] + self.new[s]) // PAGE
        stats, held = xp.zeros((1, 2), np.int64), [xp.asarray(chunks), xp.asarray(addresses)]
        extra = {"batch.chunks": held[0].data.ptr, "batch.prefill_lists": held[1].data.ptr, "prefill.stats": stats.data.ptr,
                 "batch.positions": self.positions.data.ptr}
        launches, bucket = [], self.cache.bucket
        self.cache.bucket = lambda: bucket() | {"listed": True}
        for name, attributes in policy.operators():
            kernel = import_module(f"edgeattn.kernels_cuda.{name}")
            launches += self.cache.launches(kernel, self.tensors, self.about | attributes | {"pages": max(pages, self.max_pages)}, extra)
        launches += self.cache.launches(cached_attention, self.tensors, self.about, extra)
        self.cache.bucket = bucket
        steps.run(launches)
        xp.cuda.get_current_stream().synchronize()
        found, lists = {}, lists.get()
        for s in self.listed:
            own, count = lists[(addresses[s] - lists_start(addresses, self.listed)) // 4:], -(-self.new[s] // QUERIES)
            found[s] = np.zeros((self.kv_heads, count, -(-(self.lengths[s] + self.new[s]) // PAGE)), bool)
            for row, (begin, size, _, columns) in enumerate(own[:LIST_ROW * self.kv_heads * count].reshape(-1, LIST_ROW)):
                numbers = own[begin:begin + size]
                assert columns == 0 and (np.diff(numbers) > 0).all()
                found[s].reshape(self.kv_heads * count, -1)[row, numbers] = True
        return found, self.tensors["out"].get(), stats.get()[0]

    def keys(self, s):
        return self.cache.read(s)

    def rows(self, s, out):
        first = sum(self.new[:s])
        return out[first:first + self.new[s]].reshape(self.new[s], self.heads, -1).swapaxes(0, 1)


def lists_start(addresses, listed):
    return addresses[listed[0]]


SHAPES = [((8, 2, 64), [500], [200], [0]), ((8, 2, 128), [1003], [130], [0]), ((7, 1, 64), [0, 700, 37], [300, 129, 1], [0, 1]),
          ((4, 4, 128), [640, 96, 900], [64, 70, 100], [0, 2]), ((3, 1, 80), [450], [70], [0])]


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("types", ["f16", "int4", "int8"])
@pytest.mark.parametrize("shape, lengths, new, listed", SHAPES)
@pytest.mark.parametrize("method", METHODS)
def test_lists_are_what_the_policy_chooses(method, shape, lengths, new, listed, types, whole):
    name, options, tolerance = METHODS[method]
    policy, scale = load_policy("prefill", name, options), shape[2] ** -0.5
    if name != "auto" and shape[2] not in (64, 128):
        with pytest.raises(ValueError, match="choose another"):
            Prompts(types, *shape, lengths, new, listed, whole).run(policy)
        return
    prompts = Prompts(types, *shape, lengths, new, listed, whole)
    found, out, (read, pairs) = prompts.run(policy)
    total = 0
    for s, n in enumerate(new):
        k, v = prompts.keys(s)
        m = lengths[s] + n
        plan = PrefillPlan(np.ones((1, -(-n // QUERIES), -(-m // PAGE)), bool), None, n, m)
        if s in listed:
            expected = policy.select(prompts.q[s], list(k), scale).union(shape[1]).blocks
            if whole:
                expected[:, -LAST:] = causal(n, m)[-LAST:]
            differ = (found[s] != expected).mean()
            assert found[s].sum(2).min() > 0 and differ < tolerance, f"{100 * differ:.2f} % of the pages differ"
            plan = PrefillPlan(found[s], None, n, m)
            total += plan.density() * len(found[s]) * (n * (m - n) + n * (n + 1) // 2)
        close, _ = attend(prompts.q[s].astype(np.float64), k, v, plan, scale)
        error = np.linalg.norm(prompts.rows(s, out) - close) / np.linalg.norm(close)
        assert error < 4e-3, f"relative error {error:.1e}"
    assert abs(read - total) < 0.5 and pairs == sum(shape[1] * (n * past + n * (n + 1) // 2) for s, (past, n) in
                                                   enumerate(zip(lengths, new)) if s in listed)


def test_everything_is_read_where_the_policy_says_so():
    prompts = Prompts("f16", 8, 2, 64, [700], [150], [0], False)
    found, _, (read, pairs) = prompts.run(load_policy("prefill", "auto", {"part": 1.0, "fraction": 1.0}))
    np.testing.assert_array_equal(found[0], np.broadcast_to(causal(150, 850), found[0].shape))
    assert read == pairs


@pytest.mark.parametrize("kind, head_dim", [("f16", 64), ("f16", 80), ("f32", 128)])
def test_tokens_move_to_earlier_slots(kind, head_dim):
    """As after an eviction, several KV heads at once: what HostPages.move does."""
    from edgeattn.cache.pages import HostPages
    from edgeattn.kernels_cuda import device, move_tokens
    from edgeattn.kernels_cuda.page_pool import Pages
    xp, page_format = device.cupy(), PageFormat(head_dim, kind, kind)
    pages, host, numbers, parts = Pages(page_format, 60), HostPages(page_format, 60), RNG.permutation(60), []
    for array, copy in zip(pages.arrays().values(), host.arrays().values()):
        copy[:] = RNG.integers(0, 256, copy.shape)
        array[:] = xp.asarray(copy)
    for count in (20, 1, 7, 30):
        own, numbers = numbers[:count], numbers[count:]
        keep = np.sort(RNG.permutation(PAGE * count)[:RNG.integers(1, PAGE * count)])
        places = [own[slots // PAGE] * PAGE + slots % PAGE for slots in (keep, np.arange(len(keep)))]
        parts.append([x[keep != np.arange(len(keep))] for x in places])
    move_tokens.run(pages, parts)
    host.move(parts)
    for array, copy in zip(pages.arrays().values(), host.arrays().values()):
        np.testing.assert_array_equal(array.get(), copy)
