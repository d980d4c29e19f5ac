"""API keys: who may ask for what, and how often.

``python -m app.keys create|list|revoke`` keeps a file of names, scopes and hashes; the key itself is printed once and
kept nowhere. ``DEEPTRUST_KEYS`` names the file to the commands and to the application, which looks at it again when it
has changed: a key that is revoked ends within a second, without a restart, and within a minute where the file cannot be
read any more. While the variable is unset everybody may ask for everything, the application listens on loopback only,
and answers under names of loopback only, and those that its settings list: a page whose name leads here is another's.

A key comes as ``Authorization: Bearer KEY``, or as the password of HTTP Basic under any user name, which is how a
browser asks for it. Rate limits hold for each ingress replica. Quotas of a day hold for all of them together, give or
take what comes in a few seconds, where something keeps their counts (``Share``), otherwise for each until it ends.
Knows no route's meaning beyond its scope.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import datetime
import fcntl
import hashlib
import hmac
import json
import logging
import math
import os
import re
import secrets
import stat
import sys
import time
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_settings import CliPositionalArg, CliSubCommand
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from app.problems import Problem

_log = logging.getLogger("ray.serve")

VARIABLE = "DEEPTRUST_KEYS"
KeyScope = Literal["read", "feedback", "admin"]
_LOOKING = frozenset(("GET", "HEAD", "OPTIONS"))
_ANNOTATING = frozenset(("/v1/analyze", "/v1/detect", "/v1/caption", "/v1/tag"))
LOOPBACK = frozenset(("127.0.0.1", "localhost", "::1"))
#: A `Host` that no name server is asked for; and what follows the name in any.
_LOOPBACK_HOST = re.compile(r"(?:localhost|127(?:\.[0-9]{1,3}){3}|\[::1\])(?::[0-9]*)?", re.IGNORECASE)
_PORT = re.compile(r":[0-9]*$")
#: How long a change of the file may go unnoticed; how long its keys are taken while it cannot be read; and when to try
#: again after that.
_LOOK_S, _KEPT_S, _RETRY_AFTER_S = 1.0, 60.0, 5
#: How often replicas tell each other of the day's requests.
_SHARE_S = 2.0
#: `dt_`, eight characters that name the key, and 256 random bits: no dictionary helps, a plain hash is enough.
_KEY = re.compile(r"dt_([0-9a-f]{8})_([A-Za-z0-9_-]{43})")
#: Answered to everybody: whoever watches over the application has no key.
OPEN = frozenset(("/healthz", "/readyz"))


class KeyFileError(ValueError):
    """The file of keys cannot be used, or a command cannot be done; the message says what to do."""


class Key(BaseModel):
    """One key, as the file knows it."""

    model_config = ConfigDict(extra="forbid")

    id: str = Field(pattern="^[0-9a-f]{8}$", description="the part of the key that names it")
    name: str = Field(min_length=1, max_length=64, pattern=r"^[\w.@ -]+$", description="whose it is")
    scopes: frozenset[KeyScope] = Field(min_length=1, description="`admin` holds the others")
    sha256: str = Field(pattern="^[0-9a-f]{64}$", description="of the secret part")
    per_second: float = Field(gt=0, description="requests a second, lasting")
    burst: int = Field(ge=1, description="requests at once")
    per_day: int | None = Field(None, ge=1, description="requests from midnight to midnight, UTC; null: no such limit")
    created: str = ""
    revoked: str | None = None

    @property
    def caller(self) -> str:
        """What tells this key's requests from every other key's. Nobody but its holder can make it, which the `id` of
        lists and keys could not be: a place that is made of it and of a name that can be guessed cannot be guessed.
        """
        return f"{self.id}:{self.sha256}"


class KeyFile(BaseModel):
    """Everything in the file."""

    model_config = ConfigDict(extra="forbid")

    keys: list[Key] = Field(default_factory=list)


def read_keys(path: Path) -> KeyFile:
    """The file's content.

    Raises:
        KeyFileError: it is not there, or is no file of keys.
    """
    try:
        return KeyFile.model_validate_json(path.read_bytes())
    except FileNotFoundError as error:
        raise KeyFileError(
            f"cannot read {path}: {error.strerror}. Make it with `python -m app.keys create NAME`"
        ) from error
    except PermissionError as error:
        raise KeyFileError(
            f"cannot read {path}: {error.strerror}. Let the user that runs this (uid {os.geteuid()}) read it: `chown` "
            "it, or `chgrp` it and `chmod g+r`; it stays so when keys are changed"
        ) from error
    except OSError as error:
        raise KeyFileError(f"cannot read {path}: {error.strerror}") from error
    except ValidationError as error:
        raise KeyFileError(f"{path} is no file of API keys: {error.errors()[0]['msg']}") from error


@contextlib.contextmanager
def changing(path: Path) -> Iterator[KeyFile]:
    """The file's content, to be changed; written when the block ends well, at once or not at all. A file that there is
    keeps its mode, owner and group.

    Raises:
        KeyFileError: it is no file of keys, or cannot be written like that.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with (path.parent / f".{path.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            before = path.stat() if path.exists() else None
            content = read_keys(path) if before else KeyFile()
            yield content
            _replace(path, json.dumps(content.model_dump(mode="json"), indent=1) + "\n", before)
    except PermissionError as error:
        raise KeyFileError(
            f"cannot change {path}, it is as it was: {error.strerror}. Run this as root, or as its owner with the "
            f"right to write into {path.parent}"
        ) from error
    except OSError as error:
        raise KeyFileError(f"cannot change {path}, it is as it was: {error.strerror} ({error.filename})") from error


def _replace(path: Path, text: str, before: os.stat_result | None) -> None:
    """Put a new file in a file's place, for the same people to read.

    Raises:
        OSError: it cannot be done; the old file is left. Without the right to give the new one to the old one's owner
            and group it is not done either: the application, which could not read it, would let nobody in.
    """
    written = path.parent / f".{path.name}.new"
    descriptor = os.open(written, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        with os.fdopen(descriptor, "w") as file:
            if before is not None:
                os.fchown(descriptor, before.st_uid, before.st_gid)
                os.fchmod(descriptor, stat.S_IMODE(before.st_mode))
            file.write(text)
            file.flush()
            os.fsync(descriptor)
        written.replace(path)
    except BaseException:
        written.unlink(missing_ok=True)
        raise


def create(
    path: Path, name: str, scopes: frozenset[KeyScope], per_second: float, burst: int, per_day: int | None = None
) -> str:
    """Add a key and return it: it cannot be read again.

    Raises:
        KeyFileError: a key of this name is in use, or the file cannot be changed.
    """
    identity, secret = secrets.token_hex(4), secrets.token_urlsafe(32)
    with changing(path) as content:
        if any(key.name == name and key.revoked is None for key in content.keys):
            raise KeyFileError(f"there is a key named {name!r}; revoke it first, or choose another name")
        content.keys.append(
            Key(
                id=identity,
                name=name,
                scopes=scopes,
                sha256=_digest(secret),
                per_second=per_second,
                burst=burst,
                per_day=per_day,
                created=_now(),
            )
        )
    return f"dt_{identity}_{secret}"


def revoke(path: Path, name: str) -> None:
    """End a key, by its name or id.

    Raises:
        KeyFileError: there is none, or the file cannot be changed.
    """
    with changing(path) as content:
        found = [key for key in content.keys if name in (key.name, key.id) and key.revoked is None]
        if not found:
            raise KeyFileError(f"no key in use is named {name!r}; see `python -m app.keys list`")
        for key in found:
            key.revoked = _now()


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


class Bucket:
    """A token bucket: ``burst`` requests at once, ``per_second`` lasting."""

    def __init__(self, per_second: float, burst: int, now: float) -> None:
        self.per_second, self.burst = per_second, burst
        self._tokens, self._at = float(burst), now

    def take(self, now: float) -> float:
        """Take a token: 0, or the seconds until there is one."""
        self._tokens = min(self.burst, self._tokens + (now - self._at) * self.per_second)
        self._at = now
        if self._tokens >= 1:
            self._tokens -= 1
            return 0.0
        return (1 - self._tokens) / self.per_second


_DAY_S = 24 * 3600


class Quota:
    """Requests of a UTC day: those that all replicas have been told of, and those of this one since."""

    def __init__(self) -> None:
        self.day, self.unshared = 0, 0
        self._shared = 0

    def take(self, per_day: int, now_s: float) -> float:
        """Take one: 0, or the seconds until midnight if there is none left."""
        day = int(now_s // _DAY_S)
        if day != self.day:
            self.day, self.unshared, self._shared = day, 0, 0
        if self._shared + self.unshared >= per_day:
            return (day + 1) * _DAY_S - now_s
        self.unshared += 1
        return 0.0

    def heard(self, day: int, told: int, total: int) -> None:
        """What a day comes to in all replicas, with ``told`` of this one's."""
        if day == self.day:
            self.unshared -= told
            self._shared = total


#: Adds uses of keys (by id) on a day since 1970 to those of all replicas; returns what each of them comes to.
Share = Callable[[int, Mapping[str, int]], Awaitable[Mapping[str, int]]]


class KeyRing:
    """The keys of a file, looked at again when it has changed.

    A file that cannot be read lets nobody in. One that cannot be read *any more* leaves those in who were, for
    `_KEPT_S` since it last could be, and says so in the log: a moment locks nobody out, and a key that has been revoked
    meanwhile ends all the same.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._keys: dict[str, Key] = {}
        self._buckets: dict[str, Bucket] = {}
        self._quotas: dict[str, Quota] = {}
        self._seen: tuple[int, ...] | None = None
        self._looked = self._known_at = -math.inf
        #: Whether it can be told, as of the last look, which keys there are.
        self.is_known = False

    def find(self, text: str) -> Key | None:
        """The key that this is, if it is one and has not been revoked; none while that cannot be told."""
        self._look()
        parts = _KEY.fullmatch(text) if self.is_known else None
        if parts is None or (key := self._keys.get(parts[1])) is None:
            return None
        return key if hmac.compare_digest(_digest(parts[2]), key.sha256) else None

    def wait_s(self, key: Key) -> float:
        """Count a request: 0, or how long its key has to wait."""
        bucket, now = self._buckets.get(key.id), time.monotonic()
        if bucket is None or (bucket.per_second, bucket.burst) != (key.per_second, key.burst):
            bucket = self._buckets[key.id] = Bucket(key.per_second, key.burst, now)
        return bucket.take(now)

    def quota_wait_s(self, key: Key) -> float:
        """Count a request of the day: 0, or how long its key has to wait."""
        if key.per_day is None:
            return 0.0
        return self._quotas.setdefault(key.id, Quota()).take(key.per_day, time.time())

    @property
    def has_unshared(self) -> bool:
        """Whether keys with a quota were used since all replicas were told last."""
        return any(quota.unshared for quota in self._quotas.values())

    async def share_uses(self, share: Share) -> None:
        """Tell all replicas what keys with a quota were used for since the last time, and hear what they come to.

        Raises:
            Exception: whatever ``share`` raises; nothing was told then.
        """
        days: dict[int, dict[str, int]] = {}
        for identity, quota in self._quotas.items():
            if quota.unshared:
                days.setdefault(quota.day, {})[identity] = quota.unshared
        for day, uses in days.items():
            totals = await share(day, uses)
            for identity, told in uses.items():
                if identity in self._quotas:  # it may have been revoked meanwhile
                    self._quotas[identity].heard(day, told, totals[identity])

    def _look(self) -> None:
        now = time.monotonic()
        if now - self._looked < _LOOK_S:
            return
        self._looked = now
        try:
            status = self._path.stat()
            seen = (status.st_mtime_ns, status.st_size, status.st_ino)
            content = read_keys(self._path) if seen != self._seen else None
        except (OSError, KeyFileError) as error:
            left_s = self._known_at + _KEPT_S - now
            self.is_known = left_s > 0
            then = f"known ones are taken for {left_s:.0f} s more" if self.is_known else "all callers are refused (503)"
            _log.error("API keys: %s; until that is mended %s", error, then)
            return
        self._known_at, self.is_known = now, True
        if content is None:
            return
        self._seen = seen
        self._keys = {key.id: key for key in content.keys if key.revoked is None}
        self._buckets = {identity: bucket for identity, bucket in self._buckets.items() if identity in self._keys}
        self._quotas = {identity: quota for identity, quota in self._quotas.items() if identity in self._keys}


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
    elif host is not None and host not in LOOPBACK:
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


_OTHER_HOST = (
    "Without API keys it is answered under names of loopback only: ask http://localhost or http://127.0.0.1, list the "
    "name of a proxy in front as `args.limits.hosts` of the Serve configuration, or make API keys."
)


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


# ---- commands ----------------------------------------------------------------------------------------------------


class _Command(BaseModel):
    model_config = ConfigDict(extra="forbid")

    file: Path | None = Field(None, description=f"file of keys; unset: what {VARIABLE} names")

    def path(self) -> Path:
        """The file that is meant."""
        named = self.file or os.environ.get(VARIABLE)
        if not named:
            raise KeyFileError(f"which file? Give --file, or set {VARIABLE} as for the application")
        return Path(named)


class CreateCommand(_Command):
    """Make a key and print it, once."""

    name: CliPositionalArg[str] = Field(description="whose it is")
    scopes: str = Field("read", description="comma-separated: read, feedback, admin")
    per_second: float = Field(50.0, gt=0, description="requests a second that each ingress replica lets through")
    burst: int = Field(100, ge=1, description="requests at once")
    per_day: int | None = Field(
        None, ge=1, description="requests a day (UTC), of all ingress replicas together where there is a store"
    )

    def cli_cmd(self) -> None:
        """Do it."""
        scopes = {scope.strip() for scope in self.scopes.split(",")}
        if not scopes <= set(get_args(KeyScope)):
            raise KeyFileError(f"--scopes {self.scopes}: choose from {', '.join(get_args(KeyScope))}")
        limits = (self.per_second, self.burst, self.per_day)
        print(create(self.path(), self.name, frozenset(scopes), *limits))  # type: ignore[arg-type]
        print("keep it: it cannot be shown again", file=sys.stderr)


class ListCommand(_Command):
    """Names, scopes and limits of all keys."""

    def cli_cmd(self) -> None:
        """Do it."""
        print(f"{'id':8}  {'name':24}  {'scopes':20}  {'a second':>8}  {'a day':>8}  {'created':25}  revoked")
        for key in read_keys(self.path()).keys:
            scopes = ",".join(sorted(key.scopes))
            limits = f"{key.per_second:8g}  {key.per_day or '':>8}"
            print(f"{key.id}  {key.name:24}  {scopes:20}  {limits}  {key.created:25}  {key.revoked or ''}".rstrip())


class RevokeCommand(_Command):
    """End a key; the application refuses it within a second."""

    name: CliPositionalArg[str] = Field(description="name or id")

    def cli_cmd(self) -> None:
        """Do it."""
        revoke(self.path(), self.name)


class KeyCommands(BaseModel):
    """``python -m app.keys``."""

    create: CliSubCommand[CreateCommand]
    list: CliSubCommand[ListCommand]
    revoke: CliSubCommand[RevokeCommand]

    def cli_cmd(self) -> None:
        """Run the command that was named."""
        from pydantic_settings import CliApp

        CliApp.run_subcommand(self)


def main(arguments: list[str] | None = None) -> None:
    """Run a command; what is wrong becomes one line and exit status 1."""
    from pydantic_settings import CliApp

    try:
        CliApp.run(KeyCommands, cli_args=arguments)
    except (KeyFileError, ValidationError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
