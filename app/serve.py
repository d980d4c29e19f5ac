"""``python -m app.serve``: start the application on this machine and keep it in the foreground until Ctrl-C.

Checks the configuration and every checkpoint first, so that what is wrong stops the start with one clear line; then
starts Ray, deploys the configuration and reports each stage until all are ready. Replicas, proxies and Serve's
controller that die are started again by Ray; when Ray itself dies, all of it is started again here, as often as it
takes. Told to stop, it lets the requests that were accepted finish first; told again, it stops at once. Knows no model
class and no HTTP route beyond ``/readyz``.
"""

from __future__ import annotations

import contextlib
import copy
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
from pydantic import BaseModel, ConfigDict, Field

from app import callbacks, cluster
from app.authentication import check_exposure
from app.canary_config import CanaryError, ServeApi, deployment_of
from app.config import CANARIES, INGRESS, AppArgs, ConfigError, read_serve_config
from app.keys import KeyFileError
from deployments.checkpoints import CheckpointError, resolve

#: How often it is looked whether Ray lives, and what is deployed.
_LOOK_S, _DEPLOYED_S = 1.0, 15.0
#: Ray's own processes on a head node: when one has died there is no Ray.
_DAEMONS = ("gcs_server", "raylet")
#: The pause before Ray is started yet again doubles from the first to the most; what has served for so long as `steady`
#: is a start that succeeded.
_FIRST_PAUSE_S, _MOST_PAUSE_S, _STEADY_S = 5.0, 300.0, 600.0


class ServeSettings(BaseModel):
    """Command line of ``python -m app.serve``."""

    model_config = ConfigDict(extra="forbid")

    config: Path = Field(Path("serve_config.cpu.yaml"), description="Serve configuration to deploy")
    num_cpus: int = Field(max(2, os.cpu_count() or 2), ge=1, description="CPUs that Ray may hand out")
    object_store_bytes: int = Field(400 * 2**20, ge=80 * 2**20, description="Ray's shared memory")
    ready_timeout_s: float = Field(900.0, gt=0, description="give up when the stages are not ready by then")


#: What a request may take beyond its time; how long its answer needs from the replica to who asked; how long Serve may
#: take to end replicas that have nothing to do.
_MARGIN_S, _SENT_S, _END_SERVE_S = 5.0, 0.5, 20.0


class StartError(RuntimeError):
    """The application cannot start; the message says why and what to do."""


class Life:
    """Ray's own processes of an instance, as they are now: to be asked whether they still run."""

    def __init__(self, port: int) -> None:
        self._daemons: dict[str, psutil.Process] = {}
        for process in cluster.daemons(port):
            with contextlib.suppress(psutil.Error):
                self._daemons[process.name()] = process

    def why_dead(self) -> str:
        """What is missing; empty: nothing is."""
        lost = [name for name in _DAEMONS if name not in self._daemons or not cluster.runs(self._daemons[name])]
        return f"{' and '.join(lost)} ended" if lost else ""


class Pauses:
    """How long to wait before the next start: not at all at first, then longer and longer up to a bound."""

    def __init__(self, first_s: float = _FIRST_PAUSE_S, most_s: float = _MOST_PAUSE_S) -> None:
        self._first_s, self._most_s = first_s, most_s
        self._starts = 0

    def next(self) -> float:
        """Seconds before the start that is next."""
        self._starts += 1
        doublings = min(self._starts - 2, 32)
        return 0.0 if self._starts == 1 else min(self._most_s, self._first_s * 2.0**doublings)

    def reset(self) -> None:
        """It has served for long: what comes next is the first failure of its kind."""
        self._starts = 0


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
    try:
        instance = cluster.start(port, settings.num_cpus, settings.object_store_bytes)
        deploy(instance, config)
        yield instance
    finally:
        if cluster.is_owner(port):  # and not somebody else, whose port it is
            print("stopping", flush=True)
            try:
                cluster.stop(port)
            except KeyboardInterrupt:
                cluster.stop(port, patience_s=0.0)


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
        StartError: a stage failed, Ray died, or the time is over.
    """
    shown: dict[str, str] = {}
    started = time.monotonic()
    life = Life(instance.port)
    http = httpx.Client(timeout=5)  # one: to make it takes longer than an answer, and the cores are busy starting
    while time.monotonic() - started < timeout_s:
        if lost := life.why_dead():
            raise StartError(
                f"Ray died while the models were loaded ({lost}); is there memory enough (`dmesg | grep -i oom`)?"
            )
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
    """Serve until Ctrl-C or SIGTERM, and finish what was accepted. When Ray's own processes die, everything is started
    again, as it was deployed last: promotions and canaries since the start included.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    pauses = Pauses()
    with contextlib.suppress(KeyboardInterrupt):
        try:
            deployed: list[dict[str, Any]] = []
            while True:
                life, ready_at, look_at = Life(instance.port), time.monotonic(), time.monotonic()
                api = ServeApi(instance.dashboard_url, cluster.token(instance.port), timeout_s=5)
                while not (lost := life.why_dead()):
                    if time.monotonic() >= look_at:
                        deployed = _deployed(api) or deployed
                        look_at = time.monotonic() + _DEPLOYED_S
                    time.sleep(_LOOK_S)
                if time.monotonic() - ready_at >= _STEADY_S:
                    pauses.reset()
                instance = _start_again(instance, settings, deployed, lost, pauses)
        except KeyboardInterrupt:
            try:
                cluster.ask_to_stop(instance.port)
                finish_accepted(instance)
            except KeyboardInterrupt:
                print("stopping at once", flush=True)
                cluster.stop(instance.port, patience_s=0.0)


def finish_accepted(instance: cluster.Instance) -> None:
    """Let no more requests in, wait for those that are inside as long as they may take, and have Serve end its
    replicas, which write and give back what they hold. What of this cannot be done is left: all is ended afterwards.
    """
    if Life(instance.port).why_dead():
        return
    try:
        api = ServeApi(instance.dashboard_url, cluster.token(instance.port), timeout_s=10)
        config = api.change(_closed)
        _wait_until_left(instance, api, _longest_request_s(config))
        _end_serve(instance)
    except (CanaryError, httpx.HTTPError, OSError, ValueError, KeyError) as error:
        print(f"accepted requests cannot be waited for: {error}", flush=True)


def _closed(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration with an ingress that lets nobody in."""
    closed = copy.deepcopy(config)
    for application in closed["applications"]:
        ingress = deployment_of(application, INGRESS)
        ingress["user_config"] = (ingress.get("user_config") or {}) | {"stopping": True}
    return closed


def _longest_request_s(config: dict[str, Any]) -> float:
    settings = (AppArgs.model_validate(application.get("args") or {}) for application in config["applications"])
    return max((one.limits.request_timeout_s for one in settings), default=0.0)


def _wait_until_left(instance: cluster.Instance, api: ServeApi, longest_s: float) -> None:
    """Wait until each replica of the ingress has said that nobody is inside, or until their time is over.

    Any replica may answer; each names itself. One that has not answered yet may still let requests in.
    """
    limit, told, life = time.monotonic() + longest_s + _MARGIN_S, -1, Life(instance.port)
    inside: dict[str, int] = {}
    with httpx.Client(timeout=5) as http:
        while time.monotonic() < limit and not life.why_dead():
            with contextlib.suppress(CanaryError, httpx.HTTPError, ValueError):  # asked again
                state = http.get(f"{instance.url}/readyz").json().get("stopping")
                if state is not None:
                    inside[state["replica"]] = state["inside"]
                if all(inside.get(replica) == 0 for replica in _ingress_replicas(api.details())):
                    if told > 0:
                        time.sleep(_SENT_S)
                    return
            if (waiting := sum(inside.values())) not in (told, 0):
                print(f"waiting for {waiting} requests; Ctrl-C or `make stop` again stops at once", flush=True)
                told = waiting
            time.sleep(0.2)
    print(f"requests were not finished: {sum(inside.values())}", flush=True)


def _ingress_replicas(details: dict[str, Any]) -> list[str]:
    """Identities of the replicas of the ingress that may have let somebody in."""
    return [
        replica["replica_id"]
        for application in details["applications"].values()
        for replica in (application["deployments"].get(INGRESS) or {}).get("replicas") or []
        if replica["state"] not in ("STARTING", "STOPPING")
    ]


def _end_serve(instance: cluster.Instance) -> None:
    """Serve's own graceful shutdown: replicas are told, and run what they have for their end."""
    with contextlib.suppress(httpx.HTTPError):  # it took too long, or Ray went with it
        httpx.delete(
            f"{instance.dashboard_url}/api/serve/applications/",
            headers={"Authorization": f"Bearer {cluster.token(instance.port)}"},
            timeout=_END_SERVE_S,
        )


def _deployed(api: ServeApi) -> list[dict[str, Any]]:
    """The applications as they were deployed last; none if that cannot be known now."""
    with contextlib.suppress(CanaryError, OSError, ValueError, KeyError):
        applications: list[dict[str, Any]] = api.config()["applications"]
        return applications
    return []


def _start_again(
    instance: cluster.Instance,
    settings: ServeSettings,
    deployed: list[dict[str, Any]],
    lost: str,
    pauses: Pauses,
) -> cluster.Instance:
    """Start everything again, until it serves: whoever started this one wants it served, and nobody else is there to
    try.
    """
    started, port = time.monotonic(), instance.port
    print(f"Ray has died: {lost} (its logs: {cluster.keep_logs(port)}); starting again", flush=True)
    while True:
        cluster.stop_ray(port)  # what is left of it answers nobody
        if pause_s := pauses.next():
            print(f"next attempt in {pause_s:.0f} s; Ctrl-C or `make stop` ends it", flush=True)
            time.sleep(pause_s)
        try:
            config = prepare(settings)
            if deployed:
                config["applications"] = deployed
            instance = cluster.start(port, settings.num_cpus, settings.object_store_bytes)
            deploy(instance, config)
            wait_until_ready(instance, settings.ready_timeout_s)
        except Exception as error:  # whatever it is: a full disk, a registry that is away, what is not foreseen
            why = str(error) if isinstance(error, StartError | cluster.ClusterError) else repr(error)
            print(f"not started: {why}; logs: {cluster.keep_logs(port, 'failed')}", flush=True)
            continue
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
