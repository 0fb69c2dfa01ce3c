"""Compute released pages again: a small prefill of their 32 tokens, with what the sequence holds before them.

What was released before a page is missing to it, as it was to the tokens that came while it was gone; so pages are rebuilt from the first
to the last.
"""
import numpy as np

from edgeattn.cache.release import candidates, make_room, part_before, released, resident, take_page
from edgeattn.page_formats import PAGE

PROBED = 64  # newest tokens of a prompt whose keys stand for its queries


def rebuild(model, sequence, page: int, token_ids) -> None:
    """Put released logical page `page` back, computed from its 32 token ids. ValueError: it is not released, or other than 32 ids;
    CacheFull: then the sequence is as it was."""
    if len(token_ids) != PAGE:
        raise ValueError(f"a page has {PAGE} tokens, got {len(token_ids)} ids")
    part = part_before(model.cache, sequence, page)
    try:
        model.compute(part, np.asarray(token_ids, np.int64))
        take_page(model.cache, sequence, page, part)
    finally:
        model.free(part)


def recall(model, sequence, ids: np.ndarray) -> None:
    """Before a new prompt `ids`: rebuild the released pages that it is about, and as many as there is room for; others go for them.

    What it is about is told by keys alone: the mean key of its newest tokens stands for the mean query, because queries do not leave
    the attention operator. The prompt's own pages are computed a second time when the rebuilt ones are there.
    """
    cache, gone = model.cache, released(sequence)
    sequence.pinned[:] = False
    if not len(gone) or sequence.length + len(ids) > cache.capacity:
        return
    interest = cache.eviction.interest(sequence.means[gone], _mean_key(model, sequence, ids[-min(PROBED, model.ubatch):]))
    room = (int(cache.plan.limits.min()) - resident(sequence)) // PAGE
    count = min(max(cache.eviction.rebuilt, room), room + len(candidates(cache, sequence)))
    chosen = np.sort(gone[np.argsort(-interest, kind="stable")[:max(0, count)]])
    make_room(cache, sequence, PAGE * len(chosen))
    sequence.pinned[chosen] = True
    for page in chosen:
        rebuild(model, sequence, int(page), sequence.token_ids[PAGE * page:PAGE * (page + 1)])


def _mean_key(model, sequence, ids):
    """[layers, kv_heads, head_dim] float32 of some tokens behind a sequence, which are forgotten again."""
    cache, length = model.cache, sequence.length
    model.compute(sequence, ids)
    first, last = length // PAGE, -(-sequence.length // PAGE)
    k, _ = cache.backend.read(cache.table, cache.head_dim, sequence.tables[:, :, first:last].ravel())
    model.truncate(sequence, length)
    k = k.reshape(*cache.shape, last - first, cache.head_dim, PAGE).transpose(0, 1, 3, 2, 4).reshape(*cache.shape, cache.head_dim, -1)
    return k[..., length - PAGE * first:length - PAGE * first + len(ids)].mean(-1)
