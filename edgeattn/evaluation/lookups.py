"""Codes of places, planted in text and asked for one by one: nano was trained to answer these, and others can."""
import numpy as np

from edgeattn.evaluation import words
from edgeattn.evaluation.asking import Haystack, ask_alone, ask_in_turn, ask_together, plant

MANY = 32          # facts of the hardest haystack
GROUP = 8          # facts that share a stretch of text: planted together, or one at a time


def fact(name: str, code: str) -> str:
    return f" The secret code of the {name} is {code}."


def question(name: str) -> str:
    return f"\nWhat is the secret code of the {name}?"


def draw(rng, tokenizer, book: list[int], length: int, together: bool, count: int = GROUP, places: list[float] | None = None) -> Haystack:
    """A haystack of `length` tokens at most with `count` facts and a question for each; other arguments as in `plant`."""
    names, codes = words.names(rng, count), words.codes(rng, count)
    return plant(rng, tokenizer, book, length, [fact(*pair) for pair in zip(names, codes)], [question(name) for name in names],
                 [[code] for code in codes], together, places)


def look_up(model, tokenizer, book, length, kind, count, advance, seed: int = 0) -> dict:
    """{"right": a list of 0 and 1 for each stretch of text, "kv_bytes", "tokens"}; the same questions for every model. kind: facts in a
    haystack, 1, GROUP or MANY; 0: GROUP of them asked for in turn."""
    rng, found = np.random.default_rng([kind, length, *[seed] * bool(seed)]), []
    ask = {0: ask_in_turn, 1: ask_alone}.get(kind, ask_together)
    each = MANY if kind == MANY else GROUP
    for _ in range(-(-count // each)):
        found.append(ask(model, tokenizer, draw(rng, tokenizer, book, length, kind != 1, each)))
        advance(each)
    right, kv_bytes, tokens = zip(*found)
    return {"right": list(right), "kv_bytes": max(kv_bytes), "tokens": max(tokens)}
