"""The tables: answers, what people said of them, pictures, what waits, and what was asked to be deleted.

Every row's ``id`` is a number that grows with time (``new_id``): newest first, pages, dates and retention are ranges of
the one primary key, and the full text index of SQLite, which can be read by row number only, has them too. Times are
UTC.

What the models said is ``record``, the annotation as it was answered. The columns beside it are what is looked up.
"""

from __future__ import annotations

import hashlib
import random
import threading
import unicodedata
from datetime import UTC, datetime

from sqlalchemy import (
    BigInteger,
    Boolean,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    String,
    Text,
    UniqueConstraint,
    text,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from deployments.annotation import Annotation

#: Milliseconds since 1970 are the upper bits of an id, until the year 2109. The lower ones are drawn for the first id
#: of a millisecond and counted on from there, so that no process gives one twice. Two processes with three answers each
#: in the same millisecond give one twice in one of 400,000 such milliseconds; the second answer is not kept then.
_DRAWN_BITS = 21

#: 64 bits in both databases; SQLite's row number must be called INTEGER.
_Id = BigInteger().with_variant(Integer, "sqlite")


class _Ids:
    """The latest id of this process."""

    def __init__(self) -> None:
        self._random, self._lock, self._last = random.SystemRandom(), threading.Lock(), -1

    def after(self, first: int) -> int:
        """One that was not given before, among those of the moment that begins with ``first``."""
        mask = (1 << _DRAWN_BITS) - 1
        with self._lock:
            same = self._last & ~mask == first
            low = self._last + 1 if same else self._random.getrandbits(_DRAWN_BITS)
            self._last = first | low & mask
            return self._last


_IDS = _Ids()


def new_id(at_s: float) -> int:
    """An id for something that happened at ``at_s`` (seconds since 1970)."""
    return _IDS.after(first_id(at_s))


def first_id(at_s: float) -> int:
    """The least id of that moment."""
    return int(at_s * 1000) << _DRAWN_BITS


def last_id(at_s: float) -> int:
    """The greatest id of that moment."""
    return first_id(at_s) | (1 << _DRAWN_BITS) - 1


def time_of(row_id: int) -> datetime:
    """When what has this id happened."""
    return datetime.fromtimestamp((row_id >> _DRAWN_BITS) / 1000, UTC)


class Base(DeclarativeBase):
    """All tables of the store."""


class Prediction(Base):
    """One answer."""

    __tablename__ = "predictions"

    id: Mapped[int] = mapped_column(_Id, primary_key=True, autoincrement=False)
    answer_id: Mapped[str] = mapped_column(String(128))
    """The answer's `id`: the caller's own, which may come again, or a new one."""
    sha256: Mapped[str] = mapped_column(String(64))
    verdict: Mapped[str | None] = mapped_column(String(16))
    ai_probability: Mapped[float | None] = mapped_column(Float)
    declared_ai: Mapped[bool | None] = mapped_column(Boolean)
    flagged: Mapped[bool] = mapped_column(Boolean)
    """Somebody gave feedback on it."""
    expires_id: Mapped[int | None] = mapped_column(BigInteger)
    """Unless it is flagged it goes away when this id is reached."""
    record: Mapped[str] = mapped_column(Text)
    """JSON of the annotation, without heat map: caption, tags, model revisions, provenance, timings, errors."""
    caption_words: Mapped[str] = mapped_column(Text)
    """The caption and the tags as full text search reads them: lower case, without accents. PostgreSQL derives
    `caption_text` and `tags_text` (tsvector) from them, SQLite the table `prediction_words` (FTS5)."""
    tags_words: Mapped[str] = mapped_column(Text)
    facets: Mapped[str] = mapped_column(Text)
    """Verdict and tags as words of their own (`verdict_facet`, `tag_facet`), so that they are found with the text."""
    name: Mapped[str | None] = mapped_column(String(64))
    """Of the request and picture, if the request may be sent again (`app.idempotency`): kept once."""

    __table_args__ = (
        Index("ix_predictions_answer", "answer_id", "id"),
        Index("ix_predictions_sha256", "sha256"),
        Index("ix_predictions_verdict", "verdict", "id"),
        Index(
            "ix_predictions_expires",
            "expires_id",
            postgresql_where=text("expires_id IS NOT NULL"),
            sqlite_where=text("expires_id IS NOT NULL"),
        ),
        Index(
            "ix_predictions_name",
            "name",
            unique=True,
            postgresql_where=text("name IS NOT NULL"),
            sqlite_where=text("name IS NOT NULL"),
        ),
    )


class Feedback(Base):
    """What somebody said of one part of an answer."""

    __tablename__ = "feedback"

    id: Mapped[int] = mapped_column(_Id, primary_key=True, autoincrement=False)
    key: Mapped[str] = mapped_column(String(200), unique=True)
    """What makes two requests the same event."""
    content: Mapped[str] = mapped_column(String(64))
    """Hash of what was said: the same key with another content is a mistake."""
    prediction_id: Mapped[int] = mapped_column(ForeignKey("predictions.id", ondelete="CASCADE"), index=True)
    part: Mapped[str] = mapped_column(String(16))
    correct: Mapped[bool] = mapped_column(Boolean)
    value: Mapped[str | None] = mapped_column(Text)
    """JSON of what would be right."""
    said_by: Mapped[str | None] = mapped_column(String(128))


class Picture(Base):
    """A picture that is kept, or is about to be (`stored` is false)."""

    __tablename__ = "pictures"

    sha256: Mapped[str] = mapped_column(String(64), primary_key=True)
    id: Mapped[int] = mapped_column(BigInteger)
    media_type: Mapped[str] = mapped_column(String(32))
    size_bytes: Mapped[int] = mapped_column(Integer)
    stored: Mapped[bool] = mapped_column(Boolean)

    __table_args__ = (
        Index("ix_pictures_waiting", "id", postgresql_where=text("NOT stored"), sqlite_where=text("NOT stored")),
    )


class Deletion(Base):
    """Somebody asked for a picture to be deleted: answers from before, still in a queue somewhere, are not written."""

    __tablename__ = "deletions"

    sha256: Mapped[str] = mapped_column(String(64), primary_key=True)
    id: Mapped[int] = mapped_column(BigInteger)


class TrialAnswer(Base):
    """What one of the two models of a trial answered to one picture (`app.trials`)."""

    __tablename__ = "trial_answers"

    id: Mapped[int] = mapped_column(_Id, primary_key=True, autoincrement=False)
    model: Mapped[str] = mapped_column(String(16))
    role: Mapped[str] = mapped_column(String(16))
    """`production` or `candidate`."""
    returned: Mapped[bool] = mapped_column(Boolean)
    revision: Mapped[str] = mapped_column(String(64))
    sha256: Mapped[str] = mapped_column(String(64))
    code: Mapped[str] = mapped_column(String(32))
    seconds: Mapped[float] = mapped_column(Float)
    said: Mapped[str | None] = mapped_column(Text)
    agreement: Mapped[float | None] = mapped_column(Float)

    __table_args__ = (
        Index("ix_trial_answers_model", "model", "id"),
        Index("ix_trial_answers_sha256", "sha256"),
    )


class Deferred(Base):
    """A picture whose sender waits for the answer elsewhere, or that answer (`app.store.deferred`)."""

    __tablename__ = "deferred"

    id: Mapped[int] = mapped_column(_Id, primary_key=True, autoincrement=False)
    place: Mapped[str] = mapped_column(String(64))
    """Where the answer will be; the same for all pictures of a request."""
    number: Mapped[int] = mapped_column(Integer)
    """Which one of them, from 0."""
    tasks: Mapped[str] = mapped_column(String(64))
    explain: Mapped[str] = mapped_column(String(16))
    answer_id: Mapped[str] = mapped_column(String(128))
    sha256: Mapped[str] = mapped_column(String(64))
    size_bytes: Mapped[int] = mapped_column(Integer)
    data: Mapped[bytes] = mapped_column(LargeBinary)
    """The picture, until there is an answer."""
    status: Mapped[int] = mapped_column(Integer)
    """HTTP status of the answer; 0 while there is none."""
    attempts: Mapped[int] = mapped_column(Integer)
    leased_until: Mapped[int] = mapped_column(BigInteger)
    """Somebody works on it until then, milliseconds since 1970; of one that is answered: since when."""
    answer: Mapped[str] = mapped_column(Text)
    request_id: Mapped[str] = mapped_column(String(128), server_default="")
    """Of the request that it came with, and that request's span: what is logged of the work names them."""
    traceparent: Mapped[str] = mapped_column(String(64), server_default="")
    name: Mapped[str | None] = mapped_column(String(64))
    """Of the answer, if the request may be sent again: `Prediction.name`."""

    __table_args__ = (
        UniqueConstraint("place", "number", name="uq_deferred_place"),
        Index(
            "ix_deferred_waiting",
            *("id", "size_bytes"),
            postgresql_where=text("status = 0"),
            sqlite_where=text("status = 0"),
        ),
        Index("ix_deferred_sha256", "sha256"),
    )


class Callback(Base):
    """Whom to tell that the answer at a place is there (`app.store.callbacks`)."""

    __tablename__ = "callbacks"

    place: Mapped[str] = mapped_column(String(64), primary_key=True)
    id: Mapped[int] = mapped_column(BigInteger)
    url: Mapped[str] = mapped_column(Text)
    state: Mapped[str] = mapped_column(String(16))
    """`waiting` for the answer, `due`, then `delivered`, `given_up` or `gone`."""
    since: Mapped[int] = mapped_column(BigInteger)
    """When the answer was there, milliseconds since 1970."""
    due_at: Mapped[int] = mapped_column(BigInteger)
    """When to tell next, or until when somebody is at it; milliseconds since 1970."""
    attempts: Mapped[int] = mapped_column(Integer)

    __table_args__ = (
        Index(
            "ix_callbacks_due",
            "due_at",
            postgresql_where=text("state = 'due'"),
            sqlite_where=text("state = 'due'"),
        ),
    )


class DriftLook(Base):
    """One look of the watcher for drift at the latest pictures (`app.store.drift`)."""

    __tablename__ = "drift_looks"

    id: Mapped[int] = mapped_column(_Id, primary_key=True, autoincrement=False)
    revision: Mapped[str] = mapped_column(String(64))
    alarm: Mapped[bool] = mapped_column(Boolean)
    changed: Mapped[bool] = mapped_column(Boolean)
    told: Mapped[str] = mapped_column(Text)


class DriftPicture(Base):
    """A picture that drove a look."""

    __tablename__ = "drift_pictures"

    look_id: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    sha256: Mapped[str] = mapped_column(String(64), primary_key=True)
    witness: Mapped[float] = mapped_column(Float)

    __table_args__ = (Index("ix_drift_pictures_sha256", "sha256"),)


class KeyUse(Base):
    """Requests of an API key on a day, of all replicas (`app.store.key_uses`)."""

    __tablename__ = "key_uses"

    key_id: Mapped[str] = mapped_column(String(8), primary_key=True)
    day: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    """Since 1970, UTC."""
    used: Mapped[int] = mapped_column(BigInteger)


def plain(words: str) -> str:
    """Lower case without accents."""
    decomposed = unicodedata.normalize("NFKD", words)
    return "".join(character for character in decomposed if not unicodedata.combining(character)).lower()


def verdict_facet(verdict: str) -> str:
    """A word that stands for a verdict and is no word of any caption."""
    return f"xxverdict{verdict}"


def tag_facet(tag: str) -> str:
    """A word that stands for a whole tag, spaces and all: letters only, which no tokenizer takes apart."""
    digest = hashlib.sha256(tag.encode()).hexdigest()[:24]
    return "xxtag" + digest.translate(str.maketrans("0123456789", "ghijklmnop"))


def row_of(annotation: Annotation, at_s: float, expires_s: float | None, name: str | None = None) -> dict[str, object]:
    """An answer as a row of `predictions`. PostgreSQL takes no NUL in a text; in the record's JSON it is escaped."""
    detection, caption, tags = annotation.detection, annotation.caption, annotation.tags or []
    facets = [verdict_facet(detection.label)] if detection else []
    return {
        "id": new_id(at_s),
        "answer_id": annotation.id,
        "sha256": annotation.sha256,
        "verdict": detection.label if detection else None,
        "ai_probability": detection.ai_probability if detection else None,
        "declared_ai": detection.provenance.declared_ai if detection else None,
        "flagged": False,
        "expires_id": None if expires_s is None else first_id(expires_s),
        "record": annotation.model_dump_json(exclude={"detection": {"heat_map"}}),
        "caption_words": plain(caption.text).replace("\0", " ") if caption else "",
        "tags_words": plain(" , ".join(tags)),
        "facets": " ".join([*facets, *(tag_facet(tag) for tag in tags)]),
        "name": name,
    }
