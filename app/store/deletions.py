"""Pictures that somebody wants deleted: what is on its way about them is not written any more.

Whoever writes looks here first, in the same transaction. In PostgreSQL another process may have looked just before a
deletion was announced and commit just after it. So a deletion is announced and committed, whoever looked before is
waited for, and what is there then is removed.

Functions on a connection, the same for both databases.
"""

from __future__ import annotations

from collections.abc import Iterable

from sqlalchemy import Connection, select, text
from sqlalchemy.dialects import postgresql, sqlite

from app.store.models import Deletion, last_id

#: Any number that nobody else locks.
_LOCK = 0x6465657074727574


def announce(connection: Connection, sha256: str, at_s: float) -> None:
    """Nothing about a picture that was begun before ``at_s`` is written by who looks after this is committed. Times are
    of the nodes' clocks, which are to agree.
    """
    dialect = postgresql if connection.dialect.name == "postgresql" else sqlite
    row = dialect.insert(Deletion).values(sha256=sha256, id=last_id(at_s))
    connection.execute(row.on_conflict_do_update(index_elements=["sha256"], set_={"id": row.excluded.id}))


def announced(connection: Connection, hashes: Iterable[str]) -> dict[str, int]:
    """Those of these pictures that are to be deleted, and the last id that goes with them. What this transaction writes
    is waited for (``wait_for_writers``).
    """
    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock_shared(:lock)"), {"lock": _LOCK})
    found = select(Deletion.sha256, Deletion.id).where(Deletion.sha256.in_(set(hashes)))
    return dict(connection.execute(found).all())


def wait_for_writers(connection: Connection) -> None:
    """Return when whoever has looked at what is announced has committed. In a transaction that does nothing else: it
    can then be part of no deadlock. SQLite has one writer at a time.
    """
    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _LOCK})
