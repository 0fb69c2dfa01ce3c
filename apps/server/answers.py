"""From a request to jobs, and their pieces back to the event loop."""
import asyncio
import dataclasses
import time
from collections.abc import AsyncIterator

from starlette.requests import Request

from edgeattn.apps.server.engine import Engine
from edgeattn.apps.server.errors import Refusal
from edgeattn.apps.server.logits import Shaping
from edgeattn.apps.server.queue import Busy
from edgeattn.apps.server.run import Job, Piece
from edgeattn.apps.server.schema import Generated
from edgeattn.apps.server.settings import Settings

KEEP_ALIVE = 10.0   # seconds without news after which a stream says that it lives
BEHIND = 1 << 18    # log probabilities and tokens that a client who reads slowly may be behind: about 25 MB
SCORES = 1 << 22    # log probabilities of one request


def address(request: Request) -> str:
    return request.client.host if request.client else ""


def make_jobs(body: Generated, prompts: list[list[int]], settings: Settings, engine: Engine, client: str, max_tokens: int | None,
              **more) -> list[Job]:
    """n jobs for each prompt. client: its address. Refusal: too many answers, or a token that does not exist."""
    n = body.n or 1
    if n * len(prompts) > settings.max_choices:
        raise Refusal(400, f"{n * len(prompts)} answers are asked for, and {settings.max_choices} are the most of one request", param="n")
    given = {name: value for name in ("temperature", "top_p", "top_k", "min_p", "repeat_penalty")
             if (value := getattr(body, name)) is not None}
    bias = tuple((int(token), value) for token, value in (body.logit_bias or {}).items())
    if any(token >= engine.model.vocab_size for token, _ in bias):
        raise Refusal(400, f"logit_bias: token ids must be 0 to {engine.model.vocab_size - 1}", param="logit_bias")
    stop = settings.stop if body.stop is None else (body.stop,) if isinstance(body.stop, str) else tuple(body.stop)
    shaping = Shaping(bias, body.presence_penalty or 0.0, body.frequency_penalty or 0.0)
    most = settings.max_tokens if max_tokens is None else max_tokens if settings.max_tokens < 0 else min(max_tokens, settings.max_tokens)
    room, scores = engine.model.ctx_size, more.get("scores")
    rows = sum(min(room if most < 0 else most, room - len(prompt)) + len(prompt) * more.get("score_prompt", False) for prompt in prompts)
    if scores is not None and n * rows * (scores + 1) > SCORES:
        raise Refusal(400, f"more than {SCORES} log probabilities are asked for: lower max_tokens, n or how many are told of a token",
                      param="logprobs")
    seed = settings.sampling.seed if body.seed is None else body.seed % (1 << 63)
    deadline = time.monotonic() + settings.time_limit
    return [Job(prompt, dataclasses.replace(settings.sampling, seed=None if seed is None or seed < 0 else seed + i, **given), most, stop,
                shaping, session=body.session, client=(client, body.session or body.user or ""), deadline=deadline, **more)
            for prompt in prompts for i in range(n)]


class Answers:
    """The pieces of some jobs as they come; `runs` have the figures."""

    def __init__(self, engine: Engine, jobs: list[Job]):
        """Refusal: the engine takes them not."""
        self._engine, self._news, self._behind, loop = engine, asyncio.Queue(), 0, asyncio.get_running_loop()

        def teller(index):
            return lambda piece: None if loop.is_closed() else loop.call_soon_threadsafe(self._take, index, piece)
        try:
            self.runs = engine.submit(jobs, [teller(index) for index in range(len(jobs))])
        except Busy as error:
            raise Refusal(503, str(error), "server_busy") from None
        except ValueError as error:
            long = "context" in str(error)
            raise Refusal(400, str(error), "context_length_exceeded" if long else None, "prompt") from None

    def _take(self, index, piece):
        self._behind += piece.size
        if self._behind > BEHIND:
            self.cancel()
            piece = Piece(error="the answer came faster than it was read, and has ended")
        self._news.put_nowait((index, piece))

    async def pieces(self) -> AsyncIterator[tuple[int, Piece | None]]:
        """(which job, its piece), or (-1, None) where there is no news for long; ends when all jobs have. Whoever leaves early cancels
        them."""
        left = len(self.runs)
        try:
            while left:
                try:
                    news = [await asyncio.wait_for(self._news.get(), KEEP_ALIVE)]
                except TimeoutError:
                    yield -1, None
                    continue
                while not self._news.empty():
                    news.append(self._news.get_nowait())
                self._behind -= sum(piece.size for _, piece in news)
                for index, piece in _joined(news):
                    left -= piece.error is not None or piece.finish_reason is not None
                    yield index, piece
        finally:
            if left:
                self.cancel()

    def cancel(self) -> None:
        for run in self.runs:
            self._engine.cancel(run)

    async def collect(self, request: Request) -> list[list[Piece]]:
        """All pieces by job. Refusal: one failed, or the client has gone."""
        found = [[] for _ in self.runs]
        gathering = asyncio.ensure_future(self._gather(found))
        leaving = asyncio.ensure_future(self._gone(request))
        try:
            await asyncio.wait([gathering, leaving], return_when=asyncio.FIRST_COMPLETED)
            if not gathering.done():
                raise Refusal(499, "the client has gone")
            gathering.result()
        finally:
            for task in (gathering, leaving):
                task.cancel()
            self.cancel_unfinished()
        return found

    def cancel_unfinished(self) -> None:
        if any(not run.done for run in self.runs):
            self.cancel()

    async def _gather(self, found):
        async for index, piece in self.pieces():
            if piece is not None:
                if refusal := failure(piece):
                    raise refusal
                found[index].append(piece)

    async def _gone(self, request):
        while (await request.receive())["type"] != "http.disconnect":
            pass

    def usage(self) -> dict:
        """OpenAI's usage object: a prompt counts once for all its answers."""
        prompts = {id(run.job.prompt): len(run.job.prompt) for run in self.runs}
        leaders = {id(run.job.prompt): run for run in reversed(self.runs)}
        prompt, completion = sum(prompts.values()), sum(run.generated for run in self.runs)
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion,
                "prompt_tokens_details": {"cached_tokens": sum(run.cached for run in leaders.values())}}


def _joined(news):
    """One piece a job: who falls behind gets more tokens at a time."""
    found = {}
    for index, piece in news:
        if before := found.get(index):
            piece = dataclasses.replace(piece, text=before.text + piece.text, scores=before.scores + piece.scores)
        found[index] = piece
    return found.items()


def failure(piece: Piece) -> Refusal | None:
    if piece.error is not None:
        internal = piece.error.startswith("internal error")
        return Refusal(503 if piece.busy else 500 if internal else 400, piece.error, "server_busy" if piece.busy else None)
    return Refusal(503, "the server is stopping", "server_busy") if piece.finish_reason == "cancelled" else None
