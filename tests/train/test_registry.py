"""The registry: what may be promoted, what is refused and why, and the way back."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import save_file

from deployments.checkpoints import resolve
from train import registry, tracking
from train.gate import Judgement
from train.registry import RegistryError, promote, rollback
from train.retrain import revision_in_production
from train.tracking import TrackingConfig

if TYPE_CHECKING:
    from mlflow import MlflowClient

RULES = """
detector: [{figure: quality, at_least: 0.5, why: must be good}]
captioner: [{figure: quality, at_least: 0.5, why: must be good}]
"""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrackingConfig]:
    folder = tmp_path_factory.mktemp("mlflow")
    uri = f"sqlite:///{folder}/mlflow.db"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", uri)
        patch.setenv("DEEPTRUST_CACHE", str(folder / "cache"))
        yield TrackingConfig(uri=uri, system_metrics_s=0)


@pytest.fixture
def client(store: TrackingConfig) -> MlflowClient:
    client = tracking.connect(store)
    for model in registry.TASKS:
        if registry.aliases_of(client, model):
            client.delete_registered_model(model)
    return client


@pytest.fixture
def rules(tmp_path: Path) -> Path:
    (tmp_path / "gate.yaml").write_text(RULES)
    return tmp_path / "gate.yaml"


def detector(folder: Path) -> Path:
    """A checkpoint folder whose files say its name."""
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "card.json").write_text(json.dumps({"task": "detection", "labels": ["human", "ai"]}))
    save_file({"weight": torch.tensor(list(folder.name.encode()))}, folder / "model.safetensors")
    return folder


def add(store: TrackingConfig, folder: Path, quality: float | None, revision: str | None = None, **part: object) -> str:
    """Another detector in the registry, evaluated (``evaluated``) unless ``quality`` is None; its number."""
    with tracking.run(store, "detector", folder.name) as run:
        version = registry.register(run, "detector", detector(folder))
    if quality is not None:
        evaluated(store, str(version.version), quality=quality, revision=revision, **part)
    return str(version.version)


def evaluated(store: TrackingConfig, number: str, revision: str | None = None, **part: object) -> None:
    """A report of a version as ``train.evaluate`` ties it on: beside what is in production now, unless told."""
    with tracking.run(store, "evaluation", number) as run:
        version = registry.find_version(run.client, "detector", number)
        report: dict[str, object] = {
            "kind": "detector",
            "quality": 0.9,
            "model": {"revision": revision or version.tags[registry.REVISION_TAG]},
        }
        if (production := registry.aliases_of(run.client, "detector").get("production")) is not None:
            theirs = registry.find_version(run.client, "detector", production).tags[registry.REVISION_TAG]
            report["comparison"] = {"with": f"models:/detector@production#{theirs}"}
        report |= part
        run.text(registry.REPORT, json.dumps(report))
        registry.record_evaluation(run.client, version, run.run_id, Judgement(passed=True, checks=[]))


def test_a_registered_model_is_a_checkpoint_uri(store: TrackingConfig, client: MlflowClient, tmp_path: Path) -> None:
    number = add(store, tmp_path / "first", None)
    by_alias, by_number = resolve("models:/detector@candidate"), resolve(f"models:/detector/{number}")
    assert by_alias.revision == by_number.revision == resolve(str(tmp_path / "first")).revision
    second = add(store, tmp_path / "second", None)
    assert registry.aliases_of(client, "detector") == {"candidate": second}
    assert resolve("models:/detector@candidate").revision == resolve(str(tmp_path / "second")).revision


def test_a_run_that_goes_on_registers_a_checkpoint_once(
    store: TrackingConfig, client: MlflowClient, tmp_path: Path
) -> None:
    first, second = (detector(tmp_path / name) for name in ("first", "second"))
    with tracking.run(store, "detector", "killed") as run:
        # killed before its caller could note it, and gone on with; then with another best
        numbers = [str(registry.register(run, "detector", folder).version) for folder in (first, first, second)]
        assert numbers == ["1", "1", "2"] and registry.aliases_of(client, "detector") == {"candidate": "2"}
        assert str(registry.register(run, "detector", first).version) == "1"
        assert registry.aliases_of(client, "detector") == {"candidate": "1"}
    for number, folder in (("1", first), ("2", second)):
        assert resolve(f"models:/detector/{number}").revision == resolve(str(folder)).revision
    with tracking.run(store, "detector", "another") as run:
        assert str(registry.register(run, "detector", first).version) == "3"


def test_only_what_passed_the_gate_is_promoted(
    store: TrackingConfig, client: MlflowClient, tmp_path: Path, rules: Path
) -> None:
    add(store, tmp_path / "unknown", None)
    with pytest.raises(RegistryError, match="has not been evaluated"):
        promote(client, "detector", "candidate", "production", rules)
    add(store, tmp_path / "bad", 0.4)
    with pytest.raises(RegistryError, match=r"(?s)does not pass the gate.*quality >= 0.5: 0.4 \(must be good\)"):
        promote(client, "detector", "candidate", "staging", rules)
    add(store, tmp_path / "other", 0.9, revision="000000000000")
    with pytest.raises(RegistryError, match="report is about 000000000000"):
        promote(client, "detector", "candidate", "production", rules)
    assert "production" not in registry.aliases_of(client, "detector")
    good = add(store, tmp_path / "good", 0.9)
    version, before = promote(client, "detector", "candidate", "production", rules)
    assert (str(version.version), before) == (good, None)
    assert registry.aliases_of(client, "detector")["production"] == good


def test_the_gate_of_today_counts(store: TrackingConfig, client: MlflowClient, tmp_path: Path, rules: Path) -> None:
    add(store, tmp_path / "a", 0.6)
    rules.write_text(RULES.replace("0.5", "0.7"))
    with pytest.raises(RegistryError, match=r"quality >= 0\.7"):
        promote(client, "detector", "candidate", "production", rules)


def test_the_way_back(store: TrackingConfig, client: MlflowClient, tmp_path: Path, rules: Path) -> None:
    with pytest.raises(RegistryError, match="nothing in production"):
        rollback(client, "detector")
    assert revision_in_production(client) is None
    numbers = []
    for name in "abc":
        numbers.append(add(store, tmp_path / name, 0.9))
        promote(client, "detector", numbers[-1], "production", rules)
    promote(client, "detector", numbers[-1], "production", rules)  # again: changes nothing
    assert rollback(client, "detector") == (numbers[1], numbers[2])
    promote(client, "detector", numbers[2], "production", rules)
    assert rollback(client, "detector") == (numbers[1], numbers[2])
    assert rollback(client, "detector") == (numbers[0], numbers[1])
    with pytest.raises(RegistryError, match="first version"):
        rollback(client, "detector")
    assert registry.aliases_of(client, "detector")["production"] == numbers[0]
    # as the application's metrics name it, and so alerts
    assert revision_in_production(client) == resolve("models:/detector@production").revision


def test_promotion_wants_a_comparison_with_what_is_in_production_now(
    store: TrackingConfig, client: MlflowClient, tmp_path: Path, rules: Path
) -> None:
    first = add(store, tmp_path / "first", 0.9)
    promote(client, "detector", first, "production", rules)  # nothing to be compared with
    alone = add(store, tmp_path / "alone", 0.9, comparison={})
    command = rf"train\.evaluate detector --checkpoint models:/detector/{alone} --data"
    for stage in ("staging", "production"):
        with pytest.raises(
            RegistryError, match=rf"no other model, and detector {first} .* in production now.*{command}"
        ):
            promote(client, "detector", alone, stage, rules)
    evaluated(store, alone)
    second, third = (add(store, tmp_path / name, 0.9) for name in ("second", "third"))
    promote(client, "detector", third, "staging", rules)
    promote(client, "detector", third, "production", rules)
    promote(client, "detector", third, "canary", rules)  # what is in production needs no comparison with itself
    for number in (alone, second):
        with pytest.raises(
            RegistryError, match=rf"compared with models:/detector@production#\w+, and detector {third}"
        ):
            promote(client, "detector", number, "production", rules)
    assert "may not be promoted: was compared with" in registry.describe(client, "detector", second, rules)
    evaluated(store, second)
    promote(client, "detector", second, "production", rules)
    assert rollback(client, "detector") == (third, second)
    assert rollback(client, "detector") == (first, third)
    promote(client, "detector", alone, "production", rules)  # it was compared with just this one


def test_a_report_of_a_part_of_the_pictures_promotes_nothing(
    store: TrackingConfig, client: MlflowClient, tmp_path: Path, rules: Path
) -> None:
    number = add(store, tmp_path / "first", 0.9, settings={"limit": 10})
    with pytest.raises(RegistryError, match=r"10 test pictures only \(--limit\); run .*--data .* on all of them"):
        promote(client, "detector", number, "staging", rules)
    evaluated(store, number, settings={"limit": None})
    promote(client, "detector", number, "production", rules)


def test_the_way_back_passes_over_versions_that_are_gone(
    store: TrackingConfig, client: MlflowClient, tmp_path: Path, rules: Path
) -> None:
    numbers = [add(store, tmp_path / name, 0.9) for name in "abc"]
    for number in numbers:
        promote(client, "detector", number, "canary", rules)
    client.delete_model_version("detector", numbers[1])
    assert rollback(client, "detector", "canary") == (numbers[0], numbers[2])


def test_the_way_back_passes_over_versions_whose_files_are_gone(
    store: TrackingConfig,
    client: MlflowClient,
    tmp_path: Path,
    rules: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    numbers = [add(store, tmp_path / name, 0.9) for name in "abc"]
    for number in numbers:
        promote(client, "detector", number, "canary", rules)
    monkeypatch.setenv("DEEPTRUST_CACHE", str(tmp_path / "cache"))  # what was fetched once can be served still

    def files_of(number: str) -> Path:
        return Path(str(registry.find_version(client, "detector", number).source).removeprefix("file://"))

    shutil.rmtree(files_of(numbers[1]))
    (files_of(numbers[0]) / "card.json").write_text('{"task": "detection", "labels": ["ai", "human"]}')
    with pytest.raises(RegistryError, match=r"stays in canary: .* nothing can be served \(2, 1\)"):
        rollback(client, "detector", "canary")
    assert registry.aliases_of(client, "detector")["canary"] == numbers[2]
    told = capsys.readouterr().err
    assert "detector 2 is passed over: " in told and f"{resolve(str(tmp_path / 'a')).revision} was registered" in told
    shutil.copytree(tmp_path / "a", files_of(numbers[0]), dirs_exist_ok=True)
    monkeypatch.setenv("DEEPTRUST_CACHE", str(tmp_path / "other cache"))
    assert rollback(client, "detector", "canary") == (numbers[0], numbers[2])


def test_a_checkpoint_of_another_kind_is_refused(store: TrackingConfig, client: MlflowClient, tmp_path: Path) -> None:
    folder = tmp_path / "captioner"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "card.json").write_text('{"task": "captioning"}')
    save_file({"weight": torch.ones(1)}, folder / "model.safetensors")
    with tracking.run(store, "detector", "x") as run, pytest.raises(RegistryError, match="captioning"):
        registry.register(run, "detector", folder)
    assert registry.aliases_of(client, "detector") == {}


def test_the_commands(
    store: TrackingConfig, client: MlflowClient, tmp_path: Path, rules: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(*arguments: str) -> str:
        registry.main([*arguments])
        return capsys.readouterr().out

    assert "no versions yet" in said("list")
    number = add(store, tmp_path / "a", 0.9)
    said("register", "detector", "--checkpoint", str(tmp_path / "a"))
    assert f"detector {number} is in staging now" in said(
        "promote", "detector", "--version", number, "--to", "staging", "--rules", str(rules)
    )
    listed = said("list").splitlines()
    assert len(listed) == 3 and "candidate" in listed[1] and "staging" in listed[2]
    assert "ok     quality >= 0.5: 0.9" in said("show", "detector", "--version", "staging", "--rules", str(rules))
    for command, complaint in (
        (["promote", "detector", "--to", "canary"], "has not been evaluated"),
        (["rollback", "detector"], "nothing in production"),
        (["show", "detector", "--version", "77"], "no version '77'"),
        (["register", "captioner", "--checkpoint", str(tmp_path / "a")], "detection"),
        (["register", "detector", "--checkpoint", "nothing"], "no such checkpoint"),
    ):
        with pytest.raises(SystemExit, match=complaint):
            registry.main(command)
