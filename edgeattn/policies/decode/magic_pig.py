"""After MagicPIG (arXiv 2410.16179): pages with tokens whose signatures collide with a query's.

A signature says, table by table, on which side of `bits` random planes a key lies, centred by the mean key of a fixed early stretch (which
softmax does not see). A token collides that shares all bits with some query head in two tables at least; a page is worth the collisions
of its tokens, and one without is not read, so a list may be shorter than its budget. The paper weighs each sampled token by its chance to
be sampled, which makes its output an estimate of dense attention; here pages are read whole, most of their tokens not by chance, so weights
are left as they are.

The paper keeps 10 bits in 150 tables, 200 bytes a token, more than 4-bit keys and values. Here a page's signatures take 512 bytes with the
defaults, 16 bytes a token, a quarter of its keys in 4 bits at 128 channels: of tokens at cosine 0.6 with a query a quarter collide, at
cosine 0 one in 570.
"""
from dataclasses import dataclass

import numpy as np

from edgeattn.policies.decode import SelectionPolicy


@dataclass(frozen=True)
class MagicPig(SelectionPolicy):
    """
    bits    planes of a table
    tables  of signatures; each takes a byte a token
    seed    of the planes
    """
    bits: int = 8
    tables: int = 16
    seed: int = 0

    score, index = "collisions", "collisions"

    def __post_init__(self):
        super().__post_init__()
        if not 1 <= self.bits <= 8 or not 2 <= self.tables <= 255:
            raise ValueError(f"need bits from 1 to 8 and tables from 2 to 255, got {self.bits=} {self.tables=}")

    @property
    def index_size(self) -> int:
        return self.tables

    def load(self, folder, config):
        shape = self.tables, self.bits, config["model"]["head_dim"]
        return np.random.default_rng(self.seed).standard_normal(shape, np.float32)

    def operators(self, layer):
        return [(name, options | {"bits": self.bits}) for name, options in super().operators(layer)]
