"""Page tables: references, copy-on-write, limits."""
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from edgeattn.cache.kv_cache import KVCache, Sequence
from edgeattn.cache.pages import CacheFull


def small(tokens=256, kv_type="f32"):
    return KVCache(layers=2, kv_heads=1, head_dim=4, tokens=tokens, kv_type=kv_type, page_size=16)


def test_fork_copies_only_the_page_it_writes():
    cache = small()
    a = Sequence()
    cache.append(a, 20)
    cache.k[:, a.pages[1]] = 7
    b = cache.fork(a)
    assert cache.pool.used == 2
    cache.append(b, 1)
    assert a.pages[0] == b.pages[0] and a.pages[1] != b.pages[1] and cache.pool.used == 3
    assert (cache.k[:, b.pages[1]] == 7).all()
    cache.append(a, 1)  # its last page is no longer shared: written in place
    assert cache.pool.used == 3


def test_full_cache_says_so_and_changes_nothing():
    cache = small(tokens=32)
    a = Sequence()
    cache.append(a, 30)
    with pytest.raises(CacheFull, match="--ctx-size"):
        cache.append(a, 3)
    assert a.length == 30 and len(a.pages) == 2 and cache.pool.free == 0


def test_forgotten_sequences_give_their_pages_back():
    cache = small()
    a = cache.new_sequence()
    cache.append(a, 20)
    b = cache.fork(a)
    cache.append(b, 20)
    assert cache.pool.used == 4  # one shared, a's last, b's copy of it, b's next
    del a
    assert cache.pool.used == 3
    cache.truncate(b, 0)
    del b
    assert cache.pool.used == 0 and not cache.pool.references.any()


def test_unknown_kv_type_is_named():
    with pytest.raises(ValueError, match="int1"):
        small(kv_type="int1")


class Sharing(RuleBasedStateMachine):
    """Random appends, forks, truncations and frees: every page's references equal its holders, and contents never leak."""

    def __init__(self):
        super().__init__()
        self.cache, self.held, self.next = small(tokens=320), [], 1.0

    def _write(self, sequence, slots, values):
        for slot, value in zip(slots, values):
            page, offset = divmod(int(slot), self.cache.page_size)
            assert self.cache.pool.references[page] == 1
            self.cache.k[:, page, :, :, offset] = value
            self.cache.v[:, page, :, offset, :] = value

    @rule()
    def new(self):
        if len(self.held) < 6:
            self.held.append((Sequence(), []))

    @precondition(lambda self: self.held)
    @rule(i=st.integers(0, 5), count=st.integers(1, 40))
    def append(self, i, count):
        sequence, expected = self.held[i % len(self.held)]
        try:
            slots = self.cache.append(sequence, count)
        except CacheFull:
            return
        values = [self.next + j for j in range(count)]
        self.next += count
        self._write(sequence, slots, values)
        expected += values

    @precondition(lambda self: self.held)
    @rule(i=st.integers(0, 5))
    def fork(self, i):
        if len(self.held) < 6:
            sequence, expected = self.held[i % len(self.held)]
            self.held.append((self.cache.fork(sequence), list(expected)))

    @precondition(lambda self: self.held)
    @rule(i=st.integers(0, 5), keep=st.floats(0, 1))
    def truncate(self, i, keep):
        sequence, expected = self.held[i % len(self.held)]
        length = int(keep * sequence.length)
        self.cache.truncate(sequence, length)
        del expected[length:]

    @precondition(lambda self: self.held)
    @rule(i=st.integers(0, 5))
    def free(self, i):
        sequence, _ = self.held.pop(i % len(self.held))
        self.cache.truncate(sequence, 0)

    @invariant()
    def references_match_holders(self):
        holders = np.zeros_like(self.cache.pool.references)
        for sequence, _ in self.held:
            np.add.at(holders, sequence.pages, 1)
        np.testing.assert_array_equal(holders, self.cache.pool.references)
        assert self.cache.pool.used == np.count_nonzero(holders)

    @invariant()
    def contents_are_each_sequence_s_own(self):
        for sequence, expected in self.held:
            k, v = self.cache.read(sequence, 1)
            np.testing.assert_array_equal(k[0, :, 0], expected)
            np.testing.assert_array_equal(v[0, :, 3], expected)


TestSharing = Sharing.TestCase
