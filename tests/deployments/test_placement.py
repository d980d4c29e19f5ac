"""The production configuration on the cluster that it is written for: two nodes, one with two GPUs and one with one.

Ray's scheduler and Serve's place real replicas on real Ray nodes whose GPUs are only counted; the models are stand-ins.
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray import serve
from ray.cluster_utils import Cluster
from ray.serve.context import _get_global_client
from ray.serve.schema import ApplicationStatus, ServeDeploySchema

from app.cluster import free_port
from app.config import read_serve_config
from tests.deployments.stand_ins import StandIn
from tests.waiting import wait_for
from train.giving_way import waiting_replicas

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def nodes() -> Iterator[dict[str, str]]:
    """Node id -> `A` (two GPUs) or `B` (one)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
        patch.setenv("RAY_enable_worker_prestart", "0")
        patch.delenv("RAY_ADDRESS", raising=False)
        common = {"num_cpus": 32, "object_store_memory": 100 * 2**20}
        cluster = Cluster(
            initialize_head=True,
            head_node_args={
                **common,
                "num_gpus": 2,
                "include_dashboard": True,  # it says which replicas wait
                "dashboard_port": free_port(8270),
                "labels": {"deeptrust.io/serve": "first"},
            },
        )
        try:
            cluster.add_node(**common, num_gpus=1)
            ray.init(address=cluster.address)
            serve.start(proxy_location="Disabled")
            yield {node["NodeID"]: "AB"[node["Resources"]["GPU"] == 1] for node in ray.nodes()}
        finally:
            serve.shutdown()
            ray.shutdown()
            cluster.shutdown()


@pytest.fixture
def config() -> dict[str, Any]:
    """With one ingress on a node that holds what all of them hold there: each takes seconds to start."""
    config = copy.deepcopy(read_serve_config(ROOT / "serve_config.yaml"))
    config["applications"][0]["import_path"] = "tests.deployments.stand_ins:build"
    ingress = deployment(config, "Ingress")
    each, ingress["max_replicas_per_node"] = ingress["max_replicas_per_node"], 1
    ingress["ray_actor_options"]["num_cpus"] *= each
    for bound in ("min_replicas", "max_replicas"):
        ingress["autoscaling_config"][bound] //= each
    return config


def deployment(config: dict[str, Any], name: str) -> dict[str, Any]:
    return next(item for item in config["applications"][0]["deployments"] if item["name"] == name)


def run(config: dict[str, Any], timeout_s: float = 240) -> None:
    _get_global_client().deploy_apps(ServeDeploySchema.model_validate(config))
    limit = time.monotonic() + timeout_s
    while time.monotonic() < limit:
        application = serve.status().applications["deeptrust"]
        if application.status == ApplicationStatus.RUNNING:
            return
        assert application.status != ApplicationStatus.DEPLOY_FAILED, application.message
        time.sleep(0.5)
    raise AssertionError(f"not placed after {timeout_s:.0f} s: {serve.status()}")


def states(name: str) -> dict[str, int]:
    """How many replicas of a deployment are in which state."""
    deployments = serve.status().applications["deeptrust"].deployments
    return {str(state): count for state, count in deployments[name].replica_states.items()}


def place(name: str) -> tuple[str, str]:
    """Node and GPUs of the only replica of a deployment."""
    node, gpus = serve.get_deployment_handle(name, "deeptrust").place.remote().result().split(":")
    return node, gpus


def free_gpus(nodes: dict[str, str]) -> dict[str, float]:
    """GPUs of each node that nobody holds."""
    available = ray._private.state.available_resources_per_node()
    return {name: available[node].get("GPU", 0.0) for node, name in nodes.items()}


def test_every_model_fits_and_a_whole_gpu_is_left_for_training(nodes: dict[str, str], config: dict[str, Any]) -> None:
    run(config)
    detector, captioner = place("Detector"), place("Captioner")
    assert nodes[detector[0]] == nodes[captioner[0]] == "A", "where the label is"
    assert detector == captioner, "they share one GPU"
    assert sum(free_gpus(nodes).values()) == pytest.approx(1.25)
    training = ray.remote(num_gpus=1)(StandIn).remote()
    node, gpus = ray.get(training.place.remote(), timeout=60).split(":")
    assert (node, gpus) != detector
    ray.kill(training)


@pytest.mark.proof
def test_at_their_most_replicas_they_still_fit(nodes: dict[str, str], config: dict[str, Any]) -> None:
    for name in ("Detector", "Captioner"):
        autoscaling = deployment(config, name)["autoscaling_config"]
        autoscaling["min_replicas"] = autoscaling["max_replicas"]
    run(config)
    for name in ("Detector", "Captioner"):
        assert states(name) == {"RUNNING": deployment(config, name)["autoscaling_config"]["max_replicas"]}
    assert states("Tagger") == {"RUNNING": 1}


def test_a_tagger_more_waits_for_the_gpu_of_training_which_sees_that(
    nodes: dict[str, str], config: dict[str, Any]
) -> None:
    run(config)
    training = ray.remote(num_gpus=1)(StandIn).remote()
    held = ray.get(training.place.remote(), timeout=60)
    assert waiting_replicas("GPU") == {}
    deployment(config, "Tagger")["autoscaling_config"]["min_replicas"] = 2
    _get_global_client().deploy_apps(ServeDeploySchema.model_validate(config))
    wait_for(lambda: list(waiting_replicas("GPU").values()) == ["Tagger"], 120, 0.5, serve.status)
    # it wants CPUs as well; whoever else is starting has them in a moment
    wait_for(lambda: list(waiting_replicas("CPU").values()) == ["Tagger"], 120, 0.5, serve.status)
    ray.kill(training)
    wait_for(lambda: states("Tagger") == {"RUNNING": 2}, 120, 0.5, serve.status)
    assert held.split(":")[0] in nodes and waiting_replicas("GPU") == {}
