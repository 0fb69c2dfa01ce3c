"""What every request must pass, whatever its route: Host, Origin, key, announced size, a client that reads."""
import asyncio
import hmac
import ipaddress
import re
import socket
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from edgeattn.apps.server import errors
from edgeattn.apps.server.admission import SLOWEST, too_large
from edgeattn.apps.server.settings import Settings

PUBLIC = ("/", "/health", "/favicon.ico")  # the page itself holds no secret: whoever opens it types the key into it
HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::[0-9]{1,5})?")
HEADERS = {b"x-content-type-options": b"nosniff", b"referrer-policy": b"no-referrer", b"cache-control": b"no-store",
           b"cross-origin-resource-policy": b"same-origin",
           b"content-security-policy": b"default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'self'"}


class ClientGone(Exception):
    """It does not read what it asked for."""


class Guard:
    """ASGI middleware. Host: a web page of another name that resolves to this machine (DNS rebinding) is turned away. Origin: so is one
    that says where it comes from, unless it is ours or allowed. Then the key, compared in constant time."""

    def __init__(self, app: ASGIApp, settings: Settings):
        self._app, self._settings = app, settings
        self._hosts = {"localhost", socket.gethostname().lower(), *settings.allowed_hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return  # no websockets
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        try:
            await (self._refusal(scope, headers) or self._app)(scope, receive, self._guarded(send))
        except ClientGone:
            pass  # the connection closes, because the answer is not complete

    def _refusal(self, scope, headers):
        """The answer to a request that may not go on, or None."""
        host = headers.get(b"host", "")
        if not self._host_allowed(host):
            return errors.response(403, "this name of the server is not allowed: call it localhost or by its IP address, or start it with "
                                        "--allowed-host NAME", "host_not_allowed")
        origin = headers.get(b"origin")
        if origin is not None and not self._origin_allowed(origin, scope, host):
            return errors.response(403, "web pages of this origin may not call the server: start it with --cors-origin ORIGIN",
                                   "origin_not_allowed")
        if self._settings.api_key and not self._public(scope) and not self._known(headers.get(b"authorization", "")):
            return errors.response(401, "a key is needed: send it as Authorization: Bearer KEY", "invalid_api_key")
        length = headers.get(b"content-length", "0")
        if not length.isascii() or not length.isdigit() or int(length[:20]) > self._settings.max_body:
            return errors.response(413, too_large(self._settings))
        return None

    def _host_allowed(self, host):
        found = HOST.fullmatch(host)
        if not found:
            return False
        name = found[1].strip("[]").lower()
        if name in self._hosts or "*" in self._hosts:
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
        return address.is_loopback or not self._settings.local

    def _origin_allowed(self, origin, scope, host):
        own = origin == f"{scope['scheme']}://{host}"
        return own or origin in self._settings.cors_origins or "*" in self._settings.cors_origins

    def _public(self, scope):
        return scope["path"] in PUBLIC or scope["path"].startswith("/static/")

    def _known(self, authorization):
        scheme, _, key = authorization.partition(" ")
        return scheme.lower() == "bearer" and hmac.compare_digest(key.strip().encode(), self._settings.api_key.encode())

    def _guarded(self, send):
        """send with our headers; a client that reads nothing for too long is left, and so is one that reads too little for very long."""
        size, deadline = 0, 0.0

        async def sending(message: Message) -> None:
            nonlocal size, deadline
            if message["type"] == "http.response.start":
                deadline = time.monotonic() + self._settings.time_limit + self._settings.write_limit
                present = {name.lower() for name, _ in message["headers"]}
                message["headers"] = [*message["headers"], *((name, value) for name, value in HEADERS.items() if name not in present)]
            try:
                within = min(self._settings.write_limit, deadline + size / SLOWEST - time.monotonic())
                await asyncio.wait_for(send(message), within)
            except TimeoutError:
                raise ClientGone from None
            size += len(message.get("body", b""))
        return sending
