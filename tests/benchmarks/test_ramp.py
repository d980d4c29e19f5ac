"""What a ramp says of the replicas that it saw, and that its configuration scales as production's does."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import yaml

from app.canary_config import ServeApi
from app.config import MODELS, read_serve_config
from benchmarks.ramp import RampConfig, Watch, configuration, look, verdict


def seen(*counts: int, other: int = 1) -> list[tuple[float, dict[str, int]]]:
    return [
        (10.0 * at, {"detector": count, "captioner": other, "tagger": 1}) for at, count in enumerate(counts, start=1)
    ]


def test_a_model_holds_that_goes_up_and_comes_back_alone() -> None:
    found = verdict(seen(1, 2, 3, 3, 2, 1), "detector", 3)
    assert found["holds"] and (found["most_after_s"], found["back_after_s"]) == (30.0, 60.0)
    assert found["others_most"] == {"captioner": 1, "tagger": 1}
    for replicas in (seen(1, 2, 2, 1), seen(1, 2, 3, 2), seen(2, 3, 1), seen(1, 2, 3, 4, 1), seen(1, 3, 1, other=2)):
        assert not verdict(replicas, "detector", 3)["holds"]


def test_all_models_scale_by_one_policy_on_a_configuration_that_is_read_strictly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PORT", raising=False)
    config = RampConfig()
    file = tmp_path / "ramp.yaml"
    file.write_text(yaml.safe_dump(configuration(config, 8123)))
    (application,) = read_serve_config(file)["applications"]
    scaling = {one["name"]: one.get("autoscaling_config") for one in application["deployments"]}
    assert {scaling[name]["max_replicas"] for name in MODELS.values()} == {config.max_replicas}
    assert config.clients > config.target_ongoing_requests * (config.max_replicas - 1), "enough for the last replica"


def test_a_look_that_fails_ends_nothing_and_a_ramp_that_nobody_saw_is_said() -> None:
    watch = Watch()
    asyncio.run(look(ServeApi("http://127.0.0.1:9", "token"), watch, 1))  # nobody listens there
    assert watch.replicas == watch.clients == [] and watch.last("detector") is None
    with pytest.raises(RuntimeError, match="did not answer"):
        verdict(watch.replicas, "detector", 3)
