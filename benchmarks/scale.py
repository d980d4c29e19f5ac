"""How large it must be: replicas, GPUs and money for 50, 300 and 3,000 pictures a second, and what a spike does.

A discrete-event model of the graph (``benchmarks.scale_model``), fed with what is measured here and what others
have published of a GPU (``benchmarks.published``), and held against the running service. Parts, each with a result:

* ``calibrate``  -> ``scale_calibration``: the models' times by batch size, of decoding a photo
* ``validate``   -> ``scale_validation``: the running service and the model under the same loads; errors, bar 15 %
* ``routers``    -> ``scale_routers``: controller, proxy and ingress against the number of replicas
* ``size``       -> ``scale_sizes``: what each rate needs, what is full first, cost of a million pictures; and what
  ``serve_config.yaml`` carries as it is
* ``spike``      -> ``scale_spike``: five times the rate for five minutes, with more and less room to grow, and what is
  refused because as many pictures wait as may (``--max-deferred``; else ``store.max_deferred`` of the configuration)

    python -m benchmarks.scale --photos DIR [--parts calibrate,validate,routers,size,spike] [--quick]

``size`` and ``spike`` compute and need no quiet machine; the others measure. Each writes a plot beside its result.
Modelled of the queue on disk is how many pictures it holds. Not modelled: its bytes (``store.max_deferred_bytes``), the
database's work (a commit or two for each picture that waits), senders who come again after a 429, the network between
nodes, failures.
"""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from benchmarks import plots, published
from benchmarks.report import write_result
from benchmarks.scale_model import (
    DEFERRED_IN_WORK,
    MODELS,
    ScaleConfig,
    as_it_is,
    bounds,
    carries,
    graph_settings,
    ingress_times,
    models,
    most_carried,
    run,
    sized,
    spike,
    stored,
)

# ---------------------------------------------------------------------------------------------------- size and spike


def serve_config_part(config: ScaleConfig, settings: dict[str, Any], seconds: float) -> dict[str, Any]:
    """The configuration as it is on its three GPUs: the most that it carries when some can wait and when nobody can,
    and the design load with its `deferred_in_work` and with the default.
    """
    gpus, rate = 3, config.rates[0]
    carried = {
        share: most_carried(config, settings, gpus, seconds, share)
        for share in dict.fromkeys((config.deferred_share, 0.0))
    }
    in_work = config.deferred_in_work or settings["deferred_in_work"]
    loads = []
    for number in dict.fromkeys((in_work, DEFERRED_IN_WORK)):
        service = as_it_is(config.model_copy(update={"deferred_in_work": number}), settings, gpus)
        outcome = run(service, rate, seconds, config.deferred_share, config.seed)
        loads.append({"rate_per_s": rate, "deferred_in_work": number, "carries": carries(outcome, rate), **outcome})
    for share, one in carried.items():
        print(
            f"{config.serve_config.name} on {gpus} GPUs carries {one['pictures_per_s']:.0f} pictures/s of which "
            f"{share:.0%} can wait; {one['first_to_be_full']} is full first",
            flush=True,
        )
    print(
        plots.table(
            [
                {
                    "pictures/s": f"{rate:g}",
                    "in work": one["deferred_in_work"],
                    "carries": "yes" if one["carries"] else "NO",
                    "grows /s": f"{one['growth_per_s']:.1f}",
                    "interactive p99 s": f"{one['interactive_p50_p99_s'][1]:.2f}",
                    "refused": f"{one['interactive_refused_share']:.1%}",
                    "deferred p99 s": f"{one['deferred_p50_p99_s'][1]:.2f}",
                }
                for one in loads
            ]
        ),
        flush=True,
    )
    return {
        "serve_config": carried[config.deferred_share],
        "serve_config_all_interactive": carried[0.0],
        "serve_config_at_design_load": loads,
    }


def _of(config: ScaleConfig, settings: dict[str, Any]) -> dict[str, Any]:
    """What sizes hang on, as it is in a result file."""
    asked = config.model_dump(include={"figures", "use", "start_s", "deferred_share", "deferred_in_work"})
    # a size that carries its rate has no queue that comes near its bound
    graph = {name: value for name, value in settings.items() if name != "max_deferred"}
    found = asked | {"graph": graph, "bounds": bounds(*models(config, settings))}
    back: dict[str, Any] = json.loads(json.dumps(found, default=asdict))
    return back


def size_part(config: ScaleConfig) -> dict[str, Any]:
    """Sizes of all rates, what hangs on the derived figure, and the configuration as it is."""
    settings = graph_settings(config.serve_config)
    seconds = 30.0 if config.quick else 90.0
    rates = config.rates[:1] if config.quick else config.rates
    sizes = []
    for rate in rates:
        begun = time.perf_counter()
        sizes.append(sized(config, settings, rate, seconds if rate < 1000 else min(seconds, 45.0)))
        print(f"{rate:g} pictures/s simulated in {time.perf_counter() - begun:.0f} s", flush=True)
    print(plots.table([_size_row(one) for one in sizes]), flush=True)
    times, origin = ingress_times(int(settings["limits"].get("decode_threads", 2)))
    bound = bounds(*models(config, settings))
    result: dict[str, Any] = {
        "of": _of(config, settings),
        "figures": config.figures,
        "published": published.sources(),
        "ingress": {"proxy_s": times.proxy_s, "loop_s": times.loop_s, "decode_s": times.decode_s, "from": origin},
        "bound_a_gpu_per_s": bound,
        "price_usd_h": config.price,
        "deferred_share": config.deferred_share,
        "deferred_in_work": config.deferred_in_work or settings["deferred_in_work"],
        "sizes": sizes,
    }
    result |= serve_config_part(config, settings, seconds)
    if config.figures == "published":
        # the one figure that nobody has published: what if a decoder's step took half or twice as long
        result["captioner_step"] = []
        step_s = published.sources()["captioner_decoder"]["step_s"]
        for factor in (0.5, 1.0, 2.0):
            kind = published.captioner(settings["captioner"]["batch"]["max_batch_size"], 0.01, step_s * factor)
            rate = kind.size / kind.times(kind.size)
            row = {"step_s": step_s * factor, "captions_per_s_a_gpu": rate}
            row |= {f"gpus_at_{rate_:g}": math.ceil(rate_ / rate / config.use) for rate_ in config.rates}
            result["captioner_step"].append(row)
        print(plots.table([{k: f"{v:.4g}" for k, v in row.items()} for row in result["captioner_step"]]), flush=True)

    def draw(axes: Any) -> None:
        left, right = axes
        for number, name in enumerate(MODELS):
            left.plot(
                [one["rate_per_s"] for one in sizes],
                [one["gpus_of_each"][name] for one in sizes],
                "o-",
                color=plots.COLOURS[number],
                label=name,
            )
        left.set(xscale="log", yscale="log", xlabel="pictures a second", ylabel="GPUs")
        left.legend()
        names = list(sizes[-1]["use"])
        right.barh(names, [sizes[-1]["use"][name] for name in names], color=plots.COLOURS[0])
        right.set(xlim=(0, 1), xlabel=f"share in use at {sizes[-1]['rate_per_s']:g} pictures/s")

    plots.save("scale_sizes", draw, panels=2, folder=config.output)
    return result


def _size_row(one: dict[str, Any]) -> dict[str, Any]:
    return {
        "pictures/s": f"{one['rate_per_s']:g}",
        **{name: one["replicas"][name] for name in ("ingress", *MODELS)},
        "proxies": one["proxies"],
        "GPUs": one["gpus"],
        "cores": one["cores"],
        "USD/million": f"{one['usd_a_million']:.2f}",
        "interactive p99 s": f"{one['interactive_p50_p99_s'][1]:.2f}",
        "deferred p99 s": f"{one['deferred_p50_p99_s'][1]:.2f}",
        "full first": one["first_to_be_full"],
    }


def spike_part(config: ScaleConfig) -> dict[str, Any]:
    """Spikes of all rates and rooms; with the default of ``deferred_in_work`` as well."""
    settings = graph_settings(config.serve_config)
    usual = config.deferred_in_work or settings["deferred_in_work"]
    rows = []
    kept = stored("scale_sizes") or {}
    # sizes by other figures or another configuration are others
    same = kept.get("of") == _of(config, settings)
    sizes = {one["rate_per_s"]: one for one in kept["sizes"]} if same else {}
    for rate in config.spike_rates[:1] if config.quick else config.spike_rates:
        size = sizes.get(rate) or sized(config, settings, rate, 60.0)
        cases = [(room, usual) for room in (config.room[-1:] if config.quick else config.room)]
        cases += [(config.room[-1], DEFERRED_IN_WORK)]
        for room, in_work in cases:
            begun = time.perf_counter()
            rows.append(spike(config, settings, size, room, in_work))
            print(f"{rate:g}/s, room {room:g}: simulated in {time.perf_counter() - begun:.0f} s", flush=True)
    print(plots.table([_spike_row(row) for row in rows]), flush=True)

    def draw(axes: Any) -> None:
        for axis, rate in zip(axes, dict.fromkeys(row["rate_per_s"] for row in rows), strict=False):
            chosen = [row for row in rows if row["rate_per_s"] == rate]
            for number, row in enumerate(chosen):
                note = "" if row["deferred_in_work"] == usual else f", {row['deferred_in_work']} in work"
                axis.plot(
                    [sample["t"] / 60 for sample in row["samples"]],
                    [sample["deferred"] for sample in row["samples"]],
                    color=plots.COLOURS[number],
                    label=f"room x{row['room']:g}{note}",
                )
            axis.axvspan(2, 7, color="#eeeeee", zorder=0)
            axis.set(title=f"{rate:g} pictures/s, five-fold for 5 minutes", xlabel="minutes", ylabel="pictures waiting")
            axis.legend()

    plots.save("scale_spike", draw, panels=2, folder=config.output)
    for row in rows:  # a point in half a minute is enough to keep
        row["samples"] = [{name: round(value, 1) for name, value in sample.items()} for sample in row["samples"][::6]]
    return {
        "factor": 5,
        "spike_s": 300,
        "deferred_share": config.deferred_share,
        "max_deferred": config.max_deferred or settings["max_deferred"],
        "start_s": config.start_s,
        "rows": rows,
    }


def _spike_row(row: dict[str, Any]) -> dict[str, Any]:
    p50, p99, most = row["deferred_p50_p99_max_s"]
    return {
        "pictures/s": f"{row['rate_per_s']:g}",
        "room": f"x{row['room']:g}",
        "in work": row["deferred_in_work"],
        "GPUs": row["gpus_at_most"],
        "wait p50 s": f"{p50:.0f}",
        "p99 s": f"{p99:.0f}",
        "max s": f"{most:.0f}",
        "< 10 min": "yes" if row["under_10_minutes"] else "NO",
        "most waiting": f"{row['most_waiting']:.0f}",
        "may wait": row["max_deferred"],
        "deferred refused": f"{row['deferred_refused']:.1%}",
        "interactive answered": f"{row['interactive_answered']:.1%}",
        "drained after s": "never" if row["drained_after_s"] is None else f"{row['drained_after_s']:.0f}",
    }


# ------------------------------------------------------------------------------------------------------------ measuring


def validate_part(config: ScaleConfig) -> dict[str, Any]:
    """Both services beside the model."""
    from benchmarks import scale_measure
    from benchmarks.serving import read_photos

    seconds, warm_s = (30.0, 10.0) if config.quick else (config.load_s, config.warm_s)
    result: dict[str, Any] = {"bar": 0.15, "stand_ins": scale_measure.validate_stand_ins(seconds, warm_s)}
    if not config.quick:
        calibration = calibrate_part(config)  # both of one run
        print(write_result("scale_calibration", calibration, config.output), flush=True)
        photos = read_photos(config.photos, config.count, config.seed)
        asleep = result["stand_ins"]["one_client"]
        result["starter"] = scale_measure.validate_starter(
            photos, calibration, asleep, config.cpu_config, 3 * seconds, warm_s
        )
    for name in ("stand_ins", "starter"):
        if name in result:
            result[name]["worst_error"] = scale_measure.worst(result[name]["loads"])
    result["reaches_the_bar"] = {
        name: result[name]["worst_error"] <= result["bar"] for name in ("stand_ins", "starter") if name in result
    }
    print(json.dumps(result["reaches_the_bar"]), flush=True)

    def draw(axes: Any) -> None:
        for axis, name, unit in zip(axes, ("throughput_per_s", "p50_s", "p99_s"), ("answers/s", "s", "s"), strict=True):
            largest = 0.0
            for number, kind in enumerate(kind for kind in ("stand_ins", "starter") if kind in result):
                loads = result[kind]["loads"]
                points = [(load["measured"][name], load["model"][name]) for load in loads]
                largest = max(largest, *(value for point in points for value in point))
                axis.plot(*zip(*points, strict=True), "o", color=plots.COLOURS[number], label=kind.replace("_", " "))
            axis.plot([0, largest], [0, largest], color="#888888", linewidth=0.8)
            axis.fill_between([0, largest], [0, 0.85 * largest], [0, 1.15 * largest], color="#eeeeee", zorder=0)
            axis.set(title=name, xlabel=f"measured, {unit}", ylabel=f"model, {unit}")
            axis.legend()

    plots.save("scale_validation", draw, panels=3, folder=config.output)
    return result


def calibrate_part(config: ScaleConfig) -> dict[str, Any]:
    """The starter models' times here."""
    from benchmarks import scale_measure
    from benchmarks.serving import read_photos

    photos = read_photos(config.photos, config.count, config.seed)
    uris = {name: f"starter:{name}" for name in MODELS}
    result = scale_measure.calibrate_apart(photos, uris, config.threads, 2 if config.quick else config.repeats)

    def draw(axes: Any) -> None:
        for number, name in enumerate(MODELS):
            rows = result[name]
            axes.plot(
                [row["size"] for row in rows],
                [row["size"] / row["seconds"] for row in rows],
                "o-",
                color=plots.COLOURS[number],
                label=name,
            )
        axes.set(xscale="log", xlabel="pictures at a time", ylabel="pictures a second")
        axes.legend()

    plots.save("scale_calibration", draw, folder=config.output)
    return result


def routers_part(config: ScaleConfig) -> dict[str, Any]:
    """Costs against the number of replicas."""
    from benchmarks import scale_measure

    counts: Sequence[int] = config.replicas[:2] if config.quick else config.replicas
    seconds = 20.0 if config.quick else 60.0
    result = scale_measure.routers(counts, config.routers_rate, seconds, int(config.floor_gb * 2**30))
    rows = result["rows"]

    def draw(axes: Any) -> None:
        left, right = axes
        numbers = [row["replicas"] for row in rows]
        left.plot(numbers, [row["controller_cores_at_rest"] for row in rows], "o-", color=plots.COLOURS[0])
        left.set(xlabel="replicas", ylabel="controller, cores at rest", ylim=(0, None))
        for number, name in enumerate(("proxy_s_each", "ingress_s_each", "controller_s_each")):
            right.plot(numbers, [row[name] * 1000 for row in rows], "o-", color=plots.COLOURS[number], label=name[:-7])
        right.set(xlabel="replicas", ylabel="ms of a core for a picture", ylim=(0, None))
        right.legend()

    plots.save("scale_routers", draw, panels=2, folder=config.output)
    return result


_PARTS = {
    "calibrate": (calibrate_part, "scale_calibration"),
    "validate": (validate_part, "scale_validation"),
    "routers": (routers_part, "scale_routers"),
    "size": (size_part, "scale_sizes"),
    "spike": (spike_part, "scale_spike"),
}


def main(arguments: list[str] | None = None) -> None:
    """Run the chosen parts and write their results and plots."""
    from pydantic_settings import CliApp

    # whatever ends this ends what it has started
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    config = CliApp.run(ScaleConfig, cli_args=arguments)
    parts = config.parts.split(",")
    if unknown := set(parts) - set(_PARTS):
        raise SystemExit(f"error: no part {', '.join(sorted(unknown))}; there are {', '.join(_PARTS)}")
    for part in parts:
        # `validate` does that itself
        if part == "calibrate" and "validate" in parts and not config.quick:
            continue
        run_part, name = _PARTS[part]
        print(f"== {part}", flush=True)
        print(write_result(name, run_part(config), config.output), flush=True)


if __name__ == "__main__":
    main()
