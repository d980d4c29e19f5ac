"""API keys: who gets in, for what and how often; how they are made, kept and ended."""

from __future__ import annotations

import asyncio
import base64
import errno
import json
import os
import re
import stat
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from fastapi.routing import APIRoute
from starlette.routing import Mount, Route

from app import authentication, keys
from app.authentication import OPEN, RequireKey, check_exposure, is_operator, scope_of
from app.closing import Gate
from app.keys import VARIABLE, Bucket, KeyFileError, KeyRing, Quota, create, main, read_keys, revoke
from app.problems import MEDIA_TYPE, install
from tests.app.small_app import send

READ: frozenset[Any] = frozenset({"read"})


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "keys.json"
    monkeypatch.setenv(VARIABLE, str(path))
    # every request looks whether the file has changed
    monkeypatch.setattr(keys, "_LOOK_S", 0.0)
    return path


@pytest.fixture
def no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)


class Clock:
    """Stands for the module `time`: it is as late as the test says."""

    def __init__(self) -> None:
        self.later_s = 0.0

    def monotonic(self) -> float:
        return time.monotonic() + self.later_s

    time = staticmethod(time.time)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(keys, "time", made)
    return made


def app(share: keys.Share | None = None, **options: Any) -> FastAPI:
    made = FastAPI()
    install(made)

    @made.api_route("/{path:path}", methods=["GET", "POST", "PUT", "DELETE"])
    def anything(path: str, request: Request) -> dict[str, Any]:
        return {"path": path, "operator": is_operator(request.scope)}

    made.add_middleware(RequireKey, share=share, **options)
    return made


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def basic(key: str) -> dict[str, str]:
    return {"authorization": "Basic " + base64.b64encode(f"anybody:{key}".encode()).decode()}


def code(answer: httpx.Response) -> tuple[int, str]:
    if answer.status_code == 200:
        return 200, "ok"
    assert answer.headers["content-type"] == MEDIA_TYPE
    return answer.status_code, answer.json()["code"]


def as_host(host: str) -> dict[str, str]:
    return {"host": host}


@pytest.mark.parametrize(
    "host", ["localhost", "LocalHost:8000", "127.0.0.1", "127.0.0.1:8456", "127.8.9.1", "[::1]:8000"]
)
def test_without_a_file_everybody_may_ask(no_file: None, host: str) -> None:
    answer = send(app(), "GET", "/v1/models", headers=as_host(host))
    assert code(answer) == (200, "ok") and answer.json()["operator"]


@pytest.mark.parametrize(
    "host",
    [
        *(
            "evil.example",
            "evil.example:8000",
            "localhost.evil.example",
            "127.0.0.1.evil.example",
            "evil-localhost",
            "",
        ),
        *(
            "127.0.0.1@evil.example",
            "localhost:8000.evil.example",
            "127.1.evil",
            "[::2]",
            "0.0.0.0:8000",
            "localhost\xe9",
        ),
    ],
)
def test_without_a_file_a_page_whose_name_leads_here_is_refused(no_file: None, host: str) -> None:
    asked, headers = app(), {"host": host.encode("latin-1")}
    for method, path in (("GET", "/"), ("GET", "/v1/search"), ("DELETE", "/v1/pictures/0"), ("GET", "/healthz/")):
        refused = send(asked, method, path, headers=headers)
        assert code(refused) == (403, "host_refused") and "args.limits.hosts" in refused.json()["detail"]
    for path in OPEN:
        answer = send(asked, "GET", path, headers=headers)
        assert code(answer) == (200, "ok") and not answer.json()["operator"], "it watches, and is told no more"


def test_without_a_file_names_that_are_listed_may_be_asked_for(no_file: None) -> None:
    asked = app(hosts=lambda: ("photos.example.com", "[fd00::7]"))
    for host in ("photos.example.com", "Photos.Example.com:8443", "[fd00::7]:80", "localhost"):
        answer = send(asked, "GET", "/v1/search", headers=as_host(host))
        assert code(answer) == (200, "ok") and answer.json()["operator"], host
    for host in ("example.com", "x.photos.example.com", "photos.example.com.evil"):
        assert code(send(asked, "GET", "/v1/search", headers=as_host(host))) == (403, "host_refused"), host


def test_without_a_file_another_sites_page_can_send_nothing_and_programs_can(no_file: None) -> None:
    asked, here = app(hosts=lambda: ("photos.example.com",)), as_host("localhost:8000")
    for method, path in (("POST", "/v1/analyze"), ("POST", "/v1/feedback"), ("DELETE", "/v1/pictures/0")):
        for other in ("https://elsewhere.example", "null", "http://localhost:3000"):
            assert code(send(asked, method, path, headers=here | {"origin": other})) == (403, "forbidden")
        for own in ({}, {"origin": "http://localhost:8000"}, {"origin": "null", "sec-fetch-site": "same-origin"}):
            assert code(send(asked, method, path, headers=here | own)) == (200, "ok")
    proxied = as_host("photos.example.com") | {"origin": "https://photos.example.com"}
    assert code(send(asked, "POST", "/v1/analyze", headers=proxied)) == (200, "ok")
    # it can look at nothing: no answer says that another origin may read it
    assert code(send(asked, "GET", "/v1/search", headers=here | {"origin": "https://elsewhere.example"})) == (200, "ok")


def test_the_real_application_takes_the_listed_names_from_its_limits(
    no_file: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray import serve

    from app.config import Limits
    from app.ingress import api

    ingress = SimpleNamespace(limits=Limits(hosts=("photos.example.com",)), gate=Gate())
    monkeypatch.setattr(serve, "get_replica_context", lambda: SimpleNamespace(servable_object=ingress))
    monkeypatch.setattr(api, "middleware_stack", None)
    assert send(api, "GET", "/docs", headers=as_host("photos.example.com")).status_code == 200
    assert code(send(api, "GET", "/docs", headers=as_host("evil.example"))) == (403, "host_refused")


def test_with_keys_any_name_may_be_asked_for(file: Path) -> None:
    key = create(file, "backend", READ, 50, 100)
    answer = send(app(), "GET", "/v1/models", headers=bearer(key) | as_host("photos.example.com"))
    assert code(answer) == (200, "ok")


def test_with_keys_nothing_but_health_is_answered_without_one(file: Path) -> None:
    create(file, "backend", READ, 50, 100)
    asked = app()
    for path in ("/", "/docs", "/openapi.json", "/v1/models", "/v1/analyze", "/healthz/x", "/samples/a.jpg"):
        refused = send(asked, "GET", path)
        assert code(refused) == (401, "unauthorized"), path
        assert refused.headers["www-authenticate"].startswith("Basic")
    for path in ("/healthz", "/readyz"):
        assert code(send(asked, "GET", path)) == (200, "ok")


def routes_of(asked: FastAPI) -> list[tuple[str, str]]:
    """Every method and path that an application answers, parameters filled in, and a file of each folder."""
    found: list[tuple[str, str]] = []
    for route in asked.routes:
        if isinstance(route, Mount):
            found += [(method, f"{route.path}/swagger-ui.css") for method in ("GET", "HEAD")]
        else:
            assert isinstance(route, Route | APIRoute), f"{route!r}: what does this answer?"
            found += [(method, re.sub(r"{.*?}", "x", route.path)) for method in sorted(route.methods or ())]
    return found


def test_no_route_of_the_real_application_but_health_answers_without_a_key(file: Path) -> None:
    from app.ingress import api

    create(file, "backend", READ, 50, 100)
    asked = routes_of(api)
    known = {"/", "/docs", "/openapi.json", "/docs-files/swagger-ui.css", "/page/x", "/samples", "/v1/models"}
    known |= {"/v1/analyze", "/v1/results/x", "/v1/feedback", "/v1/search", "/v1/store", "/v1/pictures/x"}
    assert known <= {path for _, path in asked} and len(asked) > 20
    answers: dict[tuple[str, str], int] = {}

    async def ask() -> None:
        transport = httpx.ASGITransport(api, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            # whatever a path takes, it must not tell; nor may a slash or another method lead around the keys
            for _, path in asked:
                for method in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"):
                    if path not in OPEN:
                        answers[method, path] = (await client.request(method, path)).status_code
            for path in ("/healthz/", "/readyz/", "//v1/models", "/v1/models/", "/V1/MODELS", "/metrics", "/nowhere"):
                answers["GET", path] = (await client.get(f"http://test{path}")).status_code

    # built with the variable as it stands, as a replica that starts does
    api.middleware_stack, before = None, api.middleware_stack
    try:
        asyncio.run(ask())
        assert [entry for entry, status in answers.items() if status != 401] == []
        assert set(asked) - set(answers) == {("GET", path) for path in OPEN}
        assert {"/healthz", "/readyz"} == OPEN, "as README says"
    finally:
        api.middleware_stack = before


@pytest.mark.parametrize("way", [bearer, basic])
def test_a_key_opens_and_nothing_like_it_does(file: Path, way) -> None:
    key = create(file, "backend", READ, 50, 100)
    asked = app()
    assert code(send(asked, "POST", "/v1/analyze", headers=way(key))) == (200, "ok")
    other = create(file.with_name("other.json"), "other", READ, 50, 100)
    swapped = key[:12] + other[12:]
    for wrong in ("", "x", key[:-1], key + "A", key.swapcase(), other, swapped, " ", "dt_", key.replace("_", "-")):
        assert code(send(asked, "POST", "/v1/analyze", headers=way(wrong))) == (401, "unauthorized"), wrong
    for header in ("Basic", "Basic ===", "Basic " + base64.b64encode(b"\xff\xfe").decode(), f"Token{key}", "Bearer"):
        assert code(send(asked, "POST", "/v1/analyze", headers={"authorization": header}))[0] == 401, header


@pytest.mark.parametrize("credentials", ["\xe9", "=", "YQ", "/w==", "YTpi\xe9"])
def test_credentials_that_are_no_base64_are_no_key(file: Path, credentials: str) -> None:
    create(file, "backend", READ, 50, 100)
    asked, headers = app(), {"authorization": f"Basic {credentials}".encode("latin-1")}
    assert code(send(asked, "GET", "/v1/models", headers=headers)) == (401, "unauthorized")
    assert code(send(asked, "GET", "/healthz", headers=headers)) == (200, "ok")


def test_scopes(file: Path) -> None:
    made: dict[str, str] = {
        name: create(file, name, frozenset({name}), 50, 100)  # type: ignore[arg-type]
        for name in ("read", "feedback", "admin")
    }
    asked = app()
    wanted = {
        ("POST", "/v1/analyze"): "read",
        ("GET", "/v1/models"): "read",
        ("POST", "/v1/feedback"): "feedback",
        ("GET", "/v1/feedback/1"): "read",
        ("PUT", "/v1/pictures/0"): "feedback",
        ("GET", "/v1/pictures/0"): "read",
        ("DELETE", "/v1/pictures/0"): "admin",
        ("GET", "/v1/search"): "read",
        ("POST", "/v1/something-new"): "feedback",
        ("GET", "/v1/review"): "admin",
    }
    for (method, path), scope in wanted.items():
        assert scope_of(method, path) == scope
        for name, key in made.items():
            expected = (200, "ok") if name in (scope, "admin") else (403, "forbidden")
            assert code(send(asked, method, path, headers=bearer(key))) == expected, (method, path, name)


def test_a_days_requests_are_counted_until_midnight(file: Path) -> None:
    few = create(file, "few", READ, 50, 100, per_day=2)
    asked = app()
    assert [code(send(asked, "GET", "/", headers=bearer(few)))[0] for _ in range(2)] == [200, 200]
    refused = send(asked, "GET", "/", headers=bearer(few))
    assert code(refused) == (429, "quota_exceeded") and 0 < int(refused.headers["retry-after"]) <= 24 * 3600
    quota, noon = Quota(), 20000.5 * 24 * 3600
    assert [quota.take(1, noon), quota.take(1, noon + 1)] == [0, 12 * 3600 - 1]
    assert quota.take(1, noon + 12 * 3600) == 0, "at midnight it begins again"


def test_a_quota_holds_for_all_replicas_together_where_something_counts_for_them(
    file: Path, monkeypatch: pytest.MonkeyPatch, lines: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(authentication, "_SHARE_S", 0.0)
    few = create(file, "few", READ, 500, 500, per_day=10)
    totals, is_away = dict[tuple[str, int], int](), False

    async def share(day: int, uses: Mapping[str, int]) -> Mapping[str, int]:
        if is_away:
            raise ConnectionError("no database")
        for identity, used in uses.items():
            totals[identity, day] = totals.get((identity, day), 0) + used
        return {identity: totals[identity, day] for identity in uses}

    first, second = app(share=share), app(share=share)

    def ask(replica: FastAPI) -> int:
        return send(replica, "GET", "/", headers=bearer(few)).status_code

    assert [ask(replica) for replica in (first, second) * 5] == [200] * 10
    assert sum(totals.values()) == 10
    # each hears of the other's requests with its next one, and no later
    assert [ask(first), ask(second)].count(200) <= 1
    assert [ask(replica) for replica in (first, second) * 2] == [429] * 4

    other = create(file, "other", READ, 500, 500, per_day=10)
    is_away = True
    answers = [send(first, "GET", "/", headers=bearer(other)).status_code for _ in range(12)]
    assert answers == [200] * 10 + [429] * 2, "what cannot be shared is counted here"
    (warning,) = (record for record in lines.records if "this replica alone" in record.getMessage())
    assert "no database" in warning.getMessage()


def test_a_days_last_requests_are_shared_without_another_one(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(authentication, "_SHARE_S", 0.01)
    headers, told, go_on = bearer(create(file, "few", READ, 500, 500, per_day=10)), list[int](), asyncio.Event()

    async def share(day: int, uses: Mapping[str, int]) -> Mapping[str, int]:
        told.extend(uses.values())
        await go_on.wait()
        if len(told) == 2:
            raise ConnectionError("no database")
        return uses

    async def work() -> None:
        transport = httpx.ASGITransport(app(share=share))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            for _ in range(5):
                assert (await client.get("/", headers=headers)).status_code == 200
        assert told == [1]
        go_on.set()
        async with asyncio.timeout(60):
            while len(asyncio.all_tasks()) > 1:
                await asyncio.sleep(0.01)

    asyncio.run(work())
    assert told == [1, 4, 4], "again when it could not be, and then no more"


def document() -> Any:
    """Of a small application, as it is with keys or without."""
    from app.openapi import use_local_docs

    api = FastAPI()
    use_local_docs(api)
    api.get("/healthz")(lambda: None)
    api.get("/v1/models")(lambda: None)
    api.post("/v1/analyze")(lambda: None)
    return api.openapi()


def test_the_api_document_says_which_routes_want_a_key(file: Path) -> None:
    told = document()
    assert told["security"] == [{"key": []}, {"browser": []}]
    assert told["paths"]["/healthz"]["get"]["security"] == []
    models = told["paths"]["/v1/models"]["get"]
    assert "security" not in models and {"401", "403", "429"} <= set(models["responses"])
    assert "401" not in told["paths"]["/healthz"]["get"]["responses"]


def test_without_keys_the_api_document_says_which_routes_refuse_other_names_and_pages(no_file: None) -> None:
    told = document()
    refused = told["paths"]["/v1/models"]["get"]["responses"]["403"]
    assert set(refused["content"][MEDIA_TYPE]["examples"]) == {"host_refused"}
    refused = told["paths"]["/v1/analyze"]["post"]["responses"]["403"]
    assert set(refused["content"][MEDIA_TYPE]["examples"]) == {"host_refused", "forbidden"}
    assert "403" not in told["paths"]["/healthz"]["get"]["responses"] and "security" not in told


def test_a_revoked_key_is_refused_without_a_restart_and_the_others_are_not(file: Path) -> None:
    one, two = create(file, "one", READ, 50, 100), create(file, "two", READ, 50, 100)
    asked = app()
    assert code(send(asked, "GET", "/", headers=bearer(one))) == (200, "ok")
    revoke(file, "one")
    assert code(send(asked, "GET", "/", headers=bearer(one))) == (401, "unauthorized")
    assert code(send(asked, "GET", "/", headers=bearer(two))) == (200, "ok")
    again = create(file, "one", READ, 50, 100)  # the name is free again
    assert code(send(asked, "GET", "/", headers=bearer(again))) == (200, "ok")


def test_a_key_has_its_rate_and_does_not_eat_anothers(file: Path) -> None:
    slow, other = create(file, "slow", READ, 0.01, 3), create(file, "other", READ, 50, 100)
    asked = app()
    answers = [send(asked, "GET", "/", headers=bearer(slow)) for _ in range(5)]
    assert [code(answer) for answer in answers] == [(200, "ok")] * 3 + [(429, "rate_limited")] * 2
    assert 1 <= int(answers[-1].headers["retry-after"]) <= 100
    assert code(send(asked, "GET", "/", headers=bearer(other))) == (200, "ok")


def test_a_bucket_fills_at_its_rate_and_never_beyond_its_size() -> None:
    bucket = Bucket(2.0, 3, now=0.0)
    assert [bucket.take(0.0) for _ in range(4)] == [0, 0, 0, pytest.approx(0.5)]
    assert bucket.take(0.5) == 0 and bucket.take(0.5) > 0
    assert [bucket.take(1000.0) for _ in range(4)] == [0, 0, 0, pytest.approx(0.5)]


def test_another_sites_page_cannot_use_a_browsers_key(file: Path) -> None:
    key = create(file, "person", frozenset({"admin"}), 50, 100)
    asked = app()
    foreign = {"origin": "https://elsewhere.example"}
    assert code(send(asked, "POST", "/v1/feedback", headers=basic(key) | foreign)) == (403, "forbidden")
    for other in ("null", "", "http://[", "http://test.evil", "test", "http://test@elsewhere.example"):
        assert code(send(asked, "POST", "/v1/feedback", headers=basic(key) | {"origin": other})) == (403, "forbidden")
    assert code(send(asked, "POST", "/v1/feedback", headers=basic(key) | {"origin": "http://test"})) == (200, "ok")
    # behind a proxy that gives another `Host`: no page can make this header up
    behind = {"origin": "https://photos.example", "sec-fetch-site": "same-origin"}
    assert code(send(asked, "POST", "/v1/feedback", headers=basic(key) | behind)) == (200, "ok")
    # nobody but the caller itself sends this one
    assert code(send(asked, "POST", "/v1/feedback", headers=bearer(key) | foreign)) == (200, "ok")


def test_a_file_that_is_not_there_lets_nobody_in(file: Path, lines: pytest.LogCaptureFixture) -> None:
    key = create(file.with_name("other.json"), "x", READ, 50, 100)
    asked = app()
    for headers in ({}, bearer(key)):
        refused = send(asked, "GET", "/", headers=headers)
        assert code(refused) == (503, "unavailable") and int(refused.headers["retry-after"]) > 0
    assert code(send(asked, "GET", "/readyz")) == (200, "ok")
    assert "No such file" in lines.text and "all callers are refused" in lines.text


def test_a_file_that_breaks_leaves_in_who_was_for_a_minute_and_says_so(
    file: Path, clock: Clock, lines: pytest.LogCaptureFixture
) -> None:
    key, asked = create(file, "one", frozenset({"admin"}), 50, 100), app()

    def ask(later_s: float, path: str = "/", headers: Mapping[str, str] = bearer(key)) -> tuple[int, str]:
        clock.later_s = later_s
        return code(send(asked, "GET", path, headers=headers))

    assert ask(0) == (200, "ok")
    good = file.read_text()
    file.write_text("{")
    assert ask(keys._KEPT_S / 2) == (200, "ok")
    assert "no file of API keys" in lines.text and "known ones are taken for" in lines.text
    assert "all callers are refused" not in lines.text
    assert ask(keys._KEPT_S + 1) == (503, "unavailable"), "it may have been revoked"
    assert ask(keys._KEPT_S + 1, headers={}) == (503, "unavailable")
    assert ask(keys._KEPT_S + 1, "/readyz") == (200, "ok") and not send(asked, "GET", "/readyz").json()["operator"]
    assert "all callers are refused" in lines.records[-1].getMessage() and lines.records[-1].levelname == "ERROR"
    file.write_text(good)
    assert ask(keys._KEPT_S + 2) == (200, "ok"), "as soon as it can be read"


def test_a_file_that_goes_away_and_comes_back_as_it_was_is_known_again(file: Path, clock: Clock) -> None:
    key = create(file, "one", READ, 50, 100)
    ring = KeyRing(file)
    assert ring.find(key) is not None
    clock.later_s = 100 * keys._KEPT_S
    assert ring.find(key) is not None, "it has not changed, however long ago it was read"
    away = file.rename(file.with_name("away"))
    clock.later_s += keys._KEPT_S + 1
    assert ring.find(key) is None and not ring.is_known
    away.rename(file)
    assert ring.find(key) is not None


def test_the_file_holds_no_key_and_is_its_owners_alone(file: Path) -> None:
    key = create(file, "one", READ, 50, 100)
    text = file.read_text()
    assert key not in text and key.split("_", 2)[2] not in text
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert json.loads(text)["keys"][0]["name"] == "one"


def test_a_file_keeps_its_mode_owner_and_group(file: Path) -> None:
    create(file, "one", READ, 50, 100)
    own = (47101, 47102) if os.geteuid() == 0 else (os.geteuid(), os.getegid())
    os.chown(file, *own)
    file.chmod(0o640)
    create(file, "two", READ, 50, 100)
    revoke(file, "one")
    status = file.stat()
    assert (stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid) == (0o640, *own)


@pytest.mark.parametrize("step", ["open", "fchown", "fsync"])
def test_a_file_that_cannot_be_replaced_for_the_same_readers_stays_as_it_was(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], step: str
) -> None:
    create(file, "one", READ, 50, 100)
    before = file.read_bytes()

    def denied(*_: Any) -> int:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(keys.os, step, denied)
    for command in (["revoke", "one"], ["create", "two"]):
        with pytest.raises(
            SystemExit, match=r"error: cannot change .*, it is as it was: Operation not .*Run this as root"
        ):
            main(command)
    assert file.read_bytes() == before and not capsys.readouterr().out, "no key that does not exist is printed"
    assert [path.name for path in file.parent.iterdir() if path.name.endswith(".new")] == []


def test_a_file_that_may_not_be_read_is_said_so_by_commands_and_at_the_start(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create(file, "one", READ, 50, 100)

    def denied(_: Path) -> bytes:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", denied)
    for command in (["list"], ["revoke", "one"], ["create", "two"]):
        with pytest.raises(SystemExit, match=r"error: cannot read .*: Permission denied\. Let the user .* read it"):
            main(command)
    for host in ("127.0.0.1", "0.0.0.0", None):
        with pytest.raises(KeyFileError, match="cannot read"):
            check_exposure(host)


def test_a_place_where_no_file_can_be_is_one_line_of_a_command(file: Path) -> None:
    create(file, "one", READ, 50, 100)
    for command in (["create", "two"], ["revoke", "one"], ["list"]):
        with pytest.raises(SystemExit, match="error: cannot"):
            main([*command, "--file", str(file / "keys.json")])
        with pytest.raises(SystemExit, match="error: cannot"):
            main([*command, "--file", str(file.parent)])


def test_keys_made_at_the_same_time_are_all_kept(file: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda number: create(file, f"key {number}", READ, 50, 100), range(24)))
    ring = KeyRing(file)
    assert all(ring.find(key) for key in made)


def test_commands(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["create", "backend", "--scopes", "read,feedback", "--per-second", "5"])
    key = capsys.readouterr().out.strip()
    found = KeyRing(file).find(key)
    assert found is not None and found.scopes == {"read", "feedback"} and found.per_second == 5
    main(["list"])
    listed = capsys.readouterr().out
    assert "backend" in listed and "feedback,read" in listed and key not in listed
    main(["revoke", "backend"])
    assert KeyRing(file).find(key) is None
    assert read_keys(file).keys[0].revoked


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["create", "a", "--scopes", "write"], "choose from read, feedback, admin"),
        (["revoke", "nobody"], "no key in use is named 'nobody'"),
        (["create", "taken"], "there is a key named 'taken'"),
    ],
)
def test_a_command_that_cannot_be_done_says_why(file: Path, arguments: list[str], complaint: str) -> None:
    create(file, "taken", READ, 50, 100)
    before = file.read_bytes()
    with pytest.raises(SystemExit, match=complaint):
        main(arguments)
    assert file.read_bytes() == before


def test_without_a_file_a_command_says_which_to_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    with pytest.raises(SystemExit, match=VARIABLE):
        main(["list"])


def test_beyond_loopback_it_wants_keys_that_it_can_read(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KeyFileError, match="cannot read"):
        check_exposure("127.0.0.1")
    create(file, "one", READ, 50, 100)
    check_exposure("127.0.0.1")
    check_exposure("0.0.0.0")
    revoke(file, "one")
    with pytest.raises(KeyFileError, match="holds no key in use"):
        check_exposure("0.0.0.0")
    monkeypatch.delenv(VARIABLE)
    for host in ("127.0.0.1", "localhost", None):
        check_exposure(host)
    for host in ("0.0.0.0", "192.0.2.1", "::"):
        with pytest.raises(KeyFileError, match="loopback only"):
            check_exposure(host)


def test_a_file_of_something_else_is_no_file_of_keys(tmp_path: Path) -> None:
    (tmp_path / "keys.json").write_text('{"keys": [{"name": "x"}]}')
    with pytest.raises(KeyFileError, match="no file of API keys"):
        create(tmp_path / "keys.json", "y", READ, 50, 100)
