"""Streaming heads keep a part of the context, and one token that stands for what they dropped (RazorAttention, arXiv 2407.15891).

The window is context / part, at least `least`. The paper's least is 4,000: contexts on small devices would never reach it, and nothing
would be saved.
"""
from dataclasses import dataclass


@dataclass(frozen=True)
class Razor:
    least: int = 256    # tokens
    part: int = 5

    compensated = True

    def recent(self, context):
        return max(self.least, context // self.part)
