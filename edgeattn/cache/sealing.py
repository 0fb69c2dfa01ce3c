"""Quantise pages that are full and older than the window. A sealed page is never changed again."""
import numpy as np

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
        _sort(cache, sequence, due)
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


def _sort(cache, sequence, due):
    """The most salient tokens of each group of pages to its first pages, or to the first page of all; their order in the text stays within
    a page. due: pages that each head is about to seal. The groups of a head in turn, those of all heads together."""
    storage, turns = cache.storage, []
    begin, end = int(sequence.sealed[due > 0].min()), int((sequence.sealed + due).max())
    slots = [slice(0, PAGE)] * storage.anchors + [slice(PAGE * begin, PAGE * end)]
    sequence.fetch(slots)
    norms = _norms(cache, sequence, due) if storage.norms else None
    for first in range(0, int(due.max()), storage.group):
        layers, heads = (index[:, None] for index in np.nonzero(due > first))
        pages = sequence.sealed[layers, heads] + first + np.arange(storage.group)
        if storage.anchors:
            pages = np.concatenate([np.zeros_like(layers), pages], 1)
        targets = (pages[..., None] * PAGE + np.arange(PAGE)).reshape(len(pages), -1)
        mass, seen = sequence.mass[:2, layers, heads, targets]
        scores = storage.saliency(mass, seen, norms[layers, heads, targets] if storage.norms else None)
        if storage.anchors:
            scores[:, :cache.options.sink_tokens] = np.inf
        best = np.argsort(-scores, axis=1, kind="stable").reshape(*pages.shape, PAGE)
        sources = np.take_along_axis(targets, np.sort(best, 2).reshape(targets.shape), 1)
        if storage.norms:
            norms[layers, heads, targets] = norms[layers, heads, sources]
        turns.append([moved_tokens(sequence, layer, head, *moved)
                      for layer, head, *moved in zip(layers[:, 0], heads[:, 0], sources, targets)])
    cache.pools[0].pages.permute(turns)
    sequence.reordered(slots)


def _norms(cache, sequence, due):
    """[layers, kv_heads, slots] float32: the norms of keys in the pages that are due, and in the first page."""
    norms = np.zeros((*cache.shape, sequence.tables.shape[-1], PAGE), np.float32)
    pages = np.arange(sequence.tables.shape[-1])
    wanted = (pages >= sequence.sealed[..., None]) & (pages < (sequence.sealed + due)[..., None]) | (pages == 0) & (due > 0)[..., None]
    for layer in np.flatnonzero(due.any(1)):
        norms[layer, wanted[layer]] = cache.backend.key_norms(cache.table, cache.head_dim, sequence.tables[layer, wanted[layer]])
    return norms.reshape(*cache.shape, -1)


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
