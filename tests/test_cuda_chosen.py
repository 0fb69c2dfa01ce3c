"""Choosing pages and attending to them as one launch, against the two launches on the same inputs: lists, headers, counters, results."""
import numpy as np
import pytest
from cuda_device import needs_cuda
from test_cuda_attention import HALVES, Case

pytestmark = needs_cuda
QUEST = dict(score="bound", combine="head", budget=256, fraction=0.0, recent=5, reach=1.0, reuse=0.0, block=1)


class Both:
    """The steps of a decode case, one token of each sequence, by two launches and by one."""

    def __init__(self, types, head_dim, group, lengths, *, new=None, capacity=40, shares=None, dense=(), **options):
        from edgeattn.backend_cuda import Step
        from edgeattn.kernels_cuda import cached_attention, device, select_pages
        from edgeattn.kernels_cuda.fused_steps import fuse
        self.xp, self.case = device.cupy(), Case(types, head_dim, group, lengths, new or [1] * len(lengths), capacity=capacity)
        case, xp = self.case, self.xp
        self.cache, self.kv_heads = case.cache, case.about["kv_heads"]
        self.tensors = {n: xp.asarray(x) for n, x in dict(q=case.q, k=case.k, v=case.v, cos=case.cos, sin=case.sin).items()}
        self.tensors["out"], self.positions = xp.zeros(case.q.shape, np.float32), xp.asarray(case.positions)
        self.shares = xp.asarray(np.ones((1, self.kv_heads)) if shares is None else [shares], np.float32)
        self.stats = xp.zeros(5, np.int64)
        rows = [0 if s in dense else self.cache.selection[s].data.ptr for s in range(len(lengths))]
        self.held = xp.asarray(rows, np.int64)
        extra = {"batch.positions": self.positions.data.ptr, "selection.shares": self.shares.data.ptr, "selection.components": 0,
                 "batch.selections": self.held.data.ptr, "selection.stats": self.stats.data.ptr}
        inputs = {n: self.tensors[n] for n in ("q", "cos", "sin")}
        self.steps = [Step(kernel.__name__, kernel.__name__.rsplit(".", 1)[1], kernel, self.cache.arguments(kernel, given, about, extra), 0)
                      for kernel, given, about in ((select_pages, inputs, case.about | QUEST | options),
                                                   (cached_attention, self.tensors, case.about))]
        self.most = self.cache.bucket() | {"sparse": True}
        self.one = fuse(self.steps, self.most)

    def result(self, some):
        """(out, lists with their headers, counters) of a step from the present state."""
        from edgeattn.kernels_cuda import steps
        before = self.cache.selection.get().copy(), self.stats.get().copy()
        self.tensors["out"].fill(np.nan)
        steps.run([launch for step in some for launch in step.kernel.launches(step.arguments, self.most)])
        self.xp.cuda.Device().synchronize()
        found = tuple(x.get().copy() for x in (self.tensors["out"], self.cache.selection, self.stats))
        self.cache.selection.set(before[0]), self.stats.set(before[1])
        return found

    def step(self):
        """Both ways from the present state, which they must change alike, but for a page of one head whose score is another's but for
        rounding; -> headers and counters."""
        assert len(self.one) == 1
        two, one = self.result(self.steps), self.result(self.one)
        apart = [place for place in np.ndindex(two[1].shape[:-1]) if (one[1][place] != two[1][place]).any()]
        assert len(apart) <= 1, apart
        np.testing.assert_array_equal(one[2], two[2])
        for s, _, head in apart:
            got, expected = (x[1][s, 0, head] for x in (one, two))
            np.testing.assert_array_equal(got[:4], expected[:4])
            assert len(set(got[4:]) ^ set(expected[4:])) == 2 and (np.diff(got[4:4 + got[0]]) > 0).all()
            two[0].reshape(len(two[0]), self.kv_heads, -1)[s, head] = one[0].reshape(len(one[0]), self.kv_heads, -1)[s, head]
        np.testing.assert_allclose(one[0], two[0], rtol=0, atol=2 * HALVES)
        self.cache.selection.set(one[1]), self.stats.set(one[2])
        return one[1][:, 0, :, :4], one[2]

    def next(self, mixed=0.5):
        """A token later, with queries that resemble the last ones."""
        q, rng = self.tensors["q"], self.case.rng
        q.set(((1 - mixed) * q.get() + mixed * rng.standard_normal(q.shape)).astype(np.float32))
        self.cache.slot_counts.set(self.cache.slot_counts.get() + 1)
        self.positions.set(self.positions.get() + 1)

    def back(self, tokens):
        self.cache.slot_counts.set(self.cache.slot_counts.get() - tokens)
        self.positions.set(self.positions.get() - tokens)


def shape(monkeypatch, blocks):
    from edgeattn.kernels_cuda import attention_call, chosen_attention, exchange
    monkeypatch.setattr(chosen_attention, "blocks_of", lambda places: blocks)
    for module in (attention_call, chosen_attention, exchange):  # scratch memory too is for as many as these hold
        monkeypatch.setattr(module, "processors", lambda: 64)


@pytest.mark.parametrize("types, head_dim, group", [("int4", 128, 4), ("int4", 64, 8), ("int8", 64, 3), ("int3/int8", 128, 1)])
def test_one_launch_does_what_two_do(monkeypatch, types, head_dim, group):
    """Sequences of many lengths, one of which reads everything because it may, and others because they are short."""
    shape(monkeypatch, 4)
    both = Both(types, head_dim, group, [3000, 100, 1500, 2000, 0], dense=[3])
    headers, stats = both.step()
    assert (headers[[0, 2], :, 0] > 0).all() and stats[0] == 4 and stats[1] == 4


@pytest.mark.parametrize("blocks", [2, 8, 16])
def test_any_number_of_blocks(monkeypatch, blocks):
    shape(monkeypatch, blocks)
    both = Both("int4", 128, 4, [2500])
    both.step(), both.step()


def test_beside_prompts(monkeypatch):
    """One of them begins, one goes on; they read everything."""
    shape(monkeypatch, 4)
    headers, _ = Both("int4", 64, 4, [1300, 0, 900, 700], new=[1, 40, 1, 3], dense=[1, 3]).step()
    assert (headers[[0, 2], :, 0] > 0).all()


def test_nothing_is_left_to_choose(monkeypatch):
    """All pages that scores would decide about are released."""
    shape(monkeypatch, 4)
    both = Both("int4", 64, 4, [1500])
    both.cache.entries[0, :, 1:40] = -1
    both.cache.tables.set(both.cache.entries)
    both.step()


def test_many_pages(monkeypatch):
    """Of which a warp scores several tiles, and more are wanted than a block has threads."""
    shape(monkeypatch, 2)
    Both("int4", 64, 4, [27000], budget=1000, capacity=40).step()
    Both("int4", 64, 4, [12000], budget=9000, capacity=300).step()


@pytest.mark.parametrize("options, shares, capacity", [
    (dict(budget=64, recent=1), None, 40), (dict(budget=2000), None, 80), (dict(fraction=0.3), [0.5, 2.0], 90), ({}, [-1.0, 1.0], 40),
    (dict(block=4, recent=8), None, 40), (dict(reach=0.25), None, 40), (dict(budget=512), None, 10)])
def test_budgets_and_shares(monkeypatch, options, shares, capacity):
    shape(monkeypatch, 4)
    Both("int4", 64, 4, [2900, 700], shares=shares, capacity=capacity, **options).step()


@pytest.mark.parametrize("reuse", [0.0, 0.5])
def test_lists_serve_again(monkeypatch, reuse):
    """Over steps in which pages are begun."""
    shape(monkeypatch, 4)
    both = Both("int4", 64, 2, [1290, 995], reuse=reuse)
    both.back(14)
    seen = []
    for _ in range(15):
        headers, stats = both.step()
        seen.append(headers[..., 3].max())
        both.next(0.1)
    assert (max(seen) > 2 and stats[4] > 5) if reuse else (max(seen) == 1 and stats[4] == 0)


@pytest.mark.parametrize("kind", ["equal", "few", "outlier", "released"])
def test_scores_that_are_hard_to_part(monkeypatch, kind):
    """Pages that score alike, one that scores far more than all others, and pages that are not there."""
    shape(monkeypatch, 4)
    both = Both("int4", 64, 4, [12000 if kind == "equal" else 4000], budget=1000, capacity=60)
    params = both.cache.pools[1].k_params.view(np.float16)
    entries = both.cache.entries
    if kind == "equal":
        params[:] = params[3]
    elif kind == "few":
        params[:] = params[np.random.default_rng().integers(0, 3, len(params))]
    elif kind == "outlier":
        params[entries[0, :, 50] // 4, :64] = 30000
    else:
        entries[0, :, 5:110] = -1
        both.cache.tables.set(entries)
    both.step()


def test_what_stays_two_launches(monkeypatch):
    from edgeattn.kernels_cuda.fused_steps import fuse
    shape(monkeypatch, 4)
    for options in (dict(score="recency"), dict(combine="layer"), dict(reach=20.0)):
        assert len(Both("int4", 64, 2, [900], **options).one) == 2
    assert len(Both("f16", 64, 2, [900]).one) == 2
    both = Both("int4", 64, 2, [900])
    assert len(fuse(both.steps, both.most | {"sparse": False})) == 2 and len(both.one) == 1
    monkeypatch.setattr("edgeattn.kernels_cuda.chosen_attention.processors", lambda: 1)
    assert len(fuse(both.steps, both.most)) == 2
