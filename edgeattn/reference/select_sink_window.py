import numpy as np


def select_sink_window(kv_lengths, *, kv_heads, page_size, capacity, sink_pages, window_pages):
    """The first pages and the most recent ones (StreamingLLM, arXiv 2309.17453), as a selection for cached_attention.

    kv_lengths  [sequences]                       int32, cached tokens
    ->  pages   [sequences, kv_heads, capacity]   int32, logical pages, ascending; -1 past the count
        counts  [sequences, kv_heads]             int32
    capacity must be at least sink_pages + window_pages. A partly filled last page counts as one of the window's.
    """
    pages = np.full((len(kv_lengths), kv_heads, capacity), -1, np.int32)
    counts = np.zeros((len(kv_lengths), kv_heads), np.int32)
    for s, length in enumerate(kv_lengths):
        total = -(-int(length) // page_size)
        chosen = [p for p in range(total) if p < sink_pages or p >= total - window_pages]
        pages[s, :, :len(chosen)], counts[s] = chosen, len(chosen)
    return pages, counts
