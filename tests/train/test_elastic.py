"""A run of one worker or two: it begins on one node, spreads over another that joins, and goes on when that is killed,
to as many steps as it was started for."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from app import cluster
from benchmarks.chaos import processes_of, start_node
from deployments.checkpoints import resolve
from tests.jobs import Jobs
from tests.train.small import labelled_version, tiny_vit

#: Some minutes of them: they must outlast a node's coming and its death.
STEPS = 12_000

pytestmark = [pytest.mark.proof, pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture
def jobs(tmp_path: Path) -> Iterator[Jobs]:
    port = cluster.free_port(8191)
    try:
        # room for one worker of 1.5 CPUs and what loads for it; another node has room for another
        yield Jobs(cluster.start(port, num_cpus=2, object_store_bytes=200 * 2**20))
    finally:
        cluster.stop(port)


def test_a_run_takes_a_node_that_joins_and_goes_on_without_it(jobs: Jobs, tmp_path: Path) -> None:
    labelled_version(tmp_path / "data", train=96, val=16)
    tiny_vit(tmp_path / "vit", ("human", "ai"))
    entry = ("train.detector", "--data", str(tmp_path / "data/aivshuman"), "--model", str(tmp_path / "vit"))
    entry += ("--head", "keep", "--name", "elastic", "--storage", str(tmp_path / "runs"), "--no-record")
    entry += ("--output", str(tmp_path / "out"), "--batch-size", "8", "--threads", "1", "--cpus-per-worker", "1.5")
    entry += ("--min-workers", "1", "--num-workers", "2", "--lanes", "2", "--checkpoint-every", "100")
    entry += ("--give-way-s", "0", "--max-steps", str(STEPS), "--epochs", "2000", "--validate-every", "4000")
    assert jobs.submit("elastic", *entry, wait=False).returncode == 0
    jobs.wait_for("elastic", f"starting {STEPS} steps with 1 of 2 workers")
    start_node(jobs.instance.port, cpus=2)
    jobs.wait_for("elastic", f"of {STEPS} with 2 of 2 workers")  # Ray looks for new nodes once a minute
    (node,) = processes_of(jobs.instance.port, "node")
    node.kill()
    jobs.wait_for("elastic", f"written to {tmp_path / 'out'}", 1200)
    told = jobs.run("logs", "elastic").stdout
    resumed = re.findall(rf"resuming after step (\d+) of {STEPS} with (\d) of 2 workers", told)
    assert [int(workers) for _, workers in resumed] == [2, 1], resumed
    for step, workers in resumed:
        before = told[: told.index(f"resuming after step {step} of {STEPS} with {workers}")]
        reached = max(int(number) for number in re.findall(rf" step (\d+)/{STEPS},", before))
        assert reached - int(step) <= 200, "what was trained since the last checkpoint and the one on its way"
    assert f"trained in {STEPS} steps" in told
    card = resolve(str(tmp_path / "out")).card
    assert card.metrics["val_auc"] > 0.9
