"""POST /v1/completions: text, or token ids, goes on; with echo and logprobs, what a text is worth."""
import asyncio
import secrets
import time
from collections.abc import AsyncIterator

from fastapi import APIRouter, Request

from edgeattn.apps.server.admission import prepared
from edgeattn.apps.server.answers import Answers, address, make_jobs
from edgeattn.apps.server.engine import Engine
from edgeattn.apps.server.errors import Refusal
from edgeattn.apps.server.events import EventStream, respond, stream
from edgeattn.apps.server.schema import CompletionRequest
from edgeattn.apps.server.settings import Settings
from edgeattn.apps.server.tokens import completion_scores

DEFAULT_TOKENS = 16  # OpenAI's, of completions


def make_router(engine: Engine, settings: Settings) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/completions", summary="Continue a text")
    async def completions(body: CompletionRequest, request: Request):
        jobs = await asyncio.to_thread(_jobs, engine, settings, body, address(request))
        answers = Answers(engine, jobs)
        prepared(request)
        about = {"id": f"cmpl-{secrets.token_hex(12)}", "object": "text_completion", "created": int(time.time()), "model": engine.name}
        if body.stream:
            return EventStream(_stream(engine, answers, body, about), answers)
        found = await answers.collect(request)
        choices = await asyncio.to_thread(lambda: [_choice(engine, i, run, found[i], body) for i, run in enumerate(answers.runs)])
        return respond({**about, "choices": choices, "usage": answers.usage()})
    return router


def _jobs(engine, settings, body, client):
    if body.suffix:
        raise Refusal(400, "suffix is not supported: this server continues texts at their end", param="suffix")
    prompts = [body.prompt] if isinstance(body.prompt, str) or not body.prompt or isinstance(body.prompt[0], int) else body.prompt
    if len(prompts) > settings.max_choices:
        raise Refusal(400, f"{len(prompts)} prompts, and {settings.max_choices} are the most of one request", param="prompt")
    try:
        ids = [engine.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
    except ValueError as error:
        raise Refusal(400, str(error), param="prompt") from None
    if body.logprobs is not None:
        engine.constraints  # takes a moment, so not in the event loop
    most = DEFAULT_TOKENS if body.max_tokens is None else body.max_tokens
    scored = bool(body.echo and body.logprobs is not None)
    return make_jobs(body, ids, settings, engine, client, most, scores=body.logprobs, score_prompt=scored, continues_text=True)


def _prompt_text(engine, body, index, run):
    """What echo shows before the answer."""
    if not body.echo:
        return ""
    if isinstance(body.prompt, str):
        return body.prompt
    if isinstance(body.prompt[0], str):
        return body.prompt[index // (body.n or 1)]
    return engine.tokenizer.decode(run.job.prompt)


def _choice(engine, index, run, pieces, body):
    before, scores = _prompt_text(engine, body, index, run), [score for piece in pieces for score in piece.scores]
    text, logprobs = before + "".join(piece.text for piece in pieces), None
    if body.logprobs is not None:
        logprobs = completion_scores(engine, [*run.prompt_scores, *scores], 0)
    return {"text": text, "index": index, "logprobs": logprobs, "finish_reason": pieces[-1].finish_reason}


def _stream(engine, answers, body, about) -> AsyncIterator[bytes]:
    told, offsets = [False] * len(answers.runs), [0] * len(answers.runs)

    def choices(index, piece):
        run, begins = answers.runs[index], not told[index]
        told[index] = True
        text = (_prompt_text(engine, body, index, run) if begins else "") + piece.text
        scores = [*(run.prompt_scores if begins else ()), *piece.scores]
        if text or scores or piece.finish_reason:
            logprobs = None if body.logprobs is None else completion_scores(engine, scores, offsets[index])
            offsets[index] += len(text)
            yield {"text": text, "index": index, "logprobs": logprobs, "finish_reason": piece.finish_reason}
    return stream(answers, about, body.stream_options, choices)
