"""API keys: their file, what each may be used for, and how often.

``python -m app.keys create|list|revoke`` keeps a file of names, scopes and hashes; the key itself is printed once and
kept nowhere. ``DEEPTRUST_KEYS`` names the file to the commands and to the application, which looks at it again when it
has changed: a key that is revoked ends within a second, without a restart, and within a minute where the file cannot be
read any more. Who is let in is decided in ``app.authentication``.

Rate limits hold for each ingress replica. Quotas of a day hold for all of them together, give or take what comes in a
few seconds, where something keeps their counts (``Share``), otherwise for each until it ends. Knows no request.
"""

from __future__ import annotations

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
from collections.abc import Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_settings import CliPositionalArg, CliSubCommand

_log = logging.getLogger("ray.serve")

VARIABLE = "DEEPTRUST_KEYS"
KeyScope = Literal["read", "feedback", "admin"]
#: How long a change of the file may go unnoticed; how long its keys are taken while it cannot be read.
_LOOK_S, _KEPT_S = 1.0, 60.0
#: `dt_`, eight characters that name the key, and 256 random bits: no dictionary helps, a plain hash is enough.
_KEY = re.compile(r"dt_([0-9a-f]{8})_([A-Za-z0-9_-]{43})")


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
