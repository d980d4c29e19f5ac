"""`make monitoring`: what Prometheus is started with, and what is said when it cannot be."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from app import cluster
from app.monitoring import MonitoringError, MonitoringSettings, command, main
from tests.monitoring.expressions import MONITORING

PORT = 8993


@pytest.fixture
def discovery(tmp_path: Path) -> Path:
    file = tmp_path / "discovery.json"
    file.write_text('[{"labels": {"job": "ray"}, "targets": ["127.0.0.1:1"]}]')
    return file


def test_without_an_application_it_says_what_to_start_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    with pytest.raises(MonitoringError, match="make serve"):
        command(MonitoringSettings(), PORT)
    monkeypatch.setenv("PORT", str(PORT))
    with pytest.raises(SystemExit, match="make serve"):
        main([])


def test_without_prometheus_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(MonitoringError, match="apt-get install prometheus"):
        command(MonitoringSettings(), PORT)


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool: apt-get install prometheus")
def test_prometheus_takes_the_configuration_and_keeps_to_loopback(discovery: Path, tmp_path: Path) -> None:
    line = command(MonitoringSettings(discovery=discovery, data=tmp_path / "data"), PORT)
    file = next(part for part in line if part.startswith("--config.file=")).split("=", 1)[1]
    checked = subprocess.run(["promtool", "check", "config", file], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    groups = yaml.safe_load((MONITORING / "alerts.yaml").read_text())["groups"]
    assert f"{sum(len(group['rules']) for group in groups)} rules" in checked.stdout
    assert any(part.startswith("--web.listen-address=127.0.0.1:") for part in line)


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool: apt-get install prometheus")
def test_an_alertmanager_is_told_of_alerts(discovery: Path, tmp_path: Path) -> None:
    settings = MonitoringSettings(discovery=discovery, data=tmp_path, alertmanager="alerts.example:9093")
    command(settings, PORT)
    file = tmp_path / "prometheus.yml"
    told = yaml.safe_load(file.read_text())["alerting"]["alertmanagers"]
    assert told == [{"static_configs": [{"targets": ["alerts.example:9093"]}]}]
    checked = subprocess.run(["promtool", "check", "config", file], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.mark.parametrize("address", ["alerts.example", "http://alerts.example:9093", ""])
def test_what_is_no_address_of_an_alertmanager_is_refused(address: str) -> None:
    with pytest.raises(ValidationError, match="alertmanager"):
        MonitoringSettings(alertmanager=address)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "nobody is told of alerts, they only stand on that page: --alertmanager HOST:PORT"),
        (["--alertmanager", "alerts.example:9093"], "alerts go to the Alertmanager at alerts.example:9093"),
    ],
)
def test_on_start_it_says_who_is_told_of_alerts(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    discovery: Path,
    tmp_path: Path,
    options: list[str],
    said: str,
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(os, "execve", lambda *line: None)
    main(["--discovery", str(discovery), "--data", str(tmp_path), *options])
    assert said in capsys.readouterr().out


def test_a_started_application_has_its_dashboards_where_grafana_looks() -> None:
    folder = cluster.environment(PORT)["RAY_METRICS_GRAFANA_DASHBOARD_OUTPUT_DIR"]
    assert Path(folder).parent == cluster.instance_folder(PORT)
