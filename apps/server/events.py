"""JSON and server-sent events on the wire."""
import json
from collections.abc import AsyncIterator, Callable, Iterable

from starlette.responses import Response, StreamingResponse

from edgeattn.apps.server.answers import Answers, failure


class EventStream(StreamingResponse):
    """Events of some answers, which are cancelled when the client leaves, whenever that is."""

    def __init__(self, events, answers: Answers):
        super().__init__(events, headers={"X-Accel-Buffering": "no"}, media_type="text/event-stream")  # a proxy must not hold them back
        self._answers = answers

    async def __call__(self, scope, receive, send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answers.cancel_unfinished()


def event(content: dict) -> bytes:
    """One event. ASCII, so that no text can break a line or fail to be encoded."""
    return f"data: {json.dumps(content, allow_nan=False)}\n\n".encode()


async def stream(answers: Answers, about: dict, options, choices: Callable, first: Iterable[dict] = ()) -> AsyncIterator[bytes]:
    """The chunks of all answers as they come, in OpenAI's form. choices(index, piece): what each piece tells, one choice a chunk; first:
    choices before any piece. options: a request's stream_options."""
    usage = bool(options and options.include_usage)

    def chunk(choice):
        return event({**about, "choices": [choice], **({"usage": None} if usage else {})})
    for choice in first:
        yield chunk(choice)
    async for index, piece in answers.pieces():
        if piece is None:
            yield b": waiting\n\n"
        elif refusal := failure(piece):
            yield event(refusal.body)
            return
        else:
            for choice in choices(index, piece):
                yield chunk(choice)
    if usage:
        yield event({**about, "choices": [], "usage": answers.usage()})
    yield b"data: [DONE]\n\n"


def respond(content: dict) -> Response:
    return Response(json.dumps(content, allow_nan=False), media_type="application/json")
