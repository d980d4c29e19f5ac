"""What a soak makes of its readings: which process grows, and which was not there long enough to say."""

from __future__ import annotations

import random

import pytest

from benchmarks.soak import Growth, growth, growths, name_of, series, started_again

MIB = 2**20


def test_growth_is_the_slope_an_hour_whatever_the_noise() -> None:
    draw, times = random.Random(1), [15.0 * number for number in range(240)]
    steady = growth(times, [300 * MIB + draw.gauss(0, MIB) for _ in times])
    assert abs(steady.share_an_hour) < 0.005
    growing = growth(times, [300 * MIB + 9 * MIB * at / 3600 + draw.gauss(0, MIB) for at in times])
    assert growing.share_an_hour == pytest.approx(0.03, abs=0.005)
    assert growth(times, [at * 100 for at in times]).bytes_an_hour == pytest.approx(360_000)


def test_only_processes_that_were_there_nearly_all_the_time_are_judged() -> None:
    readings = [
        (float(at), {("steady", 1): 100, ("grows", 2): 100 + at} | ({("guest", 3): 50} if at < 30 else {}))
        for at in range(100)
    ]
    found, others = growths(readings)
    assert others == {"guest"} and set(found) == {("steady", 1), ("grows", 2)}
    assert found["steady", 1] == Growth(100.0, pytest.approx(0, abs=1e-6))  # type: ignore[arg-type]
    assert found["grows", 2].bytes_an_hour == pytest.approx(3600)
    assert series(readings)["guest"][-1] == (29.0, 0.0)


def test_a_replica_that_was_started_again_is_no_guest() -> None:
    names = {"replica Detector", "VLLM::EngineCore", "raylet", "gcs_server", "python job.py", "IDLE"}
    assert started_again(names) == ["VLLM::EngineCore", "gcs_server", "raylet", "replica Detector"]
    readings = [(float(at), {("replica Detector", 1 if at < 50 else 2): 100 + at}) for at in range(100)]
    found, others = growths(readings)
    assert not found and started_again(others) == ["replica Detector"]


def test_a_process_is_called_by_what_it_is() -> None:
    assert name_of(
        ["ray::SERVE_REPLICA::deeptrust#Detector#ab12:ServeReplica:deeptrust:Detector.x"], "ray::SERVE_R"
    ) == ("replica Detector")
    assert name_of(["ray::ServeReplica:deeptrust:DetectorCanary.detect"], "ray::ServeRepl") == "replica DetectorCanary"
    assert name_of(["ray::ProxyActor.handle"], "ray::ProxyActor") == "ProxyActor"
    assert name_of(["/x/python", "-m", "app.serve", "--config", "c"], "python3.11") == "python -m app.serve"
    assert name_of(["/x/python", "-u", "/y/ray/log_monitor.py", "--z"], "python") == "python log_monitor.py"
    assert name_of(["/y/raylet", "--head"], "raylet") == "raylet" and name_of([], "VLLM::Engine") == "VLLM::Engine"
