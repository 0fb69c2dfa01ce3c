"""MoA (Mixture of Attention spans, arXiv 2406.14909): a head reads the newest alpha + beta * L of the L tokens so far, and the first.

The spans are static, so that choosing costs nothing. The paper weighs attention values by gradients of the loss and gives a solver all
heads at once; here a span's loss is the relative squared error of its head's output on recorded queries, keys and values, and a greedy
knapsack goes along the lower hulls of the heads' losses over their densities. Its pages are 64 tokens, and its L is the length of the
whole prompt; ours is what a query block sees, so that plans do not depend on how a prompt is cut, and beta is the density. It wants heads
with keys of their own; of those that share a KV head all read the longest span among them.
"""
from dataclasses import dataclass

import numpy as np

from edgeattn.calibration import load_heads
from edgeattn.page_sums import PageSums
from edgeattn.policies.prefill import PrefillPolicy, double_bits
from edgeattn.prefill_plan import PAGE, PrefillPlan, causal, ends, forced

ALPHAS, BETAS = (0, -1024, 1024, 2048), tuple(i / 8 for i in range(9))  # steps as in the paper
NAME = "moa_spans"  # [layers, heads, 2] float32 of calibration.safetensors: alpha, beta


@dataclass(frozen=True)
class Moa(PrefillPolicy):
    """alpha tokens and beta of the tokens so far: the span of every head of a model that is not calibrated, and of one that is where they
    are not the defaults."""
    sink: int = 2  # 64 tokens
    alpha: int = 0
    beta: float = 0.5

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.beta <= 1:
            raise ValueError(f"need beta from 0 to 1, got {self.beta}")

    def operators(self):
        spans = {"alpha": double_bits(self.alpha), "beta": double_bits(self.beta)}
        return [("choose_by_spans", {"sink": self.sink, "recent": self.recent} | spans)]

    def choose(self, q, k, scale, layer, head, assets):
        n, m, group = q.shape[1], len(k), len(q)
        heads = slice(head * group, (head + 1) * group)
        alpha, beta = (assets["alpha"][layer, heads], assets["beta"][layer, heads]) if assets else (self.alpha, self.beta)
        return np.broadcast_to(band(np.broadcast_to(alpha, group), np.broadcast_to(beta, group), n, m), (group, *causal(n, m).shape))

    def load(self, folder, config):
        if (self.alpha, self.beta) != (Moa.alpha, Moa.beta):
            return None
        spans = load_heads(folder, config, NAME, 2)
        return None if spans is None else dict(zip(("alpha", "beta"), np.ascontiguousarray(np.moveaxis(spans, -1, 0), np.float32)))

    @classmethod
    def calibrate(cls, q, k, v, scale, density=0.5, alphas=ALPHAS, betas=BETAS):
        """Spans of one layer's heads that together read `density` of all pairs. q [heads, n, d], k, v [kv_heads, m, d] of several prompts,
        best of several lengths, without which alpha and beta cannot be told apart -> {"alpha", "beta" [heads]}.
        For one budget over all layers: `losses` of each, stacked, into `assign`."""
        candidates = np.array([(alpha, beta) for alpha in alphas for beta in betas])
        lost, read = losses(q, k, v, scale, candidates)
        found = candidates[assign(lost, read, density)].astype(np.float32)
        return {"alpha": found[..., 0], "beta": found[..., 1]}


def band(alpha, beta, n: int, m: int, sink: int = 0, recent: int = 0) -> np.ndarray:
    """[spans, query blocks, pages] bool: pages of the newest alpha + beta * L tokens of each block, and forced ones. alpha, beta [spans]"""
    last = ends(n, m)
    first = last - np.floor(np.asarray(alpha)[:, None] + np.asarray(beta, np.float64)[:, None] * last)
    near = np.arange(causal(n, m).shape[1]) >= np.floor(first / PAGE)[..., None]
    return near & causal(n, m) | forced(n, m, sink, recent)


def losses(q, k, v, scale, candidates) -> tuple[np.ndarray, np.ndarray]:
    """(relative squared error of each head's output [heads, candidates], the part of the pairs that a span reads [candidates]), means over
    prompts. candidates [candidates, 2]: alpha and beta."""
    policy, lost, read = Moa(), 0, 0
    for queries, keys, values in zip(q, k, v):
        heads, n, m = len(queries), queries.shape[1], keys.shape[1]
        bands = band(*candidates.T, n, m, policy.sink, policy.recent)
        unique, where = np.unique(bands, axis=0, return_inverse=True)
        density = np.array([PrefillPlan(blocks[None], None, n, m).density() for blocks in unique])
        sums = PageSums(queries, keys, values, scale)
        wrong = [((sums.outputs(np.repeat(blocks[None], heads, 0)) - sums.dense) ** 2).sum((1, 2)) for blocks in unique]
        found = np.stack(wrong, 1) / np.maximum((sums.dense ** 2).sum((1, 2)), np.finfo(np.float32).tiny)[:, None]
        lost, read = lost + found[:, where.ravel()] / len(q), read + density[where.ravel()] / len(q)
    return lost, read


def assign(lost: np.ndarray, read: np.ndarray, density: float) -> np.ndarray:
    """A candidate for each head, int [...], so that they read at most `density` of everything on average, or the least there is. Greedy: a
    head starts with the shortest span and moves along the lower hull of its losses; the steps that save most for what they read come first.
    lost [..., candidates], read [candidates]"""
    flat = lost.reshape(-1, len(read))
    hulls = [hull(row, read) for row in flat]
    steps = [((flat[head, b] - flat[head, a]) / (read[b] - read[a]), place, head) for head, path in enumerate(hulls)
             for place, (a, b) in enumerate(zip(path, path[1:]), 1)]
    places, spent = np.zeros(len(flat), int), sum(read[path[0]] for path in hulls)
    for _, place, head in sorted(steps):
        more = read[hulls[head][place]] - read[hulls[head][place - 1]]
        if places[head] == place - 1 and spent + more <= density * len(flat) + 1e-9:  # a step needs those before it
            places[head], spent = place, spent + more
    return np.array([path[place] for path, place in zip(hulls, places)]).reshape(lost.shape[:-1])


def hull(lost: np.ndarray, read: np.ndarray) -> list[int]:
    """Candidates on the lower convex hull of loss over reading, shortest first, each with less loss than the one before."""
    found: list[int] = []
    for i in np.lexsort((np.arange(len(read)), lost, read)):
        if found and lost[i] >= lost[found[-1]]:
            continue
        while len(found) > 1 and (lost[found[-2]] - lost[found[-1]]) * (read[i] - read[found[-1]]) <= \
                (lost[found[-1]] - lost[i]) * (read[found[-1]] - read[found[-2]]):
            found.pop()
        found.append(int(i))
    return found
