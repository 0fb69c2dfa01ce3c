"""A conversation over one cached sequence: each turn computes only what the cache does not hold yet."""
from collections.abc import Iterator

from edgeattn.generation import Event, Generation, SamplerOptions


class Conversation:
    """`messages` is the conversation so far, [{"role", "content"}]; `last` the Generation of the newest answer."""

    def __init__(self, model, tokenizer, options: SamplerOptions = SamplerOptions(), system: str | None = None, max_tokens: int = -1,
                 stop: tuple[str, ...] = (), kernel=None):
        self._model, self._tokenizer, self._options, self._kernel = model, tokenizer, options, kernel
        self._system, self._max_tokens, self._stop = system, max_tokens, stop
        self._sequence, self._cached = model.new_sequence(), []
        self.last: Generation | None = None
        self.messages: list[dict] = []
        self.clear()

    def clear(self) -> None:
        """Forget everything but the system prompt (whose cached tokens stay useful)."""
        self.messages = [{"role": "system", "content": self._system}] if self._system else []

    @property
    def tokens(self) -> int:
        """Tokens that the cache holds."""
        return self._sequence.length

    def say(self, text: str) -> Iterator[Event]:
        """Ask, and stream the answer. However it ends, by itself, cancel() or Ctrl-C, what was shown stays in the conversation;
        a question without any answer is forgotten. ValueError: no chat template, or the context is full."""
        question = {"role": "user", "content": text}
        run = self.last = self._start([*self.messages, question])
        return self._stream(run, question)

    def cancel(self) -> None:
        """Stop the answer that is being streamed; safe in a signal handler."""
        if self.last is not None:
            self.last.cancel()

    def _start(self, messages):
        ids = self._tokenizer.encode_chat(messages)
        if len(ids) >= self._model.ctx_size:
            raise ValueError(f"the conversation has {len(ids)} tokens, which leaves no room in a context of {self._model.ctx_size}; "
                             "start afresh with /clear, or raise -c (if the model allows it)")
        shared = _common_prefix(self._cached, ids[:-1])  # the last token is computed again: its logits are wanted
        shared = self._model.truncate(self._sequence, shared)
        self._cached = ids[:shared]
        return Generation(self._model, self._tokenizer, self._sequence, ids[shared:], self._options, self._max_tokens, self._stop,
                          self._tokenizer.end_tokens, context_ids=ids[:shared], kernel=self._kernel)

    def _stream(self, run, question):
        answer = ""
        try:
            for event in run:
                answer += event.text
                yield event
        finally:
            self._cached = run.cached[:self._sequence.length]
            if answer:
                self.messages += [question, {"role": "assistant", "content": answer}]


def _common_prefix(a, b):
    n = 0
    while n < min(len(a), len(b)) and a[n] == b[n]:
        n += 1
    return n
