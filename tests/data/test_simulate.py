"""The simulator against a real HTTP service: what it sends, what it keeps, what it makes of refusals, stops and kills.

The service of these tests is a small one that reads pictures and answers records without models; the last test asks the
application itself.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock, Thread
from typing import Any

import numpy as np
import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from app.cluster import free_port
from data.browse import rows
from data.errors import DataError
from data.patterns import ORIGINAL, arrivals, phases
from data.simulate import SimulateConfig, main, simulate
from data.simulate_report import measure_run, read_run, time_edges, write_simulation_report
from data.versions import open_version
from deployments.images import ImageLimits, decode
from tests.data.small_version import write_version

ROOT = Path(__file__).parents[2]


@dataclass
class Service:
    """A service that answers in the format of the API, and what it has seen."""

    url: str = ""
    refuse_every: int = 0
    fail_every: int = 0
    seconds: float = 0.0
    seen: list[str] = field(default_factory=list)
    at_once: int = 0
    most_at_once: int = 0
    lock: Lock = field(default_factory=Lock)

    def app(self) -> FastAPI:
        app = FastAPI()

        @app.get("/healthz")
        def healthz() -> dict[str, str]:
            return {"status": "ok"}

        @app.post("/v1/analyze")
        async def analyze(request: Request, tasks: str, id: str) -> JSONResponse:
            import asyncio

            data = await request.body()
            with self.lock:
                self.seen.append(id)
                count = len(self.seen)
                self.at_once += 1
                self.most_at_once = max(self.most_at_once, self.at_once)
            try:
                await asyncio.sleep(self.seconds)
            finally:
                with self.lock:
                    self.at_once -= 1
            if self.refuse_every and count % self.refuse_every == 0:
                return JSONResponse({"code": "overloaded"}, 429, {"retry-after": "0.05"})
            if self.fail_every and count % self.fail_every == 0:
                return JSONResponse({"code": "internal_error"}, 500)
            found = decode(data, ImageLimits())
            large = found.image.width > 100
            return JSONResponse(
                {
                    "id": id,
                    "sha256": found.sha256,
                    "detection": {"label": "ai" if large else "human", "ai_probability": 0.9 if large else 0.1}
                    if "detect" in tasks
                    else None,
                    "caption": {"text": f"a dog number {count % 8} runs fast"} if "caption" in tasks else None,
                    "tags": None,
                    "models": {"detector": "none#0"},
                    "timings_ms": {"total": 1.5},
                    "errors": [],
                }
            )

        return app


@pytest.fixture
def service() -> Iterator[Service]:
    port = free_port(8200)
    made = Service(f"http://127.0.0.1:{port}")
    server = uvicorn.Server(uvicorn.Config(made.app(), host="127.0.0.1", port=port, log_level="warning"))
    thread = Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.02)
    yield made
    server.should_exit = True
    thread.join(30)


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_version(tmp_path_factory.mktemp("versions"), leaks=True)


@pytest.fixture(scope="module")
def captioned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_version(tmp_path_factory.mktemp("versions"), "flickr30k")


def config(version: Path, output: Path, service: Service, **changes: Any) -> SimulateConfig:
    return SimulateConfig.model_validate(
        {"version": str(version), "output": output, "url": service.url, "pattern": "constant", "clients": 2} | changes
    )


def figures_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text())


def test_the_original_pattern_visits_each_number_of_clients(labelled: Path, tmp_path: Path, service: Service) -> None:
    service.seconds = 0.02
    folder = simulate(config(labelled, tmp_path, service, pattern="original", phase_s=0.3))
    figures = figures_of(folder)
    assert [phase["clients"] for phase in figures["phases"]] == list(ORIGINAL)
    assert service.most_at_once == 5
    assert figures["finished"] and figures["requests"] == figures["answered"] == len(service.seen)
    assert not figures["errors"]


def test_predictions_stand_beside_their_truth(labelled: Path, tmp_path: Path, service: Service) -> None:
    folder = simulate(config(labelled, tmp_path, service, pictures=20))
    frame = rows(open_version(labelled), ["production"]).set_index("id")
    _, records = read_run(folder)
    assert len(records) == 20
    assert {record["id"] for record in records} == set(frame.index)  # only held-out pictures, all of them
    for record in records:
        assert record["truth"]["label"] == frame.loc[record["id"], "label"]
        assert record["answer"]["label"] == record["truth"]["label"]
    detection = figures_of(folder)["detection"]
    assert detection["pictures"] == len(frame)
    assert detection["accuracy"] == detection["balanced_accuracy"] == detection["roc_auc"] == 1.0
    assert detection["confusion"] == {
        "human": {"human": 4, "uncertain": 0, "ai": 0},
        "ai": {"human": 0, "uncertain": 0, "ai": 4},
    }


def test_captions_are_scored(captioned: Path, tmp_path: Path, service: Service) -> None:
    folder = simulate(config(captioned, tmp_path, service, pictures=16))
    captions = figures_of(folder)["captions"]
    assert captions["pictures"] == 8 and captions["distinct"] == 8
    assert 0 < captions["scores"]["bleu4"] < 1 and captions["scores"]["cider"] > 0
    assert "runs fast" in (folder / "report.html").read_text()


def test_refusals_are_waited_for_and_counted(labelled: Path, tmp_path: Path, service: Service) -> None:
    service.refuse_every = 3
    figures = figures_of(simulate(config(labelled, tmp_path, service, pictures=24)))
    assert figures["requests"] == figures["answered"] == 24
    assert figures["refusals"] == len(service.seen) - 24 > 0
    assert figures["latency_ms"]["most"] > 50  # the wait is part of it


def test_who_is_refused_for_good_is_an_error(labelled: Path, tmp_path: Path, service: Service) -> None:
    service.refuse_every = 1
    figures = figures_of(simulate(config(labelled, tmp_path, service, pictures=4, retries=2)))
    assert figures["errors"] == {"refused": 4} and figures["refusals"] == 12 and figures["answered"] == 0
    assert figures["latency_ms"]["p50"] is None


def test_errors_are_counted_and_the_rest_goes_on(labelled: Path, tmp_path: Path, service: Service) -> None:
    service.fail_every = 5
    figures = figures_of(simulate(config(labelled, tmp_path, service, clients=1, pictures=20)))
    assert figures["errors"] == {"internal_error": 4} and figures["answered"] == 16
    assert figures["statuses"] == {"200": 16, "500": 4}


def test_an_open_loop_does_not_wait_for_answers(labelled: Path, tmp_path: Path, service: Service) -> None:
    service.seconds = 1.0
    figures = figures_of(simulate(config(labelled, tmp_path, service, pattern="poisson", rate=20, phase_s=2)))
    expected = list(arrivals(20, 2, 0))
    assert figures["requests"] == len(expected) and figures["dropped"] == 0
    assert service.most_at_once > 8  # a closed loop of any few clients would never get there
    few = figures_of(simulate(config(labelled, tmp_path, service, pattern="poisson", rate=20, phase_s=2, max_open=3)))
    assert few["dropped"] > 0 and few["dropped"] + few["requests"] == len(expected)


def test_ctrl_c_ends_with_a_report_and_a_kill_loses_no_answer(labelled: Path, tmp_path: Path, service: Service) -> None:
    service.seconds = 0.05
    for number in (signal.SIGINT, signal.SIGKILL):
        output = tmp_path / number.name
        command = [sys.executable, "-m", "data.simulate", str(labelled), "--output", str(output), "--url", service.url]
        # a shell's background process has SIGINT ignored, and hands that on
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        until, found = time.monotonic() + 120, []
        while time.monotonic() < until:
            found = list(output.glob("*/requests.jsonl"))
            if found and found[0].read_text().count("\n") >= 5:
                break
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.05)
        os.kill(process.pid, number)
        said, _ = process.communicate(timeout=120)
        folder = found[0].parent
        if number == signal.SIGINT:
            assert process.returncode == 0, said
            assert not figures_of(folder)["finished"]
        else:
            assert not (folder / "report.json").exists()
            with found[0].open("a") as file:
                file.write('{"id": "torn')  # what a kill in the middle of a line leaves
            assert not write_simulation_report(folder)["finished"]
        assert figures_of(folder)["answered"] >= 5
        assert "ended early" in (folder / "report.html").read_text()


def test_what_cannot_be_done_is_said(labelled: Path, tmp_path: Path, service: Service, capsys: Any) -> None:
    with pytest.raises(DataError, match="nothing answers at"):
        simulate(config(labelled, tmp_path, service, url="http://127.0.0.1:1"))
    with pytest.raises(DataError, match="is no prepared data set"):
        simulate(config(tmp_path / "nothing", tmp_path, service))
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="choose another --output"):
        simulate(config(labelled, tmp_path / "file", service))
    with pytest.raises(DataError, match="is no folder of a simulation"):
        write_simulation_report(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main([str(tmp_path / "nothing"), "--output", str(tmp_path)])
    assert ended.value.code == 2 and "error:" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------- shapes and edges


def test_patterns() -> None:
    assert [phase.clients for phase in phases("ramp", 4, 1)] == [1, 2, 3, 4]
    assert [phase.clients for phase in phases("spike", 9, 1)] == [1, 9, 1]
    times = list(arrivals(50, 100, 3))
    assert times == sorted(times) and times == list(arrivals(50, 100, 3)) and times[-1] < 100
    assert len(times) == pytest.approx(5000, rel=0.1)
    gaps = np.diff(times)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.1)  # as exponential ones are


@pytest.mark.parametrize("seconds", [0.0, 1e-9, 0.0005, 0.999, 1.0, 1.0001, 59.9999, 60.0, 60.0004, 3600.2])
def test_parts_of_the_time_axis_are_never_slivers(seconds: float) -> None:
    widths = np.diff(time_edges(seconds))
    assert widths.min() == pytest.approx(widths.max()) and widths.min() >= min(max(seconds, 1e-3), 1.0) * 0.999


def record(done_s: float, status: int = 200) -> dict[str, Any]:
    answer = {"label": "ai", "ai_probability": 0.5, "caption": "", "tags": None, "models": {}, "timings_ms": {}}
    return {
        "id": "a",
        "phase": 0,
        "clients": 1,
        "due_s": done_s,
        "attempts": 1,
        "refused": 0,
        "status": status,
        "error": None if status == 200 else "ConnectError: x",
        "truth": {"label": "ai", "source": "s", "generator": None, "captions": ["a dog"]},
        "answer": answer | {"errors": []} if status == 200 else None,
        "attempt_ms": 0.0,
        "latency_ms": 0.0,
        "done_s": done_s,
    }


@pytest.mark.parametrize(
    ("seconds", "times", "status"),
    [
        (None, [], 200),
        (0.0, [], 200),
        (0.0, [0.0], 200),
        (1e-6, [0.0, 0.0], 0),
        (None, [-0.0001], 200),
        (60.0, [59.9999, 60.0, 60.0003], 200),
        (60.0004, [59.9999, 60.0, 60.0003], 0),
        (59.9996, [0.0], 200),
    ],
)
def test_reports_of_hardly_anything(tmp_path: Path, seconds: float | None, times: list[float], status: int) -> None:
    run: dict[str, Any] = {
        "name": "aivshuman",
        "version": "0" * 12,
        "begun_at": "2026-01-01T00:00:00",
        "tasks": "detect",
    }
    run["config"] = {"pattern": "poisson", "split": "production", "url": "http://<x>", "max_open": 1}
    if seconds is not None:
        run |= {"seconds": seconds, "stopped_early": False, "sent": len(times), "dropped": 0}
    (tmp_path / "run.json").write_text(json.dumps(run))
    lines = [json.dumps(record(at, status)) + "\n" for at in times]
    (tmp_path / "requests.jsonl").write_text("".join(lines))
    figures = write_simulation_report(tmp_path)
    assert figures["requests"] == len(times)
    assert sum(figures["over_time"]["answers_per_s"]) >= 0
    page = (tmp_path / "report.html").read_text()
    assert "&lt;x&gt;" in page and "nan" not in page.lower().replace("finance", "")


def test_a_rate_over_time_adds_up(tmp_path: Path) -> None:
    records = [record(at) for at in np.linspace(0, 60.0003, 601).tolist()]
    run = {"name": "a", "version": "b", "begun_at": "c", "tasks": "detect", "config": {}, "seconds": 60.0, "sent": 601}
    over = measure_run(run | {"stopped_early": False}, records)["over_time"]
    assert max(over["answers_per_s"]) == pytest.approx(10, rel=0.11)
    assert min(over["answers_per_s"]) == pytest.approx(10, rel=0.11)


# --------------------------------------------------------------------------------------------------- the application


@pytest.mark.application
@pytest.mark.slow
def test_against_the_application(application: Any, labelled: Path, tmp_path: Path) -> None:
    settings = {"version": str(labelled), "output": tmp_path, "url": application.url}
    folder = simulate(
        SimulateConfig(**settings, tasks="detect,caption", pattern="spike", clients=3, phase_s=3, pictures=12)
    )
    figures = figures_of(folder)
    assert figures["answered"] == figures["requests"] > 0
    assert figures["detection"]["pictures"] > 0 and figures["rate_per_s"] > 0
    _, records = read_run(folder)
    assert all(record["answer"]["caption"] for record in records)
