"""Connections: uvicorn's over h11, of which only so many may be open, and none for long without asking for something."""
import asyncio
import time
from http import HTTPStatus

import uvicorn
from starlette.responses import Response
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from edgeattn.apps.server import errors

HEAD = 10.0    # seconds until the head of a first request must be there, and of a later one that has begun
IDLE = 30      # seconds that a connection may be kept for another request
GRACE = 1.0    # seconds that a connection is idle before it gives way to a new one
SPARE = 256    # connections beyond the most that are still told why they are refused


def config(app, connections: int) -> uvicorn.Config:
    """A server's settings. connections: the most that may be open; for one more, the one that has been idle for longest is closed, or it is
    answered with 503."""
    return uvicorn.Config(app, http=Connection, limit_concurrency=connections, log_level="error", access_log=False, server_header=False,
                          ws="none", timeout_keep_alive=IDLE, timeout_graceful_shutdown=5)


class Connection(H11Protocol):
    """One of them, with requests one after the other; what goes wrong before there is a request is told in the form of all errors."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self._most, self.limit_concurrency = self.limit_concurrency, None  # its refusal is plain text
        self._timer: asyncio.TimerHandle | None = None
        self._since = time.monotonic()  # when it was last asked for something

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._await_head()
        if len(self.connections) <= self._most:
            return
        longest = min((other for other in self.connections if other.idle), key=lambda other: other._since, default=self)
        if time.monotonic() - longest._since > GRACE:
            longest.transport.abort()
        elif len(self.connections) <= self._most + SPARE:
            self.app = _full
        else:
            transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget_head()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if not self.idle:
            self._forget_head()
        elif self._timer is None:  # the beginning of a head, or more of a body that is not wanted
            self._await_head()

    def on_response_complete(self) -> None:
        self._since = time.monotonic()
        super().on_response_complete()

    def shutdown(self) -> None:
        if self.answered or not self.cycle.more_body:
            super().shutdown()
        else:  # what it still has to send is not waited for
            self.transport.close()

    def send_400_response(self, msg: str) -> None:
        if self.answered or not self.cycle.response_started:
            self._answer(errors.response(400, "this is no HTTP request"))
        else:  # in the middle of an answer
            self.transport.close()

    @property
    def answered(self) -> bool:
        """Nothing is asked for, or what was is answered."""
        return self.cycle is None or self.cycle.response_complete

    @property
    def idle(self) -> bool:
        """It is answered, and open."""
        return self.answered and not self.transport.is_closing()

    def _await_head(self):
        self._timer = self.loop.call_later(HEAD, self._late)

    def _forget_head(self):
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _late(self):
        self._timer = None
        if self.idle:
            self._answer(errors.response(408, "no request arrived in time"))

    def _answer(self, response: Response):
        """Outside of HTTP's turns, as the last thing that is said."""
        lines = [b"HTTP/1.1 %d %s" % (response.status_code, HTTPStatus(response.status_code).phrase.encode()), b"connection: close",
                 *(name + b": " + value for name, value in response.raw_headers)]
        self.transport.write(b"\r\n".join(lines) + b"\r\n\r\n" + response.body)
        self.transport.close()


async def _full(scope: Scope, receive: Receive, send: Send) -> None:
    response = errors.response(503, "the server has as many connections as it may: try again later", "server_busy")
    response.headers["connection"] = "close"
    await response(scope, receive, send)
