"""The online data simulator: the held-out production split of a prepared version, sent to a running application.

    python -m data.simulate VERSION --output FOLDER [--url URL] [--pattern original|constant|ramp|spike]
    python -m data.simulate VERSION --output FOLDER --pattern poisson --rate 5 --phase-s 120

In: a version and an address. Out, in a new folder below ``--output``: ``requests.jsonl``, a line for each request with
the prediction beside the truth, written as answers come (a kill loses none that came); ``report.json`` and
``report.html``. Ctrl-C ends it early, with a report of what there was; ``python -m data.simulate_report FOLDER`` makes
the report of a run that was killed.

Closed patterns keep so many clients busy, as the original simulator did; a slow server is asked less. ``poisson`` does
not wait: requests arrive at a rate, whatever the server does, and latency counts from when a request was *due*. That
is why httpx drives and not Locust, whose users all wait for their answers. 429 is honoured: the client comes back
after ``Retry-After``, at most ``--retries`` times.

Knows the HTTP API and no model; checks no figure, it reports them.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

import httpx
from pydantic import BaseModel, ConfigDict, Field
from pydantic_settings import CliPositionalArg

from data.browse import pictures, rows
from data.commands import parse
from data.errors import DataError, end
from data.patterns import Pattern, Phase, arrivals, phases
from data.simulate_report import RECORDS, RUN, write_simulation_report
from data.versions import DataVersion, Split, open_version

#: Pictures are read from the version this many at a time, a block ahead of those who send them.
_BLOCK = 64


class SimulateConfig(BaseModel):
    """The held-out production split against a running application."""

    model_config = ConfigDict(extra="forbid")

    version: CliPositionalArg[str] = Field(description="NAME/VERSION of a prepared data set, local or s3://")
    output: Path = Field(description="folder in which a folder for this run is made")
    url: str = Field("http://127.0.0.1:8000", description="the running application")
    api_key: str | None = Field(None, description="sent as `Authorization: Bearer`, where the application asks for one")
    split: Split = Field("production", description="which split is sent")
    tasks: str | None = Field(None, description="comma-separated; detect for labels, caption for captions if not given")
    pattern: Pattern = "original"
    clients: int = Field(5, ge=1, le=1000, description="at the highest, for constant, ramp and spike")
    phase_s: float = Field(60.0, gt=0, description="length of a phase; for poisson of the whole")
    rate: float = Field(5.0, gt=0, description="requests a second on average, for poisson")
    max_open: int = Field(512, ge=1, description="requests under way at a time, for poisson; those beyond are dropped")
    pictures: int | None = Field(None, ge=1, description="end after so many requests")
    timeout_s: float = Field(90.0, gt=0, description="of one attempt")
    retries: int = Field(5, ge=0, description="after 429, for one picture")
    seed: int = Field(0, description="order of pictures, and arrivals")


@dataclass
class Truth:
    """One picture of the split and what is known of it."""

    id: str
    source: str
    generator: str | None
    label: str | None
    captions: list[str]


class Supply:
    """Pictures in a random order, again and again; each block is read while the one before it is sent."""

    def __init__(self, version: DataVersion, split: Split, truths: Sequence[Truth], seed: int) -> None:
        self._version, self._split, self._truths = version, split, truths
        self._blocks = self._ordered(random.Random(seed))
        self._lock = asyncio.Lock()
        self._block: list[tuple[Truth, bytes]] = []
        self._ahead: asyncio.Task[list[tuple[Truth, bytes]]] | None = None

    async def take(self) -> tuple[Truth, bytes]:
        """The next one."""
        async with self._lock:
            if not self._block:
                self._block = await (self._ahead or self._read())
                self._block.reverse()
                self._ahead = asyncio.create_task(self._read())
            return self._block.pop()

    async def _read(self) -> list[tuple[Truth, bytes]]:
        block = next(self._blocks)
        found = await asyncio.to_thread(pictures, self._version, [truth.id for truth in block], [self._split])
        return [(truth, found[truth.id]) for truth in block]

    def _ordered(self, generator: random.Random) -> Iterator[list[Truth]]:
        while True:
            order = generator.sample(self._truths, len(self._truths))
            yield from (order[first : first + _BLOCK] for first in range(0, len(order), _BLOCK))


@dataclass
class Simulation:
    """One run: whom it asks, what it has written."""

    config: SimulateConfig
    version: DataVersion
    records: IO[str]
    started: float = field(default_factory=time.perf_counter)
    sent: int = 0
    dropped: int = 0
    stopping: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        config = self.config
        frame = rows(self.version, [config.split]).sort_values("id")
        if not len(frame):
            raise DataError(
                f"split {config.split} of {self.version.location} is empty: prepare it with a share for production, or "
                "choose another --split"
            )
        self.truths = [
            Truth(
                row["id"],
                row["source"],
                row["generator"] if isinstance(row["generator"], str) else None,
                row.get("label"),
                list(row["captions"]) if "captions" in row else [],
            )
            for row in frame.to_dict("records")
        ]
        self.tasks = config.tasks or ("detect" if self.truths[0].label else "caption")
        self.begun_at = datetime.now(UTC).isoformat(timespec="seconds")

    # -------------------------------------------------------------------------------------------------------- driving

    async def run(self) -> None:
        """Drive until the pattern is over, the pictures are sent, or ``stopping`` is set."""
        config = self.config
        headers = {"authorization": f"Bearer {config.api_key}"} if config.api_key else {}
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        async with httpx.AsyncClient(timeout=config.timeout_s, limits=limits, headers=headers) as session:
            await self._ask_ready(session)
            self.started = time.perf_counter()
            supply = Supply(self.version, config.split, self.truths, config.seed)
            if config.pattern == "poisson":
                await self._open_loop(session, supply)
            else:
                for number, phase in enumerate(phases(config.pattern, config.clients, config.phase_s)):
                    if self._over():
                        break
                    await self._closed_phase(session, supply, number, phase)

    async def _ask_ready(self, session: httpx.AsyncClient) -> None:
        try:
            await session.get(f"{self.config.url}/healthz", timeout=10)
        except httpx.HTTPError as error:
            raise DataError(
                f"nothing answers at {self.config.url} ({error or type(error).__name__}): start the application with "
                "`make serve`, or name it with --url"
            ) from error

    async def _closed_phase(self, session: httpx.AsyncClient, supply: Supply, number: int, phase: Phase) -> None:
        """So many clients, until the phase's end; requests that it finds under way are waited for."""
        until = time.perf_counter() + phase.seconds

        async def client() -> None:
            while time.perf_counter() < until and not self._over():
                self.sent += 1
                truth, data = await supply.take()
                await self._request(session, truth, data, number, phase.clients, time.perf_counter(), until)

        await self._until_stopped([asyncio.create_task(client()) for _ in range(phase.clients)])

    async def _open_loop(self, session: httpx.AsyncClient, supply: Supply) -> None:
        """A request at each arrival, whoever is still waiting."""
        config, begun = self.config, time.perf_counter()
        tasks: set[asyncio.Task[None]] = set()
        for at in arrivals(config.rate, config.phase_s, config.seed):
            due = begun + at
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.stopping.wait(), max(0.0, due - time.perf_counter()))
            if self._over():
                break
            if len(tasks) >= config.max_open:
                self.dropped += 1
                continue
            self.sent += 1
            truth, data = await supply.take()
            task = asyncio.create_task(
                self._request(session, truth, data, 0, None, due, begun + config.phase_s + config.timeout_s)
            )
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        await self._until_stopped(list(tasks))

    async def _until_stopped(self, tasks: list[asyncio.Task[None]]) -> None:
        """Wait for tasks; when the run is stopped, what is under way is given up."""
        stop = asyncio.create_task(self.stopping.wait())
        try:
            waiting: set[asyncio.Task[Any]] = set(tasks)
            while waiting and not self.stopping.is_set():
                done, _ = await asyncio.wait([*waiting, stop], return_when=asyncio.FIRST_COMPLETED)
                for task in done - {stop}:
                    task.result()
                waiting -= done
        finally:
            for task in [*tasks, stop]:
                task.cancel()
            await asyncio.gather(*tasks, stop, return_exceptions=True)

    def _over(self) -> bool:
        limit = self.config.pictures
        return self.stopping.is_set() or (limit is not None and self.sent >= limit)

    # -------------------------------------------------------------------------------------------------------- asking

    async def _request(
        self,
        session: httpx.AsyncClient,
        truth: Truth,
        data: bytes,
        phase: int,
        clients: int | None,
        due: float,
        patience: float,
    ) -> None:
        """Ask until there is an answer other than 429, and write it down.

        Args:
            due: when the request should have begun; latency counts from there.
            patience: no new attempt begins after this moment.
        """
        record: dict[str, Any] = {
            "id": truth.id,
            "phase": phase,
            "clients": clients,
            "due_s": round(due - self.started, 4),
            "attempts": 0,
            "refused": 0,
            "status": 0,
            "error": None,
            "truth": {
                "label": truth.label,
                "source": truth.source,
                "generator": truth.generator,
                "captions": truth.captions or None,
            },
            "answer": None,
        }
        while True:
            record["attempts"] += 1
            begun = time.perf_counter()
            try:
                answer = await session.post(
                    f"{self.config.url}/v1/analyze",
                    params={"tasks": self.tasks, "id": truth.id},
                    content=data,
                    headers={"content-type": "application/octet-stream"},
                )
            except httpx.HTTPError as error:
                record |= {"status": 0, "error": f"{type(error).__name__}: {error}"[:300]}
                break
            record["status"] = answer.status_code
            if answer.status_code == 429:
                record["refused"] += 1
                wait_s = _retry_after(answer)
                if record["refused"] > self.config.retries or time.perf_counter() + wait_s > patience:
                    record["error"] = "refused"
                    break
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self.stopping.wait(), wait_s)
                if self.stopping.is_set():
                    record["error"] = "refused"
                    break
                continue
            _enter(record, answer)
            break
        now = time.perf_counter()
        record["attempt_ms"] = round((now - begun) * 1000, 2)
        record["latency_ms"] = round((now - due) * 1000, 2)
        record["done_s"] = round(now - self.started, 4)
        self.records.write(json.dumps(record) + "\n")
        self.records.flush()


def _retry_after(answer: httpx.Response) -> float:
    """Seconds to wait; a second where the header is missing or no number."""
    try:
        return min(120.0, max(0.0, float(answer.headers.get("retry-after", "1"))))
    except ValueError:
        return 1.0


def _enter(record: dict[str, Any], answer: httpx.Response) -> None:
    """What the application answered: the prediction, or the problem's code."""
    try:
        body = answer.json()
    except ValueError:
        body = None
    if not isinstance(body, dict):
        record["error"] = "not_json"
    elif answer.status_code != 200:
        record["error"] = str(body.get("code", "unknown"))
    else:
        detection, caption = body.get("detection") or {}, body.get("caption") or {}
        record["answer"] = {
            "label": detection.get("label"),
            "ai_probability": detection.get("ai_probability"),
            "caption": caption.get("text"),
            "tags": body.get("tags"),
            "models": body.get("models") or {},
            "timings_ms": body.get("timings_ms") or {},
            "errors": [
                {"stage": str(each.get("stage")), "code": str(each.get("code"))} for each in body.get("errors") or []
            ],
        }


def simulate(config: SimulateConfig) -> Path:
    """Run it, write the report, and answer the folder of the run.

    Raises:
        DataError: there is no such version or split, nothing answers, or the folder cannot be written.
    """
    version = open_version(config.version)
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S-%f")
    folder = config.output / f"simulation-{config.pattern}-{stamp}"
    try:
        folder.mkdir(parents=True)
        opened = (folder / RECORDS).open("w", encoding="utf-8")
    except OSError as error:
        raise DataError(f"{folder} cannot be written ({error}): choose another --output") from error
    with opened as records:
        simulation = Simulation(config, version, records)
        run: dict[str, Any] = {
            "name": version.manifest.name,
            "version": version.manifest.version,
            "begun_at": simulation.begun_at,
            "tasks": simulation.tasks,
            # a key is nobody's business
            "config": config.model_dump(mode="json", exclude={"api_key"}),
        }
        (folder / RUN).write_text(json.dumps(run, indent=1) + "\n")
        asyncio.run(_run(simulation))
        run |= {
            "seconds": time.perf_counter() - simulation.started,
            "stopped_early": simulation.stopping.is_set(),
            "sent": simulation.sent,
            "dropped": simulation.dropped,
        }
        (folder / RUN).write_text(json.dumps(run, indent=1) + "\n")
    write_simulation_report(folder)
    return folder


async def _run(simulation: Simulation) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, simulation.stopping.set)
    try:
        await simulation.run()
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


def main(arguments: Sequence[str] | None = None) -> None:
    """Simulate as the command line says, and say where the report lies."""
    config = parse(SimulateConfig, arguments)
    try:
        folder = simulate(config)
    except Exception as error:
        end(error)
    figures = json.loads((folder / "report.json").read_text())
    print(
        f"{figures['requests']} requests in {figures['seconds']:.1f} s, {figures['answered']} answered, "
        f"{figures['refusals']} times refused, errors: {figures['errors'] or 'none'}; "
        f"latency p50/p95/p99 {figures['latency_ms']['p50']}/{figures['latency_ms']['p95']}/"
        f"{figures['latency_ms']['p99']} ms",
        flush=True,
    )
    print(f"written: {folder / 'report.html'}", flush=True)


if __name__ == "__main__":
    main()
