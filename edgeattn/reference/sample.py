import numpy as np


def sample(logits, history, *, temperature, top_k, top_p, min_p, repeat_penalty, uniform):
    """One token from one row of logits. Filters apply in llama.cpp's order: penalty, top-k, top-p, min-p, temperature.

    logits   [vocab]   float32
    history  [n]       int64, the tokens to penalise (repeats count once)
    ->       [1]       int64
    temperature  <= 0 picks the largest logit (the first of equals)
    top_k        keep the k most likely; 0 keeps all
    top_p        keep the fewest most likely whose probability reaches top_p; 1 keeps all (arXiv 1904.09751)
    min_p        keep those at least min_p times as likely as the best; 0 keeps all (arXiv 2407.01082)
    repeat_penalty  positive logits of seen tokens are divided by it, negative ones multiplied (arXiv 1909.05858)
    uniform      a random number in [0, 1): the token whose cumulative probability, most likely first, passes it
    """
    logits = logits.astype(np.float32).copy()
    seen = np.unique(history)
    logits[seen] = np.where(logits[seen] > 0, logits[seen] / repeat_penalty, logits[seen] * repeat_penalty)
    if temperature <= 0:
        return np.array([logits.argmax()], np.int64)
    order = np.argsort(-logits, kind="stable")
    if 0 < top_k < order.size:
        order = order[:top_k]
    kept = logits[order].astype(np.float64)
    p = np.exp(kept - kept[0])
    p /= p.sum()
    keep = (np.cumsum(p) - p < top_p) & (p >= min_p * p[0])
    keep[0] = True
    order, kept = order[keep], kept[keep]
    p = np.exp((kept - kept[0]) / temperature)
    chosen = np.searchsorted(np.cumsum(p / p.sum()), uniform, side="right")
    return order[min(chosen, order.size - 1):][:1].astype(np.int64)
