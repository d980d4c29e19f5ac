"""The one thread that writes: answers from a bounded queue in batches, and jobs whose callers wait for the commit.

What is offered is taken or counted as dropped, at once: nothing here can slow or fail an answer. In each transaction
answers come first and jobs after them, so that feedback finds an answer that was given a moment before by the same
process, and many jobs share one commit. When the database fails, jobs are told so, answers stay in the queue and are
tried again. When it refuses a transaction, what was in it is done again one by one, so that only what is refused fails.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any

from sqlalchemy import Connection
from sqlalchemy.exc import SQLAlchemyError

from app.store import events
from app.store.database import Collided, Database, StoreUnavailable
from app.store.models import first_id, row_of
from deployments.annotation import Annotation

_log = logging.getLogger("ray.serve")

_BATCH_ROWS, _BATCH_JOBS = 500, 128
#: How long answers wait for company; a job does not wait.
_LINGER_S = 0.1
_RETRY_S = 2.0
#: How often one answer or job is tried that meets other transactions.
_MAX_ATTEMPTS = 3


@dataclass(frozen=True)
class Answered:
    """An answer on its way into the store."""

    annotation: Annotation
    at_s: float
    expires_s: float | None
    name: str | None = None
    """Kept once under this name."""
    began_s: float | None = None
    """When work on it began, if that was before ``at_s``."""


def _row(answered: Answered | dict[str, Any]) -> dict[str, Any]:
    if isinstance(answered, dict):  # it was prepared before
        return answered
    row = row_of(answered.annotation, answered.at_s, answered.expires_s, answered.name)
    return row if answered.began_s is None else row | {events.BEGAN: first_id(answered.began_s)}


def _is_away(error: Exception) -> bool:
    """Whether the database is away; else it refused what it was asked."""
    return isinstance(error, StoreUnavailable) and not isinstance(error, Collided)


@dataclass(frozen=True)
class _Job:
    run: Callable[[Connection], Any]
    outcome: Future[Any]


class Writer:
    """A thread, its queues, and what became of what was put into them."""

    def __init__(self, database: Database, max_queue: int, max_jobs: int, tidy: Callable[[Database], float]) -> None:
        """
        Args:
            max_queue: answers that wait, at most.
            max_jobs: jobs that wait, at most.
            tidy: called now and then between batches; returns seconds until it wants to be called again.
        """
        self._database, self._tidy = database, tidy
        self.max_queue, self.max_jobs = max_queue, max_jobs
        self._rows: deque[Answered | dict[str, Any]] = deque()
        self._jobs: deque[_Job] = deque()
        self._wake = threading.Condition()
        self._stopping = False
        self._tidy_at = time.monotonic() + 5.0
        self._retry_at = 0.0
        self.message = "starting"
        self.written = self.dropped = 0
        self._thread = threading.Thread(target=self._run, name="store-writer", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def queued(self) -> int:
        return len(self._rows)

    def offer(self, answered: Answered) -> bool:
        """Put an answer into the queue; False: it is full, and the answer will not be kept."""
        with self._wake:
            if len(self._rows) >= self.max_queue or self._stopping:
                self.dropped += 1
                return False
            self._rows.append(answered)
            if len(self._rows) == 1:
                self._wake.notify()
            return True

    def submit(self, run: Callable[[Connection], Any]) -> Future[Any]:
        """Have ``run`` done in the next transaction; its outcome comes when that is committed.

        The future's exception is what ``run`` raised, or ``StoreUnavailable``.
        """
        outcome: Future[Any] = Future()
        with self._wake:
            if len(self._jobs) >= self.max_jobs or self._stopping:
                outcome.set_exception(StoreUnavailable("too many wait for the database"))
            else:
                self._jobs.append(_Job(run, outcome))
                self._wake.notify()
        return outcome

    def close(self, patience_s: float) -> None:
        """Write what is in the queue, if that is possible in time, and end."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread.is_alive():  # it may never have been started
            self._thread.join(patience_s)

    # ---- on the thread ------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            rows, jobs, last = self._take()
            try:
                if rows or jobs or self.message or not self._database.is_open():
                    self._write(rows, jobs)
                if not last and time.monotonic() >= self._tidy_at:
                    self._tidy_at = time.monotonic() + 60.0  # unless it says otherwise
                    self._tidy_at = time.monotonic() + self._tidy(self._database)
            except Collided as error:
                _log.info("tidying up waits: %s", error)
            except StoreUnavailable as error:
                self._failed(error)
            except Exception:  # the thread must live: without it nothing would be kept until the process ends
                _log.exception("the store's writer failed")
            if last:
                self._database.close()
                return

    def _take(self) -> tuple[list[Answered | dict[str, Any]], list[_Job], bool]:
        with self._wake:
            while not (self._stopping or self._jobs):
                now = time.monotonic()
                if (self.message or not self._database.is_open()) and now >= self._retry_at:
                    break
                if self._rows and now >= self._retry_at:
                    self._wake.wait_for(lambda: self._stopping or bool(self._jobs), _LINGER_S)
                    break
                if now >= max(self._tidy_at, self._retry_at):
                    break
                self._wake.wait((self._retry_at if self._retry_at > now else self._tidy_at) - now)
            # what a job asks about may be the last answer in the queue
            most = len(self._rows) if self._jobs else _BATCH_ROWS
            rows = [self._rows.popleft() for _ in range(min(most, len(self._rows)))]
            jobs = [self._jobs.popleft() for _ in range(min(_BATCH_JOBS, len(self._jobs)))]
            last = self._stopping and not self._rows and not self._jobs
        return rows, [job for job in jobs if job.outcome.set_running_or_notify_cancel()], last

    def _write(self, rows: Sequence[Answered | dict[str, Any]], jobs: Sequence[_Job]) -> None:
        prepared: list[dict[str, Any]] = []
        outcomes: list[tuple[_Job, Any, Exception | None]] = []
        try:
            if not self._database.is_open():
                self._database.open()
            prepared = [_row(row) for row in rows]
            with self._database.writing() as connection:
                if prepared:
                    events.write_predictions(connection, prepared)
                for job in jobs:
                    outcomes.append(self._attempt(connection, job))
        except Exception as error:
            if _is_away(error):
                self._put_back(prepared or rows)
                for job in jobs:
                    job.outcome.set_exception(error)
                raise
            self._write_apart(prepared or rows, jobs)
            return
        self.written += len(prepared)
        self.message, self._retry_at = "", 0.0
        for job, value, failure in outcomes:
            job.outcome.set_exception(failure) if failure else job.outcome.set_result(value)

    @staticmethod
    def _attempt(connection: Connection, job: _Job) -> tuple[_Job, Any, Exception | None]:
        try:
            with connection.begin_nested():
                return job, job.run(connection), None
        except SQLAlchemyError:
            raise
        except Exception as error:
            return job, None, error

    def _write_apart(self, rows: Sequence[Answered | dict[str, Any]], jobs: Sequence[_Job]) -> None:
        """One row that the database does not take, or that is none, must not keep the others out, and no job another
        one: answers first, as ever.
        """
        left = deque(jobs)
        try:
            if rows and jobs:
                self._write(rows, [])  # it may have been a job
            else:
                self._write_singly(rows)
            while left:
                self._do_alone(left[0])
                left.popleft()
        except StoreUnavailable as error:
            for job in left:
                job.outcome.set_exception(error)
            raise

    def _write_singly(self, rows: Sequence[Answered | dict[str, Any]]) -> None:
        for position, row in enumerate(rows):
            try:
                prepared = _row(row)
                self._alone(partial(events.write_predictions, rows=[prepared]))
                self.written += 1
            except Exception as error:
                if _is_away(error):
                    self._put_back([prepared, *rows[position + 1 :]])
                    raise
                self.dropped += 1
                _log.error("an answer could not be kept: %s", type(error).__name__)

    def _do_alone(self, job: _Job) -> None:
        try:
            value = self._alone(job.run)
        except Exception as error:
            if _is_away(error):
                raise
            refused = isinstance(error, SQLAlchemyError)
            told = StoreUnavailable(f"the transaction failed: {type(error).__name__}") if refused else error
            job.outcome.set_exception(told)
        else:
            job.outcome.set_result(value)

    def _alone(self, run: Callable[[Connection], Any]) -> Any:
        """What ``run`` returns, in a transaction of its own; begun again if that meets another one."""
        for _ in range(_MAX_ATTEMPTS - 1):
            with contextlib.suppress(Collided), self._database.writing() as connection:
                return run(connection)
        with self._database.writing() as connection:
            return run(connection)

    def _put_back(self, rows: Sequence[Answered | dict[str, Any]]) -> None:
        with self._wake:
            room = max(0, self.max_queue - len(self._rows))
            kept = rows[len(rows) - min(room, len(rows)) :]
            self.dropped += len(rows) - len(kept)
            self._rows.extendleft(reversed(kept))

    def _failed(self, error: StoreUnavailable) -> None:
        if self.message != str(error):
            _log.warning("the store is not available: %s", error)
        self.message = str(error)
        self._database.close()  # to be opened again, tables and all: nobody knows what comes back
        self._retry_at = time.monotonic() + _RETRY_S
        if self._stopping:
            with self._wake:
                self.dropped += len(self._rows)
                self._rows.clear()
