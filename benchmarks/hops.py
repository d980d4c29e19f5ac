"""Time outside the models: the whole graph with models that take none, asked by one client.

    python -m benchmarks.hops [--requests 400]

``benchmarks.stand_ins`` is the application itself, ingress, doors, batches and routers included, with models that
answer at once. What a request takes is then HTTP, the proxy, reading and decoding a small photo, and the way to each
replica and back. Routes are asked in turn, so that what the machine does meets all alike:

* ``/healthz``     HTTP, proxy and ingress, no picture
* ``/v1/detect``   one model
* ``/v1/caption``  one model, another one
* ``/v1/analyze``  detector beside captioner, then the tagger: two models one after the other

Out: ``results/hops.json``: median and 99th percentile of each, and what a hop costs, as differences of medians.
Bars: ``/v1/analyze`` within 10 ms in the median, 25 ms in 99 of 100. Needs a machine on which nothing else runs.
"""

from __future__ import annotations

import json
import statistics
import time
from typing import Any

import httpx
from pydantic import BaseModel, ConfigDict, Field

from app.serve import deploy, wait_until_ready
from benchmarks import plots
from benchmarks.load import quantile
from benchmarks.report import write_result
from benchmarks.scale_measure import small_photos, stand_in_config, stand_in_service

ROUTES = ("/healthz", "/v1/detect", "/v1/caption", "/v1/analyze")
P50_MS, P99_MS = 10.0, 25.0
_INSTANT = {"Detector": "stand-in:0", "Captioner": "stand-in:0", "Tagger": "stand-in:0+0x1"}


class HopsConfig(BaseModel):
    """Settings of a run."""

    model_config = ConfigDict(extra="forbid")

    requests: int = Field(400, ge=10, description="of each route")
    warm: int = Field(100, ge=1, description="of each route, before")


def ask(http: httpx.Client, route: str, photo: bytes) -> tuple[float, dict[str, float]]:
    """Milliseconds of a request, and of its parts as the answer states them.

    Raises:
        RuntimeError: it was not answered completely.
    """
    began = time.perf_counter()
    answer = http.get(route) if route == "/healthz" else http.post(route, content=photo)
    spent = (time.perf_counter() - began) * 1000
    record = answer.json()
    if answer.status_code != 200 or record.get("errors"):
        raise RuntimeError(f"{route}: {answer.status_code} {answer.text[:300]}")
    return spent, record.get("timings_ms", {})


def measure(config: HopsConfig, url: str) -> dict[str, Any]:
    """Every route in turn, and what is left between them."""
    photos = small_photos(64)
    spent: dict[str, list[float]] = {route: [] for route in ROUTES}
    parts: dict[str, list[float]] = {}
    with httpx.Client(base_url=url, timeout=60) as http:
        for number in range(config.warm + config.requests):
            for route in ROUTES:
                took, timings = ask(http, route, photos[number % len(photos)])
                if number >= config.warm:
                    spent[route].append(took)
                    if route == "/v1/analyze":
                        for name, value in timings.items():
                            parts.setdefault(name, []).append(value)
    middle = {route: statistics.median(values) for route, values in spent.items()}
    p50, p99 = middle["/v1/analyze"], quantile(spent["/v1/analyze"], 0.99)
    return {
        "routes_ms": {
            route: {"p50": round(middle[route], 2), "p99": round(quantile(values, 0.99), 2)}
            for route, values in spent.items()
        },
        "parts_of_analyze_p50_ms": {name: round(statistics.median(values), 2) for name, values in parts.items()},
        "http_proxy_and_ingress_ms": round(middle["/healthz"], 2),
        "picture_and_one_model_ms": round(middle["/v1/detect"] - middle["/healthz"], 2),
        "second_model_ms": round(middle["/v1/analyze"] - middle["/v1/caption"], 2),
        "bars": {f"p50 <= {P50_MS:.0f} ms": p50 <= P50_MS, f"p99 <= {P99_MS:.0f} ms": p99 <= P99_MS},
        "requests": config.requests,
        "spent_ms": {route: [round(value, 2) for value in values] for route, values in spent.items()},
    }


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, write and draw."""
    from pydantic_settings import CliApp

    config = CliApp.run(HopsConfig, cli_args=arguments)
    with stand_in_service() as instance:
        deploy(instance, stand_in_config(instance.port, uris=_INSTANT))
        time.sleep(5)
        wait_until_ready(instance, 600)
        result = measure(config, instance.url)
    spent = result.pop("spent_ms")

    def draw(axes: Any) -> None:
        for number, (route, values) in enumerate(spent.items()):
            ordered = sorted(values)
            shares = [(place + 1) / len(ordered) for place in range(len(ordered))]
            axes.plot(ordered, shares, color=plots.COLOURS[number], label=route)
        axes.axvline(P50_MS, color="#888888", linewidth=0.8, linestyle="--")
        axes.set(xscale="log", xlabel="ms, models that take no time, one client", ylabel="share of requests within")
        axes.legend()

    plots.save("hops", draw)
    print(json.dumps(result, indent=1), write_result("hops", result), sep="\n", flush=True)


if __name__ == "__main__":
    main()
