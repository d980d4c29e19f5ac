"""Which pictures are put before reviewers, and why.

In: the store's database, how many of each kind, and which are with reviewers already. Out: picks, each with the answer
that is to be reviewed. Only pictures whose bytes are kept can be shown. Knows no review tool.

* ``flagged``: somebody gave feedback on an answer about it, the latest first;
* ``contradicts``: the detector says other than the file itself declares;
* ``uncertain``: the entropy of the calibrated probability is high, the highest first;
* ``random``: drawn by hash, so that what is learnt does not come from doubtful pictures alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import ColumnElement, Connection, Select, and_, func, or_, select
from sqlalchemy.orm import aliased

from app.store.models import Feedback, Picture, Prediction
from deployments.annotation import Annotation

Reason = Literal["flagged", "contradicts", "uncertain", "random"]
REASONS: tuple[Reason, ...] = ("flagged", "contradicts", "uncertain", "random")


class Wanted(BaseModel):
    """How many new pictures of each kind a push puts before reviewers, at most."""

    model_config = ConfigDict(extra="forbid")

    flagged: int = Field(500, ge=0, description="pictures that somebody gave feedback on")
    contradicts: int = Field(100, ge=0, description="pictures of which the detector says other than the file declares")
    uncertain: int = Field(100, ge=0, description="pictures whose probability says least")
    random: int = Field(50, ge=0, description="pictures drawn at random")
    min_entropy_bits: float = Field(0.7, ge=0, le=1, description="what counts as uncertain: 0.7 is 0.19 to 0.81")


@dataclass(frozen=True)
class Pick:
    """A picture for reviewers."""

    sha256: str
    reason: Reason
    annotation: Annotation
    said: tuple[str, ...]
    """What users said of it, in words."""


def entropy_bits(probability: float) -> float:
    """Of a yes or no, in bits: 1 when nothing is known."""
    return -sum(p * math.log2(p) for p in (probability, 1 - probability) if p > 0)


def least_certain(min_entropy_bits: float) -> float:
    """Distance from one half within which a probability has at least that entropy."""
    low, high = 0.0, 0.5
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if entropy_bits(0.5 + middle) >= min_entropy_bits else (low, middle)
    return low


def choose(
    connection: Connection, wanted: Wanted, reviewed: Mapping[str, int], reviewers: int, there: Collection[str]
) -> list[Pick]:
    """New picks, a picture once, for the first reason that it has.

    Args:
        reviewed: sha256 -> reviewers who have spoken.
        reviewers: how many are wanted.
        there: pictures that are before reviewers already.
    """
    taken = {sha256 for sha256, count in reviewed.items() if count >= reviewers} | set(there)
    picks: list[Pick] = []
    for reason in REASONS:
        most = getattr(wanted, reason)
        if not most:
            continue
        found = 0
        with connection.execute(_query(reason, wanted), execution_options={"yield_per": 200}) as rows:
            for row in rows:
                if row.sha256 in taken:
                    continue
                taken.add(row.sha256)
                picks.append(Pick(row.sha256, reason, Annotation.model_validate_json(row.record), ()))
                found += 1
                if found == most:
                    break
    return [_with_feedback(connection, pick) for pick in picks]


def _query(reason: Reason, wanted: Wanted) -> Select[str, str]:
    query = select(Prediction.sha256, Prediction.record).join(
        Picture, and_(Picture.sha256 == Prediction.sha256, Picture.stored.is_(True))
    )
    if reason == "flagged":
        return query.where(Prediction.flagged.is_(True)).order_by(Prediction.id.desc())
    later = aliased(Prediction)
    query = query.where(~select(later.id).where(later.sha256 == Prediction.sha256, later.id > Prediction.id).exists())
    if reason == "random":
        return query.order_by(Prediction.sha256)
    if reason == "contradicts":
        return query.where(_contradicts()).order_by(Prediction.id.desc())
    away = func.abs(Prediction.ai_probability - 0.5)
    return query.where(away <= least_certain(wanted.min_entropy_bits)).order_by(away, Prediction.id.desc())


def _contradicts() -> ColumnElement[bool]:
    return or_(
        and_(Prediction.declared_ai.is_(True), Prediction.verdict == "human"),
        and_(Prediction.declared_ai.is_(False), Prediction.verdict == "ai"),
    )


def not_kept(connection: Connection) -> int:
    """How many pictures with feedback cannot be shown, because their bytes were not kept."""
    kept = select(Picture.sha256).where(Picture.sha256 == Prediction.sha256, Picture.stored.is_(True)).exists()
    counted = select(func.count(Prediction.sha256.distinct())).where(Prediction.flagged.is_(True), ~kept)
    return connection.execute(counted).scalar_one()


def _with_feedback(connection: Connection, pick: Pick) -> Pick:
    about = select(Feedback.part, Feedback.correct, Feedback.value)
    about = about.join(Prediction, Prediction.id == Feedback.prediction_id).where(Prediction.sha256 == pick.sha256)
    said = []
    for part, correct, value in connection.execute(about.order_by(Feedback.id).limit(20)):
        better = "" if value is None else f", rather: {_in_words(json.loads(value))}"
        said.append(f"{part} {'right' if correct else 'wrong'}{better}")
    return Pick(pick.sha256, pick.reason, pick.annotation, tuple(said))


def _in_words(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
