"""The real application with the starter models: what users get over HTTP."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from PIL import Image

from deployments.annotation import Annotation

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


@pytest.mark.parametrize("picture_format", ["PNG", "WEBP", "GIF", "TIFF", "AVIF", "HEIF"])
def test_every_format_is_answered(client, photos, picture_format: str) -> None:
    import pillow_heif

    pillow_heif.register_heif_opener()
    buffer = io.BytesIO()
    with Image.open(io.BytesIO(photos[0])) as image:
        image.convert("RGB").resize((200, 150)).save(buffer, picture_format)
    answer = client.post("/v1/analyze", params={"tasks": "caption"}, content=buffer.getvalue())
    assert answer.status_code == 200 and answer.json()["caption"]


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
        ("GET", "/v1/analyze", b"", 405, "method_not_allowed"),
        ("GET", "/v1/nothing", b"", 404, "not_found"),
        ("GET", "/samples/..%2f..%2fpyproject.toml", b"", 404, "not_found"),
    ],
)
def test_errors_are_problems_with_a_code(client, method: str, path: str, body: bytes, status: int, code: str) -> None:
    answer = client.request(method, path, content=body)
    assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert answer.headers["content-type"] == "application/problem+json"


def test_protective_headers_are_on_every_answer(client) -> None:
    for path in ("/", "/v1/nothing", "/readyz"):
        headers = client.get(path).headers
        assert "default-src 'self'" in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"


def test_sixteen_clients_get_complete_answers(client, photos, application) -> None:
    def send(number: int) -> httpx.Response:
        return httpx.post(f"{application.url}/v1/analyze", content=photos[number % len(photos)], timeout=120)

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(send, range(48)))
    assert {answer.status_code for answer in answers} == {200}
    assert not [answer.json()["errors"] for answer in answers if answer.json()["errors"]]


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


def test_malformed_requests_are_never_our_fault(application) -> None:
    from tests.app.malformed import requests

    with httpx.Client(base_url=application.url, timeout=60) as client:
        for bad in requests(seed=2, count=300):
            answer = client.request(bad.method, bad.path, headers=list(bad.headers), content=bad.body)
            assert answer.status_code < 500, (bad, answer.text)
    assert httpx.get(f"{application.url}/readyz").json()["ready"]


def test_the_api_documentation_needs_no_other_host(client) -> None:
    page = client.get("/docs").text
    assert "//cdn" not in page and "https://" not in page
    assert client.get("/docs-files/swagger-ui-bundle.js").status_code == 200
    document = client.get("/openapi.json").json()
    assert "/v1/analyze" in document["paths"] and "Annotation" in document["components"]["schemas"]
