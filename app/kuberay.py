"""``python -m app.kuberay --image IMAGE``: a KubeRay ``RayService`` from the values of ``cluster.yaml`` and
``serve_config.yaml``, on standard output.

In: the two files and an image that holds this code and the packages of ``requirements/gpu.txt``. Out: a manifest for
KubeRay 1.5.1 or later (labels of a worker group, ``authOptions``); with an older one Ray does not start,
because it asks for a token and finds none. The head works on no GPU; each bare-metal node becomes a group of workers.
On Kubernetes the application has to listen on every interface of its pod, and therefore wants API keys: a secret
``deeptrust-keys`` with the file that ``python -m app.keys`` keeps. Knows no cluster.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field

from app.config import ConfigError, read_serve_config
from app.keys import VARIABLE

_ROOT = Path(__file__).parent.parent
_RAY_VERSION = "2.60.0"
_CODE, _KEYS = "/opt/deeptrust", "/etc/deeptrust-keys"
#: Said otherwise on Kubernetes: by the group, the operator, or the image.
_NOT_CARRIED = (
    *("HEAD_", "WORKER_", "OBJECT_STORE_", "SPILL_", "RAY_FOLDER", "GCS_PORT", "METRICS_PORT", "DASHBOARD_PORT"),
    *("RAY_AUTH_TOKEN_PATH", "RAY_METRICS_GRAFANA_", "RAY_PROMETHEUS_HOST", "RAY_GRAFANA_HOST", "PYTHONPATH", "PATH"),
    *("DEEPTRUST_CACHE", "RAY_enable_autoscaler_v2", "MLFLOW_TRACKING_URI", VARIABLE),
    # a pod's own files: Ray's defaults do
    *(f"RAY_SERVE_HAPROXY_{name}_" for name in ("CONFIG", "SOCKET", "METRICS", "SERVER_STATE")),
)


class KubeRaySettings(BaseModel):
    """Command line of ``python -m app.kuberay``."""

    model_config = ConfigDict(extra="forbid")

    image: str = Field(description="image with this code in /opt/deeptrust and the packages of requirements/gpu.txt")
    cluster: Path = Field(_ROOT / "cluster.yaml", description="Ray's cluster file")
    serve: Path = Field(_ROOT / "serve_config.yaml", description="Serve's configuration")
    name: str = Field("deeptrust", pattern=r"^[a-z]([a-z0-9-]{0,40}[a-z0-9])?$")
    mlflow: str = Field(
        "http://mlflow:5000",
        pattern=r"^[a-z0-9+]+://\S+$",
        description="MLflow as pods reach it: the service `mlflow` of the same namespace, unless said otherwise",
    )
    cpus: int = Field(16, ge=1, description="processors of a worker pod")
    memory: str = Field("96Gi", pattern=r"^\d+(Mi|Gi)$", description="memory of a worker pod, object store included")


class _Dumper(yaml.SafeDumper):
    """YAML for people: no anchors, and text of several lines as a block."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_str(self, data: str) -> yaml.ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:str", data, style="|" if "\n" in data else None)


_Dumper.add_representer(str, _Dumper.represent_str)


def _dump(value: Any) -> str:
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, width=120)


def exports(text: str) -> dict[str, str]:
    """What the ``export`` lines of a shell text say, in their order; nothing is expanded.

    Raises:
        ConfigError: there are none.
    """
    found: dict[str, str] = {}
    for line in text.splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["export"]:
            found |= dict(word.split("=", 1) for word in words[1:])
    if not found:
        raise ConfigError("the cluster file's metadata.environment exports nothing")
    return found


def manifest(settings: KubeRaySettings) -> dict[str, Any]:
    """The ``RayService``.

    Raises:
        ConfigError: one of the files cannot be read or is not valid.
    """
    try:
        values = exports(yaml.safe_load(settings.cluster.read_text())["metadata"]["environment"])
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise ConfigError(f"cannot read {settings.cluster}: {error!r}") from error
    serve = read_serve_config(settings.serve)
    serve["http_options"]["host"] = "0.0.0.0"  # noqa: S104 - inside its pod, and API keys are asked for  # nosec B104
    carried = {key: value for key, value in values.items() if not key.startswith(_NOT_CARRIED)}
    store = values["OBJECT_STORE_BYTES"]
    groups = [
        _group("serve-first", values["HEAD_GPUS"], values["HEAD_LABELS"], store, settings, carried),
        _group("train-first", values["WORKER_GPUS"], values["WORKER_LABELS"], store, settings, carried),
    ]
    head = _pod(settings, carried, {"cpu": "4", "memory": "16Gi"}, shared="2Gi")
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayService",
        "metadata": {"name": settings.name},
        "spec": {
            "serveConfigV2": _dump(serve),
            "rayClusterConfig": {
                "rayVersion": _RAY_VERSION,
                "authOptions": {"mode": values["RAY_AUTH_MODE"]},
                "headGroupSpec": {
                    "rayStartParams": {
                        # nothing is scheduled on the head: what runs there ends with it
                        "num-cpus": "0",
                        "object-store-memory": str(2**30),
                        "metrics-export-port": values["METRICS_PORT"],
                    },
                    "template": head,
                },
                "workerGroupSpecs": groups,
            },
        },
    }


def _group(
    name: str, gpus: str, labels: str, store: str, settings: KubeRaySettings, carried: dict[str, str]
) -> dict[str, Any]:
    resources = {"cpu": str(settings.cpus), "memory": settings.memory, "nvidia.com/gpu": gpus}
    return {
        "groupName": name,
        "replicas": 1,
        "minReplicas": 1,
        "maxReplicas": 1,
        "labels": dict(label.split("=", 1) for label in labels.split(",")),
        "rayStartParams": {"num-gpus": gpus, "object-store-memory": store},
        "template": _pod(settings, carried, resources, shared=f"{-(-int(store) // 2**30) + 1}Gi"),
    }


def _pod(settings: KubeRaySettings, carried: dict[str, str], resources: dict[str, str], shared: str) -> dict[str, Any]:
    """A pod of one Ray container, ``shared`` memory for the object store, and the file of API keys."""
    own = {
        "PYTHONPATH": _CODE,
        "RAY_SERVE_HAPROXY_BINARY_PATH": f"{_CODE}/app/front/haproxy",
        "DEEPTRUST_CACHE": "/var/cache/deeptrust",
        "MLFLOW_TRACKING_URI": settings.mlflow,
        VARIABLE: f"{_KEYS}/keys.json",
    }
    return {
        "spec": {
            "containers": [
                {
                    "name": "ray",
                    "image": settings.image,
                    "workingDir": _CODE,
                    "env": [{"name": key, "value": value} for key, value in (carried | own).items()],
                    # database and S3 passwords, HF_TOKEN
                    "envFrom": [{"secretRef": {"name": f"{settings.name}-secrets", "optional": True}}],
                    "resources": {"limits": resources, "requests": resources},
                    "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
                    "volumeMounts": [
                        {"name": "shared-memory", "mountPath": "/dev/shm"},  # noqa: S108  # nosec B108 # a mount inside the pod
                        {"name": "cache", "mountPath": own["DEEPTRUST_CACHE"]},
                        {"name": "keys", "mountPath": _KEYS, "readOnly": True},
                    ],
                }
            ],
            "volumes": [
                {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": shared}},
                {"name": "cache", "emptyDir": {}},
                {"name": "keys", "secret": {"secretName": f"{settings.name}-keys"}},
            ],
        }
    }


def main(arguments: list[str] | None = None) -> None:
    """Print the manifest."""
    from pydantic_settings import CliApp

    settings = CliApp.run(KubeRaySettings, cli_args=arguments)
    try:
        print(_dump(manifest(settings)), end="")
    except ConfigError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
