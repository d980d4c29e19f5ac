"""Settings of the application: what ``build`` takes as ``args``, and a strict reading of Serve configuration files.

Ray lets unknown keys pass in most parts of a Serve configuration; ``read_serve_config`` does not. Which keys there are
it reads off Ray's own models. Knows no torch, starts nothing.

    python -m app.config serve_config.yaml        before `serve deploy`: exit status 1, and what is wrong with the file
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_settings import CliPositionalArg

from app.callbacks import CallbackSettings
from app.drift import DriftSampleSettings
from app.store.settings import StoreSettings
from deployments.images import ImageLimits
from deployments.tagger import TaggerSettings

#: Names of the deployments: production, and the twin that serves a canary.
MODELS = {"detector": "Detector", "captioner": "Captioner", "tagger": "Tagger"}
CANARIES = {"detector": "DetectorCanary", "captioner": "CaptionerCanary", "tagger": "TaggerCanary"}
INGRESS = "Ingress"
#: The one replica that watches for drift.
WATCHER = "Drift"


ModelName = Literal["detector", "captioner", "tagger"]
#: As a `Host` header has it, in lower case and without port.
HostName = Annotated[str, Field(pattern=r"^(?:[a-z0-9._-]+|\[[0-9a-f:.]+\])$")]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Limits(_Strict):
    """What one request may ask of the application, and by which name."""

    picture: ImageLimits = Field(ImageLimits())
    max_pictures: int = Field(32, ge=1, le=256, description="pictures in one request")
    max_request_bytes: int = Field(64 * 2**20, ge=1024, description="body of one request")
    request_timeout_s: float = Field(60.0, gt=0, le=600, description="a request's whole time")
    max_in_flight: int = Field(32, ge=1, description="pictures that an ingress replica has in work, at most")
    target_s: float = Field(
        30.0, gt=0, le=600, description="time that a picture should take; when they take longer fewer are let in"
    )
    max_waiting: int = Field(64, ge=0, description="requests that wait for a place; beyond it answers 429")
    max_wait_s: float = Field(4.0, ge=0, le=60, description="longest wait for a place; then it answers 429")
    max_receiving: int = Field(
        64,
        ge=1,
        le=1024,
        description="requests of senders who can wait that an ingress replica receives at a time; by Little's law as "
        "many as come to it in a second times the seconds that a slow sender takes to upload one",
    )
    max_receiving_bytes: int = Field(
        512 * 2**20,
        ge=1024,
        description="bodies of those together, in memory until they are on disk; one that does not tell its size takes "
        "what a request may have",
    )
    decode_threads: int = Field(2, ge=1, le=64)
    max_comparing: int = Field(
        8,
        ge=0,
        description="pictures of a trial of which the other model is asked at a time; beyond it it is not asked",
    )
    hosts: tuple[HostName, ...] = Field(
        (),
        description="names, without port, under which it is asked besides loopback's while there are no API keys: of a "
        "proxy in front that keeps the Host header",
    )


class AppArgs(_Strict):
    """``args`` of ``app.main:build``. Changing them restarts every replica: revisions do not belong here, nor how many
    replicas there may be.
    """

    limits: Limits = Field(Limits())
    store: StoreSettings = Field(StoreSettings())
    callbacks: CallbackSettings = Field(CallbackSettings())
    drift: DriftSampleSettings = Field(DriftSampleSettings())
    tagger: TaggerSettings = Field(TaggerSettings())
    tagger_canary: TaggerSettings | None = Field(None, description="null: the tagger's canary is not deployed")


class CanaryShares(_Strict):
    """Share of the pictures, by stable hash, that goes to each model's canary."""

    detector: float = Field(0.0, ge=0, le=1)
    captioner: float = Field(0.0, ge=0, le=1)
    tagger: float = Field(0.0, ge=0, le=1)


class IngressConfig(_Strict):
    """The ingress's ``user_config``. ``app.canary`` writes it; what a trial is follows from it alone."""

    canary: CanaryShares = Field(CanaryShares())
    shadow: CanaryShares = Field(
        CanaryShares(),
        description="share of the pictures of which the canary is asked too, without returning its answer",
    )
    since: dict[ModelName, float] = Field(
        default_factory=dict, description="when the trial of a canary began, seconds since 1970"
    )
    stopping: bool = Field(
        False, description="no request is let in any more; `make stop` says so, and waits for those that are inside"
    )
    before: dict[ModelName, str] = Field(
        default_factory=dict, description="checkpoint that production served before its last promotion"
    )


class ConfigError(ValueError):
    """A configuration file is not valid; the message names the key."""


def read_serve_config(path: Path) -> dict[str, Any]:
    """A Serve configuration, checked key by key, ready to be deployed. ``PORT`` overrides the HTTP port.

    Raises:
        ConfigError: not YAML, an unknown key anywhere, a value out of range, or a deployment that the graph does not
        have.
    """
    from ray.serve.schema import ServeDeploySchema

    from deployments.replica import ReplicaConfig

    try:
        config = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    if not isinstance(config, dict) or not config.get("applications"):
        raise ConfigError(f"{path}: expected a mapping with `applications`")
    _known(config, ServeDeploySchema, f"{path}")
    config["http_options"] = config.get("http_options") or {}
    if port := os.environ.get("PORT"):
        config["http_options"]["port"] = _port(port)
    known = {INGRESS, WATCHER, *MODELS.values(), *CANARIES.values()}
    for application in config["applications"]:
        where = f"{path}: application {application.get('name')!r}"
        for deployment in application.get("deployments") or []:
            name = deployment.get("name")
            if name not in known:
                raise ConfigError(f"{where}: no deployment {name!r}; there are {', '.join(sorted(known))}")
            if (user_config := deployment.get("user_config")) is not None:
                model = IngressConfig if name == INGRESS else ReplicaConfig
                _validate(model, user_config, f"{where}: deployment {name!r}: user_config")
        _validate(AppArgs, application.get("args") or {}, f"{where}: args")
    _validate(ServeDeploySchema, config, f"{path}")
    return config


def _port(text: str) -> int:
    if not text.isdigit() or not 0 < int(text) < 65536:
        raise ConfigError(f"PORT={text!r} is not a port: expected a number from 1 to 65535")
    return int(text)


def _known(value: Any, schema: type[BaseModel], where: str) -> None:
    """Every key of a mapping, and of the mappings in it, is one that Ray's own model of it has.

    Raises:
        ConfigError: one is not; the message says where, and what there is.
    """
    from ray.runtime_env import RuntimeEnv
    from ray.serve.config import AutoscalingConfig

    if not isinstance(value, dict):
        raise ConfigError(f"{where}: expected a mapping")
    _no_others(value, schema.model_fields, where)
    for key, inner in value.items():
        here = f"{where}: {key}"
        if inner is None:
            continue
        if key == "runtime_env":
            if not isinstance(inner, dict):
                raise ConfigError(f"{here}: expected a mapping")
            _no_others(inner, {name for name in RuntimeEnv.known_fields if not name.startswith("_")}, here)
        elif key == "fallback_strategy":
            for position, item in enumerate(inner):
                _no_others(item, {"label_selector"}, f"{here}: {position}")
        elif key == "autoscaling_config":  # Ray's model says that it may be any mapping, too
            _known(inner, AutoscalingConfig, here)
            _validate(AutoscalingConfig, inner, here)
        elif (model := _model_in(schema.model_fields[key].annotation)) is not None:
            if not isinstance(inner, list):
                _known(inner, model, here)
                continue
            for position, item in enumerate(inner):
                name = item.get("name") if isinstance(item, dict) else None
                _known(item, model, f"{here}: {position if name is None else repr(name)}")


def _no_others(mapping: dict[str, Any], allowed: Iterable[str], where: str) -> None:
    unknown = set(mapping) - set(allowed)
    if unknown:
        raise ConfigError(
            f"{where}: unknown key {', '.join(sorted(map(repr, unknown)))}; known: {', '.join(sorted(allowed))}"
        )


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The model that a field holds, itself, optionally or in a list; None when it holds something else."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_model_in, get_args(annotation))), None)


def _validate(model: type[BaseModel], value: Any, where: str) -> None:
    try:
        model.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "value"
        raise ConfigError(f"{where}: {key}: {first['msg']}") from error


class CheckSettings(_Strict):
    """Command line of ``python -m app.config``."""

    file: CliPositionalArg[Path] = Field(description="a Serve configuration")


def main(arguments: list[str] | None = None) -> None:
    """Check a file; what is wrong becomes one line and exit status 1."""
    from pydantic_settings import CliApp

    file = CliApp.run(CheckSettings, cli_args=arguments).file
    try:
        read_serve_config(file)
    except ConfigError as error:
        sys.exit(f"error: {error}")
    print(f"{file} is valid")


if __name__ == "__main__":
    main()
