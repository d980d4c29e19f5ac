"""What the scale model reads, what it is fed with, and that its answers hang together."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import published, scale, scale_model
from benchmarks.graph_simulation import Admitted, Batching, Generating, IngressTimes, Service
from benchmarks.scale_measure import Phase, batching, fitted, generating, predicted
from benchmarks.simulation import Scaling
from benchmarks.stand_ins import parse

CALIBRATION = {"decode_s": 0.02, "decode_spread": 0.5}
ROUTERS = {"rows": [{"proxy_s_each": 0.004, "ingress_s_each": 0.012}]}


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures of this machine that do not change with the last measurement."""
    results: dict[str, Any] = {"scale_calibration": CALIBRATION, "scale_routers": ROUTERS}
    monkeypatch.setattr(scale_model, "stored", results.get)


def test_the_production_configuration_is_read() -> None:
    settings = scale_model.graph_settings(scale_model.ROOT / "serve_config.yaml")
    assert settings["detector"]["scaling"].gpu_share == 0.25
    assert settings["captioner"]["scaling"].upscale_delay_s == 10
    assert settings["tagger"]["scaling"].gpu_share == 1
    assert settings["tagger"]["scaling"].max_ongoing == 192  # of `args.tagger`, not of a deployment
    assert settings["detector"]["batch"]["max_batch_size"] == 32
    assert settings["limits"]["max_in_flight"] == 64
    assert settings["deferred_in_work"] == 32
    assert settings["max_deferred"] == 100_000


def test_sizes_do_not_hang_on_how_many_pictures_may_wait() -> None:
    config = scale_model.ScaleConfig()
    settings = scale_model.graph_settings(config.serve_config)
    of = scale._of(config, settings)
    assert scale._of(config.model_copy(update={"max_deferred": 5}), settings | {"max_deferred": 5}) == of
    assert scale._of(config.model_copy(update={"deferred_in_work": 5}), settings) != of


def test_the_taggers_step_gives_back_what_was_published() -> None:
    engine = published.tagger(128)
    for number, figure in published.MISTRAL.items():
        assert number / (100 * engine.step_s(number)) == pytest.approx(figure.value, rel=0.03)
    most = max(published.MISTRAL)
    answers = scale_model.bounds(published.detector(8, 0), published.captioner(8, 0), engine)["tagger"]
    assert answers <= 1.03 * published.MISTRAL[most].value * 100 / published.TAG_TOKENS, "more than was ever published"


def test_the_captioner_alone_takes_what_the_original_took() -> None:
    assert published.captioner(16, 0.01).times(1) == pytest.approx(published.ORIGINAL_BLIP_S, rel=0.01)


def test_replicas_are_packed() -> None:
    settings = scale_model.graph_settings(scale_model.ROOT / "serve_config.yaml")
    assert scale_model.gpus_for({"detector": 1, "captioner": 1, "tagger": 1}, settings) == 2
    assert scale_model.gpus_for({"detector": 2, "captioner": 3, "tagger": 2}, settings) == 4
    assert scale_model.gpus_for({"detector": 5, "captioner": 0, "tagger": 0}, settings) == 2


def test_a_size_carries_its_rate_and_more_needs_more(measured: None) -> None:
    config = scale_model.ScaleConfig()
    settings = scale_model.graph_settings(config.serve_config)
    small, large = (scale_model.sized(config, settings, rate, 20.0) for rate in (20.0, 60.0))
    for one in (small, large):
        assert sum(one["not_answered"].values()) == 0
        assert max(one["use"].values()) < 0.9
        assert one["deferred_share"] == 0.9
        assert one["interactive_p50_p99_s"][1] < one["deferred_p50_p99_s"][1] < 5
        # with other arrivals, and for longer, nobody waits longer and longer
        replicas = {name: (count, count) for name, count in one["replicas"].items()}
        service = scale_model.service_of(config, settings, replicas, one["gpus"], one["proxies"])
        again = scale_model.run(service, one["rate_per_s"], 60.0, config.deferred_share, config.seed + 1)
        assert again["growth_per_s"] < 0.01 * one["rate_per_s"]
        assert again["deferred_p50_p99_s"][1] < 1.2 * one["deferred_p50_p99_s"][1]
    assert small["gpus"] < large["gpus"]
    assert all(small["replicas"][name] <= large["replicas"][name] for name in small["replicas"])
    price = large["gpus"] * config.price / (60 * 3600) * 1e6
    assert large["usd_a_million"] == pytest.approx(price)


def test_where_places_are_few_ingresses_are_added_and_no_gpu(measured: None) -> None:
    wide, narrow = (scale_model.ScaleConfig(deferred_in_work=number) for number in (32, 8))
    settings = scale_model.graph_settings(wide.serve_config)
    many, few = (scale_model.sized(config, settings, 40.0, 20.0) for config in (wide, narrow))
    models = {name: many["replicas"][name] for name in scale_model.MODELS}
    assert {name: few["replicas"][name] for name in scale_model.MODELS} == models
    assert few["gpus"] == many["gpus"]
    # Little: so many pictures are in work at a time, eight to an ingress, and with room to spare
    least = 40.0 * 0.9 * many["interactive_p50_p99_s"][0] / 8
    assert least < few["replicas"]["ingress"] < 1.6 * least
    assert max(few["use"][name] for name in ("places for deferred", "places in work")) < 0.85
    # with the number that the cores need the queue grows, and it is the places that are full
    replicas = {name: (count, count) for name, count in (models | {"ingress": 2}).items()}
    service = scale_model.service_of(narrow, settings, replicas, few["gpus"], 1)
    full = scale_model.run(service, 40.0, 20.0, 0.9, wide.seed)
    assert full["growth_per_s"] > 10 and not scale_model.carries(full, 40.0)
    assert max(full["use"], key=lambda name: full["use"][name]) == "places for deferred"
    assert full["use"]["places for deferred"] == pytest.approx(1.0, abs=0.02)


def test_who_cannot_wait_takes_places_as_well(measured: None) -> None:
    config = scale_model.ScaleConfig(deferred_share=0.0)
    settings = scale_model.graph_settings(config.serve_config)
    settings["limits"] = settings["limits"] | {"max_in_flight": 16}
    one = scale_model.sized(config, settings, 30.0, 20.0)
    assert one["replicas"]["ingress"] > 2 and one["use"]["places for deferred"] == 0
    assert one["use"]["places in work"] == pytest.approx(
        one["answered_per_s"] * one["interactive_p50_p99_s"][0] / (16 * one["replicas"]["ingress"]), rel=0.1
    )


def test_what_is_as_busy_as_it_can_be_carries_nothing_for_long() -> None:
    outcome = {
        "not_answered": {},
        "pictures": 5000,
        "growth_per_s": 0.33,
        "growth_by_chance_per_s": 0.4,
        "use": {"captioner": 0.95, "places for deferred": 0.9},
    }
    assert scale_model.carries(outcome, 58.78)
    assert not scale_model.carries(outcome | {"use": {"captioner": 0.9997, "places for deferred": 0.5}}, 58.78)
    assert not scale_model.carries(outcome | {"use": {"captioner": 0.6, "places for deferred": 0.99}}, 58.78)
    assert not scale_model.carries(outcome | {"growth_per_s": 0.6}, 58.78)
    assert not scale_model.carries(outcome | {"growth_by_chance_per_s": 0.2}, 58.78)
    assert not scale_model.carries(outcome | {"growth_per_s": 7.6}, 300.0)


def test_what_was_measured_without_a_gpu_sizes_none(monkeypatch: pytest.MonkeyPatch) -> None:
    config = scale_model.ScaleConfig(figures="measured")
    monkeypatch.setattr(scale_model, "stored", lambda name: {"device": "cpu"})
    with pytest.raises(SystemExit, match="on a GPU machine"):
        scale_model.models(config, scale_model.graph_settings(config.serve_config))


def test_more_room_makes_a_spike_shorter(measured: None) -> None:
    config = scale_model.ScaleConfig()
    settings = scale_model.graph_settings(config.serve_config)
    size = scale_model.sized(config, settings, 10.0, 30.0)
    little, much = (scale_model.spike(config, settings, size, room, 64) for room in (1.0, 3.0))
    assert much["deferred_p50_p99_max_s"][2] <= little["deferred_p50_p99_max_s"][2]
    assert much["most_waiting"] <= little["most_waiting"]
    assert much["drained_after_s"] is not None
    assert (little["max_deferred"], little["deferred_refused"]) == (100_000, 0)


def test_a_spike_beyond_the_room_on_disk_is_refused(measured: None) -> None:
    config = scale_model.ScaleConfig()
    settings = scale_model.graph_settings(config.serve_config)
    # as many pictures in work as an ingress has at a time, and no more: the spike's have to wait
    size = {"rate_per_s": 2.0, "replicas": dict.fromkeys(("ingress", *scale_model.MODELS), 1), "proxies": 1}
    found = scale_model.spike(config.model_copy(update={"max_deferred": 500}), settings, size, 1.0, 4)
    assert found["max_deferred"] == 500
    assert 400 < found["most_waiting"] <= 500 and found["interactive_answered"] > 0.99
    assert 0.1 < found["deferred_refused"] < 1 - 500 / (5 * 2.0 * 300 * config.deferred_share), "500 found room"
    assert found["deferred_p50_p99_max_s"][2] < 600 and not found["under_10_minutes"], "who is refused has no answer"


def test_an_engines_step_is_found_again() -> None:
    rows = [
        {"size": size, "seconds": 20.0 * (0.05 + 0.004 * size), "cores": 1.5, "tokens": 20.0, "tokens_spread": 0.0}
        for size in (1, 2, 4, 8, 16)
    ]
    engine = generating(rows, 32)
    assert engine.step_s(10) == pytest.approx(0.05 + 0.04, rel=0.01)
    assert (engine.tokens, engine.width, engine.size) == (20.0, 1.5, 32)


def test_the_time_between_processes_is_what_the_model_lacks() -> None:
    one = Scaling(max_ongoing=64)

    def service(hops_s: tuple[float, ...]) -> Service:
        return Service(
            IngressTimes(0.001, 0.002, 0.01, hops_s=hops_s),
            Admitted(),
            batching([{"size": 1, "seconds": 0.05, "cores": 1.0}, {"size": 8, "seconds": 0.2, "cores": 1.0}], 8, 0.005),
            Batching(lambda size: 0.1, 8, 0.005),
            Generating(lambda running: 0.005, 16, 10.0),
            dict.fromkeys(("ingress", "detector", "captioner", "tagger"), one),
            cores=2.0,
        )

    alone = 0.013 + 0.105 + 0.05
    assert fitted(service, [alone + 0.03, alone + 0.05]) == pytest.approx((0.03, 0.05), abs=0.002)
    figures = predicted(service((0.03,)), Phase("one", 10.0, clients=1), 1.0, seeds=1)
    assert figures["p50_s"] == pytest.approx(alone + 0.03, rel=0.02)
    assert figures["throughput_per_s"] == pytest.approx(1 / (alone + 0.03), rel=0.02)
    # at the moments that are given, and what ends before the warm-up is over does not count
    figures = predicted(service((0.03,)), Phase("five", 10.0, rate=1.0), 1.0, [0.1, 2.0, 4.0, 6.0, 8.0], seeds=2)
    assert figures["throughput_per_s"] == pytest.approx(0.4)


def test_a_stand_in_says_how_long_it_takes() -> None:
    assert parse("stand-in:0.06+0.01") == (0.06, 0.01, 0.0)
    assert parse("stand-in:0.016+0.0008x23") == (0.016, 0.0008, 23.0)


def test_the_production_configuration_carries_the_design_load_by_its_own_deferred_in_work(measured: None) -> None:
    config = scale_model.ScaleConfig()
    settings = scale_model.graph_settings(config.serve_config)
    outcome = {}
    for number in (None, 8):
        service = scale_model.as_it_is(config.model_copy(update={"deferred_in_work": number}), settings, 3)
        outcome[number] = scale_model.run(service, 50.0, 20.0, config.deferred_share, config.seed)
    # nothing to spare: the tagger is as busy as anybody has published that it can be
    assert outcome[None]["interactive_refused_share"] == 0 and outcome[None]["growth_per_s"] < 1
    assert outcome[None]["use"]["tagger"] > 0.9
    assert not scale_model.carries(outcome[8], 50.0) and outcome[8]["growth_per_s"] > 3
