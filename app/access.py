"""A line of log for each request, and ids of requests that can be written into one.

``RequestLines`` is middleware of the application, in the ingress: it counts requests, and says one line of each but
those about health and the page's own files. ``middlewares`` is Serve's call in each proxy
(``RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH``): headers that Serve itself reads are made sound before it does,
while there is no application yet, a proxy says so, where the ingress answers HTTP itself bodies are not read far
ahead of it, and an answer that comes before the end of its request's body is not lost with the connection.
Knows no route's meaning.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import re
import time
from typing import Any, ClassVar

from starlette.middleware import Middleware
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments import telemetry
from deployments.metrics import OTHER, Metrics

#: What Serve is told so that it calls `middlewares`.
CALLBACK_VARIABLE, CALLBACK = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH", "app.access:middlewares"

#: Asked for all the time, and of no use to anybody later: health and the page's own files.
_QUIET = ("/healthz", "/readyz", "/page/", "/samples", "/docs", "/openapi.json")
#: Counted by themselves, and by key: no key, one that may not, and one too often.
_REFUSALS = frozenset((401, 403, 429))
#: A proxy's own addresses.
_OF_SERVE = "/-/"
#: A sender's own id of a request, as it may stand in logs and headers; another is replaced by one that Serve makes.
_SOUND = re.compile(rb"[A-Za-z0-9][A-Za-z0-9._:/+=-]{0,127}")
#: Headers that Serve decodes: one that is no UTF-8 would be a 500 of its own.
_READ_BY_SERVE = frozenset((b"x-request-id", b"traceparent", b"x-session-id", b"serve-multiplexed-model-id"))
#: Headers by which a sender would choose how Serve watches over the request: 0 seconds are no limit at all.
_NOT_THE_SENDERS = frozenset((b"x-request-timeout-seconds", b"x-request-disconnect-disabled"))
#: How much of a body is read before the application takes it; what a piece of it takes beside its bytes.
_MOST_AHEAD_BYTES, _PIECE_BYTES = 2**20, 1024
#: How long a connection that is to be closed is read on after the answer, for a sender who reads when all is sent.
_LINGER_S = 5.0


class SoundHeaders:
    """ASGI middleware of the proxy: of the headers that Serve reads, those that it cannot use are dropped, and those
    that are no sender's to set.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope = {**scope, "headers": [pair for pair in scope["headers"] if _is_sound(*pair)]}
        await self.app(scope, receive, send)


def _is_sound(name: bytes, value: bytes) -> bool:
    name = name.lower().replace(b"_", b"-")
    if name in _NOT_THE_SENDERS:
        return False
    return name not in _READ_BY_SERVE or _SOUND.fullmatch(value) is not None


class Starting:
    """ASGI middleware of the proxy: 503 while there is no application that it could ask.

    A proxy that has just been started, or started again, knows no application for a moment and answers every address
    with 404, which senders do not try again. The application has every address, and its own 404 is a problem.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"].startswith(_OF_SERVE):
            await self.app(scope, receive, send)
            return
        is_serves_own = False

        async def unless_serves_own(message: Message) -> None:
            nonlocal is_serves_own
            if message["type"] == "http.response.start":
                kind = dict(message.get("headers", ())).get(b"content-type", b"")
                is_serves_own = message["status"] == 404 and not kind.startswith(b"application/")
            if not is_serves_own:
                await send(message)

        await self.app(scope, receive, unless_serves_own)
        if is_serves_own:
            from app.problems import Problem  # with all that reads pictures, which a proxy seldom needs

            starting = Problem("unavailable", "The service is starting.", {"Retry-After": "2"})
            await starting.to_response(scope)(scope, receive, send)


class _Ahead:
    """What has been read of a request's body and not been taken by the application. Belongs to one event loop, which
    Serve's server and the application share (``app.cluster``).
    """

    def __init__(self) -> None:
        self.room = asyncio.Event()
        self.room.set()
        self._bytes = 0.0

    def read(self, message: Message) -> None:
        """A message was handed on. After a body's last there is room: what comes next is that the client has gone."""
        self._bytes += _size(message)
        if self._bytes >= _MOST_AHEAD_BYTES and message.get("more_body", False):
            self.room.clear()

    def taken(self, message: Message) -> None:
        """The application has taken a message."""
        self._bytes -= _size(message)
        if self._bytes < _MOST_AHEAD_BYTES:
            self.room.set()

    def end(self) -> None:
        """Nothing is held back any more."""
        self._bytes = -math.inf
        self.room.set()


def _size(message: Message) -> int:
    return len(message.get("body", b"")) + _PIECE_BYTES if message["type"] == "http.request" else 0


class HeldBack:
    """ASGI middleware of the ingress's own server: a body is read no further than a little ahead of the application.

    Serve reads all that a sender sends, as it comes and into a queue without end, because it wants to know when the
    sender goes away: whoever waits to be admitted would have the whole body in memory. Held back, the connection is
    not read, and the sender has to wait; that he goes away is seen when the application takes more or has answered.
    Does nothing where nobody counts what is taken (`Taken`): in Serve's proxy the application is another process.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not Taken.is_counted:
            await self.app(scope, receive, send)
            return
        ahead = scope.setdefault("state", {})["ahead"] = _Ahead()

        async def held_back() -> Message:
            await ahead.room.wait()
            message = await receive()
            ahead.read(message)
            return message

        try:
            await self.app(scope, held_back, send)
        finally:
            ahead.end()  # whoever is still at it hears from the server that it is over


class Taken:
    """ASGI middleware, the application's outermost: counts what it takes of a body, for `HeldBack`."""

    #: Whether this process has an application that counts: it is made before its replica listens.
    is_counted: ClassVar[bool] = False

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        Taken.is_counted = True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        ahead: _Ahead | None = scope.get("state", {}).get("ahead")
        if ahead is None:
            await self.app(scope, receive, send)
            return

        async def taking() -> Message:
            message = await receive()
            ahead.taken(message)
            return message

        await self.app(scope, taking, send)


class Lingering:
    """ASGI middleware of the ingress's own server: who is refused in the midst of a body still hears why.

    A connection that is closed while bytes of it are unread is reset, and a reset takes from the sender what was
    answered before. So the answer goes out whole, the body is read on and thrown away for a while, and only then is the
    connection closed (in stages, as RFC 9112, section 9.6, has it).
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        is_read = is_closing = is_kept_open = False

        async def reading() -> Message:
            nonlocal is_read
            message = await receive()
            is_read = is_read or not message.get("more_body", False)
            return message

        async def answering(message: Message) -> None:
            nonlocal is_closing, is_kept_open
            if message["type"] == "http.response.start":
                is_closing = (b"connection", b"close") in message.get("headers", ())
            elif is_closing and not is_read and not message.get("more_body", False):
                is_kept_open = True
                message = {**message, "more_body": True}
            await send(message)

        await self.app(scope, reading, answering)
        if not is_kept_open:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LINGER_S):
                while not is_read:
                    await reading()
        await send({"type": "http.response.body", "body": b""})


def middlewares() -> list[Middleware]:
    """What Serve's proxies, and replicas of the ingress, put before everything else."""
    return [Middleware(SoundHeaders), Middleware(Starting), Middleware(Lingering), Middleware(HeldBack)]


def route_of(scope: Scope) -> str:
    """A request's route, as `GET /v1/results/{place}`: not what it was given in the path. `other`: there is none.

    Who is refused for want of a key never comes to be routed. HEAD counts as the GET that it is answered as.
    """
    if scope["method"] == "HEAD":
        scope = {**scope, "method": "GET"}
    found = scope.get("route")
    if found is None and (app := scope.get("app")) is not None:
        matching = (route for route in app.routes if route.matches(scope)[0] is Match.FULL)
        found = next(matching, None)
    if found is None or not hasattr(found, "path"):
        return OTHER
    methods = getattr(found, "methods", None) or ()
    return f"{scope['method']} {found.path}" if scope["method"] in methods else found.path


def status_of(status: int) -> str:
    """Class of a status; what keys and load bring about is told apart."""
    return str(status) if status in _REFUSALS else f"{status // 100}xx"


class RequestLines:
    """ASGI middleware: `request` lines with method, status, code, duration and number of pictures; and every request
    counted.

    What the application knows of a request it leaves in ``scope["state"]``: `code`, of a problem, `pictures`, and
    `key`, the name of the key that it came with.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app, self.metrics = app, Metrics()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["path"]
        is_quiet = path == "/" or path.startswith(_QUIET)
        state: dict[str, Any] = scope.setdefault("state", {})
        started, status = time.perf_counter(), 0

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        code = "ok"
        try:
            await self.app(scope, receive, watched)
            code = state.get("code", "ok")
        except asyncio.CancelledError:
            status, code = status or 499, "disconnected"
            raise
        except Exception:
            status, code = status or 500, "internal_error"
            raise
        finally:
            key = str(state.get("key", "")) if status in _REFUSALS else ""
            self.metrics.record("http_requests", 1, route_of(scope), status_of(status or 500), key)
            pictures = {"pictures": state["pictures"]} if "pictures" in state else {}
            if not is_quiet:
                telemetry.note(
                    "request",
                    method=scope["method"],
                    status=status,
                    code=code,
                    duration_ms=telemetry.milliseconds(time.perf_counter() - started),
                    **pictures,
                )
