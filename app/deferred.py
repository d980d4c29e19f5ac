"""Answers for those who can wait: ``Prefer: respond-async`` on ``POST /v1/analyze``, and where they fetch them.

A request's pictures go into the store's durable queue (``app.store.deferred``) and the sender gets 202 with a place.
Every ingress replica works on a few of them at a time by the same graph, in places that no waiting request wants.
An answer in which a stage is missing is tried again, a bounded number of times, before it is given as it is. Whatever
is killed, what was accepted is answered, and is kept once.

Knows no SQL and no model.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import secrets
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Annotated, Any

from fastapi import Path
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, Field

from app import idempotency
from app.admission import Admission
from app.analysis import Explain, Graph
from app.callbacks import answer_of
from app.feedback import store_problem
from app.problems import MEDIA_TYPE, Problem
from app.store import deferred
from app.store.database import StoreUnavailable
from app.store.deferred import Accepted, Backlog, Leased, Outcome, QueueFull
from app.store.events import KeyConflict
from app.store.store import Store, StoreBusy, StoreOff
from app.uploads import Upload
from deployments import telemetry
from deployments.annotation import Annotation, Task
from deployments.images import ImageError

_log = logging.getLogger("ray.serve")

#: How often an idle replica looks for pictures, and how often one without a free place looks for that.
_LOOK_S, _FULL_S = 1.0, 0.2
#: An answer in which a stage is missing is tried again so often, and a picture whose process died with it too.
_MAX_ATTEMPTS = 6
#: What a lease lasts beyond the time that a picture may take.
_LEASE_MARGIN_S = 30.0
_RETRY_AFTER_S = 2

PlaceId = Annotated[str, Path(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_-]+$", description="from the 202")]


class Waiting(BaseModel):
    """A request whose answer is not there yet."""

    id: str = Field(description="`GET /v1/results/{id}` has the answer when it is there")
    status: str = Field("waiting")
    pictures: int
    done: int = Field(0, description="pictures that have been answered")


def wants_to_wait(prefer: Sequence[str]) -> bool:
    """Whether ``Prefer`` headers (RFC 7240) say ``respond-async``."""
    names = (part.split(";")[0].strip().lower() for line in prefer for part in line.split(","))
    return "respond-async" in names


class Deferral:
    """The queue as the ingress uses it. Belongs to one event loop."""

    def __init__(
        self,
        store: Store,
        graph: Graph,
        admission: Admission,
        request_timeout_s: float,
        is_stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        """
        Args:
            is_stopping: whether this replica is about to end, and begins nothing more.
        """
        self._is_stopping = is_stopping
        self._store, self._graph, self._admission = store, graph, admission
        self._timeout_s = request_timeout_s
        self._working: dict[int, asyncio.Task[None]] = {}
        self._is_counted = True

    @property
    def is_possible(self) -> bool:
        """Whether there is a queue: else who prefers to wait is answered at once, as RFC 7240 allows."""
        return self._store.settings.max_deferred > 0 and self._store.status()["state"] == "ready"

    # ---- requests -----------------------------------------------------------------------------------------------

    async def accept(
        self,
        uploads: list[Upload],
        tasks: frozenset[Task],
        explain: Explain | None,
        key: str | None,
        callback: str | None = None,
    ) -> Response:
        """Take a request's pictures in; answered when they are on disk.

        Args:
            callback: address to tell when they are answered, which has been checked.
            key: the sender's own ``Idempotency-Key`` (``idempotency.own``): sent again with it, a request gets the
                same place.

        Raises:
            Problem: the queue is full, the key was used for other pictures, or the store does not answer.
        """
        place = secrets.token_urlsafe(24) if key is None else idempotency.place_of(key)
        pictures = await asyncio.gather(
            *(
                self._accepted(upload, explain, key and idempotency.name_of(key, tasks, number))
                for number, upload in enumerate(uploads)
            )
        )
        settings = self._store.settings
        put = partial(
            deferred.put,
            place=place,
            tasks=",".join(sorted(tasks)),
            explain=explain or "",
            pictures=pictures,
            max_count=settings.max_deferred,
            max_bytes=settings.max_deferred_bytes,
            callback=callback,
            request_id=telemetry.request_id(),
            traceparent=telemetry.traceparent(),
        )
        try:
            await self._store.commit(put)
        except QueueFull:
            raise Problem(
                "overloaded", "As many pictures wait as may; try again in a minute.", {"Retry-After": "60"}
            ) from None
        except KeyConflict:
            raise Problem("conflict", "This Idempotency-Key was used for another request.") from None
        except (StoreUnavailable, StoreOff) as error:
            raise store_problem(error) from None
        return _waiting(Waiting(id=place, pictures=len(pictures)), {"Preference-Applied": "respond-async"})

    async def _accepted(self, upload: Upload, explain: Explain | None, name: str | None) -> Accepted:
        """A picture as it goes into the queue, answered if it is no picture or was answered under its name before.

        Raises:
            Problem: the answer under its name is about another picture.
        """
        data = upload.data
        if upload.problem is not None or data is None:
            problem = upload.problem or Problem("empty_body", "The picture has no bytes.")
            status, answer, _ = _refused(problem)
            return Accepted(upload.id or uuid.uuid4().hex, "", b"", status, answer)
        sha256 = await asyncio.to_thread(lambda: hashlib.sha256(data).hexdigest())
        if name is None:
            return Accepted(upload.id or uuid.uuid4().hex, sha256, data)
        given = await idempotency.earlier(self._store, name, data)
        if given is not None and given.is_whole and explain is None:  # heat maps are not kept
            return Accepted(given.id, sha256, b"", 200, given.model_dump_json())
        return Accepted(upload.id or idempotency.answer_id(name), sha256, data, name=name)

    async def result(self, place: str) -> Response:
        """The answer at a place as the request would have got it, or 202 while it is not there.

        Raises:
            Problem: there is no such place, or the picture was refused.
        """
        try:
            found = await self._store.read(partial(deferred.outcomes, place=place))
        except (StoreBusy, StoreUnavailable, StoreOff) as error:
            raise store_problem(error) from None
        if not found:
            raise Problem("not_found", "There is no such result here, or it has been removed since.")
        done = sum(outcome.status > 0 for outcome in found)
        if done < len(found):
            return _waiting(Waiting(id=place, pictures=len(found), done=done))
        return await asyncio.to_thread(_answer, found)  # heat maps of 32 pictures are megabytes

    async def backlog(self) -> Backlog | None:
        """What waits; None if that cannot be known: a database that does not answer has no empty queue."""
        settings = self._store.settings
        look = partial(deferred.backlog, max_count=settings.max_deferred, max_bytes=settings.max_deferred_bytes)
        try:
            waiting = await self._store.read(partial(look, now_s=time.time()))
        except StoreOff:
            return Backlog()  # there is no queue
        except (StoreBusy, StoreUnavailable) as error:
            if self._is_counted and self._store.status()["state"] != "starting":
                _log.warning("how many pictures wait is not known until the database answers again: %r", error)
                self._is_counted = False
            return None
        self._is_counted = True
        return waiting

    # ---- work ---------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Work on what waits, for ever."""
        while True:
            pause_s = _LOOK_S
            if self.is_possible and self._graph.ready and not self._is_stopping():
                with contextlib.suppress(StoreUnavailable, StoreOff):  # it says so itself
                    pause_s = await self._begin_some()
            await asyncio.sleep(pause_s)

    async def _begin_some(self) -> float:
        """Begin to work on as much as there is room for; returns seconds until it is worth looking again."""
        room = self._store.settings.deferred_in_work - len(self._working)
        if room <= 0:
            return _FULL_S
        # read first: a replica with nothing to do must neither write every second nor take places for it
        try:
            if not await self._store.read(partial(deferred.is_any_free, now_s=time.time())):
                return _LOOK_S
        except StoreBusy:
            return _FULL_S
        places = self._admission.slip_in(room)
        if not places:
            return _FULL_S
        leased: list[Leased] = []
        try:
            lease_s = self._timeout_s + _LEASE_MARGIN_S
            lease = partial(deferred.lease, now_s=time.time(), lease_s=lease_s, most=places)
            leased = await self._store.commit(lease, self._leased_late)
        except StoreBusy:
            return _FULL_S
        finally:
            self._admission.slip_out(places - len(leased))
        for picture in leased:
            task = asyncio.get_running_loop().create_task(self._work(picture))
            self._working[picture.id] = task
            task.add_done_callback(lambda _, done=picture.id: self._working.pop(done, None))  # type: ignore[misc]
        return _FULL_S if leased else _LOOK_S

    def _leased_late(self, leased: list[Leased]) -> None:
        """Let others work on what was leased after this replica had stopped waiting for it: it was no attempt."""
        ids = [picture.id for picture in leased]
        with contextlib.suppress(StoreUnavailable, StoreOff):
            self._store.submit(partial(deferred.give_back, ids=ids, until_s=time.time(), counts=False))

    async def _work(self, picture: Leased) -> None:
        """One picture, from its lease to its answer. Holds a place of the admission."""
        try:
            with telemetry.resumed(picture.request_id, picture.traceparent):
                status, answer, record = await self._attempt(picture)
        finally:
            self._admission.slip_out(1)
        try:
            if answer is None:
                await self._store.commit(
                    self._back([picture.id], min(60.0, 2.0**picture.attempts), counts=not self._is_stopping())
                )
                return
            expires_s = self._store.expiry(record.sha256, time.time()) if record is not None else None
            finish = partial(
                deferred.finish, row_id=picture.id, status=status, answer=answer, record=record, expires_s=expires_s
            )
            if await self._store.commit(finish) and record is not None:
                self._store.offer_picture(record.sha256, picture.data)
        except (StoreUnavailable, StoreOff):
            # the lease ends, and somebody works on it again
            _log.warning("what became of a picture that waited could not be written")

    async def _attempt(self, picture: Leased) -> tuple[int, str | None, Annotation | None]:
        """Status and body of the answer, and the annotation; without a body it is to be tried again."""
        tasks: Any = frozenset(picture.tasks.split(","))
        explain: Any = picture.explain or None
        failed = Problem("internal_error", "The picture could not be analysed.")
        try:
            if picture.attempts > _MAX_ATTEMPTS:  # it was begun so often, and never ended
                return _refused(failed)
            with self._admission.observing():  # it tells as much as any other how many may be in work
                record = await self._graph.analyze(
                    picture.data, picture.answer_id, tasks, explain, time.time() + self._timeout_s
                )
        except ImageError as error:
            return _refused(Problem.of_image(error))
        except Problem as problem:
            return _refused(problem) if self._is_last(picture) else (0, None, None)
        except Exception:
            _log.exception("a picture that waited could not be analysed")
            return _refused(failed) if self._is_last(picture) else (0, None, None)
        if not record.is_whole and not self._is_last(picture):
            return 0, None, None
        return 200, record.model_dump_json(), record

    def _is_last(self, picture: Leased) -> bool:
        """Whether what came of an attempt is the answer, whatever it is. Not what came of it while the models ended
        together with this replica.
        """
        return picture.attempts >= _MAX_ATTEMPTS and not self._is_stopping()

    def _back(self, ids: list[int], pause_s: float, counts: bool) -> partial[None]:
        """Lets others work on pictures after a pause."""
        return partial(deferred.give_back, ids=ids, until_s=time.time() + pause_s, counts=counts)

    def close(self) -> None:
        """What this replica works on may be another's at once: an attempt that its end cuts short counts for none."""
        if self._working and self.is_possible:
            self._store.submit(self._back(list(self._working), 0.0, counts=False))


def _refused(problem: Problem) -> tuple[int, str, None]:
    return problem.status, json.dumps(problem.to_dict()), None


def _waiting(waiting: Waiting, headers: Mapping[str, str] | None = None) -> Response:
    where = {"Location": f"/v1/results/{waiting.id}", "Retry-After": str(_RETRY_AFTER_S)}
    return JSONResponse(waiting.model_dump(), 202, where | dict(headers or {}))


def _answer(found: list[Outcome]) -> Response:
    status, answer = answer_of(found)
    return Response(answer, status, media_type="application/json" if status == 200 else MEDIA_TYPE)
