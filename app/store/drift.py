"""What the watcher for drift saw, kept: looks at the window over time, and the pictures that drove them.

Functions on a connection, the same for both databases. Knows no statistic.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, delete, insert, select

from app.store import deletions
from app.store.models import DriftLook, DriftPicture, first_id, new_id, time_of


@dataclass(frozen=True)
class Look:
    """One look at the window."""

    at: datetime
    revision: str
    alarm: bool
    changed: bool
    """An alarm began or ended with it."""
    told: dict[str, Any]
    """`pictures`, `ratios` by channel, `moved` by statistic, `channel`: the strongest."""
    pictures: tuple[tuple[str, float], ...]
    """sha256 and witness of those that drove it, the strongest first."""


def write(connection: Connection, rows: Sequence[dict[str, Any]]) -> None:
    """Keep looks as the watcher made them (``deployments.drift``), without pictures that were deleted since."""
    for row in rows:
        look = new_id(row["at_s"])
        values = {key: row[key] for key in ("revision", "alarm", "changed")}
        connection.execute(insert(DriftLook).values(id=look, told=json.dumps(row["told"]), **values))
        hashes = [sha256 for sha256, _ in row["pictures"]]
        gone = deletions.announced(connection, hashes)
        pictures = [
            {"look_id": look, "sha256": sha256, "witness": witness}
            for sha256, witness in row["pictures"]
            if sha256 not in gone
        ]
        if pictures:
            connection.execute(insert(DriftPicture), pictures)


def read(connection: Connection, since_s: float) -> list[Look]:
    """Looks since then, oldest first."""
    drove: dict[int, list[tuple[str, float]]] = {}
    found = select(DriftPicture).where(DriftPicture.look_id >= first_id(since_s)).order_by(DriftPicture.witness.desc())
    for row in connection.execute(found):
        drove.setdefault(row.look_id, []).append((row.sha256, row.witness))
    looks = connection.execute(select(DriftLook).where(DriftLook.id >= first_id(since_s)).order_by(DriftLook.id))
    return [
        Look(time_of(row.id), row.revision, row.alarm, row.changed, json.loads(row.told), tuple(drove.get(row.id, ())))
        for row in looks
    ]


def forget_picture(connection: Connection, sha256: str) -> None:
    """Nothing of a picture is left here."""
    connection.execute(delete(DriftPicture).where(DriftPicture.sha256 == sha256))


def remove_old(connection: Connection, before_s: float) -> None:
    """Looks from before then go."""
    connection.execute(delete(DriftPicture).where(DriftPicture.look_id < first_id(before_s)))
    connection.execute(delete(DriftLook).where(DriftLook.id < first_id(before_s)))
