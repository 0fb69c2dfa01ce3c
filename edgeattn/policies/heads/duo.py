"""Streaming heads keep the first page and a window of fixed length (DuoAttention, arXiv 2410.10819)."""
from dataclasses import dataclass


@dataclass(frozen=True)
class Duo:
    window: int = 256    # tokens, as in the paper

    compensated = False

    def recent(self, context):
        return self.window
