"""The towers read out of packages are the real ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import BlipVisionModel, CLIPVisionModelWithProjection

from deployments.towers import (
    CLIP_PACKAGE,
    TowerError,
    blip_vision_config,
    blip_vision_state,
    clip_config,
    clip_state,
    packaged_file,
)


@pytest.fixture(scope="module")
def clip() -> CLIPVisionModelWithProjection:
    model = CLIPVisionModelWithProjection(clip_config()).eval()
    model.load_state_dict(clip_state())
    return model


@pytest.fixture(scope="module")
def pictures() -> torch.Tensor:
    return torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))


@pytest.mark.skipif(
    "vnni" not in Path("/proc/cpuinfo").read_text(),
    reason="without VNNI, ONNX Runtime's 8-bit products overflow: the packaged network itself is wrong there",
)
@torch.inference_mode()
def test_clip_embeds_as_the_packaged_network_does(clip: CLIPVisionModelWithProjection, pictures: torch.Tensor) -> None:
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(str(packaged_file(CLIP_PACKAGE)))
    expected = torch.from_numpy(session.run(None, {"pixel_values": pictures.numpy()})[0])
    # the packaged network also rounds its activations to int8; on noise that costs about 0.02
    assert torch.cosine_similarity(clip(pictures).image_embeds, expected).min() > 0.96


@torch.inference_mode()
def test_blip_computes_clip_exactly(clip: CLIPVisionModelWithProjection, pictures: torch.Tensor) -> None:
    blip = BlipVisionModel(blip_vision_config()).eval()
    blip.load_state_dict(blip_vision_state(clip_state()))
    ours = blip(pictures).last_hidden_state
    theirs = clip.vision_model.post_layernorm(clip.vision_model(pictures).last_hidden_state)
    assert torch.cosine_similarity(ours, theirs, dim=-1).min() > 0.9999
    assert (ours - theirs).abs().mean() < 0.002


def test_an_altered_or_missing_package_is_named_with_its_remedy(tmp_path: Path) -> None:
    name, version, inner, _ = CLIP_PACKAGE
    with pytest.raises(TowerError, match=r"damaged.*pip install"):
        packaged_file((name, version, inner, "0" * 64))
    with pytest.raises(TowerError, match="not installed"):
        packaged_file(("no-such-package", "1", inner, ""))
