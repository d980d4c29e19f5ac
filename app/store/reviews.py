"""What reviewers say of pictures: one label a reviewer and picture, and what several of them come down to.

In: labels as review brings them back. Out: rows of ``review_labels``; verified items, each with the reviewers who agree
on it. A label goes with the last answer about its picture (``app.store.events``). Functions on a connection, the same
for both databases. Knows no review tool.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import groupby
from typing import Literal

from sqlalchemy import BigInteger, Connection, RowMapping, String, Text, delete, func, insert, select
from sqlalchemy.orm import Mapped, mapped_column

from app.store.models import Base, Picture, Prediction, first_id, new_id, time_of

Verdict = Literal["ai", "human", "unclear"]


class ReviewLabel(Base):
    """What one reviewer says of one picture; said again it replaces what was said."""

    __tablename__ = "review_labels"

    sha256: Mapped[str] = mapped_column(String(64), primary_key=True)
    reviewer: Mapped[str] = mapped_column(String(256), primary_key=True)
    id: Mapped[int] = mapped_column(BigInteger)
    """When it was said, as the ids of all tables tell it."""
    verdict: Mapped[str | None] = mapped_column(String(16))
    """`ai`, `human`, `unclear`: the reviewer cannot tell; null: not answered."""
    caption: Mapped[str | None] = mapped_column(Text)
    tags: Mapped[str | None] = mapped_column(Text)
    """JSON of all tags that are right; null: not answered."""


@dataclass(frozen=True)
class Label:
    """What one reviewer says of one picture."""

    sha256: str
    reviewer: str
    at: datetime
    verdict: Verdict | None
    caption: str | None
    tags: tuple[str, ...] | None


@dataclass(frozen=True)
class Verified:
    """What the reviewers of a picture agree on."""

    sha256: str
    verdict: Literal["ai", "human"] | None
    captions: tuple[str, ...]
    tags: tuple[str, ...] | None
    reviewers: tuple[str, ...]
    at: datetime


def add(connection: Connection, labels: Sequence[Label]) -> dict[str, int]:
    """Keep labels; counts of those that are ``new``, ``changed``, ``known`` and about pictures that are ``gone``: of
    which nothing is kept any more.
    """
    counts = dict.fromkeys(("new", "changed", "known", "gone"), 0)
    for label in labels:
        counts[_add(connection, label)] += 1
    return counts


def _add(connection: Connection, label: Label) -> str:
    if connection.execute(select(Prediction.id).where(Prediction.sha256 == label.sha256).limit(1)).first() is None:
        return "gone"
    key = (ReviewLabel.sha256 == label.sha256) & (ReviewLabel.reviewer == label.reviewer)
    before = connection.execute(select(ReviewLabel.id).where(key)).scalar_one_or_none()
    if before is not None:
        if before >= first_id(label.at.timestamp()):
            return "known"
        connection.execute(delete(ReviewLabel).where(key))
    row = {
        "sha256": label.sha256,
        "reviewer": label.reviewer,
        "id": new_id(label.at.timestamp()),
        "verdict": label.verdict,
        "caption": label.caption,
        "tags": None if label.tags is None else json.dumps(label.tags, ensure_ascii=False),
    }
    connection.execute(insert(ReviewLabel).values(row))
    return "new" if before is None else "changed"


def counts(connection: Connection) -> dict[str, int]:
    """sha256 -> how many reviewers have spoken."""
    found = select(ReviewLabel.sha256, func.count()).group_by(ReviewLabel.sha256)
    return {row[0]: row[1] for row in connection.execute(found)}


def verified(connection: Connection, reviewers: int) -> tuple[list[Verified], dict[str, int]]:
    """Items on which at least so many reviewers agree and whose picture is kept, by sha256; and how many others are
    left out, by reason (``agreed``; ``picture not kept``).
    """
    kept = set(connection.execute(select(Picture.sha256).where(Picture.stored.is_(True))).scalars())
    rows = connection.execute(select(*ReviewLabel.__table__.columns).order_by(ReviewLabel.sha256, ReviewLabel.id))
    items: list[Verified] = []
    left_out: Counter[str] = Counter()
    for sha256, of_one in groupby(map(_label, rows.mappings()), key=lambda label: label.sha256):
        found = agreed(list(of_one), reviewers) if sha256 in kept else "picture not kept"
        if isinstance(found, str):
            left_out[found] += 1
        else:
            items.append(found)
    return items, dict(left_out)


def agreed(labels: Sequence[Label], reviewers: int = 1) -> Verified | str:
    """What the labels of one picture come down to, or why they come to nothing.

    Reviewers disagree when they give two verdicts, "cannot tell" among them. Captions are not compared: each says what
    somebody sees, and several are as good as one. Tags stand when all who give some give the same.
    """
    if len(labels) < reviewers:
        return "too few reviewers"
    verdicts = {label.verdict for label in labels if label.verdict is not None}
    if len(verdicts) > 1:
        return "disagreement"
    captions = tuple(dict.fromkeys(label.caption for label in labels if label.caption))
    tags = {frozenset(label.tags): label.tags for label in labels if label.tags is not None}
    verdict = next(iter(verdicts), None)
    same_tags = next(iter(tags.values())) if len(tags) == 1 else None
    if verdict in (None, "unclear") and not captions and not same_tags:
        return "nobody can tell" if verdict == "unclear" else "nothing was said"
    return Verified(
        labels[0].sha256,
        None if verdict == "unclear" else verdict,
        captions,
        same_tags,
        tuple(sorted(label.reviewer for label in labels)),
        max(label.at for label in labels),
    )


def _label(row: RowMapping) -> Label:
    tags = None if row["tags"] is None else tuple(json.loads(row["tags"]))
    return Label(row["sha256"], row["reviewer"], time_of(row["id"]), row["verdict"], row["caption"], tags)
