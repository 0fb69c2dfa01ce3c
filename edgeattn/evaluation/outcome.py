"""What a task found with one setting: values in clusters, and what they say alone or beside another setting's."""
import math
from dataclasses import dataclass, field

import numpy as np

from edgeattn.evaluation import statistics

KINDS = {  # kind of values -> (their unit in tables, whether more is better)
    "share": ("% right", True),           # 0 or 1 each
    "perplexity": ("perplexity", False),  # losses in nats a token; the score is the exponential of their mean
    "divergence": ("nats", False),        # numbers as they are
    "quality": ("%", True),               # the same, from 0 to 1
}


@dataclass
class Outcome:
    """
    kind      of KINDS
    values    a list for each cluster (a haystack, a window of text)
    metrics   whatever else was counted, by name
    kv_bytes  of the cache, with all of a sample's text in it; the most of all samples
    tokens    that stood in it
    """
    kind: str
    values: list[list[float]]
    metrics: dict[str, float] = field(default_factory=dict)
    kv_bytes: int = 0
    tokens: int = 0

    @property
    def samples(self) -> int:
        return sum(map(len, self.values))

    def add(self, values: list, kv_bytes: int, tokens: int) -> None:
        """One cluster more."""
        self.values.append(values)
        self.kv_bytes, self.tokens = max(self.kv_bytes, kv_bytes), max(self.tokens, tokens)

    def record(self) -> dict:
        """As JSON takes it."""
        score, low, high = self.score()
        return {"unit": KINDS[self.kind][0], "samples": self.samples, "score": score, "low": low, "high": high, "metrics": self.metrics,
                "kv_bytes": self.kv_bytes, "tokens": self.tokens, "values": {"kind": self.kind, "of": self.values}}

    @classmethod
    def of(cls, record: dict) -> "Outcome":
        """The outcome of a record."""
        return cls(record["values"]["kind"], record["values"]["of"], record["metrics"], record["kv_bytes"], record["tokens"])

    def score(self) -> tuple[float, float | None, float | None]:
        """(score, low, high): a 95 % interval, None where one cluster alone says nothing of others."""
        found = statistics.share(self.values) if self.kind == "share" else statistics.mean(self.values)
        return _exponential(found) if self.kind == "perplexity" else found

    def against(self, base: "Outcome") -> tuple[float, float | None, float | None]:
        """The difference from another setting's over the same questions, and its interval: of scores; of perplexity the relative change."""
        if self.kind == "share":
            return statistics.difference(self.values, base.values)
        found = statistics.mean([np.subtract(a, b) for a, b in zip(self.values, base.values, strict=True)])
        return tuple(x and math.expm1(x) for x in found) if self.kind == "perplexity" else found


def _exponential(values):
    return tuple(None if x is None else math.exp(x) for x in values)
