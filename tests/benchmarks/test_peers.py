"""How the comparison with peers judges, without any server."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks.peers import __main__ as peers


def load(clients: int, per_s: float, latency_ms: int, cpu_s: float) -> dict[str, Any]:
    return {
        "clients": clients,
        "answers": 10,
        "per_s": per_s,
        "latencies_ms": [latency_ms] * 10,
        "cpu_s_each": cpu_s,
        "failures": {},
    }


def result() -> dict[str, Any]:
    """Three rounds: the project as fast as the best peer, with less processor time; the original at less than half."""
    measurements: list[dict[str, Any]] = []
    for number in range(3):
        measurements.append(
            {
                "round": number,
                "server": "bare",
                "engine": "none",
                "engine_per_s": 5.0,
                "engine_cpu_s_each": 0.40,
                "with_decoding_per_s": 4.8,
                "with_decoding_cpu_s_each": 0.42,
                "matrix_product_gflops": 200.0,
                "picture_gflop": 35.0,
                "roofline_per_s": 5.7,
            }
        )
        for name, per_s, cpu_s in (
            ("project", 4.7 + 0.1 * number, 0.44),
            ("litserve", 4.8, 0.46),
            ("fastapi", 4.0, 0.45),
            ("original", 2.0, 0.6),
        ):
            for clients in (1, 16, 64):
                row = load(clients, per_s, 1000 * clients // 5, cpu_s)
                measurements.append({"round": number, "server": name, "memory_mb": 900} | row)
    return {"measurements": measurements}


def test_bars_are_judged_round_by_round() -> None:
    config = peers.PeersConfig(servers="project,litserve,fastapi,original", clients=[1, 16, 64])
    found = result()
    peers.summary(config, found)
    bar = found["bars"]["16 clients"]
    assert bar["best_peer"] == "litserve"
    assert bar["throughput_ratio"] == pytest.approx(1.0)
    assert bar["throughput_ratio_range"] == pytest.approx([4.7 / 4.8, 4.9 / 4.8])
    assert bar["throughput >= 1.00"] and bar["p99 <= 1.0"]
    assert bar["cpu_s_each_more"] == pytest.approx(-0.02)
    assert found["bars"]["of the original's way"]["ratio"] == pytest.approx(2.4)
    assert found["bars"]["of the bare engine"]["bar >= 0.90"] == {"16 clients": True, "64 clients": True}
    assert "litserve" in peers.show(found)
    json.dumps(found)


def test_a_slower_project_fails_its_bars() -> None:
    config = peers.PeersConfig(servers="project,litserve,fastapi,original", clients=[1, 16, 64])
    found = result()
    for one in found["measurements"]:
        if one["server"] == "project":
            one |= load(one["clients"], 3.0, 9000, 0.7)
    peers.summary(config, found)
    bar = found["bars"]["64 clients"]
    assert not bar["throughput >= 1.00"]
    assert bar["p99 <= 1.0"], "9 s, where the peers took 12.8 s"
    assert not bar["processor time outside no more"]
    assert found["bars"]["of the bare engine"]["bar >= 0.90"] == {"16 clients": False, "64 clients": False}
    assert not found["bars"]["of the original's way"]["bar >= 2.2"]


def test_one_lucky_round_and_a_few_slow_answers_pass_no_bar() -> None:
    config = peers.PeersConfig(servers="project,litserve,fastapi,original", clients=[1, 16, 64])
    found = result()
    for one in found["measurements"]:
        if one["server"] == "project":
            per_s = (3.84, 4.08, 4.85)[one["round"]]
            one |= load(one["clients"], per_s, 1000 * one["clients"] // 5 + 1, 0.44)
            one["failures"] = {"429": 1} if one["clients"] == 16 else {}
    peers.summary(config, found)
    bar = found["bars"]["16 clients"]
    assert bar["throughput_ratio"] == pytest.approx(0.85) and bar["throughput_ratio_range"][1] > 1
    assert not bar["throughput >= 1.00"] and not bar["p99 <= 1.0"]
    assert found["bars"]["failures"] == {"by_kind": {"429": 3}, "none": False}


def test_what_64_clients_get_out_of_the_engine_is_not_told_of_16() -> None:
    config = peers.PeersConfig(servers="project,litserve,fastapi,original", clients=[1, 16, 64])
    found = result()
    for one in found["measurements"]:
        if one["server"] == "project":
            one |= load(one["clients"], {1: 2.0, 16: 4.0, 64: 4.5}[one["clients"]], 1000, 0.44)
    peers.summary(config, found)
    bars = found["bars"]
    ratios = bars["of the bare engine"]["ratio"]
    assert ratios == pytest.approx({"1 clients": 0.4, "16 clients": 0.8, "64 clients": 0.9})
    assert bars["of the bare engine"]["bar >= 0.90"] == {"16 clients": False, "64 clients": True}
    assert bars["of the bare engine with decoding"]["ratio"]["16 clients"] == pytest.approx(4.0 / 4.8)


def test_what_differs_starts_anew_and_what_does_not_goes_on() -> None:
    config = peers.PeersConfig()
    assert config.fingerprint() == config.model_copy(update={"fresh": True, "parts": "measure"}).fingerprint()
    assert config.fingerprint() != config.model_copy(update={"measure_s": 1.0}).fingerprint()


@pytest.mark.parametrize("since", [0.5, 1.5, 2.9])
def test_where_a_window_begins_within_a_batch_does_not_matter(since: float) -> None:
    finished = [moment for batch in range(1, 11) for moment in [batch * 2.0] * 8]  # four a second
    assert peers.answers_per_s(finished, 20 + since) == 0.0
    assert peers.answers_per_s(finished, 4 + since) == pytest.approx(4.0)
    assert peers.answers_per_s([], since) == 0.0


def test_who_is_not_measured_stands_still_and_goes_on_afterwards() -> None:
    process = psutil.Popen([sys.executable, "-c", "while True: pass"])

    def stands_still() -> bool:
        time.sleep(0.1)  # a signal takes its time
        return process.status() == psutil.STATUS_STOPPED

    try:
        running = peers.Running("", lambda: [process])
        running.pause()
        assert stands_still()
        with running.awake():
            assert not stands_still()
        assert stands_still()
        running.resume()
        assert not stands_still()
    finally:
        process.kill()
        process.wait()


def test_every_list_is_pinned_and_names_no_index() -> None:
    lists = sorted(Path(peers.__file__).parent.glob("requirements-*.txt"))
    assert {one.stem.removeprefix("requirements-") for one in lists} == {"fastapi", "litserve", "bentoml"}
    for file in lists:
        for line in file.read_text().splitlines():
            name, _, version = line.partition("==")
            assert name and version and "://" not in line, line
