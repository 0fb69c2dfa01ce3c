"""ProxyAttn (arXiv 2509.24745): a few mean heads rank the pages for all heads, of which each reads as much as it needs itself.

Heads of a proxy are averaged, queries and keys apart; of every `stride`-th query and key true weights are made, and a page counts by the
largest of them. How many of these pages a head reads is what it would need, of the pages by its last queries' own weights, to cover
`gamma`. Of the last block, the newest of the chunk where the paper has the prompt's, every `stride`-th query is looked at: this part
costs more than the ranking.
"""
from dataclasses import dataclass

import numpy as np

from edgeattn.policies.prefill import EVERY, PrefillPolicy
from edgeattn.prefill_plan import PAGE, QUERIES, best, causal, cover, shape_of, softmax, true_weights


@dataclass(frozen=True)
class ProxyAttn(PrefillPolicy):
    """gamma    part of a head's last queries' weight that its number of pages would cover, had it chosen them
    stride   of queries and keys
    proxies  mean heads, each of as many KV heads; more than there are KV heads means one for each
    budget   tokens that a head reads at least
    """
    gamma: float = 0.95
    stride: int = 4
    proxies: int = 1
    budget: int = 2048

    def __post_init__(self):
        super().__post_init__()
        if self.stride < 1 or PAGE % self.stride or self.proxies < 1:
            raise ValueError(f"need a stride that divides {PAGE} and proxies >= 1, got {self.stride=} {self.proxies=}")

    def operators(self):
        about = {"sink": self.sink, "recent": self.recent, "proxies": self.proxies, "stride": self.stride}
        return [("choose_by_proxies", about | {"part": float(self.gamma), "budget": min(self.budget // PAGE, EVERY)})]

    def select(self, q, k, scale, layer=0, assets=None):
        n, kv_heads, group, sampled, shares = q.shape[1], len(k), len(q) // len(k), [], []
        for head in range(kv_heads):
            keys, own = k[head], q[head * group:(head + 1) * group]
            sampled.append(keys[::self.stride])
            shares.append(self._share(own, keys, scale))
            m = len(keys)
        rankings = []
        for part in np.array_split(np.arange(kv_heads), min(self.proxies, kv_heads)):
            mean = q[part[0] * group:(part[-1] + 1) * group, ::self.stride].mean(0)
            rankings += len(part) * group * [self._rank(mean, np.mean([sampled[head] for head in part], 0), n, m, scale)]
        allowed = causal(n, m)
        counts = np.maximum(np.ceil(np.concatenate(shares)[:, None] * allowed.sum(1)), self.budget // PAGE)
        return self.plan(best(np.stack(rankings), allowed, counts), None, n, m)

    def _share(self, q, k, scale):
        """[group]: part of the pages that a head needs."""
        n, m = q.shape[1], len(k)
        rows = np.arange(n - 1, max(-1, n - 1 - QUERIES), -self.stride)
        pages = np.add.reduceat(true_weights(q, k, rows, scale).sum(1), np.arange(0, m, PAGE), 1)
        return cover(pages, np.ones(pages.shape[1], bool), self.gamma).mean(1)

    def _rank(self, q, k, n, m, scale):
        """[query blocks, pages]: the largest weight of a sampled query of the block and a sampled key of the page."""
        rows, keys = np.arange(0, n, self.stride), np.arange(0, m, self.stride)
        weights = softmax(np.where(keys <= (m - n + rows)[:, None], q @ k.T * np.float32(scale), -np.inf))
        for axis, size in ((0, QUERIES), (1, PAGE)):
            weights = np.maximum.reduceat(weights, np.searchsorted((rows, keys)[axis], np.arange(0, (n, m)[axis], size)), axis)
        return weights.reshape(shape_of(n, m))
