"""``python -m app.monitoring``: a Prometheus on the running application, in the foreground until Ctrl-C.

It finds what to ask through the file that Ray keeps for that purpose, and loads the alert rules of ``monitoring``. In:
the instance's ``PORT``, or the discovery file of a cluster. Knows no metric by name.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field

from app import cluster

_ALERTS = Path(__file__).parent.parent / "monitoring" / "alerts.yaml"


class MonitoringSettings(BaseModel):
    """Command line of ``python -m app.monitoring``."""

    model_config = ConfigDict(extra="forbid")

    listen: str = Field("127.0.0.1:9090", description="address of Prometheus; Ray's dashboard asks it at port 9090")
    discovery: Path | None = Field(
        None, description="Ray's prom_metrics_service_discovery.json; unset: that of the application on PORT"
    )
    data: Path | None = Field(None, description="where Prometheus keeps its data; unset: in the instance's folder")
    retention: str = Field("15d", pattern=r"^\d+[hdwy]$", description="how long it keeps them")
    scrape_interval_s: int = Field(10, ge=1, le=300)
    alertmanager: str | None = Field(
        None,
        pattern=r"^[^\s/]+:\d+$",
        description="HOST:PORT of the Alertmanager that is told of alerts; unset: they only stand on Prometheus' page",
    )


class MonitoringError(RuntimeError):
    """Prometheus cannot be started; the message says why and what to do."""


def configuration(discovery: Path, scrape_interval_s: int, alertmanager: str | None = None) -> str:
    """Prometheus's configuration file."""
    every = f"{scrape_interval_s}s"
    content: dict[str, Any] = {
        "global": {"scrape_interval": every, "scrape_timeout": every, "evaluation_interval": every},
        "rule_files": [str(_ALERTS)],
        "scrape_configs": [
            # Ray names the job `ray` in its file
            {"job_name": "ray", "file_sd_configs": [{"files": [str(discovery)], "refresh_interval": "10s"}]}
        ],
    }
    if alertmanager is not None:
        content["alerting"] = {"alertmanagers": [{"static_configs": [{"targets": [alertmanager]}]}]}
    return yaml.safe_dump(content, sort_keys=False)


def command(settings: MonitoringSettings, port: int) -> list[str]:
    """Write the configuration and return Prometheus's command line.

    Raises:
        MonitoringError: there is no Prometheus, or nothing that it could ask.
    """
    program = shutil.which("prometheus")
    if program is None:
        raise MonitoringError(
            "there is no `prometheus` on this machine: apt-get install prometheus, or put the program of "
            "https://prometheus.io/download into the PATH"
        )
    folder = cluster.instance_folder(port)
    discovery = settings.discovery or folder / "ray" / "prom_metrics_service_discovery.json"
    if not discovery.exists():
        raise MonitoringError(f"{discovery} does not exist: start the application first (`make serve`)")
    data = settings.data or cluster.metrics_folder(port)
    data.mkdir(parents=True, exist_ok=True)
    file = data / "prometheus.yml"
    file.write_text(configuration(discovery, settings.scrape_interval_s, settings.alertmanager))
    return [
        program,
        f"--config.file={file}",
        f"--storage.tsdb.path={data / 'tsdb'}",
        f"--storage.tsdb.retention.time={settings.retention}",
        f"--web.listen-address={settings.listen}",
        "--log.level=warn",
    ]


def environment(port: int) -> dict[str, str]:
    """Marked as the instance's own, so that `make stop` ends it; and as beside its Ray, so that an outage of Ray, which
    is what it is there to tell of, does not end it and its history.
    """
    return os.environ | {cluster.MARK: str(port), cluster.BESIDE: "1"}


def main(arguments: list[str] | None = None) -> None:
    """Start Prometheus and stay with it."""
    from pydantic_settings import CliApp

    settings = CliApp.run(MonitoringSettings, cli_args=arguments)
    port = int(os.environ.get("PORT", "8000"))
    try:
        line = command(settings, port)
    except MonitoringError as error:
        sys.exit(f"error: {error}")
    print(f"Prometheus: http://{settings.listen}/  alerts: http://{settings.listen}/alerts; Ctrl-C stops", flush=True)
    if settings.alertmanager is None:
        print("nobody is told of alerts, they only stand on that page: --alertmanager HOST:PORT", flush=True)
    else:
        print(f"alerts go to the Alertmanager at {settings.alertmanager}", flush=True)
    # in this one's place
    os.execve(line[0], line, environment(port))


if __name__ == "__main__":
    main()
