"""JSON and server-sent events on the wire."""
import json

from starlette.responses import Response, StreamingResponse

from edgeattn.apps.server.answers import Answers


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


def respond(content: dict) -> Response:
    return Response(json.dumps(content, allow_nan=False), media_type="application/json")
