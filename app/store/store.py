"""The store as the ingress uses it: answers in without waiting, feedback and deletions that are committed when they
return, pages of what is kept out.

**Feedback on an answer just given.** Answers are written behind the request, so feedback may come first. The same
process's writer puts answers before feedback into one transaction. Another replica's writer commits within a tenth of
a second: feedback that finds no answer looks again for a moment before it says so. So that this holds whatever ``keep``
says, every answer is written, and those that are not to be kept expire after ``feedback_window_h`` unless feedback
comes. The alternative, feedback that carries the answer, would let anybody write answers. What a replica had in its
queue when it was killed (a tenth of a second's) is lost; what was acknowledged is not.

Knows no HTTP and no Ray.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any, TypeVar

from sqlalchemy import Connection, select
from sqlalchemy.exc import SQLAlchemyError

from app.store import callbacks, deferred, deletions, drift, events
from app.store.database import Database, StoreUnavailable
from app.store.events import Event, Receipt, UnknownAnswer
from app.store.models import Feedback, Picture, time_of
from app.store.pictures import PictureFiles, PicturesUnavailable
from app.store.search import Place, Query, find
from app.store.settings import StoreSettings
from app.store.writer import Answered, Writer
from deployments.annotation import Annotation
from deployments.containers import sniff
from deployments.images import small_jpeg

_log = logging.getLogger("ray.serve")
Value = TypeVar("Value")

_MAX_JOBS = 1000
_THREADS, _MAX_WAITING = 4, 64
#: When feedback that found no answer looks again: another replica may be about to write it.
_LOOK_AGAIN_S = (0.15, 0.35)
_TIDY_ROWS = 500
#: How often it is asked again whether the database can be used here: a node may join.
_ASK_S = 15.0
#: How long what has been taken is waited for at the end.
_PATIENCE_S = 5.0
_SMALL_PX = 384


class StoreOff(LookupError):
    """Nothing is kept here, by the settings."""


class StoreBusy(RuntimeError):
    """Too many searches, or pictures, at a time."""


@dataclass(frozen=True)
class Found:
    """An answer that a search found."""

    at: datetime
    annotation: Annotation
    has_picture: bool
    judged: tuple[str, ...]
    """Parts of it that got feedback."""


class _Threads:
    """Threads for one kind of work, and how much of it has been asked for."""

    def __init__(self, name: str) -> None:
        self._pool, self._asked = ThreadPoolExecutor(_THREADS, thread_name_prefix=name), 0

    async def run(self, work: Callable[[], Value]) -> Value:
        """
        Raises:
            StoreBusy: as much waits as may.
        """
        if self._asked >= _MAX_WAITING:
            raise StoreBusy
        self._asked += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, work)
        finally:
            self._asked -= 1

    def begin(self, work: Callable[[], Value]) -> Future[Value]:
        """Have something done that nobody waits for."""
        return self._pool.submit(work)

    def close(self) -> None:
        """What has not begun does not begin any more."""
        self._pool.shutdown(wait=False, cancel_futures=True)


class Store:
    """Everything that is kept. Belongs to one process; ``start`` it there."""

    def __init__(
        self,
        settings: StoreSettings,
        max_picture_bytes: int = 20 * 2**20,
        unusable: Callable[[], str] | None = None,
    ) -> None:
        """
        Args:
            max_picture_bytes: the largest picture that is taken.
            unusable: asked now and then, on a thread: why this database cannot be used here, or "".
        """
        self.settings, self.max_picture_bytes = settings, max_picture_bytes
        self._message = ""
        self.taking_in = 0
        """Pictures that are being received, for whoever bounds them."""
        self._unusable, self._closing = unusable, threading.Event()
        self._starting: threading.Thread | None = None
        self._keeping: threading.Thread | None = None
        self._removing: Future[None] | None = None
        # a place of pictures that is slow does not keep anybody from the database
        self._readers, self._file_threads = _Threads("store-read"), _Threads("store-files")
        self._writer: Writer | None = None
        self._files: PictureFiles | None = None
        self._database: Database | None = None
        if settings.keep == "off":
            return
        try:
            self._database = Database(settings.database_url, settings.timeout_s, settings.search_timeout_s)
            self._files = PictureFiles(settings.pictures_place) if settings.pictures_place else None
        except (StoreUnavailable, PicturesUnavailable) as error:
            self._message = str(error)  # an answer does not fail for want of a store
            _log.error("the store cannot be used: %s", error)
            return
        self._writer = Writer(self._database, settings.max_queue, _MAX_JOBS, self._tidy)
        self._pictures: queue.Queue[tuple[str, bytes] | None] = queue.Queue()
        self._picture_bytes, self._picture_lock = 0, threading.Lock()
        self.pictures_dropped = 0

    def start(self) -> None:
        """Open the database and begin to write, both on threads."""
        if self._writer is None:
            return
        self._starting = threading.Thread(target=self._start, name="store-start", daemon=True)
        self._starting.start()

    def _start(self) -> None:
        assert self._writer is not None
        if reason := self._why_not():
            self._message = reason
            _log.error("the store cannot be used: %s", reason)
            return
        self._writer.start()
        if self._files is not None and self.settings.pictures == "all":
            self._keeping = threading.Thread(target=self._write_pictures, name="store-pictures", daemon=True)
            self._keeping.start()
        while self._unusable is not None and not self._closing.wait(_ASK_S):
            if reason := self._why_not():
                self._give_up(reason)
                return

    def _why_not(self) -> str:
        """Why the database cannot be used here, or ""."""
        try:
            return self._unusable() if self._unusable is not None else ""
        except Exception:  # what cannot be found out is no reason
            _log.exception("whether the store can be used was not found out")
            return ""

    def _give_up(self, reason: str) -> None:
        """Take nothing more into a database that was in use, and write what has been taken."""
        assert self._writer is not None and self._database is not None
        self._message = reason
        self._end_pictures(_PATIENCE_S)
        self._writer.close(_PATIENCE_S)
        waiting = "pictures that wait for their answers"
        with contextlib.suppress(StoreUnavailable, SQLAlchemyError), self._database.reading() as connection:
            waiting = f"{deferred.count(connection)} {waiting} and {callbacks.count(connection)} call-backs"
        self._database.close()
        self._message = (
            f"{reason}; what was kept stays in {self._database.file or 'the database'} with {waiting}, which go on "
            "when the application is started with it where it can be used"
        )
        _log.error("the store is used no more: %s", self._message)

    def close(self, patience_s: float = _PATIENCE_S) -> None:
        """Write what waits, if that is possible in time: pictures first, which take the writer, then answers."""
        ends = time.monotonic() + patience_s
        self._closing.set()
        if self._starting is not None:
            self._starting.join(patience_s)
        if self._writer is not None and not self._message:
            self._end_pictures(ends - time.monotonic())
            self._writer.close(patience_s)
        self._readers.close()
        self._file_threads.close()

    def status(self) -> dict[str, Any]:
        """What this process's store does, for operators and for the page."""
        message = self._message or (self._writer.message if self._writer else "")
        state = "off" if self.settings.keep == "off" else "unavailable" if message else "ready"
        answer: dict[str, Any] = {
            "state": "starting" if message == "starting" else state,
            "message": message,
            "keep": self.settings.keep,
            "pictures": self.settings.pictures if self._files is not None else "none",
        }
        if self._writer is not None:
            counts = {"queued": self._writer.queued, "written": self._writer.written, "dropped": self._writer.dropped}
            answer |= counts | {"pictures_dropped": self.pictures_dropped}
        return answer

    # ---- answers in ---------------------------------------------------------------------------------------------

    def offer(self, annotation: Annotation, data: bytes, name: str | None = None, began_s: float | None = None) -> None:
        """Keep an answer, and its picture if all are kept. Returns at once and raises nothing.

        Args:
            name: the answer is kept once under it.
            began_s: when work on it began: it does not outlive a deletion of its picture that was asked for since.
        """
        if self._writer is None or self._message:
            return
        now = time.time()
        expires_s = self.expiry(annotation.sha256, now)
        if self._writer.offer(Answered(annotation, now, expires_s, name, began_s)):
            self.offer_picture(annotation.sha256, data)

    def expiry(self, sha256: str, now_s: float) -> float | None:
        """When an answer about a picture goes away unless there is feedback on it; None: it is kept."""
        settings = self.settings
        kept = settings.keep == "all" or (
            settings.keep == "sampled" and int(sha256[:8], 16) / 2**32 < settings.sample_share
        )
        return None if kept else now_s + settings.feedback_window_h * 3600

    def offer_trials(self, rows: list[dict[str, Any]]) -> None:
        """Keep what a trial wrote down (``app.trials``). Returns at once and raises nothing."""
        if self._writer is not None and not self._message:
            self._writer.submit(partial(events.write_trials, rows=rows))

    def offer_drift(self, rows: list[dict[str, Any]]) -> None:
        """Keep what the watcher for drift saw. Returns at once and raises nothing."""
        if self._writer is not None and not self._message:
            self._writer.submit(partial(drift.write, rows=rows))

    def offer_picture(self, sha256: str, data: bytes) -> None:
        """Keep the picture of an answer that is kept, if all are. Returns at once and raises nothing."""
        if self._files is None or self.settings.pictures != "all" or self.expiry(sha256, 0) is not None:
            return
        with self._picture_lock:
            if self._picture_bytes + len(data) > self.settings.max_picture_queue_bytes:
                self.pictures_dropped += 1
                return
            self._picture_bytes += len(data)
        self._pictures.put((sha256, data))

    def _write_pictures(self) -> None:
        while (item := self._pictures.get()) is not None:
            sha256, data = item
            try:
                self._keep_picture(sha256, data, only_flagged=False)
            except (StoreUnavailable, PicturesUnavailable, SQLAlchemyError):
                self.pictures_dropped += 1
            except Exception:
                self.pictures_dropped += 1
                _log.exception("a picture could not be kept")
            finally:
                with self._picture_lock:
                    self._picture_bytes -= len(data)

    def _end_pictures(self, patience_s: float) -> None:
        """Keep the pictures that wait, if that is possible in time, and count those that are left."""
        if self._keeping is not None:
            self._pictures.put(None)
            self._keeping.join(max(0.0, patience_s))
        left = 0
        with contextlib.suppress(queue.Empty):
            while True:
                left += self._pictures.get_nowait() is not None
        self._pictures.put(None)  # for the thread, if it is at one still
        if left:
            self.pictures_dropped += left
            _log.warning("%d pictures that waited could not be kept before the store was closed", left)

    # ---- feedback -----------------------------------------------------------------------------------------------

    async def feedback(self, event: Event) -> Receipt:
        """Keep an event; returns when it is committed.

        Raises:
            UnknownAnswer: no answer that is kept has its id.
            KeyConflict: its key was used for something else.
            StoreUnavailable: not now. It may be kept nevertheless; sent again with the same key it is kept once.
        """
        for pause_s in (*_LOOK_AGAIN_S, None):
            try:
                return await self.commit(partial(events.add_feedback, event=event))
            except UnknownAnswer:
                if pause_s is None:
                    raise
            await asyncio.sleep(pause_s)
        raise AssertionError("not reached")

    async def commit(self, run: Callable[[Connection], Value], late: Callable[[Value], None] | None = None) -> Value:
        """Do something in a transaction of the writer's; returns when it is on disk.

        Args:
            late: told of it, on a thread of the store's, where it comes onto the disk after this has raised.

        Raises:
            StoreOff, StoreUnavailable
        """
        outcome = self.submit(run)
        try:
            return await self._within(outcome)
        except StoreUnavailable:
            if late is not None:
                outcome.add_done_callback(partial(_tell, late))
            raise

    async def read(self, run: Callable[[Connection], Value]) -> Value:
        """Read something.

        Raises:
            StoreOff, StoreBusy, StoreUnavailable
        """

        def reading() -> Value:
            assert self._database is not None
            with self._database.reading() as connection:
                return run(connection)

        return await self._on(self._readers, reading)

    def submit(self, run: Callable[[Connection], Value]) -> Future[Value]:
        """Have something done in the next transaction; its outcome comes when that is on disk.

        Raises:
            StoreOff, StoreUnavailable
        """
        if self.settings.keep == "off":
            raise StoreOff
        if self._writer is None or self._message:
            raise StoreUnavailable(self._message)
        return self._writer.submit(run)

    async def _within(self, outcome: Future[Value]) -> Value:
        try:
            return await asyncio.wait_for(asyncio.wrap_future(outcome), self.settings.timeout_s)
        except TimeoutError:
            raise StoreUnavailable("the database did not answer in time") from None

    # ---- pictures -----------------------------------------------------------------------------------------------

    @property
    def wants_pictures(self) -> bool:
        """Who gives feedback is asked for the picture."""
        return self._files is not None

    async def keep_picture(self, sha256: str, data: bytes) -> bool:
        """Keep a picture about which there is feedback; False: there is none.

        Raises:
            StoreOff: pictures are not kept.
            StoreUnavailable, StoreBusy: not now.
        """
        if self._files is None and not self._message:
            raise StoreOff
        return await self._on(self._file_threads, partial(self._keep_picture, sha256, data, only_flagged=True))

    def _keep_picture(self, sha256: str, data: bytes, only_flagged: bool) -> bool:
        assert self._files is not None
        kind = f"image/{(sniff(data) or 'octet-stream').lower()}"
        expect = partial(events.expect_picture, sha256=sha256, kind=kind, size_bytes=len(data))
        if not self._commit_here(partial(expect, only_flagged=only_flagged)):
            return False
        self._files.write(sha256, data)
        if self._commit_here(partial(events.picture_stored, sha256=sha256, only_flagged=only_flagged)):
            return True
        self._files.remove(sha256)  # it was deleted while it was written
        self._commit_here(partial(events.picture_removed, sha256=sha256))
        return False

    def _commit_here(self, run: Callable[[Connection], Value]) -> Value:
        """``commit``, on a thread that may wait for it, and to the last: what has been taken is kept."""
        assert self._writer is not None
        try:
            return self._writer.submit(run).result(self.settings.timeout_s)
        except TimeoutError:
            raise StoreUnavailable("the database did not answer in time") from None

    async def picture(self, sha256: str, small: bool = False) -> tuple[bytes, str] | None:
        """A picture that is kept, and its media type; ``small``: as a JPEG of at most 384 pixels a side.

        Raises:
            StoreOff, StoreBusy, StoreUnavailable
            ImageError: it cannot be made small: its file was damaged.
        """
        kind, files = await self.read(partial(events.media_type, sha256=sha256)), self._files
        if kind is None or files is None:
            return None

        def read() -> tuple[bytes, str] | None:
            data = files.read(sha256)
            if data is None:
                return None
            return (small_jpeg(data, _SMALL_PX), "image/jpeg") if small else (data, kind)

        return await self._on(self._file_threads, read)

    async def delete_picture(self, sha256: str) -> dict[str, int]:
        """Remove a picture, all answers about it and what was said of them; counts of what was removed.

        Raises:
            StoreUnavailable, StoreBusy: something of it may be left; ask again.
        """
        at_s = time.time()
        await self.commit(partial(deletions.announce, sha256=sha256, at_s=at_s))
        await self.read(deletions.wait_for_writers)
        removed = await self.commit(partial(events.forget_picture, sha256=sha256, at_s=at_s))
        if self._files is not None:
            await self._on(self._file_threads, partial(self._files.remove, sha256))
        if removed["pictures"]:  # one that is on its way in is left to who writes it or, if that one dies, to retention
            await self.commit(partial(events.picture_removed, sha256=sha256))
        return removed

    # ---- search -------------------------------------------------------------------------------------------------

    async def search(self, query: Query) -> tuple[list[Found], Place | None]:
        """A page of what is kept, and where the next one begins.

        Raises:
            StoreBusy, StoreUnavailable, StoreOff
        """
        return await self._on(self._readers, partial(self._search, query))

    def _search(self, query: Query) -> tuple[list[Found], Place | None]:
        assert self._database is not None
        with self._database.reading() as connection:
            rows, following = find(connection, self._database.dialect, query)
            flagged = [row["id"] for row in rows if row["flagged"]]
            judged: dict[int, list[str]] = {}
            if flagged:
                about = select(Feedback.prediction_id, Feedback.part).where(Feedback.prediction_id.in_(flagged))
                for prediction_id, part in connection.execute(about):
                    judged.setdefault(prediction_id, []).append(part)
            hashes = {row["sha256"] for row in rows}
            kept = select(Picture.sha256).where(Picture.sha256.in_(hashes), Picture.stored.is_(True))
            stored = set(connection.execute(kept).scalars()) if hashes else set()
        found = [
            Found(
                time_of(row["id"]),
                Annotation.model_validate_json(row["record"]),
                row["sha256"] in stored,
                tuple(sorted(set(judged.get(row["id"], ())))),
            )
            for row in rows
        ]
        return found, following

    async def _on(self, threads: _Threads, run: Callable[[], Value]) -> Value:
        if self.settings.keep == "off":
            raise StoreOff
        if self._writer is None or self._message:
            raise StoreUnavailable(self._message)
        try:
            return await threads.run(run)
        except PicturesUnavailable as error:
            _log.warning("%s", error)
            raise StoreUnavailable(str(error)) from error

    # ---- retention ----------------------------------------------------------------------------------------------

    def _tidy(self, database: Database) -> float:
        """Remove a little of what is too old; seconds until there may be more."""
        with database.writing() as connection:
            removed = events.remove_old(connection, time.time(), self.settings.keep_days, _TIDY_ROWS)
            removed += deferred.remove_old(connection, time.time(), self.settings.results_hours, _TIDY_ROWS)
            removed += callbacks.remove_old(connection, time.time(), self.settings.results_hours, _TIDY_ROWS)
            if removed < _TIDY_ROWS and self.settings.keep_count is not None:
                removed += events.remove_surplus(connection, self.settings.keep_count, _TIDY_ROWS)
        if removed >= _TIDY_ROWS:
            return 0.2
        if self._files is not None and (self._removing is None or self._removing.done()):
            self._removing = self._file_threads.begin(partial(self._remove_pictures, self._files))
        return 60.0

    def _remove_pictures(self, files: PictureFiles) -> None:
        """Remove the pictures that are not to be kept any more, until one cannot be removed."""
        try:
            while (sha256 := self._commit_here(events.unwanted_picture)) is not None:
                files.remove(sha256)
                self._commit_here(partial(events.picture_removed, sha256=sha256))
        except (StoreUnavailable, PicturesUnavailable) as error:
            _log.warning("pictures that are to be removed wait: %s", error)


def _tell(late: Callable[[Value], None], outcome: Future[Value]) -> None:
    """Tell what came of something, if it was done."""
    if not outcome.cancelled() and outcome.exception() is None:
        late(outcome.result())
