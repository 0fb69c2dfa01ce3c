"""Release whole pages and rebuild those that a new prompt asks for (after ADORE, arXiv 2407.02328, without its trained controller).

Pages go by the attention they received, as in h2o, summed over their tokens and over all layers and heads: a page goes in all of them, so
that its tokens can be computed again. Mean keys of the pages that are gone tell which ones a prompt is about. Other than the scoring
methods this one needs the model: cache/release.py drops pages, edgeattn/rebuild.py brings them back.
"""
from dataclasses import dataclass

import numpy as np

from edgeattn.policies.eviction.h2o import H2o


@dataclass(frozen=True)
class Adore(H2o):
    rebuilt: int = 4   # pages that a new prompt brings back at least, as far as there are any

    def interest(self, means: np.ndarray, query: np.ndarray) -> np.ndarray:
        """means [pages, layers, kv_heads, head_dim], query [layers, kv_heads, head_dim] -> [pages] float32, the higher the sooner it is
        rebuilt: the pages' shares of attention by their mean keys, summed over layers and heads."""
        scores = np.einsum("plhd,lhd->plh", means.astype(np.float32), query) * query.shape[-1] ** -0.5
        weights = np.exp(scores - scores.max(0))
        return (weights / weights.sum(0)).sum((1, 2), dtype=np.float32)
