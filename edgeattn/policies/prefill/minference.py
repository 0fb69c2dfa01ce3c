"""MInference 1.0 (arXiv 2407.02490): each head has one of three patterns, found once for a model; what fills it is found for each prompt.

A-shape reads the first `n_v` keys and the `n_s` nearest. Vertical-slash looks at the last queries' true weights and reads the `n_v` keys
and the `n_s` distances with most of them: keys one by one, distances as the pages they pass through. Block-sparse takes pages, `n_v` keys
in all, by means of queries and keys. Sizes are the paper's, in tokens; they were made for 30,000 and more, so that short prompts are read
whole unless calibrated. The last queries are each chunk's, where the paper has the prompt's only.
"""
from dataclasses import dataclass
from itertools import product
from typing import ClassVar

import numpy as np

from edgeattn.calibration import load_heads
from edgeattn.policies.prefill import PrefillPolicy
from edgeattn.prefill_plan import PAGE, QUERIES, best, by_distance, causal, ends, pool, slash_pages, true_weights

A_SHAPE, VERTICAL_SLASH, BLOCK_SPARSE = range(3)
NAME = "minference_patterns"  # [layers, heads, 3] int32 of calibration.safetensors: which of the three, n_v, n_s
VERTICALS, SLASHES = 30, 100  # the first keys and the nearest distances always come first
CHUNK = 512                   # queries that calibration looks at together


@dataclass(frozen=True)
class Minference(PrefillPolicy):
    """n_v, n_s  keys and distances of heads without a calibration, which are all vertical-slash; and of all heads where they are not the
              defaults
    rows      last queries whose weights decide

    A calibrated pattern's sizes are for prompts as long as the calibration's: of one several times as long they read a smaller part.
    Assets: "patterns" [layers, heads, 3] int32: which of the three, n_v, n_s.
    """
    n_v: int = 1000
    n_s: int = 6096
    rows: int = 64

    CANDIDATES: ClassVar[tuple] = ((A_SHAPE, 100, 800), (VERTICAL_SLASH, 30, 800), (VERTICAL_SLASH, 100, 750), (VERTICAL_SLASH, 500, 700),
                                   (VERTICAL_SLASH, 3500, 100), (BLOCK_SPARSE, 3750, 0))  # for LENGTH tokens
    LENGTH: ClassVar[int] = 30_000

    def __post_init__(self):
        super().__post_init__()
        if self.n_v < 0 or self.n_s < 0 or self.rows < 1:
            raise ValueError(f"need n_v and n_s >= 0 and rows >= 1, got {self.n_v=} {self.n_s=} {self.rows=}")

    def operators(self):
        about = {"sink": self.sink, "recent": self.recent, "sampled": self.rows, "n_v": self.n_v, "n_s": self.n_s}
        return [("choose_by_lines", about)] if self.rows <= QUERIES else []

    def single_keys(self, assets, group):
        if assets is None:
            return group * self.n_v
        kind, n_v, _ = assets["patterns"].reshape(-1, group, 3).transpose(2, 0, 1)
        return int(np.where(kind == BLOCK_SPARSE, 0, n_v).sum(1).max())

    def choose(self, q, k, scale, layer, head, assets):
        group, n, m = len(q), q.shape[1], len(k)
        default = np.broadcast_to([VERTICAL_SLASH, self.n_v, self.n_s], (group, 3))
        kind, n_v, n_s = (default if assets is None else assets["patterns"][layer, head * group:(head + 1) * group]).T
        verticals, slashes = (np.broadcast_to(np.arange(m) < x[:, None], (group, m)).copy() for x in (n_v, n_s))
        if (found := kind == VERTICAL_SLASH).any():
            rows = np.arange(max(0, n - self.rows), n)
            weights, allowed = true_weights(q[found], k, rows, scale), np.ones(m, bool)
            by_key, by_slash = weights.sum(1), by_distance(weights, m - n + rows)
            by_key[:, :VERTICALS], by_slash[:, :SLASHES] = np.inf, np.inf
            verticals[found], slashes[found] = best(by_key, allowed, n_v[found]), best(by_slash, allowed, n_s[found])
        blocks, columns = slash_pages(slashes, n, m), verticals[:, None] & (np.arange(m) < ends(n, m)[:, None])
        if (found := kind == BLOCK_SPARSE).any():
            scores = pool(q[found], QUERIES) @ pool(k, PAGE).T
            blocks[found], columns[found] = best(scores, causal(n, m), np.repeat(n_v[found, None] // PAGE, scores.shape[1], 1)), False
        return blocks, columns

    def load(self, folder, config):
        found = None if (self.n_v, self.n_s) != (Minference.n_v, Minference.n_s) else load_heads(folder, config, NAME, 3)
        if found is not None and not np.isin(found[..., 0], (A_SHAPE, VERTICAL_SLASH, BLOCK_SPARSE)).all():
            raise ValueError(f"{folder}: {NAME} has a pattern that is none of three: calibrate again: "
                             f"edgeattn calibrate -m {folder} --parts prefill")
        return None if found is None else {"patterns": np.ascontiguousarray(found, np.int32)}

    @classmethod
    def calibrate(cls, q, k, v, scale, candidates=CANDIDATES, length=LENGTH, density=0.5):
        """A layer's patterns: of the candidates, each head's with the highest mean recall over all prompts.

        q, k, v     a list each, of prompts: [heads, n, head_dim] and [kv_heads, m, head_dim] twice
        candidates  (pattern, n_v, n_s) for prompts of `length` tokens, of which the mean prompt here needs its share
        density     candidates that read more than this do not count, unless all do: at the paper's 1 the largest wins on short prompts
        """
        share = min(1, np.mean([x.shape[1] for x in k]) / length)
        patterns = np.array([(kind, max(PAGE, round(n_v * share)), round(n_s * share)) for kind, n_v, n_s in candidates], np.int32)
        group, found = len(q[0]) // len(k[0]), np.zeros((len(patterns), len(q[0]), 2))
        for queries, keys in zip(q, k):
            n, m = queries.shape[1], keys.shape[1]
            for head, start in product(range(len(keys)), range(0, n, CHUNK)):
                own, end = slice(head * group, (head + 1) * group), min(n, start + CHUNK)
                found[:, own] += cls._measure(queries[own, start:end], keys[head, :m - n + end], scale, patterns)
        recalls, read = np.moveaxis(found, 2, 0) / sum(x.shape[1] for x in q)
        allowed = (read <= density) | ((read > density).all(0) & (read == read.min(0)))
        return {"patterns": patterns[np.where(allowed, recalls, -1).argmax(0)]}

    @classmethod
    def _measure(cls, q, k, scale, patterns):
        """[patterns, group, 2]: a chunk's recall and density for each head, times its queries."""
        (group, n), m, found = q.shape[:2], len(k), []
        weights, pairs = true_weights(q, k, np.arange(n), scale), n * (m - n) + n * (n + 1) / 2
        for pattern in patterns:
            mask = cls().select(q, [k], scale, 0, {"patterns": np.tile(pattern, (1, group, 1))}).mask()
            found.append(np.stack([np.einsum("gnm,gnm->g", weights, mask), mask.sum((1, 2)) * (n / pairs)], 1))
        return np.stack(found)
