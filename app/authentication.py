"""Lets requests in: by API key, and where there are none by the name that they are sent to.

While ``DEEPTRUST_KEYS`` is unset everybody may ask for everything, the application listens on loopback only, and
answers under names of loopback only, and those that its settings list: a page whose name leads here is another's.

A key comes as ``Authorization: Bearer KEY``, or as the password of HTTP Basic under any user name, which is how a
browser asks for it. Knows no route's meaning beyond its scope.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import logging
import math
import os
import re
import time
from collections.abc import Callable, Collection
from pathlib import Path

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from app.keys import VARIABLE, Key, KeyFileError, KeyRing, KeyScope, Share, read_keys
from app.problems import Problem

_log = logging.getLogger("ray.serve")

_LOOKING = frozenset(("GET", "HEAD", "OPTIONS"))
_ANNOTATING = frozenset(("/v1/analyze", "/v1/detect", "/v1/caption", "/v1/tag"))
_LOOPBACK = frozenset(("127.0.0.1", "localhost", "::1"))
#: A `Host` that no name server is asked for; and what follows the name in any.
_LOOPBACK_HOST = re.compile(r"(?:localhost|127(?:\.[0-9]{1,3}){3}|\[::1\])(?::[0-9]*)?", re.IGNORECASE)
_PORT = re.compile(r":[0-9]*$")
#: When to try again while keys cannot be read.
_RETRY_AFTER_S = 5
#: How often replicas tell each other of the day's requests.
_SHARE_S = 2.0
#: Answered to everybody: whoever watches over the application has no key.
OPEN = frozenset(("/healthz", "/readyz"))
_OTHER_HOST = (
    "Without API keys it is answered under names of loopback only: ask http://localhost or http://127.0.0.1, list the "
    "name of a proxy in front as `args.limits.hosts` of the Serve configuration, or make API keys."
)


def check_exposure(host: str | None) -> None:
    """Whether the application may listen at ``host``: beyond loopback it wants keys; and keys that are wanted, it wants
    to be able to read.

    Raises:
        KeyFileError: it may not; the message says what to do.
    """
    named = os.environ.get(VARIABLE)
    if named:
        if all(key.revoked for key in read_keys(Path(named)).keys):
            raise KeyFileError(f"{named} holds no key in use: make one with `python -m app.keys create NAME`")
    elif host is not None and host not in _LOOPBACK:
        raise KeyFileError(
            f"http_options.host is {host}: without API keys it listens on loopback only. Make some with `python -m "
            f"app.keys create NAME` and let {VARIABLE} name their file, or set the host to 127.0.0.1"
        )


def scope_of(method: str, path: str) -> KeyScope:
    """What a request needs: to annotate, to look and to search is `read`, whatever else writes is `feedback`, and to
    remove and to review is `admin`.
    """
    if method == "DELETE" or path.startswith(("/v1/review", "/v1/admin")):
        return "admin"
    return "read" if method in _LOOKING or path in _ANNOTATING else "feedback"


class RequireKey:
    """ASGI middleware: nothing but health is answered without a key, once ``DEEPTRUST_KEYS`` names a file; and until
    then, under no other name than loopback's and those that are listed, nor what another site's page makes a browser
    send. A browser takes a page whose name was made to lead to loopback (DNS rebinding) for one of ours, but says the
    name.

    Args:
        share: keeps the counts that quotas go by for all replicas.
        hosts: names, in lower case and without port, under which it is asked too.
    """

    def __init__(
        self, app: ASGIApp, share: Share | None = None, hosts: Callable[[], Collection[str]] = frozenset
    ) -> None:
        self.app, self._hosts = app, hosts
        path = os.environ.get(VARIABLE)
        self.ring = KeyRing(Path(path)) if path else None
        self._share = share
        self._sharing: asyncio.Task[None] | None = None
        self._shared_at = -math.inf
        self._why_not = ""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            state, key, is_open = scope.setdefault("state", {}), None, scope["path"] in OPEN
            try:
                if self.ring is None:
                    operates = self._is_asked_as_ours(scope)
                    if not operates and not is_open:
                        raise Problem("host_refused", _OTHER_HOST)
                    if scope["method"] not in _LOOKING and not _is_from_here(scope):
                        raise Problem("forbidden", "A page of another site may not send anything here.")
                else:
                    key = self.ring.find(_credentials(scope)[1]) if is_open else _admit(self.ring, scope)
                    operates = key is not None and "admin" in key.scopes
            except Problem as problem:
                await problem.to_response(scope)(scope, receive, send)
                return
            if key is not None and key.per_day is not None:
                self._share_soon()
            state["caller"] = key.caller if key is not None else ""
            state["operator"] = operates
        await self.app(scope, receive, send)

    def _is_asked_as_ours(self, scope: Scope) -> bool:
        host = Headers(scope=scope).get("host", "")
        return _LOOPBACK_HOST.fullmatch(host) is not None or _PORT.sub("", host.lower()) in self._hosts()

    def _share_soon(self) -> None:
        """Have counts shared beside the requests, now and then, until the last ones are."""
        if self._share is not None and (self._sharing is None or self._sharing.done()):
            self._sharing = asyncio.get_running_loop().create_task(self._share_all(self._share))

    async def _share_all(self, share: Share) -> None:
        assert self.ring is not None
        while self.ring.has_unshared:
            await asyncio.sleep(self._shared_at + _SHARE_S - time.monotonic())
            self._shared_at = time.monotonic()
            await self._share_uses(self.ring, share)

    async def _share_uses(self, ring: KeyRing, share: Share) -> None:
        why_not = ""
        try:
            await ring.share_uses(share)
        except Exception as error:  # of any store: a quota that is counted here alone is better than no answer
            why_not = f"{type(error).__name__}: {error}"
        if why_not and why_not != self._why_not:
            _log.warning("quotas of API keys hold for this replica alone while uses cannot be shared: %s", why_not)
        self._why_not = why_not


def caller_of(scope: Scope) -> str:
    """Who sent a request, for what belongs to one sender; "" where there are no keys and everybody is the same."""
    return str(scope.get("state", {}).get("caller", ""))


def is_operator(scope: Scope) -> bool:
    """Whether what is for operators may be shown: to a key with scope `admin`, and where there are no keys to whoever
    asks under a name of ours, because then only loopback is listened on.
    """
    return bool(scope.get("state", {}).get("operator", False))


def _credentials(scope: Scope) -> tuple[str, str]:
    """Kind of what a request says of its sender, in lower case, and the key in it."""
    kind, _, credentials = Headers(scope=scope).get("authorization", "").partition(" ")
    credentials = credentials.strip()
    if kind.lower() == "basic":
        with contextlib.suppress(ValueError):  # of letters that are not ASCII, of base64 and of UTF-8
            credentials = base64.b64decode(credentials, validate=True).decode().partition(":")[2]
    return kind.lower(), credentials


def _is_from_here(scope: Scope) -> bool:
    """Whether no page of another site made a browser send this; programs say nothing of a page."""
    headers = Headers(scope=scope)
    origin = headers.get("origin")
    return (
        headers.get("sec-fetch-site") == "same-origin"
        or origin is None
        or origin.partition("://")[2] == headers.get("host")
    )


def _admit(ring: KeyRing, scope: Scope) -> Key:
    """Let a request pass; returns its key.

    Raises:
        Problem: `unauthorized`, `forbidden`, `rate_limited`, `quota_exceeded`, or `unavailable` while nobody knows.
    """
    kind, credentials = _credentials(scope)
    key = ring.find(credentials)
    if not ring.is_known:
        raise Problem(
            "unavailable",
            "The service cannot read its API keys; whoever runs it finds the reason in its log.",
            headers={"Retry-After": str(_RETRY_AFTER_S)},
        )
    if key is None:
        raise Problem(
            "unauthorized",
            "Send an API key that is in use, as `Authorization: Bearer KEY`.",
            headers={"WWW-Authenticate": 'Basic realm="DeepTrust", charset="UTF-8"'},
        )
    scope.setdefault("state", {})["key"] = key.name  # for whoever counts
    # a browser sends Basic credentials along with what another site's page makes it send
    if kind == "basic" and scope["method"] not in _LOOKING and not _is_from_here(scope):
        raise Problem("forbidden", "A page of another site may not use this browser's key.")
    wanted = scope_of(scope["method"], scope["path"])
    if not key.scopes & {wanted, "admin"}:
        raise Problem("forbidden", f"This key has no scope `{wanted}`.")
    if (wait_s := ring.wait_s(key)) > 0:
        seconds = max(1, math.ceil(wait_s))
        raise Problem(
            "rate_limited",
            f"At most {key.per_second:g} requests a second with this key; try again in {seconds} s",
            headers={"Retry-After": str(seconds)},
        )
    if (wait_s := ring.quota_wait_s(key)) > 0:
        raise Problem(
            "quota_exceeded",
            f"At most {key.per_day} requests a day with this key; it begins again at midnight UTC",
            headers={"Retry-After": str(math.ceil(wait_s))},
        )
    return key
