"""The page in a real browser, against the running application.

States that a healthy application does not show on request (busy, starting, a stage that fails, gone) are answered at
the browser's border in the format of the HTTP API; everything else is the application's own answer.
"""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from PIL import Image

from app.problems import CODES
from tests.app.browser import find_chromium

playwright = pytest.importorskip("playwright.sync_api", reason="install the list of development tools")

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SAMPLES = ROOT / "samples"
WORDS = ROOT / "app" / "page" / "words.js"
ANSWER_MS = 120_000  # a picture through all three models on a busy two-core machine

pytestmark = [
    pytest.mark.skipif(find_chromium() is None, reason="no Chromium: apt-get install chromium"),
    pytest.mark.timeout(600),
]

RECORD: dict[str, Any] = {
    "id": "a",
    "sha256": "0" * 64,
    "detection": {
        "label": "ai",
        "ai_probability": 0.999,
        "provenance": {
            "c2pa": "invalid",
            "declared_ai": True,
            "signals": [{"kind": "exif", "name": "Software", "value": "<b>bold</b>", "declares_ai": None}],
        },
        "heat_map": None,
    },
    "caption": {"text": "a <i>dog</i>"},
    "tags": None,
    "models": {"detector": "starter:detector#1"},
    "timings_ms": {"detector": 40.0, "total": 50.0},
    "errors": [{"stage": "tagger", "code": "timeout", "detail": "no answer within 20 s"}],
}


@pytest.fixture(scope="module")
def url(application: Any) -> str:
    return str(application.url)


@pytest.fixture
def page(browser: Any, url: str) -> Iterator[Any]:
    """A fresh page at the application. Afterwards: nothing was logged as an error, and no other host was asked."""
    with _opened(browser, url, viewport={"width": 1240, "height": 900}) as opened:
        yield opened


class _opened:
    """A page that keeps account of what it logs and asks for."""

    def __init__(self, browser: Any, url: str, answers: dict[str, Any] | None = None, **context: Any) -> None:
        self.browser, self.url, self.answers, self.context = browser, url, answers or {}, context

    def __enter__(self) -> Any:
        context = self.browser.new_context(reduced_motion="reduce", **self.context)
        self.page = context.new_page()
        self.errors: list[str] = []
        self.hosts: set[str] = set()
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", self._note)
        self.page.on("request", lambda request: self.hosts.add(urlsplit(request.url).netloc))
        self.page.on("dialog", self._refuse)
        for path, answer in self.answers.items():
            self.page.route(path, self._always(answer))
        self.page.goto(self.url)
        return self.page

    def _refuse(self, dialog: Any) -> None:
        self.errors.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    @staticmethod
    def _always(answer: dict[str, Any]) -> Callable[[Any], None]:
        return lambda route: route.fulfill(**answer)

    def _note(self, message: Any) -> None:
        # Chromium logs every answer that is not 2xx; the page shows these to its user: they are no errors of the page
        if message.type == "error" and not message.text.startswith("Failed to load resource"):
            self.errors.append(message.text)

    def __exit__(self, *failure: object) -> None:
        self.page.context.close()
        if failure[0] is None:
            assert self.errors == []
            assert self.hosts - {""} == {urlsplit(self.url).netloc}


def upload(page: Any, *files: tuple[str, bytes] | Path) -> None:
    """Pick files: paths, or names with their bytes."""
    named = [(file.name, file.read_bytes()) if isinstance(file, Path) else file for file in files]
    page.set_input_files("#picker", [{"name": name, "mimeType": "image/jpeg", "buffer": data} for name, data in named])


def finished(page: Any, count: int = 1) -> Any:
    """Wait until `count` cards have their answer or their problem; returns all cards."""
    page.wait_for_function(
        "n => document.querySelectorAll('.card[data-state=done], .card[data-state=failed]').length >= n",
        arg=count,
        timeout=ANSWER_MS,
    )
    return page.locator(".card")


def small_jpeg(colour: str = "teal") -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (96, 64), colour).save(data, "JPEG")
    return data.getvalue()


def answer_with(page: Any, status: int, body: dict[str, Any], path: str = "**/v1/analyze", **headers: str) -> None:
    """Let the next request for `path` meet this answer, and later ones the application."""
    page.route(
        path,
        lambda route: route.fulfill(
            status=status,
            body=json.dumps(body),
            headers={"content-type": "application/json" if status < 400 else "application/problem+json"} | headers,
        ),
        times=1,
    )


def test_several_pictures_become_cards_with_verdict_caption_and_tags(page: Any) -> None:
    names = ["dog.jpg", "coffee.jpg", "horses.jpg", "cat.jpg"]
    upload(page, *(SAMPLES / name for name in names))
    assert page.locator(".card .name").all_inner_texts() == names, "a card for each picture, at once and in order"
    cards = finished(page, len(names))
    for index in range(len(names)):
        card = cards.nth(index)
        assert card.get_attribute("data-state") == "done"
        assert card.locator(".label-text").inner_text() in {"Likely AI-made", "Likely human-made", "Uncertain"}
        assert re.fullmatch(r"<1%|>99%|\d{1,2}%", card.locator(".percent").inner_text())
        assert "probability" in card.locator(".scale").get_attribute("aria-label")
        assert card.locator(".scale.marked").count() == 1, "the thresholds of /v1/models are marked"
        caption = card.locator(".caption").inner_text()
        assert len(caption.split()) >= 3
        assert card.locator(".photo").get_attribute("alt") == card.locator(".caption").text_content()
        assert 3 <= card.locator(".tags li").count() <= 10
        assert "C2PA" in card.locator(".provenance-text").inner_text()
    assert "not proof" in page.locator(".caution").inner_text()


def test_details_name_stages_and_models_and_the_record_can_be_saved(page: Any) -> None:
    upload(page, SAMPLES / "dog.jpg")
    card = finished(page).first
    card.locator(".more summary").click()
    assert {"Detector", "Captioner", "Tagger"} <= set(card.locator(".timings dt").all_inner_texts())
    assert {"Detector", "Captioner", "Tagger"} <= set(card.locator(".models dt").all_inner_texts())
    with page.expect_download() as download:
        card.locator(".json").click()
    assert download.value.suggested_filename == "dog.json"
    record = json.loads(Path(download.value.path()).read_text())
    assert record["caption"]["text"] == card.locator(".caption").text_content()


def test_heat_map_lies_over_the_picture_and_can_be_switched_off(page: Any) -> None:
    upload(page, SAMPLES / "astronaut.jpg")
    card = finished(page).first
    button, heat = card.locator(".heat-button"), card.locator(".heat")
    button.click()
    heat.wait_for(timeout=ANSWER_MS)
    assert button.get_attribute("aria-pressed") == "true"
    assert heat.evaluate("async (image) => { await image.decode(); return image.naturalWidth; }") > 0
    assert heat.bounding_box() == card.locator(".photo").bounding_box()
    card.locator(".opacity").fill("20")
    assert heat.evaluate("image => image.style.opacity") == "0.2"
    button.click()
    assert not heat.is_visible()
    assert button.get_attribute("aria-pressed") == "false"


def test_a_broken_file_gets_a_clear_message_and_harms_no_other(page: Any) -> None:
    photo = (SAMPLES / "coffee.jpg").read_bytes()
    upload(
        page,
        ("notes.jpg", b"this is no picture"),
        ("cut.jpg", photo[: len(photo) // 10]),
        ("empty.jpg", b""),
        ("good.jpg", photo),
    )
    cards = finished(page, 4)
    assert [cards.nth(i).get_attribute("data-state") for i in range(4)] == ["failed", "failed", "failed", "done"]
    assert "not a picture" in cards.nth(0).locator(".problem-text").inner_text()
    assert "damaged" in cards.nth(1).locator(".problem-text").inner_text()
    assert "empty" in cards.nth(2).locator(".problem-text").inner_text()


def test_every_problem_of_the_api_has_its_sentence() -> None:
    table = WORDS.read_text().split("const PROBLEMS = {")[1].split("\n};")[0]
    assert set(CODES) <= set(re.findall(r"^  (\w+):", table, re.M))


def test_who_is_told_to_press_retry_can_and_nobody_else() -> None:
    words = WORDS.read_text()
    told = set(
        re.findall(r"^  (\w+): .*press retry", words.split("const PROBLEMS = {")[1].split("\n};")[0], re.M | re.I)
    )
    assert set(re.findall(r'"(\w+)"', words.split("const WORTH_RETRYING")[1].split(";")[0])) == told


def test_hostile_file_names_stay_text_and_stay_here(page: Any) -> None:
    name = "<img src=x onerror=alert(1)>.jpg"
    bodies: list[bytes] = []
    page.on(
        "request", lambda request: bodies.append(request.post_data_buffer or b"") if request.method == "POST" else None
    )
    upload(page, (name, small_jpeg()))
    card = finished(page).first
    assert card.locator(".name").inner_text() == name
    assert page.locator("img[src=x]").count() == 0
    assert bodies and not any(b"onerror" in body for body in bodies)


def test_texts_of_an_answer_are_never_markup(page: Any) -> None:
    answer_with(page, 200, RECORD)
    upload(page, ("a.jpg", small_jpeg()))
    card = finished(page).first
    assert card.locator(".caption").text_content() == "a <i>dog</i>"
    assert card.locator("dd", has_text="<b>bold</b>").count() == 1
    assert page.locator("main b, main i").count() == 0


def test_a_partial_answer_says_what_is_missing_and_why(page: Any) -> None:
    answer_with(page, 200, RECORD)
    upload(page, ("a.jpg", small_jpeg()))
    card = finished(page).first
    assert card.locator(".gaps li").inner_text() == "No tags: the tagger ran out of time. (no answer within 20 s)"
    assert card.locator(".label-text").inner_text() == "Likely AI-made"
    assert card.locator(".percent").inner_text() == ">99%", "never certain"
    assert "invalid" in card.locator(".provenance-text").inner_text()
    assert card.locator(".declared").inner_text() == "The file itself says that AI made it."
    card.locator(".again").click()
    page.wait_for_function("() => document.querySelector('.gaps').hidden", timeout=ANSWER_MS)


@pytest.mark.parametrize("code", ["overloaded", "rate_limited"])
def test_a_busy_service_is_asked_again_by_itself(page: Any, code: str) -> None:
    busy = {
        "type": "about:blank",
        "title": "Too many requests",
        "status": 429,
        "detail": "64 pictures in work",
        "code": code,
    }
    answer_with(page, 429, busy, **{"retry-after": "2"})
    upload(page, ("a.jpg", small_jpeg()))
    page.locator(".progress-text", has_text="busy").wait_for()
    assert finished(page).first.get_attribute("data-state") == "done"


def test_a_failed_picture_can_be_retried(page: Any) -> None:
    late = {"type": "about:blank", "title": "Late", "status": 504, "detail": "no stage answered", "code": "timeout"}
    answer_with(page, 504, late)
    upload(page, ("a.jpg", small_jpeg()))
    card = finished(page).first
    assert "too long" in card.locator(".problem-text").inner_text()
    card.locator(".retry").click()
    page.locator(".card[data-state=done]").wait_for(timeout=ANSWER_MS)


def test_while_the_service_starts_pictures_wait_and_then_go(browser: Any, url: str) -> None:
    stages = {
        "detector": {"status": "ready", "message": ""},
        "captioner": {"status": "starting", "message": "loading weights"},
        "tagger": {"status": "starting", "message": ""},
    }
    starting = {"**/readyz": {"status": 503, "json": {"ready": False, "stages": stages}}}
    with _opened(browser, url, starting) as page:
        page.locator("#stages li").nth(2).wait_for()
        assert page.locator("#banner-title").inner_text() == "DeepTrust is starting"
        assert "loading weights" in page.locator("#stages li").nth(1).inner_text()
        upload(page, ("a.jpg", small_jpeg()))
        assert "Waiting for the service" in page.locator(".progress-text").inner_text()
        page.unroute("**/readyz")
        assert finished(page).first.get_attribute("data-state") == "done"
        assert not page.locator("#banner").is_visible()


def test_at_most_three_pictures_are_in_flight(page: Any) -> None:
    in_flight, most = 0, 0

    def change(by: int) -> None:
        nonlocal in_flight, most
        in_flight += by
        most = max(most, in_flight)

    def is_upload(request: Any) -> bool:
        return request.method == "POST"

    page.on("request", lambda request: change(1) if is_upload(request) else None)
    page.on("requestfinished", lambda request: change(-1) if is_upload(request) else None)
    upload(
        page,
        *(
            (f"{i}.jpg", small_jpeg(colour))
            for i, colour in enumerate(("red", "green", "blue", "gold", "navy", "pink"))
        ),
    )
    finished(page, 6)
    assert 1 <= most <= 3


def test_removing_a_card_cancels_its_request(page: Any) -> None:
    page.route("**/v1/analyze", lambda route: None)  # never answered
    upload(page, ("a.jpg", small_jpeg()))
    page.locator(".card[data-state=analysing]").wait_for()
    with page.expect_event("requestfailed"):
        page.locator(".remove").click()
    assert page.locator(".card").count() == 0
    assert page.evaluate("document.activeElement.id") == "picker"


def test_pictures_can_be_pasted_and_dropped(page: Any) -> None:
    put = """async ([type, data]) => {
        const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
        const transfer = new DataTransfer();
        transfer.items.add(new File([bytes], `${type}.jpg`, {type: "image/jpeg"}));
        const event = type === "paste"
            ? new ClipboardEvent("paste", {clipboardData: transfer, bubbles: true, cancelable: true})
            : new DragEvent("drop", {dataTransfer: transfer, bubbles: true, cancelable: true});
        document.body.dispatchEvent(event);
    }"""
    data = base64.b64encode(small_jpeg()).decode()
    page.evaluate(put, ["paste", data])
    page.evaluate(put, ["drop", data])
    finished(page, 2)
    assert page.locator(".card .name").all_inner_texts() == ["paste.jpg", "drop.jpg"]


def test_a_sample_is_analysed_with_its_credit(page: Any) -> None:
    listing = json.loads((SAMPLES / "samples.json").read_text())
    page.locator("#sample-list button").first.click()
    card = finished(page).first
    assert card.locator(".name").inner_text() == listing[0]["name"]
    assert listing[0]["credit"] in card.locator(".credit").inner_text()
    assert listing[0]["licence"] in card.locator(".credit").inner_text()


def test_the_keyboard_alone_is_enough(page: Any) -> None:
    def tab_to(selector: str, most: int = 40) -> None:
        for _ in range(most):
            page.keyboard.press("Tab")
            if page.evaluate("s => document.activeElement?.matches(s) ?? false", selector):
                return
        raise AssertionError(f"{selector} cannot be reached with the Tab key")

    page.locator("#sample-list button").first.wait_for()
    tab_to("#picker")
    outline = page.evaluate("getComputedStyle(document.querySelector('label[for=picker]')).outlineStyle")
    assert outline == "solid", "where the focus is can be seen"
    for last in (False, False, True):
        try:
            with page.expect_file_chooser(timeout=10_000) as chooser:
                page.keyboard.press("Space")
            break
        except playwright.TimeoutError:  # on a busy machine Chromium lets a press fall now and then
            if last:
                raise
    chooser.value.set_files(str(SAMPLES / "coffee.jpg"))
    finished(page)
    tab_to(".heat-button")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("Space")
    page.locator(".heat").wait_for(timeout=ANSWER_MS)
    tab_to(".more summary")
    page.keyboard.press("Enter")
    assert page.locator(".timings").is_visible()
    page.keyboard.press("Shift+Tab")
    assert page.evaluate("document.activeElement.matches('.json, .again')")


def test_a_screen_reader_hears_each_answer(page: Any) -> None:
    upload(page, SAMPLES / "coffee.jpg")
    caption = finished(page).first.locator(".caption").text_content()
    assert page.locator("#live").get_attribute("aria-live") == "polite"
    assert "coffee.jpg: " in page.locator("#live").text_content()
    assert caption in page.locator("#live").text_content()


@pytest.mark.parametrize("width", [360, 768, 1240])
def test_nothing_scrolls_sideways(browser: Any, url: str, width: int) -> None:
    with _opened(browser, url, viewport={"width": width, "height": 740}, device_scale_factor=2) as page:
        page.locator("#sample-list button").first.wait_for()
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        answer_with(page, 200, RECORD | {"caption": {"text": "m" * 300}, "tags": ["m" * 32]})
        upload(page, ("n" * 200 + ".jpg", small_jpeg()))
        card = finished(page).first
        card.locator(".more summary").click()
        card.locator(".signals summary").click()
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        box = card.bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= width


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark_follow_the_system_and_can_be_read(browser: Any, url: str, scheme: str) -> None:
    with _opened(browser, url, color_scheme=scheme) as page:
        red, green, blue = map(
            int, re.findall(r"\d+", page.evaluate("getComputedStyle(document.body).backgroundColor"))[:3]
        )
        assert (red + green + blue > 600) if scheme == "light" else (red + green + blue < 120)
        for label in ("ai", "human", "uncertain"):
            detection = RECORD["detection"] | {"label": label}
            answer_with(page, 200, RECORD | {"detection": detection, "tags": ["dog"]})
            upload(page, (f"{label}.jpg", small_jpeg()))
            page.locator(f".card[data-verdict={label}]").wait_for()
        answer_with(page, 504, {"code": "timeout", "detail": "late", "status": 504})
        upload(page, ("late.jpg", small_jpeg()))
        finished(page, 4)
        page.evaluate("document.querySelectorAll('details').forEach((d) => (d.open = true))")
        assert page.evaluate((HERE / "contrast.js").read_text()) == []


def test_controls_have_names_pictures_have_descriptions_headings_are_in_order(page: Any) -> None:
    page.locator("#sample-list button").first.wait_for()
    assert page.evaluate((HERE / "accessible.js").read_text()) == []
    answer_with(page, 200, RECORD)
    upload(page, ("a.jpg", small_jpeg()))
    finished(page)
    upload(page, SAMPLES / "coffee.jpg", ("broken.jpg", b"no"))
    cards = finished(page, 3)
    cards.nth(1).locator(".heat-button").click()
    cards.nth(1).locator(".heat").wait_for(timeout=ANSWER_MS)
    page.evaluate("document.querySelectorAll('details').forEach((d) => (d.open = true))")
    assert page.evaluate((HERE / "accessible.js").read_text()) == []


def test_policy_allows_no_inline_script_or_style_and_files_have_none(page: Any, url: str) -> None:
    policy = page.request.get(url).headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "unsafe" not in policy
    markup = (ROOT / "app" / "page" / "index.html").read_text()
    assert not re.search(r"<style|\sstyle=|\son\w+=|https?://|<script(?![^>]*\ssrc=)", markup)


def test_samples_may_be_redistributed_and_stay_small() -> None:
    listing = json.loads((SAMPLES / "samples.json").read_text())
    pictures = {path.name for path in SAMPLES.glob("*.jpg")}
    credits = (SAMPLES / "CREDITS.md").read_text()
    assert {sample["name"] for sample in listing} == pictures
    assert len(pictures) <= 8
    assert sum((SAMPLES / name).stat().st_size for name in pictures) <= 1_500_000
    for sample in listing:
        assert sample["licence"] in {"Public domain", "CC0-1.0", "CC-BY-SA-3.0"}
        assert sample["kind"] in {"photo", "rendering"}
        assert f"`{sample['name']}`" in credits and sample["credit"] in credits
        with Image.open(SAMPLES / sample["name"]) as picture:
            assert max(picture.size) <= 1024
