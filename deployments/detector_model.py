"""The starter detector's model: a CLIP image tower cut off after the last useful block, and a head on several blocks of
several views.

In: normalised views ``(N, V, 3, S, S)`` (``deployments.views`` renders them). Out: logits ``(N, 2)``, index 0 human, 1
AI. What tells generated pictures apart across generators lies in the tower's middle blocks more than in its last one,
whose job is to forget how a picture was made; so the head sees pooled tokens of chosen blocks (after Koutlis &
Papadopoulos 2024, "RINE").

Registered with transformers, so that ``AutoConfig`` and ``AutoModelForImageClassification.from_pretrained(folder)``
load a checkpoint once this module is imported. ``assemble_detector`` writes the starter's checkpoint folder from the
packaged tower and the committed head.

Knows no files of pictures, no thresholds' meaning, no Ray and no HTTP.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    CLIPVisionConfig,
    CLIPVisionModel,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import ImageClassifierOutput

from deployments.towers import CLIP_MEAN, CLIP_STD, clip_config, clip_state
from deployments.views import ViewSpec

LABELS = ("human", "ai")
_STARTER = Path(__file__).parent / "starter_weights" / "detector"


class ClipBlocksConfig(PretrainedConfig):
    """Configuration of ``ClipBlocksForImageClassification``.

    Args:
        vision_config: the tower, as ``CLIPVisionConfig``; its layers end with the last block used.
        blocks: blocks whose output the head sees, counted from 1.
        pools: how the tokens of a block become a vector: ``cls`` (class token), ``mean`` and ``std`` over the patch
            tokens.
        views: number V of views of a picture.
        hidden_size: width of the head's hidden layer; 0 makes the head linear.
        dropout: on the head's input while training.
    """

    model_type = "clip-blocks"

    def __init__(
        self,
        vision_config: dict[str, Any] | None = None,
        blocks: list[int] | None = None,
        pools: list[str] | None = None,
        views: int = 1,
        hidden_size: int = 0,
        dropout: float = 0.0,
        **kwargs: Any,
    ) -> None:
        self.vision_config = vision_config if vision_config is not None else clip_config().to_dict()
        self.blocks = list(blocks) if blocks is not None else [self.vision_config["num_hidden_layers"]]
        self.pools = list(pools) if pools is not None else ["cls", "mean"]
        self.views = views
        self.hidden_size = hidden_size
        self.dropout = dropout
        kwargs.setdefault("id2label", dict(enumerate(LABELS)))
        kwargs.setdefault("label2id", {label: index for index, label in enumerate(LABELS)})
        super().__init__(**kwargs)

    @property
    def features(self) -> int:
        """Length F of the vector that the head sees."""
        return self.views * len(self.blocks) * len(self.pools) * int(self.vision_config["hidden_size"])


class BlocksHead(nn.Module):
    """Standardisation, then a linear layer or a small MLP: features ``(N, F)`` -> logits ``(N, 2)``.

    ``mean`` and ``scale`` belong to the weights: features of a residual stream differ in size by orders of magnitude.
    """

    mean: torch.Tensor
    scale: torch.Tensor

    def __init__(self, config: ClipBlocksConfig) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(config.features))
        self.register_buffer("scale", torch.ones(config.features))
        self.dropout = nn.Dropout(config.dropout)
        if config.hidden_size:
            self.hidden: nn.Module = nn.Sequential(nn.Linear(config.features, config.hidden_size), nn.GELU())
            self.out = nn.Linear(config.hidden_size, len(LABELS))
        else:
            self.hidden = nn.Identity()
            self.out = nn.Linear(config.features, len(LABELS))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.out(self.hidden(self.dropout((features - self.mean) * self.scale)))


def pool_tokens(tokens: torch.Tensor, pools: list[str]) -> torch.Tensor:
    """One block's tokens ``(N, 1 + P, D)``, class token first -> ``(N, len(pools), D)``.

    Raises:
        ValueError: an unknown pool.
    """
    parts = []
    for pool in pools:
        if pool == "cls":
            parts.append(tokens[:, 0])
        elif pool == "mean":
            parts.append(tokens[:, 1:].mean(1))
        elif pool == "std":
            parts.append(tokens[:, 1:].std(1))
        else:
            raise ValueError(f"unknown pool {pool!r}; there are cls, mean and std")
    return torch.stack(parts, 1)


class ClipBlocksForImageClassification(PreTrainedModel):
    """Human or AI, from pooled tokens of several blocks of a CLIP tower over several views."""

    config_class = ClipBlocksConfig
    config: ClipBlocksConfig
    base_model_prefix = "tower"
    main_input_name = "pixel_values"
    _supports_sdpa = True

    def __init__(self, config: ClipBlocksConfig) -> None:
        super().__init__(config)
        depth = int(config.vision_config["num_hidden_layers"])
        if not config.blocks or not all(1 <= block <= depth for block in config.blocks):
            raise ValueError(f"blocks {config.blocks} are not within 1 to {depth}")
        self.tower = CLIPVisionModel(CLIPVisionConfig(**config.vision_config))
        self.head = BlocksHead(config)
        self.post_init()

    def block_tokens(self, pixel_values: torch.Tensor) -> Iterator[torch.Tensor]:
        """Tokens ``(M, 1 + P, D)`` after each block of ``config.blocks``, from pictures ``(M, 3, S, S)``; later blocks
        are not run."""
        hidden = self.tower.pre_layrnorm(self.tower.embeddings(pixel_values))
        for number, layer in enumerate(self.tower.encoder.layers[: max(self.config.blocks)], start=1):
            hidden = layer(hidden, None)
            if number in self.config.blocks:
                yield hidden

    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> ImageClassifierOutput:
        """Logits ``(N, 2)`` of views ``(N, V, 3, S, S)``, or of pictures ``(N, 3, S, S)`` when the model has one view.

        With ``output_hidden_states``, ``hidden_states`` is one ``(N * V, 1 + P, D)`` tensor for each used block, part
        of the graph: its gradient (``retain_grad``) serves Grad-CAM. ``labels`` (N, 0 or 1) adds the cross-entropy as
        ``loss``.

        Raises:
            ValueError: the number of views is not the model's.
        """
        if pixel_values.ndim == 4:
            pixel_values = pixel_values[:, None]
        count, views = pixel_values.shape[:2]
        if views != self.config.views:
            raise ValueError(f"expected {self.config.views} views of each picture, got {views}")
        tokens = tuple(self.block_tokens(pixel_values.flatten(0, 1)))
        pooled = torch.stack([pool_tokens(block, self.config.pools) for block in tokens], 1)
        logits = self.head(pooled.reshape(count, -1))
        return ImageClassifierOutput(
            loss=None if labels is None else nn.functional.cross_entropy(logits, labels),
            logits=logits,
            hidden_states=tokens if output_hidden_states else None,
        )


AutoConfig.register(ClipBlocksConfig.model_type, ClipBlocksConfig, exist_ok=True)
AutoModelForImageClassification.register(ClipBlocksConfig, ClipBlocksForImageClassification, exist_ok=True)


def model_on_clip(config: ClipBlocksConfig, head: dict[str, torch.Tensor]) -> ClipBlocksForImageClassification:
    """A model in evaluation mode: the packaged CLIP tower under the given head.

    Raises:
        TowerError: the package with the tower is missing or damaged.
        RuntimeError: weights and configuration do not belong together.
    """
    model = ClipBlocksForImageClassification(config)
    tower = {
        name.removeprefix("vision_model."): value
        for name, value in clip_state().items()
        if name.startswith("vision_model.")
    }
    wanted = model.tower.state_dict()
    model.tower.load_state_dict({name: value for name, value in tower.items() if name in wanted})
    model.head.load_state_dict({name: value.float() for name, value in head.items()})
    return model.eval()


def write_checkpoint(
    model: ClipBlocksForImageClassification, spec: ViewSpec, card: dict[str, Any], target: Path
) -> None:
    """Write a checkpoint folder: configuration, weights (safetensors), ``preprocessor_config.json`` and ``card.json``.

    Two writes of the same model give the same bytes.
    """
    target.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(target, safe_serialization=True)
    processor = {
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(CLIP_MEAN),
        "image_std": list(CLIP_STD),
        "view_spec": spec.model_dump(mode="json"),
    }
    (target / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")
    (target / "card.json").write_text(json.dumps(card, indent=2) + "\n")


def assemble_detector(target: Path) -> None:
    """Write the starter detector's complete checkpoint folder from the packaged tower and the committed head.

    Raises:
        FileNotFoundError: a file of the committed head is missing.
        TowerError: the package with the tower is missing or damaged.
    """
    config = ClipBlocksConfig.from_dict(json.loads((_STARTER / "config.json").read_text()))
    card = json.loads((_STARTER / "card.json").read_text())
    model = model_on_clip(config, load_file(_STARTER / "head.safetensors"))
    write_checkpoint(model, ViewSpec.model_validate(card["preprocessing"]), card, target)
    for name in ("README.md", "drift.safetensors"):
        shutil.copy(_STARTER / name, target / name)
