import numpy as np

from edgeattn.page_formats import PAGE
from edgeattn.reference.cached_attention import rotate

ALL = -1
BLOCK, TELLING, CENTRE, SHARED = 4, 4, (1, 5), 2  # pages, keys, pages, tables


def select_pages(q, cos, sin, past_key, positions, components=None, *, num_heads, kv_heads, head_dim, rotary_dim, interleaved=0, scale,
                 layer=0, capacity, share=1.0, score, combine="head", budget=0, fraction=0.0, recent, reach=1.0, block=1, blocks=0, rank=0,
                 tables=0, bits=0):
    """The pages that a decode step reads of each KV head: the first one, the `recent` last ones and those with the best scores.

    q          [1, num_heads * head_dim]      float32, before rotary; its key is not in the cache yet
    cos, sin   [max_position, rotary_dim / 2] float32
    past_key   [kv_heads, past, head_dim]     float32, rotated
    positions  [1]                            int64, rows of cos and sin
    ->  pages  [kv_heads, capacity]           int32, logical pages, ascending; 0 past the count
        counts [kv_heads]                     int32; -1 where all pages are to be read
    A head reads share * max(budget, fraction * (past + 1)) tokens, in whole pages; all of them where share < 0.
    score    "bound": per channel the middle of a page's keys and `reach` times half their range, as q sees them; the largest of the
             group's query heads (reach 1: Quest, arXiv 2406.10774). "mass": the page's softmax weight, summed over the group. "recency":
             the latest. "random": any (a kernel's own order). "peak": the largest product of a token's key with the sum of the group's
             queries (TidalDecode, arXiv 2410.05076). "rank": minus a page's place when all query heads of the layer take turns to name
             their next best page by its best token (LessIsMore, arXiv 2508.07101); needs combine "best". "max_mass": over its tokens
             the sum of the largest softmax weight of any query head of the layer (DELTA, arXiv 2510.09883); needs combine "layer".
             Others: page_scores
    combine  "head": each KV head by its own scores; "layer": all by the sum of them; "best": all by the best of them
    block    pages that are chosen together: then the first block is always read, and whole ones are counted from page 0
    A page that scores -infinity is never chosen, even if others do not fill the list.
    components   [kv_heads, head_dim, head_dim] float32, for "components"; [tables, bits, head_dim], planes, for "collisions"
    `layer` names the cache layer and changes nothing here.
    """
    group, past = num_heads // kv_heads, past_key.shape[1]
    total = -(-(past + 1) // PAGE)
    last = max(1, (total - recent) // block * block)
    first = min(block, last)
    half = rotary_dim // 2
    x = rotate(q.reshape(1, num_heads, head_dim), cos[positions, :half], sin[positions, :half], interleaved)[0].astype(np.float64) * scale
    about = dict(reach=reach, block=block, blocks=blocks, rank=rank)
    scores = np.stack([page_scores(x[h * group:(h + 1) * group], past_key[h], total, score, first=first, last=last,
                                   vectors=components[h] if score == "components" else components, **about) for h in range(kv_heads)])
    if score == "rank":
        scores = rank_scores(x, past_key, first, last, total)
    if score == "max_mass":
        scores = np.stack([max_mass_scores(x, past_key, total), *np.zeros((kv_heads - 1, total))])
    if combine != "head":
        scores[:] = scores.sum(0) if combine == "layer" else scores.max(0)
    pages, counts = np.zeros((kv_heads, capacity), np.int32), np.full(kv_heads, ALL, np.int32)
    wanted = int(np.ceil(np.float32(share) * max(budget, np.float32(fraction) * np.float32(past + 1)) / PAGE)) if share >= 0 else total
    free = max(0, wanted - (total - last) - first) // block * block
    if wanted >= total or free >= last - first or first + free + total - last > capacity - 2:
        return pages, counts
    for h in range(kv_heads):
        possible = int((scores[h, first:last] > -np.inf).sum())
        best = first + np.argsort(-scores[h, first:last], kind="stable")[:min(free, possible)]
        chosen = np.r_[:first, np.sort(best), last:total]
        pages[h, :len(chosen)], counts[h] = chosen, len(chosen)
    return pages, counts


def page_scores(q, keys, total, score, *, reach, first, last, block, blocks, rank, vectors):
    """[total] of one KV head: q [group, head_dim] rotated and scaled, keys [past, head_dim]. Whole pages alone are described in advance, by
    halves.

    "hierarchy"        bounds, but -infinity for pages outside of the `blocks` blocks of BLOCK pages whose mean keys score highest for some
                       query; the first and the last block with a page that may be chosen are among them
    "representatives"  of a block: the queries' sum times the mean of the TELLING keys that are least like the block's mean direction
    "landmarks"        of a block: the best query times the block's last key
    "components"       the queries' sum times the page's best key, both by their first `rank` components
    "collisions"       tables in which a key, less the mean key of the pages CENTRE, lies on the same sides of all planes as a query: over
                       the keys and queries that share SHARED at least; -infinity where none do, and before there are those pages
    """
    found, whole = np.zeros(total), len(keys) // PAGE
    pages = keys[:whole * PAGE].reshape(whole, PAGE, keys.shape[1])
    if score == "mass":
        weights = np.exp(q @ keys.T - (q @ keys.T).max(1, keepdims=True))
        weights = (weights / weights.sum(1, keepdims=True)).sum(0)
        for page in range(-(-len(keys) // PAGE)):
            found[page] = weights[page * PAGE:(page + 1) * PAGE].sum()
    elif score in ("bound", "hierarchy"):
        low, high = (f(pages, 1) for f in (np.min, np.max))
        low = outward(low, -np.inf)
        step = outward(high - low, np.inf)
        middle, reaches = low + step / 2, np.abs(step) / 2
        found[:whole] = (q @ middle.T + reach * (np.abs(q) @ reaches.T)).max(0)
        if score == "hierarchy":
            found[first:last][~kept_blocks(q, keys, first, last, blocks)] = -np.inf
    elif score == "peak":
        best = (q.sum(0) @ keys.T).reshape(-1)
        for page in range(len(keys) // PAGE):
            found[page] = best[page * PAGE:(page + 1) * PAGE].max()
    elif score == "recency":
        found[:] = np.arange(total)
    elif score in ("representatives", "landmarks"):
        for b in range(first // block, last // block):
            own = keys[b * block * PAGE:(b + 1) * block * PAGE]
            telling = q.sum(0) @ representative(own) if score == "representatives" else (q @ half(own[-1])).max()
            found[b * block:(b + 1) * block] = telling
    elif score == "components":
        found[:whole] = (half(pages @ vectors[:rank].T) @ (vectors[:rank].astype(np.float64) @ q.sum(0))).max(1)
    elif score == "collisions":
        shared = np.zeros((len(q), *pages.shape[:2]))
        if last >= CENTRE[1]:
            sides = [np.einsum("...d,tbd->...tb", x, vectors) > 0 for x in (q, pages - in_order(keys[CENTRE[0] * PAGE:CENTRE[1] * PAGE]))]
            shared = (sides[0][:, None, None] == sides[1]).all(-1).sum(-1)
        found[:whole] = np.where(shared >= SHARED, shared, 0).sum((0, 2))
        found[found == 0] = -np.inf
    return found


def kept_blocks(q, keys, first, last, blocks):
    """[last - first] bool: pages of the blocks that stay."""
    low, high = first // BLOCK, (last - 1) // BLOCK
    scores = [(q @ half(in_order(keys[b * BLOCK * PAGE:(b + 1) * BLOCK * PAGE]))).max() for b in range(low + 1, high)]
    stay = {low, high, *(low + 1 + np.argsort(-np.array(scores), kind="stable")[:blocks - 2]).tolist()}
    return np.isin(np.arange(first, last) // BLOCK, list(stay))


def representative(keys):
    x = keys.astype(np.float64)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    return half(in_order(keys[np.argsort(unit @ unit.sum(0), kind="stable")[:TELLING]]))


def in_order(keys):
    """Their mean, summed one by one in float32 as kernels do, so that it rounds alike."""
    return np.cumsum(keys, axis=0, dtype=np.float32)[-1] / np.float32(len(keys))


def half(x):
    return x.astype(np.float16).astype(np.float64)


def rank_scores(q, keys, first, last, total):
    """[kv_heads, total]: q [num_heads, head_dim] of all KV heads, keys [kv_heads, past, head_dim]."""
    found = np.full((len(keys), total), -np.inf)
    group = len(q) // len(keys)
    for h, x in enumerate(q):
        best = (x @ keys[h // group, first * PAGE:last * PAGE].T).reshape(-1, PAGE).max(1)
        order = first + np.argsort(-best, kind="stable")
        found[h // group, order] = np.maximum(found[h // group, order], -(np.arange(len(order)) * len(q) + h))
    return found


def max_mass_scores(q, keys, total):
    """[total], as rank_scores."""
    scores = np.einsum("hgd,hsd->hgs", q.reshape(len(keys), -1, q.shape[1]), keys).reshape(len(q), -1)
    weights = np.exp(scores - scores.max(1, keepdims=True))
    largest = (weights / weights.sum(1, keepdims=True)).max(0)
    return np.pad(largest, (0, total * PAGE - len(largest))).reshape(-1, PAGE).sum(1)


def outward(x, towards):
    """Halves, as float64, next to x on one side."""
    half = x.astype(np.float16)
    wrong = half.astype(np.float64) < x if towards > 0 else half.astype(np.float64) > x
    return np.where(wrong, np.nextafter(half, np.float16(towards)), half).astype(np.float64)
