"""Text from a model: sampling, stop strings, end tokens, and conversations that reuse what the cache already holds."""
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from edgeattn.cache.pages import CacheFull
from edgeattn.context_shift import ContextShift
from edgeattn.ops import load_kernel

REASONS = {"stop": "the model ended, or a stop string came", "length": "the token limit was reached",
           "context": "the context is full", "cancelled": "interrupted"}


@dataclass(frozen=True)
class SamplerOptions:
    """How the next token is chosen; the meaning of each is in reference/sample.py. temperature <= 0 is greedy."""
    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    repeat_last_n: int = 64   # how many of the last tokens are penalised; 0 none, -1 all
    seed: int | None = None   # None or negative: a new one every time

    def __post_init__(self):
        bad = [(name, want) for name, want, good in (
            ("temperature", "a number", self.temperature == self.temperature),
            ("top_k", "0 (off) or more", self.top_k >= 0),
            ("top_p", "more than 0, at most 1", 0 < self.top_p <= 1),
            ("min_p", "0 to 1", 0 <= self.min_p <= 1),
            ("repeat_penalty", "more than 0", self.repeat_penalty > 0),
            ("repeat_last_n", "-1 (all), 0 (off) or more", self.repeat_last_n >= -1)) if not good]
        for name, want in bad:
            raise ValueError(f"{name} must be {want}, got {getattr(self, name)}")


class Sampler:
    """Chooses tokens by one SamplerOptions; the same seed gives the same choices."""

    def __init__(self, options: SamplerOptions, kernel: Callable | None = None, state: dict | None = None):
        """state: another sampler's, to go on where it was, unless the options ask for another seed. ValueError: it is not one."""
        self.options = options
        self.seed = secrets.randbits(32) if options.seed is None or options.seed < 0 else options.seed
        self._random = np.random.default_rng(self.seed)
        self._greedy = options.temperature <= 0 and options.repeat_penalty == 1
        self._kernel = kernel or (None if self._greedy else load_kernel("sample", "cpu"))
        if state is not None:
            self._continue(state)

    def _continue(self, state):
        try:
            if self.options.seed in (None, state["seed"]) or self.options.seed < 0:
                self.seed, self._random.bit_generator.state = int(state["seed"]), state["random"]
        except (ValueError, TypeError, LookupError, ArithmeticError):
            raise ValueError("damaged: no valid state of the sampler") from None

    @property
    def state(self) -> dict:
        """The seed and where its random numbers are; JSON can hold it."""
        return {"seed": self.seed, "random": self._random.bit_generator.state}

    def __call__(self, logits: np.ndarray, tokens: list[int]) -> int:
        """logits [vocab] float32, or a LogitsRow, which lies on a device and is sampled there; tokens: all ids so far, the newest last
        -> the next id."""
        here = isinstance(logits, np.ndarray)
        if self._greedy and here:
            return int(logits.argmax())
        o = self.options
        history = [] if o.repeat_penalty == 1 or not o.repeat_last_n else tokens if o.repeat_last_n < 0 else tokens[-o.repeat_last_n:]
        history, settings = np.asarray(history, np.int64), {
            "temperature": o.temperature, "top_k": o.top_k, "top_p": o.top_p, "min_p": o.min_p, "repeat_penalty": o.repeat_penalty,
            "uniform": 0.0 if self._greedy else self._random.random()}
        return int(self._kernel(logits, history, **settings)[0]) if here else logits.sample(settings, history)


class StopStrings:
    """Passes text on until one of the strings appears, and holds back whatever could be the start of one."""

    def __init__(self, stops: tuple[str, ...] = ()):
        self.stops, self.held, self.hit = tuple(stop for stop in stops if stop), "", False

    def add(self, text: str) -> str:
        """The text that is safe to show; `hit` tells that a stop string came, which ends everything."""
        self.held += text
        ends = [(at + len(stop), at) for stop in self.stops if (at := self.held.find(stop)) >= 0]
        if ends:
            self.hit = True
            shown, self.held = self.held[:min(ends)[1]], ""
            return shown
        starts = (stop[:n] for stop in self.stops for n in range(1, min(len(stop), len(self.held) + 1)))
        keep = max((len(start) for start in starts if self.held.endswith(start)), default=0)
        cut = len(self.held) - keep
        shown, self.held = self.held[:cut], self.held[cut:]
        return shown

    def flush(self) -> str:
        shown, self.held = self.held, ""
        return shown


@dataclass
class Timings:
    """Seconds, of one generation. token_s holds the time from each token to the next, the first token's not included."""
    prompt_tokens: int = 0   # computed now
    cached_tokens: int = 0   # already in the cache
    first_token_s: float = 0.0
    token_s: list[float] = field(default_factory=list)

    @property
    def prompt_per_second(self) -> float:
        return self.prompt_tokens / self.first_token_s if self.first_token_s else 0.0

    @property
    def tokens_per_second(self) -> float:
        total = sum(self.token_s)
        return len(self.token_s) / total if total else 0.0


@dataclass(frozen=True)
class Event:
    """One token, and the text that is now safe to show (often its own, sometimes none yet). The last event may have no token."""
    token: int | None
    text: str


class Generation:
    """Iterate over it for Events; the other attributes tell how far it got, also after an interruption."""

    def __init__(self, model, tokenizer, sequence, prompt_ids: list[int], options: SamplerOptions, max_tokens: int = -1,
                 stop: tuple[str, ...] = (), end_tokens: frozenset[int] = frozenset(), context_ids: list[int] = (),
                 continues_text: bool = False, kernel: Callable | None = None, sampler: Sampler | None = None,
                 shift: ContextShift | None = None):
        """
        prompt_ids      appended to `sequence` first; at least one
        max_tokens      -1: until the model ends or the context is full
        context_ids     what `sequence` holds already, for the repeat penalty and for `shift`
        continues_text  a leading space of SentencePiece tokenizers is part of the text
        sampler         to go on with instead of a new one made from `options`
        shift           how to go on when the context is full; None: end there
        """
        if not len(prompt_ids):
            raise ValueError("the prompt is empty: give at least one token")
        if sequence.length + len(prompt_ids) >= model.ctx_size:
            raise ValueError(f"the prompt has {sequence.length + len(prompt_ids)} tokens, which leaves no room in a context of "
                             f"{model.ctx_size}; shorten it or raise -c (if the model allows it)")
        if shift is not None and len(context_ids) != sequence.length:
            raise ValueError(f"a context shift needs the ids of all {sequence.length} tokens in the cache, got {len(context_ids)}")
        self._model, self._sequence, self._prompt_ids, self._shift = model, sequence, list(prompt_ids), shift
        self.sampler = sampler or Sampler(options, kernel)
        self._in_place = {} if getattr(model, "device", "cpu") == "cpu" else {"fetch": False}
        self._max_tokens, self._stops, self._end_tokens = max_tokens, StopStrings(stop), end_tokens
        self._stream = tokenizer.stream(continues_text)
        self._all = list(context_ids) + self._prompt_ids
        self.seed, self.tokens, self.finish_reason = self.sampler.seed, [], None
        self.cached = list(context_ids)  # token ids that the sequence's cache holds for certain
        self.dropped = 0  # tokens that a context shift has dropped
        self.timings = Timings(len(prompt_ids), sequence.length)
        self.on_prompt: Callable[[int, int], None] | None = None  # told (tokens computed, of the prompt) after each chunk
        self._cancelled = False

    @property
    def token_ids(self) -> list[int]:
        """All of the text, less what a context shift dropped: context, prompt and what came. The last ones may not be in the cache."""
        return list(self._all)

    def cancel(self) -> None:
        """Stop at the next token or the next chunk of the prompt; safe in a signal handler."""
        self._cancelled = True

    def __iter__(self) -> Iterator[Event]:
        started = time.perf_counter()
        logits = self._prefill(self._prompt_ids, self.on_prompt)
        if self._max_tokens == 0 and logits is not None:
            self.finish_reason = "length"
        while logits is not None and self.finish_reason is None:
            token = self.sampler(logits, self._all)
            now = time.perf_counter()
            if self.timings.first_token_s:
                self.timings.token_s.append(now - started)
            else:
                self.timings.first_token_s = now - started
            started = now
            yield from self._accept(token)
            if self.finish_reason is None:
                logits = self._next(token)
        if self.finish_reason is None:
            self.finish_reason = "cancelled"
        if not self._stops.hit:
            yield from self._rest()

    def _rest(self):
        text = self._stops.add(self._stream.flush())
        if self._stops.hit:
            self.finish_reason = "stop"
        text += self._stops.flush()
        if text:
            yield Event(None, text)

    def _accept(self, token):
        """Take a sampled token: its event, unless it is an end token."""
        if token in self._end_tokens:
            self.finish_reason = "stop"
            return
        self.tokens.append(token)
        self._all.append(token)
        text = self._stops.add(self._stream.add(token))
        if self._stops.hit:
            self.finish_reason = "stop"
        elif len(self.tokens) == self._max_tokens:
            self.finish_reason = "length"
        elif self._sequence.length >= self._model.ctx_size and self._shift is None:
            self.finish_reason = "context"
        elif self._cancelled:
            self.finish_reason = "cancelled"
        yield Event(token, text)

    def _next(self, token):
        """Logits after a token, for which room is made first where there is none."""
        if self._sequence.length < self._model.ctx_size:
            return self._forward([token])
        self._all, dropped = self._shift.cut(self._all, self._model.ctx_size)
        self.dropped += dropped
        self._shift.restart(self._model, self._sequence)
        self.cached = self._all[:self._sequence.length]
        return self._prefill(self._all[len(self.cached):])

    def _prefill(self, ids, on_prompt=None):
        """Logits after some tokens; None when cancelled on the way, or when other sequences have filled the cache."""
        step = self._model.ubatch
        for start in range(0, len(ids), step):
            logits = self._forward(ids[start:start + step], "last" if start + step >= len(ids) else "none")
            if self.finish_reason:
                return None
            if on_prompt:
                on_prompt(min(start + step, len(ids)), len(ids))
            if self._cancelled:
                return None
        return logits

    def _forward(self, ids, rows="last"):
        try:
            logits = self._model.forward([(self._sequence, ids)], logit_rows=rows, **self._in_place)
        except CacheFull:  # other sequences can fill the cache before this one reaches the context size
            self.finish_reason = "context"
            return None
        self.cached += ids
        return logits[-1] if rows == "last" else None


def reuse(model, sequence, cached: list[int], ids: list[int]) -> int:
    """Cut `sequence`, which holds the tokens `cached`, to the start it shares with `ids`, or to less where the cache must -> how many
    tokens it still holds, always fewer than `ids`: the last one is computed again, for its logits."""
    shared, most = 0, min(len(cached), len(ids) - 1)
    while shared < most and cached[shared] == ids[shared]:
        shared += 1
    return model.truncate(sequence, shared)


def generate(model, tokenizer, sequence, prompt_ids: list[int], options: SamplerOptions = SamplerOptions(), max_tokens: int = -1,
             stop: tuple[str, ...] = (), end_tokens: frozenset[int] | None = None) -> Generation:
    """Continue a prompt. The tokenizer's end tokens end it unless others are given; see Generation for the rest.

    sequence = model.new_sequence()
    for event in generate(model, tokenizer, sequence, tokenizer.encode("Once upon")):
        print(event.text, end="")
    model.free(sequence)  # or its pages stay in use
    """
    ends = tokenizer.end_tokens if end_tokens is None else end_tokens
    return Generation(model, tokenizer, sequence, prompt_ids, options, max_tokens, stop, ends, continues_text=True)
