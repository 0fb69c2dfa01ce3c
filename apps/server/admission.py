"""What requests may take before they are in the engine's queue: bytes of bodies, and turns to be read, rendered and tokenized."""
import asyncio
import time
from collections.abc import Callable

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from edgeattn.apps.server.errors import Refusal
from edgeattn.apps.server.settings import Settings

PLACES = 2            # requests that are prepared at once: each may take hundreds of megabytes
BODIES = 8            # largest bodies that are held at once, by requests of any state
SMALL = 1 << 16       # bytes of a body that there is always room for: a few who send slowly must not take all of it
SLOWEST = 1 << 14     # bytes a second; a client that sends or reads less is left
HEAVY = "/api/conversations/"  # a conversation can be as long as a book, and is made HTML


class Admission:
    """ASGI middleware. A body is read whole, and its request then waits for one of PLACES, which it leaves when its answer begins or
    `prepared` says so."""

    def __init__(self, app: ASGIApp, settings: Settings):
        self._app, self._settings, self._held, self._places = app, settings, 0, asyncio.Semaphore(PLACES)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        body = _Body(self._settings)
        leave = None
        try:
            try:
                self._hold(body, _announced(scope))  # or many that come at once would all be refused half-way
                async for size in body.arrive(receive):
                    self._hold(body, size)
                if body.content or scope["method"] == "GET" and scope["path"].startswith(HEAVY):
                    leave = await self._enter(receive)
            except Refusal as refusal:
                return await refusal.response()(scope, receive, send)
            if body.complete:  # or the client has gone
                await self._app(scope | {"edgeattn.prepared": leave}, body.again(receive), _before(send, leave))
        finally:
            self._held -= body.held
            if leave:
                leave()

    def _hold(self, body, size):
        """Count a body as so many bytes at least."""
        more = max(0, size - body.held)
        if more and size > SMALL and self._held + more > BODIES * self._settings.max_body:
            raise Refusal(503, "the server holds as many long requests as it may: try again later", "server_busy")
        body.held, self._held = body.held + more, self._held + more

    async def _enter(self, receive) -> Callable[[], None]:
        """-> what gives the place back, once. Refusal: nobody left in time, or the client has gone."""
        if self._places.locked():
            turn, gone = asyncio.ensure_future(self._places.acquire()), asyncio.ensure_future(receive())
            try:
                await asyncio.wait((turn, gone), timeout=self._settings.wait_limit, return_when=asyncio.FIRST_COMPLETED)
            finally:
                gone.cancel()
                entered = turn.done() or not turn.cancel()
            if not entered:
                raise Refusal(503, "other requests take long to be read: try again later", "server_busy")
        else:
            await self._places.acquire()
        left = False

        def leave():
            nonlocal left
            if not left:
                left = True
                self._places.release()
        return leave


def prepared(request: Request) -> None:
    """From now on a request waits for its answer only: the next one may be prepared."""
    if leave := request.scope.get("edgeattn.prepared"):
        leave()


class _Body:
    """`held`: bytes that are counted for it."""

    def __init__(self, settings):
        self._settings, self._pieces, self.content, self.held, self.complete = settings, [], b"", 0, False

    async def arrive(self, receive):
        """Yields the size with each piece before that is kept; `complete` is False in the end if the client has gone. Refusal: too large
        or too slow."""
        size, deadline = 0, time.monotonic() + self._settings.write_limit
        while not self.complete:
            try:
                within = min(self._settings.write_limit, deadline + size / SLOWEST - time.monotonic())
                message = await asyncio.wait_for(receive(), within)
            except TimeoutError:
                raise Refusal(408, "the request did not arrive in time") from None
            if message["type"] == "http.disconnect":
                return
            piece = message.get("body", b"")
            size += len(piece)
            if size > self._settings.max_body:
                raise Refusal(413, too_large(self._settings))
            yield size
            self._pieces.append(piece)
            self.complete = not message.get("more_body", False)
        self.content = b"".join(self._pieces)
        self._pieces.clear()

    def again(self, receive) -> Receive:
        """receive, with the whole body first."""
        told = False

        async def receiving() -> Message:
            nonlocal told
            if told:
                return await receive()
            told = True
            content, self.content = self.content, b""
            return {"type": "http.request", "body": content, "more_body": False}
        return receiving


def _announced(scope):
    """What Guard has looked at: its length in bytes, 0 where that is not told."""
    return next((int(value) for name, value in scope["headers"] if name == b"content-length"), 0)


def too_large(settings: Settings) -> str:
    return f"the request is larger than {settings.max_body} bytes"


def _before(send, act) -> Send:
    """send, which does something before an answer begins."""
    async def sending(message: Message) -> None:
        if act:
            act()
        await send(message)
    return sending
