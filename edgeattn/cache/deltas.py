"""What pages of deltas leave out, and how far off scores may be for it: for figures, and for whoever wants a head dense instead."""
from dataclasses import dataclass

import numpy as np

from edgeattn.kernels_cpu.page_pool import POOLS, RELEASED
from edgeattn.page_formats import PAGE


@dataclass(frozen=True)
class DeltaFigures:
    """Of one sequence, [layers, kv_heads] each, over its pages of deltas; pages kept whole count as pages that leave out nothing.

    pages    int64, how many there are
    skipped  share of deltas left out, 0 to 1; 0 where there are no such pages
    theta    the largest Theta: no score is further than theta * sum(|q|) from that of the keys as given, q as the cache's keys are
             multiplied with (rotated, times the softmax scale)
    unread   int64, bytes of the pages that no decode step reads, although they are held
    """
    pages: np.ndarray
    skipped: np.ndarray
    theta: np.ndarray
    unread: np.ndarray


def page_figures(pool, numbers: np.ndarray):
    """(values written besides the first key's, those there are besides it, Theta, bytes that are read of the keys) of pages."""
    f, first = pool.format, pool.pages.written(numbers)
    blocks = f.head_dim // f.delta_block
    written = np.unpackbits(first[:, 4:4 + 4 * blocks], axis=1).sum(1, dtype=np.int64)
    theta = np.ascontiguousarray(first[:, :4]).view(np.float32)[:, 0]
    return written - blocks, (PAGE - 1) * blocks, theta, f.delta_head + 2 * f.delta_block * written


def figures(cache, sequence) -> DeltaFigures:
    shape = cache.shape
    pages, written, most, unread = (np.zeros(shape, np.int64) for _ in range(4))
    theta = np.zeros(shape, np.float32)
    for i, pool in enumerate(cache.pools):
        if pool.format.k_type == "delta":
            layers, heads, columns = np.nonzero((sequence.tables != RELEASED) & (sequence.tables % POOLS == i))
            sent, possible, limits, size = page_figures(pool, sequence.tables[layers, heads, columns] // POOLS)
            for found, more in ((pages, 1), (written, sent), (most, possible), (unread, pool.format.k_bytes - size)):
                np.add.at(found, (layers, heads), more)
            np.maximum.at(theta, (layers, heads), limits)
    return DeltaFigures(pages, 1 - written / np.maximum(most, 1) * (most > 0) - (most == 0), theta, unread)
