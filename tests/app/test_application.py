"""The real application with the starter models: what users get over HTTP."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import os
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from PIL import Image

from app import cluster
from deployments.annotation import Annotation
from tests.app.drawn import drawn_requests
from tests.app.malformed import HOSTILE_NAMES, MalformedRequest, bombs, real_files, requests

pytestmark = pytest.mark.application
SAMPLES = Path(__file__).parents[2] / "samples"


@pytest.fixture(scope="module")
def photos() -> list[bytes]:
    return [(SAMPLES / item["name"]).read_bytes() for item in json.loads((SAMPLES / "samples.json").read_text())]


@pytest.fixture
def client(application):
    with httpx.Client(base_url=application.url, timeout=120) as client:
        yield client


def test_a_photo_gets_verdict_caption_and_tags(client, photos) -> None:
    answer = client.post(
        "/v1/analyze", content=photos[0], headers={"content-type": "image/jpeg"}, params={"id": "mine"}
    )
    assert answer.status_code == 200, answer.text
    record = Annotation.model_validate(answer.json())
    assert record.id == "mine" and not record.errors
    assert record.detection is not None and record.detection.label in ("ai", "human", "uncertain")
    assert record.caption is not None and len(record.caption.text.split()) >= 3
    assert record.tags is not None and 3 <= len(record.tags) <= 10
    assert {"detector", "captioner", "tagger", "prompt"} <= set(record.models)
    assert {"decode", "detector", "captioner", "tagger", "total"} <= set(record.timings_ms)


def test_detector_and_captioner_run_side_by_side(client, photos) -> None:
    timings = client.post("/v1/analyze", content=photos[0]).json()["timings_ms"]
    one_after_the_other = timings["decode"] + timings["detector"] + timings["captioner"] + timings["tagger"]
    assert timings["total"] < one_after_the_other


def test_several_photos_are_answered_in_their_order_and_a_broken_one_hurts_no_other(client, photos) -> None:
    files = [("file", (f"{number}.jpg", data)) for number, data in enumerate([photos[0], b"not a picture", photos[1]])]
    answer = client.post("/v1/analyze", files=files, data={"id": ["a", "b", "c"]})
    assert answer.status_code == 200, answer.text
    first, broken, last = answer.json()["items"]
    assert (first["id"], last["id"]) == ("a", "c")
    assert broken["code"] == "not_an_image" and broken["status"] == 415
    assert Annotation.model_validate(last).caption is not None


def test_the_same_photo_in_every_form_of_request_gets_the_same_answer(client, photos) -> None:
    encoded = base64.b64encode(photos[0]).decode()
    answers = [
        client.post("/v1/analyze", content=photos[0]),
        client.post("/v1/analyze", files={"file": ("../../etc/passwd", photos[0])}),
        client.post("/v1/analyze", json={"image": encoded}),
        client.post("/v1/analyze", json={"image": f"data:image/jpeg;base64,{encoded}"}),
    ]
    records = [answer.json() for answer in answers]
    assert len({record["sha256"] for record in records}) == 1
    assert len({record["caption"]["text"] for record in records}) == 1
    assert len({json.dumps(record["tags"]) for record in records}) == 1
    probabilities = [record["detection"]["ai_probability"] for record in records]
    assert max(probabilities) - min(probabilities) < 0.02


@pytest.mark.parametrize(
    ("route", "filled"),
    [("detect", {"detection"}), ("caption", {"caption"}), ("tag", {"caption", "tags"})],
)
def test_a_single_task_fills_only_its_part(client, photos, route: str, filled: set[str]) -> None:
    record = client.post(f"/v1/{route}", content=photos[0]).json()
    assert {key for key in ("detection", "caption", "tags") if record[key] is not None} == filled
    assert record["errors"] == []


def test_a_heat_map_on_request_as_png_and_as_grid(client, photos) -> None:
    png = client.post("/v1/detect", params={"explain": "png"}, content=photos[0]).json()["detection"]["heat_map"]
    with Image.open(io.BytesIO(base64.b64decode(png["png"]))) as overlay:
        assert overlay.mode == "RGBA"
    grid = client.post("/v1/detect", params={"explain": "grid"}, content=photos[0]).json()["detection"]["heat_map"][
        "grid"
    ]
    assert len(grid) == len(grid[0]) == 28
    assert max(map(max, grid)) == pytest.approx(1) and min(map(min, grid)) >= 0


def test_every_format_mode_and_oddity_is_answered(client) -> None:
    names = list(real_files())
    for first in range(0, len(names), 16):
        some = names[first : first + 16]
        # a wrong extension, and a type that is none
        files = [("file", ("picture.txt", real_files()[name], "text/plain")) for name in some]
        items = client.post("/v1/detect", files=files).json()["items"]
        assert {name: item.get("code") for name, item in zip(some, items, strict=True)} == dict.fromkeys(some)
        assert all(0 <= item["detection"]["ai_probability"] <= 1 for item in items)


def test_the_way_up_is_read_from_exif_and_the_answer_is_that_of_the_upright_picture(client, photos) -> None:
    with Image.open(io.BytesIO(photos[0])) as image:
        upright = image.convert("RGB").resize((320, 240))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by a quarter
    plain, turned = io.BytesIO(), io.BytesIO()
    upright.save(plain, "PNG")
    upright.transpose(Image.Transpose.ROTATE_90).save(turned, "PNG", exif=exif)
    answers = [client.post("/v1/analyze", content=file.getvalue()).json() for file in (plain, turned)]
    assert answers[0]["caption"] == answers[1]["caption"] and answers[0]["tags"] == answers[1]["tags"]
    first, second = (answer["detection"]["ai_probability"] for answer in answers)
    assert first == pytest.approx(second, abs=0.02)


def test_corrupt_exif_around_a_sound_picture_changes_no_answer(client) -> None:
    sound = real_files()["jpeg-grey"]
    garbage = b"Exif\0\0II*\0" + b"\xff" * 60
    segment = b"\xff\xe1" + (len(garbage) + 2).to_bytes(2, "big") + garbage
    answers = [client.post("/v1/detect", content=data).json() for data in (sound, sound[:2] + segment + sound[2:])]
    assert answers[0]["sha256"] != answers[1]["sha256"]
    assert answers[0]["detection"]["ai_probability"] == pytest.approx(
        answers[1]["detection"]["ai_probability"], abs=0.01
    )


def test_hostile_file_names_are_never_used(client) -> None:
    picture = real_files()["png"]
    answers = [client.post("/v1/detect", files={"file": (name or "x", picture)}) for name in HOSTILE_NAMES]
    assert {answer.status_code for answer in answers} == {200}
    for name, answer in zip(HOSTILE_NAMES, answers, strict=True):
        assert len(name) < 3 or name not in answer.text


def test_what_a_file_declares_stands_beside_the_verdict(client) -> None:
    declared = client.post("/v1/detect", content=real_files()["png"]).json()["detection"]["provenance"]
    assert declared["c2pa"] == "absent" and declared["declared_ai"] is True
    kinds = {signal["kind"] for signal in declared["signals"]}
    assert kinds == {"png_text", "iptc", "exif"}
    silent = client.post("/v1/detect", content=real_files()["png-palette"]).json()["detection"]["provenance"]
    assert silent == {"c2pa": "absent", "declared_ai": None, "signals": []}


def test_the_models_and_their_state_are_told(client) -> None:
    models = client.get("/v1/models").json()
    assert {entry["status"] for entry in models.values()} == {"ready"}
    assert models["detector"]["uri"] == "starter:detector"
    assert 0 <= models["detector"]["thresholds"]["human_below"] <= models["detector"]["thresholds"]["ai_above"] <= 1
    ready = client.get("/readyz")
    assert ready.status_code == 200 and ready.json()["ready"]
    assert client.get("/healthz").json() == {"status": "ok"}


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code"),
    [
        ("POST", "/v1/analyze", b"", 400, "empty_body"),
        ("POST", "/v1/analyze", b"hello", 415, "not_an_image"),
        ("POST", "/v1/analyze?tasks=paint", b"x", 422, "unknown_task"),
        ("POST", "/v1/analyze?explain=loudly", b"x", 422, "bad_parameter"),
        ("POST", "/v1/analyze", real_files()["jpeg"][:400], 422, "truncated"),
        ("POST", "/v1/analyze", bombs()["png-huge"], 413, "too_many_pixels"),
        ("POST", "/v1/analyze", b"\x89PNG\r\n\x1a\n" + bytes(20 * 2**20), 413, "too_large"),
        ("GET", "/v1/analyze", b"", 405, "method_not_allowed"),
        ("GET", "/v1/nothing", b"", 404, "not_found"),
        ("GET", "/samples/..%2f..%2fpyproject.toml", b"", 404, "not_found"),
    ],
    ids=lambda value: f"{len(value)} bytes" if isinstance(value, bytes) else None,
)
def test_errors_are_problems_with_a_code(client, method: str, path: str, body: bytes, status: int, code: str) -> None:
    answer = client.request(method, path, content=body)
    assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert answer.headers["content-type"] == "application/problem+json"


def test_pictures_below_sixteen_pixels_bad_base64_and_too_many_files_are_refused(client) -> None:
    small = io.BytesIO()
    Image.new("RGB", (64, 15)).save(small, "PNG")
    refused = [
        client.post("/v1/analyze", content=small.getvalue()),
        client.post("/v1/analyze", json={"image": "%%% no base64"}),
        client.post("/v1/analyze", files=[("file", ("a.png", b"x"))] * 33),
        client.post("/v1/analyze", content=b"x", headers={"content-type": "text/plain"}),
        client.delete("/v1/analyze"),
    ]
    assert [(answer.status_code, answer.json()["code"]) for answer in refused] == [
        (422, "too_small"),
        (400, "bad_base64"),
        (413, "too_many_pictures"),
        (415, "unsupported_media_type"),
        (405, "method_not_allowed"),
    ]


def test_protective_headers_are_on_every_answer(client) -> None:
    for path in ("/", "/v1/nothing", "/readyz"):
        headers = client.get(path).headers
        assert "default-src 'self'" in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"


def test_sixteen_clients_get_complete_answers(client, photos, application) -> None:
    def send(number: int) -> httpx.Response:
        return httpx.post(f"{application.url}/v1/analyze", content=photos[number % len(photos)], timeout=120)

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(send, range(32)))
    assert {answer.status_code for answer in answers} == {200}
    assert not [answer.json()["errors"] for answer in answers if answer.json()["errors"]]


def test_models_compute_after_whoever_answers(application, client, photos) -> None:
    assert client.post("/v1/analyze", content=photos[0]).status_code == 200
    threads = {
        name: {os.getpriority(os.PRIO_PROCESS, thread.id) for thread in process.threads()}
        for process in cluster.processes(application.port)
        for name in ("Ingress", "Detector", "Captioner", "EngineCore")
        if name in " ".join(process.cmdline())
    }
    own = os.getpriority(os.PRIO_PROCESS, 0)
    assert threads["Ingress"] == {own}
    assert threads["EngineCore"] == {max(own, 10)}
    assert threads["Detector"] == threads["Captioner"] == {own, max(own, 10)}, (
        "on a thread of its own it answers at once"
    )


def test_a_client_that_goes_away_frees_its_place(client, photos, application) -> None:
    async def leave_early() -> None:
        async with httpx.AsyncClient(timeout=0.3) as impatient:
            results = await asyncio.gather(
                *(impatient.post(f"{application.url}/v1/analyze", content=photos[0]) for _ in range(24)),
                return_exceptions=True,
            )
            assert any(isinstance(result, httpx.TimeoutException) for result in results)

    for _ in range(3):
        asyncio.run(leave_early())
    # were places lost, 72 of them would be more than there are
    assert client.post("/v1/analyze", content=photos[0]).status_code == 200


@contextlib.contextmanager
def _somebody_else(url: str, photo: bytes) -> Iterator[list[httpx.Response]]:
    """A client with a good photo, over and over, beside whatever else happens."""
    answers: list[httpx.Response] = []
    over = threading.Event()

    def ask() -> None:
        while not over.is_set():
            answers.append(httpx.post(f"{url}/v1/analyze", content=photo, timeout=120))
            over.wait(0.2)

    client = threading.Thread(target=ask)
    client.start()
    try:
        yield answers
    finally:
        over.set()
        client.join()


def _send_malformed(url: str, photo: bytes, bad_requests: Iterable[MalformedRequest], senders: int = 1) -> Counter[int]:
    """How often each status was answered. No 5xx, the service stays ready and answers others completely."""

    def send(bad: MalformedRequest) -> int:
        answer = client.request(bad.method, bad.path, headers=list(bad.headers), content=bad.body)
        assert answer.status_code < 500, (bad, answer.text)
        if answer.status_code >= 400:
            assert answer.headers["content-type"] == "application/problem+json", bad
            assert answer.json()["status"] == answer.status_code, bad
        return answer.status_code

    with (
        _somebody_else(url, photo) as others,
        httpx.Client(base_url=url, timeout=60) as client,
        ThreadPoolExecutor(senders) as pool,
    ):
        statuses = Counter(pool.map(send, bad_requests))
    assert {answer.status_code for answer in others} == {200}
    assert not [errors for answer in others if (errors := answer.json()["errors"])]
    assert httpx.get(f"{url}/readyz").json()["ready"]
    return statuses


def test_malformed_requests_are_never_our_fault_and_hurt_nobody_else(application, photos) -> None:
    statuses = _send_malformed(application.url, photos[0], requests(seed=2, count=50))
    assert {400, 415, 422} <= set(statuses)


@pytest.mark.proof
@pytest.mark.timeout(6000)
def test_ten_thousand_malformed_requests_are_never_our_fault(application, photos) -> None:
    drawn: list[MalformedRequest] = []

    @settings(
        max_examples=1000,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(drawn_requests())
    def draw(request: MalformedRequest) -> None:
        drawn.append(request)

    draw()
    assert len(drawn) >= 900
    bad_requests = [*requests(seed=3, count=10_000 - len(drawn)), *drawn]
    statuses = _send_malformed(application.url, photos[0], bad_requests, senders=4)
    print(dict(statuses))
    assert {400, 413, 415, 422} <= set(statuses)


def test_the_api_documentation_needs_no_other_host(client) -> None:
    page = client.get("/docs").text
    assert "//cdn" not in page and "https://" not in page
    assert client.get("/docs-files/swagger-ui-bundle.js").status_code == 200
    document = client.get("/openapi.json").json()
    assert "/v1/analyze" in document["paths"] and "Annotation" in document["components"]["schemas"]
