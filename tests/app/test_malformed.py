"""Thousands of malformed requests against upload reading, decoding and provenance: no 5xx, bounded memory."""

from __future__ import annotations

import asyncio
import collections
import time
from pathlib import Path

import httpx
import pytest
from hypothesis import HealthCheck, given, settings

from app.problems import CODES, MEDIA_TYPE
from tests.app import malformed
from tests.app.drawn import drawn_requests
from tests.app.small_app import send, small_app


class Peak:
    """The most memory that this process has had since this was made, beyond what it had then."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # the kernel forgets the peak of whatever ran before
        self._before = _status_bytes("VmRSS")

    def bytes(self) -> int:
        return _status_bytes("VmHWM") - self._before


def _status_bytes(name: str) -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def test_a_peak_is_seen_though_there_was_a_larger_one_before() -> None:
    larger = b"x" * 300_000_000
    del larger
    peak = Peak()
    assert peak.bytes() < 20_000_000
    large = b"x" * 200_000_000
    del large
    assert 190_000_000 < peak.bytes() < 220_000_000


def test_the_same_seed_yields_the_same_requests() -> None:
    assert list(malformed.requests(3, 50)) == list(malformed.requests(3, 50))
    assert list(malformed.requests(3, 50)) != list(malformed.requests(4, 50))


@pytest.mark.parametrize("name", sorted(malformed.real_files()))
def test_every_real_file_that_the_mutations_start_from_is_accepted(name: str) -> None:
    response = send(small_app(), "POST", "/v1/analyze", content=malformed.real_files()[name])
    assert response.status_code == 200, response.text
    assert {response.json()["width"], response.json()["height"]} == {64, 48}


@pytest.mark.parametrize("name", sorted(malformed.bombs()))
def test_a_bomb_costs_neither_memory_nor_time(name: str) -> None:
    body = malformed.bombs()[name]
    app = small_app()
    send(app, "POST", "/v1/analyze", content=malformed.real_files()["png"])
    peak, start = Peak(), time.process_time()
    response = send(app, "POST", "/v1/analyze", content=body)
    assert response.status_code in (200, 413, 422), response.text
    assert time.process_time() - start < 3
    assert peak.bytes() < 50_000_000


@pytest.mark.slow
@pytest.mark.parametrize(
    ("seed", "count", "most_bytes"),
    [(1, 400, 100_000_000), pytest.param(2, 10_000, 300_000_000, marks=pytest.mark.proof)],
)
def test_no_malformed_request_is_answered_with_a_5xx(seed: int, count: int, most_bytes: int) -> None:
    requests = list(malformed.requests(seed, count))
    answers: collections.Counter[str] = collections.Counter()
    peak, start = Peak(), time.process_time()

    async def run() -> None:
        transport = httpx.ASGITransport(small_app(), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            for number, request in enumerate(requests):
                where = f"request {number} of seed {seed}: {request.kind}"
                began = time.process_time()
                response = await client.request(
                    request.method, request.path, headers=dict(request.headers), content=request.body
                )
                assert time.process_time() - began < 5, where
                assert response.status_code < 500, f"{where}: {response.text}"
                if response.status_code >= 400:
                    problem = response.json()
                    assert response.headers["content-type"] == MEDIA_TYPE, where
                    assert problem["status"] == response.status_code == CODES[problem["code"]][0], where
                    answers[problem["code"]] += 1
                else:
                    answers["answered"] += 1

    asyncio.run(run())
    assert time.process_time() - start < 20 + count / 20
    assert peak.bytes() < most_bytes
    # The requests are what they claim to be: most are refused, and for many different reasons.
    assert answers["answered"] < 0.3 * count, answers
    assert len(answers) > 10, answers


_APP = small_app()


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(drawn_requests())
def test_no_request_that_hypothesis_draws_is_answered_with_a_5xx(request: malformed.MalformedRequest) -> None:
    response = send(_APP, request.method, request.path, headers=dict(request.headers), content=request.body)
    assert response.status_code < 500, response.text
    if response.status_code >= 400:
        assert CODES[response.json()["code"]][0] == response.status_code
