"""The configuration that runs, changed: which revision a canary serves, which share it gets, what production serves.

In: Ray's dashboard, as everything that deploys here uses it (``PUT /api/serve/applications/``). Out: the same
configuration with another ``user_config`` (of which replicas take note in place) and another least number of replicas
of a canary (which the autoscaler takes note of). Nothing else may change: Serve starts every replica again when
``args`` do, or when a deployment gets or loses an ``autoscaling_config``. The functions that change a configuration
return a changed copy and know no network. Knows no store and no rules.
"""

from __future__ import annotations

import copy
import fcntl
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx

from app import cluster
from app.config import CANARIES, MODELS, IngressConfig, ModelName

Config = dict[str, Any]
_HEALTHY = "HEALTHY"
#: How long a state that looks final is looked at again: Serve's loop may not have begun yet.
_SETTLE_S = 1.5
#: How long a canary without pictures keeps its replica.
_DOWN_S = 5.0
#: For how long an application is asked what it serves, how often, and the longest wait for an answer. Its ingress asks
#: its models every 5 s, and waits 3 s for them: what it says at the end is not from before.
_SAYS_S, _SAYS_AGAIN_S, _SAID_WITHIN_S = 15.0, 1.0, 10.0
#: An API key for that, where the application asks for one.
KEY_VARIABLE = "DEEPTRUST_API_KEY"
#: Locks of dashboards' configurations, and how often who waits for one looks again.
_LOCKS, _AGAIN_S = Path("~/.local/share/deeptrust/canary"), 0.05


class CanaryError(RuntimeError):
    """It cannot be done; the message says why and what to do."""


class DashboardAway(CanaryError):
    """Ray's dashboard does not answer at present; what it was asked to do may have been done."""


class Refused(CanaryError):
    """Replicas cannot load what production is told to serve, and go on with what they have."""


# ---- a configuration, read and changed ---------------------------------------------------------------------------


def application_of(config: Config, name: str) -> Config:
    """An application's part.

    Raises:
        CanaryError: there is none.
    """
    for application in config["applications"]:
        if application["name"] == name:
            found: Config = application
            return found
    names = ", ".join(application["name"] for application in config["applications"]) or "none"
    raise CanaryError(f"no application {name!r} was deployed by a configuration; there are: {names}")


def deployment_of(application: Config, name: str) -> Config:
    """A deployment's part.

    Raises:
        CanaryError: the configuration does not name it.
    """
    for deployment in application.get("deployments") or []:
        if deployment["name"] == name:
            found: Config = deployment
            return found
    raise CanaryError(f"the running configuration does not name {name}: deploy one that does (serve_config.yaml)")


def ingress_of(application: Config) -> IngressConfig:
    """What the ingress is told."""
    return IngressConfig.model_validate(deployment_of(application, "Ingress").get("user_config") or {})


def uri_of(application: Config, deployment: str) -> str:
    """The checkpoint that a deployment is told to serve."""
    return str((deployment_of(application, deployment).get("user_config") or {}).get("uri", ""))


def shares_of(application: Config, model: ModelName) -> tuple[float, float]:
    """A model's canary and shadow shares."""
    ingress = ingress_of(application)
    return getattr(ingress.canary, model), getattr(ingress.shadow, model)


def _changed(config: Config, name: str, change: Callable[[Config, IngressConfig], None]) -> Config:
    result = copy.deepcopy(config)
    application = application_of(result, name)
    ingress = ingress_of(application)
    change(application, ingress)
    deployment_of(application, "Ingress")["user_config"] = ingress.model_dump(mode="json")
    return result


def _no_share(ingress: IngressConfig, model: ModelName) -> None:
    setattr(ingress.canary, model, 0.0)
    setattr(ingress.shadow, model, 0.0)
    ingress.since.pop(model, None)


def with_candidate(config: Config, name: str, model: ModelName, uri: str) -> Config:
    """The canary serves ``uri`` with one replica at least, and gets no picture yet.

    Raises:
        CanaryError: the canary has no ``autoscaling_config`` to change.
    """

    def change(application: Config, ingress: IngressConfig) -> None:
        _no_share(ingress, model)
        canary = deployment_of(application, CANARIES[model])
        canary["user_config"] = (canary.get("user_config") or {}) | {"uri": uri}
        _scaling(canary)["min_replicas"] = 1
        _scaling(canary)["initial_replicas"] = 1

    return _changed(config, name, change)


def with_shares(config: Config, name: str, model: ModelName, canary: float, shadow: float, now_s: float) -> Config:
    """A trial begins."""

    def change(_: Config, ingress: IngressConfig) -> None:
        setattr(ingress.canary, model, canary)
        setattr(ingress.shadow, model, shadow)
        ingress.since[model] = now_s

    return _changed(config, name, change)


def promoted(config: Config, name: str, model: ModelName, before: str) -> Config:
    """Production serves what the canary does; the canary gets no picture any more.

    Args:
        before: by what name production's checkpoint is found later, when its alias is another's.
    """

    def change(application: Config, ingress: IngressConfig) -> None:
        _no_share(ingress, model)
        uri = uri_of(application, CANARIES[model])
        if uri_of(application, MODELS[model]) == uri:
            return
        _serve(application, ingress, model, uri)
        if before != uri:  # else the alias went ahead, and who had it before is not known here
            ingress.before[model] = before

    return _changed(config, name, change)


def withdrawn(config: Config, name: str, model: ModelName) -> Config:
    """The canary gets no picture any more."""
    return _changed(config, name, lambda _, ingress: _no_share(ingress, model))


def without_replicas(config: Config, name: str, model: ModelName) -> Config:
    """The canary goes back to zero."""

    def change(application: Config, _: IngressConfig) -> None:
        scaling = _scaling(deployment_of(application, CANARIES[model]))
        scaling["min_replicas"] = scaling["initial_replicas"] = 0
        # requests of the last half minute, which the autoscaler still looks at, may bring a replica back at once: it
        # must not stay for the ten minutes that are Serve's default
        scaling["downscale_delay_s"] = scaling["downscale_to_zero_delay_s"] = _DOWN_S

    return _changed(config, name, change)


def put_back(config: Config, name: str, model: ModelName) -> Config:
    """Production serves again what it served before its last promotion; done once, there is nothing to put back."""
    before = ingress_of(application_of(config, name)).before.get(model)
    return config if before is None else serving(config, name, model, before)


def serving(config: Config, name: str, model: ModelName, uri: str) -> Config:
    """Production serves ``uri``, and there is nothing to put back; where it does already, nothing changes."""
    if uri_of(application_of(config, name), MODELS[model]) == uri:
        return config
    return _changed(config, name, lambda application, ingress: _serve(application, ingress, model, uri))


def restored(config: Config, name: str, model: ModelName, uri: str, was: Config) -> Config:
    """Production is told again what it was in ``was``, the application's part from before it was told ``uri``, with the
    same to put back. If that names ``uri`` already, it is put back; if another has told it something else since, that
    stays.
    """
    old, told = uri_of(was, MODELS[model]), uri_of(application_of(config, name), MODELS[model])
    if told != uri:
        return config
    if old == uri:
        return put_back(config, name, model)

    def change(application: Config, ingress: IngressConfig) -> None:
        _serve(application, ingress, model, old)
        if (before := ingress_of(was).before.get(model)) is not None:
            ingress.before[model] = before

    return _changed(config, name, change)


def _serve(application: Config, ingress: IngressConfig, model: ModelName, uri: str) -> None:
    ingress.before.pop(model, None)
    production = deployment_of(application, MODELS[model])
    production["user_config"] = (production.get("user_config") or {}) | {"uri": uri}


def _scaling(deployment: Config) -> Config:
    scaling: Config | None = deployment.get("autoscaling_config")
    if not scaling:
        raise CanaryError(
            f"{deployment['name']} has no autoscaling_config in the running configuration, and to give it one would "
            "start every replica again: deploy a configuration that has it (see serve_config.yaml) first"
        )
    return scaling


# ---- Serve's REST interface --------------------------------------------------------------------------------------


class ServeApi:
    """Ray's dashboard: the configuration that runs, and the states of deployments."""

    def __init__(self, url: str, token: str | None, timeout_s: float = 120) -> None:
        self.url, self._timeout_s = url, timeout_s
        self._http = httpx.Client(
            base_url=url, headers={"Authorization": f"Bearer {token}"} if token else {}, timeout=timeout_s
        )

    @classmethod
    def find(cls, url: str | None) -> ServeApi:
        """The dashboard that is named, that of the application on this machine (``PORT``), or of the cluster."""
        port = int(os.environ.get("PORT", "8000"))
        own = cluster.dashboard_url(port)
        named = url or os.environ.get("RAY_API_SERVER_ADDRESS") or own or "http://127.0.0.1:8265"
        return cls(named, cluster.token(port) if named == own else _token())

    def _ask(self, method: str, **what: Any) -> httpx.Response:
        try:
            return self._http.request(method, "/api/serve/applications/", **what)
        except httpx.HTTPError as error:
            message = f"Ray's dashboard does not answer at {self.url} ({error!r}): give --dashboard"
            raise DashboardAway(message) from error

    def details(self) -> Config:
        """All that the dashboard tells of Serve.

        Raises:
            CanaryError: it does not answer, or refuses.
        """
        answer = self._ask("GET")
        if answer.status_code in (401, 403):
            raise CanaryError(f"{self.url} refuses the token: set RAY_AUTH_TOKEN_PATH to the cluster's")
        if answer.status_code != 200:
            raise CanaryError(f"{self.url} answers {answer.status_code}: {answer.text[:300]}")
        found: Config = answer.json()
        return found

    def config(self) -> Config:
        """What was deployed last, to be changed and put."""
        details = self.details()
        config = {key: details[key] for key in ("proxy_location", "http_options", "grpc_options") if details.get(key)}
        if details.get("target_capacity") is not None:
            config["target_capacity"] = details["target_capacity"]
        deployed = [each["deployed_app_config"] for each in details["applications"].values()]
        return config | {"applications": [each for each in deployed if each]}

    def put(self, config: Config) -> None:
        """Deploy a configuration.

        Raises:
            CanaryError: it does not answer, or refuses.
        """
        answer = self._ask("PUT", json=config)
        if answer.status_code != 200:
            raise CanaryError(f"Ray refused the configuration (HTTP {answer.status_code}): {answer.text[:500]}")

    def change(self, edit: Callable[[Config], Config]) -> Config:
        """Read the running configuration, change it, deploy it if that made a difference; returns it.

        Commands of one user and machine take turns: Ray takes whichever configuration comes last, whole. One from
        elsewhere in the same moment could undo this one's change.
        """
        with _turn(self.url, self._timeout_s):
            before = self.config()
            after = edit(before)
            if after != before:
                self.put(after)
        return after

    def replicas(self, application: str, deployment: str) -> int:
        """Replicas of a deployment that run."""
        return _running(self.details()["applications"][application]["deployments"].get(deployment) or {})

    def wait(self, application: str, deployment: str, replicas: int, timeout_s: float) -> None:
        """Wait until a deployment has taken its configuration, with at least so many replicas (0: exactly none).

        Raises:
            CanaryError: it failed, or the time is over.
        """
        limit, since, told = time.monotonic() + timeout_s, None, ""
        while time.monotonic() < limit:
            state = self.details()["applications"][application]["deployments"].get(deployment) or {}
            running, message = _running(state), str(state.get("message") or "").strip()
            told = f"{state.get('status', 'gone')}, {running} replicas" + (f": {message[-500:]}" if message else "")
            if state.get("status") in ("DEPLOY_FAILED", "UNHEALTHY"):
                raise CanaryError(f"{deployment} did not come up: {told}")
            done = state.get("status") == _HEALTHY and (running >= replicas if replicas else not state.get("replicas"))
            since = (since or time.monotonic()) if done else None
            if since is not None and time.monotonic() - since >= _SETTLE_S:
                return
            time.sleep(0.3)
        room = (state.get("deployment_config") or {}).get("ray_actor_options") or {}
        wants = ", ".join(f"{room[key]:g} {key}" for key in ("num_cpus", "num_gpus") if room.get(key)) or "room"
        raise CanaryError(f"{deployment} was not ready after {timeout_s:.0f} s ({told}); a replica needs {wants}")

    def confirm(self, application: str, model: ModelName, uri: str) -> None:
        """Wait until an application says itself that production serves ``uri``: to Serve, a replica that has refused it
        is as healthy as one that has taken it.

        Raises:
            Refused: it goes on with another.
            CanaryError: what it serves is not known.
        """
        url = self._models_url(application)
        limit = time.monotonic() + _SAYS_S
        while True:
            entry, why_not = self._said(url, model)
            if entry.get("uri") == uri:
                return
            if time.monotonic() >= limit:
                break
            time.sleep(_SAYS_AGAIN_S)
        refused = entry.get("refused") or {}
        if refused.get("uri") == uri:
            why = refused.get("why", "its log says why, and /v1/models to a key of scope `admin`")
            raise Refused(f"{uri} is refused, and {MODELS[model]} goes on with {entry.get('uri')}: {why}")
        raise CanaryError(
            f"{MODELS[model]} is told to serve {uri}, and whether it does is not known ({why_not}): see {url}"
        )

    def _models_url(self, application: str) -> httpx.URL:
        """Where an application says what it serves: on the dashboard's machine, where its proxy listens."""
        config = self.config()
        http = config.get("http_options") or {}
        prefix = application_of(config, application).get("route_prefix") or "/"
        return httpx.URL(
            scheme="https" if http.get("ssl_keyfile") else "http",
            host=httpx.URL(self.url).host,
            port=http.get("port", 8000),
            path=f"{prefix.rstrip('/')}/v1/models",
        )

    def _said(self, url: httpx.URL, model: ModelName) -> tuple[Config, str]:
        """What an application says of a model, and why that is not what was wanted."""
        request = self._http.build_request("GET", url, timeout=_SAID_WITHIN_S)
        request.headers.pop("Authorization", None)  # Ray's token
        if key := os.environ.get(KEY_VARIABLE, "").strip():
            request.headers["Authorization"] = f"Bearer {key}"
        try:
            answer = self._http.send(request)
            body = answer.json() if answer.status_code == 200 else None
        except (httpx.HTTPError, ValueError) as error:
            return {}, repr(error)
        if answer.status_code == 401:
            return {}, f"HTTP 401, {KEY_VARIABLE} is for an API key of scope `read` or `admin`"
        entry = body.get(model) if isinstance(body, dict) else None
        if not isinstance(entry, dict):
            return {}, f"HTTP {answer.status_code}"
        return entry, f"it says {entry['uri']}" if "uri" in entry else f"it says {entry.get('message')}"


@contextmanager
def _turn(url: str, patience_s: float) -> Iterator[None]:
    """Alone at a dashboard's configuration. Who cannot write, or has waited for so long for one who hangs, goes on all
    the same: a roll-back and a stop must not depend on it.
    """
    with ExitStack() as held:
        with suppress(OSError, RuntimeError):  # no space, no home
            folder = _LOCKS.expanduser()
            folder.mkdir(parents=True, exist_ok=True)
            lock = held.enter_context((folder / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}.lock").open("a"))
            limit = time.monotonic() + patience_s
            while time.monotonic() < limit:
                with suppress(BlockingIOError):
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # let go of by closing, and with a killed process
                    break
                time.sleep(_AGAIN_S)
        yield


def _running(state: Config) -> int:
    return sum(replica["state"] == "RUNNING" for replica in state.get("replicas") or [])


def _token() -> str | None:
    """The token of a cluster, from where Ray's own tools take it."""
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        return token.strip()
    file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", "~/.ray/auth_token")).expanduser()
    return file.read_text().strip() if file.is_file() else None
