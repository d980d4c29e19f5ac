"""The tagger without its engine: prompt, grammar, number format, settings, and a replica whose engine fails."""

import asyncio
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from pydantic import ValidationError
from ray import serve

from deployments.checkpoints import CheckpointError, resolve
from deployments.processor import cpu_flags
from deployments.tag_rules import proposed
from deployments.tagger import (
    ANSWER,
    Tagger,
    TaggerError,
    TaggerSettings,
    build_tagger,
    engine_arguments,
    engine_environment,
    fast_dtype,
    load_prompt,
)


def test_the_prompt_alternates_and_has_no_system_turn() -> None:
    roles = [turn["role"] for turn in load_prompt().messages("a cat")]
    assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"]


def test_every_example_obeys_the_grammar_and_is_supported_by_its_own_caption() -> None:
    for example in load_prompt().examples:
        answer = json.dumps(example.tags, separators=(",", ":"))
        assert re.fullmatch(ANSWER, answer)
        assert proposed(answer, example.caption) == example.tags


def test_the_grammar_refuses_white_space_capitals_and_too_few_or_many() -> None:
    for bad in ('["a", "b", "c"]', '["A","b","c"]', '["a","b"]', json.dumps(["a"] * 11, separators=(",", ":"))):
        assert not re.fullmatch(ANSWER, bad)


def test_bfloat16_is_chosen_only_where_the_cpu_multiplies_it() -> None:
    assert fast_dtype("cpu", cpu_flags("flags\t\t: avx2 avx512f avx512_vnni\n")) == "float32"
    assert fast_dtype("cpu", cpu_flags("flags\t\t: avx512f avx512_bf16\n")) == "bfloat16"
    assert fast_dtype("cpu", cpu_flags("Features\t: fp asimd bf16\n")) == "bfloat16"
    assert fast_dtype("gpu", frozenset()) == "auto"


def test_an_unknown_setting_is_an_error() -> None:
    with pytest.raises(ValidationError):
        TaggerSettings.model_validate({"replicas": 2})


def test_a_gpu_takes_its_share_and_a_cpu_a_bounded_cache() -> None:
    assert "kv_cache_memory_bytes" in engine_arguments(TaggerSettings())
    gpu = engine_arguments(TaggerSettings(device="gpu", tensor_parallel=2))
    assert gpu["tensor_parallel_size"] == 2
    assert "kv_cache_memory_bytes" not in gpu
    assert "distributed_executor_backend" not in gpu
    assert "OMP_NUM_THREADS" not in engine_environment(TaggerSettings(device="gpu"))


def test_a_canary_has_no_replica_until_it_is_used() -> None:
    deployment = build_tagger(TaggerSettings().canary(), "TaggerCanary")._bound_deployment
    assert deployment.name == "TaggerCanary"
    assert deployment._deployment_config.autoscaling_config.min_replicas == 0
    assert deployment._deployment_config.autoscaling_config.initial_replicas == 0


def test_building_the_graph_imports_neither_torch_nor_vllm() -> None:
    code = (
        "import sys; from deployments.tagger import *; build_tagger(TaggerSettings());"
        "assert not {'torch', 'vllm', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_a_request_that_waits_too_long_makes_the_replica_unhealthy() -> None:
    tagger = Tagger(TaggerSettings())
    asyncio.run(tagger.check_health())
    tagger._load.running, tagger._load.progress = 1, time.monotonic() - 1000
    with pytest.raises(RuntimeError, match="none answered"):
        asyncio.run(tagger.check_health())


def test_a_replica_without_a_model_says_so() -> None:
    with pytest.raises(TaggerError, match="no model"):
        asyncio.run(Tagger(TaggerSettings()).info())


def test_another_architecture_and_what_is_not_there_are_refused_and_the_engine_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"name": name}))
        (tmp_path / name / "model.safetensors").touch()
    context = SimpleNamespace(deployment="Tagger")
    monkeypatch.setattr(serve, "get_replica_context", lambda: context)
    tagger = Tagger(TaggerSettings())
    with pytest.raises(CheckpointError, match="no such checkpoint"):  # nothing is in service
        asyncio.run(tagger.reconfigure({"uri": str(tmp_path / "three")}))
    tagger._checkpoint = resolve(str(tmp_path / "one"))
    tagger._server = None  # nothing may be asked of it
    refused: list[tuple[str, bool]] = []
    tagger._metrics = SimpleNamespace(in_service=lambda *_: None, refused=lambda *said: refused.append(said))
    for name, why in (("two", "config.json"), ("three", "no such checkpoint")):
        asyncio.run(tagger.reconfigure({"uri": str(tmp_path / name)}))
        told = asyncio.run(tagger.info())
        assert told["uri"] == str(tmp_path / "one") and told["refused"]["uri"] == str(tmp_path / name)
        assert why in told["refused"]["why"]
        asyncio.run(tagger.check_health())
    asyncio.run(tagger.reconfigure({"uri": str(tmp_path / "one")}))
    assert asyncio.run(tagger.info())["refused"] is None
    asyncio.run(tagger.check_health())
    assert refused == [("tagger", True), ("tagger", True), ("tagger", False)]
    context.deployment = "TaggerCanary"
    with pytest.raises(TaggerError, match=r"config\.json"):
        asyncio.run(tagger.reconfigure({"uri": str(tmp_path / "two")}))
