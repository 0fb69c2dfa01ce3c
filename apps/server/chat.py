"""POST /v1/chat/completions."""
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
from edgeattn.apps.server.schema import ChatRequest
from edgeattn.apps.server.settings import Settings
from edgeattn.apps.server.tokens import chat_score
from edgeattn.apps.server.tools import CallReader, prepare


def make_router(engine: Engine, settings: Settings) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/chat/completions", summary="Answer a conversation")
    async def chat(body: ChatRequest, request: Request):
        prompt, jobs = await asyncio.to_thread(_jobs, engine, settings, body, address(request))
        answers = Answers(engine, jobs)
        prepared(request)
        about = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": engine.name}
        if body.stream:
            return EventStream(_stream(engine, answers, body, prompt, about), answers)
        found = await answers.collect(request)
        choices = await asyncio.to_thread(lambda: [_choice(engine, i, pieces, prompt.calls, body) for i, pieces in enumerate(found)])
        return respond({**about, "object": "chat.completion", "choices": choices, "usage": answers.usage()})
    return router


def _jobs(engine, settings, body, client):
    try:
        prompt = prepare(body, engine.tokenizer)
        tokens = engine.constraints if prompt.schema is not None or body.logprobs else None  # not first made in the event loop
        grammar = tokens.schema(prompt.schema) if prompt.schema is not None else None
        ids = engine.tokenizer.encode(prompt.text, special=False)
    except (ValueError, RecursionError) as error:  # tools and schemas may be nested deeper than they can be written
        raise Refusal(400, str(error)) from None
    wanted = body.max_completion_tokens if body.max_tokens is None else body.max_tokens
    scores = body.top_logprobs or 0 if body.logprobs else None
    return prompt, make_jobs(body, [ids], settings, engine, client, wanted, scores=scores, grammar=grammar)


def _choice(engine, index, pieces, calls, body):
    text, reason, found = "".join(piece.text for piece in pieces), pieces[-1].finish_reason, []
    if calls:
        reader = CallReader()
        (text, found), (rest, more) = reader.add(text), reader.end()
        text, found = (text + rest).strip() if found or more else text + rest, found + more
    message = {"role": "assistant", "content": text or (None if found else ""), "refusal": None}
    scores = [score for piece in pieces for score in piece.scores]
    if scores and reason == "stop" and scores[-1].token in engine.tokenizer.end_tokens:
        scores.pop()  # the end token has no text
    return {"index": index, "message": message | ({"tool_calls": found} if found else {}),
            "logprobs": {"content": [chat_score(engine, score) for score in scores], "refusal": None} if body.logprobs else None,
            "finish_reason": "tool_calls" if found else reason}


def _stream(engine, answers, body, prompt, about) -> AsyncIterator[bytes]:
    readers, calls = [CallReader() for _ in answers.runs], [0] * len(answers.runs)

    def choice(index, delta, reason=None, logprobs=None):
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}

    def choices(index, piece):
        text, found = piece.text, []
        if prompt.calls:
            text, found = readers[index].add(piece.text)
            if piece.finish_reason:
                rest, more = readers[index].end()
                text, found = text + rest, found + more
        scores = [chat_score(engine, score) for score in piece.scores if score.token not in engine.tokenizer.end_tokens]
        if text or scores:
            yield choice(index, {"content": text}, logprobs={"content": scores, "refusal": None} if body.logprobs else None)
        for call in found:
            yield choice(index, {"tool_calls": [{"index": calls[index], **call}]})
            calls[index] += 1
        if piece.finish_reason:
            yield choice(index, {}, "tool_calls" if calls[index] else piece.finish_reason)
    first = [choice(index, {"role": "assistant", "content": "", "refusal": None}) for index in range(len(answers.runs))]
    return stream(answers, {**about, "object": "chat.completion.chunk"}, body.stream_options, choices, first)
