"""Review without a review tool: which pictures are chosen, what a form says, what reviewers agree on, on SQLite and on
PostgreSQL alike; and the file of verified items. The round trip through a real Label Studio is in `test_review_round`.
"""

from __future__ import annotations

import hashlib
import os
import stat
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from sqlalchemy import insert, select

from app import cluster
from app.review.__main__ import main
from app.review.choose import Wanted, choose, entropy_bits, least_certain, not_kept
from app.review.exporting import export
from app.review.form import FORM, label_of, prediction
from app.review.label_studio import LabelStudio, ReviewError, Task
from app.review.round import labels_of
from app.review.server import ServerSettings, command, own_token, remove_copies
from app.store import events, reviews
from app.store.database import Database
from app.store.events import Event
from app.store.models import Picture, row_of
from app.store.reviews import Label, ReviewLabel, agreed
from app.store.settings import StoreSettings
from deployments.annotation import Annotation, Caption, Detection, Provenance
from deployments.verified import SCHEMA

NOW = datetime(2026, 11, 1, 12, tzinfo=UTC)


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    opened = Database(StoreSettings(url=database_url).database_url, 60, 60)
    opened.open()
    yield opened
    opened.close()


def sha(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def answer(name: str, probability: float, declared: bool | None = None) -> Annotation:
    label = "ai" if probability > 0.7 else "human" if probability < 0.3 else "uncertain"
    provenance = Provenance(c2pa="absent", declared_ai=declared)
    return Annotation(
        id=name,
        sha256=sha(name),
        detection=Detection(label=label, ai_probability=probability, provenance=provenance),
        caption=Caption(text=f"this is {name}"),
        tags=["dog", "wet grass"],
        models={"detector": "starter:detector#1"},
    )


def keep(database: Database, *answers: Annotation, pictures: bool = True, at: float | None = None) -> None:
    for number, each in enumerate(answers):
        with database.writing() as connection:
            events.write_predictions(connection, [row_of(each, (at or time.time()) + number / 100, None)])
            if pictures:
                row = {"id": 1, "media_type": "image/jpeg", "size_bytes": 1, "stored": True}
                connection.execute(insert(Picture).values(sha256=each.sha256, **row))


def label(name: str, reviewer: str, verdict: Any = "ai", minutes: int = 0, **more: Any) -> Label:
    what: dict[str, Any] = {"caption": None, "tags": None} | more
    return Label(sha(name), reviewer, NOW + timedelta(minutes=minutes), verdict, **what)


# ---- which pictures -------------------------------------------------------------------------------------------------


def test_flagged_contradicting_uncertain_and_random_pictures_are_chosen_once_and_with_their_reason(
    database: Database,
) -> None:
    keep(
        database,
        answer("flagged", 0.5, declared=True),
        answer("contradicts", 0.1, declared=True),
        answer("camera", 0.9, declared=False),
        answer("agrees", 0.9, declared=True),
        answer("doubtful", 0.55),
        answer("more doubtful", 0.49),
        answer("reviewed", 0.5),
        answer("there", 0.5),
    )
    keep(database, answer("no picture", 0.5), answer("no picture, flagged", 0.5), pictures=False)
    with database.writing() as connection:
        events.add_feedback(connection, Event("flagged", "verdict", False, "human"))
        events.add_feedback(connection, Event("flagged", "tags", False, ["cat", "<b>"]))
        events.add_feedback(connection, Event("no picture, flagged", "caption", True))
    with database.reading() as connection:
        assert not_kept(connection) == 1
        chosen = choose(connection, Wanted(), {sha("reviewed"): 1}, 1, {sha("there")})
        assert [(pick.sha256, pick.reason) for pick in chosen] == [
            (sha("flagged"), "flagged"),
            (sha("camera"), "contradicts"),
            (sha("contradicts"), "contradicts"),
            (sha("more doubtful"), "uncertain"),
            (sha("doubtful"), "uncertain"),
            (sha("agrees"), "random"),
        ]
        assert chosen[0].said == ("verdict wrong, rather: human", "tags wrong, rather: cat, <b>")
        assert chosen[0].annotation == answer("flagged", 0.5, declared=True)
        again = choose(connection, Wanted(contradicts=1, uncertain=1, random=0), {sha("reviewed"): 1}, 2, ())
        assert [pick.reason for pick in again] == ["flagged", "contradicts", "uncertain"]
        none = choose(connection, Wanted(flagged=0, contradicts=0, uncertain=0, random=0), {}, 1, ())
        assert none == []


def test_the_last_answer_about_a_picture_is_the_one_that_counts(database: Database) -> None:
    keep(database, answer("changed", 0.5), at=time.time() - 60)
    keep(database, answer("changed", 0.99), pictures=False)
    with database.reading() as connection:
        (pick,) = choose(connection, Wanted(), {}, 1, ())
    assert pick.reason == "random" and pick.annotation.detection is not None
    assert pick.annotation.detection.ai_probability == 0.99


def test_uncertain_is_entropy() -> None:
    assert entropy_bits(0.5) == 1 and entropy_bits(0) == entropy_bits(1) == 0
    for bits in (0.2, 0.7, 0.99):
        assert entropy_bits(0.5 + least_certain(bits)) == pytest.approx(bits, abs=1e-6)


# ---- what reviewers say ---------------------------------------------------------------------------------------------


def test_a_label_is_kept_once_and_replaced_by_a_later_one(database: Database) -> None:
    keep(database, answer("a", 0.5), answer("b", 0.5))
    first = [label("a", "ann", "human", caption="a <b>dog</b>", tags=("dog", "wet grass")), label("b", "ann")]
    for labels, counts in (
        (first, {"new": 2, "changed": 0, "known": 0, "gone": 0}),
        (first, {"new": 0, "changed": 0, "known": 2, "gone": 0}),
        ([label("a", "ann", "ai", 1), label("a", "bob", "ai")], {"new": 1, "changed": 1, "known": 0, "gone": 0}),
        ([label("never seen", "ann")], {"new": 0, "changed": 0, "known": 0, "gone": 1}),
    ):
        with database.writing() as connection:
            assert reviews.add(connection, labels) == counts
    with database.reading() as connection:
        assert reviews.counts(connection) == {sha("a"): 2, sha("b"): 1}
        items, left_out = reviews.verified(connection, 1)
        assert {(item.sha256, item.verdict, item.reviewers) for item in items} == {
            (sha("a"), "ai", ("ann", "bob")),
            (sha("b"), "ai", ("ann",)),
        }
        assert left_out == {} and {item.at for item in items} == {NOW, NOW + timedelta(minutes=1)}
        assert reviews.verified(connection, 2)[1] == {"too few reviewers": 1}


def test_labels_go_with_the_picture(database: Database) -> None:
    keep(database, answer("deleted", 0.5), answer("old", 0.5), at=time.time() - 100 * 86400)
    keep(database, answer("stays", 0.5))
    with database.writing() as connection:
        reviews.add(connection, [label(name, "ann") for name in ("deleted", "old", "stays")])
        events.forget_picture(connection, sha("deleted"), time.time())
        events.remove_old(connection, time.time(), 90, 100)
        assert list(connection.execute(select(ReviewLabel.sha256)).scalars()) == [sha("stays")]


@pytest.mark.parametrize(
    ("labels", "outcome"),
    [
        ([label("x", "ann", "human"), label("x", "bob", "human")], "human"),
        ([label("x", "ann", "human"), label("x", "bob", "ai")], "disagreement"),
        ([label("x", "ann", "ai"), label("x", "bob", "unclear")], "disagreement"),
        ([label("x", "ann", "unclear")], "nobody can tell"),
        ([label("x", "ann", None)], "nothing was said"),
        ([label("x", "ann", "ai"), label("x", "bob", None, caption="a dog")], "ai"),
    ],
)
def test_reviewers_who_disagree_keep_an_item_out(labels: list[Label], outcome: str) -> None:
    found = agreed(labels)
    assert (found if isinstance(found, str) else found.verdict) == outcome


def test_captions_are_collected_and_tags_stand_when_they_are_the_same() -> None:
    same = agreed([label("x", "ann", "unclear", caption="a dog", tags=("a", "b")), label("x", "bob", "unclear")])
    assert not isinstance(same, str) and (same.verdict, same.captions, same.tags) == (None, ("a dog",), ("a", "b"))
    both = [label("x", "ann", caption="a dog", tags=("a",)), label("x", "bob", caption="a cat", tags=("b",))]
    other = agreed(both)
    assert not isinstance(other, str) and (other.captions, other.tags) == (("a dog", "a cat"), None)


# ---- the form -------------------------------------------------------------------------------------------------------


def test_what_the_models_said_comes_back_as_a_label_when_nothing_is_changed() -> None:
    record = answer("a", 0.9)
    said = prediction(record)
    assert said["score"] == 0.9 and all(f'name="{part["from_name"]}"' in FORM for part in said["result"])
    submitted = {"result": said["result"], "updated_at": "2026-11-01T12:00:00.123456Z", "was_cancelled": False}
    back = label_of(record.sha256, submitted, "ann")
    at = datetime(2026, 11, 1, 12, 0, 0, 123456, tzinfo=UTC)
    assert back == Label(record.sha256, "ann", at, "ai", "this is a", ("dog", "wet grass"))
    assert [part["from_name"] for part in prediction(answer("b", 0.5))["result"]] == ["caption", "tags"]


def test_what_reviewers_type_is_cleaned_and_skipped_tasks_say_nothing() -> None:
    def submitted(**values: Any) -> dict[str, Any]:
        result = [{"from_name": name, "value": value} for name, value in values.items()]
        return {"result": result, "updated_at": "2026-11-01T12:00:00Z"}

    typed = submitted(
        verdict={"choices": ["Can't tell"]},
        caption={"text": ["<script>alert(1)</script>\0\n" + "m" * 600]},
        tags={"text": ["Dog, wet\tgrass", "dog", "m" * 10_000, " ", *(f"t{i}" for i in range(100))]},
    )
    back = label_of("0" * 64, typed, "a" * 1000)
    assert back is not None and back.verdict == "unclear" and len(back.reviewer) == 256
    assert (
        back.caption is not None and back.caption.startswith("<script>alert(1)</script> m") and len(back.caption) == 512
    )
    assert back.tags is not None and back.tags[:3] == ("dog", "wet grass", "m" * 32) and len(back.tags) == 32
    assert label_of("0" * 64, typed | {"was_cancelled": True}, "ann") is None
    assert label_of("0" * 64, submitted(), "ann") is None
    foreign = [submitted(verdict={"choices": ["Cat"]}), submitted(verdict={}), {"result": None}, typed]
    labels, strange = labels_of(Task(1, sha("a"), {}, foreign), {})
    assert strange == 3 and [each.reviewer for each in labels] == ["unknown"]
    assert labels_of(Task(1, None, {}, [typed]), {}) == ([], 1)


# ---- verified items -------------------------------------------------------------------------------------------------


def test_verified_items_become_a_file_of_their_schema_that_is_whole_or_not_there(tmp_path: Path) -> None:
    names = [f"picture {number}" for number in range(150)]
    items = [agreed([label(name, "ann", "ai" if i % 2 else "human")]) for i, name in enumerate(names)]
    bytes_of: dict[str, bytes | None] = {sha(name): name.encode() for name in names}
    bytes_of[sha(names[3])], bytes_of[sha(names[4])] = None, b"another"
    output = tmp_path / "new" / "verified.parquet"
    found = [item for item in items if not isinstance(item, str)]
    assert export(found, bytes_of.__getitem__, output, "uploads", "newgen") == (148, 2)
    table = pq.read_table(output)
    assert table.schema.equals(SCHEMA) and pq.ParquetFile(output).num_row_groups == 3
    rows = table.to_pylist()
    assert [row["sha256"] for row in rows] == sorted(set(map(sha, names)) - {sha(names[3]), sha(names[4])})
    assert {(row["label"], row["source"], row["generator"]) for row in rows} == {
        ("ai", "uploads", "newgen"),
        ("human", "uploads", None),
    }
    assert list(output.parent.iterdir()) == [output]

    def fails(_: str) -> bytes:
        raise OSError(28, "No space left on device")

    before = output.read_bytes()
    with pytest.raises(ReviewError, match="No space left"):
        export(found, fails, output, None, None)
    assert output.read_bytes() == before and list(output.parent.iterdir()) == [output]


# ---- commands -------------------------------------------------------------------------------------------------------


def test_what_cannot_be_done_is_said_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*arguments: str) -> str:
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 2
        return capsys.readouterr().err

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("LABEL_STUDIO_API_KEY", raising=False)
    url = f"sqlite:///{tmp_path}/store.db"
    assert "does not exist: give the application's database" in fails("push", "--store-url", url)
    assert "--pictures-url" in fails("export", "--store-url", "postgresql://x@127.0.0.1/y", "--output", "o")
    Database(url, 5, 5).open()
    assert "make review" in fails("push", "--store-url", url)
    monkeypatch.setenv("LABEL_STUDIO_API_KEY", "token")
    nobody = f"http://127.0.0.1:{cluster.free_port()}"
    monkeypatch.setattr("app.review.__main__.LabelStudio", lambda url, token: LabelStudio(url, token, ()))
    assert "start it with `make review`" in fails("pull", "--store-url", url, "--url", nobody)


def test_copies_of_forgotten_pictures_are_removed_from_its_files_and_no_others(tmp_path: Path) -> None:
    folder = tmp_path / "data" / "media" / "upload" / "3"
    folder.mkdir(parents=True)
    files = [folder / f"0123abcd-{sha(name)}.jpg" for name in ("a", "b")] + [folder / "somebody-elses.png"]
    for file in files:
        file.touch()
    assert remove_copies(tmp_path, {sha("a"), sha("c")}) == 1
    assert sorted(folder.iterdir()) == sorted(files[1:])
    assert remove_copies(tmp_path / "none", {sha("a")}) == 0


def test_label_studio_is_started_on_loopback_with_secrets_that_others_cannot_read(tmp_path: Path) -> None:
    settings = ServerSettings(label_studio_port=cluster.free_port(), data=tmp_path / "review", program=Path(os.devnull))
    with pytest.raises(ReviewError, match="make review"):
        own_token(tmp_path / "review")
    line, environment = command(settings)
    assert line[line.index("--internal-host") + 1] == "127.0.0.1"
    token = own_token(tmp_path / "review")
    assert len(token) == 40 and environment["LABEL_STUDIO_USER_TOKEN"] == token
    assert not any(token in part or environment["LABEL_STUDIO_PASSWORD"] in part for part in line)
    assert environment[cluster.MARK] == os.environ.get("PORT", "8000")
    assert command(settings)[1]["LABEL_STUDIO_USER_TOKEN"] == token, "the second start has the same"
    for name in ("token", "password"):
        assert stat.S_IMODE((tmp_path / "review" / name).stat().st_mode) == 0o600
    with pytest.raises(ReviewError, match="make review"):
        command(settings.model_copy(update={"program": tmp_path / "none"}))
