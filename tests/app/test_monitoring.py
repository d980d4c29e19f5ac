"""`make monitoring`: what Prometheus is started with, and what is said when it cannot be."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from app import cluster
from app.monitoring import MonitoringError, MonitoringSettings, command, main

PORT = 8993


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
def test_prometheus_takes_the_configuration_and_keeps_to_loopback(tmp_path: Path) -> None:
    discovery = tmp_path / "discovery.json"
    discovery.write_text('[{"labels": {"job": "ray"}, "targets": ["127.0.0.1:1"]}]')
    line = command(MonitoringSettings(discovery=discovery, data=tmp_path / "data"), PORT)
    file = next(part for part in line if part.startswith("--config.file=")).split("=", 1)[1]
    checked = subprocess.run(["promtool", "check", "config", file], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert "18 rules" in checked.stdout
    assert any(part.startswith("--web.listen-address=127.0.0.1:") for part in line)


def test_a_started_application_has_its_dashboards_where_grafana_looks() -> None:
    folder = cluster.environment(PORT)["RAY_METRICS_GRAFANA_DASHBOARD_OUTPUT_DIR"]
    assert Path(folder).parent == cluster.instance_folder(PORT)
