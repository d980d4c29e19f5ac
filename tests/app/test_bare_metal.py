"""`ray up cluster.yaml` and `serve deploy serve_config.yaml` on the machines of a site, the loss of one under load, and
its return. What was seen is written to `benchmarks/results/bare_metal.json`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest

from benchmarks.report import write_result
from tests.app import bare_metal, hosts
from tests.app.bare_metal import HEAD, LOST, NODES, Cluster, Load, wait_until

pytestmark = [pytest.mark.proof, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def seen() -> dict[str, Any]:
    return {}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, seen: dict[str, Any]) -> Iterator[Cluster]:
    """The machines with Ray on them, brought up by one command on the console."""
    if reason := hosts.why_not():
        pytest.skip(reason)
    with bare_metal.machines(tmp_path_factory.mktemp("bare_metal")) as made:
        made.launch("ray get-auth-token --generate")
        made.lists(LOST)
        started = time.monotonic()
        print(made.launch("ray up --yes cluster.yaml"))
        seen["ray_up_s"] = round(time.monotonic() - started, 1)
        wait_until(lambda: made.nodes() == [HEAD, LOST], lambda: str(made.nodes()), 600)
        seen["both_nodes_s"] = round(time.monotonic() - started, 1)
        yield made
        print(json.dumps(seen, indent=1))


@pytest.fixture(scope="module")
def grown(cluster: Cluster, seen: dict[str, Any]) -> Cluster:
    """A node more, as the runbook adds one."""
    cluster.lists(*(name for name in NODES if name != HEAD))
    started = time.monotonic()
    # the autoscaler that runs knows the addresses that it began with: without a restart it never finds the new one
    cluster.launch("ray up --yes cluster.yaml")
    wait_until(lambda: cluster.nodes() == sorted(NODES), lambda: str(cluster.nodes()), 600)
    seen["node_added_s"] = round(time.monotonic() - started, 1)
    return cluster


@pytest.fixture(scope="module")
def deployed(grown: Cluster, seen: dict[str, Any]) -> Cluster:
    cluster = grown
    started = time.monotonic()
    cluster.deploy(bare_metal.serve_config())
    wait_until(cluster.is_whole, lambda: str(cluster.application()), 900, 3)
    seen["serve_deploy_s"] = round(time.monotonic() - started, 1)
    return cluster


def test_every_node_is_up_with_its_gpus_and_labels(grown: Cluster) -> None:
    rows = grown.dashboard("/api/v0/nodes?detail=1")["data"]["result"]["result"]
    alive = {grown.name_of(row["node_ip"]): row for row in rows if row["state"] == "ALIVE"}
    assert sorted(alive) == sorted(NODES)
    gpus = {name: row["resources_total"]["GPU"] for name, row in alive.items()}
    assert gpus == {"node-a": 2, "node-b": 1, "node-c": 1}
    first = {name for name, row in alive.items() if row["labels"]["deeptrust.io/serve"] == "first"}
    assert first == {HEAD}


def test_every_replica_is_where_it_should_be(deployed: Cluster, seen: dict[str, Any]) -> None:
    wait_until(lambda: set(deployed.proxies()) == set(NODES), lambda: str(deployed.proxies()), 120)
    placement, training = deployed.placement(), deployed.what_training_gets()
    seen["placement"], seen["training"] = placement, training
    assert placement["Ingress"] == sorted(NODES), "one on each node: Serve's proxy runs where a replica does"
    assert placement["Detector"] == placement["Captioner"] == placement["Tagger"] == [HEAD]
    assert len(placement["Drift"]) == 1
    assert not any(nodes for name, nodes in placement.items() if name.endswith("Canary"))
    # the tagger has a GPU of its own, detector and captioner share one, and each worker's is left
    assert training["left"] == pytest.approx({"node-a": 0.25, "node-b": 1.0, "node-c": 1.0})
    assert training["training"] == ["node-b", "node-c"]
    assert training["waiting"] == [{}, {}], "a training there can ask whether serving waits for it"


def test_any_node_answers_whoever_has_a_key(deployed: Cluster, seen: dict[str, Any]) -> None:
    with Load(deployed, clients=len(NODES)) as load:
        started = time.monotonic()
        wait_until(lambda: len(load.answers) >= 30, lambda: f"{load.failures} {load.answers[-3:]}", 300)
    assert not load.failures
    seen["at_rest"] = load.between(started, time.monotonic())
    assert all(seen["at_rest"]["answered_by"].values())
    for answer in load.answers:
        assert answer.body["detection"] and answer.body["caption"] and answer.body["tags"]
    for node in NODES:
        command = f"curl -s -o /dev/null -w '%{{http_code}}' {deployed.url(node)}/v1/models"
        assert deployed.host("console").run(command).stdout == "401"


def test_a_lost_node_costs_no_request_and_is_back_when_it_returns(deployed: Cluster, seen: dict[str, Any]) -> None:
    """The third detector fits on no GPU of the head: with it a model is lost as well."""
    # so many that one runs on a worker: A holds two beside captioner and tagger
    deployed.deploy(bare_metal.serve_config(detectors=4))

    def whole() -> bool:
        return deployed.is_whole() and len(deployed.placement()["Detector"]) == 4

    wait_until(whole, lambda: str(deployed.placement()), 600, 3)
    before = deployed.placement()
    lost = next((name for name in before["Detector"] if name != HEAD), LOST)
    assert lost in before["Ingress"]
    with Load(deployed, clients=2) as load:
        first = time.monotonic()
        time.sleep(30)
        gone = time.monotonic()
        deployed.host(lost).power_off()
        noticed_s = wait_until(lambda: lost not in deployed.nodes(), lambda: str(deployed.nodes()), 300)

        def whole_without() -> bool:
            now = deployed.placement()
            return len(now["Detector"]) == 4 and lost not in now["Ingress"] and bool(now["Captioner"] and now["Tagger"])

        wait_until(whole_without, lambda: str(deployed.application()), 600, 3)
        whole_again = time.monotonic()
        without = deployed.placement()
        time.sleep(30)
        returned = time.monotonic()
        deployed.host(lost).power_on()
        wait_until(lambda: lost in deployed.nodes(), lambda: str(deployed.nodes()), 1200, 3)
        back_s = time.monotonic() - returned
        wait_until(lambda: deployed.proxies().get(lost) == "HEALTHY", lambda: str(deployed.proxies()), 300, 3)
        answers_s = time.monotonic() - returned
        steady = time.monotonic()
        time.sleep(30)
        end = time.monotonic()
    seen["loss"] = {
        "lost": lost,
        "placement": {"before": before, "without": without, "after": deployed.placement()},
        "noticed_s": round(noticed_s, 1),
        "whole_again_s": round(whole_again - gone, 1),
        "back_in_ray_s": round(back_s, 1),
        "answers_again_s": round(answers_s, 1),
        "load": {
            "before": load.between(first, gone),
            "from the loss until whole": load.between(gone, whole_again),
            "without": load.between(whole_again, returned),
            "returning": load.between(returned, steady),
            "after": load.between(steady, end),
        },
        "requests": len(load.answers),
        "not_answered": load.failures,
    }
    assert not load.failures
    without, after = (seen["loss"]["load"][name] for name in ("without", "after"))
    assert without["answers"] > 0 and after["answered_by"][lost] > 0


def test_rays_own_pages_are_the_heads_alone(deployed: Cluster) -> None:
    command = f"curl -s -m 5 http://{deployed.head.address}:8265/api/serve/applications/"
    assert deployed.host("console").run(command, check=False).returncode != 0


def test_taken_down_nothing_of_it_runs(deployed: Cluster, seen: dict[str, Any]) -> None:
    started = time.monotonic()
    deployed.launch("ray down --yes cluster.yaml")
    assert not deployed.running(HEAD)
    # a worker's Ray ends when it has not found the head for a minute
    wait_until(lambda: not any(map(deployed.running, NODES)), lambda: str([*map(deployed.running, NODES)]), 300)
    seen["ray_down_s"] = round(time.monotonic() - started, 1)
    write_result("bare_metal", {"hosts": {name: deployed.host(name).address for name in NODES}, **seen})
