"""Thumbs, corrections and the search on the page, in a real browser, against the store's own server."""

from __future__ import annotations

import io
import json
import re
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from PIL import Image

from app.store.settings import StoreSettings
from tests.app.browser import find_chromium
from tests.app.small_store import SmallStore, running_store

playwright = pytest.importorskip("playwright.sync_api", reason="install the list of development tools")

HERE = Path(__file__).parent
HOSTILE = "<img src=x onerror=alert(1)>"
WAIT_MS = 60_000

pytestmark = [
    pytest.mark.skipif(find_chromium() is None, reason="no Chromium: apt-get install chromium"),
    pytest.mark.timeout(600),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SmallStore]:
    folder = tmp_path_factory.mktemp("store")
    settings = StoreSettings(url=f"sqlite:///{folder}/store.db", timeout_s=60, search_timeout_s=60)
    with running_store(settings, page=True) as running:
        yield running


@pytest.fixture
def page(browser: Any, server: SmallStore) -> Iterator[Any]:
    """A fresh page. Afterwards: nothing was logged as an error, no dialog came up, no other host was asked."""
    context = browser.new_context(reduced_motion="reduce", viewport={"width": 1240, "height": 900})
    opened = context.new_page()
    opened.set_default_timeout(WAIT_MS)
    errors: list[str] = []
    hosts: set[str] = set()
    opened.on("pageerror", lambda error: errors.append(str(error)))
    opened.on("dialog", lambda dialog: (errors.append(dialog.message), dialog.dismiss()))
    opened.on("request", lambda request: hosts.add(urlsplit(request.url).netloc))
    opened.on(
        "console",
        lambda message: (
            errors.append(message.text)
            if message.type == "error" and not message.text.startswith("Failed to load resource")
            else None
        ),
    )
    opened.goto(server.url)
    yield opened
    context.close()
    assert errors == []
    assert hosts - {""} == {urlsplit(server.url).netloc}


def jpeg(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 48), colour).save(buffer, "JPEG")
    return buffer.getvalue()


def analysed(page: Any, colour: str, **record: str) -> Any:
    """A card with an answer; the record says what the query of the small server says."""
    if record:
        query = "&".join(f"{name}={value}" for name, value in record.items())
        page.route("**/v1/analyze", lambda route: route.continue_(url=f"{route.request.url}?{query}"))
    page.set_input_files("#picker", [{"name": "a.jpg", "mimeType": "image/jpeg", "buffer": jpeg(colour)}])
    card = page.locator(".card[data-state=done]").last
    card.wait_for()
    return card


def kept(server: SmallStore) -> list[tuple[str, int, Any]]:
    """(part, right, what would be right) of every event on disk, the oldest first."""
    with sqlite3.connect(server.settings.database_url.removeprefix("sqlite:///")) as connection:
        rows = connection.execute("SELECT part, correct, value FROM feedback ORDER BY id").fetchall()
    return [(part, correct, None if value is None else json.loads(value)) for part, correct, value in rows]


def thanked(card: Any, part: str) -> None:
    card.locator(f".judge[data-part={part}] .said", has_text="Thank you").wait_for()


def test_each_part_is_judged_and_what_would_be_right_is_kept(page: Any, server: SmallStore) -> None:
    before = len(kept(server))
    card = analysed(page, "teal")
    verdict, caption, tags = (card.locator(f".judge[data-part={part}]") for part in ("verdict", "caption", "tags"))
    verdict.locator(".down").click()
    verdict.locator(".choices button", has_text="A person made it").click()
    thanked(card, "verdict")
    page.wait_for_function("() => document.querySelector('.judge[data-part=verdict] .correction').hidden")
    assert verdict.locator(".down").get_attribute("aria-pressed") == "true"

    caption.locator(".down").click()
    field = caption.locator(".better")
    field.wait_for()
    assert field.input_value() == card.locator(".caption").text_content()
    field.fill(HOSTILE)
    field.press("Enter")
    page.wait_for_function("() => document.querySelector('.judge[data-part=caption] .correction').hidden")

    tags.locator(".down").click()
    tags.locator(".better").fill(" Dog, wet grass,, dog ")
    tags.locator(".text button").click()
    page.wait_for_function("() => document.querySelector('.judge[data-part=tags] .correction').hidden")
    tags.locator(".up").click()
    page.wait_for_function("() => document.querySelector('.judge[data-part=tags] .up').ariaPressed === 'true'")
    assert kept(server)[before:] == [
        ("verdict", 0, None),
        ("verdict", 0, "human"),
        ("caption", 0, None),
        ("caption", 0, HOSTILE),
        ("tags", 0, None),
        ("tags", 0, ["dog", "wet grass"]),
        ("tags", 1, None),
    ]


def test_the_picture_is_sent_for_reviewers_and_the_page_says_so(page: Any, server: SmallStore) -> None:
    card = analysed(page, "orange")
    card.locator(".judge[data-part=verdict] .up").click()
    card.locator(".said", has_text="the picture are kept").wait_for()
    folder = Path(server.settings.pictures_place or "")
    assert jpeg("orange") in [path.read_bytes() for path in folder.rglob("*") if path.is_file()]


def test_while_it_cannot_be_kept_it_is_sent_again_once(page: Any, server: SmallStore) -> None:
    before = len(kept(server))
    card = analysed(page, "navy")
    refused: list[str] = []

    def refuse_once(route: Any) -> None:
        refused.append(route.request.headers["idempotency-key"])
        if len(refused) == 1:
            problem = {"code": "unavailable", "detail": "try again", "status": 503}
            route.fulfill(status=503, json=problem, headers={"retry-after": "1"})
        else:
            route.continue_()

    page.route("**/v1/feedback", refuse_once)
    card.locator(".judge[data-part=verdict] .up").click()
    thanked(card, "verdict")
    assert len(refused) == 2 and len(set(refused)) == 1 and len(kept(server)) == before + 1


@pytest.mark.parametrize(
    ("status", "code", "said"),
    [(404, "not_found", "not kept any more"), (403, "forbidden", "key does not allow")],
)
def test_what_cannot_be_kept_is_said_with_the_reason(page: Any, status: int, code: str, said: str) -> None:
    card = analysed(page, "olive")
    page.route("**/v1/feedback", lambda route: route.fulfill(status=status, json={"code": code, "detail": ""}))
    card.locator(".judge[data-part=verdict] .up").click()
    card.locator(".said", has_text=said).wait_for()
    assert card.locator(".judge[data-part=verdict] .up").get_attribute("aria-pressed") == "false"


def test_pictures_are_found_by_words_verdict_and_tag_and_hostile_text_stays_text(page: Any) -> None:
    card = analysed(page, "red", caption=f"zebra {HOSTILE}", tag="stripes", label="human")
    card.locator(".judge[data-part=verdict] .up").click()
    thanked(card, "verdict")
    card.locator(".said", has_text="picture are kept").wait_for()
    page.locator("#gallery summary").click()
    page.locator(".hit").first.wait_for()
    page.fill("#search-words", "zebras")
    page.select_option("#search-verdict", "human")
    page.locator("#search button").click()
    page.locator("#found-note", has_text=re.compile("^1 picture$")).wait_for()
    hit = page.locator(".hit")
    assert hit.locator(".hit-caption").inner_text() == f"zebra {HOSTILE}"
    assert "Likely human-made" in hit.locator(".hit-verdict").inner_text()
    image = hit.locator(".hit-picture")
    assert image.evaluate("async (image) => { await image.decode(); return image.naturalWidth; }") == 64
    assert page.locator("img[src=x]").count() == 0
    page.fill("#search-words", "")
    page.select_option("#search-verdict", "")
    hit.locator(".hit-tag").click()
    page.wait_for_function("() => document.querySelector('#search-tag').value === 'stripes'")
    page.locator("#found-note", has_text=re.compile("^1 picture$")).wait_for()
    page.fill("#search-tag", "nobody has this")
    page.locator("#search button").click()
    page.locator("#found-note", has_text="Nothing was found.").wait_for()


def test_more_is_shown_page_by_page(page: Any, server: SmallStore) -> None:
    png = {"content-type": "image/png"}
    for number in range(30):
        page.request.post(f"{server.url}/v1/analyze?tag=many", data=f"picture {number}".encode(), headers=png)
    # answers are written behind the request, and before what is said of them
    event = {"id": "nobody has this", "part": "verdict", "right": True}
    assert page.request.post(f"{server.url}/v1/feedback", data=event).status == 404
    page.locator("#gallery summary").click()
    page.fill("#search-tag", "many")
    page.locator("#search button").click()
    page.locator("#found-note", has_text="24 pictures so far").wait_for()
    page.locator("#found-more").click()
    page.locator("#found-note", has_text=re.compile("^30 pictures$")).wait_for()
    assert page.locator(".hit").count() == 30 and not page.locator("#found-more").is_visible()


def test_where_nothing_is_kept_there_is_nothing_to_say_or_to_find(page: Any, server: SmallStore) -> None:
    page.route("**/v1/store", lambda route: route.fulfill(status=404, json={"code": "not_found"}))
    page.goto(server.url)
    card = analysed(page, "pink")
    assert card.locator(".judge").count() == 0 and not page.locator("#gallery").is_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_can_be_read_named_and_touched(browser: Any, server: SmallStore, scheme: str) -> None:
    context = browser.new_context(reduced_motion="reduce", color_scheme=scheme, viewport={"width": 360, "height": 740})
    page = context.new_page()
    page.set_default_timeout(WAIT_MS)
    page.goto(server.url)
    card = analysed(page, "gold")
    for part in ("verdict", "caption", "tags"):
        card.locator(f".judge[data-part={part}] .down").click()
        card.locator(f".judge[data-part={part}] .correction").wait_for()
        thanked(card, part)
    page.locator("#gallery summary").click()
    page.locator(".hit").first.wait_for()
    assert page.evaluate((HERE / "contrast.js").read_text()) == []
    assert page.evaluate((HERE / "accessible.js").read_text()) == []
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    context.close()
