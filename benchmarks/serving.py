"""The whole graph under load: an application that it starts, or a running one (``--url``).

Three measurements, each on real photos over HTTP with the client on the same machine:

* ``photos``    every photo answered completely, none 5xx, no replica restarted
* ``ratio``     throughput against the same three models called back to back in a process of their own, without HTTP,
with the allocator of replicas, batches in parts as theirs and the application paused, in alternating rounds: the tagger
with as many captions at once as it takes, and with as many as there are clients; where an answer's time and the
processors' time go
* ``overload``  four times the clients that saturate it, no think time: goodput against its best, what is refused,
memory, and which process works how long for an answer. Steady state: what is answered in the first seconds, while the
batches fill, and after the clients have stopped does not count

    python -m benchmarks.serving --photos DIR [--parts photos,ratio,overload] [--url http://127.0.0.1:8000]
"""

from __future__ import annotations

import asyncio
import io
import os
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
from pydantic import BaseModel, ConfigDict, Field

from app import cluster
from benchmarks import plots
from benchmarks.application import application
from benchmarks.load import closed_loop, session
from benchmarks.processes import ALLOCATOR, Apart, paused, pss, sampled
from benchmarks.report import RESULTS, write_result

#: Of the rate of the models back to back.
_GOAL = 0.85
#: Of a phase of `overload`, what is printed.
_COLUMNS = ("clients", "complete", "goodput_per_s", "latency_ms_p50_p95_p99", "statuses", "memory_mb_least_most")


class ServingConfig(BaseModel):
    """Settings of a run."""

    model_config = ConfigDict(extra="forbid")

    photos: Path = Field(description="folder of photos (JPEG, PNG), searched recursively")
    url: str | None = Field(None, description="the running application; null: one is started, as by `make serve`")
    parts: str = Field("photos,ratio,overload", description="which measurements")
    count: int = Field(500, ge=8, description="photos sent by `photos`")
    clients: int = Field(16, ge=1, description="clients that saturate it")
    rounds: int = Field(3, ge=1, description="alternating rounds of `ratio`")
    round_photos: int = Field(64, ge=8, description="photos in a round")
    overload_s: float = Field(150.0, gt=0, description="length of each phase of `overload`, counted after `warm_s`")
    warm_s: float = Field(30.0, ge=0, description="beginning of a phase of `overload` that does not count")
    seed: int = 11


@dataclass
class Load:
    """What clients saw."""

    seconds: float = 0.0
    statuses: Counter[int] = field(default_factory=Counter)
    complete: int = 0
    latencies_ms: list[float] = field(default_factory=list)
    retry_after: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    stages_ms: list[dict[str, float]] = field(default_factory=list)
    """`timings_ms` of each complete answer."""
    completed_at: list[float] = field(default_factory=list)
    """When each complete answer came, seconds since the start."""
    window: tuple[float, float] | None = None
    """From when to when answers count, seconds since the start; None: all of the time."""

    @property
    def goodput(self) -> float:
        """Complete answers a second."""
        if self.window is None:
            return self.complete / self.seconds
        begin, end = self.window
        return sum(begin <= moment < end for moment in self.completed_at) / (end - begin)

    def summary(self) -> dict[str, Any]:
        """Figures for the result file."""
        quantiles = np.quantile(self.latencies_ms, (0.5, 0.95, 0.99)) if self.latencies_ms else [0, 0, 0]
        return {
            "seconds": round(self.seconds, 1),
            "statuses": dict(self.statuses),
            "complete": self.complete,
            "goodput_per_s": round(self.goodput, 3),
            "latency_ms_p50_p95_p99": [round(float(value)) for value in quantiles],
            "refused_with_retry_after": self.retry_after,
            "stages_without_answer": dict(self.errors),
        }


async def drive(url: str, photos: list[bytes], clients: int, seconds: float | None = None) -> Load:
    """Closed loop: each client sends the next photo as soon as it has its answer, until all are sent or the time is
    over.
    """
    load = Load()
    started = time.perf_counter()

    def go_on(number: int) -> bool:
        return number < len(photos) if seconds is None else time.perf_counter() - started < seconds

    async def send(http: httpx.AsyncClient, number: int) -> None:
        begun = time.perf_counter()
        try:
            answer = await http.post(f"{url}/v1/analyze", content=photos[number % len(photos)])
        except httpx.HTTPError as error:
            load.statuses[-1] += 1
            print(f"request failed: {error!r}", flush=True)
            return
        load.statuses[answer.status_code] += 1
        if answer.status_code == 200:
            record = answer.json()
            if not record["errors"] and record["detection"] and record["caption"] and record["tags"]:
                load.complete += 1
                load.stages_ms.append(record["timings_ms"])
                load.completed_at.append(time.perf_counter() - started)
            load.errors.update(f"{error['stage']}: {error['code']}" for error in record["errors"])
            load.latencies_ms.append((time.perf_counter() - begun) * 1000)
        load.retry_after += answer.status_code == 429 and "retry-after" in answer.headers

    async with session(clients) as http:
        await closed_loop(http, clients, send, go_on)
    load.seconds = time.perf_counter() - started
    return load


def memory_bytes(port: int) -> int:
    """Proportional set size of every process of the application together."""
    return pss(cluster.processes(port))


def cpu_seconds(port: int) -> Counter[str]:
    """Processor time of the application's processes so far, and of this one, the client, by what they are."""
    total: Counter[str] = Counter()
    for process in [*cluster.processes(port), psutil.Process()]:
        try:
            # a replica's title ends with the method that it is answering
            title = process.cmdline()[0].split(".")[0] if process.name().startswith("ray::") else process.name()
            times = process.cpu_times()
        except (psutil.Error, IndexError):
            continue
        total["client" if process.pid == os.getpid() else title] += times.user + times.system
    return total


def replicas(port: int) -> set[int]:
    """Process ids of everything that could have been restarted."""
    return {process.pid for process in cluster.processes(port) if "ServeReplica" in " ".join(process.cmdline())}


def read_photos(folder: Path, count: int, seed: int) -> list[bytes]:
    """A sample of the folder's photos that decode."""
    from PIL import Image

    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    random.Random(seed).shuffle(paths)
    photos: list[bytes] = []
    for path in paths:
        data = path.read_bytes()
        try:
            with Image.open(io.BytesIO(data)) as image:
                image.load()
                if min(image.size) < 16:
                    continue
        except Exception:  # the folder may be dirty; only what decodes is a photo here  # nosec B112
            continue
        photos.append(data)
        if len(photos) == count:
            break
    return photos


def ratio_part(config: ServingConfig, url: str, port: int, photos: list[bytes]) -> dict[str, Any]:
    """The service and the models back to back, in turn."""
    from benchmarks.back_to_back import BackToBack

    models = httpx.get(f"{url}/v1/models").json()
    uris = {stage: models[stage]["uri"] for stage in ("detector", "captioner", "tagger")}
    rounds: list[dict[str, float]] = []
    answers: list[dict[str, float]] = []
    spent: Counter[str] = Counter()
    with Apart(ALLOCATOR, BackToBack, uris) as direct:

        def back_to_back(chosen: list[bytes], group: int) -> float:
            with paused(partial(cluster.processes, port)):
                return float(direct.call("run", chosen, 8, group))

        def served(chosen: list[bytes]) -> float:
            before = cpu_seconds(port)
            load = asyncio.run(drive(url, chosen, config.clients))
            spent.update(cpu_seconds(port) - before)
            if load.complete != len(chosen):  # a refusal is quick
                raise SystemExit(f"error: {load.complete} complete answers to {len(chosen)} photos: {load.summary()}")
            answers.extend(load.stages_ms)
            return load.seconds

        ways: dict[str, Callable[[list[bytes]], float]] = {
            "back_to_back_s": partial(back_to_back, group=64),
            "as_many_in_work_s": partial(back_to_back, group=config.clients),
            "served_s": served,
        }
        direct.call("run", photos[:8])
        for number in range(config.rounds):
            enough = photos * -(-config.round_photos // len(photos))
            chosen = random.Random(number).sample(enough, config.round_photos)
            turn = list(ways)[number % 3 :] + list(ways)[: number % 3]
            seconds = {way: ways[way](chosen) for way in turn}
            rounds.append(
                {way: round(seconds[way], 2) for way in ways}
                | {
                    "ratio": round(seconds["back_to_back_s"] / seconds["served_s"], 3),
                    "ratio_as_many_in_work": round(seconds["as_many_in_work_s"] / seconds["served_s"], 3),
                }
            )
            print(rounds[-1], flush=True)
    count = len(answers)
    return {
        "rounds": rounds,
        "ratio_median": statistics.median(entry["ratio"] for entry in rounds),
        "ratio_as_many_in_work_median": statistics.median(entry["ratio_as_many_in_work"] for entry in rounds),
        "clients": config.clients,
        "photos_a_round": config.round_photos,
        # detector and captioner work on a picture at once, and each waits for its batch
        "median_ms_of_an_answer": {
            stage: round(statistics.median(answer[stage] for answer in answers)) for stage in answers[0]
        },
        "cpu_seconds_per_answer": {name: round(value / count, 3) for name, value in spent.most_common(12)},
    }


def overload_part(config: ServingConfig, url: str, port: int, photos: list[bytes]) -> dict[str, Any]:
    """As many clients as saturate it, four times as many, and as many as before."""
    phases = []
    for clients in (config.clients, 4 * config.clients, config.clients):
        spent_before = cpu_seconds(port)
        with sampled(partial(memory_bytes, port), 5.0) as memory:
            load = asyncio.run(drive(url, photos, clients, config.warm_s + config.overload_s))
        load.window = (config.warm_s, config.warm_s + config.overload_s)
        spent = cpu_seconds(port) - spent_before
        phases.append(
            load.summary()
            | {
                "clients": clients,
                "memory_mb_least_most": [round(size(memory) / 2**20) for size in (min, max)],
                "cpu_seconds_per_answer": {
                    name: round(value / max(1, load.complete), 3) for name, value in spent.most_common(12)
                },
            }
        )
        print(phases[-1], flush=True)
    reference = max(phases[0]["goodput_per_s"], phases[2]["goodput_per_s"])
    return {
        "phases": phases,
        "goodput_of_best": round(phases[1]["goodput_per_s"] / reference, 3),
        "settings": config.model_dump(mode="json", exclude={"photos", "url"}),
    }


def show(result: dict[str, Any], folder: Path = RESULTS) -> str:
    """The table of ``ratio``, and its plot."""
    ways = {
        "back_to_back_s": "models back to back",
        "as_many_in_work_s": f"back to back, {result['clients']} in work",
        "served_s": "served",
    }
    rates = {
        name: [result["photos_a_round"] / entry[way] for entry in result["rounds"]]
        for way, name in ways.items()
        if way in result["rounds"][0]
    }
    return plots.compared("serving_ratio", rates, "photos/s", _GOAL, folder)


def main(arguments: list[str] | None = None) -> None:
    """Run the chosen parts and write ``results/serving_PART.json``, of ``ratio`` a plot as well."""
    from pydantic_settings import CliApp

    config = CliApp.run(ServingConfig, cli_args=arguments)
    parts = config.parts.split(",")
    photos = read_photos(config.photos, config.count, config.seed)
    print(f"{len(photos)} photos, {sum(map(len, photos)) / len(photos) / 1000:.0f} kB on average", flush=True)
    with ExitStack() as stack:
        url = config.url or stack.enter_context(application()).url
        port = int(url.rsplit(":", 1)[1])
        asyncio.run(drive(url, photos[:32], config.clients))  # warm
        if "photos" in parts:
            before = replicas(port)
            load = asyncio.run(drive(url, photos, config.clients))
            result = load.summary() | {"clients": config.clients, "replicas_restarted": len(before - replicas(port))}
            print(plots.table([result]), write_result("serving_photos", result), sep="\n", flush=True)
        if "ratio" in parts:
            result = ratio_part(config, url, port, photos)
            print(show(result), write_result("serving_ratio", result), sep="\n", flush=True)
        if "overload" in parts:
            result = overload_part(config, url, port, photos)
            phases = [{name: phase[name] for name in _COLUMNS} for phase in result["phases"]]
            path = write_result("serving_overload", result)
            print(plots.table(phases), f"goodput of the best: {result['goodput_of_best']}", path, sep="\n", flush=True)


if __name__ == "__main__":
    main()
