"""Logits of windows of text, a piece at a time."""
from collections.abc import Iterator

import numpy as np

from edgeattn.evaluation import Source, words
from edgeattn.log_softmax import log_softmax

PIECE = 512  # rows of logits that are held at once, at most


def windows(tokenizer, source: Source) -> np.ndarray:
    """[windows, length] int64 token ids: as many as the source wants and its text has. ValueError: not one."""
    ids = words.book(tokenizer, source.text, 0 if source.text else source.samples * source.length, source.seed)
    count = min(source.samples, len(ids) // source.length)
    if not count:
        raise ValueError(f"{source.text}: {len(ids)} tokens, less than a window of {source.length}; give a longer --text or smaller "
                         "--lengths")
    return np.array(ids[:count * source.length], np.int64).reshape(count, source.length)


def log_probabilities(model, ids: np.ndarray, decode: int) -> Iterator[tuple[int, np.ndarray, int]]:
    """(first token, [tokens, vocab] float64, bytes in the cache) of pieces of a window. The last `decode` tokens are computed one at a
    time, as generated ones are, the others in chunks, of which each sees its own tokens before they are stored, and earlier ones as the
    cache gives them back."""
    sequence, first = model.new_sequence(), len(ids) - decode
    piece = max(1, PIECE // model.ubatch) * model.ubatch
    try:
        for start in range(0, first, piece):
            part = ids[start:min(start + piece, first)]
            yield start, log_softmax(model.forward([(sequence, part)], "all")), model.kv_bytes()
        for start in range(first, len(ids)):
            yield start, log_softmax(model.forward([(sequence, ids[start:start + 1])])), model.kv_bytes()
    finally:
        model.free(sequence)
