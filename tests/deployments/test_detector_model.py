"""The multi-block detector: pooling, shapes, gradients, and a checkpoint folder that gives back the same model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageClassification

from deployments import detector_model
from deployments.detector_model import (
    ClipBlocksConfig,
    ClipBlocksForImageClassification,
    assemble_detector,
    pool_tokens,
    write_checkpoint,
)
from deployments.views import ViewSpec

SPEC = ViewSpec(size_px=32, views=("centre", "native"))


def small_model(views: int = 2, hidden_size: int = 0) -> ClipBlocksForImageClassification:
    torch.manual_seed(0)
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "patch_size": 8,
        "image_size": 32,
    }
    config = ClipBlocksConfig(vision, [1, 3], ["cls", "mean", "std"], views, hidden_size)
    model = ClipBlocksForImageClassification(config).eval()
    torch.nn.init.normal_(model.head.out.weight)
    return model


@pytest.mark.parametrize("hidden_size", [0, 8])
def test_views_become_two_logits(hidden_size: int) -> None:
    model = small_model(hidden_size=hidden_size)
    assert model.config.features == 2 * 2 * 3 * 32
    assert model(torch.randn(5, 2, 3, 32, 32)).logits.shape == (5, 2)
    assert model.config.id2label == {0: "human", 1: "ai"}


def test_a_model_of_one_view_takes_plain_pictures() -> None:
    model, pictures = small_model(views=1), torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(model(pictures).logits, model(pictures[:, None]).logits)


def test_a_wrong_number_of_views_is_refused() -> None:
    with pytest.raises(ValueError, match="expected 2 views"):
        small_model()(torch.randn(1, 3, 32, 32))


def test_blocks_outside_the_tower_and_unknown_pools_are_refused() -> None:
    with pytest.raises(ValueError, match="blocks"):
        ClipBlocksForImageClassification(ClipBlocksConfig({"num_hidden_layers": 2}, [3]))
    with pytest.raises(ValueError, match="unknown pool"):
        pool_tokens(torch.zeros(1, 5, 4), ["max"])


def test_pools_are_what_they_say() -> None:
    tokens = torch.randn(2, 5, 4)
    pooled = pool_tokens(tokens, ["cls", "mean", "std"])
    torch.testing.assert_close(pooled[:, 0], tokens[:, 0])
    torch.testing.assert_close(pooled[:, 1], tokens[:, 1:].mean(1))
    torch.testing.assert_close(pooled[:, 2], tokens[:, 1:].std(1))


def test_pictures_of_a_batch_do_not_influence_each_other() -> None:
    model, pictures = small_model(), torch.randn(4, 2, 3, 32, 32)
    torch.testing.assert_close(model(pictures).logits[2:3], model(pictures[2:3]).logits, atol=1e-5, rtol=1e-4)


def test_gradients_reach_the_tokens_of_every_used_block() -> None:
    output = small_model()(torch.randn(2, 2, 3, 32, 32), output_hidden_states=True)
    assert [tuple(tokens.shape) for tokens in output.hidden_states] == [(4, 17, 32), (4, 17, 32)]
    for tokens in output.hidden_states:
        tokens.retain_grad()
    output.logits[:, 1].sum().backward()
    for tokens in output.hidden_states:
        assert tokens.grad[:, 1:].abs().sum() > 0


def test_labels_give_a_loss() -> None:
    output = small_model()(torch.randn(2, 2, 3, 32, 32), labels=torch.tensor([0, 1]))
    torch.testing.assert_close(output.loss, torch.nn.functional.cross_entropy(output.logits, torch.tensor([0, 1])))


@pytest.mark.parametrize("hidden_size", [0, 8])
def test_a_written_checkpoint_loads_through_the_auto_classes_with_equal_logits(
    hidden_size: int, tmp_path: Path
) -> None:
    model, pictures = small_model(hidden_size=hidden_size), torch.randn(2, 2, 3, 32, 32)
    model.head.mean.normal_()
    model.head.scale.uniform_(0.5, 2)
    write_checkpoint(model, SPEC, {"task": "detection"}, tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert isinstance(loaded, ClipBlocksForImageClassification)
    assert AutoConfig.from_pretrained(tmp_path).blocks == [1, 3]
    assert torch.equal(loaded(pictures).logits, model(pictures).logits)
    assert ViewSpec.from_processor(tmp_path) == SPEC
    assert json.loads((tmp_path / "card.json").read_text()) == {"task": "detection"}


def test_the_starter_is_assembled_the_same_every_time(tmp_path: Path) -> None:
    assemble_detector(tmp_path / "first")
    assemble_detector(tmp_path / "second")
    names = sorted(path.name for path in (tmp_path / "first").iterdir())
    assert {"config.json", "model.safetensors", "preprocessor_config.json", "card.json", "README.md"} <= set(names)
    for name in names:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes(), name


def test_the_starter_answers_with_two_finite_logits(tmp_path: Path) -> None:
    assemble_detector(tmp_path)
    model = AutoModelForImageClassification.from_pretrained(tmp_path)
    card, spec = json.loads((tmp_path / "card.json").read_text()), ViewSpec.from_processor(tmp_path)
    assert card["preprocessing"] == spec.model_dump(mode="json")
    assert 0 < card["thresholds"]["human_below"] <= card["thresholds"]["ai_above"] < 1
    with torch.inference_mode():
        logits = model(torch.zeros(2, len(spec.views), 3, spec.size_px, spec.size_px)).logits
    assert logits.shape == (2, 2) and torch.isfinite(logits).all()


def test_a_missing_head_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detector_model, "_STARTER", tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        assemble_detector(tmp_path / "target")
