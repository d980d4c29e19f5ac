"""Retraining: when it begins, what a retrained detector must show, and the whole way into the running application."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from data.errors import DataError
from data.versions import DataVersion
from deployments.checkpoints import CheckpointError
from deployments.verified import SCHEMA
from tests.jobs import Jobs
from tests.train.small import flags, jpeg, tiny_vit, traced, write_version
from tests.train.small_models import small_detector
from tests.train.test_registry import RULES, add, evaluated
from train import registry, retrain, tracking
from train.evaluate import EvaluationError
from train.examples import read_examples
from train.retrain_gate import RetrainRules, compare
from train.retrain_triggers import Last, TriggerSettings, count_labels, reason_to_begin
from train.tracking import TrackingConfig

ROOT = Path(__file__).parents[2]
NOW = datetime.datetime(2026, 11, 28, tzinfo=UTC)


def unasked() -> str | None:
    """In production; and nobody asks unless an alarm rings."""
    raise AssertionError("looked up for nothing")


def verified(file: Path, pictures: list[tuple[bytes, str | None]], generator: str | None = None) -> str:
    """A file of verified items."""
    rows = [
        {
            "sha256": hashlib.sha256(data).hexdigest(),
            "image": data,
            "label": label,
            "captions": [],
            "tags": None,
            "reviewers": ["someone@example.org"],
            "verified_at": NOW,
            "source": None,
            "generator": generator if label == "ai" else None,
        }
        for data, label in pictures
    ]
    pq.write_table(pa.Table.from_pylist(sorted(rows, key=lambda row: str(row["sha256"])), SCHEMA), file)
    return str(file)


# --------------------------------------------------------------------------------------------------------- triggers


def test_labels_are_counted_once_and_those_who_could_not_tell_do_not_count(tmp_path: Path) -> None:
    one = verified(tmp_path / "1.parquet", [(b"a", "ai"), (b"b", "human"), (b"c", None)])
    two = verified(tmp_path / "2.parquet", [(b"a", "ai"), (b"d", "ai")])
    assert count_labels([one, two]) == 3 and count_labels([]) == 0
    with pytest.raises(DataError, match="does not exist"):
        count_labels([str(tmp_path / "3.parquet")])


def test_it_begins_when_it_should_and_says_why() -> None:
    labels = TriggerSettings(when=["labels"], new_labels=100)
    assert reason_to_begin(labels, None, 99, NOW, unasked) is None
    assert reason_to_begin(labels, None, 100, NOW, unasked) == "100 newly verified labels"
    before = Last(NOW - datetime.timedelta(days=10), 100)
    assert reason_to_begin(labels, before, 150, NOW, unasked) is None
    assert reason_to_begin(labels, before, 210, NOW, unasked) == "110 newly verified labels"
    schedule = TriggerSettings(when=["schedule"], every_days=10)
    assert reason_to_begin(schedule, before, 0, NOW, unasked) == "10 days after the last one"
    assert reason_to_begin(schedule, before, 0, NOW - datetime.timedelta(hours=1), unasked) is None
    assert reason_to_begin(TriggerSettings(when=["labels", "schedule"]), None, 0, NOW, unasked) == "the first one"
    assert reason_to_begin(TriggerSettings(), before, 0, NOW, unasked) == "asked for"


@contextlib.contextmanager
def prometheus(alerts: list[dict[str, Any]]) -> Iterator[TriggerSettings]:
    """What asks a server that tells of these alerts, whatever becomes of the list meanwhile."""

    class Prometheus(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"status": "success", "data": {"alerts": alerts}}).encode())

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Prometheus) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield TriggerSettings(when=["drift"], prometheus=f"http://127.0.0.1:{server.server_port}")
        server.shutdown()


def alert(name: str, since: datetime.datetime, revision: str | None = None, state: str = "firing") -> dict[str, Any]:
    """As Prometheus's HTTP API tells of it: nanoseconds and all."""
    labels = {"alertname": name, "severity": "warning"} | ({"revision": revision} if revision else {})
    return {"labels": labels, "state": state, "activeAt": f"{since:%Y-%m-%dT%H:%M:%S}.123456789Z", "value": "1e+00"}


def test_an_alarm_of_drift_begins_it() -> None:
    alerts = [alert("VerdictsShifted", NOW, state="pending")]
    with prometheus(alerts) as settings:
        assert reason_to_begin(settings, None, 0, NOW, lambda: "r1") is None
        alerts += [alert("DetectorDrift", NOW, "r1"), alert("NodeLost", NOW)]
        assert reason_to_begin(settings, None, 0, NOW, lambda: "r1") == "alert DetectorDrift"
    with pytest.raises(DataError, match="--prometheus"):
        reason_to_begin(settings, None, 0, NOW, lambda: "r1")


def test_an_alarm_that_goes_on_ringing_begins_one_retraining(capsys: pytest.CaptureFixture[str]) -> None:
    """A timer looks every hour; the alert fires for a day after its cause has gone."""
    hour = datetime.timedelta(hours=1)
    alerts = [alert("DetectorDrift", NOW, "r1")]
    with prometheus(alerts) as settings:
        before, since = Last(NOW - hour, 0), Last(NOW + hour, 0)
        assert reason_to_begin(settings, before, 0, NOW + hour, lambda: "r1") == "alert DetectorDrift"
        # refused by the gate: r1 is in production still, and rings
        assert [reason_to_begin(settings, since, 0, NOW + n * hour, lambda: "r1") for n in (2, 23)] == [None] * 2
        assert "a retraining was begun on it" in capsys.readouterr().out
        # it ended, and rings again
        alerts[:] = [alert("DetectorDrift", NOW + 30 * hour, "r1")]
        assert reason_to_begin(settings, since, 0, NOW + 31 * hour, lambda: "r1") == "alert DetectorDrift"
        # one that is about no revision counts by its time alone
        alerts[:] = [alert("VerdictsShifted", NOW)]
        assert reason_to_begin(settings, before, 0, NOW, lambda: "r2") == "alert VerdictsShifted"
        assert reason_to_begin(settings, since, 0, NOW + 2 * hour, lambda: "r2") is None


def test_an_alarm_about_what_is_not_in_production_begins_none(capsys: pytest.CaptureFixture[str]) -> None:
    alerts = [alert("DetectorDrift", NOW, "r1"), alert("UncertainShareHigh", NOW, "r0")]
    with prometheus(alerts) as settings:
        for serving in ("r2", None):  # promoted since; nothing promoted ever
            assert reason_to_begin(settings, None, 0, NOW, lambda serving=serving: serving) is None  # type: ignore[misc]
        assert "is about r1, and in production is r2" in capsys.readouterr().out
        alerts.append(alert("UncertainShareHigh", NOW, "r2"))
        assert reason_to_begin(settings, None, 0, NOW, lambda: "r2") == "alert UncertainShareHigh"


# ------------------------------------------------------------------------------------------------------------- gate


def figures(old: float, new: float, seed: int, count: int = 200) -> tuple[dict[str, str], dict[str, float], set[str]]:
    """Labels, probabilities that part old and new AI pictures from real ones so well, and the old ids."""
    random = np.random.default_rng(seed)
    labels: dict[str, str] = {}
    chances: dict[str, float] = {}
    for kind, label, mean in (("r", "human", 0.0), ("o", "ai", old), ("n", "ai", new)):
        for number in range(count):
            labels[f"{kind}{number}"] = label
            chances[f"{kind}{number}"] = 1 / (1 + np.exp(-random.normal(mean)))
    return labels, chances, {name for name in labels if name[0] in "ro"}


def alone(labels: dict[str, str]) -> dict[str, str]:
    """No picture is a near-duplicate of another."""
    return {name: name for name in labels}


def test_better_on_the_new_and_as_good_on_the_old_passes() -> None:
    labels, theirs, old = figures(2.0, 0.2, seed=1)
    _, ours, _ = figures(2.0, 2.0, seed=1)
    shown = compare(labels, ours, theirs, old, alone(labels), RetrainRules(resamples=200))
    assert [each.passed for each in shown] == [True, True]
    assert shown[1].difference is not None and shown[1].difference["low"] > 0.2


def test_worse_on_the_old_is_refused_however_good_it_is_on_the_new() -> None:
    labels, theirs, old = figures(2.0, 0.2, seed=1)
    _, ours, _ = figures(1.0, 2.0, seed=1)
    assert [each.passed for each in compare(labels, ours, theirs, old, alone(labels), RetrainRules(resamples=200))] == [
        False,
        True,
    ]


def test_what_noise_may_explain_is_no_better() -> None:
    labels, theirs, old = figures(2.0, 1.0, seed=1)
    _, ours, _ = figures(2.0, 1.0, seed=2)
    ours |= {name: theirs[name] for name in old}
    shown = compare(labels, ours, theirs, old, alone(labels), RetrainRules(resamples=200))
    assert [each.passed for each in shown] == [True, False]
    as_good = RetrainRules(resamples=200, must_be_better=False)
    assert all(each.passed for each in compare(labels, ours, theirs, old, alone(labels), as_good))


def test_flipped_labels_are_refused() -> None:
    labels, theirs, old = figures(2.0, 1.0, seed=1)
    flipped = {name: 1 - chance for name, chance in theirs.items()}
    assert not any(
        each.passed for each in compare(labels, flipped, theirs, old, alone(labels), RetrainRules(resamples=200))
    )


def test_without_new_pictures_nothing_is_shown() -> None:
    labels, theirs, old = figures(2.0, 1.0, seed=1, count=40)
    shown = compare(labels, theirs, theirs, set(labels), alone(labels), RetrainRules(resamples=200))
    assert [each.passed for each in shown] == [True, False] and "0 new AI pictures" in shown[1].text
    assert not compare(labels, theirs, theirs, set(), alone(labels), RetrainRules(resamples=200))[0].passed
    assert old < set(labels)


def test_copies_of_a_picture_are_one_picture() -> None:
    labels, theirs, old = figures(2.0, 0.2, seed=1, count=12)
    ours = theirs | {f"n{number}": 1.0 for number in range(12)}
    copies = alone(labels) | {f"n{number}": "n0" for number in range(12)}
    assert compare(labels, ours, theirs, old, alone(labels), RetrainRules(resamples=200))[1].passed
    shown = compare(labels, ours, theirs, old, copies, RetrainRules(resamples=200))[1]
    assert not shown.passed and shown.text.startswith("1 new AI pictures in the test split")
    # nor is the interval narrower for copies of an old one
    copies |= {f"o{number}": f"o{number % 2}" for number in range(12)}
    few, many = (
        compare(labels, figures(1.0, 0.2, seed=3, count=12)[1], theirs, old, groups, RetrainRules(resamples=200))[0]
        for groups in (copies, alone(labels))
    )
    assert few.difference is not None and many.difference is not None
    assert few.difference["value"] == many.difference["value"] and few.difference != many.difference


# ---------------------------------------------------------------------------------------------------------- the way


def config(folder: Path, **others: Any) -> retrain.RetrainConfig:
    uri = f"sqlite:///{folder}/mlflow.db"
    tracked = TrackingConfig(uri=uri, system_metrics_s=0)
    return retrain.RetrainConfig(prepared=str(folder / "data"), work=folder / "work", tracking=tracked, **others)


def test_without_a_reason_there_is_nothing_to_do_and_one_runs_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    file = verified(tmp_path / "1.parquet", [(b"a", "ai")])
    waiting = config(tmp_path, feedback=[file], when=["labels"])
    assert retrain.retrain(waiting) == "nothing to do"
    with retrain._alone(tmp_path / "work"), pytest.raises(retrain.RetrainError, match="one at a time"):
        retrain.retrain(waiting)
    with pytest.raises(retrain.RetrainError, match="in production"):
        retrain.retrain(config(tmp_path, feedback=[file]))
    # it has begun, and goes on whatever the trigger says
    with pytest.raises(retrain.RetrainError, match="in production"):
        retrain.retrain(waiting)
    client = tracking.connect(waiting.tracking)
    (run,) = retrain.runs(client)
    assert run.info.status == "FAILED" and run.data.tags["deeptrust.step"] == "base"


def versions_of(folder: Path, *sides: str) -> list[str]:
    """A version for each of ``sides``, which says by a letter where each picture is; no letter: it is not there yet."""
    letters = {"r": "train", "v": "val", "t": "test"}
    return [
        write_version(
            folder / "data",
            "aivshuman",
            [
                {"image": traced(number, number % 2), "label": ("human", "ai")[number % 2], "split": letters[side]}
                for number, side in enumerate(given)
            ],
        ).name
        for given in sides
    ]


def begun(folder: Path, done: dict[str, dict[str, Any]]) -> retrain.Retraining:
    """A retraining with these steps done, of which nothing is on record."""
    retraining = object.__new__(retrain.Retraining)
    retraining.config, retraining.done, retraining.folder = config(folder), done, folder
    return retraining


def test_old_is_what_production_was_trained_beside_however_many_rounds_lie_between(tmp_path: Path) -> None:
    first, second, third = versions_of(tmp_path, "rrvvtt", "rrvvtttt", "rrvvtttttt")
    place = str(tmp_path / "data" / "aivshuman" / third)
    retraining = begun(tmp_path, {"data": {"older": second, "place": place}})
    examples = read_examples(place, "detector")
    ids = {hashlib.sha256(traced(number, number % 2)).hexdigest(): number for number in range(10)}

    def old(**dataset: str) -> set[int]:
        return {ids[id_] for id_ in retraining._old_ids(examples.beside(dataset))}

    assert old(name="aivshuman", version=first) == set(range(6))
    # a card that does not say, or names what is not there
    assert old() == old(name="aivshuman", version="gone") == old(name="colours", version=first) == set(range(8))
    retraining.done["data"]["older"] = None
    assert old() == {4, 5, 6, 7, 8, 9}


def test_data_that_production_was_trained_on_are_refused_before_training(tmp_path: Path) -> None:
    one, newest = sorted(versions_of(tmp_path, "rrvvtt", "ttvvrr"))
    base = small_detector(tmp_path / "base", dataset={"name": "aivshuman", "version": one})
    with pytest.raises(EvaluationError, match=f"trained or tuned on 2 of the 2 test pictures of .*{newest}"):
        begun(tmp_path, {"base": {"uri": str(base)}})._data()


def test_a_trial_that_was_rolled_back_before_the_kill_is_not_begun_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def canary(command: str, *_: str) -> tuple[int, str]:
        asked.append(command)
        return 0, ""

    monkeypatch.setattr(retrain, "canary", canary)
    retraining = begun(tmp_path, {"register": {"uri": "models:/detector/2"}})

    def tried(*looks: tuple[str, str], cut_off: str = "") -> dict[str, Any]:
        lines = [
            json.dumps({"candidate": {"uri": f"models:/detector/{number}"}, "action": action, "why": "it errs"}) + "\n"
            for number, action in looks
        ]
        (tmp_path / "canary.jsonl").write_text("".join(lines) + cut_off)
        asked.clear()
        return retraining._tried("canary", 0.1, None, start=[], watch=[])

    assert tried(("2", "continue"), ("2", "roll_back")) == {"passed": False, "told": "rolled back: it errs"}
    assert asked == ["rollback"]
    for left in (tried(("2", "continue")), tried(("1", "roll_back")), tried(), tried(cut_off='{"candidate')):
        assert left["passed"] and asked == ["start", "watch"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TrackingConfig:
    """A registry of its own: others count what is in theirs."""
    return TrackingConfig(uri=f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db", system_metrics_s=0)


@pytest.fixture
def judged(store: TrackingConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[retrain.Retraining]:
    """A retraining of which every step up to `judge` is done: detector 1 is in production, 2 and 3 were held against it
    and passed; 2 is the retraining's."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", str(store.uri))
    monkeypatch.setattr("train.retrain.canary", lambda *_: pytest.fail("the application was asked"))
    monkeypatch.setattr(retrain.Retraining, "_tried", lambda *_, **__: {"passed": True, "told": "nothing against it"})
    (tmp_path / "gate.yaml").write_text(RULES)
    own = config(tmp_path, rules=tmp_path / "gate.yaml").model_copy(update={"tracking": store})
    client = tracking.connect(store)
    assert add(store, tmp_path / "a", 0.9) == "1"
    registry.promote(client, "detector", "1", "production", own.rules)
    for name in "bc":
        add(store, tmp_path / name, 0.9)
    with tracking.run(store, retrain.EXPERIMENT, "retrain") as run:
        done: dict[str, dict[str, Any]] = {name: {} for name in retrain.STEPS[:4]}
        done["register"] = {"version": "2", "uri": "models:/detector/2"}
        done["judge"] = {"passed": True}
        done = {name: {"told": name, "seconds": 0} | step for name, step in done.items()}
        run.tags({f"deeptrust.step.{name}": json.dumps(step) for name, step in done.items()})
        yield retrain.Retraining(own, run)
    client.delete_registered_model("detector")


def holders(retraining: retrain.Retraining) -> dict[str, str]:
    given = registry.aliases_of(retraining.run.client, "detector")
    return {alias: number for alias, number in given.items() if alias != "candidate"}


def test_a_candidate_is_judged_again_when_another_came_into_production(
    judged: retrain.Retraining, monkeypatch: pytest.MonkeyPatch
) -> None:
    def judge(_: retrain.Retraining) -> dict[str, Any]:
        evaluated(judged.config.tracking, "2")
        return {"passed": True, "told": "passed against 3"}

    monkeypatch.setattr(retrain.Retraining, "_judge", judge)
    registry.promote(judged.run.client, "detector", "3", "production", judged.config.rules)
    assert judged.go() == "promoted" and judged.done["judge"]["told"] == "passed against 3"
    assert holders(judged) == dict.fromkeys(("staging", "canary", "production"), "2")
    # killed before the end was on record: nothing is judged and nothing promoted again
    monkeypatch.setattr(retrain.Retraining, "_judge", lambda _: pytest.fail("it was judged again"))
    assert retrain.Retraining(judged.config, judged.run).go() == "promoted"


@pytest.mark.parametrize(
    ("at", "ended"),
    [("staging", []), ("canary", [("rollback", "detector")]), ("promote", [("rollback", "detector", "--production")])],
)
def test_a_candidate_that_may_not_go_on_any_more_ends_the_retraining(
    judged: retrain.Retraining, monkeypatch: pytest.MonkeyPatch, at: str, ended: list[tuple[str, ...]]
) -> None:
    """Or every later start would go on with it, and none begin another."""
    asked: list[tuple[str, ...]] = []

    def canary(*arguments: str) -> tuple[int, str]:
        asked.append(arguments)
        return (0, "") if len(asked) > 1 or at == "staging" else (1, "the dashboard is away")

    def before(self: retrain.Retraining, name: str, work: Any, again: bool = False) -> dict[str, Any]:
        if name == at and not again:
            self.config.rules.write_text(RULES.replace("0.5", "0.95"))
        return once(self, name, work, again)

    once = retrain.Retraining._once
    monkeypatch.setattr(retrain.Retraining, "_once", before)
    monkeypatch.setattr("train.retrain.canary", canary)
    if ended:
        with pytest.raises(retrain.RetrainError, match="dashboard is away"):
            judged.go()
    assert judged.go() == "refused" and asked == ended * 2
    assert "does not pass the gate" in judged.done[at]["told"] and ">= 0.95: 0.9" in judged.done[at]["told"]
    assert holders(judged) == {"production": "1"}
    assert "refused" in judged.page("refused")


def test_a_candidate_that_is_refused_in_the_second_judgement_leaves_no_trial(
    judged: retrain.Retraining, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def canary(command: str, *_: str) -> tuple[int, str]:
        asked.append(command)
        return 0, ""

    monkeypatch.setattr("train.retrain.canary", canary)
    judged.run.tags({"deeptrust.step.staging": json.dumps({"passed": True, "told": "", "seconds": 0})})
    judged.run.client.set_registered_model_alias("detector", "staging", "2")
    registry.promote(judged.run.client, "detector", "3", "production", judged.config.rules)

    def judge(_: retrain.Retraining) -> dict[str, Any]:
        evaluated(judged.config.tracking, "2")
        return {"passed": False, "told": "REFUSED: no better than 3"}

    monkeypatch.setattr(retrain.Retraining, "_judge", judge)
    assert judged.go() == "refused" and asked == ["rollback"] and holders(judged) == {"production": "3"}
    assert judged.done["canary"]["told"] == "REFUSED: no better than 3"


def test_engines_are_exported_on_some_pictures_and_no_others_are_read(
    version: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table, columns = DataVersion.table, []

    def watched(self: DataVersion, split: str, names: list[str]) -> pa.Table:
        columns.extend(names)
        return table(self, split, names)

    def refused(_: object) -> None:
        raise CheckpointError("no engine takes it")

    monkeypatch.setattr(DataVersion, "table", watched)
    monkeypatch.setattr(retrain, "export", refused)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    retraining = begun(tmp_path, {"data": {"place": str(version)}, "train": {"folder": str(tmp_path / "trained")}})
    assert "no engine takes it" in retraining._export()["told"]
    photos = list((tmp_path / "photos").iterdir())
    assert len(photos) == 16 and columns == ["id"]
    assert all(hashlib.sha256(photo.read_bytes()).hexdigest() == photo.stem for photo in photos)


# ------------------------------------------------------------------------------------------ proof: the whole of it


def tinted(number: int) -> bytes:
    """A smooth blob as ``traced`` makes it, without blue: a trace that has nothing of the other generator's."""
    random = np.random.default_rng(number)
    small = Image.fromarray(random.integers(0, 256, (4, 5, 3), dtype=np.uint8))
    return jpeg(np.asarray(small.resize((100, 80), Image.Resampling.BICUBIC)) * np.array([0.5, 0.5, 0.05]))


def raw_folder(folder: Path, pictures: int) -> Path:
    """Real pictures and those of one generator, in the Kaggle layout."""
    (folder / "train_data").mkdir(parents=True)
    rows, sources = ["file_name,label"], ["file_name,source,generator"]
    for number in range(pictures):
        name, label = f"train_data/{number:04d}.jpg", number % 2
        (folder / name).write_bytes(traced(number, label))
        rows.append(f"{name},{label}")
        sources.append(f"{name},lab,{'board' if label else 'photo'}")
    (folder / "train.csv").write_text("\n".join(rows))
    (folder / "sources.csv").write_text("\n".join(sources))
    return folder


EASY = "detector: [{figure: tiers.clean.roc_auc.value, at_least: 0.5, why: is no coin}]\n"
EASY += "captioner: [{figure: scores.bleu1, at_least: 0.0, why: anything goes}]\n"
TRAINING = {
    "epochs": 12,
    "batch_size": 16,
    "learning_rate": 3e-3,
    "damage": {"min_long_side_px": 64, "min_quality": 70},
    "threads": 1,
}
PREPARING = {"twins": "none", "max_distance": 0, "max_group_share": 1.0, "test_share": 0.3}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A registry with a detector in production that never saw a tint, raw data, and verified pictures with one."""
    from data.prepare import AivshumanConfig, prepare
    from train import detector, evaluate

    folder = tmp_path_factory.mktemp("retrain")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        patch.setenv("DEEPTRUST_CACHE", str(folder / "cache"))
        (folder / "easy.yaml").write_text(EASY)
        raw = raw_folder(folder / "raw", 240)
        settings = {"input": str(raw), "output": str(folder / "data"), "num_cpus": 2, "report": False}
        version = prepare(AivshumanConfig.model_validate(settings | PREPARING)).version
        tiny_vit(folder / "vit")
        first = {"data": str(version.location), "model": str(folder / "vit"), "output": str(folder / "first")}
        first |= {"storage": str(folder / "runs"), "record": False}
        assert detector.train(detector.DetectorTraining.model_validate(first | TRAINING)).status == "finished"
        registry.main(["register", "detector", "--checkpoint", str(folder / "first")])
        rules = ["--rules", str(folder / "easy.yaml")]
        quick = ["--no-damages", "--people-by=", "--resamples=50"]
        evaluate.main(["detector", f"--data={version.location}", *quick, *rules])
        registry.main(["promote", "detector", "--to", "production", *rules])
        tints = [(tinted(5000 + number), "ai") for number in range(80)]
        photos = [(traced(7000 + number, 0), "human") for number in range(40)]
        verified(folder / "verified.parquet", [*tints, *photos], "tint")
        yield folder


def command(place: Path, *others: str) -> list[str]:
    settings: dict[str, Any] = {
        "input": place / "raw",
        "prepared": place / "data",
        "work": place / "work",
        "feedback": place / "verified.parquet",
        "rules": place / "easy.yaml",
        "prepare": json.dumps(PREPARING | {"num_cpus": 2}),
        "train": json.dumps(TRAINING),
        "evaluation": json.dumps({"resamples": 50, "heat_maps": 0}),
        "gate.fewest-new": 5,
    }
    return [sys.executable, "-m", "train.retrain", *flags(settings), *others]


@pytest.mark.proof
@pytest.mark.timeout(2400)
def test_verified_labels_of_a_new_generator_reach_production_through_a_kill_and_by_themselves(place: Path) -> None:
    from tests.app.small_service import small_service

    log = place / "retrain.log"
    with pytest.MonkeyPatch.context() as patch, log.open("w") as output:
        patch.setenv("DEEPTRUST_STORE_URL", f"sqlite:///{place}/store.db")
        first = subprocess.Popen(command(place, "--no-deploy"), cwd=ROOT, stdout=output, stderr=output)
        while "judge …" not in log.read_text() and first.poll() is None:
            time.sleep(0.2)
        first.send_signal(signal.SIGKILL)
        first.wait()
        lenient = {"window_s": 10, "fewest": 20, "fewest_to_judge": 10, "agreement": 0.0, "ai_shift": 1.0}
        lenient |= {"uncertain_excess": 1.0, "latency_ratio": 10, "latency_slack_s": 10, "give_up_s": 900}
        (place / "lenient.yaml").write_text(yaml.safe_dump({"detector": lenient}))
        with small_service(place / "service", max_wait_s=60) as service:
            service.deployment("Detector")["user_config"]["uri"] = "models:/detector/1"
            service.redeploy()
            deploying = [f"--url={service.url}", "--replay-clients=4", "--canary-share=0.5", "--interval-s=2"]
            deploying += [f"--{name}-rules={place / 'lenient.yaml'}" for name in ("staging", "canary")]
            # as engineers do it: a job of the cluster that serves, under its token
            names = ("MLFLOW_TRACKING_URI", "DEEPTRUST_CACHE", "DEEPTRUST_STORE_URL")
            jobs = Jobs(service.instance(), {name: os.environ[name] for name in names})
            _, _, *entry = command(place, *deploying)
            assert jobs.submit("stranger", *entry, token=False).returncode != 0
            ended = jobs.submit("retraining", *entry)
            told = log.read_text() + ended.stdout
            assert ended.returncode == 0, told[-4000:] + ended.stderr
            assert "succeeded" in jobs.status("retraining")
            serving = httpx.get(f"{service.url}/v1/models", timeout=60).json()["detector"]
            assert serving["uri"] == "models:/detector/2", told[-3000:]
            assert service.replicas("DetectorCanary") == []
    assert told.count("train …") == 1 and "(done before)" in told, "what was finished before the kill is not done again"
    client = tracking.connect(TrackingConfig(uri=f"sqlite:///{place}/mlflow.db"))
    (run,) = retrain.runs(client)
    assert run.info.status == "FINISHED" and run.data.tags["deeptrust.outcome"] == "promoted"
    judged = json.loads(run.data.tags["deeptrust.step.judge"])
    assert [each["passed"] for each in judged["shown"]] == [True, True]
    print(judged["told"])
    assert registry.aliases_of(client, "detector") == dict.fromkeys(registry.ALIASES, "2")
    assert "better on the new" in (next((place / "work").glob("retraining-*")) / "retraining.html").read_text()
    again = subprocess.run(
        command(place, "--when=labels", "--new-labels=10"), cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert again.returncode == 0 and again.stdout.strip().endswith("nothing to do"), again.stderr
