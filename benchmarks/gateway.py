"""How soon those who can wait have their place: ``Prefer: respond-async`` at the design load of 50 pictures a second.

Requests come at random moments (Poisson), whether or not those before were answered, with one picture each. A picture
is read, checked and written into the store before its 202 goes out; the starter models work on what has been taken all
the while, on the same cores. Each rate has a minute of its own.

    python -m benchmarks.gateway --photos FOLDER [--rates 25,50]

Out: ``results/gateway.json`` and a plot. The bar, 200 ms in the median, is of the design load; beside it the rates
around it. Starts the application, with a store of its own, and stops it.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import httpx
from pydantic import BaseModel, ConfigDict, Field

from benchmarks import plots
from benchmarks.application import application
from benchmarks.graph_simulation import poisson
from benchmarks.load import open_loop, quantile, session
from benchmarks.report import RESULTS, write_result
from benchmarks.serving import cpu_seconds, read_photos

#: Pictures a second that the platform takes in at its busiest, and seconds until the 202.
DESIGN_LOAD, GOAL_S = 50.0, 0.2


class GatewayConfig(BaseModel):
    """Settings of a run."""

    model_config = ConfigDict(extra="forbid")

    photos: Path = Field(Path("samples"), description="folder of photos, searched recursively")
    rates: list[float] = Field([25.0, DESIGN_LOAD, 60.0], min_length=1, description="pictures a second")
    seconds: float = Field(60.0, ge=1, description="of each rate")
    config: Path | None = Field(None, description="Serve configuration; unset: that of `make serve`")
    seed: int = 3


async def arrive(url: str, photos: Sequence[bytes], moments: Sequence[float]) -> tuple[list[float], Counter[str]]:
    """Send a picture at each moment (seconds from now): seconds from then to its 202, and statuses."""
    waited: list[float] = []
    statuses: Counter[str] = Counter()
    began = time.perf_counter()

    async def send(http: httpx.AsyncClient, number: int) -> None:
        photo = photos[number % len(photos)]
        try:
            answer = await http.post(f"{url}/v1/analyze", content=photo, headers={"Prefer": "respond-async"})
        except httpx.HTTPError as error:
            statuses[type(error).__name__] += 1
            return
        statuses[str(answer.status_code)] += 1
        if answer.status_code == 202:
            # from the moment that it was due: where this process is late, that counts too
            waited.append(time.perf_counter() - began - moments[number])

    async with session(None) as http:
        await open_loop(http, moments, send)
    return waited, statuses


def measure(config: GatewayConfig, url: str, port: int, photos: Sequence[bytes]) -> list[dict[str, Any]]:
    """What senders see at each rate."""
    asyncio.run(arrive(url, photos, [0.1 * number for number in range(50)]))  # connections, and models at work
    rows = []
    for rate in config.rates:
        moments = list(poisson(random.Random(config.seed), partial(_always, rate), config.seconds))
        before = cpu_seconds(port)
        waited, statuses = asyncio.run(arrive(url, photos, moments))
        spent = cpu_seconds(port) - before
        rows.append(
            {
                "rate_per_s": rate,
                "sent": len(moments),
                "statuses": dict(statuses),
                "p50_s": round(quantile(waited, 0.5), 4),
                "p90_s": round(quantile(waited, 0.9), 4),
                "p99_s": round(quantile(waited, 0.99), 4),
                "ingress_cpu_s": round(sum(s for name, s in spent.items() if "Ingress" in name) / len(moments), 4),
                "client_cpu_s": round(spent["client"] / len(moments), 4),
            }
        )
        print(rows[-1], flush=True)
    return rows


def _always(rate: float, _: float) -> float:
    return rate


def show(result: dict[str, Any], folder: Path = RESULTS) -> str:
    """The table, and its plot."""
    rows = result["rows"]

    def draw(axes: Any) -> None:
        rates = [row["rate_per_s"] for row in rows]
        for number, (key, called) in enumerate((("p50_s", "median"), ("p90_s", "90 of 100"), ("p99_s", "99 of 100"))):
            milliseconds = [row[key] * 1000 for row in rows]
            axes.plot(rates, milliseconds, color=plots.COLOURS[number], marker="o", label=called)
        axes.axhline(GOAL_S * 1000, color="#888888", linewidth=0.8, linestyle="--", label="goal")
        axes.set(xlabel="pictures a second, sent at random moments", ylabel="ms until the 202", yscale="log")
        axes.legend()

    plots.save("gateway", draw, folder=folder)
    return plots.table([{name: value for name, value in row.items() if name != "statuses"} for row in rows])


def main(arguments: list[str] | None = None) -> None:
    """Measure and write the result."""
    from pydantic_settings import CliApp

    config = CliApp.run(GatewayConfig, cli_args=arguments)
    photos = read_photos(config.photos, 512, config.seed)
    if not photos:
        raise SystemExit(f"error: {config.photos} has no photo: name another folder with --photos")
    with application(config.config) as instance:
        rows = measure(config, instance.url, instance.port, photos)
    of_design = [row for row in rows if row["rate_per_s"] == DESIGN_LOAD]
    result = {
        "rows": rows,
        "seconds": config.seconds,
        "mean_bytes": sum(map(len, photos)) // len(photos),
        "bars": {
            f"202 within {GOAL_S} s in the median at {DESIGN_LOAD:g}/s": row["p50_s"] <= GOAL_S for row in of_design
        }
        | {f"all taken at {DESIGN_LOAD:g}/s": set(row["statuses"]) == {"202"} for row in of_design},
    }
    print(show(result), write_result("gateway", result), sep="\n")


if __name__ == "__main__":
    main()
