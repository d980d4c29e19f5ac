"""Every architecture that the detector's trainer names, tiny: one step of training, what it freezes, how deep its
layers lie, and the checkpoint that comes out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForImageClassification,
    CLIPConfig,
    Dinov2Config,
    PreTrainedConfig,
    RegNetConfig,
    SwinConfig,
    ViTConfig,
)

from data.versions import open_version
from deployments.checkpoints import resolve
from tests.train.small_models import SIDE_PX, write_processor
from train.classifier import DetectorModule, load_classifier
from train.detector import DetectorTraining, prepare_job
from train.labels import LABELS
from train.module import block_depths, parameter_groups

WIDTH: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": SIDE_PX,
    "patch_size": 8,
}
TEXT = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 8}
SWIN: dict[str, Any] = {"embed_dim": 8, "depths": [1, 2], "num_heads": [1, 2], "window_size": 4, "patch_size": 4}
REGNET: dict[str, Any] = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 2], "groups_width": 8}
#: Configuration, class of a block, and blocks in all.
FAMILIES: dict[str, tuple[PreTrainedConfig, str, int]] = {
    "vit": (ViTConfig(**WIDTH), "ViTLayer", 2),
    "clip": (CLIPConfig(vision_config=WIDTH, text_config=TEXT), "CLIPEncoderLayer", 2),
    "dinov2": (Dinov2Config(**WIDTH), "Dinov2Layer", 2),
    "swin": (SwinConfig(image_size=SIDE_PX, **SWIN), "SwinLayer", 3),
    "regnet": (RegNetConfig(**REGNET), "RegNetYLayer", 3),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_is_as_deep_as_whole_blocks_lie_before_it(family: str) -> None:
    config, kind, count = FAMILIES[family]
    model = AutoModelForImageClassification.from_config(config)
    named = dict(model.named_parameters())
    depths = block_depths(named)
    blocks = [(name, part) for name, part in model.named_modules() if type(part).__name__ == kind]
    assert len(blocks) == count
    inside: set[str] = set()
    for depth, (place, part) in enumerate(blocks):
        own = {f"{place}.{name}" for name, _ in part.named_parameters()}
        assert {depths[name] for name in own} == {depth}
        inside |= own
    assert all("downsample" in name for name in set(depths) - inside)
    assert all(depths[name] == 0 for name in set(depths) - inside)  # of the first stage, which has one block
    settings = DetectorTraining(data="x", output="x", learning_rate=1.0, layer_decay=0.5)
    groups = parameter_groups(named.items(), settings)
    rate_of = {id(value): group["lr"] for group in groups for value in group["params"]}
    assert {name: rate_of[id(named[name])] for name in depths} == {
        name: 0.5 ** (count - depth) for name, depth in depths.items()
    }
    before = [value for name, value in named.items() if name not in depths and rate_of[id(value)] < 1]
    assert before and {rate_of[id(value)] for value in before} == {0.5 ** (count + 1)}
    after = [name for name, value in named.items() if rate_of[id(value)] == 1]
    assert after and all("classifier" in name or "norm" in name for name in after)
    assert not any("pre_layrnorm" in name for name in after)  # CLIP's, before the first block


@pytest.mark.parametrize("family", FAMILIES)
def test_one_step_and_the_checkpoint_that_comes_out(family: str, version: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    AutoModelForImageClassification.from_config(FAMILIES[family][0]).save_pretrained(tmp_path / "start")
    write_processor(tmp_path / "start")
    settings = {"data": str(version), "model": str(tmp_path / "start"), "output": "x", "warmup": 0.0}
    job, _ = prepare_job(
        DetectorTraining.model_validate(settings | {"learning_rate": 1e-2, "weight_decay": 0.0}), open_version(version)
    )
    module = job.module(10)
    assert isinstance(module, DetectorModule)
    start = {name: value.clone() for name, value in module.state_dict().items()}
    module.freeze_unreached(job.example(module))
    assert all(torch.equal(value, start[name]) for name, value in module.state_dict().items()), "weights or statistics"

    rows = torch.arange(16)
    pixels = torch.randint(0, 256, (16, *job.views.shape), dtype=torch.uint8)
    batch = module.prepare({"pixels": pixels.numpy(), "row": rows.numpy()})
    optimizer = module.configure_optimizers()["optimizer"]
    loss = module.loss(batch)
    loss.backward()
    assert torch.isfinite(loss)
    trained = dict(module.named_trained())
    assert trained and all(value.grad is not None for value in trained.values())
    optimizer.step()
    changed = {
        name for name, value in module.model.state_dict().items() if not torch.equal(value, start[f"model.{name}"])
    }
    frozen = {name for name, value in module.model.named_parameters() if not value.requires_grad}
    buffers = {name for name, _ in module.model.named_buffers()}
    assert changed and not changed & (frozen | buffers), "batch normalisation goes on with the checkpoint's statistics"
    assert changed >= {name for name, value in trained.items() if value.grad.abs().max() > 1e-6}

    model = module.plain()
    with torch.no_grad():
        judged = dict(zip(rows.tolist(), module.judge(model, batch), strict=True))
        module.results = module.score(judged)
        job.export(module, model, judged, tmp_path / "out", module.results)
        said = torch.tensor(module.judge(model, batch))  # with the bias that calibration has added
        again = load_classifier(resolve(str(tmp_path / "out")), LABELS["aivshuman"], new_head=False).eval()
        assert torch.allclose(torch.tensor(module.judge(again, batch)), said, atol=1e-5)
    assert said.std() > 0
    assert resolve(str(tmp_path / "out")).card.dataset["generators"] == ["board"]
