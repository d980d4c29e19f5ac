"""What both trainers have in common as Lightning modules: optimiser, schedule, averages, sharding, judging.

In: a transformers model and an ``Optimisation``. Out: a ``TrainedModule`` whose ``loss`` and ``judge`` a task fills
in. A validation picture is judged by whole weights (``plain``): the averaged ones if there is an average, gathered
ones under FSDP, blended with those that training started from if that is wanted, so that generation and calibration see
the model that is written in the end.

Knows no data set, no Ray and no file.
"""

from __future__ import annotations

import copy
import math
import re
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar, Self

import numpy as np
import pytorch_lightning as pl
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from deployments.pixels import Normalisation
from train.strategies import gather, is_sharded, shard

#: Where a parameter says how deep it lies: ``layer.3.``, or within a stage ``layers.2.blocks.0.`` (Swin) and
#: ``stages.2.layers.0.`` (RegNet, ResNet, ConvNeXt). Numbers further in count the parts of a block.
_DEPTH = re.compile(r"(?:^|\.)(?:layers?|blocks?|stages?|h)\.(\d+)\.(?:(?:blocks|layers)\.(\d+)\.)?")
#: What lies before the first block; CLIP's first norm is spelt like that.
_EMBEDDINGS = re.compile(r"embed|patch|cls_token|mask_token|pos_|pre_layrnorm|pre_layernorm")


class TrainingError(RuntimeError):
    """A run cannot start, or its result is of no use; the message says why and what to do."""


class NonFinite(TrainingError):
    """Losses or answers are no numbers any more."""


class Optimisation(BaseModel):
    """How weights are changed."""

    model_config = ConfigDict(extra="forbid")

    learning_rate: float = Field(2e-5, gt=0, description="at its highest, for the last layer")
    weight_decay: float = Field(0.05, ge=0, description="AdamW's, of matrices only")
    warmup: float = Field(
        0.1, ge=0, lt=1, description="share of the steps in which the rate rises; then it falls as a cosine"
    )
    final_rate: float = Field(0.02, ge=0, le=1, description="the rate at the end, as a share of the highest")
    layer_decay: float = Field(
        1.0, gt=0, le=1, description="rate of a layer as a share of the next one's; 1 is the same for all"
    )
    gradient_clip: float = Field(1.0, ge=0, description="longest gradient; 0 leaves it as it is")
    gradient_checkpointing: bool = Field(False, description="compute activations twice instead of keeping them")
    ema: float = Field(
        0.0, ge=0, lt=1, description="decay of the moving average of weights that is judged and kept; 0 is none"
    )
    blend: float = Field(
        1.0,
        gt=0,
        le=1,
        description="share of the trained weights in those that are judged and kept; the rest is what training started "
        "from, for a model that must not lose what it knew (WiSE-FT, Wortsman et al. 2022)",
    )


class TrainedModule(pl.LightningModule):
    """A model under training.

    Args:
        model: a transformers model in float32.
        normalisation: of the model's own processor.
        total_steps: optimiser steps of the whole run.
    """

    #: What the best checkpoint is chosen by; more is better.
    metric: ClassVar[str]

    def __init__(self, model: nn.Module, normalisation: Normalisation, config: Optimisation, total_steps: int) -> None:
        super().__init__()
        self.config, self.total_steps = config, total_steps
        self.model = model
        self.register_buffer("_mean", torch.tensor(normalisation.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("_std", torch.tensor(normalisation.std).view(3, 1, 1), persistent=False)
        self._scale = normalisation.scale
        self.results: dict[str, float] = {}
        self.judged: dict[int, Any] = {}
        # outside of the module's own children: neither trained nor saved
        self._shadow: nn.Module | None = None
        self._start: dict[str, torch.Tensor] = {}
        if config.blend < 1:
            self._start = {name: value.clone() for name, value in model.state_dict().items()}
            object.__setattr__(self, "_shadow", copy.deepcopy(model).requires_grad_(False))
        self._judge: nn.Module | None = None
        self._judging: dict[int, Any] = {}
        self._averaged = -1
        if config.gradient_checkpointing:
            enable: Any = model.gradient_checkpointing_enable
            enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    # ------------------------------------------------------------------------------------------------ for a task

    @abstractmethod
    def prepare(self, batch: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
        """A training batch of a stream as tensors, with what belongs to its rows."""

    def prepare_judged(self, batch: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
        """A validation batch of a stream as tensors."""
        # copied: arrays of Ray's object store must not be written to
        return {name: torch.from_numpy(np.array(values)) for name, values in batch.items()}

    @abstractmethod
    def loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The mean loss of a batch, through ``self.model``."""

    @abstractmethod
    def judge(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> list[Any]:
        """What the model says of each row, as JSON can hold it."""

    @abstractmethod
    def score(self, judged: dict[int, Any]) -> dict[str, float]:
        """Figures of a validation pass, ``metric`` among them."""

    # -------------------------------------------------------------------------------------------------- the model

    def train(self, mode: bool = True) -> Self:
        """As everywhere, but batch normalisation (RegNet, ResNet) goes on with the statistics that the checkpoint
        brought, and trains its scale and offset alone.

        A worker's share of a batch is a few pictures of two kinds: their statistics are noise, differ from worker to
        worker, and would be other ones than the exported model judges with. Held still they cost no communication, and
        weights mean the same on every worker, for any number of workers.
        """
        super().train(mode)
        for part in self.modules():
            if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.track_running_stats:
                part.eval()
        return self

    @property
    def trained(self) -> nn.Module:
        """The part that forward and backward go through: what a strategy shards."""
        return self.model

    def pixels(self, views: torch.Tensor, model: nn.Module | None = None) -> torch.Tensor:
        """Normalised ``(n, V, 3, S, S)``, or ``(n, 3, S, S)`` of a single view, from uint8 ``(n, V, S, S, 3)``, in the
        type of the model that reads them: the trained one, unless another is given. What is judged may be float32 where
        training is not."""
        scaled = (views.movedim(-1, -3).float() * self._scale - self._mean) / self._std
        scaled = scaled.to(next((self.model if model is None else model).parameters()).dtype)
        return scaled if scaled.shape[1] > 1 else scaled[:, 0]

    def freeze_unreached(self, batch: dict[str, torch.Tensor]) -> None:
        """Take parameters that the loss never reaches out of training: DDP would wait for their gradients for ever.
        Nothing else changes: whatever the batch shows, no buffer takes it in."""
        self.train()
        self.loss(batch).backward()
        for parameter in self.parameters():
            if parameter.grad is None:
                parameter.requires_grad_(False)
            parameter.grad = None
        if not any(parameter.requires_grad for parameter in self.parameters()):
            raise TrainingError("the loss reaches no parameter that may change: start from another checkpoint")
        if self.config.ema:
            self.average = torch.optim.swa_utils.AveragedModel(
                self.model,
                multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(self.config.ema),
                use_buffers=False,  # they are taken as they are: a mean of position numbers would be others
            ).requires_grad_(False)

    @property
    def _is_sharded(self) -> bool:
        return self._trainer is not None and is_sharded(self.trainer.strategy)

    def configure_model(self) -> None:
        if not self._is_sharded:
            return
        if self._shadow is None:
            object.__setattr__(self, "_shadow", copy.deepcopy(self.model).requires_grad_(False))
        shard(self.trained, self.device_mesh)

    def plain(self) -> nn.Module:
        """The model with whole weights that is judged and kept; under FSDP every worker must call."""
        if self._shadow is not None:
            trained = self.average.module if self.config.ema else self.model
            weights = gather(self.model) if self._is_sharded else trained.state_dict()
            self._shadow.load_state_dict(self._blended(weights))
            self._shadow.to(self.device)
        return self.unsharded()

    def _blended(self, weights: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Weights on the way from where training started to where it is."""
        if not self._start:
            return weights
        return {
            name: torch.lerp(self._start[name].to(value), value, self.config.blend)
            if value.is_floating_point()
            else value
            for name, value in weights.items()
        }

    def unsharded(self) -> nn.Module:
        """A module of whole weights to load the best ones into; no other worker needs to call."""
        if self._shadow is not None:
            return self._shadow.eval()
        return (self.average.module if self.config.ema else self.model).eval()

    # ------------------------------------------------------------------------------------------- Lightning's hooks

    def training_step(self, batch: dict[str, torch.Tensor], _: int) -> torch.Tensor:
        return self.loss(batch)

    def on_train_start(self) -> None:
        self._averaged = self.global_step  # a step that another process ended is in the average

    def on_train_batch_end(self, *_: Any) -> None:
        if self.config.ema and self.global_step != self._averaged:
            self.average.update_parameters(self.model)
            self._averaged = self.global_step

    def on_validation_epoch_start(self) -> None:
        object.__setattr__(self, "_judge", self.plain())
        self._judging = {}

    def validation_step(self, batch: dict[str, torch.Tensor], *_: Any) -> None:
        assert self._judge is not None
        self._judging.update(zip(batch["row"].tolist(), self.judge(self._judge, batch), strict=True))

    def on_validation_epoch_end(self) -> None:
        parts: list[Any] = [None]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            parts = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(parts, self._judging)
        else:
            parts = [self._judging]
        # padding of the last batches may judge a row twice; it counts once
        self.judged = dict(sorted({row: value for part in parts for row, value in part.items()}.items()))
        self.results = self.score(self.judged)

    def configure_optimizers(self) -> Any:
        groups = parameter_groups(self.named_trained(), self.config)
        optimizer = torch.optim.AdamW(groups, lr=self.config.learning_rate, betas=(0.9, 0.98))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def named_trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters that change, by name."""
        return ((name, value) for name, value in self.model.named_parameters() if value.requires_grad)

    def rate(self, step: int) -> float:
        """Learning rate at a step as a share of the highest: linear rise, then a cosine to ``final_rate``."""
        rise = int(self.config.warmup * self.total_steps)
        if step < rise:
            return (step + 1) / rise
        place = min(1.0, (step - rise) / max(1, self.total_steps - rise))
        return self.config.final_rate + (1 - self.config.final_rate) * 0.5 * (1 + math.cos(math.pi * place))


def block_depths(names: Iterable[str]) -> dict[str, int]:
    """How many whole blocks lie before that of each parameter, through the stages in their order. What belongs to a
    stage and to no block of it (Swin's merging of patches) goes with the block before it."""
    latest: dict[tuple[str, int], int] = {}
    places: dict[str, tuple[str, int, int]] = {}
    for name in names:
        if found := _DEPTH.search(name):
            tower, stage = name[: found.start()], int(found[1])
            if found[2]:
                latest[tower, stage] = int(found[2])
            places[name] = tower, stage, latest.get((tower, stage), 0)
    blocks: dict[str, list[tuple[int, int]]] = {}
    for tower, *block in sorted(set(places.values())):
        blocks.setdefault(tower, []).append((block[0], block[1]))
    return {name: blocks[tower].index((stage, block)) for name, (tower, stage, block) in places.items()}


def parameter_groups(named: Iterable[tuple[str, nn.Parameter]], config: Optimisation) -> list[dict[str, Any]]:
    """AdamW's groups: matrices decay, the rest does not; with ``layer_decay`` each depth has a rate of its own
    (Clark et al. 2020, BEiT)."""
    named = list(named)
    depths = block_depths([name for name, _ in named])
    top = max(depths.values(), default=-1) + 2
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, parameter in named:
        depth = depths[name] + 1 if name in depths else (0 if _EMBEDDINGS.search(name) else top)
        groups.setdefault((depth if config.layer_decay < 1 else top, parameter.ndim > 1), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": config.learning_rate * config.layer_decay ** (top - depth),
            "weight_decay": config.weight_decay if matrix else 0.0,
        }
        for (depth, matrix), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]
