"""Constrained decoding through llguidance: a JSON schema decides which tokens may come next."""
import json

import numpy as np

from edgeattn.apps.server.logits import NEVER

LONGEST = 1 << 17  # characters of a schema; OpenAI takes 120,000
COMPACT = {"whitespace_flexible": False}  # a small model may else write blanks for ever


class Constraints:
    """Grammars over the tokens of one tokenizer. ValueError from `schema`: the schema is wrong or asks for too much."""

    def __init__(self, tokenizer, vocab_size: int):
        from llguidance import LLTokenizer
        most = max(vocab_size, tokenizer.backend.get_vocab_size(with_added_tokens=True))  # either may have tokens that the other lacks
        self._tokenizer = LLTokenizer(tokenizer.backend.to_str(), n_vocab=most, eos_token=sorted(tokenizer.end_tokens) or None)

    def schema(self, schema: dict) -> "Matcher":
        """At the beginning of the JSON texts that a schema allows."""
        from llguidance import LLMatcher
        if len(text := json.dumps(schema)) > LONGEST:
            raise ValueError(f"the JSON schema has {len(text)} characters, and {LONGEST} are the most")
        matcher = LLMatcher(self._tokenizer, LLMatcher.grammar_from_json_schema(text, defaults=COMPACT), log_level=0)
        _check(matcher)
        return Matcher(matcher)

    def bytes_of(self, token: int) -> bytes:
        """A token's bytes, which need not be whole characters."""
        return self._tokenizer.decode_bytes([token])


def _check(matcher):
    if why := matcher.get_error():
        raise ValueError(f"the JSON schema cannot be followed: {' '.join(why.split())[:300]}")


class Matcher:
    """An answer's place in a grammar."""

    def __init__(self, matcher):
        self._matcher = matcher

    def copy(self) -> "Matcher":
        """Another answer at the same place: grammars take a while to be made."""
        return Matcher(self._matcher.deep_copy())

    def mask(self, logits: np.ndarray) -> np.ndarray:
        """A copy in which no forbidden token can be chosen."""
        allowed = np.unpackbits(np.frombuffer(self._matcher.compute_bitmask(), np.uint8), bitorder="little")[:len(logits)]
        _check(self._matcher)
        return np.where(allowed, logits, NEVER)

    def accept(self, token: int) -> bool:
        """Take a chosen token -> whether nothing may follow."""
        self._matcher.consume_token(token)
        return self._matcher.is_stopped()
