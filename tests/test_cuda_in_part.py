"""Decode on a GPU that reads pages in part, against float64: values of some pages alone, the upper four bits of keys alone."""
import numpy as np
import pytest
from cuda_device import needs_cuda
from test_cuda_attention import Case

from edgeattn.page_formats import PAGE
from edgeattn.reference.cached_attention import rotate

pytestmark = needs_cuda
CERTAIN = np.float32(0.25)


class InPart(Case):
    """A decode step of sequences; `dense` ones have no thresholds, in `certain` [sequences, kv_heads] the step before was."""

    def __init__(self, types, head_dim, group, lengths, *, dense=(), certain=None, dropped=False, **form):
        from edgeattn.kernels_cuda import device
        super().__init__(types, head_dim, group, lengths, [1] * len(lengths), **form)
        self.xp, shape = device.cupy(), (len(lengths), self.cache.kv_heads)
        self.certain, self.dense, self.extra = certain, dense, {}
        self.confidence = self.xp.asarray(np.where(certain, CERTAIN, 0.1 * CERTAIN).astype(np.float32) if certain is not None else
                                          np.zeros(shape, np.float32))
        self.sums = self.xp.zeros((*shape, 2 + head_dim), np.float32)
        if certain is not None:
            self.extra |= {"batch.confidence": self.addresses(self.confidence), "cache.progressive": int(CERTAIN.view(np.int32))}
        if dropped:
            self.means = self.rng.standard_normal((*shape, 1 + 2 * head_dim)).astype(np.float32)
            self.means[..., 0] = [[0, 40]] + [[5, 0]] * (shape[0] - 1)
            self.held = self.xp.asarray(self.means)
            self.extra["batch.compensation"] = self.addresses(self.held)

    def addresses(self, array, without=()):
        found = self.xp.asarray([0 if i in without else row.data.ptr for i, row in enumerate(array)], np.int64)
        self.extra[f"kept {len(self.extra)}"] = found
        return found.data.ptr

    def scores(self, s):
        """[kv_heads, group, slots]"""
        about, (k, _) = self.about, self.cache.read(s)
        at = self.positions[s:s + 1]
        q = rotate(self.q[s].reshape(1, about["num_heads"], -1), self.cos[at], self.sin[at])[0].astype(np.float64)
        scores = np.einsum("hgd,hsd->hgs", q.reshape(len(k), -1, q.shape[1]), k.astype(np.float64)) * about["scale"]
        return np.where(np.repeat(self.cache.entries[s] < 0, PAGE, 1)[:, None, :k.shape[1]], -np.inf, scores)

    def tops(self, s):
        """[kv_heads, group, pages]: the best score of each page."""
        found = self.scores(s)
        found = np.pad(found, ((0, 0), (0, 0), (0, -found.shape[2] % PAGE)), constant_values=-np.inf)
        return found.reshape(*found.shape[:2], -1, PAGE).max(-1)

    def choose(self, part, beta):
        """Thresholds that let about `part` of the pages pass, each in a gap between what pages have."""
        curves = np.zeros((self.about["num_heads"], 2), np.float32)
        tops = [self.tops(s) - beta * np.log(n) for s, n in enumerate(self.cache.lengths)]
        for h, curve in enumerate(curves):
            found = np.sort(np.concatenate([x.reshape(len(curves), -1)[h] for x in tops]))
            found = found[np.isfinite(found)][int((1 - part) * len(found)):]
            gap = np.diff(found[:5]).argmax() if len(found) > 1 else 0
            curve[:] = found[gap:gap + 2].mean(), beta
        self.curves = curves

    def passing(self, s, size):
        """[kv_heads, pages] bool, of ranges of `size` pages, 16 at a time: those with a score above a threshold, or the best so far."""
        tops = self.tops(s)
        curves = self.curves.reshape(*tops.shape[:2], 2).astype(np.float64)
        limits = curves[..., 0] + curves[..., 1] * np.log(self.cache.lengths[s])
        kept = (tops >= limits[..., None]).any(1)
        for first in range(0, tops.shape[2], size):
            peak = np.full(tops.shape[:2], -np.inf)
            for start in range(first, min(first + size, tops.shape[2]), 16):
                some = tops[..., start:min(start + 16, first + size)]
                for h, g in np.argwhere(some.max(-1) > peak):
                    kept[h, start + some[h, g].argmax()] = True
                peak = np.maximum(peak, some.max(-1))
        return kept

    def run(self, thresholds=True, means=True):
        from edgeattn.kernels_cuda import attention_in_part, cached_attention
        from edgeattn.kernels_cuda.attention_call import ranges_of
        extra = {name: x for name, x in self.extra.items() if isinstance(x, int)}
        if thresholds:
            self.curves_there = self.xp.asarray(self.curves)
            extra |= {"selection.thresholds": self.curves_there.data.ptr, "batch.value_sums": self.addresses(self.sums) if means else 0,
                      "batch.selections": self.addresses(self.sums, self.dense)}
        bucket = self.cache.bucket
        self.cache.bucket = lambda: bucket() | {"sparse": True}
        out = cached_attention.attend(self.cache, self.q, self.k, self.v, self.cos, self.sin, self.positions, **self.about, extra=extra)
        self.cache.bucket = bucket
        self.ranges = ranges_of(len(self.new) * self.cache.kv_heads, max(self.cache.lengths))
        assert attention_in_part.CHUNK == 16
        return out.reshape(len(self.new), self.cache.kv_heads, -1, self.about["head_dim"])

    def check(self, part=None, beta=0.0, means=True):
        """part: of the pages that thresholds let pass; None: there are none. -> the part whose values are not read"""
        if self.certain is not None:
            read = self.cache.read
            self.cache.read = lambda s: (self.coarse(s, read(s)[0]), read(s)[1])
        if part is not None:
            self.choose(part, beta)  # before the newest token is there
        out, left_out, sums = self.run(part is not None, means), [], self.sums.get()
        for s, (weights, v) in enumerate(self.weights()):
            weights, pages = weights[:, :, 0], -(-self.cache.lengths[s] // PAGE)
            kept = np.ones((len(v), pages), bool)
            if part is not None and s not in self.dense:
                kept = self.passing(s, max(-(-pages // self.ranges), 16))
            tokens = np.repeat(kept, PAGE, 1)[:, :self.cache.lengths[s]]
            tokens = np.pad(tokens, ((0, 0), (0, self.means is not None)), constant_values=True)
            left = np.where(tokens[:, None], weights, 0)
            expected, values = left @ v, self.cache.read(s)[1]
            if means:
                there = np.repeat(self.cache.entries[s] >= 0, PAGE, 1)[:, :values.shape[1], None]
                mean = (values * there).sum(1) / there.sum(1)
                expected = expected + (weights - left).sum(-1, keepdims=True) * mean[:, None]
                for h in np.flatnonzero(~kept.all(1)):
                    assert (sums[s, h, :2] == (values.shape[1], there[h].sum())).all()
                    np.testing.assert_allclose(sums[s, h, 2:], (values[h] * there[h]).sum(0), rtol=0, atol=1e-3)
            np.testing.assert_allclose(out[s], expected, rtol=0, atol=1e-4)
            if self.certain is not None:
                np.testing.assert_allclose(self.confidence.get()[s], weights[..., :values.shape[1]].max(-1).min(-1), rtol=1e-3)
            left_out.append(1 - kept.mean())
        return left_out

    def coarse(self, s, keys):
        """Keys of sealed pages of heads in which the step before was certain: the upper four bits of their codes, and the mean of the
        others."""
        pool, keys = self.cache.pools[1], keys.copy()
        params = pool.k_params.get().view(np.float16).astype(np.float32)
        for h, page in np.argwhere(self.cache.entries[s] % 4 == 1):
            if self.certain[s, h]:
                own, width = params[self.cache.entries[s, h, page] // 4], self.cache.head_dim
                if pool.format.k_axis == "token":
                    own = own.reshape(-1, 2, PAGE)
                    low, step = (np.repeat(own[:, i].T, -(-width // len(own)) if len(own) == 1 else 32, 1)[:, :width] for i in (0, 1))
                else:
                    low, step = own[:width], own[width:2 * width]
                part = keys[h, page * PAGE:(page + 1) * PAGE]
                part[:] = low + step * (np.rint((part - low) / step) // 16 * 16 + 7.5)
        return keys


LENGTHS = [0, 200, 480, 1300]


@pytest.mark.parametrize("types, head_dim, form", [("f16", 64, {}), ("int4", 128, {}), ("int8/int3", 80, {}), ("f32", 48, {}),
                                                   ("int2/int4", 256, dict(separated=True)), ("int3/int8", 64, dict(k_axis="token"))])
@pytest.mark.parametrize("means", [True, False])
def test_values_of_pages_below_thresholds_are_left_out(types, head_dim, form, means):
    case = InPart(types, head_dim, int(np.random.default_rng().integers(1, 9)), LENGTHS, dense=[1], dropped=types == "f16", **form)
    if types == "int4":
        case.cache.entries[3, :, [4, 17]] = -1
        case.cache.tables.set(case.cache.entries)
    found = case.check(0.2, beta=0.3, means=means)
    print(found)
    assert found[1] == 0 < max(found[2], found[3])


def test_sums_of_values_go_on_where_they_were():
    case = InPart("f16", 64, 3, [300, 90])
    sums = case.sums.get()
    for s, n in ((0, 77), (1, 64)):
        sums[s, :, :2], sums[s, :, 2:] = n, case.cache.read(s)[1][:, :n].sum(1)
    case.sums.set(sums)
    assert max(case.check(0.1)) > 0


@pytest.mark.parametrize("types, head_dim, form", [("int8", 64, {}), ("int8/int4", 128, dict(window=170)), ("int8/f16", 80, {}),
                                                   ("int8", 128, dict(k_axis="token"))])
def test_keys_are_read_coarsely_where_the_step_before_was_certain(types, head_dim, form):
    certain = np.array([[False, True], [True, False], [True, True]])
    case = InPart(types, head_dim, int(np.random.default_rng().integers(1, 9)), [40, 300, 700], certain=certain,
                  dropped=head_dim == 80, **form)
    case.check()


def test_both_at_once():
    assert max(InPart("int8", 64, 4, [250, 500], certain=np.eye(2, dtype=bool)).check(0.2)) > 0
