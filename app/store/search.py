"""Search over what is kept: words, verdict, tags and dates in, a page of answers out.

Ranked in two tiers, newest first in each: answers whose tags have every word, then the others whose caption and tags
together do. A tier and an id are therefore a place in the order, and the next page begins there however much was
written meanwhile.

Both databases bring words to their stems (Porter); stop words are left out of the query. SQLite merges sorted lists of
row numbers, so that verdict, tags and dates narrow a search before anything is read. The index of PostgreSQL gives all
matches in no order, and each is a page of the table to read: for a common word that is half of it. So the newest rows
within the dates are looked through first, and more of them if the matches among them are as many as to fill the page
soon. The index is asked only when they do not, because then there are few matches, and when there are more rows within
the dates than were looked through.
"""

# ruff: noqa: S608  (the statements are put together of constants; whatever is looked for is bound)

from __future__ import annotations

import base64
import binascii
import re
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import Connection, RowMapping, text

from app.store.models import plain, tag_facet, verdict_facet

_WORD = re.compile(r"[^\W_]+")
MAX_WORDS = 12
#: How many of the newest rows PostgreSQL looks through before it asks its index, and how many where those had some.
_NEWEST_ROWS, _MOST_ROWS = 3000, 12_000
MAX_ID = 2**63 - 1
_COLUMNS = "p.id, p.sha256, p.record, p.flagged"

#: What says nothing about a picture: the stop words of PostgreSQL's `english`.
_STOP_WORDS = """
    i me my myself we our ours ourselves you your yours yourself yourselves he him his himself she her hers
    herself it its itself they them their theirs themselves what which who whom this that these those am is are
    was were be been being have has had having do does did doing a an the and but if or because as until while
    of at by for with about against between into through during before after above below to from up down in out
    on off over under again further then once here there when where why how all any both each few more most
    other some such no nor not only own same so than too very s t can will just don should now
"""
STOP_WORDS = frozenset(_STOP_WORDS.split())


class BadCursor(ValueError):
    """A cursor that no page gave."""


@dataclass(frozen=True)
class Place:
    """A place in the order: the tier, and the id of the last row that was given."""

    tier: int = 0
    below: int = MAX_ID

    def __str__(self) -> str:
        return base64.urlsafe_b64encode(f"{self.tier}.{self.below}".encode()).decode().rstrip("=")

    @classmethod
    def parse(cls, cursor: str) -> Place:
        """
        Raises:
            BadCursor: it is none.
        """
        try:
            tier, below = base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)).decode("ascii").split(".")
            place = cls(int(tier), int(below))
        except (ValueError, binascii.Error):
            raise BadCursor(cursor) from None
        if place.tier not in (0, 1) or not 0 <= place.below <= MAX_ID or str(place) != cursor:
            raise BadCursor(cursor)
        return place


@dataclass(frozen=True)
class Query:
    """What is looked for. Everything that is given must hold."""

    words: str | None = None
    verdict: str | None = None
    tags: tuple[str, ...] = ()
    from_id: int = 0
    """The least id, and the one before which all are."""
    until_id: int = MAX_ID
    place: Place = Place()
    limit: int = 24


def words_of(text: str) -> list[str]:
    """The words of a query that are looked for."""
    words = dict.fromkeys(_WORD.findall(plain(text)))
    return [word for word in words if word not in STOP_WORDS][:MAX_WORDS]


def find(connection: Connection, dialect: str, query: Query) -> tuple[list[RowMapping], Place | None]:
    """A page of rows (``id, sha256, record, flagged``), and where the next one begins; None: it is the last."""
    words = words_of(query.words) if query.words is not None else []
    if query.words is not None and not words:
        return [], None
    rows: list[tuple[int, RowMapping]] = []
    place, wanted = query.place, query.limit + 1
    for tier in range(place.tier, 2 if words else 1):
        here = replace(query, place=place if tier == place.tier else Place(tier), limit=wanted - len(rows))
        rows += [(tier, row) for row in _tier(connection, dialect, here, words, tier)]
        if len(rows) == wanted:
            last_tier, last = rows[query.limit - 1]
            return [row for _, row in rows[: query.limit]], Place(last_tier, last["id"])
    return [row for _, row in rows], None


def _tier(connection: Connection, dialect: str, query: Query, words: list[str], tier: int) -> list[RowMapping]:
    values: dict[str, Any] = {
        "from_id": query.from_id,
        "below": min(query.place.below, query.until_id),
        "limit": query.limit,
    }
    bounds = "p.id >= :from_id AND p.id < :below"
    if not words and not query.tags:
        if query.verdict is not None:
            bounds += " AND p.verdict = :verdict"
            values["verdict"] = query.verdict
        return _rows(connection, f"SELECT {_COLUMNS} FROM predictions p WHERE {bounds} {_NEWEST_FIRST}", values)  # nosec B608
    facets = [tag_facet(tag) for tag in query.tags]
    if query.verdict is not None:
        facets.append(verdict_facet(query.verdict))
    if dialect == "sqlite":
        # the row number of the text table is the id; bounds on it are part of how that table is read
        values["match"] = _sqlite_match(words, facets, tier)
        return _rows(
            connection,
            f"SELECT {_COLUMNS} FROM prediction_words w CROSS JOIN predictions p ON p.id = w.rowid "  # nosec B608
            "WHERE w.prediction_words MATCH :match AND w.rowid >= :from_id AND w.rowid < :below "
            "ORDER BY w.rowid DESC LIMIT :limit",
            values,
        )
    return _postgres(connection, bounds, values, words, facets, tier)


_NEWEST_FIRST = "ORDER BY p.id DESC LIMIT :limit"


def _rows(connection: Connection, statement: str, values: dict[str, Any]) -> list[RowMapping]:
    return list(connection.execute(text(statement), values).mappings())


def _sqlite_match(words: list[str], facets: list[str], tier: int) -> str:
    """FTS5's query. Words and facets have letters and digits only: in quotes they are nothing but words."""
    in_tags = " AND ".join(f'tags_words : "{word}"' for word in words)
    anywhere = " AND ".join(f'{{caption_words tags_words}} : "{word}"' for word in words)
    wanted = [f'facets : "{facet}"' for facet in facets]
    if not words:
        return " AND ".join(wanted)
    if tier == 0:
        return " AND ".join([*wanted, in_tags])
    return f"({' AND '.join([*wanted, anywhere])}) NOT ({in_tags})"


def _postgres(
    connection: Connection, bounds: str, values: dict[str, Any], words: list[str], facets: list[str], tier: int
) -> list[RowMapping]:
    conditions = []
    column = "p.tags_text" if tier == 0 else "p.all_text"
    if words:
        values["words"] = " & ".join(f"'{word}'" for word in words)
        in_tags = "p.tags_text @@ to_tsquery('english', :words)"
        conditions = [in_tags] if tier == 0 else [f"{column} @@ to_tsquery('english', :words)", f"NOT {in_tags}"]
    if facets:
        values["facets"] = " & ".join(f"'{facet}'" for facet in facets)
        conditions.append(f"{column} @@ to_tsquery('simple', :facets)")
    wanted = " AND ".join(conditions)

    def among(newest: int) -> list[RowMapping]:
        rows = f"SELECT * FROM predictions p WHERE {bounds} ORDER BY p.id DESC LIMIT {newest}"  # nosec B608
        return _rows(connection, f"SELECT {_COLUMNS} FROM ({rows}) p WHERE {wanted} {_NEWEST_FIRST}", values)  # nosec B608

    rows = among(_NEWEST_ROWS)
    if len(rows) == values["limit"] or _are_few(connection, bounds, values):
        return rows
    if rows and (enough := int(1.5 * _NEWEST_ROWS * values["limit"] / len(rows))) <= _MOST_ROWS:
        rows = among(enough)
        if len(rows) == values["limit"]:
            return rows
    return _rows(
        connection,
        f"WITH m AS MATERIALIZED (SELECT p.id FROM predictions p WHERE {wanted} AND {bounds}), "  # nosec B608
        f"newest AS MATERIALIZED (SELECT id FROM m p {_NEWEST_FIRST}) "
        f"SELECT {_COLUMNS} FROM newest JOIN predictions p ON p.id = newest.id ORDER BY p.id DESC",
        values,
    )


def _are_few(connection: Connection, bounds: str, values: dict[str, Any]) -> bool:
    """Whether the newest rows are all that lie within the bounds: counted off the primary key, no further than need
    be.
    """
    some = f"SELECT 1 FROM predictions p WHERE {bounds} LIMIT {_NEWEST_ROWS + 1}"  # nosec B608
    return connection.execute(text(f"SELECT count(*) FROM ({some}) s"), values).scalar_one() <= _NEWEST_ROWS  # nosec B608
