"""The production graph at a given size, simulated: what carries a rate, what is full first, and what a spike does.

In: a Serve configuration, the models' times (``benchmarks.published``, or measured ones), and what ``benchmarks.scale``
has measured of proxy and ingress. Out: figures of a simulated load on ``benchmarks.graph_simulation``. Measures nothing
and writes nothing.
"""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field

from app.store.settings import StoreSettings
from benchmarks import published
from benchmarks.graph_simulation import (
    DEFERRED_LOOK_S,
    Admitted,
    Batching,
    Generating,
    Graph,
    IngressTimes,
    Service,
    feed,
    poisson,
)
from benchmarks.load import quantile
from benchmarks.report import COMMITTED, QUICK, RESULTS
from benchmarks.simulation import Scaling

ROOT = Path(__file__).parents[1]
MODELS = ("detector", "captioner", "tagger")
#: What a decoding core costs is in a GPU's price: machines with so many cores to a GPU are what is rented.
_CORES_A_GPU = 16
#: Of `store`, where a configuration does not say it.
DEFERRED_IN_WORK: int = StoreSettings.model_fields["deferred_in_work"].default
MAX_DEFERRED: int = StoreSettings.model_fields["max_deferred"].default
#: A spike that is not over by then counts as never.
_LONGEST_S = 3600.0


class ScaleConfig(BaseModel):
    """Settings of a run."""

    model_config = ConfigDict(extra="forbid")

    photos: Path = Field(Path("samples"), description="folder of photos, searched recursively (calibrate, validate)")
    parts: str = Field("calibrate,validate,routers,size,spike", description="what to do, in this order")
    quick: bool = Field(False, description="short: shorter loads, fewer replicas, one rate; shows that it works")
    serve_config: Path = Field(ROOT / "serve_config.yaml", description="the graph whose scaling is simulated")
    cpu_config: Path = Field(ROOT / "serve_config.cpu.yaml", description="the graph that `validate` starts")
    figures: Literal["published", "measured"] = Field("published", description="models' times: or `calibrate`'s, here")
    rates: list[float] = Field([50.0, 300.0, 3000.0], description="pictures a second")
    spike_rates: list[float] = Field([50.0, 300.0], description="rates that are multiplied by five")
    room: list[float] = Field([1.0, 1.5, 2.0, 3.0], description="replicas that it may grow to, as multiples of `size`")
    deferred_share: float = Field(0.9, ge=0, le=1, description="pictures whose senders can wait: uploads")
    deferred_in_work: int | None = Field(
        None, ge=1, description="`store.deferred_in_work`; null: what `serve_config` says. Its default is shown as well"
    )
    max_deferred: int | None = Field(
        None, ge=1, description="`store.max_deferred`: pictures that may wait; null: what `serve_config` says"
    )
    use: float = Field(0.8, gt=0, lt=1, description="share of a part's bound that it is sized for")
    start_s: dict[str, float] = Field(
        {"ingress": 10.0, "detector": 40.0, "captioner": 40.0, "tagger": 90.0},
        description="from the decision to a replica that answers, weights on the node's disk (the tagger here: 83 s)",
    )
    price: float = Field(published.PRICE.value, gt=0, description="USD for a GPU and hour")
    count: int = Field(48, ge=8, description="photos of `calibrate` and `validate`")
    repeats: int = Field(5, ge=2, description="batches of each size in `calibrate`")
    threads: int = Field(2, ge=1, description="OMP_NUM_THREADS of the replicas in `cpu_config`")
    load_s: float = Field(60.0, gt=0, description="each load of `validate`; three times that with starter models")
    warm_s: float = Field(20.0, ge=0)
    replicas: list[int] = Field([1, 4, 8, 16], description="of each model in `routers`")
    routers_rate: float = Field(8.0, gt=0, description="pictures a second in `routers`")
    floor_gb: float = Field(3.0, gt=0, description="memory that `routers` leaves free")
    seed: int = 11

    @property
    def output(self) -> Path:
        """Where results go."""
        return QUICK if self.quick else RESULTS


# ---------------------------------------------------------------------------------------------------------- the service


def graph_settings(path: Path) -> dict[str, Any]:
    """What the simulator reads of a Serve configuration: by deployment, and the ingress's limits."""
    application = yaml.safe_load(path.read_text())["applications"][0]
    tagger = application["args"]["tagger"]
    settings: dict[str, Any] = {"limits": application["args"].get("limits", {}), "tagger": tagger}
    for one in application["deployments"]:
        name = one["name"].lower()
        if name in ("ingress", *MODELS):
            scaling, options = one.get("autoscaling_config") or {}, one.get("ray_actor_options") or {}
            engine = tagger if name == "tagger" else {}
            settings[name] = settings.get(name, {}) | {
                "batch": one.get("user_config") or {},
                "scaling": Scaling(
                    min_replicas=scaling.get("min_replicas", engine.get("min_replicas", 1)),
                    max_replicas=scaling.get("max_replicas", engine.get("max_replicas", 1)),
                    target_ongoing=scaling.get("target_ongoing_requests", engine.get("target_ongoing_requests", 16)),
                    upscale_delay_s=scaling.get("upscale_delay_s", 30.0),
                    downscale_delay_s=scaling.get("downscale_delay_s", 600.0),
                    max_ongoing=one.get("max_ongoing_requests", engine.get("max_ongoing_requests", 48)),
                    max_queued=one.get("max_queued_requests", engine.get("max_queued_requests", 64)),
                    gpu_share=float(options.get("num_gpus", engine.get("num_gpus", 0.0))),
                ),
            }
    settings["max_num_seqs"] = tagger.get("max_num_seqs", 32)
    store = application["args"].get("store", {})
    settings["deferred_in_work"] = store.get("deferred_in_work", DEFERRED_IN_WORK)
    settings["max_deferred"] = store.get("max_deferred", MAX_DEFERRED)
    return settings


def stored(name: str) -> dict[str, Any] | None:
    """The last result of a part, or else the committed one, if there is one."""
    paths = (folder / f"{name}.json" for folder in (RESULTS, COMMITTED))
    return next((json.loads(path.read_text()) for path in paths if path.is_file()), None)


def ingress_times(threads: int) -> tuple[IngressTimes, dict[str, str]]:
    """What proxy and ingress work for a picture, and where each figure comes from."""
    origin: dict[str, str] = {}
    calibration, measured, overload = stored("scale_calibration"), stored("scale_routers"), stored("serving_overload")
    if calibration:
        decode_s, spread = calibration["decode_s"], calibration["decode_spread"]
        origin["decode"] = "scale_calibration"
    else:
        decode_s, spread, origin["decode"] = 0.02, 0.5, "assumed: run --parts calibrate"
    if measured:
        row = measured["rows"][-1]
        proxy_s, loop_s = row["proxy_s_each"], max(0.001, row["ingress_s_each"] - measured.get("decode_s", 0.002))
        origin["proxy and ingress"] = "scale_routers"
    elif overload:
        spent = overload["phases"][0]["cpu_seconds_per_answer"]
        proxy_s = sum(value for name, value in spent.items() if "proxy" in name.lower())
        loop_s = max(0.001, spent["ray::ServeReplica:deeptrust:Ingress"] - decode_s)
        origin["proxy and ingress"] = (
            "serving_overload, at less than a picture a second: what they cost at rest counts too"
        )
    else:
        proxy_s, loop_s, origin["proxy and ingress"] = 0.005, 0.01, "assumed: run --parts routers"
    return IngressTimes(proxy_s, loop_s, decode_s, spread, threads, hops_s=(0.005,)), origin


def models(config: ScaleConfig, settings: dict[str, Any]) -> tuple[Batching, Batching, Generating]:
    """The models' times: others' or this machine's."""
    sizes = {name: settings[name]["batch"].get("max_batch_size", 8) for name in ("detector", "captioner")}
    waits = {name: settings[name]["batch"].get("batch_wait_timeout_s", 0.0) for name in ("detector", "captioner")}
    if config.figures == "measured":
        from benchmarks.scale_measure import batching, generating

        calibration = stored("scale_calibration")
        if calibration is None:
            raise SystemExit("error: no scale_calibration.json; run with --parts calibrate first")
        if calibration["device"] != "cuda" and any(settings[name]["scaling"].gpu_share for name in MODELS):
            raise SystemExit(
                f"error: {config.serve_config.name} asks for GPUs, and scale_calibration.json is of a "
                f"{calibration['device']}: run --parts calibrate on a GPU machine, or take --figures published"
            )
        one, two = (batching(calibration[name], sizes[name], waits[name]) for name in ("detector", "captioner"))
        engine = generating(calibration["tagger"], settings["max_num_seqs"])
        return replace(one, width=1.0), replace(two, width=1.0), replace(engine, width=1.0)
    return (
        published.detector(sizes["detector"], waits["detector"]),
        published.captioner(sizes["captioner"], waits["captioner"]),
        published.tagger(settings["max_num_seqs"]),
    )


def bounds(detector: Batching, captioner: Batching, tagger: Generating) -> dict[str, float]:
    """Pictures a second that a whole GPU can do with full batches."""
    return {
        "detector": detector.size / detector.times(detector.size),
        "captioner": captioner.size / captioner.times(captioner.size),
        "tagger": max(n / (tagger.tokens * tagger.step_s(n)) for n in (1, tagger.size)),
    }


def service_of(
    config: ScaleConfig, settings: dict[str, Any], replicas: dict[str, tuple[int, int]], gpus: int, proxies: int
) -> Service:
    """The graph with so many replicas, (at least, at most) of each part."""
    limits = settings["limits"]
    times, _ = ingress_times(int(limits.get("decode_threads", 2)))
    detector, captioner, tagger = models(config, settings)
    scaling = {
        name: replace(
            settings[name]["scaling"],
            min_replicas=replicas[name][0],
            max_replicas=replicas[name][1],
            start_s=config.start_s[name],
        )
        for name in ("ingress", *MODELS)
    }
    return Service(
        times,
        Admitted(
            max_in_flight=limits.get("max_in_flight", 32),
            max_waiting=limits.get("max_waiting", 64),
            max_wait_s=limits.get("max_wait_s", 4.0),
            target_s=limits.get("target_s", 30.0),
            deferred_in_work=config.deferred_in_work or settings["deferred_in_work"],
            max_deferred=config.max_deferred or settings["max_deferred"],
        ),
        detector,
        captioner,
        tagger,
        scaling,
        gpus=gpus,
        proxies=proxies,
        request_timeout_s=limits.get("request_timeout_s", 60.0),
    )


def gpus_for(replicas: dict[str, int], settings: dict[str, Any]) -> int:
    """GPUs that replicas of these shares need when each is put where it fits best, the largest first."""
    shares = sorted(
        (settings[name]["scaling"].gpu_share for name in MODELS for _ in range(replicas[name])), reverse=True
    )
    free: list[float] = []
    for share in shares:
        fitting = [index for index, room in enumerate(free) if room >= share - 1e-9]
        if fitting:
            free[min(fitting, key=lambda index: free[index])] -= share
        else:
            free.append(1.0 - share)
    return len(free)


# ---------------------------------------------------------------------------------------------------------------- size


def run(service: Service, rate: float, seconds: float, deferred_share: float, seed: int) -> dict[str, Any]:
    """A steady load: what was answered, how fast, and how busy each part was, once the first minute is over."""
    graph, warm_s = Graph(service, seed), 60.0
    feed(graph, poisson(random.Random(seed), lambda _: rate, warm_s + seconds), deferred_share)
    graph.clock.run(warm_s)
    computed = {name: _pictures(graph, name) for name in MODELS}
    stations = [*graph.proxies, *(r.loop for r in graph.ingress.replicas), *(r.threads for r in graph.ingress.replicas)]
    worked = [station.busy for station in stations]
    places_s = {kind: _places_s(graph, kind) for kind in (False, True)}
    inside = graph.inside
    graph.clock.run(warm_s + seconds)
    ends = [(ended - arrived, deferred, how) for arrived, ended, deferred, how in graph.outcomes if ended >= warm_s]
    spent = {kind: [s for s, deferred, how in ends if how == "answered" and deferred == kind] for kind in (False, True)}
    # of what full batches would do: a model that is always busy with small ones has room
    bound = bounds(service.detector, service.captioner, service.tagger)
    use = {
        name: (_pictures(graph, name) - computed[name])
        / seconds
        / (bound[name] * service.scaling[name].gpu_share * len(graph.deployments[name].replicas))
        for name in MODELS
    }
    now = [(station.busy - was) / seconds / station.workers for station, was in zip(stations, worked, strict=True)]
    proxies, ingresses = len(graph.proxies), len(graph.ingress.replicas)
    use["proxy"] = sum(now[:proxies]) / proxies
    use["ingress loop"] = sum(now[proxies : proxies + ingresses]) / ingresses
    use["decoding threads"] = sum(now[proxies + ingresses :]) / ingresses
    taken = {kind: (_places_s(graph, kind) - places_s[kind]) / seconds for kind in (False, True)}
    most = ingresses * service.admitted.max_in_flight
    use["places in work"] = (taken[False] + taken[True]) / most
    # one that comes free lies so until the next look, half of a pause on average
    held = taken[True] + len(spent[True]) / seconds * DEFERRED_LOOK_S / 2
    use["places for deferred"] = held / max(
        1.0, min(ingresses * service.admitted.deferred_in_work, most - taken[False])
    )
    how = [how for _, _, how in ends]
    interactive = [how for _, deferred, how in ends if not deferred]
    return {
        "pictures": len(how),
        "answered_per_s": how.count("answered") / seconds,
        "not_answered": {name: how.count(name) for name in ("refused", "partial", "late") if name in how},
        "interactive_refused_share": interactive.count("refused") / max(1, len(interactive)),
        "growth_per_s": (graph.inside - inside) / seconds,
        # two deviations of a difference of two numbers that vary as Poisson's do
        "growth_by_chance_per_s": 2 * math.sqrt(2 * inside) / seconds,
        "deferred_share": deferred_share,
        "interactive_p50_p99_s": [quantile(spent[False], 0.5), quantile(spent[False], 0.99)],
        "deferred_p50_p99_s": [quantile(spent[True], 0.5), quantile(spent[True], 0.99)],
        "use": use,
    }


def _pictures(graph: Graph, name: str) -> int:
    """That the replicas of a model have answered so far."""
    return sum(replica.pictures for replica in graph.deployments[name].replicas)


def _places_s(graph: Graph, deferred: bool) -> float:
    """Seconds for which places of the ingresses were taken so far by pictures of this kind."""
    return sum(replica.place_s[deferred] for replica in graph.ingress.replicas)


def carries(outcome: dict[str, Any], rate: float) -> bool:
    """All but one in a thousand get their answer in time, there are not more and more inside, and no part is as busy as
    it can be: at its bound a queue grows too slowly to show in minutes.
    """
    lost = sum(outcome["not_answered"].values())
    growth = max(_GROWTH * rate, outcome["growth_by_chance_per_s"])
    return (
        lost <= 0.001 * outcome["pictures"]
        and outcome["growth_per_s"] <= growth
        and max(outcome["use"].values()) <= _BUSIEST
    )


#: Of what a part can do.
_BUSIEST = 0.97
#: Of the rate: more and more inside.
_GROWTH = 0.005
_PLACES = ("places in work", "places for deferred")
#: Which part has to grow when a part of the ingress is full.
_OF = dict.fromkeys(("ingress loop", "decoding threads", *_PLACES), "ingress")


def sized(config: ScaleConfig, settings: dict[str, Any], rate: float, seconds: float) -> dict[str, Any]:
    """The fewest replicas that carry a rate with each part used as far as ``use`` says, checked by simulation.

    How many of a model follows from its bound, and is raised only where the simulation has the model itself full. Of
    ingresses there are as many as their cores need, or else the places of pictures in work.
    """
    bound = bounds(*models(config, settings))
    times, _ = ingress_times(int(settings["limits"].get("decode_threads", 2)))
    replicas = {
        name: max(1, math.ceil(rate / (bound[name] * settings[name]["scaling"].gpu_share * config.use)))
        for name in MODELS
    }
    # who can wait is read when it comes, and worked on later
    core_s = max(times.loop_s * (1 + config.deferred_share), times.decode_s / times.decode_threads)
    replicas["ingress"] = max(2, math.ceil(rate * core_s / config.use))
    proxies = max(1, math.ceil(rate * times.proxy_s / config.use))
    for _ in range(25):
        gpus = gpus_for(replicas, settings)
        service = service_of(config, settings, {name: (n, n) for name, n in replicas.items()}, gpus, proxies)
        outcome = run(service, rate, seconds, config.deferred_share, config.seed)
        use = outcome["use"]
        fullest, model = (max(names, key=lambda name: use[name]) for names in (use, MODELS))
        # a place is taken for as long as a picture takes, which only a run says; at the rate that was asked for
        taken = max(use[name] for name in _PLACES) * rate / (outcome["answered_per_s"] or rate)
        if use[model] > _BUSIEST:  # before it any number of places is full
            fullest = model
        elif taken > config.use:
            replicas["ingress"] = max(replicas["ingress"] + 1, math.ceil(replicas["ingress"] * taken / config.use))
            continue
        if carries(outcome, rate):
            break
        if fullest == "proxy":
            proxies = math.ceil(proxies * 1.15)
        else:
            part = _OF.get(fullest, fullest)
            replicas[part] = max(replicas[part] + 1, math.ceil(replicas[part] * 1.1))
    else:
        raise RuntimeError(f"no size was found that carries {rate} pictures/s: {outcome}")
    cores = rate * (times.proxy_s + times.loop_s * (1 + config.deferred_share) + times.decode_s)
    of_gpu = {name: replicas[name] * settings[name]["scaling"].gpu_share for name in MODELS}
    return {
        "rate_per_s": rate,
        "replicas": replicas,
        "proxies": proxies,
        "gpus": gpus,
        "gpus_of_each": of_gpu,
        "cores": math.ceil(cores / config.use),
        "cores_with_the_gpus": gpus * _CORES_A_GPU,
        "usd_a_million": gpus * config.price / (rate * 3600) * 1e6,
        "first_to_be_full": max(outcome["use"], key=lambda name: outcome["use"][name]),
        **outcome,
    }


def as_it_is(config: ScaleConfig, settings: dict[str, Any], gpus: int) -> Service:
    """The configuration with as many replicas running as it allows and the GPUs hold, the first model growing first."""
    scaling: dict[str, Scaling] = {name: settings[name]["scaling"] for name in ("ingress", *MODELS)}
    running = {name: scaling[name].min_replicas for name in MODELS}
    left = gpus - sum(running[name] * scaling[name].gpu_share for name in MODELS)
    for name in MODELS:
        more = scaling[name].max_replicas - running[name]
        if share := scaling[name].gpu_share:
            more = min(more, int(left / share))
        running[name] += more
        left -= more * share
    running["ingress"] = scaling["ingress"].max_replicas
    replicas = {name: (count, count) for name, count in running.items()}
    return service_of(config, settings, replicas, gpus, proxies=2)


def most_carried(
    config: ScaleConfig, settings: dict[str, Any], gpus: int, seconds: float, deferred_share: float
) -> dict[str, Any]:
    """How much the configuration carries as it is when such a share can wait, and what is full then."""
    service = as_it_is(config, settings, gpus)
    bound, scaling = bounds(*models(config, settings)), service.scaling
    low, best = 0.0, None
    high = min(bound[name] * scaling[name].gpu_share * scaling[name].min_replicas for name in MODELS)
    for _ in range(12):
        rate = (low + high) / 2
        outcome = run(service, rate, seconds, deferred_share, config.seed)
        if carries(outcome, rate):
            low, best = rate, outcome
        else:
            high = rate
        if best is not None and (high - low) < 0.03 * high:
            break
    if best is None:
        raise RuntimeError(f"{config.serve_config} carries nothing in the model")
    full = max(best["use"], key=lambda name: best["use"][name])
    return {"pictures_per_s": low, "gpus": gpus, "first_to_be_full": full, **best}


# --------------------------------------------------------------------------------------------------------------- spike


def spike(
    config: ScaleConfig, settings: dict[str, Any], size: dict[str, Any], room: float, in_work: int
) -> dict[str, Any]:
    """Five times the rate for five minutes on a size that may grow to ``room`` times of it.

    ``under_10_minutes``: of the pictures that come meanwhile none waits longer, and none that could wait is refused.
    """
    rate, calm_s, spike_s = size["rate_per_s"], 120.0, 300.0
    most = {name: math.ceil(count * room) for name, count in size["replicas"].items()}
    most["ingress"] *= 5  # cores are not what is short
    replicas = {name: (size["replicas"][name], most[name]) for name in most}
    changed = config.model_copy(update={"deferred_in_work": in_work})
    service = service_of(changed, settings, replicas, gpus_for(most, settings), size["proxies"] * 5)
    graph = Graph(service, config.seed)

    def at(now: float) -> float:
        return rate * (5.0 if calm_s <= now < calm_s + spike_s else 1.0)

    feed(graph, poisson(random.Random(config.seed), at, _LONGEST_S), config.deferred_share)
    graph.sample(5.0)
    over = calm_s + spike_s
    while graph.clock.now < _LONGEST_S:
        graph.clock.run(graph.clock.now + 30.0)
        # over when everything of the spike has ended and nobody waits longer than before it
        if graph.clock.now > over + 60 and len(graph.deferred) < rate * 2:
            break
    drained_s = graph.clock.now - over if len(graph.deferred) < rate * 2 else None
    during = [
        (ended - arrived, deferred, how) for arrived, ended, deferred, how in graph.outcomes if calm_s <= arrived < over
    ]
    waiting = [seconds for seconds, deferred, how in during if deferred and how == "answered"]
    # what has not ended yet has waited so long already
    waiting += [graph.clock.now - picture.arrived for picture in graph.deferred if calm_s <= picture.arrived < over]
    refused = sum(deferred and how == "refused" for _, deferred, how in during)
    interactive = [how for _, deferred, how in during if not deferred]
    quick = [seconds for seconds, deferred, how in during if not deferred and how == "answered"]
    return {
        "rate_per_s": rate,
        "room": room,
        "deferred_in_work": in_work,
        "max_deferred": service.admitted.max_deferred,
        "gpus_at_most": gpus_for(most, settings),
        "ingresses_at_most": max(sample["ingress_replicas"] for sample in graph.samples),
        "deferred_p50_p99_max_s": [quantile(waiting, 0.5), quantile(waiting, 0.99), max(waiting, default=math.nan)],
        "under_10_minutes": not refused and max(waiting, default=math.inf) < 600,
        "deferred_refused": refused / max(1, refused + len(waiting)),
        "interactive_answered": interactive.count("answered") / max(1, len(interactive)),
        "interactive_not_answered": {how: interactive.count(how) for how in set(interactive) - {"answered"}},
        "interactive_p99_s": quantile(quick, 0.99),
        "most_waiting": max(sample["deferred"] for sample in graph.samples),
        "drained_after_s": drained_s,
        "samples": graph.samples,
    }
