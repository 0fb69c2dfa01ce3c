"""The thread that owns the model: it computes all answers together, a token of each and a piece of a prompt at a time."""
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable

from edgeattn.apps.server.figures import Figures, model_state
from edgeattn.apps.server.prefixes import Prefixes
from edgeattn.apps.server.queue import Busy, FairQueue
from edgeattn.apps.server.reload import Reload
from edgeattn.apps.server.run import Job, Piece, Run, runs_of
from edgeattn.apps.server.turns import next_call
from edgeattn.cache.pages import CacheFull
from edgeattn.page_formats import PAGE
from edgeattn.runtime import LOGITS_BYTES, MAX_SEQUENCES

SECONDS = 0.2  # between looks at the clock and at the model's figures


class Engine:
    """
    load          load(changes) -> (model, tokenizer): the model again with changed settings; None: it cannot be. `changes`: those so far
    parallel      answers that are computed at once; more wait
    most_waiting  requests that may wait; more are refused
    Public methods may be called from any thread.
    """

    def __init__(self, model, tokenizer, load: Callable | None = None, parallel: int = 4, most_waiting: int = 256):
        self.parallel, self.most_waiting = min(parallel, MAX_SEQUENCES), most_waiting
        self.figures = Figures()
        self._load, self.changes = load, {}
        self._inbox, self._waiting, self._running, self._order = queue.SimpleQueue(), FairQueue(), [], 0
        self._open, self._lock, self._making, self._change = 0, threading.Lock(), threading.Lock(), None
        self._adopt(model, tokenizer)
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._stopping = False

    def start(self) -> "Engine":
        self._thread.start()
        return self

    def stop(self) -> None:
        """Let all answers end now; does not wait, so a signal handler may call it."""
        self._stopping = True
        self._inbox.put(("wake",))

    def close(self) -> None:
        """Stop, and wait for the thread."""
        self.stop()
        if self.alive and threading.current_thread() is not self._thread:
            self._thread.join()

    @property
    def alive(self) -> bool:
        """Whether anything is answered."""
        return self._thread.is_alive()

    @property
    def constraints(self):
        """Grammars and token bytes of this tokenizer; made when first needed, which takes a moment."""
        with self._making:
            if self._constraints is None:
                from edgeattn.apps.server.grammar import Constraints
                self._constraints = Constraints(self.tokenizer, self.model.vocab_size)
            return self._constraints

    def submit(self, jobs: list[Job], emits: list[Callable[[Piece], None]]) -> list[Run]:
        """Begin jobs; each emit is called in the engine's thread. Jobs after the first with the same prompt wait for it and share it.
        ValueError: a prompt is empty, too long or has unknown tokens; Busy: too many wait."""
        for job in jobs:
            self._check(job)
        with self._lock:
            self._check_alive()
            if self._open + len(jobs) > (most := self.parallel + self.most_waiting):
                self.figures.count("refused")
                raise Busy(f"{self._open} requests are being answered or wait, and no more than {most} may")
            self._open += len(jobs)
            runs = runs_of(jobs, emits)
            self._inbox.put(("submit", runs))
        return runs

    def cancel(self, run: Run) -> None:
        """Its client has gone: nothing more is computed or told."""
        run.cancelled = True
        self._inbox.put(("wake",))

    def reload(self, changes: dict) -> dict:
        """Load the model with other settings, names and values as `load` takes them; answers on their way go on with it. -> status().
        ValueError: they cannot be; then the old ones stay. Busy: another change is on its way, or the engine has no time for one."""
        if self._load is None:
            raise ValueError("the settings of this server cannot be changed")
        with self._lock:
            self._check_alive()
            if self._change and not self._change.over:
                raise Busy("the settings are being changed already: try again")
            self._change = change = Reload(changes)
            self._inbox.put(("reload", change))
        return change.wait(self._thread)

    def status(self) -> dict:
        """What the server is doing; figures of the model are of the last fifth of a second."""
        return {"model": self.name, "ctx_size": self.model.ctx_size, "parallel": self.parallel, "running": len(self._running),
                "waiting": max(0, self._open - len(self._running)), "settings": dict(self.changes), **self._about, **self.figures.status()}

    @property
    def name(self) -> str:
        """The model's name: the folder that it was exported from, and its precision."""
        source = self.model.config.get("source", {})
        return f"{source.get('name') or source.get('folder') or 'model'}-{self.model.config.get('precision', '')}".rstrip("-")

    def _check_alive(self):
        if self._stopping or not self.alive:
            raise Busy("the server is stopping" if self._stopping else "the model's thread has ended: start the server again")

    def _check(self, job):
        if not job.prompt:
            raise ValueError("the prompt is empty: give at least one token")
        room = self.model.ctx_size - (job.max_tokens != 0)
        if len(job.prompt) > room:
            raise ValueError(f"the prompt has {len(job.prompt)} tokens and the context {self.model.ctx_size}: shorten it, or start the "
                             "server with a larger -c (if the model allows it)")
        if min(job.prompt) < 0 or max(job.prompt) >= self.model.vocab_size:
            raise ValueError(f"token ids must be 0 to {self.model.vocab_size - 1}, got {min(job.prompt)} to {max(job.prompt)}")

    # ---- the engine's thread ------------------------------------------------------------------------------------
    def _adopt(self, model, tokenizer):
        self.model, self.tokenizer, self._constraints = model, tokenizer, None
        self._prefixes = Prefixes(model, 4 * self.parallel)
        self._step_rows = max(1, LOGITS_BYTES // (4 * model.vocab_size))
        self.special_tokens = frozenset(token for token, about in tokenizer.backend.get_added_tokens_decoder().items() if about.special)
        self._looked = 0.0
        self._look()

    def _work(self):
        while not self._stopping:
            try:
                self._listen(wait=not self._running and not len(self._waiting))
                self._admit()
                self._step()
                self._look()
            except BaseException as error:  # a panic of a library too: the server goes on, without the answers that it may belong to
                traceback.print_exc(file=sys.stderr)
                for run in list(self._running):
                    run.sequence = None  # its pages return with it
                    self._end(run, Piece(error=f"internal error: {type(error).__name__}"))
        with self._lock:  # nothing comes after this
            self._listen(wait=False)
        for run in [*self._running, *self._waiting]:
            self._end(run, Piece(run.leave(), finish_reason="cancelled"), keep=False)

    def _listen(self, wait):
        """Take what has come."""
        while True:
            try:
                message = self._inbox.get(block=wait)
            except queue.Empty:
                return
            wait = False
            if message[0] == "submit":
                for run in message[1]:
                    self._waiting.put(run)
            elif message[0] == "reload":
                message[1].run(self._reload)

    def _admit(self):
        now = time.monotonic()
        for run in [*self._running, *self._waiting]:
            if run.cancelled:
                self._end(run, Piece(finish_reason="cancelled"))
            elif now > run.job.deadline and not run.generated:
                self._end(run, Piece(error="the server's time limit passed before the answer began", busy=True))
            elif now > run.job.deadline:
                self._end(run, Piece(run.leave(), finish_reason="length"))
        while len(self._running) < self.parallel:
            run = self._waiting.next(lambda run: run.tokens or not run.follows or run.follows.past_prompt)
            if run is None or not self._has_room(run):  # then nobody else begins either, or long prompts would wait for ever
                break
            self._waiting.remove(run)
            try:
                self._begin(run)
            except Exception as error:
                self._end(run, Piece(error=str(error)))

    def _has_room(self, run):
        """Whether there may be pages for its text. Where there are not in the end, the newest gives way."""
        taken = sum(len(other.tokens) - other.cached for other in self._running)
        needed = len(run.tokens) or len(run.job.prompt) * (run.follows is None)  # who follows shares a prompt that is there
        return not self._running or taken + needed + PAGE <= self.model.ctx_size

    def _begin(self, run):
        self._check(run.job)  # again: the settings may have changed since
        if len(run.tokens) > self.model.ctx_size:
            return self._end(run, Piece(run.leave(), finish_reason="length"))
        first = not run.tokens
        if first:
            run.begin(self.tokenizer)
        if run.job.score_prompt and run.generated == 0:
            run.sequence = self.model.new_sequence()
        else:
            run.sequence, found = self._prefixes.begin(run.tokens, self._running)
            run.cached = found if first else run.cached
        self._order += 1
        run.order = run.turn = self._order
        self._running.append(run)

    def _step(self):
        """One forward call: the next token of each answer, and a piece of the prompts that are being read."""
        if not self._running:
            return
        work, rows = next_call(self._running, self.model.ubatch, self._step_rows)
        began = time.monotonic()
        try:
            logits = self.model.forward([(run.sequence, ids) for run, ids in work], logit_rows=rows)
        except CacheFull:
            self._make_room()
            return
        self.figures.stepped(time.monotonic() - began, [len(ids) for _, ids in work])
        start = 0
        for run, ids in work:
            self._order += len(ids) > 1
            run.turn, count = self._order, len(ids) if rows == "all" else 1
            self._advance(run, logits[start:start + count])
            start += count

    def _advance(self, run, logits):
        if run.scoring:
            run.score_rows(logits, run.sequence.length)
        if run.pending:
            return
        try:
            piece = run.advance(logits[-1], self.model.ctx_size)
        except Exception as error:
            self._end(run, Piece(error=str(error)))
            return
        if piece.finish_reason:
            self._end(run, piece)
        else:
            self._tell(run, piece)

    def _make_room(self):
        """After a call for which there were no pages: drop a kept sequence, or send the newest answer back to the queue."""
        if self._prefixes.drop_one():
            return
        newest = max(self._running, key=lambda run: run.order)
        if len(self._running) > 1:
            self._interrupt(newest)
        elif newest.generated:
            self._end(newest, Piece(newest.leave(), finish_reason="length"))
        else:
            self._end(newest, Piece(error="the prompt does not fit the KV cache: shorten it, or start the server with a larger -c or "
                                          "--kv-budget"))

    def _interrupt(self, run):
        self.model.free(run.sequence)
        run.sequence = None
        self._running.remove(run)
        self._waiting.put_back(run)

    def _end(self, run, piece, keep=True):
        if run in self._running:
            self._running.remove(run)
        elif run in list(self._waiting):
            self._waiting.remove(run)
        run.done, run.ended = True, time.monotonic()
        if run.sequence is not None:
            if keep and piece.error is None and run.sequence.length:
                self._prefixes.keep(run.tokens, run.sequence, run.job.session)
            else:
                self.model.free(run.sequence)
            run.sequence = None
        with self._lock:
            self._open -= 1
        self.figures.ended(run, piece)
        self._tell(run, piece)

    def _tell(self, run, piece):
        try:
            run.emit(piece)
        except Exception:  # whoever listened has gone
            run.cancelled = True

    def _reload(self, changes):
        if self._stopping:
            raise Busy("the server is stopping")
        model, tokenizer = self._load({**self.changes, **changes})
        for run in sorted(self._running, key=lambda run: -run.order):
            self._interrupt(run)
        self._prefixes.clear()
        self.changes |= changes
        self._adopt(model, tokenizer)
        return self.status()

    def _look(self):
        if time.monotonic() - self._looked < SECONDS and self._running:
            return
        self._looked = time.monotonic()
        longest = max((run.sequence.length for run in self._running), default=0)
        self._about = {"context_used": longest, "kept_sequences": len(self._prefixes), **model_state(self.model)}
