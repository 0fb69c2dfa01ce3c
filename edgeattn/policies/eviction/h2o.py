"""Keep heavy hitters (H2O, arXiv 2306.14048). The score is all attention a token has received from probed queries.

The sum favours early tokens, which more queries could see; zip_saliency divides by their number.
"""
from dataclasses import dataclass


@dataclass(frozen=True)
class H2o:
    mass, probes = "sum", 64

    def scores(self, heads):
        return heads.mass.copy()
