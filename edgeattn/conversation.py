"""A conversation over one cached sequence: each turn computes only what the cache does not hold yet."""
import os
from collections.abc import Iterator

from edgeattn.cache import session
from edgeattn.context_shift import ContextShift
from edgeattn.generation import Event, Generation, Sampler, SamplerOptions, reuse


class Conversation:
    """`messages` is the conversation so far, [{"role", "content"}]; `last` the Generation of the newest answer."""

    def __init__(self, model, tokenizer, options: SamplerOptions = SamplerOptions(), system: str | None = None, max_tokens: int = -1,
                 stop: tuple[str, ...] = (), kernel=None, shift: ContextShift | None = None):
        """shift: how to go on when the context is full, in an answer or before one; None: end there."""
        self._model, self._tokenizer, self._options, self._kernel = model, tokenizer, options, kernel
        self._system, self._max_tokens, self._stop, self._shift = system, max_tokens, stop, shift
        self._sequence, self._cached, self._sampler = model.new_sequence(), [], Sampler(options, kernel)
        self.last: Generation | None = None
        self.messages: list[dict] = []
        self.clear()

    def clear(self) -> None:
        """Forget everything but the system prompt (whose cached tokens stay useful)."""
        self.messages = [{"role": "system", "content": self._system}] if self._system else []
        self._dropped = 0  # tokens of the messages that context shifts have dropped, behind those that they keep

    @property
    def tokens(self) -> int:
        """Tokens that the cache holds."""
        return self._sequence.length

    def save(self, path) -> None:
        """Write the conversation to a session file, with what the cache holds of it. OSError; see cache/session.py."""
        session.save(path, self._model.cache, self._sequence, self._cached, self._model.config,
                     {"messages": self.messages, "sampler": self._sampler.state, "dropped": self._dropped})

    def restore(self, path) -> None:
        """Go on where a saved conversation was, its system prompt included, unless this one has another. With the same options,
        threads and device the answers are those that the saved one would have given; a seed other than its own starts anew.
        OSError, CacheFull, ValueError: the file cannot be continued here, and nothing has changed."""
        sequence, token_ids, meta = session.load(path, self._model.cache, self._model.config)
        messages = meta.get("messages")
        if messages is None:
            raise ValueError("a text of `edgeattn generate`, not a conversation")
        if not isinstance(messages, list) or not all(isinstance(m, dict) and set(m) == {"role", "content"} and
                                                     all(isinstance(x, str) for x in m.values()) for m in messages):
            raise ValueError("damaged: no valid messages")
        if not isinstance(dropped := meta.get("dropped", 0), int) or dropped < 0:
            raise ValueError("damaged: no valid number of dropped tokens")
        self._sampler = Sampler(self._options, self._kernel, meta.get("sampler"))
        self._sequence, self._cached = sequence, token_ids[:sequence.length]
        saved = messages[0]["content"] if messages and messages[0]["role"] == "system" else None
        self.replace(messages, self._system or saved)
        self._dropped = dropped

    @property
    def system(self) -> str | None:
        """The system prompt."""
        return self._system

    def replace(self, messages: list[dict], system: str | None) -> None:
        """Go on from other messages (their own system prompt is left out) behind another system prompt; what the cache has in common with
        them stays useful."""
        self._system = system
        self.clear()
        self.messages += [message for message in messages if message["role"] != "system"]

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
        ids, dropped, shift = self._tokenizer.encode_chat(messages), self._dropped, self._shift
        if shift is not None:
            shift = shift if shift.keep is not None or not self._system else ContextShift(self._system_tokens())
            ids, dropped = shift.cut(ids, self._model.ctx_size, dropped)
        if len(ids) >= self._model.ctx_size:
            raise ValueError(f"the conversation has {len(ids)} tokens, which leaves no room in a context of {self._model.ctx_size}; "
                             "start afresh with /clear, or raise -c (if the model allows it)")
        if dropped > self._dropped:
            shift.restart(self._model, self._sequence)
        shared = reuse(self._model, self._sequence, self._cached[:self._sequence.length], ids)
        self._cached = ids[:shared]
        run = Generation(self._model, self._tokenizer, self._sequence, ids[shared:], self._options, self._max_tokens, self._stop,
                         self._tokenizer.end_tokens, context_ids=ids[:shared], sampler=self._sampler, shift=shift)
        run.dropped = dropped - self._dropped
        return run

    def _system_tokens(self):
        questions = [[self.messages[0], {"role": "user", "content": text}] for text in "ab"]
        return len(os.path.commonprefix([self._tokenizer.encode_chat(messages) for messages in questions]))

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
                self._dropped += run.dropped
