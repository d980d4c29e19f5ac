"""A request that is sent again under the same ``Idempotency-Key`` has one answer, and one row in the store.

A sender whose connection broke cannot know whether it was answered. With a key, every picture of a request has a name:
its answer is kept under that name once, whoever works on it how often, its ``id`` follows from the name, and when it is
there already it is given again without any work. The tasks are part of the name: the same key on another route is
another request. Another picture under the same key is a mistake, and told. A key is its sender's own: what an
API key sends never meets what another one does.

A replica that is killed within a tenth of a second of its answer takes that answer's row with it
(``app.store.store``): the request is then worked on again, and kept once.

Knows no HTTP beyond the problem, and no model.
"""

from __future__ import annotations

import asyncio
import hashlib
from functools import partial

from app.problems import Problem
from app.store import events
from app.store.database import StoreUnavailable
from app.store.store import Store, StoreBusy, StoreOff
from deployments.annotation import Annotation, Task


def own(caller: str, key: str | None) -> str | None:
    """A sender's ``Idempotency-Key`` as nobody else can send it; None: there is none.

    Args:
        caller: ``app.keys.caller_of`` the request; "" for everybody while there are no keys.
    """
    return f"{caller}\0{key}" if key and caller else key  # a header has no NUL


def name_of(key: str, tasks: frozenset[Task], number: int) -> str:
    """Under which the answer to a request's picture is kept.

    Args:
        key: its sender's ``own``.
    """
    return hashlib.sha256(f"{number}\0{','.join(sorted(tasks))}\0{key}".encode()).hexdigest()


def place_of(key: str) -> str:
    """Where the answer to a request whose sender does not wait will be; whoever cannot make its ``own`` key cannot guess
    it.
    """
    return f"k{hashlib.sha256(key.encode()).hexdigest()[:47]}"


def answer_id(name: str) -> str:
    """The ``id`` of an answer whose sender gave none: the same each time, so that feedback on either finds the one that
    is kept.
    """
    return name[:32]


async def earlier(store: Store, name: str, data: bytes) -> Annotation | None:
    """The answer that is kept under a name; None: there is none, or it cannot be known now.

    Raises:
        Problem: it is about another picture.
    """
    if store.status()["state"] != "ready":  # a failing database costs an answer nothing
        return None
    try:
        found = await store.read(partial(events.answered, name=name))
    except (StoreOff, StoreBusy, StoreUnavailable):
        return None
    if found is None:
        return None
    sha256, record = found
    if sha256 != await asyncio.to_thread(lambda: hashlib.sha256(data).hexdigest()):
        raise Problem("conflict", "This Idempotency-Key was used for another picture.")
    return Annotation.model_validate_json(record)
