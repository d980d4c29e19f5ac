"""A replica of the ingress that lets nobody in any more, and knows when the last one has left.

Serve's own ways to stop do not finish a request of a graph. Deleting an application ends all its deployments together:
a tagger that has nothing to do at that moment is gone before the picture comes to it whose caption is being written.
Shutting Serve down ends callers before those whom they call, and its proxies, with all their connections, before
either. So requests are refused here first, by ``user_config`` and on every replica; when those that were let in have
been answered, Serve may end what it likes. Knows no route but those that are asked while it is closed.
"""

from __future__ import annotations

from collections.abc import Callable

from starlette.types import ASGIApp, Receive, Scope, Send

from app.problems import Problem

#: Asked by whoever wants to know how far it is.
_ALWAYS = ("/healthz", "/readyz")
_RETRY_AFTER_S = 5


class Gate:
    """How many requests are inside a replica, and whether more are let in. Belongs to one event loop."""

    def __init__(self) -> None:
        self.closed = False
        self.inside = 0


class Closing:
    """ASGI middleware: 503 for what comes when the gate is closed; what came before goes on to its end."""

    def __init__(self, app: ASGIApp, gate: Callable[[], Gate]) -> None:
        self.app, self._gate = app, gate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in _ALWAYS:
            await self.app(scope, receive, send)
            return
        gate = self._gate()
        if gate.closed:
            stopping = Problem("unavailable", "The service is stopping.", {"Retry-After": str(_RETRY_AFTER_S)})
            await stopping.to_response(scope)(scope, receive, send)
            return
        gate.inside += 1
        try:
            await self.app(scope, receive, send)
        finally:
            gate.inside -= 1
