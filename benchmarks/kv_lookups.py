"""Facts planted in text, asked for after the text has gone through the KV cache; and what two series of answers differ by."""
from dataclasses import dataclass
from math import sqrt

import numpy as np

PLACES = "harbor garden museum library station bridge castle market tower forest temple valley".split()
COLOURS = "old blue silent northern golden hidden western frozen red quiet distant royal".split()
MANY = 32          # facts of the hardest haystack
GROUP = 8          # facts that share a stretch of text: planted together, or one at a time
ANSWER_TOKENS = 24
Z = 1.959964       # of a 95 % interval


@dataclass(frozen=True)
class Haystack:
    """A chat's opening, a stretch of text, and facts with the places in it where they are planted, first to last."""
    opening: list[int]
    text: list[int]
    places: list[int]           # an index into `text`
    facts: list[list[int]]      # token ids of a sentence
    questions: list[list[int]]  # token ids, up to where the answer begins
    codes: list[str]            # what a right answer contains
    between: list[int]          # from the end of an answer to the next question


def draw(rng, tokenizer, book: list[int], depth: int, together: bool, count: int = GROUP) -> Haystack:
    """A haystack of `depth` tokens at most, its longest question included; `together`: room for all `count` facts, or for the longest."""
    names = [f"{COLOURS[i // len(PLACES)]} {PLACES[i % len(PLACES)]}" for i in rng.permutation(len(PLACES) * len(COLOURS))[:count]]
    codes = [str(rng.integers(10_000, 100_000)) for _ in names]
    before, after = tokenizer.render([{"role": "user", "content": "\0"}]).split("\0")
    turns = [{"role": role, "content": "\0"} for role in ("user", "assistant", "user")]
    between = tokenizer.encode(tokenizer.render(turns).split("\0")[2], special=False)
    # Without special tokens: the template has written a begin token where the model wants one, and none belongs in the middle.
    opening, *pieces = (tokenizer.encode(text, special=False) for text in (
        before, *(f" The secret code of the {name} is {code}." for name, code in zip(names, codes)),
        *(f"\nWhat is the secret code of the {name}?{after}" for name in names)))
    facts, questions = pieces[:count], pieces[count:]
    room = depth - len(opening) - (sum if together else max)(map(len, facts)) - max(map(len, questions))
    if not 0 < room <= len(book):
        raise ValueError(f"a haystack of {depth} tokens takes {room} tokens of text (at least 1, at most the text's {len(book)}): "
                         "change --depths or --text")
    start = int(rng.integers(0, len(book) - room + 1))
    return Haystack(opening, book[start:start + room], sorted(rng.integers(0, room + 1, count).tolist()), facts, questions, codes,
                    between)


def answer(model, tokenizer, sequence, question: list[int]) -> str:
    """The greedy answer to a question put to a prefilled sequence, in a forward call of its own; the sequence grows."""
    out, logits = [], model.forward([(sequence, question)])
    while len(out) < ANSWER_TOKENS and int(logits[0].argmax()) not in tokenizer.end_tokens:
        out.append(int(logits[0].argmax()))
        logits = model.forward([(sequence, out[-1:])])
    return tokenizer.decode(out)


def together(hay: Haystack) -> list[int]:
    """The text with all facts in it."""
    ids, begin = list(hay.opening), 0
    for place, fact in zip(hay.places, hay.facts):
        ids += [*hay.text[begin:place], *fact]
        begin = place
    return ids + hay.text[begin:]


def ask_in_turn(model, tokenizer, hay: Haystack) -> tuple[list[bool], int, int]:
    """All facts in one haystack; the questions follow each other in one conversation."""
    sequence, right = model.new_sequence(), []
    try:
        model.forward([(sequence, together(hay))], "none")
        kv_bytes, tokens = model.kv_bytes(), sequence.length
        for i, (question, code) in enumerate(zip(hay.questions, hay.codes)):
            right.append(code in answer(model, tokenizer, sequence, (hay.between if i else []) + question))
    finally:
        model.free(sequence)
    return right, kv_bytes, tokens


def ask_together(model, tokenizer, hay: Haystack) -> tuple[list[bool], int, int]:
    """All facts in one haystack; each question goes to its own branch. -> (right or not, KV bytes, tokens they are for)."""
    trunk, right = model.new_sequence(), []
    try:
        model.forward([(trunk, together(hay))], "none")
        kv_bytes, tokens = model.kv_bytes(), trunk.length
        for question, code in zip(hay.questions, hay.codes):
            branch = model.fork(trunk)
            try:
                right.append(code in answer(model, tokenizer, branch, question))
            finally:
                model.free(branch)
    finally:
        model.free(trunk)
    return right, kv_bytes, tokens


def ask_alone(model, tokenizer, hay: Haystack) -> tuple[list[bool], int, int]:
    """As ask_together, but GROUP haystacks of one fact each. They share the text up to the fact, which is prefilled once."""
    trunk, begin, right, kv_bytes, tokens = model.new_sequence(), 0, [], 0, 0
    ahead = list(hay.opening)
    try:
        for place, fact, question, code in zip(hay.places, hay.facts, hay.questions, hay.codes):
            ahead += hay.text[begin:place]
            if ahead:
                model.forward([(trunk, ahead)], "none")
            ahead, begin = [], place
            branch = model.fork(trunk)
            try:
                model.forward([(branch, fact + hay.text[place:])], "none")
                kv_bytes, tokens = max(kv_bytes, model.kv_bytes()), max(tokens, branch.length)
                right.append(code in answer(model, tokenizer, branch, question))
            finally:
                model.free(branch)
    finally:
        model.free(trunk)
    return right, kv_bytes, tokens


def look_up(model, tokenizer, book, depth, kind, count, advance) -> dict:
    """{"right": [groups][GROUP] of 0 and 1, "kv_bytes", "tokens"}; the same questions for every model. kind: facts in a haystack, 1,
    GROUP or MANY; 0: GROUP of them asked for in turn."""
    rng, found = np.random.default_rng([kind, depth]), []
    ask = {0: ask_in_turn, 1: ask_alone}.get(kind, ask_together)
    each = MANY if kind == MANY else GROUP
    for _ in range(-(-count // each)):
        found.append(ask(model, tokenizer, draw(rng, tokenizer, book, depth, kind != 1, each)))
        advance(each)
    right, kv_bytes, tokens = zip(*found)
    right = [row[i:i + GROUP] for row in right for i in range(0, each, GROUP)]
    return {"right": [[int(x) for x in row] for row in right], "kv_bytes": max(kv_bytes), "tokens": max(tokens)}


# ---- two series of answers ---------------------------------------------------------------------------------------
def difference(right, base) -> tuple[float, float, float]:
    """Share right less the base's over the same questions, and its 95 % interval; arguments are [haystacks, GROUP] of 0 and 1.

    Newcombe's method 10 for paired proportions (Statistics in Medicine 17, 1998, 2635-2650), which has a width even where no
    answer changes. It takes pairs as independent; those of one haystack are not, so their number is divided by the design effect
    (Rao and Scott, Biometrics 48, 1992, 577-585), the variance between haystacks over that of independent pairs, when above 1.
    """
    right, base = np.asarray(right, float), np.asarray(base, float)
    both, gained, lost = (right * base).sum(), (right * (1 - base)).sum(), ((1 - right) * base).sum()
    mean, deff = (right - base).mean(), 1.0
    independent = (right - base).var() / right.size
    if len(right) > 1 and independent:
        deff = max(1.0, (right - base).mean(1).var(ddof=1) / len(right) / independent)
    return mean, *paired_interval(*(x / deff for x in (both, gained, lost, right.size - both - gained - lost)))


def paired_interval(both: float, gained: float, lost: float, neither: float) -> tuple[float, float]:
    """Newcombe's method 10: limits of (both + gained) / n - (both + lost) / n."""
    n = both + gained + lost + neither
    p1, p2 = (both + gained) / n, (both + lost) / n
    (low1, high1), (low2, high2) = wilson(p1, n), wilson(p2, n)
    product = p1 * (1 - p1) * p2 * (1 - p2) * n ** 4
    dependence = both * neither - gained * lost
    phi = (max(dependence - n / 2, 0) if dependence > 0 else dependence) / sqrt(product) if product else 0

    def reach(down, up):
        return sqrt(max(0, down ** 2 - 2 * phi * down * up + up ** 2))
    return p1 - p2 - reach(p1 - low1, high2 - p2), p1 - p2 + reach(p2 - low2, high1 - p1)


def wilson(p: float, n: float) -> tuple[float, float]:
    """Wilson's score interval of a share p of n."""
    middle, half = p + Z ** 2 / (2 * n), Z * sqrt(p * (1 - p) / n + Z ** 2 / (4 * n * n))
    return (middle - half) / (1 + Z ** 2 / n), (middle + half) / (1 + Z ** 2 / n)
