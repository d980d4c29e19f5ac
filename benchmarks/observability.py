"""What it costs to see what the service does: throughput with everything on, and with everything off, in one run.

Two instances of the service run on this machine, and one of them is loaded at a time, in short rounds that alternate
(on, off, off, on): what the machine does beside it meets both alike, and the other's idling too. *On* is what the
committed configuration does, read by a Prometheus's requests, and traces at their documented share; *off* records no
metric (Ray's own included), logs nothing below errors, traces nothing and keeps nothing.

In: photos; the committed configuration with the starter models, or another one (``--config``). Out:
``results/observability.json``: the ratio of the throughputs of each pair of rounds, their geometric mean with an
interval by Student's t, and the processor time of an answer in each instance.

    python -m benchmarks.observability --photos DIR [--pairs 12] [--round-photos 64]

Needs memory for two services, and a machine on which nothing else runs.
"""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, Field
from scipy import stats

from app import cluster
from app.serve import ServeSettings, serving, wait_until_ready
from benchmarks.report import write_result
from benchmarks.serving import Load, cpu_seconds, drive, read_photos
from deployments import metrics, telemetry

Side = Literal["on", "off"]
_SIDES: tuple[Side, Side] = ("on", "off")
#: Between two readings of an instance's metrics: Prometheus's own default is a minute, `make monitoring` takes this.
_SCRAPE_S = 15.0


class ObservabilityConfig(BaseModel):
    """Settings of a run."""

    model_config = ConfigDict(extra="forbid")

    photos: Path = Field(Path("samples"), description="folder of photos (JPEG, PNG), searched recursively")
    config: Path = Field(Path("serve_config.cpu.yaml"), description="Serve configuration of the side where all is on")
    count: int = Field(256, ge=1, description="photos to choose from")
    pairs: int = Field(12, ge=1, description="pairs of rounds")
    round_photos: int = Field(64, ge=1, description="photos in a round")
    clients: int = Field(16, ge=1, description="clients of the loaded instance")
    warm_photos: int = Field(64, ge=0, description="photos before the first round, for each instance")
    off_keeps: bool = Field(False, description="the side where all is off keeps answers as well")
    num_cpus: int = Field(max(2, os.cpu_count() or 2), ge=1, description="CPUs that each Ray may hand out")
    name: str = Field("observability", pattern=r"^[a-z_]+$", description="name of the result")
    seed: int = 11


def write_side(config: ObservabilityConfig, side: Side, folder: Path) -> Path:
    """A side's configuration: one replica of each model, so that none is started or ended during the rounds."""
    content = yaml.safe_load(config.config.read_text())
    (application,) = content["applications"]
    content["http_options"] = (content.get("http_options") or {}) | {"port": cluster.free_port()}
    arguments = application.setdefault("args", {})
    arguments["tagger"] = (arguments.get("tagger") or {}) | {"max_replicas": 1}
    arguments["tagger_canary"] = None
    arguments["store"] = (arguments.get("store") or {}) | {"url": f"sqlite:///{folder}/{side}.db"}
    application["deployments"] = [one for one in application["deployments"] if one["name"] != "TaggerCanary"]
    for deployment in application["deployments"]:
        if (scaling := deployment.get("autoscaling_config")) and scaling.get("min_replicas", 1):
            deployment["autoscaling_config"] = scaling | {"max_replicas": scaling.get("min_replicas", 1)}
    if side == "off":
        content["logging_config"] = {"log_level": "ERROR", "enable_access_log": False}
        application["logging_config"] = content["logging_config"]
        if not config.off_keeps:
            arguments["store"] = {"keep": "off"}
    path = folder / f"{side}.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@contextmanager
def environment(side: Side, folder: Path) -> Iterator[None]:
    """What an instance finds in its environment when it is started."""
    wanted = {
        "on": {telemetry.VARIABLE: str(folder / "traces"), telemetry.RATIO_VARIABLE: str(telemetry.RATIO)},
        "off": {metrics.VARIABLE: "off", "RAY_enable_metrics_collection": "0"},
    }
    names = {"PORT", *wanted["on"], *wanted["off"]}
    before = {name: os.environ.pop(name) for name in names if name in os.environ}
    os.environ |= wanted[side]
    try:
        yield
    finally:
        for name in names:
            os.environ.pop(name, None)
        os.environ |= before


class Scraper:
    """Reads an instance's metrics as a Prometheus does while it is loaded, on a thread: what that costs the instance
    counts, and what it costs the clients should not.
    """

    def __init__(self, instance: cluster.Instance) -> None:
        self._file = cluster.instance_folder(instance.port) / "ray" / "prom_metrics_service_discovery.json"
        self._next = time.monotonic()
        self.bytes_read = 0

    def read(self) -> None:
        """Every target of the instance, once."""
        with suppress(OSError, ValueError):
            for group in json.loads(self._file.read_text()):
                for target in group["targets"]:
                    with urllib.request.urlopen(f"http://{target}/metrics", timeout=30) as answer:  # nosec B310 # the own Ray
                        self.bytes_read += len(answer.read())

    @contextmanager
    def running(self) -> Iterator[None]:
        """Read again and again until the block ends; the pause between two readings may be in several blocks."""
        over = threading.Event()

        def run() -> None:
            while not over.wait(max(0.0, self._next - time.monotonic())):
                self._next = time.monotonic() + _SCRAPE_S
                self.read()

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


def load_once(instance: cluster.Instance, photos: list[bytes], clients: int, scraper: Scraper | None) -> Load:
    """A round."""
    with scraper.running() if scraper is not None else nullcontext():
        return asyncio.run(drive(instance.url, photos, clients))


def interval(ratios: list[float], share: float = 0.95) -> tuple[float, float, float]:
    """Geometric mean of ratios, and the bounds of its interval by Student's t of the logarithms: of a handful of pairs
    a bootstrap's is too narrow.
    """
    logarithms = np.log(ratios)
    mean = logarithms.mean()
    low, high = stats.t.interval(share, len(ratios) - 1, mean, stats.sem(logarithms))
    return float(np.exp(mean)), float(np.exp(low)), float(np.exp(high))


def _processor_s(used: Counter[str]) -> float:
    """Of all processes of the application."""
    return sum(seconds for name, seconds in used.items() if name != "client")


def measure(
    config: ObservabilityConfig, instances: dict[Side, cluster.Instance], photos: list[bytes]
) -> dict[str, Any]:
    """The rounds, and what they say."""
    scrapers: dict[Side, Scraper | None] = {"on": Scraper(instances["on"]), "off": None}
    for side, instance in instances.items():
        load_once(instance, (photos * config.warm_photos)[: config.warm_photos], config.clients, scrapers[side])
    pairs, ratios, processor_ratios = [], [], []
    spent: dict[Side, Counter[str]] = {side: Counter() for side in _SIDES}
    answers: Counter[Side] = Counter()
    for number in range(config.pairs):
        chosen = [photos[(number * config.round_photos + index) % len(photos)] for index in range(config.round_photos)]
        rates: dict[Side, float] = {}
        processor: dict[Side, float] = {}
        for side in _SIDES if number % 2 == 0 else reversed(_SIDES):
            before = cpu_seconds(instances[side].port)
            load = load_once(instances[side], chosen, config.clients, scrapers[side])
            used = cpu_seconds(instances[side].port)
            used.subtract(before)
            if load.complete != len(chosen):
                raise RuntimeError(
                    f"{side}: {load.summary()}: a round in which not every photo is answered counts nothing"
                )
            spent[side] += used
            answers[side] += load.complete
            rates[side] = load.complete / load.seconds
            processor[side] = _processor_s(used) / load.complete
        ratios.append(rates["on"] / rates["off"])
        processor_ratios.append(processor["on"] / processor["off"])
        pairs.append(
            {side: round(rates[side], 3) for side in _SIDES}
            | {"ratio": round(ratios[-1], 4), "cpu_ratio": round(processor_ratios[-1], 4)}
        )
        print(pairs[-1], flush=True)
    mean, low, high = interval(ratios)
    cpu_mean, cpu_low, cpu_high = interval(processor_ratios)
    return {
        "throughput_on_over_off": round(mean, 4),
        "interval_95": [round(low, 4), round(high, 4)],
        "cost": round(1 - mean, 4),
        "cpu_seconds_per_answer": {side: round(_processor_s(spent[side]) / answers[side], 4) for side in _SIDES},
        "cpu_on_over_off": round(cpu_mean, 4),
        "cpu_interval_95": [round(cpu_low, 4), round(cpu_high, 4)],
        "cpu_by_process": {
            side: {name: round(seconds / answers[side], 4) for name, seconds in spent[side].most_common(12)}
            for side in _SIDES
        },
        "bytes_scraped": scrapers["on"].bytes_read if scrapers["on"] else 0,
        "pairs": pairs,
    }


def main(arguments: list[str] | None = None) -> None:
    """Start both sides, measure, write the result."""
    from pydantic_settings import CliApp

    config = CliApp.run(ObservabilityConfig, cli_args=arguments)
    photos = read_photos(config.photos, config.count, config.seed)
    if not photos:
        raise SystemExit(f"error: no photo in {config.photos}: give a folder with --photos")
    with tempfile.TemporaryDirectory(prefix="deeptrust-observability-") as name, ExitStack() as running:
        folder = Path(name)
        instances: dict[Side, cluster.Instance] = {}
        for side in _SIDES:
            with environment(side, folder):
                settings = ServeSettings(config=write_side(config, side, folder), num_cpus=config.num_cpus)
                instances[side] = running.enter_context(serving(settings))
            wait_until_ready(instances[side], settings.ready_timeout_s)
        result = measure(config, instances, photos)
        logs = cluster.instance_folder(instances["on"].port) / "ray" / "session_latest" / "logs" / "serve"
        result |= {
            "lines_logged": sum(file.read_bytes().count(b"\n") for file in logs.glob("*.log")),
            "spans": sum(file.read_bytes().count(b"\n") for file in (folder / "traces").glob("*.jsonl")),
            "settings": config.model_dump(mode="json", exclude={"photos"}) | {"share_traced": telemetry.RATIO},
        }
        print(result, write_result(config.name, result), flush=True)


if __name__ == "__main__":
    main()
