"""The round trip through a real Label Studio: flagged on the page, a task with what the models said, annotated through
its API, a verified label, a row of the next version of a data set; and what happens when somebody deletes things there,
or it is down.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import text

from app import cluster
from app.review.__main__ import main
from app.review.server import own_token
from app.store.database import Database
from app.store.settings import StoreSettings
from tests.app.browser import find_chromium
from tests.app.small_store import ROOT, SmallStore, running_store
from tests.data.made import encoded, make_aivshuman, picture

pytest.importorskip("playwright.sync_api", reason="install the list of development tools")

PROGRAM = Path(os.environ.get("DEEPTRUST_TEST_LABEL_STUDIO", ROOT / ".venv-review" / "bin" / "label-studio"))

pytestmark = [
    pytest.mark.proof,
    pytest.mark.skipif(find_chromium() is None, reason="no Chromium: apt-get install chromium"),
    pytest.mark.skipif(not PROGRAM.exists(), reason="no Label Studio: `make review` installs it"),
    pytest.mark.timeout(1500),
]


@dataclass
class Studio:
    """A Label Studio of the test's own."""

    folder: Path
    port: int
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        command = [sys.executable, "-m", "app.review", "start", "--label-studio-port", str(self.port)]
        command += ["--data", str(self.folder), "--program", str(PROGRAM)]
        # no other test's `make stop` ends it
        environment = os.environ | {"PYTHONPATH": str(ROOT), "PORT": str(self.port)}
        with (self.folder.parent / "label-studio.log").open("ab") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
        limit = time.monotonic() + 600
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{self.url}/health", timeout=10).status_code == 200:
                    return
            assert self.process.poll() is None, (self.folder.parent / "label-studio.log").read_text()[-3000:]
            assert time.monotonic() < limit, "it did not start"
            time.sleep(0.5)

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Studio]:
    # not one of those that the system gives to outgoing connections: it is closed and opened again in a test
    running = Studio(tmp_path_factory.mktemp("studio") / "review", cluster.free_port(8181))
    try:
        running.start()
        yield running
    finally:
        running.stop()


@pytest.fixture(scope="module")
def http(studio: Studio) -> Iterator[httpx.Client]:
    headers = {"Authorization": f"Token {own_token(studio.folder)}"}
    with httpx.Client(base_url=studio.url, headers=headers, timeout=120) as client:
        yield client


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SmallStore]:
    folder = tmp_path_factory.mktemp("store")
    settings = StoreSettings(url=f"sqlite:///{folder}/store.db", timeout_s=60, search_timeout_s=60)
    with running_store(settings, page=True) as running:
        yield running


@dataclass
class Review:
    """The commands, on the test's store and server."""

    store: SmallStore
    studio: Studio

    def __call__(self, *arguments: str) -> None:
        place = ["--store-url", str(self.store.settings.url)]
        if arguments[0] != "export":
            place += ["--url", self.studio.url, "--data", str(self.studio.folder)]
        main([arguments[0], *place, *arguments[1:]])

    def fails(self, capsys: Any, *arguments: str) -> str:
        with pytest.raises(SystemExit) as ended:
            self(*arguments)
        assert ended.value.code == 2
        return capsys.readouterr().err


@pytest.fixture
def review(store: SmallStore, studio: Studio, monkeypatch: pytest.MonkeyPatch) -> Review:
    monkeypatch.setenv("LABEL_STUDIO_API_KEY", own_token(studio.folder))
    return Review(store, studio)


def flagged_on_the_page(browser: Any, store: SmallStore, data: bytes) -> str:
    """A picture that somebody says on the page is no AI's; its sha256."""
    page = browser.new_page()
    page.set_default_timeout(120_000)
    page.goto(store.url)
    page.set_input_files("#picker", [{"name": "a.jpg", "mimeType": "image/jpeg", "buffer": data}])
    card = page.locator(".card[data-state=done]").last
    card.wait_for()
    verdict = card.locator(".judge[data-part=verdict]")
    verdict.locator(".down").click()
    # said once, and what is said of the next event takes its place
    card.locator(".said", has_text="picture are kept").wait_for()
    verdict.locator(".choices button", has_text="A person made it").click()
    page.wait_for_function("() => document.querySelector('.judge[data-part=verdict] .correction').hidden")
    page.close()
    return hashlib.sha256(data).hexdigest()


def tasks(http: httpx.Client) -> dict[str, dict[str, Any]]:
    """sha256 -> task of the project."""
    projects = http.get("/api/projects/").json()["results"]
    (project,) = [each["id"] for each in projects if each["title"] == "DeepTrust review"]
    listed = http.get("/api/tasks/", params={"project": project, "fields": "all"}).json()["tasks"]
    found = {task["data"]["sha256"]: task for task in listed}
    assert len(found) == len(listed), "a picture has one task"
    return found


def submit(http: httpx.Client, task: dict[str, Any], verdict: str, caption: str, tags: list[str]) -> None:
    def part(name: str, kind: str, value: Any) -> dict[str, Any]:
        return {"from_name": name, "to_name": "image", "type": kind, "value": value}

    result = [
        part("verdict", "choices", {"choices": [verdict]}),
        part("caption", "textarea", {"text": [caption]}),
        part("tags", "textarea", {"text": tags}),
    ]
    answer = http.post(f"/api/tasks/{task['id']}/annotations/", json={"result": result})
    assert answer.status_code == 201, answer.text


def labels(store: SmallStore) -> list[tuple[Any, ...]]:
    database = Database(store.settings.database_url, 60, 60)
    with database.reading() as connection:
        rows = connection.execute(text("SELECT sha256, reviewer, verdict, caption, tags FROM review_labels")).all()
    database.close()
    return [tuple(row) for row in rows]


def test_from_the_page_to_the_next_version_of_the_data_set(
    browser: Any, store: SmallStore, http: httpx.Client, review: Review, tmp_path: Path
) -> None:
    data = encoded(picture(7001))
    sha256 = flagged_on_the_page(browser, store, data)

    review("push")
    review("push")  # makes nothing twice
    (task,) = tasks(http).values()
    assert task["data"]["sha256"] == sha256 and task["data"]["reason"] == "flagged"
    assert task["data"]["feedback"] == "verdict wrong; verdict wrong, rather: human"
    assert http.get(task["data"]["image"]).content == data
    (said,) = task["predictions"]
    answers = {part["from_name"]: part["value"] for part in said["result"]}
    assert answers == {
        "verdict": {"choices": ["AI"]},
        "caption": {"text": ["a brown dog runs across a field"]},
        "tags": {"text": ["dog", "field", "running"]},
    }
    assert said["score"] == 0.9 and "starter:detector#1" in said["model_version"]

    submit(http, task, "Human", "two dogs run <b>", ["Dog", "meadow"])
    review("pull")
    review("pull")
    reviewer = "reviewer@localhost.localdomain"
    assert labels(store) == [(sha256, reviewer, "human", "two dogs run <b>", '["dog", "meadow"]')]

    file, output = tmp_path / "verified.parquet", tmp_path / "prepared"
    review("export", "--output", str(file))
    raw = make_aivshuman(tmp_path / "raw", 40, defects=False)
    from data.prepare import AivshumanConfig, prepare
    from data.session import RaySettings, ray_session

    with ray_session(RaySettings(num_cpus=2, object_store_bytes=100 * 2**20)):
        before = prepare(AivshumanConfig(input=str(raw), output=str(output))).version
        after = prepare(AivshumanConfig(input=str(raw), output=str(output), feedback=[str(file)])).version
    assert after.manifest.version != before.manifest.version and sum(after.manifest.verified.values()) == 1
    rows = [row for split in after.manifest.counts for row in after.table(split).to_pylist()]
    (row,) = [row for row in rows if row["id"] == sha256]
    assert (row["label"], row["image"], row["source"]) == ("human", data, "review")


def test_what_is_deleted_there_is_made_again_and_what_is_deleted_here_goes_there(
    browser: Any,
    store: SmallStore,
    studio: Studio,
    http: httpx.Client,
    review: Review,
    capsys: pytest.CaptureFixture[str],
) -> None:
    first, second = (flagged_on_the_page(browser, store, encoded(picture(7100 + number))) for number in range(2))
    review("push")
    found = tasks(http)
    assert {first, second} <= set(found)
    assert http.delete(f"/api/tasks/{found[first]['id']}/").status_code == 204
    review("push")
    found = tasks(http)
    assert {first, second} <= set(found)

    address = found[second]["data"]["image"]
    assert http.get(address).status_code == 200
    assert httpx.delete(f"{store.url}/v1/pictures/{second}", timeout=60).status_code == 200
    submit(http, found[second], "AI", "gone", [])
    review("pull")
    assert second not in tasks(http) and second not in {row[0] for row in labels(store)}
    copies = [path for path in studio.folder.rglob("*") if second in path.name]
    assert copies == [] and http.get(address).status_code >= 400, "its bytes have gone from there too"

    submit(http, found[first], "Can't tell", "a field", [])
    review("pull")
    before = labels(store)
    (project,) = {task["project"] for task in tasks(http).values()}
    assert http.delete(f"/api/projects/{project}/").status_code == 204
    capsys.readouterr()
    assert "`python -m app.review push` makes it" in review.fails(capsys, "pull")
    review("push")
    assert labels(store) == before
    third = flagged_on_the_page(browser, store, encoded(picture(7200)))
    review("push")
    assert set(tasks(http)) == {third}, "what has been reviewed is not asked again"


def test_label_studio_that_is_down_or_refuses_is_said_and_nothing_is_lost(
    browser: Any,
    store: SmallStore,
    http: httpx.Client,
    review: Review,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sha256 = flagged_on_the_page(browser, store, encoded(picture(7300)))
    token = own_token(review.studio.folder)
    monkeypatch.setenv("LABEL_STUDIO_API_KEY", "0" * 40)
    capsys.readouterr()
    assert "refuses the token" in review.fails(capsys, "push")
    monkeypatch.setenv("LABEL_STUDIO_API_KEY", token)
    review("push")
    submit(http, tasks(http)[sha256], "AI", "a field", ["field"])
    review.studio.stop()
    before = labels(store)
    for command in ("push", "pull"):
        assert "start it with `make review`" in review.fails(capsys, command)
    review.studio.start()
    review("pull")
    assert len(labels(store)) == len(before) + 1 and sha256 in {row[0] for row in labels(store)}


def test_make_stop_ends_it(studio: Studio) -> None:
    assert studio.process is not None and studio.process.poll() is None
    done = subprocess.run(
        [sys.executable, "-m", "app.stop"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PORT": str(studio.port)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    studio.process.wait(60)
