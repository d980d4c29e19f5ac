"""Configuration files are read strictly: what Ray would let pass, or find out late, stops here with the key's name."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from app.config import CANARIES, INGRESS, MODELS, AppArgs, ConfigError, main, read_serve_config

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", ["serve_config.yaml", "serve_config.cpu.yaml"])
def test_the_shipped_configurations_are_valid_and_name_every_deployment(name: str) -> None:
    config = read_serve_config(ROOT / name)
    names = {deployment["name"] for deployment in config["applications"][0]["deployments"]}
    models = {"Detector", "DetectorCanary", "Captioner", "CaptionerCanary", "Tagger", "TaggerCanary"}
    assert models | {"Ingress", "Drift"} == names
    assert config["http_options"]["host"] == "127.0.0.1"


def test_how_many_replicas_there_may_be_is_changed_without_a_restart() -> None:
    from ray.serve._private.deploy_utils import get_app_code_version
    from ray.serve.schema import ServeApplicationSchema

    config = read_serve_config(ROOT / "serve_config.yaml")
    (graph,) = config["applications"]

    def version() -> str:
        return get_app_code_version(ServeApplicationSchema.model_validate(graph))

    before = version()
    for name in (INGRESS, *MODELS.values(), *CANARIES.values()):
        _deployment(config, name)["autoscaling_config"]["max_replicas"] += 1
    assert version() == before
    graph["args"]["store"]["max_deferred"] = 7
    assert version() != before, "the runbook says so"


def _with(tmp_path: Path, change) -> Path:
    config = yaml.safe_load((ROOT / "serve_config.cpu.yaml").read_text())
    change(config)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def _deployment(config: dict, name: str) -> dict:
    return next(item for item in config["applications"][0]["deployments"] if item["name"] == name)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda c: c.update(proxy="x"), "unknown key 'proxy'"),
        (lambda c: _deployment(c, "Detector").update(num_replica=2), "unknown key 'num_replica'"),
        (lambda c: _deployment(c, "Detector")["autoscaling_config"].update(maximum=2), "unknown key 'maximum'"),
        (lambda c: _deployment(c, "Detector")["ray_actor_options"].update(num_gpu=1), "unknown key 'num_gpu'"),
        (lambda c: _deployment(c, "Detector")["user_config"].update(url="x"), "user_config: url"),
        (lambda c: _deployment(c, "Ingress").update(user_config={"canary": {"detector": 2}}), "canary.detector"),
        (lambda c: _deployment(c, "Detector").update(name="Detektor"), "no deployment 'Detektor'"),
        (lambda c: c["applications"][0]["args"]["limits"].update(max_in_flight=0), "limits.max_in_flight"),
        (lambda c: c["applications"][0]["args"]["limits"].update(hosts=["a.example:443"]), r"limits\.hosts\.0"),
        (lambda c: c["applications"][0]["args"]["limits"].update(hosts=["https://a.example"]), r"limits\.hosts\.0"),
        (lambda c: c["applications"][0]["args"].update(detector={}), "args: detector"),
        (lambda c: c.pop("applications"), "applications"),
    ],
)
def test_a_mistake_is_named(tmp_path: Path, change, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        read_serve_config(_with(tmp_path, change))


def _mappings(node: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Where mappings lie in a document."""
    if isinstance(node, dict):
        yield path
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, child in children:
        yield from _mappings(child, (*path, key))


@pytest.mark.parametrize("name", ["serve_config.yaml", "serve_config.cpu.yaml"])
def test_an_unknown_key_anywhere_is_named(tmp_path: Path, name: str) -> None:
    document = yaml.safe_load((ROOT / name).read_text())
    free = {"env_vars", "label_selector"}  # whose names are anybody's
    places = [path for path in _mappings(document) if not free & set(path)]
    assert len(places) > 25
    for path in places:
        changed = copy.deepcopy(document)
        target = changed
        for key in path:
            target = target[key]
        target["surprise"] = 1
        file = tmp_path / "config.yaml"
        file.write_text(yaml.safe_dump(changed))
        with pytest.raises(ConfigError, match="surprise"):
            read_serve_config(file)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda c: c.update(http_options=[8000]), "http_options: 0: expected a mapping"),
        (lambda c: c.update(applications=["deeptrust"]), "applications: 0: expected a mapping"),
        (lambda c: c.update(applications={"deeptrust": {}}), "applications: "),
        (lambda c: _deployment(c, "Detector").update(ray_actor_options="cpu"), "ray_actor_options: expected a mapping"),
        (lambda c: _deployment(c, "Detector").update(user_config="detector"), "user_config: "),
        (lambda c: _deployment(c, "Detector")["autoscaling_config"].update(max_replicas=0), "max_replicas"),
        (lambda c: _deployment(c, "Detector").update(backpressure_config={"retry": 1}), "unknown key 'retry'"),
    ],
)
def test_a_part_of_another_kind_is_named(tmp_path: Path, change, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        read_serve_config(_with(tmp_path, change))


def test_the_names_of_a_proxy_in_front_are_taken_as_the_shipped_comment_has_them(tmp_path: Path) -> None:
    text = (ROOT / "serve_config.yaml").read_text()
    path = tmp_path / "config.yaml"
    for shipped, hosts in ((text, ()), (text.replace("# hosts: [", "hosts: ["), ("photos.example.com",))):
        path.write_text(shipped)
        args = AppArgs.model_validate(read_serve_config(path)["applications"][0]["args"])
        assert args.limits.hosts == hosts


def test_an_empty_part_is_as_good_as_none(tmp_path: Path) -> None:
    config = read_serve_config(_with(tmp_path, lambda c: c.update(http_options=None, logging_config=None)))
    assert config["applications"]


def test_a_file_is_checked_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(ROOT / "serve_config.yaml")])
    assert "serve_config.yaml is valid" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="unknown key 'num_replica'"):
        main([str(_with(tmp_path, lambda c: _deployment(c, "Drift").update(num_replica=2)))])


def test_port_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PORT", "8456")
    assert read_serve_config(ROOT / "serve_config.cpu.yaml")["http_options"]["port"] == 8456
    monkeypatch.setenv("PORT", "http")
    with pytest.raises(ConfigError, match="PORT='http'"):
        read_serve_config(ROOT / "serve_config.cpu.yaml")


def test_beyond_loopback_it_refuses_to_start(tmp_path: Path) -> None:
    from app.serve import ServeSettings, StartError, prepare

    path = _with(tmp_path, lambda c: c["http_options"].update(host="0.0.0.0"))
    with pytest.raises(StartError, match="loopback"):
        prepare(ServeSettings(config=path))


@pytest.mark.parametrize(
    ("uri", "complaint"),
    [
        ("/nowhere/detector", r"no such checkpoint: '/nowhere/detector'\. Expected a folder that exists, starter:NAME"),
        ("starter:painter", r"no starter model 'painter'; there are detector, captioner, tagger"),
    ],
)
def test_a_model_that_is_missing_stops_the_start_and_says_which(tmp_path: Path, uri: str, complaint: str) -> None:
    from app.serve import ServeSettings, StartError, prepare

    path = _with(tmp_path, lambda c: _deployment(c, "Captioner")["user_config"].update(uri=uri))
    with pytest.raises(StartError, match=complaint):
        prepare(ServeSettings(config=path))
