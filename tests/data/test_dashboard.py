"""The data dashboard in a real browser, over small versions."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from app.cluster import free_port
from data.dashboard import find_versions, main
from data.versions import open_version
from tests.app.browser import find_chromium
from tests.data.small_version import write_version

playwright = pytest.importorskip("playwright.sync_api", reason="install the list of development tools")
pytest.importorskip("streamlit", reason="install the list of development tools")

ROOT = Path(__file__).parents[2]
WAIT_MS = 90_000
browser_needed = pytest.mark.skipif(find_chromium() is None, reason="no Chromium: apt-get install chromium")


@pytest.fixture(scope="module")
def versions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("prepared")
    return {
        "folder": folder,
        "older": write_version(folder, each=8),
        "newer": write_version(folder, each=12, created=5),
        "flickr30k": write_version(folder, "flickr30k"),
    }


@pytest.fixture(scope="module")
def address(versions: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    port = free_port(8600)
    log = tmp_path_factory.mktemp("dashboard") / "log"
    command = [sys.executable, "-m", "data.dashboard", "--data", str(versions["folder"]), "--port", str(port)]
    with log.open("w") as output:
        # the page must need no home to write its own settings to
        environment = os.environ | {"HOME": str(log.parent)}
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output)
    try:
        url, until = f"http://127.0.0.1:{port}", time.monotonic() + 120
        while True:
            try:
                if httpx.get(f"{url}/_stcore/health", timeout=5).status_code == 200:
                    break
            except httpx.HTTPError:
                assert process.poll() is None and time.monotonic() < until, log.read_text()
                time.sleep(0.1)
        yield url
        assert "Traceback" not in log.read_text(), log.read_text()
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    """The dashboard, opened. Afterwards: nothing was raised in it, and no other host was asked."""
    opened = browser.new_page(viewport={"width": 1300, "height": 1000})
    hosts: set[str] = set()
    opened.on("request", lambda request: hosts.add(urlsplit(request.url).netloc))
    opened.goto(address)
    opened.get_by_role("tab", name="Records").wait_for(timeout=WAIT_MS)
    yield opened
    assert opened.get_by_test_id("stException").count() == 0
    assert hosts - {""} == {urlsplit(address).netloc}
    opened.close()


def choose(page: Any, label: str, option: str) -> None:
    """Choose in one of Streamlit's boxes, and wait until the page is up to date."""
    box = page.get_by_role("combobox", name=re.compile(label))
    box.click()
    page.get_by_role("option", name=re.compile(option)).first.click()
    settle(page)


def settle(page: Any) -> None:
    page.wait_for_timeout(300)
    page.wait_for_function("() => !document.querySelector('[data-testid=stStatusWidget]')", timeout=WAIT_MS)


def open_tab(page: Any, name: str) -> Any:
    page.get_by_role("tab", name=name).click()
    panel = page.get_by_role("tabpanel").filter(visible=True)
    panel.wait_for(timeout=WAIT_MS)
    return panel


@browser_needed
@pytest.mark.slow
def test_splits_records_and_balance(page: Any, versions: dict[str, Path]) -> None:
    newer = open_version(versions["newer"]).manifest.version
    heading = page.get_by_role("heading", name=f"aivshuman {newer}, train")
    heading.wait_for(timeout=WAIT_MS)  # the newest one is there first
    metrics = page.get_by_test_id("stMetric")
    assert metrics.filter(has_text="Pictures").inner_text().split() == ["Pictures", "12"]
    assert metrics.filter(has_text="Rules").inner_text().endswith("1/2")
    choose(page, "Split", "all splits")
    playwright.expect(metrics.filter(has_text="Pictures")).to_contain_text("48", timeout=WAIT_MS)
    panel = open_tab(page, "Records")
    assert panel.get_by_test_id("stDataFrame").count() == 2
    panel.get_by_label("File name or id contains").fill("test/3.jpg")
    page.keyboard.press("Enter")
    playwright.expect(panel.get_by_text("1 of 48 records")).to_be_visible(timeout=WAIT_MS)
    panel = open_tab(page, "Balance")
    for name in ("Labels", "Generators", "Sources", "Formats"):
        playwright.expect(panel.get_by_role("heading", name=name)).to_be_visible(timeout=WAIT_MS)
    playwright.expect(panel.get_by_test_id("stVegaLiteChart")).to_have_count(4, timeout=WAIT_MS)


@browser_needed
@pytest.mark.slow
def test_samples_have_labels_or_captions(page: Any) -> None:
    panel = open_tab(page, "Samples")
    images = panel.locator("img")
    playwright.expect(images).to_have_count(12, timeout=WAIT_MS)
    page.wait_for_function("() => [...document.images].every(image => image.complete && image.naturalWidth > 0)")
    choose(page, "Label", "^ai$")
    playwright.expect(images).to_have_count(6, timeout=WAIT_MS)
    playwright.expect(panel.get_by_text("ai, generator-1")).to_have_count(6)
    choose(page, "Data set", "flickr30k")
    panel = open_tab(page, "Samples")
    playwright.expect(panel.get_by_text("“A dog, number 0, runs fast .”")).to_be_visible(timeout=WAIT_MS)


@browser_needed
@pytest.mark.slow
def test_rejects_and_groups(page: Any) -> None:
    panel = open_tab(page, "Rejects")
    playwright.expect(panel.get_by_test_id("stVegaLiteChart")).to_be_visible(timeout=WAIT_MS)
    choose(page, "Reason", "truncated")
    panel = open_tab(page, "Near-duplicates")
    playwright.expect(panel.get_by_text("6 groups of more than one picture")).to_be_visible(timeout=WAIT_MS)
    playwright.expect(panel.get_by_text("2 pictures")).to_have_count(5, timeout=WAIT_MS)
    playwright.expect(panel.locator("img")).to_have_count(10)
    panel.get_by_test_id("stNumberInputStepUp").click()
    playwright.expect(panel.locator("img")).to_have_count(2, timeout=WAIT_MS)


@browser_needed
@pytest.mark.slow
def test_two_versions_are_compared(page: Any, versions: dict[str, Path]) -> None:
    older, newer = (open_version(versions[name]).manifest.version for name in ("older", "newer"))
    panel = open_tab(page, "Compare")
    for text, count in (("in both", 32), (f"only in {newer}", 16), (f"only in {older}", 0), ("in another split", 0)):
        playwright.expect(panel.get_by_test_id("stMetric").filter(has_text=text)).to_contain_text(
            str(count), timeout=WAIT_MS
        )
    panel = open_tab(page, "Manifest")
    playwright.expect(panel.get_by_text("few rejects: 2")).to_be_visible(timeout=WAIT_MS)


def test_versions_are_found_wherever_the_place_points(versions: dict[str, Path]) -> None:
    folder = versions["folder"]
    found = find_versions([str(folder)])
    assert {name: len(own) for name, own in found.items()} == {"aivshuman": 2, "flickr30k": 1}
    assert found["aivshuman"][0].location.name == versions["newer"].name
    assert len(find_versions([str(folder / "aivshuman"), str(folder)])["aivshuman"]) == 2
    assert find_versions([str(versions["older"])])["aivshuman"][0].location.name == versions["older"].name


def test_nothing_to_show_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--data", str(tmp_path / "nowhere")])
    assert ended.value.code == 2 and "python -m data.prepare" in capsys.readouterr().err
