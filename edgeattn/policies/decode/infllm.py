"""Block retrieval after InfLLM (arXiv 2402.04617) and LongHeads (2402.10685): whole blocks of 128 tokens, one choice for a layer's heads.

A block is known by the mean of its four most telling keys. InfLLM takes those that received most attention from tokens nearby; the index
sees keys alone, so here they are the four least like the block's mean direction (KeyDiff's measure, arXiv 2504.15364). Keys keep their
rotary positions: this extends what is affordable, not the length that a model was trained for. The first block and what follows the last
whole one are always read. The paper reads 4,096 recent tokens and 16 blocks: budget 6272, recent 128.
"""
from dataclasses import dataclass

from edgeattn.policies.decode import SelectionPolicy


@dataclass(frozen=True)
class Infllm(SelectionPolicy):
    score, combine, index, block = "representatives", "layer", "representatives", 4
