"""One answer of the page: from a conversation to events with HTML, kept before it begins and when it ends, however it ends."""
import asyncio
import dataclasses
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor

from edgeattn.apps.cli import one_line
from edgeattn.apps.markdown import Blocks, to_html
from edgeattn.apps.server.answers import Answers
from edgeattn.apps.server.engine import Engine
from edgeattn.apps.server.errors import Refusal
from edgeattn.apps.server.events import event
from edgeattn.apps.server.run import Job
from edgeattn.apps.server.settings import Settings
from edgeattn.apps.store import Changed, Missing, Store
from edgeattn.scheduler import HELD

EVERY = 0.06  # seconds between events with text


class Answering:
    """The answers that are being given, by a name that only their page knows."""

    def __init__(self, engine: Engine, store: Store | None, settings: Settings):
        self._engine, self._store, self._settings, self._open = engine, store, settings, {}
        self._threads = ThreadPoolExecutor(1, "store")

    def in_store(self, call: Callable, *arguments) -> Awaitable:
        """Begin a call in the store's one thread: another program's lock may last for seconds, in which answers go on."""
        return asyncio.get_running_loop().run_in_executor(self._threads, call, *arguments)

    async def encode(self, talk) -> list[int]:
        """Token ids. Refusal: no chat template, or one that refuses."""
        messages = [{"role": message.role, "content": message.content} for message in talk.messages]
        try:
            return await asyncio.to_thread(self._engine.tokenizer.encode_chat, messages)
        except ValueError as error:
            raise Refusal(400, one_line(error)) from None

    async def start(self, talk, client: str) -> tuple[AsyncIterator[bytes], Answers]:
        """Events of an answer, as EventStream takes them. client: its address. Refusal: it cannot be given."""
        if talk.messages[-1].role != "user":
            raise Refusal(400, "the last message must be the user's")
        ids, settings = await self.encode(talk), self._settings
        room = self._engine.model.ctx_size
        if len(ids) >= room:
            raise Refusal(400, f"This conversation has {len(ids):,} tokens and the context holds {room:,}: shorten the question or the "
                               "file, or start a new conversation.", "context_length_exceeded")
        sampling = settings.sampling if talk.temperature is None else dataclasses.replace(settings.sampling, temperature=talk.temperature)
        most = talk.max_tokens if talk.max_tokens and settings.max_tokens < 0 else min(talk.max_tokens or 1 << 40, settings.max_tokens)
        name = secrets.token_hex(8)
        job = Job(ids, sampling, -1 if talk.max_tokens is None and settings.max_tokens < 0 else most, settings.stop,
                  session=f"page-{talk.conversation or name}", client=(client, "page"), deadline=time.monotonic() + settings.time_limit)
        answers = Answers(self._engine, [job])
        return self._run(_Answer(self._engine, self._store, self.in_store, talk, answers, name)), answers

    async def _run(self, one):
        self._open[one.name] = one
        try:
            async for found in one.events():
                yield event(found)
        finally:
            self._open.pop(one.name, None)

    def stop(self, name: str) -> bool:
        """False: it has ended already."""
        if one := self._open.get(name):
            one.answers.cancel()
        return one is not None


class _Answer:
    def __init__(self, engine, store, in_store, talk, answers, name):
        self._engine, self._store, self._in_store, self.answers, self.name = engine, store, in_store, answers, name
        self._run, self._text, self._reason = answers.runs[0], "", "cancelled"
        self._messages = [message.model_dump(exclude_unset=True) for message in talk.messages]
        self._where, self._title, self._kept, self._deleted = (talk.conversation, talk.revision), talk.title, False, False
        self._scheduler = engine.model.scheduler if engine.model.device == "cpu" else None  # asking would wait for a GPU
        self._counted = self._scheduler and self._scheduler.counted()

    def _share_read(self):
        """Of the cache, by sparse steps since this answer began, others' included."""
        if self._scheduler is None or self._engine.model.scheduler is not self._scheduler:  # other settings since
            return None
        counted = self._scheduler.counted() - self._counted
        return round(self._scheduler.share_read(counted), 4) if counted[HELD] else None

    async def events(self) -> AsyncIterator[dict]:
        """start, reading..., text..., end or error. A page that is closed leaves what was said so far in the store."""
        ended = False
        try:
            yield {"type": "start", "answer": self.name, **await self._in_store(self._keep)}
            async for found in self._stream():
                if found["type"] == "error":  # what comes next goes on from what is kept now
                    found |= await self._in_store(self._keep)
                    ended = True
                yield found
                if ended:
                    return
            end = {"type": "end", "html": await asyncio.to_thread(to_html, self._text), "text": self._text, "facts": self._facts(),
                   **await self._in_store(self._keep)}
            ended = True
            yield end
        finally:
            if not ended:
                self.answers.cancel_unfinished()
                self._in_store(self._keep)  # not awaited, which nobody may who is cancelled

    async def _stream(self):
        pieces, blocks, done, shown = self.answers.pieces(), Blocks(), [], time.monotonic()
        waiting, dirty = asyncio.ensure_future(anext(pieces)), False
        try:
            while waiting is not None:
                ready, _ = await asyncio.wait({waiting}, timeout=EVERY if dirty else 0.25)
                if ready:
                    try:
                        _, piece = waiting.result()
                    except StopAsyncIteration:
                        waiting = None
                    else:
                        waiting = asyncio.ensure_future(anext(pieces))
                        if piece is not None and piece.error is not None:
                            yield {"type": "error", "message": piece.error}
                            return
                        if piece is not None:
                            self._text, self._reason, dirty = self._text + piece.text, piece.finish_reason or self._reason, True
                            done += blocks.add(piece.text)
                elif not dirty and not self._text:
                    yield {"type": "reading", **self._progress()}
                if dirty and (time.monotonic() - shown >= EVERY or waiting is None):
                    shown, dirty = time.monotonic(), False
                    html = await asyncio.to_thread(lambda: [to_html(text) for text in [*done, blocks.tail]])
                    yield {"type": "text", "done": html[:-1], "tail": html[-1], "facts": self._facts()}
                    done = []
        finally:
            if waiting is not None:
                waiting.cancel()  # and `pieces` with it, whose answers end then

    def _progress(self):
        sequence = self._run.sequence  # the engine's thread takes it away at the end
        return {"done": sequence.length if sequence else 0, "total": len(self._run.job.prompt), "waiting": sequence is None}

    def _facts(self):
        """What the page shows of an answer; seconds, tokens."""
        run, now = self._run, time.monotonic()
        since = (run.ended or now) - run.first_token if run.first_token else 0.0
        return {"prompt_tokens": len(run.job.prompt), "cached_tokens": run.cached, "tokens": run.generated, "finish": self._reason,
                "ttft_s": round(run.first_token - run.arrived, 3) if run.first_token else None,
                "sparse_share": self._share_read(),
                "tokens_per_second": round((run.generated - 1) / since, 2) if run.generated > 1 and since > 0 else None}

    def _keep(self):
        """Save what there is -> where it is kept now, and what is to be told of it. Only in the store's thread: a page may be closed while
        its question is being saved."""
        messages = self._messages
        if self._text:
            messages = [*messages, {"role": "assistant", "content": self._text, "facts": self._facts()}]
        told = "" if self._store is None or self._deleted else self._save(messages)
        return {"conversation": self._where[0], "revision": self._where[1], "told": told}

    def _save(self, messages):
        number, revision = self._where
        told = ""
        try:
            try:
                self._where = self._store.save(messages, self._engine.name, number, revision, self._title if number is None else None)
            except Changed as error:
                gone = isinstance(error, Missing)
                self._deleted = gone and self._kept
                if self._deleted:  # while it was answered: then it stays so
                    self._where = None, None
                    return "Not kept: it was deleted meanwhile."
                told = f"It was {'deleted' if gone else 'changed'} elsewhere meanwhile: this one is kept beside it."
                self._where = self._store.save(messages, self._engine.name, title=self._title)
            self._kept = True
            return told
        except (OSError, ValueError) as error:
            return f"Not kept: {one_line(error)}"
