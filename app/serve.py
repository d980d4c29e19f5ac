"""``python -m app.serve``: start the application on this machine and keep it in the foreground until Ctrl-C.

Checks the configuration and every checkpoint first, so that what is wrong stops the start with one clear line; then
starts Ray, deploys the configuration and reports each stage until all are ready. Replicas, proxies and Serve's
controller that die are started again by Ray; when Ray itself dies, all of it is started again here. Knows no model
class and no HTTP route beyond ``/readyz``.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
from pydantic import BaseModel, ConfigDict, Field

from app import callbacks, cluster
from app.canary_config import CanaryError, ServeApi
from app.config import CANARIES, AppArgs, ConfigError, read_serve_config
from app.keys import KeyFileError, check_exposure
from deployments.checkpoints import CheckpointError, resolve

#: How often it is looked whether Ray lives, and what is deployed.
_LOOK_S, _DEPLOYED_S = 1.0, 15.0


class ServeSettings(BaseModel):
    """Command line of ``python -m app.serve``."""

    model_config = ConfigDict(extra="forbid")

    config: Path = Field(Path("serve_config.cpu.yaml"), description="Serve configuration to deploy")
    num_cpus: int = Field(max(2, os.cpu_count() or 2), ge=1, description="CPUs that Ray may hand out")
    object_store_bytes: int = Field(400 * 2**20, ge=80 * 2**20, description="Ray's shared memory")
    ready_timeout_s: float = Field(900.0, gt=0, description="give up when the stages are not ready by then")


class StartError(RuntimeError):
    """The application cannot start; the message says why and what to do."""


def prepare(settings: ServeSettings) -> dict[str, Any]:
    """The configuration to deploy, and its checkpoints on this disk.

    Raises:
        StartError: a configuration, address or checkpoint that will not do.
    """
    try:
        config = read_serve_config(settings.config)
    except ConfigError as error:
        raise StartError(str(error)) from error
    host = config.get("http_options", {}).get("host", "127.0.0.1")
    try:
        check_exposure(host)
    except KeyFileError as error:
        raise StartError(f"{settings.config}: {error}") from error
    for application in config["applications"]:
        if reason := callbacks.why_not(AppArgs.model_validate(application.get("args") or {}).callbacks):
            raise StartError(f"{settings.config}: {reason}")
    config.setdefault("http_options", {})["host"] = host
    for uri in sorted(_checkpoints(config)):
        started = time.monotonic()
        try:
            checkpoint = resolve(uri)
        except CheckpointError as error:
            raise StartError(str(error)) from error
        print(f"  model {checkpoint.name} ({time.monotonic() - started:.1f} s)", flush=True)
    return config


def _checkpoints(config: dict[str, Any]) -> Iterator[str]:
    """URIs that the configuration serves at start; a canary without replicas loads nothing."""
    for application in config["applications"]:
        for deployment in application.get("deployments", []):
            uri = (deployment.get("user_config") or {}).get("uri")
            if uri and deployment["name"] not in CANARIES.values():
                yield uri


@contextlib.contextmanager
def serving(settings: ServeSettings) -> Iterator[cluster.Instance]:
    """The application running on this machine; every process of it is gone afterwards.

    Raises:
        StartError, ClusterError: it did not start.
    """
    config = prepare(settings)
    port = config["http_options"].get("port", 8000)
    print(f"starting Ray ({settings.num_cpus} CPUs)", flush=True)
    instance = cluster.start(port, settings.num_cpus, settings.object_store_bytes)
    try:
        deploy(instance, config)
        yield instance
    finally:
        print("stopping", flush=True)
        cluster.stop(port)


def deploy(instance: cluster.Instance, config: dict[str, Any]) -> None:
    """Hand a configuration to the instance's Serve, as ``serve deploy`` does, by Ray's REST interface.

    Raises:
        StartError: Ray refused it; its own words are in the message.
    """
    try:
        answer = httpx.put(
            f"{instance.dashboard_url}/api/serve/applications/",
            json=config,
            headers={"Authorization": f"Bearer {cluster.token(instance.port)}"},
            timeout=120,
        )
    except httpx.HTTPError as error:
        raise StartError(f"Ray's dashboard does not answer at {instance.dashboard_url}: {error!r}") from error
    if answer.status_code != 200:
        raise StartError(f"Ray refused the configuration (HTTP {answer.status_code}): {answer.text[:500]}")


def wait_until_ready(instance: cluster.Instance, timeout_s: float) -> float:
    """Report every stage's state as it changes, until all are ready; returns the seconds it took.

    Raises:
        StartError: a stage failed, or the time is over.
    """
    shown: dict[str, str] = {}
    started = time.monotonic()
    http = httpx.Client(timeout=5)  # one: to make it takes longer than an answer, and the cores are busy starting
    while time.monotonic() - started < timeout_s:
        states: dict[str, str] = {"http": "starting"}
        with contextlib.suppress(httpx.HTTPError, ValueError, KeyError):
            answer = http.get(f"{instance.url}/readyz").json()
            states = {"http": "ready"} | {
                stage: f"{state['status']} {state['message']}".strip() for stage, state in answer["stages"].items()
            }
        for stage, state in states.items():
            if shown.get(stage) != state:
                print(f"  {time.monotonic() - started:5.0f} s  {stage:10} {state}", flush=True)
        shown |= states
        if len(states) > 1 and all(state == "ready" for state in states.values()):
            return time.monotonic() - started
        failed = [f"{stage}: {state}" for stage, state in states.items() if state.startswith("failed")]
        failed += _failed_applications(instance) if states == {"http": "starting"} else []
        if failed:
            raise StartError(
                "; ".join(failed) + f"; logs: {cluster.instance_folder(instance.port)}/ray/session_latest/logs"
            )
        time.sleep(0.5)
    raise StartError(f"not ready after {timeout_s:.0f} s: {shown}")


def _failed_applications(instance: cluster.Instance) -> list[str]:
    """Why the graph could not be built, if it could not: until it is, there is no ingress to ask."""
    with contextlib.suppress(httpx.HTTPError, ValueError):
        applications = httpx.get(
            f"{instance.dashboard_url}/api/serve/applications/",
            headers={"Authorization": f"Bearer {cluster.token(instance.port)}"},
            timeout=10,
        ).json()["applications"]
        return [
            f"application {name}: {details['message'].strip().splitlines()[-1]}"
            for name, details in applications.items()
            if details["status"] == "DEPLOY_FAILED"
        ]
    return []


def addresses(instance: cluster.Instance) -> str:
    """Where to go, for people."""
    return (
        f"  page           {instance.url}/\n"
        f"  API            {instance.url}/docs\n"
        f"  Ray dashboard  {instance.dashboard_url}/  (token {cluster.token(instance.port)})\n"
    )


def supervise(instance: cluster.Instance, settings: ServeSettings) -> None:
    """Serve until Ctrl-C or SIGTERM. When Ray's own processes die, everything is started again, as it was deployed
    last: promotions and canaries since the start included.

    Raises:
        StartError, ClusterError: it could not be started again.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt):
        deployed: list[dict[str, Any]] = []
        while True:
            daemons, look_at = cluster.daemons(instance.port), time.monotonic()
            while all(map(cluster.runs, daemons)):
                if time.monotonic() >= look_at:
                    deployed = _deployed(instance) or deployed
                    look_at = time.monotonic() + _DEPLOYED_S
                time.sleep(_LOOK_S)
            instance = _start_again(instance, settings, deployed)


def _deployed(instance: cluster.Instance) -> list[dict[str, Any]]:
    """The applications as they were deployed last; none if that cannot be known now."""
    with contextlib.suppress(CanaryError, OSError, ValueError, KeyError):
        api = ServeApi(instance.dashboard_url, cluster.token(instance.port), timeout_s=5)
        applications: list[dict[str, Any]] = api.config()["applications"]
        return applications
    return []


def _start_again(
    instance: cluster.Instance, settings: ServeSettings, deployed: list[dict[str, Any]]
) -> cluster.Instance:
    started = time.monotonic()
    logs = cluster.keep_logs(instance.port)
    print(f"Ray has died (its logs: {logs}); starting again", flush=True)
    cluster.stop(instance.port, patience_s=2.0)  # what is left of it answers nobody
    config = prepare(settings)
    if deployed:
        config["applications"] = deployed
    instance = cluster.start(instance.port, settings.num_cpus, settings.object_store_bytes)
    deploy(instance, config)
    wait_until_ready(instance, settings.ready_timeout_s)
    print(f"ready again after {time.monotonic() - started:.0f} s\n{addresses(instance)}", flush=True)
    return instance


def run_command(run: Any) -> None:
    """Run a command's body; what went wrong becomes one line on stderr and exit status 1."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        run()
    except (StartError, cluster.ClusterError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


def main(arguments: list[str] | None = None) -> None:
    """Start, wait until ready, serve until told to stop."""
    from pydantic_settings import CliApp

    settings = CliApp.run(ServeSettings, cli_args=arguments)

    def run() -> None:
        with serving(settings) as instance:
            seconds = wait_until_ready(instance, settings.ready_timeout_s)
            print(f"ready after {seconds:.0f} s; Ctrl-C stops\n{addresses(instance)}", flush=True)
            supervise(instance, settings)

    run_command(run)


if __name__ == "__main__":
    main()
