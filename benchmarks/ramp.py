"""Each model scales on its own: one after another they are loaded by their own route, from one client to many and back.

In: nothing. Out: ``results/ramp.json`` and ``ramp.svg``: for each model the replicas of all three over time, beside
the clients that ask for its part of the answer (``/v1/detect``, ``/v1/caption``, ``/v1/tag``). The loaded one must go
from one replica to its maximum and back to one by itself, the others must stay at one, and no request may be lost.

Ingress, graph, handles and Serve's autoscaler are the real ones. Models take their time and compute nothing
(``benchmarks.stand_ins``), so that three of each fit on two cores. The policy is that of production
(``autoscaling_config`` with a target of ongoing requests); targets are smaller and delays shorter, as the result's
``settings`` say.

    python -m benchmarks.ramp [--max-replicas 3]
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from pydantic import BaseModel, ConfigDict, Field

from app import cluster
from app.canary_config import CanaryError, ServeApi
from app.config import MODELS
from app.serve import deploy, wait_until_ready
from benchmarks import plots
from benchmarks.load import session
from benchmarks.report import QUICK, RESULTS, write_result
from benchmarks.scale_measure import stand_in_config

ROUTES = {"detector": "detect", "captioner": "caption", "tagger": "tag"}
#: What each model takes: a second for a batch of up to four, and two for all the tokens of an answer.
_SLOW = {"detector": "stand-in:1.0+0.0", "captioner": "stand-in:1.0+0.0", "tagger": "stand-in:0.1+0.0x20"}
#: A captioner that the tagger waits for and not the other way round.
_QUICK_CAPTIONER = "stand-in:0.05+0.0"


class RampConfig(BaseModel):
    """Settings of a run."""

    model_config = ConfigDict(extra="forbid")

    models: str = Field(",".join(MODELS), description="which models are loaded, one after another")
    max_replicas: int = Field(3, ge=2)
    target_ongoing_requests: float = Field(6.0, gt=0, description="requests that a replica should have in hand")
    upscale_delay_s: float = Field(5.0, ge=0, description="production: 10")
    downscale_delay_s: float = Field(10.0, ge=0, description="production: 300")
    look_back_s: float = Field(12.0, gt=0, description="time over which ongoing requests are averaged")
    ramp_s: float = Field(40.0, gt=0, description="from one client to all")
    hold_s: float = Field(15.0, ge=0, description="all of them, after the most replicas were seen")
    give_up_s: float = Field(180.0, gt=0, description="longest wait for the most replicas, and for one again")
    quick: bool = Field(False, description="the result goes to the folder of quick runs")

    @property
    def clients(self) -> int:
        """Enough for the most replicas: each sends its next request when it has its answer."""
        return round(self.target_ongoing_requests * self.max_replicas * 1.25)


def configuration(config: RampConfig, port: int) -> dict[str, Any]:
    """The stand-ins' configuration with models that are slow, and that scale."""
    content = stand_in_config(port, uris={MODELS[stage]: uri for stage, uri in _SLOW.items()})
    (application,) = content["applications"]
    arguments = application["args"]
    arguments["limits"] |= {"max_in_flight": 256}
    arguments["tagger"] |= {"max_num_seqs": 64, "max_replicas": config.max_replicas}
    for one in application["deployments"]:
        if one["name"] not in MODELS.values():
            continue
        one["autoscaling_config"] = {
            "min_replicas": 1,
            "max_replicas": config.max_replicas,
            "target_ongoing_requests": config.target_ongoing_requests,
            "upscale_delay_s": config.upscale_delay_s,
            "downscale_delay_s": config.downscale_delay_s,
            "look_back_period_s": config.look_back_s,
        }
        if one["name"] != MODELS["tagger"]:
            one["user_config"]["max_batch_size"] = 4
    return content


@dataclass
class Watch:
    """What was seen of one model's ramp; times are seconds since its beginning."""

    began: float = field(default_factory=time.monotonic)
    replicas: list[tuple[float, dict[str, int]]] = field(default_factory=list)
    clients: list[tuple[float, int]] = field(default_factory=list)
    statuses: Counter[str] = field(default_factory=Counter)
    answers: list[float] = field(default_factory=list)

    @property
    def now(self) -> float:
        return time.monotonic() - self.began

    def last(self, stage: str) -> int | None:
        """Replicas of a model when they were last seen; None: they have not been."""
        return self.replicas[-1][1][stage] if self.replicas else None


def verdict(replicas: Sequence[tuple[float, dict[str, int]]], stage: str, most: int) -> dict[str, Any]:
    """Whether a model went from one replica to ``most`` and back, and what the others did meanwhile."""
    if not replicas:
        raise RuntimeError(f"no replica of the {stage} was ever seen: Serve's API did not answer during its whole ramp")
    mine = [counts[stage] for _, counts in replicas]
    top = mine.index(most) if most in mine else None
    back = next((index for index in range(top, len(mine)) if mine[index] == 1), None) if top is not None else None
    others = {name: max(counts[name] for _, counts in replicas) for name in replicas[0][1] if name != stage}
    return {
        "from_one": mine[0] == 1,
        "most": max(mine),
        "most_after_s": None if top is None else round(replicas[top][0], 1),
        "back_after_s": None if back is None else round(replicas[back][0], 1),
        "others_most": others,
        "holds": mine[0] == 1 and back is not None and max(mine) == most and set(others.values()) == {1},
    }


def running(api: ServeApi) -> dict[str, int]:
    """Replicas of each model that run."""
    deployments = api.details()["applications"]["deeptrust"]["deployments"]
    return {
        stage: sum(replica["state"] == "RUNNING" for replica in deployments[name]["replicas"])
        for stage, name in MODELS.items()
    }


async def look(api: ServeApi, watch: Watch, clients: int) -> None:
    """Note the replicas and the clients of this moment; nothing when Serve does not say."""
    with suppress(CanaryError, KeyError):
        counts = await asyncio.to_thread(running, api)
        watch.replicas.append((round(watch.now, 1), counts))
        watch.clients.append((round(watch.now, 1), clients))


async def ramp(config: RampConfig, url: str, api: ServeApi, stage: str) -> Watch:
    """Load one model's route, up and down again, until it has one replica or the time is over."""
    from tests.app.load import picture

    watch, wanted, over = Watch(), 1, False

    async def client(http: httpx.AsyncClient, number: int) -> None:
        turn = 0
        while not over:
            if number >= wanted:
                await asyncio.sleep(0.1)
                continue
            data, turn = picture(number * 100_000 + turn), turn + 1
            try:
                answer = await http.post(f"{url}/v1/{ROUTES[stage]}", content=data)
            except httpx.HTTPError as error:
                watch.statuses[type(error).__name__] += 1
                continue
            record = answer.json() if answer.status_code == 200 else {}
            told = "complete" if answer.status_code == 200 and not record["errors"] else str(answer.status_code)
            watch.statuses[told] += 1
            watch.answers.append(round(watch.now, 2))

    async def step() -> None:
        await look(api, watch, wanted)
        await asyncio.sleep(1)

    async with session(None) as http:
        clients = [asyncio.create_task(client(http, number)) for number in range(config.clients)]
        while watch.now < config.ramp_s:
            wanted = max(1, round(config.clients * watch.now / config.ramp_s))
            await step()
        wanted, limit = config.clients, watch.now + config.give_up_s
        while (watch.last(stage) or 0) < config.max_replicas and watch.now < limit:
            await step()
        hold = watch.now + config.hold_s
        while watch.now < hold:
            await step()
        down = watch.now
        while watch.now < down + config.ramp_s / 2:
            wanted = max(1, round(config.clients * (1 - 2 * (watch.now - down) / config.ramp_s)))
            await step()
        wanted, limit = 1, watch.now + config.give_up_s
        while watch.last(stage) != 1 and watch.now < limit:
            await step()
        over = True
        await asyncio.gather(*clients)
    return watch


def wait_for_one_each(api: ServeApi, timeout_s: float) -> None:
    """Until every model has one replica: what the model before has left behind is gone."""
    limit = time.monotonic() + timeout_s
    while set(running(api).values()) != {1}:
        if time.monotonic() > limit:
            raise RuntimeError(f"the models did not come to one replica each: {running(api)}")
        time.sleep(1)


def draw(watches: dict[str, Watch], folder: Path) -> Path:
    """Replicas over time for each loaded model, with the clients behind them."""

    def onto(axes: Any) -> None:
        for one, (stage, watch) in zip(axes if len(watches) > 1 else [axes], watches.items(), strict=True):
            for colour, name in zip(plots.COLOURS, MODELS, strict=False):
                times = [at for at, _ in watch.replicas]
                values = [counts[name] for _, counts in watch.replicas]
                one.step(times, values, where="post", color=colour, label=name, linewidth=2 if name == stage else 1)
            one.set(title=f"{stage} loaded", xlabel="seconds", ylabel="replicas", ylim=(0, None))
            other = one.twinx()
            other.plot([at for at, _ in watch.clients], [count for _, count in watch.clients], ":", color="#888888")
            other.set(ylabel="clients (dotted)", ylim=(0, None))
            one.legend(fontsize=7, loc="upper left")

    return plots.save("ramp", onto, panels=len(watches), folder=folder)


def main(arguments: list[str] | None = None) -> None:
    """Load every model in turn; exit status 1 when one did not scale by itself or a request was lost."""
    from pydantic_settings import CliApp

    config = CliApp.run(RampConfig, cli_args=arguments)
    port = cluster.free_port(8321)
    instance = cluster.start(port, 8, 200 * 2**20)
    watches: dict[str, Watch] = {}
    models: dict[str, Any] = {}
    try:
        content = configuration(config, port)
        deploy(instance, content)
        wait_until_ready(instance, 600)
        api = ServeApi(instance.dashboard_url, cluster.token(port))
        for stage in config.models.split(","):
            if stage == "tagger":
                (captioner,) = (one for one in content["applications"][0]["deployments"] if one["name"] == "Captioner")
                captioner["user_config"] |= {"uri": _QUICK_CAPTIONER}
                deploy(instance, content)
                time.sleep(2)
            wait_for_one_each(api, config.give_up_s)
            watches[stage] = watch = asyncio.run(ramp(config, instance.url, api, stage))
            models[stage] = verdict(watch.replicas, stage, config.max_replicas) | {
                "answers": dict(watch.statuses),
                "lost": sum(count for told, count in watch.statuses.items() if told != "complete"),
                "seconds": round(watch.now, 1),
            }
            print(stage, models[stage], flush=True)
    finally:
        cluster.stop(port)
    folder = QUICK if config.quick else RESULTS
    result = {
        "models": models,
        "timelines": {
            stage: {"replicas": watch.replicas, "clients": watch.clients} for stage, watch in watches.items()
        },
        "stand_ins": _SLOW | {"captioner, while the tagger is loaded": _QUICK_CAPTIONER},
        "settings": config.model_dump(mode="json") | {"clients": config.clients},
    }
    columns = ("most", "most_after_s", "back_after_s", "others_most", "lost")
    rows = [{"model": stage} | {key: one[key] for key in columns} for stage, one in models.items()]
    print(plots.table(rows))
    print(draw(watches, folder), write_result("ramp", result, folder), flush=True)
    if not all(one["holds"] and not one["lost"] for one in models.values()):
        raise SystemExit("error: a model did not scale by itself, another one did, or a request was lost; see above")


if __name__ == "__main__":
    main()
