"""Trials in the real application with tiny models: exchange under load, shadow, and a bad candidate that nobody has to
notice."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from sqlalchemy import select

from app.store.database import Database
from app.store.models import TrialAnswer
from tests.app.load import HTTP, Load
from tests.app.small_service import ROOT, SmallService, small_service

pytestmark = [pytest.mark.proof, pytest.mark.timeout(1800)]

CLIENTS = 16


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('store') / 'store.db'}"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, store: str) -> Iterator[SmallService]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DEEPTRUST_STORE_URL", store)
        with small_service(tmp_path_factory.mktemp("service"), max_wait_s=60) as running:
            good, bad = (
                shutil.copytree(running.folder / "detector-0", running.folder / name) for name in ("good", "bad")
            )
            card = json.loads((good / "card.json").read_text())
            # the same network under another revision, and the same with its labels flipped
            (good / "card.json").write_text(json.dumps(card | {"licence": "none"}))
            (bad / "card.json").write_text(json.dumps(card | {"labels": ["ai", "human"]}))
            (running.folder / "rules.yaml").write_text(
                yaml.safe_dump(
                    {
                        "detector": {
                            "window_s": 25,
                            "give_up_s": 600,
                            "fewest": 60,
                            "fewest_to_judge": 25,
                            "latency_ratio": 5,
                            "latency_slack_s": 3,
                        }
                    }
                )
            )
            yield running


def canary(service: SmallService, *arguments: str, codes: tuple[int, ...] = (0,)) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "app.canary", *arguments]
    ended = subprocess.run(
        command,
        env=os.environ | {"PORT": str(service.port)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert ended.returncode in codes, f"{ended.returncode}: {ended.stdout}\n{ended.stderr}"
    return ended


def served(load: Load) -> list[str]:
    """Names of the checkpoints that answered, all answers being good."""
    assert {answer.status_code for answer in load.answers} == {200}
    records = [answer.json() for answer in load.answers]
    assert [record["errors"] for record in records if record["errors"]] == []
    return [record["models"]["detector"].split("#")[0].rsplit("/", 1)[1] for record in records]


def written(store: str, since_s: float) -> list[Any]:
    """Rows of trials since a moment."""
    from app.store.models import first_id

    database = Database(store, 60, 60)
    try:
        with database.reading() as connection:
            return list(connection.execute(select(TrialAnswer).where(TrialAnswer.id >= first_id(since_s))))
    finally:
        database.close()


def production(service: SmallService) -> str:
    answer = HTTP.get(f"{service.url}/v1/models", timeout=120).json()["detector"]
    return str(answer["uri"]).rsplit("/", 1)[1]


def test_in_the_shadow_answers_are_written_down_and_never_returned(service: SmallService, store: str) -> None:
    replicas, began = service.replicas("Detector"), time.time()
    assert service.replicas("DetectorCanary") == []
    with Load(service, "/v1/detect", CLIENTS) as load:
        uri = str(service.folder / "bad")
        canary(service, "start", "detector", "--uri", uri, "--share", "0.5", "--shadow")
        assert "already" in canary(service, "start", "detector", "--uri", uri, "--share", "0.5", "--shadow").stdout
        time.sleep(15)
    assert set(served(load)) == {"detector-0"}
    rows = written(store, began)
    candidate = [row for row in rows if row.role == "candidate"]
    assert len(candidate) >= 20 and not any(row.returned for row in candidate)
    assert {row.code for row in candidate} == {"ok"}
    compared = [row.agreement for row in candidate]
    assert sum(compared) / len(compared) < 0.5, "with its labels flipped it agrees on what is uncertain alone"
    assert all(int(row.sha256[:8], 16) / 2**32 < 0.5 for row in rows)
    shown = canary(service, "show", "detector", "--rules", str(service.folder / "rules.yaml")).stdout
    assert "50.0% in its shadow" in shown and "broken  agreement" in shown
    canary(service, "rollback", "detector")
    assert service.replicas("DetectorCanary") == [] and service.replicas("Detector") == replicas


def test_a_bad_candidate_that_was_forced_into_the_canary_is_rolled_back_by_itself(
    service: SmallService, tmp_path: Path
) -> None:
    uri, log = str(service.folder / "bad"), tmp_path / "log.jsonl"
    rules = ("--rules", str(service.folder / "rules.yaml"), "--log", str(log), "--interval-s", "2")
    with Load(service, "/v1/detect", CLIENTS) as load:
        canary(service, "start", "detector", "--uri", uri, "--share", "0.3")
        # a watcher that is killed leaves nothing that the next one would miss
        canary(service, "watch", "detector", *rules, "--once", codes=(3, 4))
        began = time.monotonic()
        ended = canary(service, "watch", "detector", *rules, "--uri", uri, codes=(3,))
        took = time.monotonic() - began
    answered = served(load)
    assert {"bad", "detector-0"} == set(answered)
    assert "rolled back" in ended.stdout or "no trial" in ended.stdout
    last = json.loads(log.read_text().splitlines()[-1])
    assert last["action"] == "roll_back" and last["age_s"] < 120
    assert any(finding["rule"] in ("agreement", "ai") for finding in last["findings"] if finding["state"] == "broken")
    print(f"rolled back after {last['age_s']} s and {last['answers']} answers, watcher {took:.0f} s: {last['why']}")
    assert production(service) == "detector-0" and service.replicas("DetectorCanary") == []


def test_a_good_candidate_is_promoted_under_load_and_put_back_and_no_request_is_lost(
    service: SmallService, tmp_path: Path
) -> None:
    uri, log = str(service.folder / "good"), tmp_path / "log.jsonl"
    replicas = {name: service.replicas(name) for name in ("Ingress", "Detector", "Captioner", "Tagger")}
    rules = ("--rules", str(service.folder / "rules.yaml"), "--log", str(log), "--interval-s", "2")
    with Load(service, "/v1/detect", CLIENTS) as load:
        canary(service, "start", "detector", "--uri", uri, "--share", "0.3")
        canary(service, "watch", "detector", *rules, "--uri", uri)
        time.sleep(3)
        assert production(service) == "good"
        canary(service, "watch", "detector", *rules, "--uri", uri)  # another one: it is done
        canary(service, "rollback", "detector", "--production")
        time.sleep(8)
    answered = served(load)
    assert set(answered) == {"detector-0", "good"} and answered[-1] == "detector-0"
    print(f"{len(answered)} answers, {answered.count('good')} by the candidate, none failed")
    assert [json.loads(line)["action"] for line in log.read_text().splitlines()][-1] == "promote"
    assert {name: service.replicas(name) for name in replicas} == replicas, "nothing was started again"
    assert service.replicas("DetectorCanary") == []


def test_what_cannot_be_started_is_told_and_leaves_nothing(service: SmallService, tmp_path: Path) -> None:
    answer = canary(service, "start", "detector", "--uri", str(service.folder / "captioner-0"), codes=(1,))
    assert "checkpoint for captioning" in answer.stderr
    empty = tmp_path / "empty"
    shutil.copytree(service.folder / "good", empty)
    (empty / "preprocessor_config.json").unlink()
    answer = canary(service, "start", "detector", "--uri", str(empty), "--timeout-s", "60", codes=(1,))
    assert "DetectorCanary" in answer.stderr
    replicas = service.replicas("Detector")
    answer = canary(service, "serve", "detector", "--uri", str(empty), codes=(1,))
    assert f"{empty} is refused, and Detector goes on with" in answer.stderr
    assert service.replicas("Detector") == replicas
    assert str(empty) not in canary(service, "show", "detector").stdout.splitlines()[0]
    answer = canary(service, "watch", "detector", codes=(1,))
    assert "no trial" in answer.stderr
    answer = canary(service, "promote", "detector", codes=(1,))
    assert "no trial" in answer.stderr
    assert production(service) == "detector-0"
