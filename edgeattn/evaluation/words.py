"""Words, names, codes and text that tasks are made of, all from a seed and from what is in this folder."""
from pathlib import Path

import numpy as np

PLACES = "harbor garden museum library station bridge castle market tower forest temple valley".split()
COLOURS = "old blue silent northern golden hidden western frozen red quiet distant royal".split()
HAYSTACK = Path(__file__).with_name("haystack.txt")  # made by benchmarks/haystack.py
SYLLABLES = "ba ce di fo gu ha je ki lo mu na pe ri so tu va we xi yo zu".split()


def names(rng: np.random.Generator, count: int) -> list[str]:
    """Different ones, "hidden castle"; there are len(COLOURS) * len(PLACES)."""
    return [f"{COLOURS[i // len(PLACES)]} {PLACES[i % len(PLACES)]}" for i in rng.permutation(len(PLACES) * len(COLOURS))[:count]]


def codes(rng: np.random.Generator, count: int) -> list[str]:
    """Numbers of five digits."""
    return [str(rng.integers(10_000, 100_000)) for _ in range(count)]


def coined(rng: np.random.Generator, count: int) -> list[str]:
    """Different words of three syllables that no language has."""
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(rng.choice(SYLLABLES, 3))] = None
    return list(found)


def book(tokenizer, path=None, least: int = 0, seed: int = 0) -> list[int]:
    """Token ids of the text that facts are hidden in: a file's, or this folder's; at least `least` of them. A shorter text comes again, its
    paragraphs in another order. OSError, ValueError: the file is not there, or holds no text."""
    text = Path(path or HAYSTACK).read_text(encoding="utf-8", errors="replace")
    ids, rng, parts = tokenizer.encode(text, special=False), np.random.default_rng(seed), text.split("\n\n")
    if not ids:
        raise ValueError(f"{path}: holds no text")
    while len(ids) < least:
        ids += tokenizer.encode("\n\n" + "\n\n".join(parts[i] for i in rng.permutation(len(parts))), special=False)
    return ids
