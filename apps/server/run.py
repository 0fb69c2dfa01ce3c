"""One answer on its way: what was asked for, and how far it got."""
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from edgeattn.apps.server.grammar import Matcher
from edgeattn.apps.server.logits import Shaping, TokenScore, score
from edgeattn.generation import Sampler, SamplerOptions, StopStrings
from edgeattn.log_softmax import log_softmax


@dataclass(frozen=True)
class Job:
    """What is asked for. One job gives one answer.

    max_tokens      -1: until the model ends or the context is full
    continues_text  the answer goes on with a text, whose leading space counts; False for an answer of its own
    scores          how many likely tokens are told beside each one's log probability; None: no log probabilities
    score_prompt    the prompt's tokens are scored too, so that nothing of it is reused
    grammar         what the answer must follow, at its beginning, or None
    session         conversation whose cache is to be kept first
    client          whose turn it is in the queue: address, and name there
    deadline        time.monotonic() at which it ends, done or not
    """
    prompt: list[int]
    sampling: SamplerOptions = SamplerOptions()
    max_tokens: int = -1
    stop: tuple[str, ...] = ()
    shaping: Shaping = Shaping()
    continues_text: bool = False
    scores: int | None = None
    score_prompt: bool = False
    grammar: Matcher | None = None
    session: str | None = None
    client: tuple[str, str] = ("", "")
    deadline: float = float("inf")


@dataclass(frozen=True)
class Piece:
    """News of an answer. The last one has a finish_reason ("stop", "length", "cancelled") or an error."""
    text: str = ""
    scores: tuple[TokenScore, ...] = ()
    finish_reason: str | None = None
    error: str | None = None
    busy: bool = False  # the error is that there was no time or room, not that the request is wrong

    @property
    def size(self) -> int:
        """Tokens and log probabilities."""
        return 1 + sum(1 + len(score.top) for score in self.scores)


@dataclass(eq=False)
class Run:
    """`tokens` is the prompt and what came; the sequence may hold fewer, and what it lacks is computed next: so a prompt, a new token and
    an answer that lost its cache are all the same."""
    job: Job
    emit: Callable[[Piece], None]
    follows: "Run | None" = None  # begins when that one's prompt is in the cache, to share it
    tokens: list[int] = field(default_factory=list)
    sequence: object = None
    cached: int = 0               # tokens of the prompt that were reused when it first began
    generated: int = 0
    cancelled: bool = False
    done: bool = False
    prompt_scores: list[TokenScore] = field(default_factory=list)
    turn: int = 0                 # when its prompt was last worked on
    order: int = 0                # when it was admitted; the newest gives way first
    arrived: float = field(default_factory=time.monotonic)
    first_token: float = 0.0      # time.monotonic()
    ended: float = 0.0

    def begin(self, tokenizer) -> None:
        """Make what sampling needs."""
        self.tokens = list(self.job.prompt)
        self._sampler, self._stops = Sampler(self.job.sampling), StopStrings(self.job.stop)
        self._stream, self._ends = tokenizer.stream(self.job.continues_text), tokenizer.end_tokens
        self._matcher = self.job.grammar and self.job.grammar.copy()

    @property
    def pending(self) -> int:
        """Tokens that the sequence does not hold yet."""
        return len(self.tokens) - (self.sequence.length if self.sequence else 0)

    @property
    def past_prompt(self) -> bool:
        return self.done or (self.sequence is not None and self.sequence.length >= len(self.job.prompt))

    @property
    def scoring(self) -> bool:
        """Whether rows of logits of its prompt are wanted."""
        return self.job.score_prompt and len(self.prompt_scores) < len(self.job.prompt)

    def score_rows(self, logits: np.ndarray, end: int) -> None:
        """logits [rows, vocab]: of the tokens before `end`."""
        if not self.prompt_scores:
            self.prompt_scores.append(TokenScore(self.job.prompt[0], None, ()))
        for place, row in enumerate(logits, end - len(logits) + 1):
            if place == len(self.prompt_scores) < len(self.job.prompt):
                self.prompt_scores.append(score(log_softmax(row), self.job.prompt[place], self.job.scores or 0))

    def advance(self, logits: np.ndarray, ctx_size: int) -> Piece:
        """Choose the next token from a row of logits, and tell what is new."""
        if self.job.max_tokens == 0:
            return Piece(finish_reason="length")
        shaped = self.job.shaping.apply(logits, self.tokens[len(self.job.prompt):])
        if self._matcher:
            shaped = self._matcher.mask(shaped)
        token = self._sampler(shaped, self.tokens)
        self.first_token = self.first_token or time.monotonic()
        scores = () if self.job.scores is None else (score(log_softmax(logits), token, self.job.scores),)
        self.generated += 1
        if token in self._ends:
            return Piece(self._rest(), scores, "stop")
        self.tokens.append(token)
        text, reason = self._stops.add(self._stream.add(token)), None
        if self._stops.hit:
            return Piece(text, scores, "stop")
        if self._matcher and self._matcher.accept(token):
            reason = "stop"
        elif self.generated == self.job.max_tokens or len(self.tokens) > ctx_size:
            reason = "length"
        return Piece(text + (self._rest() if reason else ""), scores, reason)

    def _rest(self):
        """Text that was held back, at the end."""
        return self._stops.add(self._stream.flush()) + self._stops.flush()

    def leave(self) -> str:
        """The text still held back of an answer that is ended from outside."""
        return self._rest() if self.tokens else ""


def runs_of(jobs: list[Job], emits: list[Callable[[Piece], None]]) -> list[Run]:
    """Those after the first with the same prompt follow it."""
    found = []
    for job, emit in zip(jobs, emits):
        found.append(Run(job, emit, next((run for run in found if run.job.prompt == job.prompt and not job.score_prompt), None)))
    return found
