"""What clients see when any one process of the service is killed, and how long it takes until all is as before.

Clients send one picture after another, each under an ``Idempotency-Key``, and send it again on resets, 5xx and 429
(when ``Retry-After`` says), until it is answered. Together they send ``share`` of what the service answered them
without pauses at the start. Under this load each kind of process is killed with SIGKILL, several times: a replica of
each model, the tagger's engine, the ingress, HAProxy and what manages it, Serve's controller, the worker of a task of
plain Ray, the raylet of a second node on which a replica of the detector runs (it is started again after a second, as
an operating system's supervisor does), and on the head the raylet, the GCS, and all of Ray at once, which
``python -m app.serve`` starts again. Beside the clients each route of a single stage is asked once a second, without a
second try: whether the others answer while one is away.

Out: ``results/chaos.json`` and ``chaos.svg``. A kill is over when the killed process has been replaced and complete
answers come at ``full_share`` of the rate that is offered, and go on to (``full_rate_after``); the next comes after a
calm in which they did. What it took is compared with the cold start of the same run. At the end every request must have
been answered, and no picture, answer or name may be in the store twice. An answer in which a stage is missing is one,
and is counted apart (``answered_in_part``): its client does not send again. The result's ``bars`` say which were met;
the exit status is 1 when one was missed.

The service is the real one with tiny models (``tests.app.small_service``): processes, graph, store and HTTP are those
of production, what the models say is nonsense.

    python -m benchmarks.chaos [--times 3] [--kinds detector,ingress,...]
"""

from __future__ import annotations

import math
import os
import random
import re
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import httpx
import psutil
from pydantic import BaseModel, ConfigDict, Field

from app import cluster
from benchmarks import plots
from benchmarks.load import quantile
from benchmarks.report import QUICK, RESULTS, write_result

Seen = Literal["complete", "partial", "refused", "failed", "reset", "wrong"]

#: Routes of single stages, and the kinds whose death leaves each of them without what it needs.
ROUTES = {
    "detect": frozenset({"detector"}),
    "caption": frozenset({"captioner"}),
    "tag": frozenset({"captioner", "tagger", "engine"}),
}
#: Without these there is no HTTP.
_ALL_STAGES = frozenset({"ingress", "proxy", "haproxy", "head"})
_RAY_TITLES = {
    "detector": r"deeptrust[#:]Detector(?![A-Za-z])",
    "captioner": r"deeptrust[#:]Captioner(?![A-Za-z])",
    "tagger": r"deeptrust[#:]Tagger(?![A-Za-z])",
    "ingress": r"deeptrust[#:]Ingress(?![A-Za-z])",
    "proxy": r"^ray::HAProxyManager",
    "controller": r"^ray::ServeController",
    "worker": r"^ray::bystander",
}
#: Those that do not bear a title of Ray's, and how their names begin.
_NAMES = {"haproxy": "haproxy", "engine": "VLLM"}
KINDS = (*_RAY_TITLES, *_NAMES, "node", "head")


class ChaosConfig(BaseModel):
    """Settings of a run."""

    model_config = ConfigDict(extra="forbid")

    kinds: str = Field(",".join(KINDS), description="which kinds of processes are killed")
    times: int = Field(3, ge=1, description="how often each kind is killed")
    clients: int = Field(16, ge=1)
    share: float = Field(0.7, gt=0, le=1, description="load, of the rate that 16 clients without pauses reach")
    measure_s: float = Field(40.0, gt=0, description="how long that rate is measured")
    calm_s: float = Field(15.0, gt=0, description="load at the full rate before each kill")
    window_s: float = Field(5.0, gt=0, description="time over which a rate is counted, three times running")
    full_share: float = Field(0.9, gt=0, le=1, description="share of the offered rate that counts as full")
    give_up_s: float = Field(300.0, gt=0, description="longest wait for the full rate")
    slowest_of_cold: float = Field(1.5, gt=0, description="bar: longest time to the full rate, of the cold start's")
    others_least: float = Field(
        0.95,
        gt=0,
        le=1,
        description="bar: share of a kill's probes of other stages, each sent once, that were answered",
    )
    quick: bool = Field(False, description="the result goes to the folder of quick runs")
    seed: int = 11


# ---- what is counted ----------------------------------------------------------------------------------------------


def seen(status: int | None, errors: Sequence[Any] = ()) -> Seen:
    """What a client makes of an answer. None: there was none, the connection broke or took too long."""
    if status is None:
        return "reset"
    if status == 200:
        return "partial" if errors else "complete"
    if status == 429:
        return "refused"
    return "failed" if status >= 500 else "wrong"


def rate(times: Sequence[float], begin: float, end: float) -> float:
    """Events a second from ``begin`` to ``end``; ``times`` are in order."""
    return (bisect_left(times, end) - bisect_left(times, begin)) / (end - begin)


def full_rate_after(
    times: Sequence[float], killed_at: float, full: float, window_s: float, until: float, replaced_at: float
) -> float | None:
    """Seconds from a kill until the full rate is there again; None: not until ``until``.

    It is there from the kill on, or from the first complete answer after it, that begins three windows in which answers
    come at the full rate, in none of them at less than half of it: what was held up and comes in one burst is no rate.
    The first of them ends after the killed process was replaced. A kill that no client notices takes no time.

    Args:
        times: when complete answers came, in order.
        full: rate that counts as full, a second.
    """
    for begin in (killed_at, *times[bisect_left(times, killed_at) :]):
        if begin + 3 * window_s > until:
            return None
        rates = [rate(times, begin + number * window_s, begin + (number + 1) * window_s) for number in range(3)]
        if begin + window_s >= replaced_at and sum(rates) >= 3 * full and min(rates) >= full / 2:
            return begin - killed_at
    return None


@dataclass
class Kept:
    """What the store has of the pictures that clients sent."""

    rows: int
    twice: int
    """Pictures, answers' ids and names that are there more than once."""
    missing: int
    """Pictures that were answered and are not there: given a moment before the ingress was killed."""


def kept(rows: Iterable[tuple[str, str, str | None]], answered: set[str]) -> Kept:
    """Count rows of the store, each (hash of picture, id of answer, name)."""
    rows = list(rows)
    twice = sum(
        count - 1 for column in zip(*rows, strict=True) for value, count in Counter(column).items() if value is not None
    )
    return Kept(len(rows), twice, len(answered - {row[0] for row in rows}))


def judge(result: dict[str, Any], config: ChaosConfig) -> dict[str, bool]:
    """Each bar, and whether it was met."""
    kills = result["kills"]
    others = [row["others_answered"] for row in kills if row["others_answered"] is not None]
    return {
        "every request answered": result["unanswered"] == 0,
        "nothing in the store twice": result["in_store_twice"] == 0,
        "the full rate back after every kill": all(row["full_rate_after_s"] is not None for row in kills),
        f"within {config.slowest_of_cold:g} of the cold start": all(
            row["of_cold_start"] is not None and row["of_cold_start"] <= config.slowest_of_cold for row in kills
        ),
        f"other stages answered {config.others_least:.0%} meanwhile": all(one >= config.others_least for one in others),
    }


# ---- clients ------------------------------------------------------------------------------------------------------


@dataclass
class Clients:
    """Those who send pictures, and what they saw. All times are of the monotonic clock."""

    url: str
    count: int
    seed: int
    pace_s: float = 0.0
    """From one picture of a client to its next; one that is answered later is followed at once."""
    events: list[tuple[float, Seen, str]] = field(default_factory=list)
    """Every attempt's end: when, what, and a code or an error's name."""
    probes: list[tuple[float, str, bool]] = field(default_factory=list)
    """When a single stage was asked, which route, and whether it answered."""
    answered: dict[str, str] = field(default_factory=dict)
    """Hash of each picture that was answered, wholly or in part, and the answer's id."""
    in_part: Counter[str] = field(default_factory=Counter)
    """Answers in which a stage is missing, by which and why."""
    latencies_s: list[float] = field(default_factory=list)
    """From the first attempt to the answer."""
    attempts: list[int] = field(default_factory=list)
    unanswered: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._over, self._give_up, self._counting = threading.Event(), threading.Event(), threading.Lock()
        self._http = httpx.Client(limits=httpx.Limits(max_connections=None), timeout=60)
        self._pool = ThreadPoolExecutor(self.count + len(ROUTES))
        self._running: list[Any] = []

    def start(self) -> None:
        self._running = [self._pool.submit(self._client, number) for number in range(self.count)]
        self._running += [self._pool.submit(self._probe, *item) for item in enumerate(ROUTES)]

    def complete(self) -> list[float]:
        """When complete answers came, in order."""
        return sorted(at for at, what, _ in list(self.events) if what == "complete")

    def wait_for_probes(self, until: float) -> None:
        """Until every probe that began by then has ended: one that hangs is counted when its time is over."""
        while (
            min(max((at for at, name, _ in list(self.probes) if name == route), default=0.0) for route in ROUTES)
            < until
        ):
            time.sleep(0.2)

    def stop(self, patience_s: float) -> None:
        """No new pictures; those that were sent are sent on until they are answered, or the time is over."""
        self._over.set()
        timer = threading.Timer(patience_s, self._give_up.set)
        timer.start()
        for running in self._running:
            running.result()
        timer.cancel()
        self._pool.shutdown()

    def _client(self, number: int) -> None:
        turn, draw = 0, random.Random(self.seed * 1000 + number)
        while not self._over.is_set():
            began = time.monotonic()
            self._send(number * 1_000_000 + turn, draw)
            turn += 1
            pause_s = self.pace_s * draw.uniform(0.9, 1.1) - (time.monotonic() - began)
            self._over.wait(max(0.0, pause_s))

    def _send(self, number: int, draw: random.Random) -> None:
        from tests.app.load import picture

        data, key, began, attempts = picture(number), f"chaos-{self.seed}-{number}", time.monotonic(), 0
        while not self._give_up.is_set():
            attempts += 1
            what, detail, record, pause_s = self._attempt("/v1/analyze", data, key)
            self.events.append((time.monotonic(), what, detail))
            if record is not None:
                self.answered[record["sha256"]] = record["id"]
                if what == "partial":
                    with self._counting:
                        self.in_part[detail] += 1
                self.latencies_s.append(time.monotonic() - began)
                self.attempts.append(attempts)
                return
            if what == "wrong":
                break
            time.sleep(pause_s * draw.uniform(0.75, 1.25))
        self.unanswered.append(key)

    def _attempt(self, path: str, data: bytes, key: str | None) -> tuple[Seen, str, dict[str, Any] | None, float]:
        """What came of it, its code, the record, and the pause before the next attempt."""
        try:
            headers = {"idempotency-key": key} if key else {}
            answer = self._http.post(f"{self.url}{path}", content=data, headers=headers)
        except httpx.TransportError as error:
            return seen(None), type(error).__name__, None, 0.5
        if answer.status_code == 200:
            record = answer.json()
            codes = ",".join(sorted(f"{error['stage']}:{error['code']}" for error in record["errors"]))
            return seen(200, record["errors"]), codes, record, 0.0
        code = str(answer.status_code)
        with suppress(ValueError, TypeError, KeyError):
            code = f"{code} {answer.json()['code']}"
        return seen(answer.status_code), code, None, float(answer.headers.get("retry-after", 0.5))

    def _probe(self, position: int, route: str) -> None:
        from tests.app.load import picture

        number = 100_000_000 * (position + 1)
        with httpx.Client(timeout=10) as http:
            while not self._over.wait(1.0):
                number, began, good = number + 1, time.monotonic(), False
                with suppress(httpx.TransportError):
                    answer = http.post(f"{self.url}/v1/{route}", content=picture(number))
                    good = answer.status_code == 200 and not answer.json()["errors"]
                self.probes.append((began, route, good))


# ---- processes ----------------------------------------------------------------------------------------------------


def processes_of(port: int, kind: str) -> list[psutil.Process]:
    """The running processes of a kind."""
    if kind == "head":
        return cluster.daemons(port)
    found = []
    for process in cluster.processes(port):
        with suppress(psutil.Error, IndexError):
            line = process.cmdline()
            if kind in _NAMES:
                fits = process.name().startswith(_NAMES[kind])
            elif kind == "node":
                fits = process.name() == "raylet" and "--head" not in line
            else:
                fits = line[0].startswith("ray::") and re.search(_RAY_TITLES[kind], line[0]) is not None
            if fits:
                found.append(process)
    return found


def gcs_address(port: int) -> str:
    """Where the instance's GCS listens."""
    (server,) = [process for process in cluster.daemons(port) if process.name() == "gcs_server"]
    gcs = re.search(r"--gcs_server_port=(\d+)", " ".join(server.cmdline()))
    assert gcs is not None
    return f"127.0.0.1:{gcs[1]}"


def start_node(port: int, cpus: int = 1) -> None:
    """A second node beside the instance's head."""
    command = [sys.executable, "-m", "benchmarks.second_node", gcs_address(port), str(cpus)]
    subprocess.run(command, env=cluster.environment(port), check=True, stdout=subprocess.DEVNULL)


@contextmanager
def prepared(service: Any, kind: str, config: ChaosConfig) -> Iterator[None]:
    """What a kind needs beside the service, while it is killed."""
    if kind == "worker":
        command = [sys.executable, "-m", "benchmarks.bystander", gcs_address(service.port)]
        driver = subprocess.Popen(
            command, env=cluster.environment(service.port), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            wait_for(lambda: bool(processes_of(service.port, "worker")), config.give_up_s)
            yield
        finally:
            driver.terminate()
            driver.wait()
        return
    if kind == "node":
        start_node(service.port)
        service.deployment("Detector")["max_replicas_per_node"] = 1
        service.deployment("Detector")["autoscaling_config"] |= {"min_replicas": 2, "max_replicas": 2}
        service.redeploy()
        wait_for(lambda: len(processes_of(service.port, "detector")) == 2, config.give_up_s)
        time.sleep(config.calm_s)
    yield


def wait_for(condition: Callable[[], bool], timeout_s: float) -> None:
    limit = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > limit:
            raise RuntimeError(f"what was to be killed did not come up in {timeout_s:.0f} s")
        time.sleep(0.5)


def is_replaced(port: int, kind: str, victims: set[int], before: int) -> bool:
    """Whether as many processes of a kind run as did, the victims aside."""
    alive = [process for process in processes_of(port, kind) if process.pid not in victims]
    # with a node comes the replica that ran on it
    return len(alive) >= before and (kind != "node" or len(processes_of(port, "detector")) >= 2)


def kill(port: int, kind: str, turn: int) -> tuple[str, list[psutil.Process]]:
    """SIGKILL to one process of a kind; on the head in turn to the raylet, the GCS and all of Ray."""
    victims = processes_of(port, kind)
    if not victims:
        raise RuntimeError(f"no process of the kind {kind!r} runs")
    if kind == "head":
        names = ("raylet", "gcs_server", "")
        wanted = names[turn % len(names)]
        victims = [one for one in victims if one.name() == wanted] if wanted else cluster.processes(port)
        victims = [one for one in victims if "app.serve" not in " ".join(_line(one))]
    else:
        victims = victims[:1]
    told = victims[0].name().split(".")[0] if len(victims) == 1 else f"{len(victims)} processes"
    for victim in victims:
        with suppress(psutil.Error):
            victim.kill()
    return told, victims


def _line(process: psutil.Process) -> list[str]:
    with suppress(psutil.Error):
        return process.cmdline()
    return []


# ---- a run --------------------------------------------------------------------------------------------------------


def small_graph(config: dict[str, Any]) -> None:
    """The small service's configuration with the queues of production's."""
    application = config["applications"][0]
    application["args"]["tagger"] |= {"max_ongoing_requests": 48, "max_queued_requests": 64}


def wait_for_calm(complete: Callable[[], Sequence[float]], full: float, calm_s: float, give_up_s: float) -> float:
    """The rate of complete answers over ``calm_s``, once it is at least ``full``.

    Raises:
        RuntimeError: it is not, after ``give_up_s``: a kill would be measured on a service that is not well.
    """
    limit = time.monotonic() + give_up_s
    while (calm := rate(complete(), time.monotonic() - calm_s, time.monotonic())) < full:
        if time.monotonic() > limit:
            raise RuntimeError(f"before a kill {calm:.2f} complete answers come a second, and {full:.2f} should")
        time.sleep(0.5)
    return calm


def endure(
    service: Any, clients: Clients, config: ChaosConfig, kind: str, turn: int, cold_s: float, offered: float
) -> dict[str, Any]:
    """Kill one, wait until all is as before, and say what clients saw meanwhile."""
    port = service.port
    full = config.full_share * offered
    calm = wait_for_calm(clients.complete, full, config.calm_s, config.give_up_s)
    before = len(processes_of(port, kind))
    at = time.monotonic()
    what, victims = kill(port, kind, turn)
    gone = {victim.pid for victim in victims}
    took, replaced_at = None, float("inf")
    node_is_due = kind == "node"
    while took is None and time.monotonic() - at < config.give_up_s:
        time.sleep(0.5)
        if node_is_due and time.monotonic() - at >= 1:
            start_node(port)
            node_is_due = False
        now = time.monotonic()
        if replaced_at == float("inf") and is_replaced(port, kind, gone, before):
            replaced_at = now
        took = full_rate_after(clients.complete(), at, full, config.window_s, now, replaced_at)
    over = time.monotonic()
    until = at + max(over - at if took is None else took, config.window_s)
    clients.wait_for_probes(until)
    told = Counter(
        f"{what}: {detail}" if detail else what for moment, what, detail in list(clients.events) if at <= moment <= over
    )
    asked = {
        route: [good for moment, name, good in list(clients.probes) if name == route and at <= moment <= until]
        for route in ROUTES
    }
    answering = {route: round(sum(goods) / len(goods), 3) if goods else None for route, goods in asked.items()}
    others = [
        good
        for route, needs in ROUTES.items()
        if kind not in needs and kind not in _ALL_STAGES
        for good in asked[route]
    ]
    row = {
        "kind": kind,
        "killed": what,
        "rate_before": round(calm, 2),
        "replaced_after_s": None if replaced_at == float("inf") else round(replaced_at - at, 1),
        "full_rate_after_s": None if took is None else round(took, 1),
        "of_cold_start": None if took is None else round(took / cold_s, 2),
        "others_answered": None if not others else round(sum(others) / len(others), 3),
        "routes_answered": answering,
        "clients_saw": dict(told.most_common()),
        "at_s": at,
    }
    print({key: value for key, value in row.items() if key not in ("at_s",)}, flush=True)
    return row


def read_store(database: Path) -> list[tuple[str, str, str | None]]:
    """Rows of answers that clients sent under a name."""
    with sqlite3.connect(f"file:{database}?mode=ro", uri=True, timeout=60) as connection:
        return list(connection.execute("SELECT sha256, answer_id, name FROM predictions"))


def run(config: ChaosConfig, folder: Path, in_service: Callable[..., Any]) -> dict[str, Any]:
    """All kills in one service, and what became of everything."""
    database, kinds = folder / "store.db", [kind.strip() for kind in config.kinds.split(",")]
    os.environ["DEEPTRUST_STORE_URL"] = f"sqlite:///{database}"
    rows: list[dict[str, Any]] = []
    with in_service(folder, change=small_graph, request_timeout_s=30.0, max_wait_s=20.0) as service:
        cold_s = time.time() - psutil.Process(service.process.pid).create_time()
        print(f"ready {cold_s:.1f} s after the start", flush=True)
        clients = Clients(service.url, config.clients, config.seed)
        began = time.monotonic()
        clients.start()
        time.sleep(config.calm_s + config.measure_s)  # the first answers are slow, and do not count
        full = rate(clients.complete(), time.monotonic() - config.measure_s, time.monotonic())
        clients.pace_s = config.clients / (config.share * full)
        print(f"{full:.2f} complete answers a second without pauses; {config.share:.0%} of it now", flush=True)
        time.sleep(config.calm_s)
        for kind in sorted(kinds, key=KINDS.index):  # the head last: it takes the second node with it
            with prepared(service, kind, config):
                for turn in range(config.times):
                    rows.append(endure(service, clients, config, kind, turn, cold_s, config.share * full))
        clients.stop(config.give_up_s)
        ended = time.monotonic()
        time.sleep(5)  # what was answered last is written
        mine = [row for row in read_store(database) if row[2] is not None]
        store = kept(mine, set(clients.answered))
        by_hash = Counter(row[0] for row in read_store(database))
    times = clients.complete()
    seconds = [round(at - began, 2) for at in times]
    for row in rows:
        row["at_s"] = round(row["at_s"] - began, 1)
    slowest = max((row["of_cold_start"] for row in rows if row["of_cold_start"] is not None), default=None)
    others = [row["others_answered"] for row in rows if row["others_answered"] is not None]
    in_part = sum(clients.in_part.values())
    result = {
        "cold_start_s": round(cold_s, 1),
        "rate_without_pauses": round(full, 2),
        "kills": rows,
        "slowest_of_cold_start": slowest,
        "never_at_full_rate": sum(row["full_rate_after_s"] is None for row in rows),
        "others_answered_least": min(others, default=None),
        "requests": len(clients.latencies_s) + len(clients.unanswered),
        "answered_whole": len(clients.latencies_s) - in_part,
        "answered_in_part": in_part,
        "in_part": dict(clients.in_part.most_common()),
        "unanswered": len(clients.unanswered),
        "sent_more_than_once": sum(count > 1 for count in clients.attempts),
        "most_attempts": max(clients.attempts, default=0),
        "latency_s_p50_p99_max": [round(quantile(clients.latencies_s or [0.0], share), 2) for share in (0.5, 0.99, 1)],
        "attempts_saw": dict(Counter(what for _, what, _ in clients.events).most_common()),
        "in_store": store.rows,
        "in_store_twice": store.twice + sum(count - 1 for count in by_hash.values()),
        "answered_and_not_in_store": store.missing,
        "minutes": round((ended - began) / 60, 1),
        "complete_answers_at_s": seconds,
        "settings": config.model_dump(mode="json"),
    }
    return result | {"bars": judge(result, config)}


def draw(result: dict[str, Any], folder: Path) -> Path:
    """Complete answers a second over the run, and when what was killed; how long each kind's slowest kill took."""
    times, width = result["complete_answers_at_s"], 2.0
    bins = [0] * (int((times[-1] if times else 0) / width) + 1)
    for moment in times:
        bins[int(moment / width)] += 1
    slowest: dict[str, float] = {}
    for row in result["kills"]:
        share = math.inf if row["of_cold_start"] is None else row["of_cold_start"]
        slowest[row["kind"]] = max(slowest.get(row["kind"], 0.0), share)

    def onto(axes: Any) -> None:
        left, right = axes
        left.plot([index * width for index in range(len(bins))], [count / width for count in bins], linewidth=0.8)
        last, top = "", max(bins, default=1) / width
        for row in result["kills"]:
            left.axvline(row["at_s"], color=plots.COLOURS[1], linewidth=0.7)
            if row["kind"] != last:
                height = 1.03 + 0.07 * (
                    list(slowest).index(row["kind"]) % 4
                )  # some kinds are killed soon after another
                left.text(row["at_s"], top * height, row["kind"], fontsize=7)
            last = row["kind"]
        left.set(xlabel="seconds", ylabel="complete answers a second", ylim=(0, top * 1.3))
        ceiling = 2 * result["settings"]["slowest_of_cold"]
        right.barh(list(slowest), [min(share, ceiling) for share in slowest.values()], color=plots.COLOURS[0])
        right.axvline(result["settings"]["slowest_of_cold"], color="#888888", linewidth=0.8, linestyle="--")
        right.invert_yaxis()
        right.set(xlabel="slowest time to the full rate, of a cold start (dashed: goal)")

    return plots.save("chaos", onto, panels=2, folder=folder)


def main(arguments: list[str] | None = None) -> None:
    """Kill, wait, count; exit status 1 when a bar was missed."""
    from pydantic_settings import CliApp

    from tests.app.small_service import small_service

    config = CliApp.run(ChaosConfig, cli_args=arguments)
    if unknown := {kind.strip() for kind in config.kinds.split(",")} - set(KINDS):
        raise SystemExit(f"error: no kind {', '.join(sorted(unknown))}; there are {', '.join(KINDS)}")
    with tempfile.TemporaryDirectory(prefix="deeptrust-chaos-") as name:
        result = run(config, Path(name), small_service)
    folder = QUICK if config.quick else RESULTS
    columns = ("kind", "killed", "rate_before", "replaced_after_s", "full_rate_after_s", "of_cold_start")
    print(plots.table([{key: row[key] for key in (*columns, "others_answered")} for row in result["kills"]]))
    print({key: value for key, value in result.items() if key not in ("kills", "complete_answers_at_s", "settings")})
    print(draw(result, folder), write_result("chaos", result, folder), flush=True)
    if missed := [bar for bar, met in result["bars"].items() if not met]:
        raise SystemExit(f"error: missed: {'; '.join(missed)}; see above")


if __name__ == "__main__":
    main()
