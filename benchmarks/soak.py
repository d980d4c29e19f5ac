"""Whether anything grows or fails in an hour: memory of every process under a steady load.

The service is loaded as fast as it answers for a while, and then, for the time given, with pictures that come at 70 %
of that rate whether earlier ones have been answered or not. Every few seconds the memory of each of its processes is
read (PSS: what it alone has, and its part of what it shares; what it has asked for itself is told beside it). After a
warm-up a straight line is laid through the readings of each process.

Out: ``results/soak.json`` and ``soak.svg``: growth an hour of each process, in per cent of its mean, and what was
answered. No answer may fail, and no process may grow by more than 2 % an hour.

The service is the real one with tiny models (``tests.app.small_service``): processes, graph, store and HTTP are those
of production, what the models say is nonsense.

    python -m benchmarks.soak [--minutes 60]
"""

from __future__ import annotations

import asyncio
import os
import random
import re
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import httpx
import numpy as np
import psutil
from pydantic import BaseModel, ConfigDict, Field

from app import cluster
from benchmarks import plots
from benchmarks.chaos import small_graph
from benchmarks.graph_simulation import poisson
from benchmarks.load import closed_loop, open_loop, quantile, session
from benchmarks.report import QUICK, RESULTS, write_result

_CLIENTS = 16
#: What is not printed of a result in one line.
_LONG = ("processes", "mib_over_time", "asked_for_mib_over_time", "settings")
#: A process that was not there for this share of the readings has no growth an hour.
_PRESENT = 0.8
#: What must not come and go: one that was started again has lost what it had grown by.
_LASTING = re.compile(r"^replica |^VLLM|^raylet$|^gcs_server$|^ServeController$|^HAProxyManager$")


class SoakConfig(BaseModel):
    """Settings of a run."""

    model_config = ConfigDict(extra="forbid")

    minutes: float = Field(60.0, gt=0, description="under the steady load, warm-up included")
    warm_up: float = Field(0.25, ge=0, lt=1, description="share of that which does not count")
    share: float = Field(0.7, gt=0, le=1, description="load, of the rate measured at the start")
    measure_s: float = Field(60.0, gt=0, description="how long that rate is measured")
    sample_s: float = Field(15.0, gt=0, description="between two readings of memory")
    most_growth: float = Field(0.02, gt=0, description="of any process, an hour")
    quick: bool = Field(False, description="the result goes to the folder of quick runs")
    seed: int = 11


# ---- memory -------------------------------------------------------------------------------------------------------

#: Bytes of each process, by what it is and its process id.
Sizes: TypeAlias = dict[tuple[str, int], int]


def name_of(line: Sequence[str], name: str) -> str:
    """What a process is, whatever it does at the moment and whichever replica it is."""
    title = line[0] if line else name
    if title.startswith("ray::"):
        if found := re.search(r"deeptrust[#:](\w+)", title):
            return f"replica {found[1]}"
        return title.removeprefix("ray::").split(".")[0].split(":")[0]
    if name.startswith("python") and "-m" in line[:-1]:
        return f"python -m {line[line.index('-m') + 1]}"
    if name.startswith("python"):
        script = next((part for part in line[1:] if part.endswith(".py")), "")
        return f"python {Path(script).name}".strip()
    return name


def read_memory(port: int) -> tuple[Sizes, Sizes]:
    """Proportional set size of each process of an instance, and what of it is of no file: memory it has asked for.

    The rest are pages of programs and libraries, and a process's part of those changes with who else reads them.
    """
    found: Sizes = {}
    asked_for: Sizes = {}
    for process in cluster.processes(port):
        with suppress(psutil.Error, OSError):
            key = name_of(process.cmdline(), process.name()), process.pid
            lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()[1:]
            told = {name: int(kib) * 1024 for name, kib, _ in map(str.split, lines)}
            found[key], asked_for[key] = told["Pss:"], told["Pss_Anon:"] + told["Pss_Shmem:"]
    return found, asked_for


@dataclass(frozen=True)
class Growth:
    """A straight line through a process's readings."""

    mean_bytes: float
    bytes_an_hour: float

    @property
    def share_an_hour(self) -> float:
        return self.bytes_an_hour / self.mean_bytes


def growth(times_s: Sequence[float], sizes: Sequence[float]) -> Growth:
    """Least squares."""
    slope = float(np.polyfit(np.asarray(times_s) - np.mean(times_s), sizes, 1)[0])
    return Growth(float(np.mean(sizes)), slope * 3600)


def growths(
    readings: Sequence[tuple[float, Sizes]],
) -> tuple[dict[tuple[str, int], Growth], set[str]]:
    """Growth of each process that was there nearly all the time, and the names of those that were not."""
    series: dict[tuple[str, int], list[tuple[float, int]]] = defaultdict(list)
    for at, sizes in readings:
        for key, size in sizes.items():
            series[key].append((at, size))
    enough = max(3, _PRESENT * len(readings))
    found = {key: growth(*zip(*values, strict=True)) for key, values in sorted(series.items()) if len(values) >= enough}
    return found, {name for name, _ in series.keys() - found.keys()}


# ---- load ---------------------------------------------------------------------------------------------------------


@dataclass
class Answers:
    """What came back."""

    told: Counter[str] = field(default_factory=Counter)
    latencies_s: list[float] = field(default_factory=list)

    @property
    def failed(self) -> int:
        return sum(count for what, count in self.told.items() if what != "complete")


async def send(http: httpx.AsyncClient, url: str, number: int, answers: Answers) -> None:
    """One picture."""
    from tests.app.load import picture

    began = time.monotonic()
    try:
        answer = await http.post(f"{url}/v1/analyze", content=picture(number))
    except httpx.HTTPError as error:
        answers.told[type(error).__name__] += 1
        return
    errors = answer.json().get("errors", []) if answer.status_code == 200 else []
    codes = ", ".join(f"{error['stage']}: {error['code']}" for error in errors)
    answers.told[codes or ("complete" if answer.status_code == 200 else str(answer.status_code))] += 1
    answers.latencies_s.append(time.monotonic() - began)


async def closed(url: str, seconds: float, clients: int) -> float:
    """Complete answers a second when each client sends the next picture as soon as it has its answer."""
    answers, end = Answers(), time.monotonic() + seconds

    async def ask(http: httpx.AsyncClient, number: int) -> None:
        await send(http, url, number, answers)

    async with session(clients) as http:
        await closed_loop(http, clients, ask, lambda _: time.monotonic() < end)
    return answers.told["complete"] / seconds


async def at_random(url: str, seconds: float, rate: float, seed: int, answers: Answers) -> None:
    """Pictures that come at a rate, at random moments, whether earlier ones have been answered or not."""

    async def ask(http: httpx.AsyncClient, number: int) -> None:
        await send(http, url, 10**9 + number, answers)  # none that `closed` has sent

    async with session(None) as http:
        await open_loop(http, poisson(random.Random(seed), lambda _: rate, seconds), ask)


# ---- a run --------------------------------------------------------------------------------------------------------


def soaked_graph(config: dict[str, Any]) -> None:
    """The graph of the kills, with a key-value cache whose pages have all been touched within the warm-up: memory that
    was asked for at the start is resident only from its first use, and looks like growth until then."""
    small_graph(config)
    config["applications"][0]["args"]["tagger"]["kv_cache_bytes"] = 2**24


def run(config: SoakConfig, folder: Path, in_service: Callable[..., Any]) -> dict[str, Any]:
    """Load the service and read its memory."""
    os.environ["DEEPTRUST_STORE_URL"] = f"sqlite:///{folder}/store.db"
    readings: list[tuple[float, Sizes]] = []
    readings_asked_for: list[tuple[float, Sizes]] = []
    answers, over = Answers(), threading.Event()
    with in_service(folder, change=soaked_graph, request_timeout_s=60.0, max_wait_s=20.0) as service:
        asyncio.run(closed(service.url, config.measure_s / 2, _CLIENTS))  # warm
        full = asyncio.run(closed(service.url, config.measure_s, _CLIENTS))
        print(f"{full:.2f} complete answers a second with {_CLIENTS} clients; {config.share:.0%} of it now", flush=True)
        began = time.monotonic()

        def watch() -> None:
            while not over.wait(config.sample_s):
                at, (sizes, asked_for) = round(time.monotonic() - began, 1), read_memory(service.port)
                readings.append((at, sizes))
                readings_asked_for.append((at, asked_for))
                if len(readings) % 20 == 0:
                    total = sum(readings[-1][1].values()) / 2**20
                    print(f"{readings[-1][0] / 60:.0f} min, {total:.0f} MiB, {dict(answers.told)}", flush=True)

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            asyncio.run(at_random(service.url, config.minutes * 60, config.share * full, config.seed, answers))
        finally:
            over.set()
            watcher.join()
    warm_s = config.warm_up * config.minutes * 60
    found, others = growths([reading for reading in readings if reading[0] >= warm_s])
    asked_for, _ = growths([reading for reading in readings_asked_for if reading[0] >= warm_s])
    rows = [
        {
            "process": key[0],
            "mib": round(one.mean_bytes / 2**20, 1),
            "mib_an_hour": round(one.bytes_an_hour / 2**20, 2),
            "percent_an_hour": round(100 * one.share_an_hour, 2),
            "asked_for_mib_an_hour": round(asked_for[key].bytes_an_hour / 2**20, 2),
        }
        for key, one in found.items()
    ]
    rows.sort(key=lambda row: -float(str(row["percent_an_hour"])))
    return {
        "rate_with_clients_without_pause": round(full, 3),
        "rate_offered": round(config.share * full, 3),
        "answers": dict(answers.told),
        "failed": answers.failed,
        "latency_s_p50_p99": [round(quantile(answers.latencies_s or [0.0], share), 3) for share in (0.5, 0.99)],
        "processes": rows,
        "grow_too_much": sorted({name for (name, _), one in found.items() if one.share_an_hour > config.most_growth}),
        "came_or_went": sorted(others),
        "started_again": started_again(others),
        "asked_for_mib_over_time": series(readings_asked_for[:: max(1, round(60 / config.sample_s))]),
        "mib_over_time": series(readings[:: max(1, round(60 / config.sample_s))]),  # one a minute shows as much
        "settings": config.model_dump(mode="json"),
    }


def started_again(names: Iterable[str]) -> list[str]:
    """Those of what came or went that should have stayed."""
    return sorted(filter(_LASTING.match, names))


def series(readings: Iterable[tuple[float, Sizes]]) -> dict[str, list[tuple[float, float]]]:
    """MiB over time of all processes of a name together."""
    found: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for at, sizes in readings:
        total: Counter[str] = Counter()
        for (name, _), size in sizes.items():
            total[name] += size
        for name, size in total.items():
            found[name].append((at, round(size / 2**20, 2)))
    return dict(sorted(found.items()))


def draw(result: dict[str, Any], folder: Path) -> Path:
    """Memory over time of the largest kinds of processes."""
    lines = result["mib_over_time"]
    largest = sorted(lines, key=lambda name: -max(size for _, size in lines[name]))[: len(plots.COLOURS)]

    def onto(axes: Any) -> None:
        for name, colour in zip(largest, plots.COLOURS, strict=False):
            axes.plot([at / 60 for at, _ in lines[name]], [size for _, size in lines[name]], color=colour, label=name)
        axes.axvline(result["settings"]["warm_up"] * result["settings"]["minutes"], color="#888888", linewidth=0.7)
        axes.set(xlabel="minutes (after the line it counts)", ylabel="MiB", ylim=(0, None))
        axes.legend(fontsize=7, ncols=2)

    return plots.save("soak", onto, height=4.2, folder=folder)


def main(arguments: list[str] | None = None) -> None:
    """Soak; exit status 1 when an answer failed, or a process grows or was started again."""
    from pydantic_settings import CliApp

    from tests.app.small_service import small_service

    config = CliApp.run(SoakConfig, cli_args=arguments)
    with tempfile.TemporaryDirectory(prefix="deeptrust-soak-") as name:
        result = run(config, Path(name), small_service)
    folder = QUICK if config.quick else RESULTS
    print(plots.table(result["processes"]))
    print({key: value for key, value in result.items() if key not in _LONG})
    print(draw(result, folder), write_result("soak", result, folder), flush=True)
    if result["failed"] or result["grow_too_much"] or result["started_again"]:
        raise SystemExit("error: an answer failed, or a process grows or was started again; see above")


if __name__ == "__main__":
    main()
