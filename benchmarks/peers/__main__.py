"""The detector over HTTP: this project beside what a user would choose instead, same engine and checkpoint, same run.

    python -m benchmarks.peers --photos DIR [--parts tune,measure] [--quick]

Makes an environment for each (``.venv-peers/``; what is pinned in ``requirements-NAME.txt`` beside this file comes from
whatever pip is set up with, PyTorch and the like from the environment that this runs in), lets each server try a few
settings of its own (``tune``), and then measures round after round, 1 to 64 clients without think time. All servers
are up, and all but the one that is measured are stopped (SIGSTOP): turns are seconds apart, since what a machine does
in one minute and in the next can differ by a third. In every round the bounds are measured too: the bare engine, and
the matrix product that it is made of. Allocators are alike (jemalloc that keeps what is freed), but for the original's
way.

Out: ``results/peers.json`` and a plot. What has been measured is kept: the same command goes on after an interruption.

* throughput, p50, p99 of answers, each server alone on the machine, the clients beside it
* processor time a picture of all its processes, and that beyond the bare engine's
* memory: proportional set size of all its processes after the load

What this project does for a picture and no other: it reads provenance, validates limits, and records metrics.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
from pydantic import BaseModel, ConfigDict, Field

from app import cluster
from benchmarks import plots
from benchmarks.application import wait_for_replicas
from benchmarks.load import closed_loop, quantile, session
from benchmarks.peers.model import BATCH, CHECKPOINT, PORT, THREADS, WAIT_S, WORKERS
from benchmarks.processes import ALLOCATOR, SETTLE_S, pause, pss, resume
from benchmarks.report import QUICK, RESULTS, write_result
from benchmarks.serving import read_photos

ROOT = Path(__file__).parents[2]
_HERE = Path(__file__).parent


class PeersConfig(BaseModel):
    """Settings of a run."""

    model_config = ConfigDict(extra="forbid")

    photos: Path = Field(Path("samples"), description="folder of JPEGs of mixed sizes, searched recursively")
    parts: str = Field("tune,measure", description="`tune` chooses each server's settings; `measure` compares")
    quick: bool = Field(False, description="one short round without tuning; shows that it works")
    servers: str = Field("project,original,fastapi,litserve,bentoml", description="which")
    checkpoint: str = Field("starter:detector", description="checkpoint URI of a detector")
    clients: list[int] = Field([1, 4, 16, 64], description="clients without think time")
    rounds: int = Field(3, ge=1)
    measure_s: float = Field(12.0, gt=0, description="of each load, after all clients have had their first answer")
    tune_s: float = Field(12.0, gt=0)
    bare_s: float = Field(6.0, gt=0, description="of each bound")
    threads: int = Field(os.cpu_count() or 2, ge=1, description="OMP_NUM_THREADS of every server")
    count: int = Field(64, ge=8, description="photos")
    environments: Path = Field(ROOT / ".venv-peers", description="where environments are made")
    fresh: bool = Field(False, description="do not go on with an unfinished run")
    seed: int = 11

    @property
    def output(self) -> Path:
        """Where results go."""
        return QUICK if self.quick else RESULTS

    def fingerprint(self) -> str:
        """Of what must be the same for a run to go on."""
        kept = self.model_dump(mode="json", exclude={"fresh", "parts", "servers", "environments"})
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:12]


# -------------------------------------------------------------------------------------------------------------- servers


Sender = Callable[[httpx.AsyncClient, str, bytes], Any]


async def _raw(session: httpx.AsyncClient, url: str, data: bytes) -> httpx.Response:
    return await session.post(url, content=data, headers={"content-type": "application/octet-stream"})


async def _base64(session: httpx.AsyncClient, url: str, data: bytes) -> httpx.Response:
    return await session.post(url, json={"image": base64.b64encode(data).decode()})


async def _form(session: httpx.AsyncClient, url: str, data: bytes) -> httpx.Response:
    return await session.post(url, files={"file": ("a.jpg", data, "image/jpeg")})


async def _forms(session: httpx.AsyncClient, url: str, data: bytes) -> httpx.Response:
    return await session.post(url, files={"files": ("a.jpg", data, "image/jpeg")})


@dataclass(frozen=True)
class Server:
    """How a server is started, asked and tuned."""

    name: str
    environment: str
    """Name of its requirements file; empty: the project's own."""
    command: Callable[[Path, int], list[str]]
    path: str
    ready: str
    send: Sender
    tries: list[dict[str, str]] = field(default_factory=lambda: [{}])


def _module(name: str) -> Callable[[Path, int], list[str]]:
    return lambda python, port: [str(python), "-m", f"benchmarks.peers.{name}"]


def _bento(python: Path, port: int) -> list[str]:
    service = "benchmarks.peers.bentoml_server:DetectorService"
    return [str(python), "-m", "bentoml", "serve", service, "--host", "127.0.0.1", "--port", str(port)]


_BATCHES = [{BATCH: "4"}, {BATCH: "8"}, {BATCH: "16"}]
#: Two processes that share no layer, with a thread each: what a replica of this project does by threads as well.
_OMP = "OMP_NUM_THREADS"
_WORKERS = {BATCH: "4", WORKERS: "2", _OMP: "1"}
SERVERS = {
    server.name: server
    for server in (
        Server("project", "", lambda python, port: [], "/v1/detect", "/readyz", _raw, [*_BATCHES, _WORKERS]),
        Server("original", "fastapi", _module("original"), "/predict", "/ready", _base64),
        Server(
            "fastapi",
            "fastapi",
            _module("fastapi_threads"),
            "/predict",
            "/ready",
            _raw,
            [{THREADS: "1"}, {THREADS: "2"}],
        ),
        Server(
            "litserve",
            "litserve",
            _module("litserve_server"),
            "/predict",
            "/health",
            _form,
            [*_BATCHES, {BATCH: "8", WAIT_S: "0.05"}, _WORKERS],
        ),
        Server("bentoml", "bentoml", _bento, "/predict", "/readyz", _forms, [*_BATCHES, _WORKERS]),
    )
}


def environment(name: str, root: Path) -> Path:
    """The Python of a server's own environment, made if it is not there or its list has changed.

    What it does not list it takes from the environment that this runs in: that one's packages come after its own on
    the path, so that what it pins wins and nothing large is downloaded twice.
    """
    if not name:
        return Path(sys.executable)
    pinned = (_HERE / f"requirements-{name}.txt").read_text()
    shared = os.path.realpath(sysconfig.get_path("purelib"))
    wanted = f"{pinned}{shared}\n"
    folder = root / name
    python, stamp = folder / "bin" / "python", folder / "made"
    if stamp.is_file() and stamp.read_text() == wanted:
        return python
    print(f"making the environment of {name}: {len(pinned.split())} pinned packages", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    base = Path(sys.base_prefix) / "bin" / f"python{sys.version_info.major}.{sys.version_info.minor}"
    subprocess.run([str(base if base.is_file() else sys.executable), "-m", "venv", str(folder)], check=True)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    (folder / "lib" / version / "site-packages" / "shared.pth").write_text(f"{shared}\n")
    install: list[str | Path] = [python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps"]
    # `--ignore-installed`: what the shared environment has is not to count as installed
    subprocess.run([*install, "--ignore-installed", "-r", _HERE / f"requirements-{name}.txt"], check=True)
    stamp.write_text(wanted)
    return python


def versions(config: PeersConfig) -> dict[str, str]:
    """What is pinned for each, in a line."""
    names = {SERVERS[name].environment for name in config.servers.split(",")} - {""}
    return {name: (_HERE / f"requirements-{name}.txt").read_text().replace("\n", " ").strip() for name in names}


@dataclass
class Running:
    """A server that answers."""

    url: str
    processes: Callable[[], list[psutil.Process]]

    def cpu_s(self) -> float:
        """Processor time of its processes so far."""
        total = 0.0
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                total += times.user + times.system
        return total

    def memory_bytes(self) -> int:
        """Proportional set size of its processes."""
        return pss(self.processes())

    def pause(self) -> None:
        """Stop its processes where they are."""
        pause(self.processes())

    def resume(self) -> None:
        """Have its processes go on."""
        resume(self.processes())

    @contextmanager
    def awake(self) -> Iterator[None]:
        """It runs meanwhile, and has had time to see to what it missed."""
        self.resume()
        time.sleep(SETTLE_S)
        try:
            yield
        finally:
            self.pause()


@contextmanager
def started(server: Server, settings: dict[str, str], config: PeersConfig, log: Path) -> Iterator[Running]:
    """A server, until it is no longer needed; nothing of it is left.

    Raises:
        RuntimeError: it did not start; the message has the end of its log.
    """
    port = cluster.free_port(8320)
    python = environment(server.environment, config.environments)
    own = {_OMP: str(config.threads), "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}
    own |= {CHECKPOINT: config.checkpoint, PORT: str(port), "PYTHONPATH": str(ROOT), "BENTOML_DO_NOT_TRACK": "True"}
    if server.name == "project":
        with _project(port, settings, config) as running:
            yield running
        return
    if server.name != "original":
        own |= ALLOCATOR
    with tempfile.TemporaryDirectory() as home, log.open("w") as output:
        process = subprocess.Popen(
            server.command(python, port),
            env=os.environ | own | settings | {"BENTOML_HOME": home},
            cwd=ROOT,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        tree = psutil.Process(process.pid)
        seen: dict[int, psutil.Process] = {}

        def family() -> list[psutil.Process]:
            with contextlib.suppress(psutil.Error):
                seen.update({one.pid: one for one in (tree, *tree.children(recursive=True))})
            return list(seen.values())

        url = f"http://127.0.0.1:{port}"
        running = Running(f"{url}{server.path}", family)
        try:
            _wait(f"{url}{server.ready}", process, log)
            yield running
        finally:
            running.resume()  # who is stopped does not end
            for one in reversed(family()):
                with contextlib.suppress(psutil.Error):
                    one.terminate()
            _, alive = psutil.wait_procs(family(), timeout=15)
            for one in alive:
                with contextlib.suppress(psutil.Error):
                    one.kill()
            process.wait()


@contextmanager
def _project(port: int, settings: dict[str, str], config: PeersConfig) -> Iterator[Running]:
    from app.serve import deploy, wait_until_ready
    from benchmarks.peers.project import configuration

    instance = cluster.start(port, max(2, os.cpu_count() or 2), 200 * 2**20)
    running = Running(f"{instance.url}/v1/detect", lambda: cluster.processes(port))
    try:
        batch, wait_s = int(settings.get(BATCH, 8)), float(settings.get(WAIT_S, 0.0))
        replicas, threads = int(settings.get(WORKERS, 1)), int(settings.get(_OMP, config.threads))
        deploy(instance, configuration(port, config.checkpoint, batch, wait_s, replicas, threads))
        wait_until_ready(instance, 600)
        wait_for_replicas(instance, replicas, "Detector")
        yield running
    finally:
        running.resume()  # who is stopped does not end
        cluster.stop(port)


def _wait(url: str, process: subprocess.Popen[bytes], log: Path, timeout_s: float = 300.0) -> None:
    limit = time.monotonic() + timeout_s
    while time.monotonic() < limit:
        if process.poll() is not None:
            break
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(url, timeout=5).status_code == 200:
                return
        time.sleep(0.3)
    raise RuntimeError(f"{url} does not answer:\n{log.read_text()[-3000:]}")


# ------------------------------------------------------------------------------------------------------------ measuring


def answers_per_s(finished: list[float], since: float) -> float:
    """From ``since`` on: between the last answer before it and the last of all, moments in ascending order.

    Answers come a batch at a time. Those in a window of fixed ends would be a batch more or less: a sixth of twelve
    seconds'.
    """
    before = [moment for moment in finished if moment < since]
    later = len(finished) - len(before)
    return later / (finished[-1] - (before[-1] if before else since)) if later else 0.0


async def drive(
    running: Running, send: Sender, photos: list[bytes], clients: int, warm_s: float, seconds: float
) -> dict[str, Any]:
    """Clients without think time: answers, how long they took, and what they cost, once all have had their first."""
    latencies: list[float] = []
    finished: list[float] = []
    failures: Counter[str] = Counter()
    begun = time.perf_counter()
    ends = begun + warm_s + seconds

    async def ask(http: httpx.AsyncClient, number: int) -> None:
        sent = time.perf_counter()
        try:
            answer = await send(http, running.url, photos[number % len(photos)])
        except httpx.HTTPError as error:
            failures[type(error).__name__] += 1
            return
        now = time.perf_counter()
        if answer.status_code != 200:
            failures[str(answer.status_code)] += 1
            await asyncio.sleep(0.05)
        elif now < ends:
            finished.append(now)
            if now >= begun + warm_s:
                latencies.append(now - sent)

    async def cost() -> float:
        await asyncio.sleep(warm_s)
        before = await asyncio.to_thread(running.cpu_s)
        await asyncio.sleep(max(0.0, ends - time.perf_counter()))
        return await asyncio.to_thread(running.cpu_s) - before

    async with session(clients, 300) as http:
        watched = asyncio.ensure_future(cost())
        await asyncio.gather(watched, closed_loop(http, clients, ask, lambda _: time.perf_counter() < ends))
    per_s = answers_per_s(finished, begun + warm_s)
    return {
        "clients": clients,
        "answers": len(latencies),
        "per_s": per_s,
        "latencies_ms": [round(value * 1000) for value in latencies],
        "cpu_s_each": watched.result() / seconds / per_s if per_s else 0.0,
        "failures": dict(failures),
    }


def bare(config: PeersConfig, photos: list[bytes], batch: int) -> dict[str, Any]:
    """The bounds, measured in a process of their own."""
    with tempfile.TemporaryDirectory() as folder:
        for number, data in enumerate(photos[:batch]):
            (Path(folder) / f"{number:03}.jpg").write_bytes(data)
        own = {_OMP: str(config.threads), "PYTHONPATH": str(ROOT), CHECKPOINT: config.checkpoint}
        own |= ALLOCATOR
        command = [sys.executable, "-m", "benchmarks.peers.bare", folder, str(batch), str(config.bare_s)]
        done = subprocess.run(command, env=os.environ | own, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def tune(config: PeersConfig, photos: list[bytes], result: dict[str, Any], rate: float, logs: Path) -> None:
    """Which of a server's settings answers most at 16 clients; kept in ``result``."""
    for name in config.servers.split(","):
        server = SERVERS[name]
        if name in result["settings"]:
            continue
        tried: list[dict[str, Any]] = []
        for settings in server.tries:
            if len(server.tries) == 1:
                tried.append({"settings": settings, "per_s": 0.0})
                break
            with started(server, settings, config, logs / f"{name}.log") as running:
                load = asyncio.run(drive(running, server.send, photos, 16, 16 / rate + 3, config.tune_s))
            tried.append({"settings": settings, "per_s": load["per_s"], "failures": load["failures"]})
            print(f"  {name} {settings}: {load['per_s']:.2f}/s {load['failures'] or ''}", flush=True)
        best = max(tried, key=lambda one: one["per_s"])
        result["settings"][name], result["tried"][name] = best["settings"], tried
        write_result("peers", result, config.output)


def measure(config: PeersConfig, photos: list[bytes], result: dict[str, Any], logs: Path) -> None:
    """Round after round, at each number of clients the servers in turn, in another order every time."""
    names = config.servers.split(",")
    done = {(one["round"], one["server"], one.get("clients")) for one in result["measurements"]}

    def keep(**measured: Any) -> None:
        result["measurements"].append(measured)
        write_result("peers", result, config.output)

    with contextlib.ExitStack() as up:
        running: dict[str, Running] = {}
        for name in names:
            settings = result["settings"].get(name, SERVERS[name].tries[0])
            running[name] = up.enter_context(started(SERVERS[name], settings, config, logs / f"{name}.log"))
            asyncio.run(drive(running[name], SERVERS[name].send, photos, 8, 2.0, 4.0))  # warm
            running[name].pause()
        for number in range(config.rounds):
            if (number, "bare", None) not in done:
                keep(round=number, server="bare", **bare(config, photos, 8))
            rate = next(
                one["with_decoding_per_s"]
                for one in result["measurements"]
                if one["server"] == "bare" and one["round"] == number
            )
            for turn, clients in enumerate(config.clients):
                first = (number + turn) % len(names)
                for name in names[first:] + names[:first]:
                    if (number, name, clients) in done:
                        continue
                    # all have had an answer by then, from a server at three quarters of the engine
                    warm_s = 2.0 + 1.3 * clients / rate
                    one = running[name]
                    with one.awake():
                        load = asyncio.run(drive(one, SERVERS[name].send, photos, clients, warm_s, config.measure_s))
                        memory = one.memory_bytes()
                    print(f"  round {number} {name}, {clients} clients: {load['per_s']:.2f}/s", flush=True)
                    keep(round=number, server=name, memory_mb=round(memory / 2**20), **load)


# -------------------------------------------------------------------------------------------------------------- figures


def summary(config: PeersConfig, result: dict[str, Any]) -> None:
    """Figures over all rounds and how they stand to the bars, into ``result``."""
    bounds = [one for one in result["measurements"] if one["server"] == "bare"]
    engine_cpu_s = statistics.median(one["engine_cpu_s_each"] for one in bounds)
    table: dict[str, dict[int, dict[str, Any]]] = {}
    rates: dict[tuple[str, int], list[float]] = {}
    for name in config.servers.split(","):
        table[name] = {}
        for clients in config.clients:
            loads = [one for one in result["measurements"] if (one["server"], one.get("clients")) == (name, clients)]
            latencies = [value for load in loads for value in load["latencies_ms"]]
            rates[name, clients] = [load["per_s"] for load in loads]
            table[name][clients] = {
                "per_s": statistics.median(rates[name, clients]),
                "per_s_by_round": [round(value, 3) for value in rates[name, clients]],
                "p50_ms": quantile(latencies, 0.5),
                "p99_ms": quantile(latencies, 0.99),
                "answers": len(latencies),
                "cpu_s_each": statistics.median(load["cpu_s_each"] for load in loads),
                "cpu_s_each_outside_the_engine": statistics.median(load["cpu_s_each"] for load in loads) - engine_cpu_s,
                "memory_mb": statistics.median(load["memory_mb"] for load in loads),
                "failures": sum((Counter(load["failures"]) for load in loads), Counter()),
            }
    result["servers"] = table
    result["bounds"] = {
        name: statistics.median(one[name] for one in bounds) for name in bounds[0] if isinstance(bounds[0][name], float)
    } | {"engine": bounds[0]["engine"]}
    result["bars"] = bars(table, rates, result["bounds"]) if "project" in table else {}


def bars(
    table: dict[str, dict[int, dict[str, Any]]], rates: dict[tuple[str, int], list[float]], bounds: dict[str, Any]
) -> dict[str, Any]:
    """This project against the best peer by throughput, the original's way, and the engine."""
    found: dict[str, Any] = {}
    judged = [clients for clients in (16, 64) if clients in table["project"]]
    peers = [name for name in table if name not in ("project", "original")]
    for clients in judged if peers else ():
        ours = table["project"][clients]
        best = max(peers, key=lambda name: table[name][clients]["per_s"])
        theirs = table[best][clients]
        # round by round: what the machine does hits both alike
        ratios = [a / b for a, b in zip(rates["project", clients], rates[best, clients], strict=False) if b]
        found[f"{clients} clients"] = {
            "best_peer": best,
            "throughput_ratio": statistics.median(ratios),
            "throughput_ratio_range": [min(ratios), max(ratios)],
            "p99_ratio": ours["p99_ms"] / theirs["p99_ms"],
            "cpu_s_each_more": ours["cpu_s_each"] - theirs["cpu_s_each"],
            "throughput >= 1.00": statistics.median(ratios) >= 1.0,
            "p99 <= 1.0": ours["p99_ms"] <= theirs["p99_ms"],
            "processor time outside no more": ours["cpu_s_each_outside_the_engine"]
            <= theirs["cpu_s_each_outside_the_engine"],
        }
    failures: Counter[str] = sum((row["failures"] for row in table["project"].values()), Counter())
    found["failures"] = {"by_kind": dict(failures), "none": not failures}
    for name, bound in (("", bounds["engine_per_s"]), (" with decoding", bounds["with_decoding_per_s"])):
        found[f"of the bare engine{name}"] = {
            "ratio": {f"{clients} clients": row["per_s"] / bound for clients, row in table["project"].items()}
        }
    found["of the bare engine"]["bar >= 0.90"] = {
        f"{clients} clients": table["project"][clients]["per_s"] >= 0.9 * bounds["engine_per_s"] for clients in judged
    }
    found["engine, of the roofline"] = {"ratio": bounds["engine_per_s"] / bounds["roofline_per_s"]}
    if "original" in table:
        most, original = (max(row["per_s"] for row in table[name].values()) for name in ("project", "original"))
        found["of the original's way"] = {"ratio": most / original, "bar >= 2.2": most >= 2.2 * original}
    return found


def show(result: dict[str, Any]) -> str:
    """The table that is printed."""
    rows = [
        {
            "server": name,
            "clients": clients,
            "per s": f"{row['per_s']:.2f}",
            "p50 ms": f"{row['p50_ms']:.0f}",
            "p99 ms": f"{row['p99_ms']:.0f}",
            "cpu s each": f"{row['cpu_s_each']:.3f}",
            "outside": f"{row['cpu_s_each_outside_the_engine']:.3f}",
            "MB": f"{row['memory_mb']:.0f}",
            "failures": sum(row["failures"].values()),
        }
        for name, by_clients in result["servers"].items()
        for clients, row in by_clients.items()
    ]
    bounds = result["bounds"]
    return (
        f"{plots.table(rows)}\nbounds: engine ({bounds['engine']}) {bounds['engine_per_s']:.2f}/s, with decoding "
        f"{bounds['with_decoding_per_s']:.2f}/s, matrix product {bounds['roofline_per_s']:.2f}/s"
    )


def main(arguments: list[str] | None = None) -> None:
    """Tune, measure, and write ``results/peers.json``."""
    from pydantic_settings import CliApp

    # whatever ends this ends what it has started
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    config = CliApp.run(PeersConfig, cli_args=arguments)
    names = config.servers.split(",")
    if unknown := set(names) - set(SERVERS):
        raise SystemExit(f"error: no server {', '.join(sorted(unknown))}; there are {', '.join(SERVERS)}")
    if config.quick:
        config = config.model_copy(update={"rounds": 1, "clients": [1, 16], "measure_s": 6.0, "bare_s": 3.0})
    photos = read_photos(config.photos, config.count, config.seed)
    print(f"{len(photos)} photos, {sum(map(len, photos)) / len(photos) / 1000:.0f} kB on average", flush=True)
    for name in names:
        environment(SERVERS[name].environment, config.environments)
    path = config.output / "peers.json"
    result: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    if config.fresh or result.get("complete", True) or result.get("fingerprint") != config.fingerprint():
        result = {"fingerprint": config.fingerprint(), "settings": {}, "tried": {}, "measurements": []}
    else:
        print("going on with an unfinished run", flush=True)
    result |= {"complete": False, "photos": len(photos), "threads": config.threads, "pinned": versions(config)}
    parts = config.parts.split(",")
    with tempfile.TemporaryDirectory() as folder:
        if "tune" in parts and not config.quick:
            rate = bare(config, photos, 8)["with_decoding_per_s"]
            tune(config, photos, result, rate, Path(folder))
        if "measure" in parts:
            measure(config, photos, result, Path(folder))
            summary(config, result)
            result["complete"] = True
            print(show(result), flush=True)
            print(json.dumps(result["bars"], indent=1), flush=True)
            draw(config, result)
    print(write_result("peers", result, config.output), flush=True)


def draw(config: PeersConfig, result: dict[str, Any]) -> None:
    """Throughput and p99 by clients, with the engine as the bound."""

    def panels(axes: Any) -> None:
        left, right = axes
        for number, (name, rows) in enumerate(result["servers"].items()):
            label = "this project" if name == "project" else name
            for axis, figure, unit in ((left, "per_s", 1), (right, "p99_ms", 1000)):
                values = [row[figure] / unit for row in rows.values()]
                axis.plot(list(rows), values, "o-", color=plots.COLOURS[number], label=label)
        left.axhline(result["bounds"]["engine_per_s"], color="#888888", linewidth=0.8, linestyle="--")
        left.set(xscale="log", xlabel="clients", ylabel="pictures a second (dashed: bare engine)", ylim=(0, None))
        right.set(xscale="log", yscale="log", xlabel="clients", ylabel="p99, s")
        left.legend()

    plots.save("peers", panels, panels=2, folder=config.output)


if __name__ == "__main__":
    main()
