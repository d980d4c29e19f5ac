"""What goes wrong with data that a person can put right: one error whose message names the thing and the remedy.

In: an exception from files, S3 or inside a Ray task. Out: a ``DataError``, or the exception unchanged when nobody but a
programmer can do anything about it.
"""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from pydantic import ValidationError

_DATA_ERROR = re.compile(r"^(?:.*\b)?data\.errors\.DataError: (.+)$", re.MULTILINE)
#: Exit status of a job that ends with a ``DataError``.
EXIT_STATUS = 2


class DataError(Exception):
    """Input, output or settings are at fault; the message says which and what to do next."""


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An exception and everything that it was raised from; Ray keeps what a task raised in ``cause``."""
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        current = waiting.pop()
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        waiting += [current.__context__, current.__cause__, getattr(current, "cause", None)]


def as_data_error(error: BaseException, place: str = "") -> DataError | None:
    """The ``DataError`` behind an exception: its own, or one made of what the file system or S3 said. None when it is
    something else.

    Args:
        error: what was caught; its causes are looked at too.
        place: the path or URI that was being read or written.
    """
    for cause in _chain(error):
        if isinstance(cause, DataError):
            return cause
    # what a Ray Data worker raised reaches the driver as text only
    if said := _DATA_ERROR.findall(str(error)):
        return DataError(said[-1])
    for cause in _chain(error):
        if (found := _explained(cause, place)) is not None:
            return found
    return None


def _explained(error: BaseException, place: str) -> DataError | None:
    place = place or str(getattr(error, "filename", "") or "the data's place")
    text = str(error)
    if (
        isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    ) or "No space left on device" in text:
        return DataError(f"the disk is full at {place}: free some space or choose another --output, then run again")
    name = type(error).__name__
    if name in ("NoCredentialsError", "PartialCredentialsError"):
        return DataError(
            f"no S3 credentials for {place}: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
        )
    if name in ("EndpointConnectionError", "ConnectTimeoutError", "ReadTimeoutError", "ConnectionClosedError"):
        endpoint = os.environ.get("AWS_ENDPOINT_URL", "the default S3 endpoint")
        return DataError(f"{endpoint} does not answer for {place}: check AWS_ENDPOINT_URL and the network ({text})")
    if "NoSuchBucket" in text or "bucket does not exist" in text:
        return DataError(f"there is no bucket for {place}: create it or correct the URI")
    if isinstance(error, PermissionError):
        return DataError(
            f"access to {place} is refused: check its permissions, for S3 the keys and bucket policy ({text})"
        )
    if isinstance(error, OSError) and error.errno == errno.EROFS:
        return DataError(f"{place} lies on a read-only file system: choose another --output")
    return None


@contextmanager
def explained(place: str) -> Iterator[None]:
    """Turn what file systems and S3 raise about ``place`` into a ``DataError``."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        found = as_data_error(error, place)
        if found is None:
            raise
        raise found from error


def as_settings_error(error: ValidationError) -> DataError:
    """What a command line says wrong, by its flags."""
    found = []
    for problem in error.errors():
        parts = [part for part in problem["loc"] if isinstance(part, str)]
        found.append(f"--{parts[-1].replace('_', '-')}: {problem['msg']}" if len(parts) > 1 else problem["msg"])
    return DataError("; ".join(found) + " (see --help)")


def end(error: BaseException) -> NoReturn:
    """End the program: the message alone and status 2 for a ``DataError``, the exception itself otherwise."""
    found = as_data_error(error)
    if found is None:
        raise error
    print(f"error: {found}", file=sys.stderr, flush=True)
    raise SystemExit(EXIT_STATUS) from error
