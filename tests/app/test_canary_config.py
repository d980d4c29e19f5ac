"""The running configuration is changed where a replica takes note of it in place, and nowhere else."""

from __future__ import annotations

import copy
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from ray.serve._private.deploy_utils import get_app_code_version
from ray.serve.schema import ServeApplicationSchema

from app import canary
from app import canary_config as running
from app.canary_config import CanaryError, DashboardAway
from app.canary_rules import Rules
from app.config import CANARIES, MODELS, IngressConfig, ModelName
from app.store.database import StoreUnavailable
from app.trials import Evidence, Side

ROOT = Path(__file__).parents[2]
NAME = "deeptrust"


def config(file: str = "serve_config.cpu.yaml") -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((ROOT / file).read_text())
    return found


def deployment(config: dict[str, Any], name: str) -> dict[str, Any]:
    return running.deployment_of(running.application_of(config, NAME), name)


def restarts(before: dict[str, Any], after: dict[str, Any]) -> bool:
    """Whether Serve would start every replica again, by its own measure."""
    versions = {
        get_app_code_version(ServeApplicationSchema.model_validate(each["applications"][0])) for each in (before, after)
    }
    return len(versions) > 1


@pytest.mark.parametrize("file", ["serve_config.yaml", "serve_config.cpu.yaml"])
@pytest.mark.parametrize("model", ["detector", "captioner", "tagger"])
def test_a_trial_from_start_to_promotion_and_back_restarts_nothing(file: str, model: ModelName) -> None:
    first = config(file)
    untouched = copy.deepcopy(first)
    old = deployment(first, MODELS[model])["user_config"]["uri"]

    up = running.with_candidate(first, NAME, model, "models:/x/7")
    assert deployment(up, CANARIES[model])["user_config"]["uri"] == "models:/x/7"
    assert deployment(up, CANARIES[model])["autoscaling_config"]["min_replicas"] == 1
    assert running.shares_of(running.application_of(up, NAME), model) == (0, 0), "no picture before it is there"

    trial = running.with_shares(up, NAME, model, 0.2, 0.3, 1000.0)
    assert running.shares_of(running.application_of(trial, NAME), model) == (0.2, 0.3)
    assert running.ingress_of(running.application_of(trial, NAME)).since == {model: 1000.0}

    new = running.promoted(trial, NAME, model)
    assert deployment(new, MODELS[model])["user_config"]["uri"] == "models:/x/7"
    assert running.shares_of(running.application_of(new, NAME), model) == (0, 0)
    assert running.promoted(new, NAME, model) == new, "done once"
    down = running.without_replicas(new, NAME, model)
    assert deployment(down, CANARIES[model])["autoscaling_config"]["min_replicas"] == 0

    back = running.put_back(down, NAME, model)
    assert deployment(back, MODELS[model])["user_config"]["uri"] == old
    assert running.put_back(back, NAME, model) == back, "done once"
    assert first == untouched, "what was handed in is left alone"
    for step in (up, trial, new, down, back):
        assert not restarts(first, step)
        for other in step["applications"][0]["deployments"]:
            before = deployment(first, other["name"])
            changed = {key for key in other | before if other.get(key) != before.get(key)}
            assert changed <= ({"user_config", "autoscaling_config"} if "Canary" in other["name"] else {"user_config"})


def test_a_trial_leaves_the_others_alone() -> None:
    both = running.with_shares(config(), NAME, "captioner", 0.5, 0, 5.0)
    both = running.with_shares(both, NAME, "detector", 0.1, 0, 6.0)
    over = running.ingress_of(running.application_of(running.withdrawn(both, NAME, "detector"), NAME))
    assert (over.canary.captioner, over.canary.detector, over.since) == (0.5, 0, {"captioner": 5.0})


def test_a_canary_that_could_not_be_scaled_without_a_restart_is_refused() -> None:
    bare = config()
    del deployment(bare, "TaggerCanary")["autoscaling_config"]
    with pytest.raises(CanaryError, match="no autoscaling_config"):
        running.with_candidate(bare, NAME, "tagger", "x")
    assert restarts(config(), bare), "that is why"


def test_what_is_not_there_is_named() -> None:
    with pytest.raises(CanaryError, match=r"no application 'other'.*deeptrust"):
        running.application_of(config(), "other")
    with pytest.raises(ValueError, match="painter"):
        IngressConfig.model_validate({"since": {"painter": 1.0}})


class Dashboard:
    """Ray's dashboard with a trial of a detector, away as often as it is told to be."""

    def __init__(self, trial: dict[str, Any]) -> None:
        self.config, self.away = trial, 0
        self.puts, self.away_after_put = 0, 3

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if self.away:
            self.away -= 1
            raise httpx.ReadTimeout("away")
        if request.method == "PUT":
            self.config, self.puts = json.loads(request.content), self.puts + 1
            # it has taken the configuration, and is away before anybody sees that it is carried out
            self.away = self.away_after_put
        (application,) = self.config["applications"]
        running_now = {"status": "HEALTHY", "replicas": [{"state": "RUNNING"}]}
        states = {each["name"]: running_now for each in application["deployments"]}
        states[CANARIES["detector"]] = running_now | {"replicas": []}
        told = {"deployed_app_config": application, "status": "RUNNING", "deployments": states}
        return httpx.Response(200, json={"applications": {NAME: told}})


@pytest.mark.parametrize("reason", ["blind", "rules"])
def test_a_watcher_outlives_a_dashboard_that_is_away_while_it_rolls_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], reason: str
) -> None:
    model: ModelName = "detector"
    trial = running.with_shares(running.with_candidate(config(), NAME, model, "/models/new"), NAME, model, 0.2, 0, 1.0)
    dashboard = Dashboard(trial)
    settings = canary.WatchCommand(
        model=model,
        dashboard="http://test",
        interval_s=0.01,
        log=tmp_path / "log.jsonl",
        blind_s=0.001 if reason == "blind" else 600,
    )
    watched = canary.Canary(settings)
    watched.api._http = httpx.Client(base_url="http://test", transport=httpx.MockTransport(dashboard))
    bad = Evidence(Side(codes={"ok": 500}), Side(codes={"failed": 500}), [])

    def evidence(*_: object) -> Evidence:
        if reason == "blind":
            raise StoreUnavailable("away")
        return bad

    monkeypatch.setattr(watched, "evidence", evidence)
    assert canary.Watcher(watched, settings, Rules()).watch() == canary.ROLLED_BACK
    assert running.shares_of(running.application_of(dashboard.config, NAME), model) == (0, 0) and dashboard.puts
    told = capsys.readouterr().out
    assert "rolling back" in told and "not done yet" in told
    assert ("nothing has been known" in told) == (reason == "blind")
    last = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
    assert last["action"] == "roll_back" and last["candidate"]["uri"] == "/models/new"
    assert last["production"]["uri"] == deployment(trial, MODELS[model])["user_config"]["uri"]
    assert last["why"] in told and last["age_s"] > 0


def test_production_that_was_put_back_stays_so_when_the_command_is_run_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model: ModelName = "detector"
    old = deployment(config(), MODELS[model])["user_config"]["uri"]
    trial = running.with_shares(running.with_candidate(config(), NAME, model, "/models/bad"), NAME, model, 0.2, 0, 1.0)
    dashboard = Dashboard(running.without_replicas(running.promoted(trial, NAME, model), NAME, model))
    monkeypatch.setattr(running, "_SETTLE_S", 0.0)
    command = canary.RollbackCommand(model=model, dashboard="http://test", production=True)
    rolled = canary.Canary(command)
    rolled.api._http = httpx.Client(base_url="http://test", transport=httpx.MockTransport(dashboard))
    monkeypatch.setattr(canary, "Canary", lambda _: rolled)

    with pytest.raises(DashboardAway):
        command.run()
    assert deployment(dashboard.config, MODELS[model])["user_config"]["uri"] == old and dashboard.puts == 1
    dashboard.away = 0
    for _ in range(2):
        assert command.run() == 0
        assert f"nothing to put back: Detector serves {old}" in capsys.readouterr().out
    assert deployment(dashboard.config, MODELS[model])["user_config"]["uri"] == old and dashboard.puts == 1

    again = running.promoted(running.with_candidate(dashboard.config, NAME, model, "/models/next"), NAME, model)
    assert running.ingress_of(running.application_of(again, NAME)).before == {model: old}
    dashboard.config = running.without_replicas(again, NAME, model)
    monkeypatch.setattr(dashboard, "away_after_put", 0)
    assert command.run() == 0
    assert f"Detector serves {old} again" in capsys.readouterr().out


def test_commands_for_several_models_at_once_undo_nothing_of_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    dashboard = Dashboard(config())
    monkeypatch.setattr(dashboard, "away_after_put", 0)

    def slow(request: httpx.Request) -> httpx.Response:
        answer = dashboard(request)
        time.sleep(0.05)  # long enough for all of them to have read before the first has deployed
        return answer

    def begin(model: ModelName) -> None:
        api = running.ServeApi("http://test", None)
        api._http = httpx.Client(base_url="http://test", transport=httpx.MockTransport(slow))
        api.change(lambda found: running.with_shares(found, NAME, model, 0.25, 0.0, 1.0))

    models: tuple[ModelName, ...] = ("detector", "captioner", "tagger")
    with ThreadPoolExecutor(len(models)) as commands:
        list(commands.map(begin, models))
    application = running.application_of(dashboard.config, NAME)
    assert [running.shares_of(application, model) for model in models] == [(0.25, 0.0)] * 3
    assert dashboard.puts == 3


@pytest.mark.parametrize("hindrance", ["a command that hangs", "no place for a lock"])
def test_a_change_is_made_though_no_lock_is_to_be_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hindrance: str
) -> None:
    dashboard = Dashboard(config())
    monkeypatch.setattr(dashboard, "away_after_put", 0)
    if hindrance == "no place for a lock":
        (tmp_path / "file").touch()
        monkeypatch.setattr(running, "_LOCKS", tmp_path / "file")
    with running._turn("http://test", 0.1):
        api = running.ServeApi("http://test", None, timeout_s=0.1)
        api._http = httpx.Client(base_url="http://test", transport=httpx.MockTransport(dashboard))
        api.change(lambda found: running.with_shares(found, NAME, "detector", 0.25, 0.0, 1.0))
        other = running.ServeApi("http://other", None, timeout_s=600)  # a dashboard of its own is free
        with running._turn(other.url, 600):
            assert dashboard.puts == 1
