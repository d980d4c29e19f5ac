"""Trials: what is written down while a candidate is tried beside the model in production, and read again to judge it.

Of each picture that takes part, a row for each model that was asked: which revision, whether its answer was returned,
how it ended, how long it took, what it said, and how well the two agree where both answered. In: answers of the graph;
the store's database. Out: rows of ``trial_answers``; ``Evidence``. Knows no rules and no Serve.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from sqlalchemy import Connection, select

from app.store import events
from app.store.models import Feedback, Prediction, TrialAnswer, first_id, new_id

Role = Literal["production", "candidate"]
#: What takes part in a trial, by the picture's hash: `canary`: the candidate answers; `shadow`: production answers and
#: the candidate is asked too; `control`: production answers, and that is written down to compare the canary with.
Arm = Literal["canary", "shadow", "control"]
#: The part of an answer that feedback on a model is about.
PARTS: dict[str, str] = {"detector": "verdict", "captioner": "caption", "tagger": "tags"}


@dataclass(frozen=True)
class Tried:
    """One model's answer to one picture of a trial."""

    model: str
    role: Role
    returned: bool
    """Whether whoever sent the picture got this answer."""
    revision: str
    sha256: str
    code: str
    """`ok`, or why there is none."""
    seconds: float
    """Without what only whoever sent the picture wants."""
    at_s: float
    said: str | None = None
    agreement: float | None = None
    """0 to 1, with what the other model said."""

    def row(self) -> dict[str, Any]:
        """As a row of the store."""
        return {
            "id": new_id(self.at_s),
            events.BEGAN: first_id(self.at_s - self.seconds),
            "model": self.model,
            "role": self.role,
            "returned": self.returned,
            "revision": self.revision,
            "sha256": self.sha256,
            "code": self.code,
            "seconds": self.seconds,
            "said": None if self.said is None else self.said.replace("\0", " "),
            "agreement": self.agreement,
        }


def arm_of(sha256: str, canary: float, shadow: float) -> Arm | None:
    """Where a picture falls; the same picture always falls there. The control is as large as the canary."""
    place = int(sha256[:8], 16) / 2**32
    if place < canary:
        return "canary"
    if place < canary + shadow:
        return "shadow"
    return "control" if place >= 1 - canary else None


def said(answer: Mapping[str, Any]) -> str:
    """What a model's answer says, as text."""
    if "tags" in answer:
        return json.dumps(answer["tags"], ensure_ascii=False)
    return str(answer["label"] if "label" in answer else answer["text"])


def agreement(one: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    """How well two answers of the same kind agree: verdicts do or do not; of captions and tags, the share of all their
    words that both have (Jaccard).
    """
    if "label" in one:
        return float(one["label"] == other["label"])
    first, second = (set(a["tags"]) if "tags" in a else set(a["text"].lower().split()) for a in (one, other))
    return len(first & second) / len(first | second) if first | second else 1.0


@dataclass
class Side:
    """What is known of one of the two models."""

    revisions: set[str] = field(default_factory=set)
    seconds: list[float] = field(default_factory=list)
    """Of answers."""
    codes: dict[str, int] = field(default_factory=dict)
    said: dict[str, int] = field(default_factory=dict)
    """Verdict -> answers; empty for text."""
    judged: int = 0
    """Events of feedback on its answers, and those that call them wrong."""
    wrong: int = 0

    @property
    def asked(self) -> int:
        return sum(self.codes.values())

    @property
    def errors(self) -> int:
        return self.asked - self.codes.get("ok", 0)

    def quantile(self, share: float) -> float:
        """Seconds within which that share of its answers came; nan without answers."""
        ordered = sorted(self.seconds)
        return ordered[min(len(ordered) - 1, math.ceil(share * len(ordered)) - 1)] if ordered else math.nan


@dataclass
class Evidence:
    """All that a trial has shown so far."""

    production: Side = field(default_factory=Side)
    candidate: Side = field(default_factory=Side)
    agreements: list[float] = field(default_factory=list)


def read_evidence(connection: Connection, model: str, since_s: float) -> Evidence:
    """What was written of a model's trial that began at ``since_s`` (seconds since 1970)."""
    found = Evidence()
    sides: dict[str, Side] = {"production": found.production, "candidate": found.candidate}
    chosen = (TrialAnswer.model == model) & (TrialAnswer.id >= first_id(since_s))
    columns = (TrialAnswer.role, TrialAnswer.revision, TrialAnswer.code, TrialAnswer.seconds, TrialAnswer.agreement)
    told = TrialAnswer.said if model == "detector" else TrialAnswer.revision  # texts are not looked at
    for role, revision, code, seconds, agreed, what in connection.execute(select(*columns, told).where(chosen)):
        side = sides[role]
        side.codes[code] = side.codes.get(code, 0) + 1
        if agreed is not None:
            found.agreements.append(agreed)
        if code == "ok" and what is not None:
            side.revisions.add(revision)
            side.seconds.append(seconds)
            if model == "detector":
                side.said[what] = side.said.get(what, 0) + 1
    judged = (
        select(Feedback.id, Feedback.correct, TrialAnswer.role)
        .join(Prediction, Prediction.id == Feedback.prediction_id)
        .join(TrialAnswer, TrialAnswer.sha256 == Prediction.sha256)
        .where(chosen, TrialAnswer.returned.is_(True), Prediction.id >= first_id(since_s))
        .where(Feedback.part == PARTS[model], Feedback.id >= first_id(since_s))
        .distinct()
    )
    for _, correct, role in connection.execute(judged):
        sides[role].judged += 1
        sides[role].wrong += not correct
    return found
