"""Perplexity of a text: how unlikely the model finds each next token. Only for models of one tokenizer are these figures to compare."""
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from edgeattn.evaluation import Source
from edgeattn.evaluation.outcome import Outcome
from edgeattn.evaluation.windows import log_probabilities, windows


@dataclass(frozen=True)
class Perplexity:
    """decode: tokens at the end of each window that are computed one at a time, as generated ones are; metrics tell them apart."""
    decode: int = 128

    samples: ClassVar[int] = 4
    length: ClassVar[int] = 4096
    room: ClassVar[int] = 0

    def total(self, source: Source) -> int:
        if source.text is None:
            raise ValueError("perplexity is of a text that the model has not seen: give one with --text FILE")
        return source.samples * source.length

    def measure(self, model, tokenizer, source: Source, advance) -> Outcome:
        self.total(source)
        losses, kv_bytes = [], 0
        for ids in windows(tokenizer, source):
            row = np.empty(len(ids) - 1)
            for start, logs, held in log_probabilities(model, ids, min(self.decode, len(ids) - 1)):
                targets = ids[start + 1:start + 1 + len(logs)]
                row[start:start + len(targets)] = -logs[np.arange(len(targets)), targets]
                kv_bytes = max(kv_bytes, held)
                advance(len(logs))
            losses.append(row)
        found = Outcome("perplexity", [[float(row.mean())] for row in losses], {}, kv_bytes, source.length)
        if self.decode:
            found.metrics["perplexity of decoded tokens"] = float(np.exp(np.mean([row[-self.decode:].mean() for row in losses])))
        return found
