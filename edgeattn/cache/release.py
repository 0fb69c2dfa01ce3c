"""Pages that are gone for now: of the tokens of a released page the cache keeps their ids and one mean key for each layer and KV head.

Attention passes over released pages; all other slots stay where they are, so a released page can be computed again (edgeattn/rebuild.py).
"""
import numpy as np

from edgeattn.cache.pages import CacheFull
from edgeattn.cache.sealing import quantise
from edgeattn.cache.sequence import Sequence
from edgeattn.kernels_cpu.page_pool import POOLS, RELEASED
from edgeattn.page_formats import PAGE


def released(sequence) -> np.ndarray:
    """Logical pages that are released, ascending."""
    return np.flatnonzero(sequence.tables[0, 0, :-(-sequence.length // PAGE)] == RELEASED)


def resident(sequence) -> int:
    """Tokens that each head holds."""
    return sequence.length - PAGE * len(released(sequence))


def release(cache, sequence, page: int) -> np.ndarray:
    """Free logical page `page` in all layers and KV heads -> its mean keys [layers, kv_heads, head_dim] float16, as the cache holds them.

    ValueError: it is not a full page that is there, or slots of this sequence are not positions (tokens were evicted, or sorted).
    """
    if not 0 <= page < sequence.length // PAGE or sequence.tables[0, 0, page] == RELEASED:
        raise ValueError(f"page {page} cannot be released: it must be full and not released yet")
    slots = slice(PAGE * page, PAGE * (page + 1))
    if (sequence.counts != sequence.length).any() or sequence.positions is not None and \
            (sequence.positions[..., slots] != np.arange(slots.start, slots.stop)).any():
        raise ValueError(f"page {page} cannot be released: tokens were evicted or sorted, so its slots are not positions any more")
    entries = sequence.tables[:, :, page].ravel()
    means = cache.backend.page_means(cache.table, cache.head_dim, entries)[:, :cache.head_dim]
    mean = means.reshape(*cache.shape, cache.head_dim).astype(np.float16)
    if sequence.means is not None:
        sequence.means[page] = mean
    cache.release(entries)
    sequence.tables[:, :, page] = RELEASED
    sequence.relisted(page, page + 1)
    return mean


def candidates(cache, sequence) -> np.ndarray:
    """Pages that may be released: full, older than the window, without sinks, there."""
    old = np.arange(1, max(1, (sequence.length - cache.options.window) // PAGE))
    return old[sequence.tables[0, 0, old] != RELEASED]


def make_room(cache, sequence, tokens: int = 0) -> None:
    """Release pages until a sequence and `tokens` more are within its limit: those with the least attention, pinned ones last."""
    excess = resident(sequence) + tokens - int(cache.plan.limits.min())
    if excess <= 0:
        return
    sequence.fetch()
    pages = candidates(cache, sequence)
    mass = sequence.mass[0][..., :sequence.length // PAGE * PAGE].sum((0, 1), dtype=np.float64).reshape(-1, PAGE).sum(1)[pages]
    order = np.lexsort((mass, sequence.pinned[pages]))
    for page in pages[order[:-(-excess // PAGE)]]:
        release(cache, sequence, int(page))


# ---- back again ------------------------------------------------------------------------------------------------------
def part_before(cache, sequence, page: int) -> Sequence:
    """A sequence that shares the pages before `page`; its user truncates it to 0 when done. ValueError: the page is not released."""
    if page not in released(sequence):
        raise ValueError(f"page {page} is not released")
    sequence.fetch()
    tables = sequence.tables.copy()
    tables[:, :, page:] = RELEASED
    entries = tables[tables != RELEASED]
    for i, pool in enumerate(cache.pools):
        pool.share(entries[entries % POOLS == i] // POOLS)
    confidence = None if sequence.confidence is None else sequence.confidence.copy()
    part = Sequence(tables, np.full_like(sequence.counts, PAGE * page), np.minimum(sequence.sealed, max(page, 1)), confidence=confidence,
                    length=PAGE * page)
    part.mirror = cache.backend.mirror(part)
    return part


def take_page(cache, sequence, page: int, part: Sequence) -> None:
    """Move logical page `page` from `part`, where it was computed, to `sequence`, quantised if it was. CacheFull: then nothing changed."""
    entries = part.tables[:, :, page].ravel()
    if 0 < page < sequence.sealed.min() and len(cache.pools) > 1:
        entries = quantise(cache, entries)
        if entries is None:
            raise CacheFull("KV cache is full: no quantised page is free to rebuild a page")
    part.tables[:, :, page] = RELEASED
    sequence.moved(page=page)
    sequence.tables[:, :, page] = entries.reshape(cache.shape)
    sequence.relisted(page, page + 1)
