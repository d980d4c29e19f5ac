"""What the scale model is fed with and held against: measurements on the machine that this runs on.

* ``calibrate``  the models in this process: seconds of a batch by its size, of an engine's step by the requests in it,
  of decoding a photo
* ``validate``   the running service under known loads beside the model of it: throughput, p50, p99. Twice: with models
  that sleep (the real ingress, router, doors and batches; thousands of answers), and with the starter models
* ``routers``    processor time of controller, proxy and ingress against the number of replicas

Each returns what goes into its result file. Starts and stops services of its own. ``benchmarks.scale`` is the command.
"""

from __future__ import annotations

import asyncio
import io
import json
import math
import os
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import yaml

from app import cluster
from app.serve import deploy, wait_until_ready
from benchmarks.application import application, wait_for_replicas
from benchmarks.graph_simulation import (
    Admitted,
    Batching,
    Generating,
    Graph,
    IngressTimes,
    Service,
    feed,
    feed_clients,
    poisson,
)
from benchmarks.load import closed_loop, open_loop, quantile, session
from benchmarks.plots import table
from benchmarks.processes import ALLOCATOR, process_with
from benchmarks.published import Step
from benchmarks.serving import cpu_seconds, memory_bytes
from benchmarks.simulation import BatchTimes, Scaling

ROOT = Path(__file__).parents[1]
#: Stand-in models of `validate`: near what a GPU takes, and slow enough that two cores are not what limits.
DETECTOR, CAPTIONER, TAGGER = "stand-in:0.06+0.01", "stand-in:0.25+0.02", "stand-in:0.016+0.0008x23"


# ----------------------------------------------------------------------------------------------------------- calibrate


def calibrate(photos: Sequence[bytes], uris: dict[str, str], threads: int, repeats: int) -> dict[str, Any]:
    """Seconds of each model by batch size, computed as its replica does, and of decoding, in this process."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    import torch

    from deployments.captioner import Captioner, CaptionerModel
    from deployments.checkpoints import resolve
    from deployments.detector import Detector, DetectorModel
    from deployments.images import ImageLimits, decode
    from deployments.offline_tagger import OfflineTagger
    from deployments.provenance import read_provenance
    from deployments.tagger import TaggerSettings
    from deployments.views import render

    torch.set_num_threads(threads)
    detector, captioner = DetectorModel(resolve(uris["detector"])), CaptionerModel(resolve(uris["captioner"]))
    decoding = []
    views: dict[str, list[np.ndarray]] = {"detector": [], "captioner": []}
    for data in photos:
        started = time.perf_counter()
        picture = decode(data, ImageLimits())
        read_provenance(data, picture.format)
        made = {
            name: render(picture.image, model.views)
            for name, model in (("detector", detector), ("captioner", captioner))
        }
        decoding.append(time.perf_counter() - started)
        for name in views:
            views[name].append(made[name])
    result: dict[str, Any] = {
        "threads": threads,
        "device": detector.device,
        "decode_s": statistics.fmean(decoding),
        "decode_spread": statistics.pstdev(map(math.log, decoding)),
        "uris": uris,
    }
    captions: list[str] = []
    runs: dict[str, Callable[[np.ndarray], Sequence[Any]]] = {
        "detector": partial(Detector().answers, detector),
        "captioner": partial(Captioner().answers, captioner),
    }
    for name, run in runs.items():
        run(np.stack(views[name][:8]))
        rows = []
        for size in (1, 2, 4, 8) if detector.device == "cpu" else (1, 2, 4, 8, 16, 32):
            times, works = [], []
            for repeat in range(repeats):
                batch = np.stack([views[name][(repeat * size + index) % len(photos)] for index in range(size)])
                begun, worked = time.perf_counter(), time.process_time()
                answers = run(batch)
                times.append(time.perf_counter() - begun)
                works.append(time.process_time() - worked)
                if name == "captioner":
                    captions += [answer["text"] for answer in answers]
            rows.append({"size": size, "seconds": statistics.median(times), "cores": sum(works) / sum(times)})
            print(f"  {name}, {size} at a time: {statistics.median(times):.3f} s", flush=True)
        result[name] = rows
    del runs, run, detector, captioner
    settings = TaggerSettings(device="gpu" if torch.cuda.is_available() else "cpu")
    engine = OfflineTagger(resolve(uris["tagger"]), settings)
    captions = list(dict.fromkeys(captions)) or ["a dog runs on the grass"]
    engine.answer(captions[:2])
    rows = []
    for size in (1, 2, 4, 8, 16):
        times, works, tokens = [], [], []
        for repeat in range(max(2, repeats // 2)):
            chosen = [captions[(repeat * size + index) % len(captions)] for index in range(size)]
            begun, worked = time.perf_counter(), _family_seconds()
            answers = engine.answer(chosen)
            times.append(time.perf_counter() - begun)
            works.append(_family_seconds() - worked)
            counter = engine._engine.get_tokenizer()
            tokens += [len(counter.encode(answer, add_special_tokens=False)) + 1 for answer in answers]
        rows.append(
            {
                "size": size,
                "seconds": statistics.median(times),
                "cores": sum(works) / sum(times),
                "tokens": statistics.fmean(tokens),
                "tokens_spread": statistics.pstdev(tokens),
            }
        )
        print(f"  tagger, {size} at a time: {statistics.median(times):.3f} s", flush=True)
    result["tagger"] = rows
    return result


def calibrate_apart(photos: Sequence[bytes], uris: dict[str, str], threads: int, repeats: int) -> dict[str, Any]:
    """``calibrate`` in a process of its own: with the allocator of replicas, and gone when a service starts."""
    with process_with(ALLOCATOR) as process:
        return process.submit(calibrate, photos, uris, threads, repeats).result()


def _family_seconds() -> float:
    """Processor time of this process and those that it has started."""
    total = 0.0
    for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
        times = process.cpu_times()
        total += times.user + times.system
    return total


def batching(rows: Sequence[dict[str, float]], size: int, wait_s: float) -> Batching:
    """The simulator's figures of a picture model, from ``calibrate``."""
    times = BatchTimes(tuple(int(row["size"]) for row in rows), tuple(row["seconds"] for row in rows))
    return Batching(times, size, wait_s, statistics.fmean(row["cores"] for row in rows))


def generating(rows: Sequence[dict[str, float]], size: int) -> Generating:
    """The simulator's figures of the tagger, from ``calibrate``: all of a batch begin together, the longest ends last,
    and a step is linear in how many are left.
    """
    tokens = statistics.fmean(row["tokens"] for row in rows)
    spread = statistics.fmean(row["tokens_spread"] for row in rows[1:])
    # by least squares of (steps, request-steps) against seconds, weighted to relative errors
    wanted, given = [], []
    for row in rows:
        longest = tokens + spread * _expected_largest(int(row["size"]))
        wanted.append([longest / row["seconds"], tokens * row["size"] / row["seconds"]])
        given.append(1.0)
    base, each = np.linalg.lstsq(np.array(wanted), np.array(given), rcond=None)[0]
    cores = statistics.fmean(row["cores"] for row in rows)
    return Generating(Step(max(1e-6, float(base)), max(0.0, float(each))), size, tokens, spread, cores)


def _expected_largest(count: int) -> float:
    """Of ``count`` draws of a standard normal distribution, by simulation with a fixed seed."""
    chance = random.Random(0)
    return statistics.fmean(max(chance.gauss(0, 1) for _ in range(count)) for _ in range(2000))


# ------------------------------------------------------------------------------------------------------------ services


@dataclass
class Seen:
    """What clients saw."""

    seconds: float = 0.0
    latencies_s: list[float] = field(default_factory=list)
    stages: list[dict[str, float]] = field(default_factory=list)
    failures: Counter[str] = field(default_factory=Counter)

    def figures(self) -> dict[str, float]:
        return {
            "answers": len(self.latencies_s),
            "throughput_per_s": len(self.latencies_s) / self.seconds,
            "p50_s": quantile(self.latencies_s, 0.5),
            "p99_s": quantile(self.latencies_s, 0.99),
        }


async def load(
    url: str, photos: Sequence[bytes], seconds: float, warm_s: float, clients: int = 0, moments: Sequence[float] = ()
) -> Seen:
    """Clients without think time, or requests at given moments; what ends in the first ``warm_s`` does not count."""
    seen = Seen(seconds)
    started = time.perf_counter()
    ends = warm_s + seconds

    async def send(http: httpx.AsyncClient, number: int) -> None:
        begun = time.perf_counter()
        try:
            answer = await http.post(f"{url}/v1/analyze", content=photos[number % len(photos)])
        except httpx.HTTPError as error:
            seen.failures[type(error).__name__] += 1
            return
        now = time.perf_counter() - started
        record = answer.json() if answer.status_code == 200 else None
        if record is None or record["errors"]:
            seen.failures[str(answer.status_code)] += 1
        elif warm_s <= now < ends:
            seen.latencies_s.append(time.perf_counter() - begun)
            seen.stages.append(record["timings_ms"])

    async with session(None) as http:
        await asyncio.gather(
            closed_loop(http, clients, send, lambda _: time.perf_counter() - started < ends),
            open_loop(http, moments, send),
        )
    return seen


def small_photos(count: int, seed: int = 5) -> list[bytes]:
    """JPEGs of 320 x 240 that cost little to decode."""
    from PIL import Image

    rng = np.random.default_rng(seed)
    photos = []
    for _ in range(count):
        rough = Image.fromarray(rng.integers(0, 255, (12, 16, 3), dtype=np.uint8))
        buffer = io.BytesIO()
        rough.resize((320, 240), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=80)
        photos.append(buffer.getvalue())
    return photos


def stand_in_config(
    port: int, replicas: int = 1, ingresses: int = 1, uris: dict[str, str] | None = None
) -> dict[str, Any]:
    """``serve_config.cpu.yaml`` with models that sleep, a fixed number of replicas, and nothing kept.

    Args:
        uris: of each model's stand-in; those of ``validate`` otherwise.
    """
    config = yaml.safe_load((ROOT / "serve_config.cpu.yaml").read_text())
    config["http_options"]["port"] = port
    application = config["applications"][0]
    application["import_path"] = "benchmarks.stand_ins:build"
    application["args"]["store"] = {"keep": "off"}
    application["args"]["limits"] |= {"max_in_flight": 64, "max_waiting": 256}
    application["args"]["tagger"] |= {
        "num_cpus": 0.01,
        "max_num_seqs": 32,
        "min_replicas": replicas,
        "max_replicas": replicas,
    }
    application["args"]["tagger_canary"] = None
    chosen = {"Detector": DETECTOR, "Captioner": CAPTIONER, "Tagger": TAGGER} | (uris or {})
    application["deployments"] = [one for one in application["deployments"] if one["name"] != "TaggerCanary"]
    for one in application["deployments"]:
        if one["name"].endswith("Canary"):
            continue  # at zero replicas, as they are
        if one["name"] == "Drift":
            continue  # watches a detector that has a reference; a stand-in has none
        count = ingresses if one["name"] == "Ingress" else replicas
        if one["name"] != "Tagger":
            one["autoscaling_config"] = {"min_replicas": count, "max_replicas": count}
            one["ray_actor_options"] = {"num_cpus": 0.01}
        if one["name"] in chosen:
            one["user_config"] = one.get("user_config", {}) | {"uri": chosen[one["name"]]}
    return config


@contextmanager
def stand_in_service() -> Iterator[cluster.Instance]:
    """The graph with models that sleep, one replica each, on a free port; nothing of it is left."""
    port = cluster.free_port(8311)
    instance = cluster.start(port, 8, 200 * 2**20)
    try:
        deploy(instance, stand_in_config(port))
        wait_until_ready(instance, 600)
        yield instance
    finally:
        cluster.stop(port)


# ------------------------------------------------------------------------------------------------------------ validate


@dataclass(frozen=True)
class Phase:
    """A known load."""

    name: str
    seconds: float
    clients: int = 0
    rate: float = 0.0

    def moments(self, warm_s: float, seed: int) -> list[float]:
        """When requests come; empty for clients without think time."""
        if not self.rate:
            return []
        return list(poisson(random.Random(seed), lambda _: self.rate, warm_s + self.seconds))


def predicted(
    service: Service, phase: Phase, warm_s: float, moments: Sequence[float] = (), seeds: int = 8
) -> dict[str, float]:
    """The model's figures for the same load, over several runs.

    Args:
        moments: when the requests were sent: what chance did to the load is no error of the model. Empty: of clients
            without think time, for longer than was measured.
    """
    latencies: list[float] = []
    length = phase.seconds if moments else max(phase.seconds, 300.0)
    for seed in range(seeds):
        graph = Graph(service, seed)
        if moments:
            feed(graph, iter(moments))
        else:
            feed_clients(graph, phase.clients)
        graph.clock.run(warm_s + length)
        latencies += [
            ended - arrived for arrived, ended, _, how in graph.outcomes if how == "answered" and ended >= warm_s
        ]
    return {
        "throughput_per_s": len(latencies) / (seeds * length),
        "p50_s": quantile(latencies, 0.5),
        "p99_s": quantile(latencies, 0.99),
    }


def compare(
    url: str, photos: Sequence[bytes], service: Service, phases: Sequence[Phase], warm_s: float
) -> list[dict[str, Any]]:
    """Each load on the service and in the model, and how far they are apart."""
    rows = []
    for number, phase in enumerate(phases):
        moments = phase.moments(warm_s, 100 + number)
        seen = asyncio.run(load(url, photos, phase.seconds, warm_s, phase.clients, moments))
        measured, model = seen.figures(), predicted(service, phase, warm_s, moments)
        errors = {name: model[name] / measured[name] - 1 for name in model}
        rows.append(
            {
                "load": phase.name,
                "measured": measured,
                "model": model,
                "error": errors,
                "failures": dict(seen.failures),
            }
        )
        print(f"{phase.name}, {measured['answers']} answers", flush=True)
        print(table([_row(name, measured, model) for name in model]), flush=True)
    return rows


def _row(name: str, measured: dict[str, float], model: dict[str, float]) -> dict[str, str]:
    error = model[name] / measured[name] - 1
    return {"": name, "measured": f"{measured[name]:.3f}", "model": f"{model[name]:.3f}", "error": f"{error:+.1%}"}


def overheads(port: int, photos: Sequence[bytes], idle_s: float = 10.0) -> dict[str, Any]:
    """What one client at a time costs beside the models: processor time a picture by process, and at rest."""
    url = f"http://127.0.0.1:{port}"
    asyncio.run(load(url, photos, 5.0, 0.0, clients=1))
    before, begun = cpu_seconds(port), time.perf_counter()
    time.sleep(idle_s)
    idle = {name: value / (time.perf_counter() - begun) for name, value in (cpu_seconds(port) - before).items()}
    before, begun = cpu_seconds(port), time.perf_counter()
    seen = asyncio.run(load(url, photos, max(20.0, idle_s), 0.0, clients=1))
    spent_s = time.perf_counter() - begun
    spent = cpu_seconds(port) - before
    count = max(1, len(seen.latencies_s))
    return {
        "latency_s": statistics.fmean(seen.latencies_s),
        "latencies_s": seen.latencies_s,
        "answers": count,
        "decode_s": statistics.fmean(stage["decode"] for stage in seen.stages) / 1000,
        "decode_spread": statistics.pstdev([math.log(max(1e-4, stage["decode"] / 1000)) for stage in seen.stages]),
        "each_s": {name: max(0.0, value - idle.get(name, 0.0) * spent_s) / count for name, value in spent.items()},
        "idle_cores": sum(idle.values()),
    }


#: Processes in which models compute: what of their time is not the models' shows where those are asleep.
_COMPUTING = ("enginecore", "detector", "captioner")


def _named(cost: dict[str, Any], *names: str) -> float:
    """Processor time a picture of the processes whose names have one of these in them, by ``overheads``."""
    return sum(value for name, value in cost["each_s"].items() if any(part in name.lower() for part in names))


def _beside(cost: dict[str, Any]) -> float:
    """Processor time a picture of all that is neither proxy nor ingress."""
    return _named(cost, "") - _named(cost, "proxy", "ingress")


def _ingress(cost: dict[str, Any], beside_s: float, decode_spread: float, hops_s: tuple[float, ...]) -> IngressTimes:
    """What ``overheads`` says of proxy and ingress; ``beside_s`` is of all other processes, models left out."""
    return IngressTimes(
        _named(cost, "proxy"),
        max(0.001, _named(cost, "ingress") - cost["decode_s"]),
        cost["decode_s"],
        decode_spread,
        beside_s=max(0.001, beside_s),
        hops_s=hops_s,
    )


def fitted(service: Callable[[tuple[float, ...]], Service], latencies_s: Sequence[float]) -> tuple[float, ...]:
    """Seconds that pass between processes without work: what one client's answers took beyond the model's."""
    graph = Graph(service((0.0,)))
    feed_clients(graph, 1)
    graph.clock.run(400 * statistics.fmean(latencies_s))
    spent = statistics.fmean(ended - arrived for arrived, ended, *_ in graph.outcomes)
    return tuple(max(0.0, latency - spent) for latency in latencies_s)


def validate_stand_ins(seconds: float, warm_s: float) -> dict[str, Any]:
    """Models that sleep, everything else real."""
    from benchmarks.stand_ins import parse

    photos = small_photos(64)
    (base_d, each_d, _), (base_c, each_c, _), (base_t, each_t, tokens) = map(parse, (DETECTOR, CAPTIONER, TAGGER))
    with stand_in_service() as instance:
        cost = overheads(instance.port, photos)
        times = partial(_ingress, cost, _beside(cost), 0.0)

        def service(hops_s: tuple[float, ...]) -> Service:
            one = Scaling(max_ongoing=256, max_queued=256)
            return Service(
                times(hops_s),
                Admitted(max_in_flight=64, max_waiting=256, max_wait_s=20),
                Batching(lambda size: base_d + each_d * size, 8, 0.0, 0.0),
                Batching(lambda size: base_c + each_c * size, 8, 0.0, 0.0),
                Generating(Step(base_t, each_t), 32, tokens, 0.0, 0.0),
                dict.fromkeys(("ingress", "detector", "captioner", "tagger"), one),
                cores=(os.cpu_count() or 2) - cost["idle_cores"],
            )

        hops_s = fitted(service, cost.pop("latencies_s"))
        model = service(hops_s)
        bound = 8 / (base_c + each_c * 8)
        phases = [
            Phase("4 clients", seconds, clients=4),
            Phase("16 clients", seconds, clients=16),
            Phase("Poisson, 40 % of the bound", seconds, rate=0.4 * bound),
            Phase("Poisson, 70 % of the bound", seconds, rate=0.7 * bound),
        ]
        rows = compare(instance.url, photos, model, phases, warm_s)
    return {
        "models": [DETECTOR, CAPTIONER, TAGGER],
        "one_client": cost,
        "hops_s": statistics.fmean(hops_s),
        "loads": rows,
    }


def validate_starter(
    photos: Sequence[bytes],
    calibration: dict[str, Any],
    asleep: dict[str, Any],
    config: Path,
    seconds: float,
    warm_s: float,
) -> dict[str, Any]:
    """The application as ``make serve`` starts it, its models' times as ``calibrate`` measured them in the same run.

    Args:
        asleep: ``overheads`` of the same graph with models that sleep.
    """
    with application(config) as instance:
        asyncio.run(load(instance.url, photos, 20.0, 0.0, clients=8))  # warm
        cost = overheads(instance.port, photos, idle_s=20.0)
        detector = batching(calibration["detector"], 8, 0.0)
        captioner = batching(calibration["captioner"], 8, 0.0)
        tagger = generating(calibration["tagger"], 16)
        beside_s = _beside(cost) - _named(cost, *_COMPUTING) + _named(asleep, *_COMPUTING)
        times = partial(_ingress, cost, beside_s, calibration["decode_spread"])

        def service(hops_s: tuple[float, ...]) -> Service:
            one = Scaling(max_ongoing=48, max_queued=64)
            return Service(
                times(hops_s),
                Admitted(max_in_flight=32, max_waiting=64, max_wait_s=20),
                detector,
                captioner,
                tagger,
                dict.fromkeys(("ingress", "detector", "captioner", "tagger"), one),
                cores=(os.cpu_count() or 2) - cost["idle_cores"],
            )

        hops_s = fitted(service, cost.pop("latencies_s"))
        model = service(hops_s)
        bound = predicted(model, Phase("", 300.0, clients=16), warm_s)["throughput_per_s"]
        phases = [
            Phase("4 clients", seconds, clients=4),
            Phase("16 clients", seconds, clients=16),
            Phase("Poisson, 50 % of the bound", seconds, rate=0.5 * bound),
        ]
        rows = compare(instance.url, photos, model, phases, warm_s)
    return {"one_client": cost, "hops_s": statistics.fmean(hops_s), "loads": rows}


def worst(rows: Sequence[dict[str, Any]]) -> float:
    """Largest error of any figure, whatever its sign."""
    return max(abs(error) for row in rows for error in row["error"].values())


# ------------------------------------------------------------------------------------------------------------- routers


def routers(counts: Sequence[int], rate: float, seconds: float, floor_bytes: int) -> dict[str, Any]:
    """Processor time at rest and under a steady load, with more and more replicas of every model that sleep."""
    from benchmarks.stand_ins import parse

    photos = small_photos(64)
    rows: list[dict[str, Any]] = []
    decoding: list[float] = []
    base_s, each_s, _ = parse(DETECTOR)
    alone_s = base_s + each_s
    with stand_in_service() as instance:
        for number, replicas in enumerate(counts):
            have = rows[-1]["replicas_of_each"] if rows else 1
            need = (replicas - have) * 3 * 130 * 2**20
            if psutil.virtual_memory().available - need < floor_bytes:
                print(f"{replicas} replicas of each would not fit in memory: enough", flush=True)
                break
            deploy(instance, stand_in_config(instance.port, replicas, ingresses=2))
            wait_for_replicas(instance, 3 * replicas + 2)
            asyncio.run(load(instance.url, photos, 10.0, 0.0, moments=_every(rate, 10.0)))
            before, begun = cpu_seconds(instance.port), time.perf_counter()
            time.sleep(seconds / 2)
            idle = {n: v / (time.perf_counter() - begun) for n, v in (cpu_seconds(instance.port) - before).items()}
            before, begun = cpu_seconds(instance.port), time.perf_counter()
            seen = asyncio.run(
                load(instance.url, photos, seconds, 0.0, moments=Phase("", seconds, rate=rate).moments(0.0, number))
            )
            took = time.perf_counter() - begun
            spent = cpu_seconds(instance.port) - before
            count = max(1, len(seen.latencies_s))

            outside = [
                latency - max(stage["detector"], stage["captioner"] + stage["tagger"]) / 1000
                for latency, stage in zip(seen.latencies_s, seen.stages, strict=True)
            ]
            rows.append(
                {
                    "replicas_of_each": replicas,
                    "replicas": 3 * replicas + 2,
                    "answers": count,
                    "failures": dict(seen.failures),
                    "p50_s": quantile(seen.latencies_s, 0.5),
                    "p99_s": quantile(seen.latencies_s, 0.99),
                    "outside_models_p50_s": quantile(outside, 0.5),
                    # beyond the model's own time: routing, and the way there and back
                    "to_a_replica_and_back_p50_s": quantile([s["detector"] / 1000 for s in seen.stages], 0.5) - alone_s,
                    "controller_cores_at_rest": sum(v for n, v in idle.items() if "Controller" in n),
                    "all_cores_at_rest": sum(v for n, v in idle.items() if n != "client"),
                    "proxy_s_each": _each("haproxy", spent, idle, took, count),
                    "ingress_s_each": _each("Ingress", spent, idle, took, count),
                    "controller_s_each": _each("Controller", spent, idle, took, count),
                    "memory_mb": memory_bytes(instance.port) / 2**20,
                }
            )
            decoding += [stage["decode"] / 1000 for stage in seen.stages]
            print(json.dumps(rows[-1]), flush=True)
    result: dict[str, Any] = {"rate_per_s": rate, "decode_s": statistics.fmean(decoding), "rows": rows}
    if len(rows) > 1:
        numbers = [row["replicas"] for row in rows]
        slope, base = np.polyfit(numbers, [row["controller_cores_at_rest"] for row in rows], 1)
        result["controller"] = {
            "cores": float(base),
            "cores_a_replica": float(slope),
            "replicas_for_one_core": None if slope <= 0 else round((1 - base) / slope),
        }
    return result


def _each(name: str, spent: Counter[str], idle: dict[str, float], took_s: float, count: int) -> float:
    """Processor time of one kind of process for a picture, beyond what it works at rest."""
    rested = sum(value for kind, value in idle.items() if name in kind) * took_s
    return max(0.0, sum(value for kind, value in spent.items() if name in kind) - rested) / count


def _every(rate: float, seconds: float) -> list[float]:
    return [number / rate for number in range(int(rate * seconds))]
