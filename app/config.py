"""Settings of the application: what ``build`` takes as ``args``, and a strict reading of Serve configuration files.

Ray validates the top of a Serve configuration and lets unknown keys of a deployment pass; ``read_serve_config`` does
not. Knows no torch, starts nothing.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from deployments.images import ImageLimits
from deployments.tagger import TaggerSettings

#: Names of the deployments: production, and the twin that serves a canary.
MODELS = {"detector": "Detector", "captioner": "Captioner", "tagger": "Tagger"}
CANARIES = {"detector": "DetectorCanary", "captioner": "CaptionerCanary", "tagger": "TaggerCanary"}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Limits(_Strict):
    """What one request may ask of the application."""

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
    decode_threads: int = Field(2, ge=1, le=64)


class AppArgs(_Strict):
    """``args`` of ``app.main:build``. Changing them restarts every replica: revisions do not belong here."""

    limits: Limits = Field(Limits())
    tagger: TaggerSettings = Field(TaggerSettings())
    tagger_canary: TaggerSettings | None = Field(None, description="null: the tagger's canary is not deployed")


class CanaryShares(_Strict):
    """Share of the pictures, by stable hash, that goes to each model's canary."""

    detector: float = Field(0.0, ge=0, le=1)
    captioner: float = Field(0.0, ge=0, le=1)
    tagger: float = Field(0.0, ge=0, le=1)


class IngressConfig(_Strict):
    """The ingress's ``user_config``."""

    canary: CanaryShares = Field(CanaryShares())


class ConfigError(ValueError):
    """A configuration file is not valid; the message names the key."""


_DEPLOYMENT_KEYS = frozenset(
    {
        "name",
        "num_replicas",
        "max_ongoing_requests",
        "max_queued_requests",
        "backpressure_config",
        "user_config",
        "autoscaling_config",
        "graceful_shutdown_wait_loop_s",
        "graceful_shutdown_timeout_s",
        "health_check_period_s",
        "health_check_timeout_s",
        "ray_actor_options",
        "placement_group_bundles",
        "placement_group_strategy",
        "max_replicas_per_node",
        "request_router_config",
        "logging_config",
        "rolling_update_percentage",
        "max_surge_percent",
    }
)
_AUTOSCALING_KEYS = frozenset(
    {
        "min_replicas",
        "initial_replicas",
        "max_replicas",
        "target_ongoing_requests",
        "metrics_interval_s",
        "look_back_period_s",
        "smoothing_factor",
        "upscale_delay_s",
        "downscale_delay_s",
        "downscale_to_zero_delay_s",
        "upscaling_factor",
        "downscaling_factor",
        "aggregation_function",
        "policy",
    }
)
_ACTOR_KEYS = frozenset(
    {
        "num_cpus",
        "num_gpus",
        "memory",
        "resources",
        "accelerator_type",
        "runtime_env",
        "label_selector",
        "fallback_strategy",
    }
)


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
    if port := os.environ.get("PORT"):
        config.setdefault("http_options", {})["port"] = _port(port)
    _known(config, frozenset(ServeDeploySchema.model_fields), f"{path}")
    known = {"Ingress", *MODELS.values(), *CANARIES.values()}
    for application in config["applications"]:
        where = f"{path}: application {application.get('name')!r}"
        for deployment in application.get("deployments", []):
            name = deployment.get("name")
            if name not in known:
                raise ConfigError(f"{where}: no deployment {name!r}; there are {', '.join(sorted(known))}")
            here = f"{where}: deployment {name!r}"
            _known(deployment, _DEPLOYMENT_KEYS, here)
            _known(deployment.get("autoscaling_config") or {}, _AUTOSCALING_KEYS, f"{here}: autoscaling_config")
            _known(deployment.get("ray_actor_options") or {}, _ACTOR_KEYS, f"{here}: ray_actor_options")
            user_config = deployment.get("user_config")
            if user_config is not None:
                _validate(IngressConfig if name == "Ingress" else ReplicaConfig, user_config, f"{here}: user_config")
        _validate(AppArgs, application.get("args") or {}, f"{where}: args")
    _validate(ServeDeploySchema, config, f"{path}")
    return config


def _port(text: str) -> int:
    if not text.isdigit() or not 0 < int(text) < 65536:
        raise ConfigError(f"PORT={text!r} is not a port: expected a number from 1 to 65535")
    return int(text)


def _known(mapping: dict[str, Any], allowed: frozenset[str], where: str) -> None:
    unknown = set(mapping) - allowed
    if unknown:
        raise ConfigError(
            f"{where}: unknown key {', '.join(sorted(map(repr, unknown)))}; known: {', '.join(sorted(allowed))}"
        )


def _validate(model: type[BaseModel], value: Any, where: str) -> None:
    try:
        model.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "value"
        raise ConfigError(f"{where}: {key}: {first['msg']}") from error
