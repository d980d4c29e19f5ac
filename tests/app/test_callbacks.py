"""Call-backs: whom a sender may name, what is sent and signed, and that whoever is to be told is told, whoever dies."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError

from app import callbacks
from app.callbacks import Callbacks, CallbackSettings, is_public
from app.problems import Problem
from app.store import callbacks as rows
from app.store import deferred
from app.store.database import StoreUnavailable
from app.store.deferred import Accepted, Outcome
from app.store.events import KeyConflict
from app.store.settings import StoreSettings
from app.store.store import Store
from deployments import telemetry
from deployments.annotation import Annotation, Caption
from tests.app.hook import Hook, listening
from tests.waiting import wait_for

ROOT = Path(__file__).parents[2]
SECRET = "0123456789abcdef0123456789abcdef"
HOOK = "https://hooks.example.com/deeptrust"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Something to sign with, and little patience."""
    monkeypatch.setenv(callbacks.SECRET_VARIABLE, SECRET)
    monkeypatch.setattr(callbacks, "_LOOK_S", 0.05)
    monkeypatch.setattr(callbacks, "_FIRST_PAUSE_S", 0.05)


# ---- addresses -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        *(HOOK, f"{HOOK}/", f"{HOOK}/a/b?id=7&x=%20", "https://HOOKS.example.com:443/deeptrust/a"),
        *("http://127.0.0.1:9000/here", "https://10.1.2.3/x", "https://[fd00::7]:8443/x"),
    ],
)
def test_addresses_under_an_entry_are_allowed(url: str) -> None:
    allow = (HOOK, "http://127.0.0.1:9000", "https://10.1.2.3/x", "https://[fd00::7]:8443/")
    checked(allow, url)


@pytest.mark.parametrize(
    "url",
    [
        # another host, port, scheme or path
        *(
            "https://hooks.example.com/",
            "https://hooks.example.com/deeptrustee",
            "https://hooks.example.com:8443/deeptrust",
        ),
        *(
            "https://hooks.example.com.evil.org/deeptrust",
            "https://example.com/deeptrust",
            "https://evil.org/deeptrust",
        ),
        *("http://hooks.example.com/deeptrust", "ftp://hooks.example.com/deeptrust", "//hooks.example.com/deeptrust"),
        *("https://hooks.example.com./deeptrust", "https://hooks.example.com:0/deeptrust", "https:///deeptrust", ""),
        # up and out of the path
        *(f"{HOOK}/../admin", f"{HOOK}/%2e%2e/admin", f"{HOOK}/%2E./admin", f"{HOOK}%2f..%2fadmin", f"{HOOK}/."),
        *(f"{HOOK}/..;/admin", f"{HOOK}/..;x=1/admin", f"{HOOK}/..%3b/admin"),
        # what parsers read differently
        *("https://hooks.example.com@evil.org/deeptrust", "https://evil.org@hooks.example.com/deeptrust"),
        *("https://hooks.example.com\\@evil.org/deeptrust", "https://evil.org#@hooks.example.com/deeptrust"),
        *(f"{HOOK}#x", f"{HOOK}\r\nHost: evil.org", f"{HOOK} ", f"\t{HOOK}", "https://hooks.example.com:x/deeptrust"),
        *("https://hooks。example.com/deeptrust", f"{HOOK}/\u2025/x", f"{HOOK}/{'a' * 2048}"),
        # the own machine and network
        *("http://127.0.0.1/deeptrust", "http://localhost/deeptrust", "http://169.254.169.254/latest/meta-data"),
        *("http://2130706433/", "http://0x7f.1/", "http://[::1]/", "https://10.1.2.3/"),
    ],
)
def test_all_others_are_refused_with_a_problem(url: str) -> None:
    with pytest.raises(Problem) as refused:
        checked((HOOK,), url)
    assert (refused.value.code, refused.value.status) == ("callback_refused", 422)
    assert url[:20] not in refused.value.detail or not url


def checked(allow: tuple[str, ...], url: str, waits: bool = True, is_possible: bool = True, **settings: Any) -> None:
    store: Any = SimpleNamespace(settings=StoreSettings(**settings))
    Callbacks(CallbackSettings(allow=allow), store, lambda outcome: None).check(url, waits, is_possible)


def test_it_is_refused_where_it_cannot_be_done_and_said_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def why(*arguments: Any, **settings: Any) -> str:
        with pytest.raises(Problem) as refused:
            checked(*arguments, **settings)
        assert refused.value.code == "callback_refused"
        return refused.value.detail

    assert "no address is on the list" in why((), HOOK)
    assert "respond-async" in why((HOOK,), HOOK, False)
    assert "keeps nothing" in why((HOOK,), HOOK, True, False, keep="off")
    assert "keeps nothing" in why((HOOK,), HOOK, True, False, max_deferred=0)
    settings = CallbackSettings(allow=(HOOK,))
    assert callbacks.why_not(settings) == "" and callbacks.why_not(CallbackSettings()) == ""
    monkeypatch.setenv(callbacks.SECRET_VARIABLE, "too short")
    assert "nothing to sign with" in why((HOOK,), HOOK) and "openssl rand" in callbacks.why_not(settings)
    monkeypatch.delenv(callbacks.SECRET_VARIABLE)
    monkeypatch.setenv(callbacks.SECRET_FILE_VARIABLE, str(tmp_path / "secret"))
    assert "nothing to sign with" in why((HOOK,), HOOK)
    (tmp_path / "secret").write_text(f"{SECRET}\n{SECRET[::-1]}\n")
    checked((HOOK,), HOOK)
    assert callbacks.secrets() == [SECRET.encode(), SECRET[::-1].encode()]


def test_while_the_store_does_not_answer_it_is_tried_again_and_what_is_not_allowed_is_not() -> None:
    with pytest.raises(Problem) as later:
        checked((HOOK,), HOOK, is_possible=False)
    assert later.value.code == "unavailable" and int(later.value.headers["Retry-After"]) > 0
    with pytest.raises(Problem) as refused:
        checked((HOOK,), "https://elsewhere.example/", is_possible=False)
    assert refused.value.code == "callback_refused"


@pytest.mark.parametrize("entry", ["hooks.example.com", "http://hooks.example.com/", "https://a@b.org/", f"{HOOK}?x=1"])
def test_a_list_that_says_something_else_than_it_seems_is_refused(entry: str) -> None:
    with pytest.raises(ValidationError, match="allow"):
        CallbackSettings(allow=(entry,))


@pytest.mark.parametrize(
    "text",
    [
        *("127.0.0.1", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0"),
        *("224.0.0.1", "255.255.255.255", "192.0.2.1", "198.18.0.1"),
        *("::1", "::", "fe80::1", "fd00::1", "ff02::1", "ff0e::1", "fec0::1", "2001:db8::1", "4000::1"),
        # IPv4 in IPv6: mapped, translated, compatible, by NAT64 (well-known and local), 6to4, Teredo
        *("::ffff:10.0.0.1", "::ffff:0:10.0.0.1", "::10.0.0.1", "64:ff9b::10.0.0.1", "64:ff9b:1::a00:1"),
        *("2002:7f00:1::1", "2002:a00:1::1", "2001:0:5ef5:79fd:0:0:f5ff:fffe"),
    ],
)
def test_addresses_of_own_networks_are_told_however_they_are_written(text: str) -> None:
    assert not is_public(text)


@pytest.mark.parametrize(
    "text",
    [
        *("93.184.215.14", "2606:2800:21f:cb07:6820:80da:af6b:8b2c"),
        *("::ffff:93.184.215.14", "64:ff9b::93.184.215.14", "2002:5db8:d70e::1"),
    ],
)
def test_addresses_of_the_internet_are_too(text: str) -> None:
    assert is_public(text)


# ---- what is sent --------------------------------------------------------------------------------------------------


def test_what_the_documentation_shows_verifies_a_signature_and_nothing_else() -> None:
    text = (ROOT / "docs" / "callbacks.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    shown: dict[str, Any] = {}
    exec(example, shown)
    is_genuine = shown["is_genuine"]
    body, now = b'{"id": "x"}', int(time.time())
    signed = callbacks.signature(body, now, [b"another" * 8, SECRET.encode()])
    assert is_genuine(SECRET.encode(), signed, body)
    assert not is_genuine(SECRET.encode(), signed, body + b" ")
    assert not is_genuine(b"c" * 32, signed, body)
    assert not is_genuine(SECRET.encode(), signed.replace(f"t={now}", f"t={now + 1}"), body)
    assert not is_genuine(SECRET.encode(), callbacks.signature(body, now - 3600, [SECRET.encode()]), body), "too old"
    assert not is_genuine(SECRET.encode(), "nonsense", body)


def test_a_body_says_what_the_place_answers_or_where_to_fetch_it() -> None:
    one = [Outcome(0, 200, '{"id": "a"}')]
    said = {"id": "p", "result": "/v1/results/p", "status": 200}
    assert json.loads(callbacks.body_of("p", one, 1024)) == said | {"answer": {"id": "a"}}
    refused = Outcome(1, 415, '{"code": "not_an_image"}')
    final = {"code": "not_an_image", "final": True}
    assert json.loads(callbacks.body_of("p", [*one, refused], 1024))["answer"] == {"items": [{"id": "a"}, final]}
    assert json.loads(callbacks.body_of("p", [refused], 1024)) == said | {"status": 415, "answer": final}
    large = [Outcome(0, 200, json.dumps({"id": "a" * 1024}))]
    assert json.loads(callbacks.body_of("p", large, 1024)) == said | {"answer": None}


# ---- telling -------------------------------------------------------------------------------------------------------


@pytest.fixture
def hook() -> Iterator[Hook]:
    with listening() as made:
        yield made


@pytest.fixture
def store(database_url: str) -> Iterator[Store]:
    with opened(database_url) as made:
        yield made


@pytest.fixture
def one_store(tmp_path: Path) -> Iterator[Store]:
    """Where the database makes no difference."""
    with opened(f"sqlite:///{tmp_path}/store.db") as made:
        yield made


@contextlib.contextmanager
def opened(url: str) -> Iterator[Store]:
    made = Store(StoreSettings(url=url, timeout_s=60, search_timeout_s=60))
    made.start()
    yield made
    made.close()


def accepted(number: int, status: int = 0) -> Accepted:
    data = f"picture {number}".encode()
    return Accepted(f"mine-{number}", hashlib.sha256(data).hexdigest(), data, status, '{"code": "x"}' if status else "")


def put(store: Store, place: str, url: str | None, *pictures: Accepted, request_id: str | None = None) -> None:
    asyncio.run(taken_in(store, place, url, *pictures, request_id=request_id))


async def taken_in(
    store: Store, place: str, url: str | None, *pictures: Accepted, request_id: str | None = None
) -> None:
    named = f"request-{place}" if request_id is None else request_id
    run = partial(deferred.put, place=place, tasks="tag", explain="", pictures=pictures, max_count=99, max_bytes=2**20)
    await store.commit(partial(run, callback=url, request_id=named))


def answer(store: Store, most: int = 99) -> None:
    for leased in asyncio.run(store.commit(partial(deferred.lease, now_s=time.time(), lease_s=60, most=most))):
        record = Annotation(
            id=leased.answer_id, sha256=hashlib.sha256(leased.data).hexdigest(), caption=Caption(text="a")
        )
        finish = partial(deferred.finish, row_id=leased.id, status=200, answer=record.model_dump_json(), record=record)
        asyncio.run(store.commit(partial(finish, expires_s=None)))


def due(store: Store, now_s: float | None = None) -> list[rows.Due]:
    return look(store, now_s or time.time(), most=99).taken


def look(store: Store, now_s: float, most: int, **held: rows.Hold) -> rows.Turn:
    """A look at who is due, while hosts of `example.com` are held."""
    hosts = {f"{name}.example.com": hold for name, hold in held.items()}
    return asyncio.run(store.commit(partial(rows.lease, now_s=now_s, lease_s=60, most=most, held=hosts)))


def tell(store: Store, settings: CallbackSettings, until: Callable[[list[str]], bool], **options: Any) -> list[str]:
    """Tell who is due until outcomes are as wanted."""

    async def run() -> list[str]:
        outcomes: list[str] = []
        task = asyncio.create_task(Callbacks(settings, store, outcomes.append, **options).run())
        limit = time.monotonic() + 90
        while not until(outcomes):
            assert not task.done() and time.monotonic() < limit, outcomes
            await asyncio.sleep(0.02)
        task.cancel()
        return outcomes

    return asyncio.run(run())


def test_whoever_named_an_address_is_due_when_the_last_picture_is_answered(store: Store) -> None:
    put(store, "two", HOOK, accepted(0), accepted(1), accepted(2, status=415))
    put(store, "nobody", None, accepted(3))
    assert due(store) == []
    answer(store, most=1)
    assert due(store) == [], "one of them waits"
    answer(store)
    (found,) = due(store)
    assert (found.place, found.url, found.attempts, found.request_id) == ("two", HOOK, 1, "request-two")
    assert due(store) == [], "somebody is at it"
    (again,) = due(store, time.time() + 61)
    assert again.attempts == 2, "who was at it is dead"
    asyncio.run(store.commit(partial(rows.put_off, due=found, until_s=0)))
    assert due(store) == [], "and has nothing to say any more, if he is not"
    assert asyncio.run(store.commit(partial(rows.end, place="two", ending="delivered")))
    assert not asyncio.run(store.commit(partial(rows.end, place="two", ending="given_up")))
    assert due(store, time.time() + 1000) == [] and asyncio.run(store.read(rows.count)) == 0


def test_what_is_refused_at_once_and_what_is_deleted_is_no_reason_to_wait(store: Store) -> None:
    put(store, "refused", HOOK, accepted(0, status=415))
    put(store, "deleted", HOOK, accepted(1))
    put(store, "half", HOOK, accepted(2), accepted(3))
    assert [found.place for found in due(store)] == ["refused"]
    asyncio.run(store.delete_picture(accepted(1).sha256))
    asyncio.run(store.delete_picture(accepted(2).sha256))
    assert [found.place for found in due(store)] == ["deleted"]
    answer(store)
    assert [found.place for found in due(store)] == ["half"]


def test_the_same_request_has_one_call_back_and_another_address_is_another_request(store: Store) -> None:
    put(store, "key", HOOK, accepted(0))
    put(store, "key", HOOK, accepted(0))
    for other in (None, f"{HOOK}/other"):
        with pytest.raises(KeyConflict):
            put(store, "key", other, accepted(0))
    answer(store)
    assert len(due(store)) == 1


def test_a_request_whose_pictures_were_deleted_may_come_again_with_another_address_or_none(store: Store) -> None:
    for url in (HOOK, HOOK, f"{HOOK}/other"):
        put(store, "key", url, accepted(0))
        assert due(store) == []
        asyncio.run(store.delete_picture(accepted(0).sha256))
        assert [found.url for found in due(store)] == [url]
    put(store, "key", None, accepted(0))
    answer(store)
    assert due(store, time.time() + 1000) == []


def put_in_turn(store: Store, **urls: str) -> None:
    """Answered already, and each due after the one before."""
    for place, url in urls.items():
        put(store, place, url, accepted(0, status=415))
        time.sleep(0.002)  # each has a millisecond of its own


def test_who_is_due_at_a_host_that_is_held_is_put_off_and_others_behind_them_are_found(store: Store) -> None:
    away = ["https://a.example.com/", "https://A.example.com:8443/b", "https://a.example.com?c"]
    put_in_turn(store, **{f"away-{number}": url for number, url in enumerate(away)})
    put_in_turn(store, longer="https://a.example.com.example.org/", other="https://b.example.com/")
    now = time.time() + 1
    turn = look(store, now, 2, a=rows.Hold(until_s=now + 20))
    assert {found.place for found in turn.taken} == {"longer", "other"}
    assert (turn.put_off, turn.given_up) == (3, [])
    assert due(store, now + 19) == []
    turn = look(store, now + 21, 2, a=rows.Hold(until_s=now + 40, takes_one=True))
    assert len(turn.taken) == 1 and turn.put_off == 2
    found = due(store, now + 41)
    assert [one.attempts for one in found] == [1, 1] and {one.host for one in found} == {"a.example.com"}
    assert turn.taken[0].place not in {one.place for one in found}, "it is leased for longer"


def test_where_there_is_no_room_to_try_a_host_that_is_held_nobody_of_it_is_put_off(store: Store) -> None:
    put_in_turn(store, other="https://b.example.com/", one="https://a.example.com/", two="https://a.example.com/")
    now = time.time() + 1
    turn = look(store, now, 1, a=rows.Hold(until_s=now + 300, takes_one=True))
    assert ([found.place for found in turn.taken], turn.put_off) == (["other"], 0)
    assert {found.place for found in due(store, now)} == {"one", "two"}


def test_whose_time_is_over_at_a_host_that_is_held_is_given_up_untold(store: Store) -> None:
    put(store, "away", "https://a.example.com/", accepted(0, status=415))
    put(store, "other", "https://b.example.com/", accepted(0, status=415))
    now = time.time() + 1
    turn = look(store, now, 9, a=rows.Hold(until_s=now + 20, gives_up_before_s=now))
    assert [(found.place, found.attempts, found.request_id) for found in turn.given_up] == [("away", 0, "request-away")]
    assert [found.place for found in turn.taken] == ["other"] and turn.put_off == 0
    assert due(store, now + 1000) != [] and asyncio.run(store.read(rows.count)) == 1, "of the other one"


def test_it_goes_when_the_answers_have_gone(store: Store) -> None:
    put(store, "old", HOOK, accepted(0))
    answer(store)
    later = time.time() + 25 * 3600
    for remove, removed in ((rows.remove_old, 0), (deferred.remove_old, 1), (rows.remove_old, 1)):
        assert asyncio.run(store.commit(partial(remove, now_s=later, keep_h=24, most=9))) == removed


def test_it_is_told_once_with_the_answer_signed(one_store: Store, hook: Hook) -> None:
    put(one_store, "place-1", f"{hook.url}/hooks/a?token=x", accepted(0))
    answer(one_store)
    settings = CallbackSettings(allow=(f"{hook.url}/hooks",))
    assert tell(one_store, settings, lambda outcomes: bool(outcomes)) == ["delivered"]
    ((path, headers, body),) = hook.came
    assert path == "/hooks/a?token=x" and headers["host"] == hook.url.removeprefix("http://")
    at, said = re.fullmatch(r"t=(\d+),v1=([0-9a-f]{64})", headers["deeptrust-signature"]).groups()  # type: ignore[union-attr]
    assert said == hmac.new(SECRET.encode(), f"{at}.".encode() + body, hashlib.sha256).hexdigest()
    assert (headers["idempotency-key"], headers["x-request-id"]) == ("place-1", "request-place-1")
    content = json.loads(body)
    assert content["status"] == 200 and Annotation.model_validate(content["answer"]).id == "mine-0"


def test_it_is_told_again_until_it_is_taken_and_no_redirect_is_followed(one_store: Store, hook: Hook) -> None:
    hook.answers = lambda number: {1: 503, 2: 307}.get(number, 200)
    put(one_store, "place", hook.url, accepted(0))
    answer(one_store)
    outcomes = tell(one_store, CallbackSettings(allow=(hook.url,)), lambda outcomes: "delivered" in outcomes)
    assert outcomes == ["failed", "failed", "delivered"]
    assert [path for path, _, _ in hook.came] == ["/"] * 3
    assert len({headers["idempotency-key"] for _, headers, _ in hook.came}) == 1


def test_what_was_leased_after_the_replica_had_stopped_waiting_is_told_at_once_and_was_no_attempt(
    one_store: Store, hook: Hook, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    put(one_store, "place", hook.url, accepted(0))
    answer(one_store)
    wait, gave_up = one_store._within, threading.Event()

    async def give_up_once(outcome: Any) -> Any:
        if not gave_up.is_set():
            gave_up.set()
            raise StoreUnavailable("the database takes too long")
        return await wait(outcome)

    monkeypatch.setattr(one_store, "_within", give_up_once)
    began, attempts = time.monotonic(), list[int]()
    monkeypatch.setattr(telemetry, "note", lambda _, **told: attempts.append(told["attempt"]))
    assert tell(one_store, CallbackSettings(allow=(hook.url,)), lambda outcomes: bool(outcomes)) == ["delivered"]
    assert gave_up.is_set() and time.monotonic() - began < 20, "as long as a lease lasts, and that is 40 s"
    assert attempts == [1]


def test_it_is_given_up_when_it_is_not_wanted_any_more_or_too_late(one_store: Store, hook: Hook) -> None:
    hook.answers = lambda number: 410
    put(one_store, "unwanted", hook.url, accepted(0))
    answer(one_store)
    assert tell(one_store, CallbackSettings(allow=(hook.url,)), lambda outcomes: bool(outcomes)) == ["given_up"]
    hook.answers = lambda number: 500
    put(one_store, "late", hook.url, accepted(2))
    answer(one_store)
    soon = CallbackSettings(allow=(hook.url,), give_up_after_h=0.1 / 3600)
    assert tell(one_store, soon, lambda outcomes: "given_up" in outcomes)[-1] == "given_up"
    assert asyncio.run(one_store.read(rows.count)) == 0
    put(one_store, "deleted", hook.url, accepted(3))
    asyncio.run(one_store.delete_picture(accepted(3).sha256))
    assert tell(one_store, soon, lambda outcomes: bool(outcomes)) == ["gone"]


def test_an_address_that_a_replicas_list_does_not_name_is_another_replicas_to_tell_until_the_time_is_over(
    one_store: Store, hook: Hook, lines: pytest.LogCaptureFixture
) -> None:
    older, newer = CallbackSettings(allow=(HOOK,)), CallbackSettings(allow=(hook.url,))
    put(one_store, "new", hook.url, accepted(0))
    answer(one_store)
    assert tell(one_store, older, lambda outcomes: bool(outcomes)) == ["failed"]
    assert not hook.came
    assert tell(one_store, newer, lambda outcomes: bool(outcomes)) == ["delivered"]
    put(one_store, "old", hook.url, accepted(1))
    answer(one_store)
    over = older.model_copy(update={"give_up_after_h": 1e-9})
    assert tell(one_store, over, lambda outcomes: bool(outcomes)) == ["given_up"]
    assert len(hook.came) == 1 and asyncio.run(one_store.read(rows.count)) == 0
    codes = [line.code for line in lines.records if line.message == "callback"]  # type: ignore[attr-defined]
    assert codes == ["refused", "ok", "refused"]


def test_who_does_not_answer_in_time_does_not_keep_others(one_store: Store, hook: Hook) -> None:
    held = threading.Event()
    hook.answers = lambda number: 200 if number > 1 else (held.wait(60), 200)[1]
    put(one_store, "slow", hook.url, accepted(0))
    put(one_store, "quick", hook.url, accepted(1))
    answer(one_store)
    settings = CallbackSettings(allow=(hook.url,), timeout_s=1.0, in_work=2)
    outcomes = tell(one_store, settings, lambda outcomes: outcomes.count("delivered") == 2)
    held.set()
    assert "failed" in outcomes and outcomes[0] == "delivered"


class Receivers:
    """Hosts that are told. One of them, ``away``, is not reached by the first ``lost`` attempts, and of those the first
    ``together`` end together.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, away: str = "", lost: int = 99, together: int = 0) -> None:
        self.away, self.lost, self.together = away, lost, together
        self.asked: list[str] = []
        self.at_a_time: list[int] = []
        """Of the attempts that were lost: how many there were as each began."""
        self._now = 0
        monkeypatch.setattr(Callbacks, "_post", lambda _, address, *rest: self._told(address.host))

    async def _told(self, host: str) -> int:
        self.asked.append(host)
        if host != self.away or self.asked.count(host) > self.lost:
            return 200
        self._now += 1
        self.at_a_time.append(self._now)
        while len(self.at_a_time) < self.together:
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.01)
        self._now -= 1
        raise TimeoutError


ONE, OTHER = "http://127.0.0.1/", "http://127.0.0.2/"


def put_many(store: Store, url: str, count: int) -> None:
    """Answered already."""

    async def run() -> None:
        picture = accepted(0, status=415)
        places = [f"{url}-{number}" for number in range(count)]
        await asyncio.gather(*(taken_in(store, place, url, picture, request_id="") for place in places))

    asyncio.run(run())


def test_it_is_looked_again_as_soon_as_there_is_room(one_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(callbacks, "_LOOK_S", 3600.0)
    Receivers(monkeypatch)
    put_many(one_store, ONE, 9)
    settings = CallbackSettings(allow=(ONE,), in_work=2)
    assert tell(one_store, settings, lambda outcomes: len(outcomes) == 9) == ["delivered"] * 9


def test_a_host_that_is_not_reached_does_not_hold_up_others(one_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(callbacks, "_FIRST_PAUSE_S", 60.0)
    monkeypatch.setattr(callbacks, "_LOOK_S", 3600.0)
    monkeypatch.setattr(rows, "_MOST_HELD", 3)
    receivers = Receivers(monkeypatch, "127.0.0.1")
    put_many(one_store, ONE, 12)
    put_many(one_store, OTHER, 3)
    settings = CallbackSettings(allow=(ONE, OTHER), in_work=2)
    tell(one_store, settings, lambda outcomes: outcomes.count("delivered") == 3)
    assert Counter(receivers.asked) == {"127.0.0.1": 2, "127.0.0.2": 3}
    left = due(one_store, time.time() + 1000)
    assert Counter(found.attempts for found in left) == {1: 10, 2: 2}, "nobody was lost, nor an attempt counted"


def test_a_host_that_is_not_reached_is_tried_by_one_at_a_time_until_it_is(
    one_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(callbacks, "_FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(callbacks, "_LOOK_S", 0.001)
    receivers = Receivers(monkeypatch, "127.0.0.1", lost=6, together=3)
    put_many(one_store, ONE, 6)
    settings = CallbackSettings(allow=(ONE,), in_work=3)
    tell(one_store, settings, lambda outcomes: outcomes.count("delivered") == 6)
    assert receivers.at_a_time == [1, 2, 3, 1, 1, 1], "nobody knew it of the first ones"


def test_a_host_that_is_not_reached_is_left_alone_for_longer_and_longer(
    one_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(callbacks, "time", SimpleNamespace(time=lambda: clock.now))
    monkeypatch.setattr(callbacks.random, "uniform", lambda low, high: 1.0)
    monkeypatch.setattr(callbacks, "_FIRST_PAUSE_S", 2.0)
    made = Callbacks(CallbackSettings(allow=(HOOK,), give_up_after_h=1.0), one_store, lambda outcome: None)
    for pause_s in (2.0, 4.0, 8.0):
        for _ in range(3):  # they were on their way together
            made._note_reached("a", False)
        assert made._held(clock.now) == {"a": rows.Hold(clock.now + pause_s)}
        clock.now += pause_s
        assert made._held(clock.now) == {"a": rows.Hold(clock.now + pause_s, takes_one=True)}
    task: Any = object()
    made._telling[task] = "a"
    assert not made._held(clock.now)["a"].takes_one, "one is being told"
    for _ in range(6):
        made._note_reached("a", False)
        clock.now += 300.0
    assert made._held(clock.now)["a"] == rows.Hold(clock.now + 300.0, gives_up_before_s=clock.now - 3600)
    made._note_reached("b", False)
    made._note_reached("a", True)
    assert made._held(clock.now).keys() == {"b"}


def test_at_a_host_that_is_not_reached_for_long_nobody_is_told_whose_time_is_over(
    one_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(callbacks, "_FIRST_PAUSE_S", 60.0)
    monkeypatch.setattr(callbacks, "_LONGEST_PAUSE_S", 60.0)
    receivers = Receivers(monkeypatch, "127.0.0.1")
    put_many(one_store, ONE, 5)
    settings = CallbackSettings(allow=(ONE,), in_work=1, give_up_after_h=1e-9)
    assert tell(one_store, settings, lambda outcomes: len(outcomes) == 5) == ["given_up"] * 5
    assert receivers.asked == ["127.0.0.1"] and asyncio.run(one_store.read(rows.count)) == 0


def test_a_name_that_leads_into_the_own_network_is_not_gone_to(one_store: Store, hook: Hook) -> None:
    port = hook.server.server_port
    asked: list[tuple[str, int]] = []

    async def rebound(host: str, port: int) -> list[str]:
        asked.append((host, port))
        return ["93.184.215.14", "127.0.0.1"]

    put(one_store, "place", f"https://hooks.example.com:{port}/", accepted(0))
    answer(one_store)
    settings = CallbackSettings(allow=(f"https://hooks.example.com:{port}/",))
    assert tell(one_store, settings, lambda outcomes: bool(outcomes), look_up=rebound) == ["failed"]
    assert asked == [("hooks.example.com", port)] and hook.came == []


def test_a_name_server_that_does_not_answer_holds_no_thread_that_others_wait_for(
    one_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, go_on = threading.Event(), threading.Event()

    def hang(*_: Any, **__: Any) -> Any:
        asked.set()
        assert go_on.wait(60)
        raise OSError("no such name")

    monkeypatch.setattr(callbacks.socket, "getaddrinfo", hang)
    put(one_store, "place", HOOK, accepted(0))
    answer(one_store)

    async def run() -> None:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
        told = Callbacks(CallbackSettings(allow=(HOOK,)), one_store, lambda outcome: None)
        task = asyncio.create_task(told.run())
        try:
            while not asked.is_set():
                await asyncio.sleep(0.01)
            assert await asyncio.wait_for(asyncio.to_thread(lambda: True), 20)
        finally:
            go_on.set()
            task.cancel()
            told.close()

    asyncio.run(run())
    wait_for(lambda: not any(thread.name.startswith("look-up") for thread in threading.enumerate()))


def test_the_certificate_has_to_be_of_the_name_and_the_connection_goes_to_what_was_looked_up(
    one_store: Store, hook: Hook, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ssl

    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-keyout", str(key), "-out", str(certificate), "-days", "2", "-subj", "/CN=hooks.example.com"]
    command += ["-addext", "subjectAltName=DNS:hooks.example.com"]
    subprocess.run(command, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    hook.server.socket = context.wrap_socket(hook.server.socket, server_side=True)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))  # as for every other program: OpenSSL's own variable
    monkeypatch.setattr(callbacks, "is_public", lambda address: address == "127.0.0.1")

    async def found(host: str, port: int) -> list[str]:
        return ["127.0.0.1"]

    port = hook.server.server_port
    allow = (f"https://hooks.example.com:{port}/", f"https://other.example.com:{port}/")
    for place, url, outcome in (("right", allow[0], "delivered"), ("wrong", allow[1], "failed")):
        put(one_store, place, url, accepted(0))
        answer(one_store)
        settings = CallbackSettings(allow=allow)
        assert tell(one_store, settings, lambda outcomes: bool(outcomes), look_up=found) == [outcome]
    ((_, headers, _),) = hook.came
    assert headers["host"] == f"hooks.example.com:{port}"


#: Tells who is due, until it is killed: a database, an address, and what a lease lasts beyond twenty seconds.
TELLING = """
import asyncio, sys
from app import callbacks
from app.callbacks import Callbacks, CallbackSettings
from app.store.settings import StoreSettings
from app.store.store import Store

def said(outcome):
    print(outcome, flush=True)

callbacks._LEASE_MARGIN_S = float(sys.argv[3])
store = Store(StoreSettings(url=sys.argv[1], timeout_s=60, search_timeout_s=60))
store.start()
asyncio.run(Callbacks(CallbackSettings(allow=(sys.argv[2],), timeout_s=20.0), store, said).run())
"""


@pytest.mark.parametrize("database_url", ["sqlite", pytest.param("postgresql", marks=pytest.mark.proof)], indirect=True)
def test_a_kill_between_the_call_and_its_note_means_a_second_call_under_the_same_key(
    database_url: str, hook: Hook
) -> None:
    called = threading.Event()

    def answers(number: int) -> int:
        if number == 1:
            called.set()
            time.sleep(60)  # it is killed while it waits for this
        return 200

    hook.answers = answers
    with opened(database_url) as store:
        put(store, "place", hook.url, accepted(0), request_id="")
        answer(store)
    command = [sys.executable, "-c", TELLING, database_url, hook.url]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    first = subprocess.Popen([*command, "-19.5"], env=environment, stdout=subprocess.DEVNULL)
    assert called.wait(120)
    first.kill()
    first.wait()
    second = subprocess.Popen([*command, "60"], env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert second.stdout is not None and second.stdout.readline().strip() == "delivered"
    finally:
        second.kill()
        second.wait()
    assert [headers["idempotency-key"] for _, headers, _ in hook.came] == ["place", "place"]
    with opened(database_url) as store:
        assert due(store, time.time() + 999) == []
