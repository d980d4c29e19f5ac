"""The running configuration is changed where a replica takes note of it in place, and nowhere else."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Iterator
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
from app.canary_rules import Decision, Rules
from app.config import CANARIES, MODELS, IngressConfig, ModelName
from app.store.database import StoreUnavailable
from app.trials import Evidence, Side
from deployments.checkpoints import Card, Checkpoint, CheckpointError

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

    new = running.promoted(trial, NAME, model, old)
    assert deployment(new, MODELS[model])["user_config"]["uri"] == "models:/x/7"
    assert running.shares_of(running.application_of(new, NAME), model) == (0, 0)
    assert running.promoted(new, NAME, model, "models:/x/7") == new, "done once"
    down = running.without_replicas(new, NAME, model)
    assert deployment(down, CANARIES[model])["autoscaling_config"]["min_replicas"] == 0

    back = running.put_back(down, NAME, model)
    assert deployment(back, MODELS[model])["user_config"]["uri"] == old
    assert running.put_back(back, NAME, model) == back, "done once"
    assert first == untouched, "what was handed in is left alone"
    other_one = running.serving(new, NAME, model, "models:/x/5")
    assert deployment(other_one, MODELS[model])["user_config"]["uri"] == "models:/x/5"
    assert running.put_back(other_one, NAME, model) == other_one, "not what was before the promotion"
    assert running.serving(new, NAME, model, "models:/x/7") is new

    for step in (up, trial, new, down, back, other_one):
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
    """Ray's dashboard with a trial of a detector, away as often as it is told to be; and the application, whose
    detector refuses what cannot be loaded.
    """

    def __init__(self, trial: dict[str, Any]) -> None:
        self.config, self.away = trial, 0
        self.puts, self.away_after_put = 0, 3
        self.unsound: set[str] = set()
        self.key, self.is_operator, self.late = "", True, 0
        self.asked: list[httpx.Request] = []
        self._serves, self._refused = self._told(), ""

    def _told(self) -> str:
        return str(deployment(self.config, "Detector")["user_config"]["uri"])

    def _take(self) -> None:
        """As the detector's replica does, whenever its text has changed."""
        if (uri := self._told()) in self.unsound:
            self._refused = uri
        else:
            self._serves, self._refused = uri, ""

    def _models(self, request: httpx.Request) -> httpx.Response:
        self.asked.append(request)
        if self.key and request.headers.get("authorization") != f"Bearer {self.key}":
            return httpx.Response(401, json={"code": "unauthorized"})
        if self.late:
            self.late -= 1
            return httpx.Response(200, json={"detector": {"status": "ready", "uri": "from before"}})
        entry: dict[str, Any] = {"status": "ready", "uri": self._serves}
        if self._refused:
            why = {"why": "OSError: no such file"} if self.is_operator else {}
            entry["refused"] = {"uri": self._refused} | why
        return httpx.Response(200, json={"detector": entry})

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.url.path.endswith("/v1/models"):
            return self._models(request)
        if self.away:
            self.away -= 1
            raise httpx.ReadTimeout("away")
        if request.method == "PUT":
            told, self.config, self.puts = self._told(), json.loads(request.content), self.puts + 1
            if self._told() != told:
                self._take()
            # it has taken the configuration, and is away before anybody sees that it is carried out
            self.away = self.away_after_put
        (application,) = self.config["applications"]
        running_now = {"status": "HEALTHY", "replicas": [{"state": "RUNNING"}]}
        states = {each["name"]: running_now for each in application["deployments"]}
        states[CANARIES["detector"]] = running_now | {"replicas": []}
        told_of_it = {"deployed_app_config": application, "status": "RUNNING", "deployments": states}
        http = {"http_options": self.config.get("http_options")}
        return httpx.Response(200, json=http | {"applications": {NAME: told_of_it}})


def asked(dashboard: Dashboard, settings: canary.CanarySettings, monkeypatch: pytest.MonkeyPatch) -> canary.Canary:
    """What every command works with from here on, at that dashboard."""
    found = canary.Canary(settings)
    found.api._http = httpx.Client(base_url="http://test", transport=httpx.MockTransport(dashboard))
    monkeypatch.setattr(canary, "Canary", lambda _: found)
    monkeypatch.setattr(running, "_SETTLE_S", 0.0)
    monkeypatch.setattr(running, "_SAYS_S", 0.0)
    monkeypatch.delenv(running.KEY_VARIABLE, raising=False)
    return found


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
    dashboard = Dashboard(running.without_replicas(running.promoted(trial, NAME, model, old), NAME, model))
    command = canary.RollbackCommand(model=model, dashboard="http://test", production=True)
    asked(dashboard, command, monkeypatch)

    with pytest.raises(DashboardAway):
        command.run()
    assert deployment(dashboard.config, MODELS[model])["user_config"]["uri"] == old and dashboard.puts == 1
    dashboard.away = 0
    for _ in range(2):
        with pytest.raises(CanaryError, match=f"nothing to put back, and Detector serves {old}"):
            command.run()
    assert deployment(dashboard.config, MODELS[model])["user_config"]["uri"] == old and dashboard.puts == 1

    again = running.promoted(running.with_candidate(dashboard.config, NAME, model, "/models/next"), NAME, model, old)
    assert running.ingress_of(running.application_of(again, NAME)).before == {model: old}
    dashboard.config = running.without_replicas(again, NAME, model)
    monkeypatch.setattr(dashboard, "away_after_put", 0)
    assert command.run() == 0
    assert f"Detector serves {old} again" in capsys.readouterr().out


def registry(monkeypatch: pytest.MonkeyPatch, production: str) -> dict[str, str]:
    """A registry of detectors and captioners: alias -> version."""
    aliases = {"production": production}

    def pinned(uri: str) -> str:
        name, _, alias = uri.partition("@")
        return f"{name}/{aliases[alias]}" if alias else uri

    monkeypatch.setattr(canary, "pinned", pinned)
    cards = {True: Card(task="detection"), False: Card(task="captioning")}
    monkeypatch.setattr(canary, "resolve", lambda uri: Checkpoint(uri, Path("/models"), uri, cards["detector" in uri]))
    return aliases


def test_a_promotion_of_what_has_an_alias_is_rolled_back_to_the_version_that_had_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model: ModelName = "detector"
    aliases = registry(monkeypatch, "1")
    first = config("serve_config.yaml")
    trial = running.with_shares(
        running.with_candidate(first, NAME, model, "models:/detector/2"), NAME, model, 0.2, 0, 1
    )
    dashboard = Dashboard(running.without_replicas(trial, NAME, model))
    dashboard.away_after_put = 0
    promote = canary.PromoteCommand(model=model, dashboard="http://test")
    asked(dashboard, promote, monkeypatch)
    assert promote.run() == 0
    aliases["production"] = "2"

    back = canary.RollbackCommand(model=model, dashboard="http://test", production=True)
    assert back.run() == 0
    assert "Detector serves models:/detector/1 again" in capsys.readouterr().out
    assert deployment(dashboard.config, "Detector")["user_config"]["uri"] == "models:/detector/1"


def test_where_a_deployment_has_forgotten_what_was_before_it_is_said_how_production_goes_back(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model: ModelName = "detector"
    aliases = registry(monkeypatch, "2")
    dashboard = Dashboard(config("serve_config.yaml"))
    dashboard.away_after_put = 0
    back = canary.RollbackCommand(model=model, dashboard="http://test", production=True)
    asked(dashboard, back, monkeypatch)
    with pytest.raises(SystemExit, match=r"registry rollback detector .*app\.canary serve detector`$"):
        canary.main(["rollback", "detector", "--production"])
    assert deployment(dashboard.config, "Detector")["user_config"]["uri"] == "models:/detector@production"

    aliases["production"], before = "1", dashboard.puts
    for said in ("serves models:/detector/1 now", "serves models:/detector/1 already"):
        with pytest.raises(SystemExit) as ended:
            canary.main(["serve", "detector"])
        assert ended.value.code == 0 and said in capsys.readouterr().out
    assert deployment(dashboard.config, "Detector")["user_config"]["uri"] == "models:/detector/1"
    assert dashboard.puts == before + 1
    with pytest.raises(SystemExit, match="for captioning, and no detector"):
        canary.main(["serve", "detector", "--uri", "models:/captioner/1"])


def test_a_watcher_waits_for_a_registry_that_is_away_when_it_promotes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model: ModelName = "detector"
    trial = running.with_candidate(config("serve_config.yaml"), NAME, model, "models:/detector/2")
    dashboard = Dashboard(running.with_shares(trial, NAME, model, 0.2, 0, 1.0))
    dashboard.away_after_put = 0
    settings = canary.WatchCommand(model=model, dashboard="http://test", interval_s=0.01, log=tmp_path / "log.jsonl")
    watched = asked(dashboard, settings, monkeypatch)
    answers: Iterator[str | CheckpointError] = iter([CheckpointError("cannot look up"), "models:/detector/1"])

    def pinned(_: str) -> str:
        answer = next(answers)
        if isinstance(answer, CheckpointError):
            raise answer
        return answer

    monkeypatch.setattr(canary, "pinned", pinned)
    monkeypatch.setattr(watched, "evidence", lambda *_: Evidence())
    fit = Decision(action="promote", why="fit", age_s=1.0, answers=1, findings=[])
    monkeypatch.setattr(canary, "decide", lambda *_: fit)
    assert canary.Watcher(watched, settings, Rules()).watch() == canary.PROMOTED
    assert "not done yet: cannot look up" in capsys.readouterr().out
    assert running.ingress_of(running.application_of(dashboard.config, NAME)).before == {model: "models:/detector/1"}


def tried(uri: str, first: dict[str, Any] | None = None) -> Dashboard:
    """With a trial of a detector that is in the canary well."""
    trial = running.with_candidate(first or config("serve_config.yaml"), NAME, "detector", uri)
    dashboard = Dashboard(running.with_shares(trial, NAME, "detector", 0.2, 0, 1.0))
    dashboard.away_after_put = 0
    return dashboard


def after_trial(dashboard: Dashboard) -> tuple[str, dict[ModelName, str], int]:
    """What the detector is told, what could be put back, and how many replicas the canary keeps without pictures."""
    application = running.application_of(dashboard.config, NAME)
    assert running.shares_of(application, "detector") == (0, 0)
    replicas = deployment(dashboard.config, "DetectorCanary")["autoscaling_config"]["min_replicas"]
    return running.uri_of(application, "Detector"), running.ingress_of(application).before, replicas


def test_a_promotion_that_production_refuses_fails_and_leaves_what_was_there(monkeypatch: pytest.MonkeyPatch) -> None:
    registry(monkeypatch, "1")
    first = config("serve_config.yaml")
    deployment(first, "Ingress")["user_config"]["before"] = {"detector": "models:/detector/0"}
    dashboard = tried("models:/detector/2", first)
    dashboard.unsound = {"models:/detector/2"}
    asked(dashboard, canary.PromoteCommand(model="detector", dashboard="http://test"), monkeypatch)
    refused = "^error: models:/detector/2 is refused, and Detector goes on with models:/detector@production: OSError"
    with pytest.raises(SystemExit, match=refused):
        canary.main(["promote", "detector"])
    assert after_trial(dashboard) == ("models:/detector@production", {"detector": "models:/detector/0"}, 0)
    assert dashboard._refused == "", "the replica has its old text"


def test_production_that_refuses_what_is_put_back_can_be_put_back_later(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    registry(monkeypatch, "1")
    dashboard = tried("models:/detector/2")
    asked(dashboard, canary.PromoteCommand(model="detector", dashboard="http://test"), monkeypatch)
    with pytest.raises(SystemExit, match="0"):
        canary.main(["promote", "detector"])
    dashboard.unsound, dashboard.is_operator = {"models:/detector/1"}, False
    with pytest.raises(SystemExit, match="/1 is refused, and Detector goes on with models:/detector/2: its log"):
        canary.main(["rollback", "detector", "--production"])
    assert after_trial(dashboard) == ("models:/detector/2", {"detector": "models:/detector/1"}, 0)

    dashboard.unsound = set()
    with pytest.raises(SystemExit, match="0"):
        canary.main(["rollback", "detector", "--production"])
    assert "Detector serves models:/detector/1 again" in capsys.readouterr().out
    assert after_trial(dashboard) == ("models:/detector/1", {}, 0)


def test_a_checkpoint_that_production_refuses_to_serve_stays_in_no_configuration(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    registry(monkeypatch, "2")
    dashboard = Dashboard(config("serve_config.yaml"))
    dashboard.away_after_put, dashboard.unsound = 0, {"models:/detector/2"}
    asked(dashboard, canary.ServeCommand(model="detector", dashboard="http://test"), monkeypatch)
    for _ in range(2):
        with pytest.raises(SystemExit, match="models:/detector/2 is refused"):
            canary.main(["serve", "detector"])
        assert after_trial(dashboard)[0] == "models:/detector@production"

    # somebody else has deployed it: what the replicas go on with has no name here
    deployment(dashboard.config, "Detector")["user_config"]["uri"] = "models:/detector/2"
    dashboard._take()
    before = dashboard.puts
    with pytest.raises(SystemExit, match="goes on with models:/detector@production"):
        canary.main(["serve", "detector"])
    assert dashboard.puts == before


def test_what_others_deploy_meanwhile_outlives_a_refusal() -> None:
    first = running.application_of(config("serve_config.yaml"), NAME)
    told = running.serving(config("serve_config.yaml"), NAME, "detector", "models:/detector/3")
    assert running.restored(told, NAME, "detector", "models:/detector/2", first) is told
    assert running.restored(told, NAME, "detector", "models:/detector/3", running.application_of(told, NAME)) is told
    back = running.restored(told, NAME, "detector", "models:/detector/3", first)
    assert deployment(back, "Detector")["user_config"]["uri"] == "models:/detector@production"
    assert not restarts(told, back)


def test_a_promotion_that_is_told_again_is_put_back_too(monkeypatch: pytest.MonkeyPatch) -> None:
    registry(monkeypatch, "1")
    dashboard = tried("models:/detector/2")
    dashboard.key, dashboard.unsound = "dt_key", {"models:/detector/2"}
    asked(dashboard, canary.PromoteCommand(model="detector", dashboard="http://test"), monkeypatch)
    for said in ("is not known", "is refused"):
        with pytest.raises(SystemExit, match=said):
            canary.main(["promote", "detector"])
        monkeypatch.setenv(running.KEY_VARIABLE, "dt_key")
    assert after_trial(dashboard) == ("models:/detector/1", {}, 0) and dashboard._refused == ""


@pytest.mark.parametrize("is_killed", [False, True])
def test_a_watcher_does_not_call_a_candidate_promoted_that_production_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], is_killed: bool
) -> None:
    registry(monkeypatch, "1")
    dashboard = tried("models:/detector/2")
    dashboard.unsound = {"models:/detector/2"}
    settings = canary.WatchCommand(
        model="detector", dashboard="http://test", interval_s=0.01, log=tmp_path / "log.jsonl", uri="models:/detector/2"
    )
    watched = asked(dashboard, settings, monkeypatch)
    monkeypatch.setattr(watched, "evidence", lambda *_: Evidence())
    fit = Decision(action="promote", why="fit", age_s=1.0, answers=1, findings=[])
    monkeypatch.setattr(canary, "decide", lambda *_: fit)
    if is_killed:  # the one before, when it had told production
        watched.api.change(lambda found: running.promoted(found, NAME, "detector", "models:/detector/1"))
    assert canary.Watcher(watched, settings, Rules()).watch() == canary.ROLLED_BACK
    told = capsys.readouterr().out
    assert "not promoted: models:/detector/2 is refused, and Detector goes on with" in told and "promoted;" not in told
    old = "models:/detector/1" if is_killed else "models:/detector@production"
    assert after_trial(dashboard) == (old, {}, 0) and dashboard._refused == ""


def test_whether_production_serves_it_is_asked_with_a_key_until_it_must_be_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    registry(monkeypatch, "1")
    first = config("serve_config.yaml")
    first["http_options"]["port"] = 8123
    first["applications"][0]["route_prefix"] = "/pictures"
    dashboard = tried("models:/detector/2", first)
    dashboard.key, dashboard.late = "dt_key", 3
    command = canary.PromoteCommand(model="detector", dashboard="http://test")
    found = asked(dashboard, command, monkeypatch)
    found.api._http.headers["Authorization"] = "Bearer of-ray"
    monkeypatch.setattr(running, "_SAYS_AGAIN_S", 0.0)
    with pytest.raises(CanaryError, match=r"told to serve models:/detector/2, and .* not known \(HTTP 401, DEEPTRUST"):
        command.run()
    assert after_trial(dashboard) == ("models:/detector/2", {"detector": "models:/detector/1"}, 0), "it may serve it"

    monkeypatch.setenv(running.KEY_VARIABLE, "dt_key")
    with pytest.raises(CanaryError, match=r"\(it says from before\): see http://test:8123/pictures/v1/models$"):
        command.run()
    monkeypatch.setattr(running, "_SAYS_S", 60.0)
    assert command.run() == 0 and "Detector serves models:/detector/2 now" in capsys.readouterr().out
    assert dashboard.late == 0, "it was asked until it could not be from before"
    assert {str(each.url) for each in dashboard.asked} == {"http://test:8123/pictures/v1/models"}
    assert "authorization" not in dashboard.asked[0].headers, "Ray's token is the dashboard's"


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
