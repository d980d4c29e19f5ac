"""Call-backs: who sent pictures with ``Prefer: respond-async`` is told at an address of theirs when they are answered.

In: ``Callback-Url`` with the request, an address under one of ``args.callbacks.allow``. Out: one signed ``POST`` to it
(docs/callbacks.md), again and again until it is taken or the time for it is over, whatever is killed meanwhile: who is
to be told stands in the store (``app.store.callbacks``).

A sender chooses where this process connects to, within what operators allow. So an address is taken apart strictly and
compared in parts; the name is looked up here and the connection made to what was found, never to an address of the own
network, unless the list itself names that address; no redirect is followed, no proxy used, and of the answer only the
status is read. Knows no picture and no model.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import ipaddress
import json
import logging
import os
import random
import re
import socket
import ssl
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
from pydantic import BaseModel, ConfigDict, Field, field_validator
from sqlalchemy import Connection

from app.problems import Problem
from app.store import callbacks, deferred
from app.store.callbacks import Due, Hold, Turn
from app.store.database import StoreUnavailable
from app.store.deferred import Outcome
from app.store.store import Store, StoreBusy, StoreOff
from deployments import telemetry

_log = logging.getLogger("ray.serve")

#: Signs what is sent: from the environment, or from the file that the second one names, which is read each time.
#: Several, separated by white space, sign side by side while one is being replaced by another.
SECRET_VARIABLE, SECRET_FILE_VARIABLE = "DEEPTRUST_CALLBACK_SECRET", "DEEPTRUST_CALLBACK_SECRET_FILE"
_SECRET_LETTERS = 32
SIGNATURE, IDEMPOTENCY_KEY = "DeepTrust-Signature", "Idempotency-Key"

_MOST_LETTERS = 2048
_NAME = re.compile(r"(?!-)[a-z0-9-]{1,63}(?<!-)(\.(?!-)[a-z0-9-]{1,63}(?<!-))*")
#: Percent signs that would make another path of it on the other side.
_HIDDEN = re.compile(r"%(2e|2f|3b|5c|00)", re.IGNORECASE)
_LOOK_S = 1.0
_LEASE_MARGIN_S = 30.0
_RETRY_AFTER_S = 2
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 2.0, 300.0
#: Code of a call-back whose address the list does not name.
_REFUSED = "refused"
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
#: All of IPv6 that is routed in the internet.
_GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")

#: The addresses that a name has.
Resolve = Callable[[str, int], Awaitable[list[str]]]


class AddressRefused(ValueError):
    """Nobody is told at this address; the message says why, and is for whoever sent it."""


@dataclass(frozen=True)
class Address:
    """Where to tell somebody, in its parts."""

    scheme: str
    host: str
    port: int
    path: str
    """With its query, as it was written."""

    @property
    def ip(self) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
        """The host, where it is an address and no name."""
        with contextlib.suppress(ValueError):
            return ipaddress.ip_address(self.host)
        return None

    @classmethod
    def parse(cls, text: str) -> Address:
        """
        Raises:
            AddressRefused: it is no address that can be told from every other one.
        """
        if not re.fullmatch(r"[!-~]+", text) or len(text) > _MOST_LETTERS or set(text) & set('\\"<>^`{|}#'):
            raise AddressRefused("it has characters that an address may not have, or too many")
        try:
            parts = urlsplit(text)
            port = parts.port
        except ValueError:
            raise AddressRefused("it is no address") from None
        scheme, host = parts.scheme, (parts.hostname or "")
        if scheme not in ("https", "http") or not host or "@" in parts.netloc or port == 0:
            raise AddressRefused("it is not of the form https://HOST[:PORT]/PATH, without user and password")
        made = cls(scheme, host, port or (443 if scheme == "https" else 80), parts.path or "/")
        if made.ip is None and (not _NAME.fullmatch(host) or host.replace(".", "").isdigit()):
            raise AddressRefused("its host is no name")
        if _HIDDEN.search(made.path) or {".", ".."} & set(re.split("[/;]", made.path)):
            raise AddressRefused("its path goes up, or hides where it goes")
        if scheme == "http" and not (made.ip and made.ip.is_loopback):
            raise AddressRefused("it has to be https")
        return cls(scheme, host, made.port, made.path + (f"?{parts.query}" if parts.query else ""))

    def is_under(self, prefix: Address) -> bool:
        """Whether an entry of the list allows it: same scheme, host and port, and the path within the entry's."""
        path, folder = self.path.partition("?")[0], prefix.path.rstrip("/")
        same = (self.scheme, self.host, self.port) == (prefix.scheme, prefix.host, prefix.port)
        return same and (path == folder or path.startswith(f"{folder}/"))


def is_public(text: str) -> bool:
    """Whether an address belongs to the internet and to no network of somebody's own, however it is written."""
    ip = ipaddress.ip_address(text)
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if ip in _NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return inner.is_global and not inner.is_multicast
        if ip not in _GLOBAL_UNICAST:
            return False
    return ip.is_global and not ip.is_multicast


class CallbackSettings(BaseModel):
    """``args.callbacks``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    allow: tuple[str, ...] = Field(
        (),
        description="beginnings of addresses that may be told, as `https://HOST[:PORT]/PATH`; none: call-backs are "
        "refused. A host that is an address may be one of the own network, a name may not lead there; http to loopback "
        "only",
    )
    timeout_s: float = Field(10.0, gt=0, le=60, description="one attempt's whole time, from looking the name up")
    max_bytes: int = Field(2**20, ge=1024, description="body of a call-back; a larger answer is to be fetched")
    in_work: int = Field(
        8,
        ge=1,
        le=256,
        description="that an ingress replica makes at a time, and so many over the seconds that a receiver takes in a "
        "second; to a host that was not reached at the last attempt one",
    )
    give_up_after_h: float = Field(6.0, gt=0, le=24 * 7, description="hours after which nobody is told any more")

    @field_validator("allow")
    @classmethod
    def _are_addresses(cls, entries: tuple[str, ...]) -> tuple[str, ...]:
        for entry in entries:
            try:
                if "?" in Address.parse(entry).path:
                    raise AddressRefused("it has a query")
            except AddressRefused as error:
                raise ValueError(f"{entry!r}: {error}") from None
        return entries

    @property
    def prefixes(self) -> list[Address]:
        """The list, taken apart."""
        return [Address.parse(entry) for entry in self.allow]


def secrets() -> list[bytes]:
    """What call-backs are signed with; empty: there is none."""
    text = os.environ.get(SECRET_VARIABLE, "")
    if not text and (file := os.environ.get(SECRET_FILE_VARIABLE)):
        with contextlib.suppress(OSError, UnicodeDecodeError):
            text = Path(file).read_text()
    return [word.encode() for word in text.split() if len(word) >= _SECRET_LETTERS]


def why_not(settings: CallbackSettings) -> str:
    """Why call-backs that are allowed cannot be made, for operators; or ""."""
    if settings.allow and not secrets():
        return (
            f"args.callbacks.allow names addresses and there is nothing to sign with: let {SECRET_VARIABLE} be at "
            f"least {_SECRET_LETTERS} random characters (`openssl rand -hex 32`), or {SECRET_FILE_VARIABLE} name a "
            "file of them"
        )
    return ""


def signature(body: bytes, at_s: int, keys: Sequence[bytes]) -> str:
    """Value of ``DeepTrust-Signature``: the time, and an HMAC-SHA256 of time and body with each key."""
    signed = b"%d." % at_s + body
    return ",".join([f"t={at_s}", *(f"v1={hmac.new(key, signed, hashlib.sha256).hexdigest()}" for key in keys)])


@dataclass(frozen=True)
class _Unreached:
    """A host that was not reached at the last attempt, and until when it is left alone."""

    pause_s: float
    until_s: float


def body_of(place: str, found: Sequence[Outcome], max_bytes: int) -> bytes:
    """What is sent: the place, and the answer as `GET /v1/results/{id}` gives it, if it is not too large."""
    status, answer = answer_of(found)
    said = {"id": place, "result": f"/v1/results/{place}", "status": status}
    whole = json.dumps(said)[:-1] + f', "answer": {answer}}}'
    if len(whole.encode()) > max_bytes:
        return json.dumps(said | {"answer": None}).encode()
    return whole.encode()


def answer_of(found: Sequence[Outcome]) -> tuple[int, str]:
    """Status and JSON of the answer to a request whose pictures are all answered. A problem in it is marked as final:
    the place may have another one, of its own, while it cannot be looked at.
    """
    if len(found) == 1 and found[0].status == 200:
        return 200, found[0].answer
    items = [json.loads(outcome.answer) | ({} if outcome.status == 200 else {"final": True}) for outcome in found]
    if len(found) == 1:
        return found[0].status, json.dumps(items[0])
    return 200, json.dumps({"items": items}, ensure_ascii=False, separators=(",", ":"))


def resolve(host: str, port: int) -> list[str]:
    """What the machine's resolver says. Raises ``OSError``."""
    return [str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


class Callbacks:
    """Accepts addresses, and tells who is due. Belongs to one event loop."""

    def __init__(
        self,
        settings: CallbackSettings,
        store: Store,
        count: Callable[[str], None],
        look_up: Resolve | None = None,
    ) -> None:
        """
        Args:
            count: told each outcome: `failed` is tried again, `delivered`, `given_up` and `gone` are not.
        """
        self.settings, self._store, self._count = settings, store, count
        # a name server that does not answer holds no thread that others wait for
        self._threads = ThreadPoolExecutor(settings.in_work, thread_name_prefix="look-up")
        self._resolve = look_up or self._look_up
        self._prefixes = settings.prefixes
        self._telling: dict[asyncio.Task[None], str] = {}
        """Call-backs that are being made, and to which host."""
        self._unreached: dict[str, _Unreached] = {}
        self._client: httpx.AsyncClient | None = None
        if reason := why_not(settings):
            _log.error("call-backs: %s", reason)

    def check(self, url: str, waits: bool, is_possible: bool) -> None:
        """Whether somebody can be told at this address later.

        Args:
            waits: the sender asked for ``respond-async``.
            is_possible: there is a queue.

        Raises:
            Problem: `callback_refused`, or `unavailable` while a queue that is wanted cannot be used.
        """
        try:
            if not self._prefixes:
                raise AddressRefused("no address is on the list of those that may be told here")
            if not secrets():
                raise AddressRefused("this service has nothing to sign with; tell whoever runs it")
            if not waits:
                raise AddressRefused("only who sends `Prefer: respond-async` is told later")
            if self._store.settings.keep == "off" or self._store.settings.max_deferred == 0:
                raise AddressRefused("this service keeps nothing, and can tell nobody later")
            self._allowed(url)
        except AddressRefused as error:
            raise Problem("callback_refused", f"Callback-Url: {error}.") from None
        if not is_possible:
            raise Problem(
                "unavailable",
                f"Nobody can be told later at the moment; try again in {_RETRY_AFTER_S} s.",
                {"Retry-After": str(_RETRY_AFTER_S)},
            )

    def _allowed(self, url: str) -> Address:
        address = Address.parse(url)
        if not any(address.is_under(prefix) for prefix in self._prefixes):
            raise AddressRefused("this address is not on the list of those that may be told")
        return address

    # ---- work ---------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Tell whoever is due, for ever."""
        while True:
            pause_s = _LOOK_S
            with contextlib.suppress(StoreBusy, StoreUnavailable, StoreOff):  # it says so itself
                if self._prefixes and self._store.status()["state"] == "ready":
                    pause_s = await self._begin_some()
            await asyncio.sleep(pause_s)

    def close(self) -> None:
        """Look nothing up any more."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def count_due(self) -> int:
        """Who is due; 0 if that cannot be known."""
        with contextlib.suppress(StoreBusy, StoreUnavailable, StoreOff):
            return await self._store.read(callbacks.count)
        return 0

    async def _begin_some(self) -> float:
        """Tell as many as there is room for, once there is some; returns seconds until it is worth looking again."""
        if len(self._telling) >= self.settings.in_work:
            await asyncio.wait(self._telling, return_when=asyncio.FIRST_COMPLETED)
        room, now = self.settings.in_work - len(self._telling), time.time()
        if not secrets() or not await self._store.read(partial(callbacks.is_any_due, now_s=now)):
            return _LOOK_S
        lease_s = self.settings.timeout_s + _LEASE_MARGIN_S
        lease = partial(callbacks.lease, now_s=now, lease_s=lease_s, most=room, held=self._held(now))
        turn = await self._store.commit(lease, self._leased_late)
        for due in turn.taken:
            task = asyncio.get_running_loop().create_task(self._tell(due))
            self._telling[task] = due.host
            task.add_done_callback(self._telling.pop)
        self._leave(turn.given_up)
        return 0.0 if len(turn.taken) == room or turn.put_off or turn.given_up else _LOOK_S

    def _leased_late(self, turn: Turn) -> None:
        """Let whoever is next tell what was leased after this replica had stopped waiting for it: it was no attempt."""

        def give_back(connection: Connection) -> None:
            for due in turn.taken:
                callbacks.put_off(connection, due, time.time(), counts=False)

        with contextlib.suppress(StoreUnavailable, StoreOff):
            self._store.submit(give_back)
        self._leave(turn.given_up)

    # ---- hosts that are not reached -----------------------------------------------------------------------------

    def _held(self, now_s: float) -> dict[str, Hold]:
        """Hosts that were not reached at the last attempt: each has one call-back in work at most, and that after a
        pause, so that whoever does not answer holds up nobody else's.
        """
        busy = set(self._telling.values())
        over_s = now_s - self.settings.give_up_after_h * 3600
        return {
            host: Hold(
                until_s=gone.until_s if now_s < gone.until_s else now_s + gone.pause_s,
                takes_one=now_s >= gone.until_s and host not in busy,
                # not one that was lost just now: after an outage of our own the time of many is over
                gives_up_before_s=over_s if gone.pause_s >= _LONGEST_PAUSE_S else 0.0,
            )
            for host, gone in self._unreached.items()
        }

    def _note_reached(self, host: str, is_reached: bool) -> None:
        if is_reached:
            self._unreached.pop(host, None)
            return
        now, gone = time.time(), self._unreached.get(host)
        if gone is None or now >= gone.until_s:  # else it is another one of those that were on their way together
            pause_s = _FIRST_PAUSE_S if gone is None else min(_LONGEST_PAUSE_S, 2 * gone.pause_s)
            self._unreached[host] = _Unreached(pause_s, now + pause_s * random.uniform(0.75, 1.25))

    def _leave(self, given_up: Sequence[Due]) -> None:
        """Note who is told no more since his host is not reached, each under the name of his own request."""
        for due in given_up:
            copy_context().run(self._left, due)

    def _left(self, due: Due) -> None:
        with telemetry.resumed(due.request_id, due.traceparent):
            self._said("given_up", due, "unreached", 0, 0)

    # ---- one call-back ------------------------------------------------------------------------------------------

    async def _tell(self, due: Due) -> None:
        try:
            with telemetry.resumed(due.request_id, due.traceparent), telemetry.span("call back"):
                await self._attempt(due)
        except (StoreBusy, StoreUnavailable, StoreOff):
            # the lease ends, and somebody tells again: that may be the second time
            _log.warning("what became of a call-back could not be written")
        except Exception:
            _log.exception("a call-back failed")

    async def _attempt(self, due: Due) -> None:
        found = await self._store.read(partial(deferred.outcomes, place=due.place))
        if not found:
            await self._end(due, "gone", "gone", 0)
            return
        began = time.perf_counter()
        try:
            address = self._allowed(due.url)  # the list may be another one since
            body = await asyncio.to_thread(body_of, due.place, found, self.settings.max_bytes)
            async with asyncio.timeout(self.settings.timeout_s):
                status, code = await self._post(address, due, body), ""
        except AddressRefused:  # by this replica: another one may have a newer list
            status, code = 0, _REFUSED
        except Exception as error:  # whatever it is, the other side is not reached
            status, code = 0, "timeout" if isinstance(error, TimeoutError) else type(error).__name__
        seconds = time.perf_counter() - began
        if code != _REFUSED:
            self._note_reached(due.host, status > 0)
        if 200 <= status < 300:
            await self._end(due, "delivered", "ok", seconds, status)
        elif status == 410 or time.time() - due.since_s > self.settings.give_up_after_h * 3600:
            await self._end(due, "given_up", code or f"http_{status}", seconds, status)
            _log.error("a call-back was given up after %d attempts", due.attempts)
        else:
            pause_s = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2.0 ** min(due.attempts - 1, 16))
            pause_s *= random.uniform(0.75, 1.25)
            self._said("failed", due, code or f"http_{status}", seconds, status)
            await self._store.commit(partial(callbacks.put_off, due=due, until_s=time.time() + pause_s))

    async def _end(self, due: Due, ending: callbacks.Ending, code: str, seconds: float, status: int = 0) -> None:
        if await self._store.commit(partial(callbacks.end, place=due.place, ending=ending)):
            self._said(ending, due, code, seconds, status)

    def _said(self, outcome: str, due: Due, code: str, seconds: float, status: int) -> None:
        self._count(outcome)
        telemetry.note(
            "callback",
            outcome=outcome,
            code=code,
            host=due.host,
            status=status,
            attempt=due.attempts,
            duration_ms=telemetry.milliseconds(seconds),
        )

    async def _look_up(self, host: str, port: int) -> list[str]:
        return await asyncio.get_running_loop().run_in_executor(self._threads, resolve, host, port)

    async def _post(self, address: Address, due: Due, body: bytes) -> int:
        """Status of the answer.

        Raises:
            OSError: the name leads nowhere, or into a network of somebody's own.
            httpx.HTTPError: there is no answer.
        """
        at, extensions = address.host, {}
        if address.ip is None:
            found = await self._resolve(address.host, address.port)
            if not found or not all(map(is_public, found)):
                raise OSError("the name does not lead to the internet")
            at, extensions = found[0], {"sni_hostname": address.host}
        named = f"[{address.host}]" if ":" in address.host else address.host
        default = 443 if address.scheme == "https" else 80
        headers = {
            "host": named if address.port == default else f"{named}:{address.port}",
            "content-type": "application/json",
            "user-agent": "DeepTrust/1",
            IDEMPOTENCY_KEY: due.place,
            SIGNATURE: signature(body, int(time.time()), secrets()),
        }
        if due.request_id:
            headers["x-request-id"] = due.request_id
        if parent := telemetry.traceparent():
            headers["traceparent"] = parent
        url = httpx.URL(scheme=address.scheme, host=at, port=address.port, raw_path=address.path.encode())
        request = httpx.Request("POST", url, headers=headers, content=body, extensions=self._limits() | extensions)
        answer = await self._open().send(request, stream=True, follow_redirects=False)
        await answer.aclose()  # nothing of it is read
        return answer.status_code

    def _limits(self) -> dict[str, Any]:
        return {"timeout": dict.fromkeys(("connect", "read", "write", "pool"), self.settings.timeout_s)}

    def _open(self) -> httpx.AsyncClient:
        if self._client is None:
            # nothing of the environment: no proxy, no passwords; and no connection that was made for another name
            self._client = httpx.AsyncClient(
                verify=ssl.create_default_context(),
                trust_env=False,
                follow_redirects=False,
                limits=httpx.Limits(max_connections=self.settings.in_work, max_keepalive_connections=0),
            )
        return self._client
