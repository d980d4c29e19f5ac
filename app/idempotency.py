"""A request that is sent again under the same ``Idempotency-Key`` has one answer, and one row in the store.

A sender whose connection broke cannot know whether it was answered. With a key, every picture of a request has a name:
its answer is kept under that name once, whoever works on it how often, its ``id`` follows from the name, and when it is
there already it is given again without any work. The tasks are part of the name: the same key on another route is
another request. Another picture under the same key is a mistake, and told. A key is its sender's own: what an
API key sends never meets what another one does.

An answer in which a stage is missing is given again only as far as it goes: what is missing is worked on, and the
row in the store completed. It may have been an outage, and whoever sends again waits for its end.

A replica that is killed within a tenth of a second of its answer takes that answer's row with it
(``app.store.store``): the request is then worked on again, and kept once.

Knows no HTTP beyond the problem, and no model.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Awaitable, Callable
from functools import partial

from app.problems import Problem
from app.store import events
from app.store.database import StoreUnavailable
from app.store.store import Store, StoreBusy, StoreOff
from deployments.annotation import Annotation, Task


def own(caller: str, key: str | None) -> str | None:
    """A sender's ``Idempotency-Key`` as nobody else can send it; None: there is none.

    Args:
        caller: ``app.authentication.caller_of`` the request; "" for everybody while there are no keys.
    """
    return f"{caller}\0{key}" if key and caller else key  # a header has no NUL


def name_of(key: str, tasks: frozenset[Task], number: int) -> str:
    """Under which the answer to a request's picture is kept.

    Args:
        key: its sender's ``own``.
    """
    return hashlib.sha256(f"{number}\0{','.join(sorted(tasks))}\0{key}".encode()).hexdigest()


def place_of(key: str) -> str:
    """Where the answer to a request whose sender does not wait will be; not to be guessed without its ``own`` key."""
    return f"k{hashlib.sha256(key.encode()).hexdigest()[:47]}"


def event_key(caller: str, key: str | None) -> str | None:
    """A sender's own name of what it says of an answer, as it is kept: short, and without a NUL."""
    sent = own(caller, key)
    return sent if sent is None or not caller else hashlib.sha256(sent.encode()).hexdigest()


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


async def answer(
    store: Store,
    name: str,
    data: bytes,
    identity: str | None,
    tasks: frozenset[Task],
    analyze: Callable[[str, frozenset[Task]], Awaitable[Annotation]],
    with_maps: bool = False,
) -> Annotation:
    """The answer to a picture of a request that may have been sent before; worked on as far as it is not there.

    Args:
        identity: the picture's ``id`` if its sender gave one.
        analyze: works on the picture, given its id and the tasks that are wanted.
        with_maps: heat maps are wanted, which are not kept: it is worked on in any case.

    Raises:
        Problem: it is about another picture; or no stage could answer, and none had before.
    """
    began_s = time.time()  # what was given before is of a picture that may be deleted from here on
    given = await earlier(store, name, data)
    if given is None:
        record = await analyze(identity or answer_id(name), tasks)
    elif with_maps:
        record = (await analyze(given.id, tasks)).completed(given)
    elif given.is_whole:
        return given
    else:
        parts: dict[Task, object] = {"detect": given.detection, "caption": given.caption, "tag": given.tags}
        try:
            again = await analyze(given.id, frozenset(task for task in tasks if parts[task] is None))
        except Problem:
            return given  # what there is is more than nothing
        record = again.completed(given)
    store.offer(record, data, name, began_s)
    return record
