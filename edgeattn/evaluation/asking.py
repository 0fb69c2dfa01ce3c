"""Facts planted in text, asked for after the text has gone through the KV cache: so nothing can be kept with the question in view."""
from dataclasses import dataclass

import numpy as np

from edgeattn.cache.pages import PagePool
from edgeattn.page_formats import PAGE

ANSWER_TOKENS = 24
FRAME_TOKENS = 100  # at most, of a chat's frame, an introduction and a question
SLACK = 256  # tokens of cache for pages that a question's branch copies
PLAIN = ("", "\nAnswer:")  # around a question, for models without a chat template


@dataclass(frozen=True)
class Haystack:
    """A chat's opening, a stretch of text, and facts with the places in it where they are planted, first to last."""
    opening: list[int]
    text: list[int]
    places: list[int]           # an index into `text`
    facts: list[list[int]]      # token ids of a sentence
    questions: list[list[int]]  # token ids, up to where the answer begins
    wanted: list[list[str]]     # of each question, what a right answer contains
    between: list[int]          # from the end of an answer to the next question


def frame(tokenizer) -> tuple[str, str, str]:
    """A chat's text up to a user's words, behind them up to the answer, and from there to the user's next words."""
    try:
        before, after = tokenizer.render([{"role": "user", "content": "\0"}]).split("\0")
        turns = [{"role": role, "content": "\0"} for role in ("user", "assistant", "user")]
        return before, after, tokenizer.render(turns).split("\0")[2]
    except ValueError:  # no template: a base model
        return *PLAIN, "\n"


def plant(rng, tokenizer, book: list[int], length: int, sentences: list[str], questions: list[str], wanted: list[list[str]],
          together: bool = True, places: list[float] | None = None) -> Haystack:
    """A haystack of `length` tokens at most, its longest question included. together: room for all sentences, or for the longest of them.
    places: where they stand, 0 to 1; random without. ValueError: no room, or the book is too short."""
    before, after, between = frame(tokenizer)
    # Without special tokens: the template has written a begin token where the model wants one, and none belongs in the middle.
    opening, between, *pieces = (tokenizer.encode(text, special=False) for text in (
        before, between, *sentences, *(question + after for question in questions)))
    facts, asked = pieces[:len(sentences)], pieces[len(sentences):]
    room = length - len(opening) - (sum if together else max)(map(len, facts)) - max(map(len, asked))
    if room < 1:
        raise ValueError(f"{length} tokens are too few: facts and question take {length - room}; raise --lengths")
    if room > len(book):
        raise ValueError(f"a haystack of {length} tokens takes {room} tokens of text, there are {len(book)}; give a longer --text")
    start = int(rng.integers(0, len(book) - room + 1))
    spots = sorted(rng.integers(0, room + 1, len(facts)).tolist()) if places is None else [round(place * room) for place in places]
    return Haystack(opening, book[start:start + room], spots, facts, asked, wanted, between)


def listed(tokenizer, words: list[str], intro: str, question: str, wanted: list[str]) -> Haystack:
    """A haystack that is a list of words and one question to it."""
    before, after, between = frame(tokenizer)
    opening, text, asked, between = (tokenizer.encode(part, special=False) for part in (
        before, f"{intro} {' '.join(words)}", question + after, between))
    return Haystack(opening, text, [], [], [asked], [wanted], between)


def fitting(tokenizer, words: list[str], room: int) -> list[str]:
    """As many of the words, from the first on, as `room` tokens hold."""
    sizes = np.cumsum([len(tokenizer.encode(f" {word}", special=False)) for word in words])
    return words[:int(np.searchsorted(sizes, room, "right"))]


def answer(model, tokenizer, sequence, question: list[int], limit: int = ANSWER_TOKENS) -> str:
    """The greedy answer to a question put to a prefilled sequence, in a forward call of its own; the sequence grows."""
    out, logits = [], model.forward([(sequence, question)])
    while len(out) < limit and int(logits[0].argmax()) not in tokenizer.end_tokens:
        out.append(int(logits[0].argmax()))
        logits = model.forward([(sequence, out[-1:])])
    return tokenizer.decode(out)


def found(text: str, wanted: list[str]) -> list[int]:
    """Which of the wanted strings stand in an answer: 0 or 1 each, whatever their case."""
    return [int(one.lower() in text.lower()) for one in wanted]


def together(hay: Haystack) -> list[int]:
    """The text with all facts in it."""
    ids, begin = list(hay.opening), 0
    for place, fact in zip(hay.places, hay.facts):
        ids += [*hay.text[begin:place], *fact]
        begin = place
    return ids + hay.text[begin:]


def ask_in_turn(model, tokenizer, hay: Haystack, limit: int = ANSWER_TOKENS) -> tuple[list[int], int, int]:
    """All facts in one haystack; the questions follow each other in one conversation."""
    sequence, right = model.new_sequence(), []
    try:
        model.forward([(sequence, together(hay))], "none")
        kv_bytes, tokens = model.kv_bytes(), sequence.length
        for i, (question, wanted) in enumerate(zip(hay.questions, hay.wanted)):
            right += found(answer(model, tokenizer, sequence, (hay.between if i else []) + question, limit), wanted)
    finally:
        model.free(sequence)
    return right, kv_bytes, tokens


def ask_together(model, tokenizer, hay: Haystack, limit: int = ANSWER_TOKENS) -> tuple[list[int], int, int]:
    """All facts in one haystack; each question goes to its own branch. -> (right or not, KV bytes, tokens they are for)."""
    trunk, right = model.new_sequence(), []
    try:
        model.forward([(trunk, together(hay))], "none")
        kv_bytes, tokens = model.kv_bytes(), trunk.length
        for question, wanted in zip(hay.questions, hay.wanted):
            branch = model.fork(trunk)
            try:
                right += found(answer(model, tokenizer, branch, question, limit), wanted)
            finally:
                model.free(branch)
    finally:
        model.free(trunk)
    return right, kv_bytes, tokens


def ask_alone(model, tokenizer, hay: Haystack) -> tuple[list[int], int, int]:
    """As ask_together, but a haystack of one fact for each question. They share the text up to the fact, which is prefilled once."""
    trunk, begin, right, kv_bytes, tokens = model.new_sequence(), 0, [], 0, 0
    ahead = list(hay.opening)
    try:
        for place, fact, question, wanted in zip(hay.places, hay.facts, hay.questions, hay.wanted):
            ahead += hay.text[begin:place]
            if ahead:
                model.forward([(trunk, ahead)], "none")
            ahead, begin = [], place
            branch = model.fork(trunk)
            try:
                model.forward([(branch, fact + hay.text[place:])], "none")
                kv_bytes, tokens = max(kv_bytes, model.kv_bytes()), max(tokens, branch.length)
                right += found(answer(model, tokenizer, branch, question), wanted)
            finally:
                model.free(branch)
    finally:
        model.free(trunk)
    return right, kv_bytes, tokens


def widen(model) -> None:
    """Room for a haystack and a branch of it side by side. How much each sequence may hold is still what the context and budget say. On a
    GPU nothing changes: there branches need a context with room for them."""
    cache = model.cache
    if model.device != "cpu":
        return
    for i, pool in enumerate(cache.pools):
        count = len(pool.references)
        more = 2 * count if cache.options.budget else cache.shape[0] * cache.shape[1] * SLACK // PAGE
        cache.pools[i] = PagePool(pool.format, count + more)
        cache.table[i] = cache.pools[i].pages.table_row()
