"""Drop tokens where a KV head holds more than its limit: token by token in pages of floats, page by page in quantised ones."""
from functools import cached_property

import numpy as np

from edgeattn.cache.layer_budget import share_limits
from edgeattn.cache.sealing import moved_tokens
from edgeattn.kernels_cpu.page_pool import RELEASED
from edgeattn.page_formats import PAGE


class Heads:
    """KV heads of one layer with the same number of slots, as eviction policies see them (policies/eviction: HeadView)."""

    def __init__(self, cache, sequence, layer, heads, carry):
        self.carry = carry
        self._cache, self._sequence, self.layer, self.heads, self.length = cache, sequence, int(layer), heads, sequence.length
        self.slots = int(sequence.counts[layer, heads[0]])
        self.positions = sequence.positions[layer, heads, :self.slots].astype(np.int32)
        self.mass = self.seen = np.zeros((len(heads), self.slots), np.float32)
        if sequence.mass is not None:
            planes = sequence.mass[:, layer, heads, :self.slots]
            self.mass, self.seen = (planes[-1], self.seen) if cache.eviction and cache.eviction.mass == "last" else planes[:2]

    def kept_below(self):
        if not self.layer:
            return None
        kept, layer = np.zeros(self.length, bool), self.layer - 1
        for head, count in enumerate(self._sequence.counts[layer]):
            kept[self._sequence.positions[layer, head, :count]] = True
        return kept

    @cached_property
    def _floats(self):
        pages = -(-self.slots // PAGE)
        entries = self._sequence.tables[self.layer, self.heads, :pages].ravel()
        k, v = self._cache.backend.floats(self._cache.table, self._cache.head_dim, entries)
        shape = (len(self.heads), pages * PAGE, self._cache.head_dim)
        return k.transpose(0, 2, 1).reshape(shape)[:, :self.slots], v.reshape(shape)[:, :self.slots]

    def keys(self):
        return self._floats[0]

    def values(self):
        return self._floats[1]


def evict(cache, sequence) -> None:
    """Bring every head that exceeds its limit under it, by at least a page, so that the next time is a page of tokens away."""
    sequence.fetch()
    if sequence.limits is not None and not sequence.limits.any():
        sequence.limits[:] = share_limits(cache, sequence)
    excess, carry, moves = np.maximum(0, sequence.counts - cache.limits(sequence)), {}, []
    if cache.plan.classes is not None:
        drop_oldest(cache, sequence, -(-np.where(cache.plan.classes, 0, excess) // PAGE))
        excess *= cache.plan.classes
    if excess.any():
        cache.own_floats(sequence)
    for layer in np.flatnonzero(excess.any(1)):
        members = np.flatnonzero(excess[layer])
        for count in np.unique(sequence.counts[layer, members]):
            alike = members[sequence.counts[layer, members] == count]
            together = cache.backend.scored_together(len(alike), int(count) * cache.head_dim)
            for heads in (alike[i:i + together] for i in range(0, len(alike), together)):
                view = Heads(cache, sequence, layer, heads, carry)
                scores = cache.backend.scored(cache.eviction.scores, view)
                moves += [_drop(cache, sequence, view, int(head), i, scores[i]) for i, head in enumerate(heads)]
    if moves:
        cache.pools[0].pages.move(moves)
    sequence.exact_from = sequence.length


def drop_oldest(cache, sequence, pages) -> None:
    """Drop the oldest full pages behind the first, pages[layer, kv_head] of each head. No token moves, so forks go on sharing the rest."""
    if sequence.compensation is not None:
        _compensate(cache, sequence, pages)
    for layer, head in np.argwhere(pages):
        n, table = int(pages[layer, head]), sequence.tables[layer, head]
        cache.release(table[1:1 + n])
        sequence.moved((layer, head), 1)
        table[1:-n], table[-n:] = table[1 + n:], RELEASED
        sequence.relisted(1)
        for plane in (sequence.positions, *(sequence.mass if sequence.mass is not None else ())):
            if plane is not None:
                plane[layer, head, PAGE:-n * PAGE] = plane[layer, head, (1 + n) * PAGE:]
    sequence.counts -= (PAGE * pages).astype(np.int32)
    sequence.sealed[:] = np.maximum(1, sequence.sealed - pages)


def _compensate(cache, sequence, pages):
    """Add the tokens of pages that go to the mean key and value that stand for them (RazorAttention). A layer's at once: a GPU is asked
    once, and what it reads stays small."""
    for layer in np.flatnonzero(pages.any(1)):
        heads = np.flatnonzero(pages[layer])
        means = cache.backend.page_means(cache.table, cache.head_dim, np.concatenate([
            sequence.tables[layer, head, 1:1 + pages[layer, head]] for head in heads]))
        for head, own in zip(heads, np.split(means, np.cumsum(pages[layer, heads])[:-1])):
            held, count = sequence.compensation[layer, head], len(own) * PAGE
            held[0] += count
            held[1:] += (own.mean(0) - held[1:]) * (count / held[0])


def _drop(cache, sequence, view, head, i, scores):
    layer, slots, options = view.layer, view.slots, cache.options
    excess = max(PAGE, slots - int(cache.limits(sequence)[layer, head]))
    sealed = slice(PAGE, PAGE * int(sequence.sealed[layer, head]))  # slots of quantised pages
    scores = scores.astype(np.float64)
    scores[(view.positions[i] < options.sink_tokens) | (view.positions[i] >= view.length - options.window)] = np.inf
    free = np.arange(sealed.stop, slots) if sealed.stop > PAGE else np.arange(slots)  # the first page stays whole before quantised ones
    pages = scores[sealed].reshape(-1, PAGE).mean(1)
    gone_pages, gone = _cheapest(pages, scores[free], excess)
    keep = np.ones(slots, bool)
    keep[free[gone]] = False
    for page in gone_pages:
        keep[PAGE * (page + 1):PAGE * (page + 2)] = False
    return _compact(cache, sequence, layer, head, keep, gone_pages + 1, sealed)


def _cheapest(pages, tokens, excess):
    """Indices of pages and of single tokens with the lowest scores, together at least `excess` tokens; of equals the older go first,
    tokens before pages."""
    scores = np.r_[tokens, pages]
    sizes = np.r_[np.ones(len(tokens), int), np.full(len(pages), PAGE)]
    order = np.argsort(scores, kind="stable")
    order = order[np.isfinite(scores[order])]
    count = int(np.searchsorted(np.cumsum(sizes[order]), excess)) + 1
    chosen = order[:count]
    return np.sort(chosen[chosen >= len(tokens)] - len(tokens)), np.sort(chosen[chosen < len(tokens)])


def _compact(cache, sequence, layer, head, keep, gone_pages, sealed):
    """Close the gaps: quantised pages move up in the list; tokens in pages of floats are to move to the first free places -> which."""
    table = sequence.tables[layer, head]
    cache.release(table[gone_pages])
    left = np.delete(np.arange(sealed.stop // PAGE), gone_pages)  # page 0 and the quantised pages that stay
    moved = PAGE * len(gone_pages)
    last = -(-len(keep) // PAGE)
    for plane in (sequence.positions, *(sequence.mass if sequence.mass is not None else ())):
        row = plane[layer, head]
        row[:len(keep) - moved] = np.delete(row[:len(keep)], (gone_pages[:, None] * PAGE + np.arange(PAGE)).ravel())
    table[:last - len(gone_pages)] = np.r_[table[left], table[sealed.stop // PAGE:last]]
    table[last - len(gone_pages):last] = RELEASED
    keep = np.delete(keep, (gone_pages[:, None] * PAGE + np.arange(PAGE)).ravel())
    stop = sealed.stop - moved
    sequence.sealed[layer, head] -= len(gone_pages)
    places = np.arange(stop if stop > PAGE else 0, len(keep))
    stay = places[keep[places]]
    moves = moved_tokens(sequence, layer, head, stay, places[:len(stay)])
    count = len(keep) - (len(places) - len(stay))
    used, before = -(-count // PAGE), -(-len(keep) // PAGE)
    cache.release(table[used:before])
    table[used:before] = RELEASED
    sequence.counts[layer, head] = count
    first = min(*gone_pages[:1].tolist(), *(places[:1] // PAGE).tolist(), used)
    sequence.moved((layer, head), first)
    sequence.relisted(first, last)
    return moves
