"""Quantise pages that are full and older than the window. A sealed page is never changed again."""
import numpy as np

from edgeattn.kernels_cpu import read_pages
from edgeattn.kernels_cpu.page_pool import POOLS, RELEASED
from edgeattn.page_formats import PAGE


def seal(cache, sequence) -> None:
    """Seal what is due, all layers and heads at once. Where quantised pages run out, pages stay floats for now."""
    storage, window = cache.storage, cache.options.window
    due = np.maximum(0, (sequence.counts - window) // PAGE - sequence.sealed) // storage.group * storage.group
    if not due.any():
        return
    flat = due.ravel()
    heads = np.repeat(np.arange(flat.size), flat)
    within = np.arange(len(heads)) - np.repeat(np.cumsum(flat) - flat, flat)
    tables, columns = sequence.tables.reshape(flat.size, -1), sequence.sealed.ravel()[heads] + within
    there = tables[heads, columns] != RELEASED
    heads, columns, within = heads[there], columns[there], within[there]
    kinds = _kinds(cache, within % storage.group)
    if kinds is None:
        return
    if storage.group > 1 or storage.anchors:
        cache.own_floats(sequence)
        for layer, head in np.argwhere(due):
            for first in range(sequence.sealed[layer, head], sequence.sealed[layer, head] + due[layer, head], storage.group):
                _sort(cache, sequence, layer, head, first)
    tables[heads, columns] = _quantise(cache, tables[heads, columns], kinds)
    sequence.relisted(int(columns.min(initial=0)), int(columns.max(initial=0)) + 1)
    sequence.rekeyed(due > 0, sequence.sealed)
    sequence.sealed += due
    if storage.group > 1 or storage.anchors:  # slots are out of order up to here
        sequence.exact_from = max(sequence.exact_from, sequence.length - int((sequence.counts - sequence.sealed * PAGE).min()))


def quantise(cache, entries: np.ndarray) -> np.ndarray | None:
    """Pages of floats that others may hold as well -> the entries of quantised ones with what was in them; None where they run out."""
    kinds = _kinds(cache, np.zeros(len(entries), int))
    return None if kinds is None else _quantise(cache, entries, kinds)


def _quantise(cache, sources, kinds):
    targets = np.empty_like(sources)
    for kind in range(1, len(cache.pools)):
        targets[kinds == kind] = cache.pools[kind].allocate(int((kinds == kind).sum())) * POOLS + kind
    cache.backend.seal(cache.table, cache.head_dim, sources, targets)
    cache.pools[0].release(sources // POOLS)
    return targets


def _kinds(cache, places):
    """The pools of pages that stand at `places` of their groups; None where pages run out. Where one pool does (eviction may have left
    pages of one width alone), another's pages serve, for the last places first: those of the least salient tokens."""
    free = np.array([pool.free for pool in cache.pools[1:]])
    if len(places) > free.sum():
        return None
    kinds = np.array(cache.storage.pages())[places]
    spare = np.repeat(np.arange(len(free)), np.maximum(0, free - np.bincount(kinds, minlength=len(free))))  # the widest first
    by_place = np.argsort(places, kind="stable")
    for kind in range(len(free)):
        over = by_place[kinds[by_place] == kind][free[kind]:]
        kinds[over], spare = spare[:len(over)], spare[len(over):]
    return kinds + 1


def _sort(cache, sequence, layer, head, first):
    """The most salient tokens of a group of pages to its first pages, or to the first page of all; their order in the text stays within
    a page."""
    storage = cache.storage
    pages = np.r_[0 if storage.anchors else np.empty(0, int), first:first + storage.group].astype(int)
    slots = (pages[:, None] * PAGE + np.arange(PAGE)).ravel()
    mass, seen = sequence.mass[:2, layer, head, slots]

    def keys():
        k, _ = read_pages.run(cache.table, cache.head_dim, sequence.tables[layer, head, pages])
        return k.transpose(0, 2, 1).reshape(-1, cache.head_dim)
    scores = storage.saliency(mass, seen, keys)
    if storage.anchors:
        scores[:cache.options.sink_tokens] = np.inf
    best = np.argsort(-scores, kind="stable").reshape(-1, PAGE)
    cache.pools[0].pages.move([moved_tokens(sequence, layer, head, slots[np.sort(best, 1).ravel()], slots)])


def moved_tokens(sequence, layer, head, sources, targets) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of one KV head are to go from slots to slots, all in pages of floats that are the sequence's own: what is known of them goes;
    -> their places in the pool before and after, for HostPages.move."""
    table, moved = sequence.tables[layer, head], sources != targets
    sources, targets = sources[moved], targets[moved]
    places = tuple(table[slots // PAGE] // POOLS * PAGE + slots % PAGE for slots in (sources, targets))
    for plane in (sequence.positions, *(sequence.mass if sequence.mass is not None else ())):
        if plane is not None:
            plane[layer, head, targets] = plane[layer, head, sources]
    return places
