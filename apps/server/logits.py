"""What a request does to logits before a token is chosen, and the log probabilities it is told."""
from dataclasses import dataclass

import numpy as np

NEVER = np.float32(-1e30)  # a logit that no token is chosen by; finite, so that no sum becomes a NaN


@dataclass(frozen=True)
class TokenScore:
    """A token's log probability (None: nothing stands before it) and the likeliest tokens there, [(id, log probability)]."""
    token: int
    logprob: float | None
    top: tuple[tuple[int, float], ...]


def score(logprobs: np.ndarray, token: int, top: int) -> TokenScore:
    """`top`: how many of the likeliest tokens are named."""
    best = np.argpartition(-logprobs, top - 1)[:top] if top else np.arange(0)
    best = best[np.argsort(-logprobs[best], kind="stable")]
    return TokenScore(int(token), float(logprobs[token]), tuple((int(i), float(logprobs[i])) for i in best))


@dataclass(frozen=True)
class Shaping:
    """OpenAI's changes to logits: a bias of single tokens, and less for what the answer already has. -100 bans a token."""
    bias: tuple[tuple[int, float], ...] = ()
    presence: float = 0.0
    frequency: float = 0.0

    def apply(self, logits: np.ndarray, answer: list[int]) -> np.ndarray:
        """A changed copy, or `logits` where nothing is to change."""
        penalised = answer and (self.presence or self.frequency)
        if not (self.bias or penalised):
            return logits
        logits = logits.copy()
        if penalised:
            seen, counts = np.unique(answer, return_counts=True)
            logits[seen] -= (self.presence + self.frequency * counts).astype(np.float32)
        for token, value in self.bias:
            logits[token] = NEVER if value <= -100 else logits[token] + np.float32(value)
        return logits
