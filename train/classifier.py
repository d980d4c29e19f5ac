"""A two-way classifier of pictures under training: its model, its head, its loss and its figures.

Knows no settings of a run and no place where anything is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from sklearn.metrics import f1_score, roc_auc_score
from torch import nn
from torch.nn import functional

from deployments.checkpoints import Checkpoint, resolve
from deployments.pixels import Normalisation
from train.labels import Annotations
from train.module import NonFinite, Optimisation, TrainedModule, TrainingError
from train.stream import Batch


def load_classifier(
    checkpoint: Checkpoint, labels: tuple[str, str], new_head: bool, dropout: float | None = None
) -> Any:
    """The model in float32 with a logit for each label; a new head is drawn at random."""
    from transformers import AutoConfig, AutoModelForImageClassification

    from deployments import detector_model  # registers the starter's class  # noqa: F401

    config = AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=False)  # nosec B615 # a folder on disk
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: index for index, label in enumerate(labels)}
    if dropout is not None:
        for name in vars(config):
            if name.endswith(("dropout", "dropout_prob", "drop_path_rate")):
                setattr(config, name, dropout)
    model = AutoModelForImageClassification.from_pretrained(  # nosec B615 # a folder on disk
        checkpoint.folder,
        config=config,
        use_safetensors=True,
        trust_remote_code=False,
        dtype=torch.float32,
        ignore_mismatched_sizes=new_head,
    )
    if new_head:
        out = output_layer(model)
        nn.init.trunc_normal_(out.weight, std=0.02)
        if out.bias is not None:
            nn.init.zeros_(out.bias)
    return model


def head_of(model: nn.Module) -> nn.Module:
    """What comes after the tower: ``head`` or ``classifier``.

    Raises:
        TrainingError: the model has neither.
    """
    for name in ("head", "classifier"):
        if isinstance(found := getattr(model, name, None), nn.Module):
            return found
    raise TrainingError(f"{type(model).__name__} has no part called head or classifier: use --freeze none")


def output_layer(model: nn.Module) -> nn.Linear:
    """The layer whose outputs are the logits."""
    layers = [part for part in head_of(model).modules() if isinstance(part, nn.Linear)]
    if not layers:
        raise TrainingError(f"the head of {type(model).__name__} ends with no linear layer")
    return layers[-1]


class DetectorModule(TrainedModule):
    """A classifier under training."""

    metric: ClassVar[str] = "val_auc"

    def __init__(
        self,
        model: Any,
        normalisation: Normalisation,
        config: Optimisation,
        total_steps: int,
        train: Annotations,
        val: Annotations,
        label_smoothing: float = 0.0,
        penalty: float = 0.0,
    ) -> None:
        super().__init__(model, normalisation, config, total_steps)
        self.train_rows, self.val_rows = train, val
        self.label_smoothing, self.penalty = label_smoothing, penalty
        self.calibration = 1.0, 0.0
        """Temperature and bias by which ``export`` makes scores probabilities."""

    def prepare(self, batch: Batch) -> dict[str, torch.Tensor]:
        rows = batch["row"]
        return self.prepare_judged(batch) | {
            "label": torch.from_numpy(self.train_rows.labels[rows]),
            "weight": torch.from_numpy(self.train_rows.weights[rows]).float(),
        }

    def logits(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Logits of a batch of pixels, or of features of the frozen tower."""
        if "features" in batch:
            return head_of(model)(batch["features"].float())
        return model(pixel_values=self.pixels(batch["pixels"], model)).logits

    def loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        each = functional.cross_entropy(
            self.logits(self.model, batch).float(),
            batch["label"],
            reduction="none",
            label_smoothing=self.label_smoothing,
        )
        loss = (each * batch["weight"]).mean()
        if self.penalty:
            matrices = [value for value in head_of(self.model).parameters() if value.ndim > 1]
            loss = loss + self.penalty * torch.stack([matrix.square().sum() for matrix in matrices]).sum()
        return loss

    def judge(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> list[list[float]]:
        return self.logits(model, batch).float().cpu().tolist()

    def score(self, judged: dict[int, list[float]]) -> dict[str, float]:
        rows = np.array(list(judged))
        logits = np.array(list(judged.values()), dtype=np.float64)
        if not np.isfinite(logits).all():
            raise NonFinite("the model answers no numbers any more: lower --learning-rate or raise --warmup")
        labels, weights = self.val_rows.of(rows)
        logits, labels, weights = logits[weights > 0], labels[weights > 0], weights[weights > 0]
        scores = logits[:, 1] - logits[:, 0]
        nll = np.logaddexp(0, np.where(labels == 1, -scores, scores))
        called = (scores > 0).astype(int)
        return {
            "val_loss": float(np.average(nll, weights=weights)),
            "val_accuracy": float((called == labels).mean()),
            "val_f1": float(f1_score(labels, called, zero_division=0)),
            "val_auc": float(roc_auc_score(labels, scores)),
        }


@dataclass(frozen=True)
class HeadInputs:
    """What a classifier's head is given: the features of its frozen tower."""

    model: str
    labels: tuple[str, str]
    bf16: bool = False

    def load(self) -> Callable[[np.ndarray], np.ndarray]:
        checkpoint = resolve(self.model)
        model = load_classifier(checkpoint, self.labels, new_head=True).eval()
        normalise = Normalisation.from_processor(checkpoint.folder)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model.to(device)
        caught: list[torch.Tensor] = []
        head_of(model).register_forward_pre_hook(lambda _, arguments: caught.append(arguments[0]))

        def encode(views: np.ndarray) -> np.ndarray:
            pixels = normalise(views).to(device)
            with torch.inference_mode(), torch.autocast(device, torch.bfloat16, enabled=self.bf16):
                model(pixel_values=pixels if pixels.shape[1] > 1 else pixels[:, 0])
            return caught.pop().float().cpu().numpy()

        return encode
