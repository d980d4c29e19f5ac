"""How often API keys were used on a day, by all replicas together.

Functions on a connection, the same for both databases. Knows no key but by its id, and no quota.
"""

from __future__ import annotations

from collections.abc import Mapping

from sqlalchemy import Connection, delete
from sqlalchemy.dialects import postgresql, sqlite

from app.store.models import KeyUse

#: Days that are kept, for whoever asks what happened yesterday.
_KEPT_DAYS = 7


def add(connection: Connection, day: int, uses: Mapping[str, int]) -> dict[str, int]:
    """Count uses of keys on a day (since 1970, UTC); returns what each of these keys comes to on it."""
    dialect = postgresql if connection.dialect.name == "postgresql" else sqlite
    totals: dict[str, int] = {}
    # in one order everywhere: two replicas that count the same keys wait for each other and not in a circle
    for key_id, used in sorted(uses.items()):
        row = dialect.insert(KeyUse).values(key_id=key_id, day=day, used=used)
        together = row.on_conflict_do_update(
            index_elements=["key_id", "day"], set_={"used": KeyUse.used + row.excluded.used}
        ).returning(KeyUse.used)
        totals[key_id] = connection.execute(together).scalar_one()
    connection.execute(delete(KeyUse).where(KeyUse.day < day - _KEPT_DAYS))
    return totals
