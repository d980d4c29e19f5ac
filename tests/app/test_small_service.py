"""The whole application with tiny models: starting, exchange of models under load, canaries, stages that fail or are
late, clients that go away, and the end of it all.

The tests share one application and stand in the order of its life.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import ipaddress
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from PIL import Image
from ray.serve.generated import serve_pb2, serve_pb2_grpc

from app import cluster, drift_report
from app.callbacks import SECRET_VARIABLE
from deployments import telemetry
from tests.app.browser import chromium, dashboard, find_chromium
from tests.app.hook import Hook, listening
from tests.app.load import HTTP, Load, picture, post
from tests.app.small_service import REQUEST_TIMEOUT_S, ROOT, TAGGER_REQUESTS, SmallService, small_service
from tests.monitoring.expressions import ELSEWHERE, needed, panels

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

CLIENTS = 8
#: Ray keeps up to date there whom Prometheus should ask.
DISCOVERY = "prom_metrics_service_discovery.json"


@pytest.fixture(scope="module")
def hook() -> Iterator[Hook]:
    with listening() as made:
        yield made


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, hook: Hook) -> Iterator[SmallService]:
    folder = tmp_path_factory.mktemp("service")
    with pytest.MonkeyPatch.context() as patch:
        # with the session's store, its other application would work on what waits here
        patch.setenv("DEEPTRUST_STORE_URL", f"sqlite:///{folder}/store.db")
        # only what is asked for by its sender, and soon written
        patch.setenv(telemetry.VARIABLE, f"{folder}/traces")
        patch.setenv(telemetry.RATIO_VARIABLE, "0")
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "500")
        patch.setenv(SECRET_VARIABLE, "0123456789abcdef0123456789abcdef")
        with small_service(folder, (hook.url,)) as running:
            yield running


def test_while_the_models_load_the_page_is_there_and_each_stage_says_how_far_it_is(service: SmallService) -> None:
    told = [state for status, state in service.while_starting if status == 200 and not state["ready"]]
    assert told, "nothing was answered before all stages were ready"
    for state in told:
        assert set(state["stages"]) == {"detector", "captioner", "tagger"}
        assert {stage["status"] for stage in state["stages"].values()} <= {"starting", "ready"}
    # vLLM takes longest by far: the others are told to be ready before it is
    assert any(state["stages"]["tagger"]["status"] == "starting" for state in told)
    assert all(status == 200 for status, _ in service.while_starting)


def test_nobody_else_reaches_it(service: SmallService) -> None:
    """Everything listens on loopback; only the port by which Serve's replicas talk to each other cannot be told to, and
    refuses whoever has no token.
    """
    for address, port in service.listening():
        if ipaddress.ip_address(address.removeprefix("::ffff:")).is_loopback:
            continue
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            call = serve_pb2_grpc.ASGIServiceStub(channel).HandleRequest
            with pytest.raises(grpc.RpcError) as refused:
                call(serve_pb2.ASGIRequest(), timeout=30)
        assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED, (address, port)


def test_every_stage_answers(service: SmallService) -> None:
    answer = post(service, 1)
    assert answer.status_code == 200, answer.text
    record = answer.json()
    assert record["errors"] == []
    assert record["detection"] and record["caption"] and record["tags"] is not None
    assert {stage: name.split("#")[0].rsplit("/", 1)[1] for stage, name in record["models"].items() if "#" in name} == {
        "detector": "detector-0",
        "captioner": "captioner-0",
        "tagger": "tagger",
    }


def logged(service: SmallService, request_id: str, expected: set[tuple[str, str]]) -> list[dict[str, Any]]:
    """Lines of all logs of the replicas that bear a request's id, once what is expected is among them."""
    folder = cluster.instance_folder(service.port) / "ray" / "session_latest" / "logs" / "serve"
    limit = time.monotonic() + 60
    while True:
        texts = [line for file in folder.glob("*.log") for line in file.read_text().splitlines() if request_id in line]
        lines = [json.loads(text) for text in texts]
        for line in lines:
            line["deployment"] = line["deployment"].removeprefix("deeptrust_")
        missing = expected - {(line["deployment"], line["message"]) for line in lines}
        if not missing:
            return lines
        assert time.monotonic() < limit, (missing, texts)
        time.sleep(0.2)


def test_a_requests_id_finds_its_lines_in_every_replicas_log(service: SmallService) -> None:
    answer = HTTP.post(f"{service.url}/v1/analyze", content=picture(70), headers={"x-request-id": "upload-70.a"})
    record = answer.json()
    assert answer.headers["x-request-id"] == "upload-70.a"
    stages = {"detector", "captioner", "tagger"}
    expected = {("Ingress", "request"), ("Ingress", "picture"), *((stage.capitalize(), "stage") for stage in stages)}
    lines = logged(service, "upload-70.a", expected)
    assert {line["request_id"] for line in lines} == {"upload-70.a"}
    found = {(line["deployment"], line["message"]): line for line in lines}
    assert set(found) == expected and len(lines) == len(expected), "one line of each"
    request, seen = found["Ingress", "request"], found["Ingress", "picture"]
    assert (request["method"], request["route"], request["status"], request["code"]) == (
        "POST",
        "/v1/analyze",
        200,
        "ok",
    )
    assert request["duration_ms"] >= seen["timings_ms"]["total"] > 0 and request["pictures"] == 1
    for stage in stages:
        line = found[stage.capitalize(), "stage"]
        assert record["models"][stage].endswith(f"#{line['revision']}") and line["code"] == "ok"
        assert line["computed_ms"] > 0 and seen["revisions"][stage] == line["revision"]
    text = json.dumps(lines)
    assert record["caption"]["text"] not in text and record["sha256"] not in text and record["id"] not in text


def test_an_id_is_made_where_there_is_none_that_can_be_used_and_problems_name_it(service: SmallService) -> None:
    for sent in (b"\xff\xfe", b"a" * 200, None):
        headers = {} if sent is None else {b"X-Request-ID": sent}
        refused = HTTP.post(f"{service.url}/v1/analyze", content=b"", headers=headers)
        assert refused.status_code == 400
        made = refused.headers["x-request-id"]
        assert re.fullmatch("[0-9a-f-]{36}", made) and refused.json()["request_id"] == made
    (line,) = (line for line in logged(service, made, {("Ingress", "request")}) if line["message"] == "request")
    assert (line["status"], line["code"]) == (400, "empty_body")


def test_a_request_whose_sender_wants_it_is_one_trace_across_all_replicas(service: SmallService) -> None:
    trace, sender = "5bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
    headers = {"traceparent": f"00-{trace}-{sender}-01", "x-request-id": "traced-71"}
    assert HTTP.post(f"{service.url}/v1/analyze", content=picture(71), headers=headers).status_code == 200
    wanted = {"wait for a place", "read body", "decode", "wait for a batch", "compute a batch", "generate"}
    wanted |= {f"stage {stage}" for stage in ("detector", "captioner", "tagger")}
    wanted |= {f"replica_handle_request {name}" for name in ("Detector detect", "Captioner caption", "Tagger tag")}
    wanted |= {f"route_to_replica {name}" for name in ("Detector detect", "Captioner caption", "Tagger tag")}
    limit, spans = time.monotonic() + 60, []
    while not wanted <= {span["name"] for span in spans}:
        assert time.monotonic() < limit, sorted(span["name"] for span in spans)
        time.sleep(0.5)
        files = list((service.folder / "traces").glob("*.jsonl"))
        spans = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    assert {span["context"]["trace_id"] for span in spans} == {f"0x{trace}"}, "nobody else asked"
    by_id = {span["context"]["span_id"]: span for span in spans}

    def way(span: dict[str, Any]) -> list[str]:
        """Names from a span up to what the sender named."""
        names = [span["name"]]
        while span["parent_id"] != f"0x{sender}":
            span = by_id[span["parent_id"]]
            names.append(span["name"])
        return names

    ways = [way(span) for span in spans]
    assert {" ".join(names[-1].split()[:2]) for names in ways} == {"replica_handle_request Ingress"}, ways
    for stage, call in (("detector", "Detector detect"), ("captioner", "Captioner caption")):
        steps = ["compute a batch", f"replica_handle_request {call}", f"route_to_replica {call}", f"stage {stage}"]
        assert any(names[:4] == steps for names in ways), ways
    assert any(names[:2] == ["generate", "replica_handle_request Tagger tag"] for names in ways)
    pids = {span["resource"]["attributes"]["process.pid"] for span in spans}
    assert len(pids) == 4, "ingress and three models"
    (line,) = (line for line in logged(service, "traced-71", {("Ingress", "request")}) if line["message"] == "request")
    assert line["trace_id"] == trace


def drift(service: SmallService) -> dict[str, Any]:
    """What the watcher for drift says of the detector in production."""
    return HTTP.get(f"{service.url}/v1/models", timeout=60).json()["detector"]["drift"]


def test_pictures_of_another_kind_are_an_alarm_and_a_report_shows_them(service: SmallService, tmp_path: Path) -> None:
    limit, number, sent = time.monotonic() + 180, 0, set()
    while not (state := drift(service)).get("alarm") and time.monotonic() < limit:
        for _ in range(8):
            buffer = io.BytesIO()
            Image.effect_noise((40 + number % 7, 160), 20).convert("RGB").save(buffer, "JPEG", quality=12)
            record = HTTP.post(f"{service.url}/v1/detect", content=buffer.getvalue(), timeout=120).json()
            sent.add(record["sha256"])
            number += 1
    assert state["alarm"] and state["watching"] and state["filled"] == 1, state
    assert max(state["ratios"].values()) > 1 and state["revision"] == record["models"]["detector"].split("#")[1]

    page = tmp_path / "drift.html"
    while time.monotonic() < limit:  # what is kept is on its way into the store
        with contextlib.suppress(SystemExit):
            drift_report.main(["--output", str(page)])
            break
        time.sleep(1)
    text = page.read_text()
    shown = set(re.findall(r"<code>([0-9a-f]{16})</code>", text))
    assert "<svg" in text and "drift</span>" in text
    assert len(shown & {sha256[:16] for sha256 in sent}) >= 8, "the pictures that drove it"


def later(service: SmallService, content: bytes, **headers: str) -> httpx.Response:
    return HTTP.post(f"{service.url}/v1/analyze", content=content, headers={"prefer": "respond-async"} | headers)


def fetched(service: SmallService, place: str, timeout_s: float = 120) -> httpx.Response:
    """What is at a place as soon as it is an answer."""
    limit = time.monotonic() + timeout_s
    while (answer := HTTP.get(f"{service.url}{place}")).status_code == 202 and time.monotonic() < limit:
        time.sleep(0.2)
    return answer


def test_who_can_wait_gets_a_place_and_finds_the_same_answer_there(service: SmallService) -> None:
    accepted = later(service, picture(60), **{"idempotency-key": "upload-60"})
    assert (accepted.status_code, accepted.headers["preference-applied"]) == (202, "respond-async")
    place = accepted.headers["location"]
    assert place == f"/v1/results/{accepted.json()['id']}" and accepted.json()["status"] == "waiting"
    again = later(service, picture(60), **{"idempotency-key": "upload-60"})
    assert again.headers["location"] == place
    assert later(service, picture(61), **{"idempotency-key": "upload-60"}).status_code == 409

    record, at_once = fetched(service, place).json(), post(service, 60).json()
    assert record["errors"] == [] and record["models"] == at_once["models"]
    assert (record["caption"], record["tags"]) == (at_once["caption"], at_once["tags"])
    assert record["detection"]["ai_probability"] == pytest.approx(at_once["detection"]["ai_probability"], abs=1e-3)
    event = {"id": record["id"], "part": "verdict", "right": True}
    assert HTTP.post(f"{service.url}/v1/feedback", json=event).status_code == 201, "it is kept as others are"

    files = [("file", ("a", picture(62))), ("file", ("b", b"no picture")), ("file", ("c", b""))]
    several = HTTP.post(f"{service.url}/v1/analyze", files=files, headers={"prefer": "respond-async"})
    items = fetched(service, several.headers["location"]).json()["items"]
    assert items[0]["caption"] and [item["code"] for item in items[1:]] == ["not_an_image", "empty_body"]

    refused = fetched(service, later(service, b"no picture").headers["location"])
    assert (refused.status_code, refused.json()["code"]) == (415, "not_an_image")
    assert refused.headers["content-type"] == "application/problem+json"
    assert later(service, b"").status_code == 400
    assert HTTP.get(f"{service.url}/v1/results/nowhere").status_code == 404


def test_a_request_sent_again_under_its_key_has_one_answer(service: SmallService) -> None:
    def send(number: int, path: str = "/v1/analyze", **parameters: str) -> httpx.Response:
        headers = {"idempotency-key": "upload-70"}
        return HTTP.post(f"{service.url}{path}", content=picture(number), headers=headers, params=parameters)

    one, other = 8_400_070, 8_400_071  # which no other test sends
    first = send(one).json()
    sha256 = hashlib.sha256(picture(one)).hexdigest()
    limit = time.monotonic() + 60
    while (again := send(one).json()) != first and time.monotonic() < limit:  # it is written a moment later
        assert (again["id"], again["sha256"]) == (first["id"], sha256)
    assert again == first, "timings and all"
    assert send(other).status_code == 409 and send(other).json()["code"] == "conflict"
    with_map = send(one, explain="png").json()
    assert with_map["id"] == first["id"] and with_map["detection"]["heat_map"]
    part = send(one, "/v1/detect").json()
    assert part["caption"] is None and part["id"] != first["id"], "another route is another request"
    rows = HTTP.delete(f"{service.url}/v1/pictures/{sha256}").json()
    assert rows["predictions"] == 2, "each was kept once"
    assert send(other).status_code == 200, "with the answer the name is gone"


def told(service: SmallService, hook: Hook, number: int, request_id: str) -> tuple[str, dict[str, str], dict[str, Any]]:
    """Send a picture, wait to be told of its answer: its place, and the headers and body of the call."""
    before = len(hook.came)
    accepted = later(service, picture(number), **{"callback-url": f"{hook.url}/done", "x-request-id": request_id})
    assert accepted.status_code == 202, accepted.text
    limit = time.monotonic() + 120
    while len(hook.came) == before and time.monotonic() < limit:
        time.sleep(0.1)
    path, headers, body = hook.came[before]
    assert path == "/done"
    return accepted.headers["location"], headers, json.loads(body)


def test_who_can_wait_is_told_where_that_is_allowed_and_all_of_it_bears_the_requests_id(
    service: SmallService, hook: Hook
) -> None:
    place, headers, body = told(service, hook, 63, "told-63")
    assert body["result"] == place and body["answer"] == HTTP.get(f"{service.url}{place}").json()
    assert headers["x-request-id"] == "told-63" and headers["deeptrust-signature"].startswith("t=")
    expected = {("Ingress", message) for message in ("request", "picture", "callback")}
    lines = logged(service, "told-63", expected | {("Detector", "stage"), ("Tagger", "stage")})
    (line,) = (line for line in lines if line["message"] == "callback")
    assert (line["outcome"], line["status"], line["attempt"]) == ("delivered", 204, 1)
    for address in ("https://elsewhere.example.com/", "http://localhost/", hook.url.replace("http", "https")):
        refused = later(service, picture(63), **{"callback-url": address})
        assert (refused.status_code, refused.json()["code"]) == (422, "callback_refused")
    at_once = HTTP.post(f"{service.url}/v1/analyze", content=picture(63), headers={"callback-url": hook.url})
    assert at_once.json()["code"] == "callback_refused" and len(hook.came) == 1


def test_feedback_finds_the_answer_and_search_finds_both(service: SmallService) -> None:
    record = post(service, 5).json()
    event = {"id": record["id"], "part": "verdict", "right": False, "value": "human"}
    said = HTTP.post(f"{service.url}/v1/feedback", json=event, timeout=120)
    assert said.status_code == 201, said.text
    assert said.json()["picture"] == "wanted"
    kept = HTTP.put(f"{service.url}/v1/pictures/{record['sha256']}", content=picture(5), timeout=120)
    assert kept.status_code == 201, kept.text
    (item,) = HTTP.get(f"{service.url}/v1/search", params={"limit": 1}, timeout=120).json()["items"]
    assert item["annotation"] == record and item["picture"] and item["feedback"] == ["verdict"]
    assert HTTP.get(f"{service.url}/v1/store", timeout=120).json()["dropped"] == 0


def test_models_are_exchanged_under_load_and_no_request_is_lost(service: SmallService) -> None:
    before = {name: service.replicas(name) for name in ("Detector", "Captioner")}
    with Load(service, "/v1/analyze?tasks=detect,caption", CLIENTS) as load:
        load.wait_for(lambda record: True)
        for model in ("detector", "captioner"):
            name = model.capitalize()
            service.deployment(name)["user_config"]["uri"] = str(service.folder / f"{model}-1")
            service.redeploy()
            load.wait_for(lambda record, model=model: f"/{model}-1#" in record["models"].get(model, ""))
    assert {answer.status_code for answer in load.answers} == {200}
    records = [answer.json() for answer in load.answers]
    assert [record["errors"] for record in records if record["errors"]] == []
    for model in ("detector", "captioner"):
        served = {record["models"][model].split("#")[0].rsplit("/", 1)[1] for record in records}
        assert served == {f"{model}-0", f"{model}-1"}
    assert {name: service.replicas(name) for name in before} == before, "exchanged in place: no replica was replaced"
    late = post(service, 2, "/v1/analyze?tasks=detect,caption").json()
    assert "/detector-1#" in late["models"]["detector"] and "/captioner-1#" in late["models"]["captioner"]


def test_a_canary_gets_its_share_by_the_picture_and_the_same_picture_the_same_model(service: SmallService) -> None:
    share = 0.3

    def has_canary() -> dict[str, Any]:
        return HTTP.get(f"{service.url}/v1/models", timeout=60).json()["detector"].get("canary") or {}

    assert service.replicas("DetectorCanary") == []
    service.deployment("Ingress")["user_config"]["canary"]["detector"] = share
    with Load(service, "/v1/detect", CLIENTS) as load:
        service.redeploy()
        load.wait_for(lambda record: "/detector-2#" in record["models"]["detector"])
        assert has_canary()["share"] == share and has_canary()["uri"].endswith("/detector-2")
    assert {answer.status_code for answer in load.answers} == {200}
    assert [answer.json()["errors"] for answer in load.answers if answer.json()["errors"]] == []

    with ThreadPoolExecutor(CLIENTS) as pool:
        first, again = (
            list(pool.map(lambda number: post(service, number, "/v1/detect").json(), range(60))) for _ in "ab"
        )
    on_canary = 0
    for record, twin in zip(first, again, strict=True):
        chosen = "/detector-2#" in record["models"]["detector"]
        assert chosen == (int(record["sha256"][:8], 16) / 2**32 < share)
        assert twin["models"] == record["models"]
        assert twin["detection"]["ai_probability"] == pytest.approx(record["detection"]["ai_probability"], abs=1e-3)
        on_canary += chosen
    assert 0.05 < on_canary / len(first) < 0.6, "beyond it by chance: once in 300,000 times"
    assert all("/captioner" not in record["models"] for record in first)

    service.deployment("Ingress")["user_config"]["canary"]["detector"] = 0.0
    with Load(service, "/v1/detect", CLIENTS) as load:
        service.redeploy()
        limit = time.monotonic() + 60
        while has_canary() and time.monotonic() < limit:
            time.sleep(0.2)
    assert {answer.status_code for answer in load.answers} == {200}
    assert "/detector-1#" in post(service, int(on_canary)).json()["models"]["detector"]


@pytest.fixture
def halted_engine(service: SmallService) -> Iterator[None]:
    """vLLM's processes stand still: they are there, and answer nothing."""
    engines = service.engines()
    assert engines
    for engine in engines:
        engine.suspend()
    yield
    for engine in engines:
        engine.resume()


def test_a_stage_that_is_late_is_null_and_the_others_answer_in_time(service: SmallService, halted_engine: None) -> None:
    started = time.monotonic()
    answer = post(service, 3)
    assert answer.status_code == 200, answer.text
    record = answer.json()
    assert record["detection"] and record["caption"] and record["tags"] is None
    assert [(error["stage"], error["code"]) for error in record["errors"]] == [("tagger", "timeout")]
    assert record["timings_ms"]["total"] < (REQUEST_TIMEOUT_S + 5) * 1000
    assert time.monotonic() - started < REQUEST_TIMEOUT_S + 30


@pytest.mark.proof
def test_a_client_that_goes_away_takes_its_work_with_it(service: SmallService, halted_engine: None) -> None:
    def leave(number: int) -> bool:
        try:
            post(service, 10 + number, timeout=3)
        except httpx.TimeoutException:
            return True
        return False

    with ThreadPoolExecutor(CLIENTS) as pool:
        assert all(pool.map(leave, range(TAGGER_REQUESTS)))
        time.sleep(2)  # on its way from the proxy to the engine; the work itself would go on for nine seconds more
        # those who left filled the tagger: were their work still in it, others would be refused as `overloaded`
        records = [answer.json() for answer in pool.map(lambda n: post(service, 20 + n), range(TAGGER_REQUESTS))]
    assert [error["code"] for record in records for error in record["errors"]] == ["timeout"] * TAGGER_REQUESTS


def test_after_a_standstill_it_goes_on(service: SmallService) -> None:
    limit = time.monotonic() + 120
    while (record := post(service, 30).json())["errors"] and time.monotonic() < limit:
        time.sleep(1)
    assert record["errors"] == [] and record["tags"] is not None


def exported(service: SmallService) -> set[str]:
    """Names of everything that Prometheus would read off this instance."""
    found: set[str] = set()
    for group in json.loads((cluster.instance_folder(service.port) / "ray" / DISCOVERY).read_text()):
        for target in group["targets"]:
            with contextlib.suppress(httpx.HTTPError):  # of a process that is being started again: at the next look
                lines = HTTP.get(f"http://{target}/metrics", timeout=60).text.splitlines()
                found |= {re.split(r"[{ ]", line)[0] for line in lines if not line.startswith("#")}
    return found


def test_every_metric_that_dashboards_and_alerts_ask_for_is_exported(service: SmallService) -> None:
    wanted = {name for name in needed() if name != "up" and not name.startswith(ELSEWHERE)}
    # asked while all replicas live: those of a dead one go with it; Ray's workers hand theirs on every ten seconds
    limit = time.monotonic() + 90
    while (missing := wanted - exported(service)) and time.monotonic() < limit:
        time.sleep(2)
    assert missing == set()


@pytest.fixture
def trial(service: SmallService) -> Iterator[None]:
    """A canary of the detector that answers a part of the pictures."""
    share = service.deployment("Ingress")["user_config"]["canary"]
    share["detector"] = 0.3
    service.redeploy()
    with Load(service, "/v1/detect", CLIENTS) as load:
        load.wait_for(lambda record: "/detector-2#" in record["models"].get("detector", ""), 300)
    yield
    share["detector"] = 0.0
    service.redeploy()


@pytest.mark.proof
@pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus: apt-get install prometheus")
def test_every_panel_shows_something_and_every_rule_is_evaluated(
    service: SmallService, hook: Hook, trial: None
) -> None:
    # what has never happened is not counted
    told(service, hook, 64, "told-64")
    feedback = {"id": post(service, 65).json()["id"], "part": "verdict", "right": True}
    assert HTTP.post(f"{service.url}/v1/feedback", json=feedback).status_code == 201
    port = cluster.free_port()
    command = [sys.executable, "-m", "app.monitoring", "--listen", f"127.0.0.1:{port}"]
    prometheus = subprocess.Popen(command, env=os.environ | {"PORT": str(service.port)}, cwd=ROOT)
    queries = [query for query in panels() if not any(name in query for name in ELSEWHERE)]
    assert len(queries) > 30
    try:
        with Load(service, "/v1/analyze", CLIENTS):
            limit, empty = time.monotonic() + 300, queries
            while empty and time.monotonic() < limit:
                time.sleep(5)
                with contextlib.suppress(httpx.HTTPError):
                    empty = [query for query in empty if not ask(port, "query", query=query)["result"]]
            assert empty == [], ask(port, "targets")["activeTargets"]
            (groups,) = ask(port, "rules").values()
            rules = [rule for group in groups for rule in group["rules"]]
            assert len(rules) > 10 and {rule["health"] for rule in rules} == {"ok"}
    finally:
        prometheus.terminate()
        prometheus.wait(60)


def ask(port: int, what: str, **parameters: str) -> Any:
    """An answer of Prometheus's HTTP API."""
    answer = HTTP.get(f"http://127.0.0.1:{port}/api/v1/{what}", params=parameters, timeout=60).json()
    assert answer["status"] == "success", answer
    return answer["data"]


@pytest.mark.proof
@pytest.mark.skipif(find_chromium() is None, reason="no Chromium: apt-get install chromium")
def test_rays_dashboard_shows_the_graph_its_node_and_its_replicas(service: SmallService, tmp_path: Path) -> None:
    with chromium() as browser:
        page = dashboard(browser, service.instance().dashboard_url, cluster.token(service.port) or "")

        def seen(place: str, *texts: str) -> str:
            page.goto(f"{service.instance().dashboard_url}/#/{place}")
            for text in texts:
                page.get_by_text(text).first.wait_for(timeout=60_000)
            page.wait_for_timeout(1000)
            page.screenshot(path=str(tmp_path / f"{place.replace('/', '-')}.png"))
            return str(page.locator("body").inner_text())

        graph = seen("serve", "deeptrust", "Tagger")
        for name in ("Ingress", "Detector", "Captioner", "Tagger", "Drift", "DetectorCanary"):
            assert name in graph, graph[:3000]
        assert "HEALTHY" in graph and "UNHEALTHY" not in graph
        assert "RUNNING" in seen("serve/applications/deeptrust", "Captioner")
        assert "ALIVE" in seen("cluster", "127.0.0.1")
        assert "Prometheus" in seen("metrics", "Grafana"), "without a Grafana it says what to start"
    print(tmp_path)


def test_replicas_and_the_engine_take_memory_from_jemalloc_and_the_model_is_in_the_engines_process(
    service: SmallService,
) -> None:
    (engine,) = service.engines()  # one process and not two: see deployments.tagger_engine
    assert "libjemalloc.so" in {Path(mapped.path).name for mapped in engine.memory_maps()}
    for deployment in ("Ingress", "Detector", "Captioner", "Tagger"):
        assert "libjemalloc.so" in service.memory_maps(deployment)


def test_a_stage_that_has_died_is_null_with_its_error(service: SmallService) -> None:
    for engine in service.engines():
        engine.send_signal(signal.SIGKILL)
    record = post(service, 40).json()
    assert record["detection"] and record["caption"] and record["tags"] is None
    (error,) = record["errors"]
    assert error["stage"] == "tagger" and error["code"] in {"failed", "unavailable", "timeout"}
    # what failed there must not bring its libraries here
    ingress = service.memory_maps("Ingress")
    assert ingress and not [name for name in ingress if name.startswith("libtorch")]


@pytest.mark.proof
def test_an_engine_that_is_killed_comes_back_by_itself_and_the_others_answer_meanwhile(service: SmallService) -> None:
    def answer() -> dict[str, Any]:
        record = post(service, 41).json()
        assert record["detection"] and record["caption"]
        return record

    limit = time.monotonic() + 300  # other tests may have left it without an engine
    while answer()["errors"] and time.monotonic() < limit:
        time.sleep(1)
    engines = service.engines()
    assert engines and answer()["errors"] == []
    for engine in engines:
        engine.send_signal(signal.SIGKILL)
    without: list[set[str]] = []
    limit = time.monotonic() + 300
    while (record := answer())["errors"] and time.monotonic() < limit:
        without.append({error["stage"] for error in record["errors"]})
        time.sleep(1)
    assert without and all(stages == {"tagger"} for stages in without), "nobody noticed that it was killed"
    assert record["errors"] == [] and record["tags"] is not None
    assert {engine.pid for engine in service.engines()}.isdisjoint(engine.pid for engine in engines)


def test_stop_leaves_no_process_no_port_and_no_file(service: SmallService) -> None:
    ports, processes = [port for _, port in service.listening()], cluster.processes(service.port)
    assert service.port in ports
    command = [sys.executable, "-m", "app.stop"]
    environment = os.environ | {"PORT": str(service.port)}
    ended = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith("stopped ")
    assert service.process.wait(60) is not None, "the command in the foreground ends as well"
    assert cluster.processes(service.port) == []
    assert not any(cluster.runs(process) for process in processes)
    for port in ports:
        with socket.socket() as client:
            assert client.connect_ex(("127.0.0.1", port)) != 0, f"port {port} is still open"
    assert not Path(cluster.instance_folder(service.port)).exists()
    again = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert (again.returncode, again.stdout.strip()) == (0, f"nothing with port {service.port} was running")
