"""Training, sweep and evaluation as jobs of a cluster with token authentication: stopped, submitted again, gone on, and
seen in Ray's dashboard by somebody who has the token.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from app import cluster
from deployments.checkpoints import resolve
from tests.app.browser import chromium, dashboard, find_chromium
from tests.jobs import Jobs
from tests.train.small import tiny_vit, traced, write_version
from train.source import describe_trees

pytestmark = [pytest.mark.proof, pytest.mark.slow, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("jobs")
    splits = ["train"] * 64 + ["val"] * 16 + ["test"] * 40
    rows = [
        {"image": traced(number, number % 2), "label": ("human", "ai")[number % 2], "split": split}
        for number, split in enumerate(splits)
    ]
    write_version(folder / "data", "aivshuman", rows)
    tiny_vit(folder / "vit")
    return folder


@pytest.fixture(scope="module")
def jobs(place: Path) -> Iterator[Jobs]:
    port = cluster.free_port(8191)
    variables = {"MLFLOW_TRACKING_URI": f"sqlite:///{place}/mlflow.db", "DEEPTRUST_CACHE": str(place / "cache")}
    try:
        yield Jobs(cluster.start(port, num_cpus=4, object_store_bytes=200 * 2**20), variables)
    finally:
        cluster.stop(port)


def common(place: Path, name: str) -> tuple[str, ...]:
    return (
        *("--data", str(place / "data/aivshuman"), "--model", str(place / "vit"), "--name", name),
        *("--storage", str(place / "runs"), "--output", str(place / name), "--batch-size", "16", "--threads", "1"),
    )


def test_a_training_that_is_stopped_and_submitted_again_goes_on(jobs: Jobs, place: Path) -> None:
    entry = ("train.detector", *common(place, "detector"), "--max-steps", "400", "--epochs", "1000")
    entry += ("--validate-every", "40", "--checkpoint-every", "40")
    assert jobs.submit("train-1", *entry, wait=False).returncode == 0
    jobs.stop_when("train-1", lambda: bool(list((place / "runs/detector").glob("checkpoint_*/progress.json"))))
    assert not (place / "detector").exists(), "it was stopped in the middle"
    again = jobs.submit("train-2", *entry)
    assert again.returncode == 0, again.stdout + again.stderr
    resumed = re.search(r"resuming after step (\d+) of 400", again.stdout)
    assert resumed is not None and int(resumed[1]) >= 40, again.stdout[-4000:]
    assert "step 400/400" in again.stdout
    card = resolve(str(place / "detector")).card
    # Ray leaves .git behind, and nobody told the commit
    assert card.task == "detection" and card.code_commit == describe_trees()


#: A replica that wants every CPU of the cluster, for a while.
_WIDE = """
from ray import serve
serve.start(proxy_location="Disabled")
@serve.deployment(ray_actor_options={"num_cpus": 4})
class Wide:
    pass
serve.run(Wide.bind(), name="wide", route_prefix=None)
print("has its room")
serve.shutdown()
"""


def test_a_training_gives_way_to_serving_and_goes_on_when_there_is_room_again(jobs: Jobs, place: Path) -> None:
    entry = ("train.detector", *common(place, "giving"), "--max-steps", "20000", "--epochs", "5000")
    entry += ("--validate-every", "20000", "--checkpoint-every", "100", "--give-way-s", "5")
    assert jobs.submit("giving", *entry, wait=False).returncode == 0
    jobs.wait_for("giving", "step ")
    serving = jobs.run("submit", "--submission-id", "wide", entry=(sys.executable, "-c", _WIDE))
    assert serving.returncode == 0 and "has its room" in serving.stdout, serving.stdout + serving.stderr
    jobs.stop_when("giving", lambda: "resuming after step" in jobs.run("logs", "giving").stdout)
    told = jobs.run("logs", "giving").stdout
    stopped = re.search(r"stopped after step (\d+) of 20000: serving wants room for Wide", told)
    assert stopped is not None, told[-4000:]
    assert f"resuming after step {stopped[1]} of 20000" in told, "not one step was lost"


def test_a_sweep_that_is_stopped_and_submitted_again_goes_on(jobs: Jobs, place: Path) -> None:
    (place / "space.yaml").write_text("learning_rate: {low: 1.0e-4, high: 1.0e-1, log: true}\n")
    entry = ("train.sweep", "detector", *common(place, "sweep"), "--trials", "4", "--epochs", "4", "--concurrent", "1")
    entry += ("--space", str(place / "space.yaml"))
    models = place / "runs/sweep/models"

    def one_ended() -> bool:
        return models.is_dir() and any(not path.name.startswith(".") for path in models.iterdir())

    assert jobs.submit("sweep-1", *entry, wait=False).returncode == 0
    jobs.stop_when("sweep-1", one_ended, 1200)
    before = {path.name for path in models.iterdir() if not path.name.startswith(".")}
    again = jobs.submit("sweep-2", *entry)
    assert again.returncode == 0, again.stdout[-4000:] + again.stderr
    trials = json.loads((place / "runs/sweep/trials.json").read_text())
    assert len(trials) == 4 and before <= {trial["id"] for trial in trials}
    assert resolve(str(place / "sweep")).card.task == "detection"


def test_an_evaluation_is_a_job_too(jobs: Jobs, place: Path) -> None:
    entry = ("train.evaluate", "detector", "--checkpoint", str(place / "detector"), "--output", str(place / "report"))
    entry += ("--people-by=",)
    entry += ("--data", str(place / "data/aivshuman"), "--against", "", "--no-damages", "--resamples", "100")
    done = jobs.submit("evaluate-1", *entry)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr
    assert json.loads((place / "report/report.json").read_text()) and (place / "report/report.html").is_file()


def test_without_the_token_nothing_is_trained(jobs: Jobs, place: Path) -> None:
    refused = jobs.submit("stranger", "train.detector", *common(place, "stranger"), token=False)
    assert refused.returncode != 0 and not (place / "stranger").exists()


@pytest.mark.skipif(find_chromium() is None, reason="no Chromium: apt-get install chromium")
def test_the_dashboard_shows_jobs_and_runs_to_who_has_the_token(jobs: Jobs, place: Path) -> None:
    url, token = jobs.instance.dashboard_url, cluster.token(jobs.instance.port)
    assert httpx.get(f"{url}/api/train/v2/runs/v1", timeout=60).status_code == 401
    headers = {"Authorization": f"Bearer {token}"}
    runs = httpx.get(f"{url}/api/train/v2/runs/v1", headers=headers, timeout=60).json()["train_runs"]
    states = {(run["name"], run["status"]) for run in runs}
    assert any(name.startswith("detector") and status == "FINISHED" for name, status in states), states
    with chromium() as browser:
        page = dashboard(browser, url, token)
        page.goto(f"{url}/#/jobs")
        page.get_by_text("train-2").first.wait_for(timeout=60_000)
        shown = page.locator("body").inner_text()
        page.screenshot(path=str(place / "jobs.png"))
    for name in ("train-1", "train-2", "sweep-1", "sweep-2", "evaluate-1"):
        assert name in shown, f"{name} is not on the Jobs page:\n{shown[:3000]}"
    assert shown.count("STOPPED") >= 2 and shown.count("SUCCEEDED") >= 3
    print(place / "jobs.png")
