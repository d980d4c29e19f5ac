"""The KubeRay manifest says what `cluster.yaml` and `serve_config.yaml` say."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml

from app.config import ConfigError, read_serve_config
from app.kuberay import KubeRaySettings, exports, main, manifest

ROOT = Path(__file__).parents[2]
IMAGE = "registry.example/deeptrust:1"


@pytest.fixture(scope="module")
def made() -> dict[str, Any]:
    return manifest(KubeRaySettings(image=IMAGE))


def containers(made: dict[str, Any]) -> list[dict[str, Any]]:
    cluster = made["spec"]["rayClusterConfig"]
    pods = [cluster["headGroupSpec"]["template"], *(group["template"] for group in cluster["workerGroupSpecs"])]
    return [container for pod in pods for container in pod["spec"]["containers"]]


def test_the_graph_is_the_same_and_listens_inside_its_pod(made: dict[str, Any], tmp_path: Path) -> None:
    written = tmp_path / "serve.yaml"
    written.write_text(made["spec"]["serveConfigV2"])
    inside, outside = read_serve_config(written), read_serve_config(ROOT / "serve_config.yaml")
    assert inside["http_options"].pop("host") == "0.0.0.0"
    assert outside["http_options"].pop("host") == "127.0.0.1"
    assert inside == outside


def test_each_bare_metal_node_is_a_group_with_its_gpus_and_labels(made: dict[str, Any]) -> None:
    values = exports(yaml.safe_load((ROOT / "cluster.yaml").read_text())["metadata"]["environment"])
    first, second = made["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    for group, node in ((first, "HEAD"), (second, "WORKER")):
        assert ",".join(f"{key}={value}" for key, value in group["labels"].items()) == values[f"{node}_LABELS"]
        assert group["rayStartParams"]["num-gpus"] == values[f"{node}_GPUS"]
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        assert limits["nvidia.com/gpu"] == values[f"{node}_GPUS"]
        shared = group["template"]["spec"]["volumes"][0]["emptyDir"]["sizeLimit"]
        assert int(shared.removesuffix("Gi")) * 2**30 > int(values["OBJECT_STORE_BYTES"])
    wanted = read_serve_config(ROOT / "serve_config.yaml")["applications"][0]["deployments"]
    selectors = [(item.get("ray_actor_options") or {}).get("label_selector") or {} for item in wanted]
    assert any(selectors)
    assert all(selector.items() <= first["labels"].items() for selector in selectors)


def test_serving_flags_are_carried_and_nothing_of_a_machine_is(made: dict[str, Any]) -> None:
    for container in containers(made):
        environment = {entry["name"]: entry["value"] for entry in container["env"]}
        assert environment["RAY_SERVE_CONTROL_LOOP_INTERVAL_S"] == "0.5"
        assert environment["RAY_worker_niceness"] == "0"
        assert environment["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"] == "app.access:middlewares"
        assert environment["DEEPTRUST_KEYS"].startswith(container["volumeMounts"][-1]["mountPath"])
        assert not [entry for entry in environment.items() if "$" in entry[1]], "nothing expands it"
        assert container["image"] == IMAGE


def test_its_logs_are_json(made: dict[str, Any]) -> None:
    serve = yaml.safe_load(made["spec"]["serveConfigV2"])
    assert serve["logging_config"]["encoding"] == serve["applications"][0]["logging_config"]["encoding"] == "JSON"


def test_ray_is_ours_and_asks_for_a_token(made: dict[str, Any]) -> None:
    cluster = made["spec"]["rayClusterConfig"]
    assert cluster["rayVersion"] == version("ray")
    assert cluster["authOptions"] == {"mode": "token"}
    for container in containers(made):
        # an operator that does not know `authOptions` starts nothing that is open to everybody
        assert {"name": "RAY_AUTH_MODE", "value": "token"} in container["env"]


def test_the_command_prints_it(capsys: pytest.CaptureFixture[str], made: dict[str, Any]) -> None:
    main(["--image", IMAGE])
    assert yaml.safe_load(capsys.readouterr().out) == made


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml"):
        manifest(KubeRaySettings(image=IMAGE, cluster=tmp_path / "nowhere.yaml"))
    with pytest.raises(SystemExit, match=r"metadata\.environment exports nothing"):
        (tmp_path / "empty.yaml").write_text("metadata: {environment: 'true'}")
        main(["--image", IMAGE, "--cluster", str(tmp_path / "empty.yaml")])


def test_mlflow_is_a_service_of_the_cluster_and_no_address_of_the_bare_metal_site_is_carried() -> None:
    def addresses(settings: KubeRaySettings) -> set[str]:
        return {
            entry["value"]
            for container in containers(manifest(settings))
            for entry in container["env"]
            if entry["name"] == "MLFLOW_TRACKING_URI"
        }

    settings = KubeRaySettings(image=IMAGE)
    assert addresses(settings) == {"http://mlflow:5000"}
    assert "10.0.0." not in str(manifest(settings))
    assert addresses(settings.model_copy(update={"mlflow": "http://mlflow.ml:80"})) == {"http://mlflow.ml:80"}
