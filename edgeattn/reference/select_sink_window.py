import numpy as np

from edgeattn.page_formats import PAGE


def select_sink_window(slot_counts, *, kv_heads, capacity, sink_pages, window_pages, layer=0):
    """The first pages and the most recent ones (StreamingLLM, arXiv 2309.17453), as a selection for cached_attention.

    slot_counts  [sequences, kv_heads]             int32, tokens that each KV head holds
    ->  pages    [sequences, kv_heads, capacity]   int32, logical pages, ascending; -1 past the count
        counts   [sequences, kv_heads]             int32
    capacity must be at least sink_pages + window_pages. A partly filled last page counts as one of the window's. `layer` names the
    cache layer and changes nothing here.
    """
    pages = np.full((len(slot_counts), kv_heads, capacity), -1, np.int32)
    counts = np.zeros((len(slot_counts), kv_heads), np.int32)
    for (s, h), slots in np.ndenumerate(slot_counts):
        total = -(-int(slots) // PAGE)
        chosen = [p for p in range(total) if p < sink_pages or p >= total - window_pages]
        pages[s, h, :len(chosen)], counts[s, h] = chosen, len(chosen)
    return pages, counts
