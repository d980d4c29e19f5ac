"""What one transaction of the store does: rows in, feedback in, a picture's traces out, old rows out.

Functions on a connection, the same for both databases. Knows no threads and no HTTP.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import ColumnElement, Connection, case, delete, exists, func, select, text, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import aliased

from app.store import callbacks, deletions, drift
from app.store.models import Deferred, Deletion, Feedback, Picture, Prediction, TrialAnswer, first_id, new_id
from app.store.reviews import ReviewLabel

#: How long a deletion is remembered: longer than an answer waits in a replica's queue.
_REMEMBER_DELETIONS_S = 24 * 3600.0
#: How long what a trial wrote down is kept: longer than any trial lasts.
_KEEP_TRIALS_S = 14 * 24 * 3600.0
#: What the watcher for drift saw.
_KEEP_DRIFT_S = 90 * 86400.0
#: Status of what is left of a deleted picture among others of a request, and its answer: a problem as others are.
DELETED = 404
_DELETED_ANSWER = json.dumps(
    {
        "type": "about:blank",
        "title": "There is nothing at this address",
        "status": DELETED,
        "detail": "This picture was deleted.",
        "code": "not_found",
    }
)
#: Key of a row that is to be written, and no column: the least id of when work on what it says began. Without it, that
#: is the row's own time.
BEGAN = "began"


class UnknownAnswer(LookupError):
    """No answer that is kept has this id."""


class KeyConflict(ValueError):
    """The same key was sent before with something else."""


@dataclass(frozen=True)
class Event:
    """What somebody says of one part of an answer."""

    answer_id: str
    part: str
    correct: bool
    value: Any = None
    """What would be right; None: not said."""
    sha256: str | None = None
    """The picture that is meant, where an id was given to several."""
    said_by: str | None = None
    key: str | None = None
    """The caller's own name of this event; None: what is said is its name."""

    @property
    def content(self) -> str:
        """A hash of all that is said."""
        said = [self.answer_id, self.sha256, self.part, self.correct, self.value, self.said_by]
        return hashlib.sha256(json.dumps(said).encode()).hexdigest()

    @property
    def row_key(self) -> str:
        return f"content:{self.content}" if self.key is None else f"key:{self.key}"


@dataclass(frozen=True)
class Receipt:
    """An event that is kept."""

    id: int
    sha256: str
    is_new: bool
    has_picture: bool
    verdict: str | None = None
    """That the answer gave, and the models that gave it, by stage: of a new event."""
    models: dict[str, str] = field(default_factory=dict)


def _insert_unless_there(connection: Connection, table: Any) -> Any:
    dialect = postgresql if connection.dialect.name == "postgresql" else sqlite
    return dialect.insert(table).on_conflict_do_nothing()


def write_predictions(connection: Connection, rows: Sequence[dict[str, Any]]) -> None:
    """Insert answers; those that are there already (the same id or name) are left, and those of pictures whose deletion
    was asked for after work on them began are not written. An answer with a name takes the place of one about the same
    picture in which more stages failed: it keeps that one's row, and with it the feedback on it.
    """
    named = {row["name"] for row in rows} - {None}
    # in one order everywhere: two replicas with the same names wait for each other and not in a circle
    rows = sorted(rows, key=lambda row: row["name"] or "")
    written = _write(connection, Prediction, rows)
    if not named:
        return
    columns = (Prediction.name, Prediction.id, Prediction.sha256, Prediction.record)
    wanted = select(*columns).where(Prediction.name.in_(named)).order_by(Prediction.name).with_for_update()
    there = {name: (row_id, sha256, record) for name, row_id, sha256, record in connection.execute(wanted)}
    for row in written:
        row_id, sha256, record = there.get(row["name"], (row["id"], "", ""))
        if row_id != row["id"] and sha256 == row["sha256"] and _failures(row["record"]) < _failures(record):
            changed = {column: row[column] for column in _ANSWER}
            connection.execute(update(Prediction).where(Prediction.id == row_id).values(changed))
            there[row["name"]] = (row_id, sha256, row["record"])


#: What of a row is the answer itself.
_ANSWER = ("answer_id", "verdict", "ai_probability", "declared_ai", "record", "caption_words", "tags_words", "facets")


def _failures(record: str) -> int:
    """Stages that gave no answer."""
    return len(json.loads(record)["errors"])


def answered(connection: Connection, name: str) -> tuple[str, str] | None:
    """Hash of the picture and record of the answer that is kept under a name."""
    found = connection.execute(select(Prediction.sha256, Prediction.record).where(Prediction.name == name)).first()
    return None if found is None else (found.sha256, found.record)


def write_trials(connection: Connection, rows: Sequence[dict[str, Any]]) -> None:
    """Insert what a trial wrote down, except of pictures whose deletion was asked for since."""
    _write(connection, TrialAnswer, rows)


def _write(connection: Connection, table: Any, rows: Sequence[dict[str, Any]]) -> Sequence[dict[str, Any]]:
    """Returns those that were to be written."""
    deleted = deletions.announced(connection, (row["sha256"] for row in rows))
    rows = [row for row in rows if deleted.get(row["sha256"], 0) < row.get(BEGAN, row["id"])]
    if rows:
        columns = [{column: value for column, value in row.items() if column != BEGAN} for row in rows]
        connection.execute(_insert_unless_there(connection, table), columns)
    return rows


def add_feedback(connection: Connection, event: Event) -> Receipt:
    """Keep an event, and the answer that it is about.

    Raises:
        UnknownAnswer: no answer has its id.
        KeyConflict: its key belongs to another event.
    """
    known = _known(connection, event)
    if known is not None:
        return known
    columns = (Prediction.id, Prediction.sha256, Prediction.verdict, Prediction.record)
    wanted = select(*columns).where(Prediction.answer_id == event.answer_id)
    if event.sha256 is not None:
        wanted = wanted.where(Prediction.sha256 == event.sha256)
    prediction = connection.execute(wanted.order_by(Prediction.id.desc()).limit(1)).first()
    if prediction is None:
        raise UnknownAnswer(event.answer_id)
    row = {
        "id": new_id(time.time()),
        "key": event.row_key,
        "content": event.content,
        "prediction_id": prediction.id,
        "part": event.part,
        "correct": event.correct,
        "value": None if event.value is None else json.dumps(event.value, ensure_ascii=False),
        "said_by": event.said_by,
    }
    added = connection.execute(_insert_unless_there(connection, Feedback).returning(Feedback.id), row)
    if added.first() is None:  # another process was quicker with the same key
        known = _known(connection, event)
        if known is None:
            raise UnknownAnswer(event.answer_id)
        return known
    connection.execute(update(Prediction).where(Prediction.id == prediction.id).values(flagged=True, expires_id=None))
    has, models = has_picture(connection, prediction.sha256), json.loads(prediction.record).get("models") or {}
    return Receipt(row["id"], prediction.sha256, True, has, prediction.verdict, models)


def _known(connection: Connection, event: Event) -> Receipt | None:
    found = connection.execute(
        select(Feedback.id, Feedback.content, Prediction.sha256)
        .join(Prediction, Prediction.id == Feedback.prediction_id)
        .where(Feedback.key == event.row_key)
    ).first()
    if found is None:
        return None
    if found.content != event.content:
        raise KeyConflict(event.row_key)
    return Receipt(found.id, found.sha256, False, has_picture(connection, found.sha256))


# ---- pictures -------------------------------------------------------------------------------------------------------


def has_picture(connection: Connection, sha256: str) -> bool:
    """Whether a picture is kept."""
    return media_type(connection, sha256) is not None


def media_type(connection: Connection, sha256: str) -> str | None:
    """Of a picture that is kept; None: it is not."""
    return connection.execute(
        select(Picture.media_type).where(Picture.sha256 == sha256, Picture.stored.is_(True))
    ).scalar_one_or_none()


def expect_picture(connection: Connection, sha256: str, kind: str, size_bytes: int, only_flagged: bool) -> bool:
    """Note that a picture is about to be stored; False: there is no answer about it to keep it for."""
    if not _is_wanted(connection, sha256, only_flagged):
        return False
    dialect = postgresql if connection.dialect.name == "postgresql" else sqlite
    values = {"sha256": sha256, "id": new_id(time.time()), "media_type": kind, "size_bytes": size_bytes}
    row = dialect.insert(Picture).values(**values, stored=False)
    # one that nobody wanted any more is on its way in again
    again = {"index_elements": ["sha256"], "set_": {"id": row.excluded.id}, "where": Picture.stored.is_(False)}
    connection.execute(row.on_conflict_do_update(**again))
    return True


def picture_stored(connection: Connection, sha256: str, only_flagged: bool = False) -> bool:
    """Note that a picture lies where it should; False: it was deleted meanwhile and must go."""
    # a deletion leaves the row until the file has gone, and may have looked for the file before it was written
    if _lock_picture(connection, sha256) is None or not _is_wanted(connection, sha256, only_flagged):
        return False
    connection.execute(update(Picture).where(Picture.sha256 == sha256).values(stored=True))
    return True


def _is_wanted(connection: Connection, sha256: str, only_flagged: bool) -> bool:
    """Whether there is an answer to keep a picture for."""
    wanted = select(Prediction.id).where(Prediction.sha256 == sha256)
    if only_flagged:
        wanted = wanted.where(Prediction.flagged.is_(True))
    return connection.execute(wanted.limit(1)).first() is not None


def _lock_picture(connection: Connection, sha256: str) -> bool | None:
    """Whether a picture is `stored`, which nobody else changes until this transaction ends; None: it has no row."""
    return connection.execute(select(Picture.stored).where(Picture.sha256 == sha256).with_for_update()).scalar()


def forget_picture(connection: Connection, sha256: str, at_s: float) -> dict[str, int]:
    """Remove every answer about a picture and what was said of them; counts of what was removed. The picture's own row
    stays, as one that is not stored, until its file has gone (``picture_removed``).
    """
    deletions.announce(connection, sha256, at_s)
    _forget_deferred(connection, sha256)  # first: whoever is about to end the wait of one writes its answer, too
    about = select(Prediction.id).where(Prediction.sha256 == sha256)
    feedback = connection.execute(delete(Feedback).where(Feedback.prediction_id.in_(about))).rowcount
    predictions = connection.execute(delete(Prediction).where(Prediction.sha256 == sha256)).rowcount
    connection.execute(delete(TrialAnswer).where(TrialAnswer.sha256 == sha256))
    connection.execute(delete(ReviewLabel).where(ReviewLabel.sha256 == sha256))
    drift.forget_picture(connection, sha256)
    stored = _lock_picture(connection, sha256)
    connection.execute(update(Picture).where(Picture.sha256 == sha256).values(stored=False))
    return {"pictures": int(stored or False), "predictions": predictions, "feedback": feedback}


def _forget_deferred(connection: Connection, sha256: str) -> None:
    """A place where it came alone goes; among others it leaves a mark, so that each answer keeps its turn."""
    other = aliased(Deferred)
    left = exists().where(other.place == Deferred.place, other.status != DELETED)
    # of one that is answered it stays when that was
    since = case((Deferred.status == 0, int(time.time() * 1000)), else_=Deferred.leased_until)
    mark = {"status": DELETED, "answer": _DELETED_ANSWER, "sha256": "", "answer_id": "", "name": None}
    places = set(connection.execute(select(Deferred.place).where(Deferred.sha256 == sha256)).scalars())
    for place in sorted(places):
        # of two pictures of a place that are deleted at a time the second sees that the first is a mark
        connection.execute(select(Deferred.id).where(Deferred.place == place).order_by(Deferred.id).with_for_update())
        connection.execute(
            update(Deferred)
            .where(Deferred.place == place, Deferred.sha256 == sha256)
            .values(mark | {"data": b"", "size_bytes": 0, "leased_until": since})
        )
        connection.execute(delete(Deferred).where(Deferred.place == place, ~left))
        callbacks.release(connection, place)  # who waits for the others need not wait for this one


def picture_removed(connection: Connection, sha256: str) -> None:
    """Note that a picture's file has gone."""
    connection.execute(delete(Picture).where(Picture.sha256 == sha256, Picture.stored.is_(False)))


def unwanted_picture(connection: Connection) -> str | None:
    """A picture whose file is to be removed: about which nothing is kept any more, or that was never stored whole. One
    that is not old may be on its way in.
    """
    waiting = select(Picture.sha256).where(text("NOT stored"), Picture.id < first_id(time.time() - 3600))
    return connection.execute(waiting.limit(1)).scalar()


# ---- retention ------------------------------------------------------------------------------------------------------


def remove_old(connection: Connection, now_s: float, keep_days: float | None, most: int) -> int:
    """Remove up to ``most`` answers that have expired or are too old; how many there were."""
    now = first_id(now_s)
    reasons: list[ColumnElement[bool]] = [(Prediction.expires_id < now) & Prediction.flagged.is_(False)]
    if keep_days is not None:
        reasons.append(Prediction.id < first_id(now_s - keep_days * 86400))
    removed = 0
    for reason in reasons:
        ids = connection.execute(select(Prediction.id).where(reason).limit(most - removed)).scalars().all()
        removed += _remove(connection, ids)
    connection.execute(delete(Deletion).where(Deletion.id < first_id(now_s - _REMEMBER_DELETIONS_S)))
    connection.execute(delete(TrialAnswer).where(TrialAnswer.id < first_id(now_s - _KEEP_TRIALS_S)))
    drift.remove_old(connection, now_s - _KEEP_DRIFT_S)
    return removed


def remove_surplus(connection: Connection, keep_count: int, most: int) -> int:
    """Remove up to ``most`` of the oldest answers without feedback, when there are more than ``keep_count``."""
    count = connection.execute(select(func.count()).select_from(Prediction)).scalar_one()
    if count <= keep_count:
        return 0
    ids = connection.execute(
        select(Prediction.id)
        .where(Prediction.flagged.is_(False))
        .order_by(Prediction.id)
        .limit(min(most, count - keep_count))
    ).scalars()
    return _remove(connection, ids.all())


def _remove(connection: Connection, ids: Sequence[int]) -> int:
    if not ids:
        return 0
    hashes = connection.execute(select(Prediction.sha256).where(Prediction.id.in_(ids))).scalars().all()
    connection.execute(delete(Feedback).where(Feedback.prediction_id.in_(ids)))
    removed = connection.execute(delete(Prediction).where(Prediction.id.in_(ids))).rowcount
    known = select(Prediction.id).where(Prediction.sha256 == Picture.sha256).exists()
    connection.execute(update(Picture).where(Picture.sha256.in_(hashes), ~known).values(stored=False))
    reviewed = select(Prediction.id).where(Prediction.sha256 == ReviewLabel.sha256).exists()
    connection.execute(delete(ReviewLabel).where(ReviewLabel.sha256.in_(hashes), ~reviewed))
    return removed
