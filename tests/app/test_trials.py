"""What a trial writes down, and what is read of it again."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path

import pytest
from sqlalchemy import select

from app.store import events
from app.store.database import Database
from app.store.events import Event
from app.store.models import TrialAnswer, row_of
from app.trials import Tried, agreement, arm_of, read_evidence, said
from deployments.annotation import Annotation, Provenance


def sha(number: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()


def test_arms_are_shares_of_the_pictures_and_the_control_is_as_large_as_the_canary() -> None:
    arms = [arm_of(sha(number), 0.2, 0.3) for number in range(4000)]
    assert arms == [arm_of(sha(number), 0.2, 0.3) for number in range(4000)]
    for arm, share in (("canary", 0.2), ("shadow", 0.3), ("control", 0.2), (None, 0.3)):
        assert arms.count(arm) / len(arms) == pytest.approx(share, abs=0.03)
    assert {arm_of(sha(number), 0, 0) for number in range(100)} == {None}
    assert {arm_of(sha(number), 0, 1) for number in range(100)} == {"shadow"}
    wider = [arm_of(sha(number), 0.4, 0) for number in range(4000)]
    assert all(after == "canary" for before, after in zip(arms, wider, strict=True) if before == "canary")


def test_agreement() -> None:
    assert agreement({"label": "ai"}, {"label": "ai"}) == 1
    assert agreement({"label": "ai"}, {"label": "uncertain"}) == 0
    assert agreement({"text": "A dog runs"}, {"text": "a dog sits"}) == pytest.approx(2 / 4)
    assert agreement({"tags": ["dog"]}, {"tags": []}) == 0
    assert agreement({"tags": []}, {"tags": []}) == 1
    assert (
        said({"tags": ["hund"]}) == '["hund"]' and said({"text": "a dog"}) == "a dog" and said({"label": "ai"}) == "ai"
    )


@pytest.fixture
def database(tmp_path: Path) -> Database:
    found = Database(f"sqlite:///{tmp_path / 'store.db'}", 60, 60)
    found.open()
    return found


def tried(number: int, role: str, at_s: float, code: str = "ok", **others: object) -> dict[str, object]:
    fields = {
        "model": "detector",
        "role": role,
        "returned": True,
        "revision": f"{role}-1",
        "sha256": sha(number),
        "code": code,
        "seconds": 0.5,
        "at_s": at_s,
        "said": "ai" if code == "ok" else None,
    }
    return Tried(**fields | others).row()  # type: ignore[arg-type]


def test_evidence_is_of_this_trial_of_this_model(database: Database) -> None:
    now = time.time()
    rows = [tried(number, "candidate", now - 5) for number in range(6)]
    rows += [tried(number, "production", now - 5) for number in range(10, 14)]
    rows += [tried(20, "candidate", now - 5, "failed"), tried(21, "production", now - 5, returned=False, agreement=0.0)]
    rows += [tried(30, "candidate", now - 500), tried(31, "candidate", now - 5, model="captioner")]
    with database.writing() as connection:
        events.write_trials(connection, rows)
    with database.reading() as connection:
        found = read_evidence(connection, "detector", now - 60)
    assert (found.candidate.asked, found.candidate.errors, found.candidate.said) == (7, 1, {"ai": 6})
    assert (found.production.asked, found.production.errors) == (5, 0)
    assert found.candidate.revisions == {"candidate-1"} and found.agreements == [0.0]
    assert found.candidate.quantile(0.95) == 0.5


def test_feedback_counts_for_the_model_whose_answer_was_returned(database: Database) -> None:
    now = time.time()
    with database.writing() as connection:
        for number, role in ((1, "candidate"), (2, "production"), (3, "production")):
            record = Annotation(id=f"answer-{number}", sha256=sha(number))
            verdict = {"label": "ai", "ai_probability": 0.9, "model": "d#1"}
            record.detected(verdict, Provenance(c2pa="absent", declared_ai=None))
            events.write_predictions(connection, [row_of(record, now - 5, None)])
            # of number 3 nobody got this answer
            events.write_trials(connection, [tried(number, role, now - 5, returned=number != 3)])
            event = Event(f"answer-{number}", "verdict", correct=number == 2, value="human")
            events.add_feedback(connection, event)
            events.add_feedback(connection, Event(f"answer-{number}", "caption", correct=False))
    with database.reading() as connection:
        found = read_evidence(connection, "detector", now - 60)
    assert (found.candidate.judged, found.candidate.wrong) == (1, 1)
    assert (found.production.judged, found.production.wrong) == (1, 0)


def test_a_deleted_picture_leaves_nothing_in_a_trial(database: Database) -> None:
    now = time.time()
    with database.writing() as connection:
        events.write_trials(connection, [tried(1, "candidate", now), tried(2, "candidate", now)])
        events.forget_picture(connection, sha(1), now + 1)
        events.write_trials(connection, [tried(1, "production", now)])  # was in a queue
    with database.reading() as connection:
        assert set(connection.execute(select(TrialAnswer.sha256)).scalars()) == {sha(2)}
