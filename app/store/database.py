"""The database behind the store: SQLite in a file, or PostgreSQL, opened, migrated and used alike.

In: a URL. Out: transactions for one writer and for readers, with time limits; every failure of the database itself
comes out as ``StoreUnavailable``. A success means committed to disk on both: SQLite's log is synced at each commit.

Knows tables only through the migrations.
"""

from __future__ import annotations

import contextlib
import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.util.exc import CommandError
from sqlalchemy import Connection, Engine, create_engine, event, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, InterfaceError, NoSuchModuleError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.pool import QueuePool

_MIGRATIONS = Path(__file__).parent / "migrations"
#: Any number that nobody else locks.
_MIGRATION_LOCK = 0x6465657074727573
#: SQLite asks after this many of its steps whether a query has had its time (about a millisecond).
_STEPS_BETWEEN_LOOKS = 20_000
#: PostgreSQL's codes for a transaction that it ends for another's sake: deadlock, serialization failure.
_COLLISIONS = ("40P01", "40001")


class StoreUnavailable(RuntimeError):
    """The database does not answer: locked, gone, full, refused. It may later; the message is for operators."""


class Collided(StoreUnavailable):
    """Another transaction was in the way of this one (a deadlock), and nothing of it was written. Done again it may
    succeed; the database is there.
    """


class Database:
    """One database. ``open`` may be called again whenever it has failed."""

    def __init__(self, url: str, timeout_s: float, read_timeout_s: float) -> None:
        """
        Raises:
            StoreUnavailable: the URL is none, or for a database other than the two.
        """
        try:
            parsed = make_url(url)
        except ArgumentError:
            raise StoreUnavailable("the store's url is no database URL: sqlite:////FILE or postgresql://…") from None
        self.dialect = parsed.get_backend_name()
        if self.dialect not in ("sqlite", "postgresql"):
            raise StoreUnavailable(f"the store cannot use {self.dialect}: give sqlite:////FILE or postgresql://…")
        self.file = Path(parsed.database).absolute() if self.dialect == "sqlite" and parsed.database else None
        if self.dialect == "sqlite" and self.file is None:
            raise StoreUnavailable("the store's SQLite URL names no file: sqlite:////FILE")
        self._is_open = False
        self._file_number = 0
        self._deadline = threading.local()
        self.timeout_s, self.read_timeout_s = timeout_s, read_timeout_s
        try:
            self._writer = self._engine(url, timeout_s, connections=1)
            self._readers = self._engine(url, read_timeout_s, connections=4)
        except (ArgumentError, NoSuchModuleError, ImportError) as error:
            raise StoreUnavailable(f"the store's driver: {error}") from error
        if self.dialect == "sqlite":
            event.listen(self._writer, "connect", self._set_up_sqlite)
            event.listen(self._readers, "connect", self._set_up_sqlite_reader)
            # a transaction that will write takes the lock at once: one that takes it later may fail without waiting
            event.listen(self._writer, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))
            event.listen(self._readers, "begin", lambda connection: connection.exec_driver_sql("BEGIN"))

    def _engine(self, url: str, timeout_s: float, connections: int) -> Engine:
        if self.dialect == "sqlite":
            options: dict[str, Any] = {"timeout": timeout_s, "check_same_thread": False}
        else:
            milliseconds = int(timeout_s * 1000)
            settings = {
                "statement_timeout": milliseconds,
                "lock_timeout": milliseconds,
                # how a search is best made depends on its words, and psycopg prepares what comes often
                "plan_cache_mode": "force_custom_plan",
            }
            options = {
                "connect_timeout": max(2, int(timeout_s)),
                "tcp_user_timeout": milliseconds,
                "options": " ".join(f"-c {name}={value}" for name, value in settings.items()),
            }
        return create_engine(
            url,
            connect_args=options,
            poolclass=QueuePool,
            pool_size=connections,
            max_overflow=0,
            pool_timeout=timeout_s,
            pool_pre_ping=self.dialect == "postgresql",
        )

    # ---- opening ------------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Create what is missing and bring the tables up to date. Several processes may do so at once.

        Raises:
            StoreUnavailable: it cannot be reached, or was written by a newer version of this program.
        """
        if self.file is not None:
            try:
                self.file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            except OSError as error:
                raise StoreUnavailable(f"cannot make {self.file.parent}: {error.strerror}") from error
        self.close()
        with self.writing() as connection:
            if self.dialect == "postgresql":
                connection.execute(text("SET LOCAL statement_timeout = 0"))
                connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _MIGRATION_LOCK})
            migrate(connection)
        self._file_number = self._number_of_file()
        self._is_open = True

    def is_open(self) -> bool:
        """Whether it was opened, and SQLite's file is still the one that was: what is written to a file that has been
        removed is lost, and SQLite does not notice.
        """
        return self._is_open and self._number_of_file() == self._file_number

    def _number_of_file(self) -> int:
        """What tells SQLite's file from another of the same name; 0 for PostgreSQL and for a file that is not there."""
        try:
            return self.file.stat().st_ino if self.file is not None else 0
        except OSError:
            return 0

    def close(self) -> None:
        """Let go of all connections."""
        self._is_open = False
        self._writer.dispose()
        self._readers.dispose()

    # ---- transactions -------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def writing(self) -> Iterator[Connection]:
        """A transaction of the one writer, committed at the end.

        Raises:
            StoreUnavailable: the database failed, and nothing of it was written; or it went away during the commit, and
                everything or nothing was.
            Collided: it met another transaction.
        """
        with _explained(), self._writer.begin() as connection:
            yield connection

    @contextlib.contextmanager
    def reading(self) -> Iterator[Connection]:
        """A transaction that only reads. Each statement of it ends after ``read_timeout_s``.

        Raises:
            StoreUnavailable: the database failed, or a statement took too long.
        """
        self._deadline.at = time.monotonic() + self.read_timeout_s
        with _explained(), self._readers.begin() as connection:
            if self.dialect == "postgresql":
                connection.execute(text("SET TRANSACTION READ ONLY"))
            yield connection

    def _set_up_sqlite(self, connection: Any, _: Any) -> None:
        connection.isolation_level = None  # transactions begin where SQLAlchemy says, and not at the driver's guess
        connection.execute(f"PRAGMA busy_timeout = {int(self.timeout_s * 1000)}")
        self._write_ahead(connection)
        for pragma in (
            "synchronous = FULL",
            "foreign_keys = ON",
            "secure_delete = ON",  # what somebody wants deleted is overwritten
            "cache_size = -4096",  # KiB; it fills up over thousands of answers
        ):
            connection.execute(f"PRAGMA {pragma}")

    def _write_ahead(self, connection: Any) -> None:
        """Only the first of all who open a new file changes its journal. SQLite refuses that at once, whatever
        ``busy_timeout`` says, while another is about to write: who makes the tables.
        """
        until = time.monotonic() + self.timeout_s
        while True:
            try:
                connection.execute("PRAGMA journal_mode = WAL")
                return
            except sqlite3.OperationalError:
                if time.monotonic() >= until:
                    raise
            time.sleep(0.02)

    def _set_up_sqlite_reader(self, connection: Any, _: Any) -> None:
        connection.isolation_level = None
        for pragma in ("busy_timeout = 1000", "query_only = ON", "cache_size = -8192", "mmap_size = 1073741824"):
            connection.execute(f"PRAGMA {pragma}")
        connection.set_progress_handler(self._is_late, _STEPS_BETWEEN_LOOKS)

    def _is_late(self) -> bool:
        return time.monotonic() > getattr(self._deadline, "at", float("inf"))


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """What a database cannot do now as ``StoreUnavailable``; what is wrong with a statement stays what it is."""
    try:
        yield
    except (OperationalError, InterfaceError, PoolTimeout) as error:
        if getattr(getattr(error, "orig", None), "sqlstate", None) in _COLLISIONS:
            raise Collided(f"the database ended a transaction: {_first_line(error)}") from error
        raise StoreUnavailable(f"the database failed: {_first_line(error)}") from error
    except DBAPIError as error:
        # SQLite: "file is not a database", "database disk image is malformed"; PostgreSQL: a table that is gone
        if type(error).__name__ in ("DBAPIError", "DatabaseError", "InternalError", "ProgrammingError"):
            raise StoreUnavailable(f"the database failed: {_first_line(error)}") from error
        if error.connection_invalidated:
            raise StoreUnavailable(f"the database went away: {_first_line(error)}") from error
        raise


def _first_line(error: Exception) -> str:
    return str(getattr(error, "orig", None) or error).strip().split("\n")[0][:300]


def migrate(connection: Connection, revision: str = "head") -> None:
    """Bring the tables to a revision, in the connection's own transaction.

    Raises:
        StoreUnavailable: the tables are of a revision that this program does not know.
    """
    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    config.attributes["connection"] = connection
    try:
        (command.downgrade if revision == "base" else command.upgrade)(config, revision)
    except CommandError as error:
        raise StoreUnavailable(
            f"the store's tables do not fit this program ({error}); run the version that wrote them, or another url"
        ) from error
