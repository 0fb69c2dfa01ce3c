"""JSON and server-sent events on the wire."""
import json

from starlette.responses import Response

EVENTS = {"X-Accel-Buffering": "no"}  # a proxy must not hold events back


def event(content: dict) -> bytes:
    """One event. ASCII, so that no text can break a line or fail to be encoded."""
    return f"data: {json.dumps(content, allow_nan=False)}\n\n".encode()


def respond(content: dict) -> Response:
    return Response(json.dumps(content, allow_nan=False), media_type="application/json")
