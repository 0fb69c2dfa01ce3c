import numpy as np

from edgeattn.page_formats import PAGE
from edgeattn.reference.cached_attention import rotate

ALL = -1


def select_pages(q, cos, sin, past_key, positions, *, num_heads, kv_heads, head_dim, rotary_dim, interleaved=0, scale, layer=0, capacity,
                 share=1.0, score, combine="head", budget=0, fraction=0.0, recent, reach=1.0):
    """The pages that a decode step reads of each KV head: the first one, the `recent` last ones and those with the best scores.

    q          [1, num_heads * head_dim]      float32, before rotary; its key is not in the cache yet
    cos, sin   [max_position, rotary_dim / 2] float32
    past_key   [kv_heads, past, head_dim]     float32, rotated
    positions  [1]                            int64, rows of cos and sin
    ->  pages  [kv_heads, capacity]           int32, logical pages, ascending; 0 past the count
        counts [kv_heads]                     int32; -1 where all pages are to be read
    A head reads share * max(budget, fraction * (past + 1)) tokens, in whole pages; all of them where share < 0.
    score    "bound": per channel the middle of a page's keys and `reach` times half their range, as q sees them; the largest of the
             group's query heads (reach 1: Quest, arXiv 2406.10774). "mass": the page's softmax weight, summed over the group. "recency": the
             latest. "random": any (a kernel's own order). "peak": the largest product of a token's key with the sum of the group's
             queries (TidalDecode, arXiv 2410.05076). "rank": minus a page's place when all query heads of the layer take turns to name
             their next best page by its best token (LessIsMore, arXiv 2508.07101); needs combine "best". "max_mass": over its tokens
             the sum of the largest softmax weight of any query head of the layer (DELTA, arXiv 2510.09883); needs combine "layer"
    combine  "head": each KV head by its own scores; "layer": all by the sum of them; "best": all by the best of them
    `layer` names the cache layer and changes nothing here.
    """
    group, past = num_heads // kv_heads, past_key.shape[1]
    total = -(-(past + 1) // PAGE)
    first, last = 1, max(1, total - recent)
    half = rotary_dim // 2
    x = rotate(q.reshape(1, num_heads, head_dim), cos[positions, :half], sin[positions, :half], interleaved)[0].astype(np.float64) * scale
    scores = np.stack([page_scores(x[h * group:(h + 1) * group], past_key[h], total, score, reach) for h in range(kv_heads)])
    if score == "rank":
        scores = rank_scores(x, past_key, first, last, total)
    if score == "max_mass":
        scores = np.stack([max_mass_scores(x, past_key, total), *np.zeros((kv_heads - 1, total))])
    if combine != "head":
        scores[:] = scores.sum(0) if combine == "layer" else scores.max(0)
    pages, counts = np.zeros((kv_heads, capacity), np.int32), np.full(kv_heads, ALL, np.int32)
    wanted = int(np.ceil(np.float32(share) * max(budget, np.float32(fraction) * np.float32(past + 1)) / PAGE)) if share >= 0 else total
    free = max(0, wanted - (total - last) - first)
    if wanted >= total or free >= last - first or first + free + total - last > capacity - 2:
        return pages, counts
    for h in range(kv_heads):
        best = first + np.argsort(-scores[h, first:last], kind="stable")[:free]
        chosen = np.r_[0, np.sort(best), last:total]
        pages[h, :len(chosen)], counts[h] = chosen, len(chosen)
    return pages, counts


def page_scores(q, keys, total, score, reach):
    """[total] of one KV head: q [group, head_dim] rotated and scaled, keys [past, head_dim]. Bounds are of whole pages alone."""
    found = np.zeros(total)
    if score == "mass":
        weights = np.exp(q @ keys.T - (q @ keys.T).max(1, keepdims=True))
        weights = (weights / weights.sum(1, keepdims=True)).sum(0)
        for page in range(-(-len(keys) // PAGE)):
            found[page] = weights[page * PAGE:(page + 1) * PAGE].sum()
    elif score == "bound":
        whole = len(keys) // PAGE
        low, high = (f(keys[:whole * PAGE].reshape(whole, PAGE, keys.shape[1]), 1) for f in (np.min, np.max))
        low = outward(low, -np.inf)
        step = outward(high - low, np.inf)
        middle, reaches = low + step / 2, np.abs(step) / 2
        found[:whole] = (q @ middle.T + reach * (np.abs(q) @ reaches.T)).max(0)
    elif score == "peak":
        best = (q.sum(0) @ keys.T).reshape(-1)
        for page in range(len(keys) // PAGE):
            found[page] = best[page * PAGE:(page + 1) * PAGE].max()
    elif score == "recency":
        found[:] = np.arange(total)
    return found


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
