"""The starter detector's head, trained on raw pictures without Ray: what leave-one-generator-out evaluation refits.

In: labelled pictures (``train.aivshuman``). Out: a folder with ``head.safetensors``, ``config.json`` and ``card.json``,
from which ``deployments.detector_model`` makes a checkpoint. Temperature and both thresholds come from the validation
split alone; the test split is read by ``train.leave_out`` and not here.

The tower never changes, so its features are computed once (``train.features``): for each training picture in several
randomly damaged versions (``train.damage``, both classes alike), for each validation picture in tiers of delivery.
An epoch then takes a second.

"""

from __future__ import annotations

import datetime
import hashlib
import json
import subprocess
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch.nn import functional

from deployments.detector_model import LABELS, BlocksHead, blocks_config, model_on_clip, pool_tokens
from deployments.towers import CLIP_MEAN, CLIP_STD
from deployments.views import ViewSpec, render
from train.aivshuman import LabelledPicture, counts, dataset_version, open_rgb, read_pictures
from train.calibration import balanced_weights, calibrate, choose_thresholds, sigmoid
from train.damage import Damage, Tier, deliver, random_damage
from train.features import cached_features

LICENCE = "research and education only: trained on pictures under such terms (see README.md beside the weights)"


class DetectorConfig(BaseModel):
    """Settings of one training run."""

    model_config = ConfigDict(extra="forbid")

    data: Path = Field(description="folder with train.csv and the pictures it names")
    output: Path = Field(description="where head, configuration and card are written")
    cache: Path = Field(Path("~/.cache/deeptrust/features"), description="where features of the frozen tower are kept")
    view: ViewSpec = Field(ViewSpec(size_px=224, views=("centre",)), description="what the model sees of a picture")
    blocks: list[int] = Field(
        [4, 5, 6, 7, 8], description="blocks of the tower whose tokens are pooled; later blocks are cut off"
    )
    pools: list[str] = Field(["cls"], description="how tokens are pooled: cls, mean, std")
    damage: Damage = Field(Damage(), description="random delivery of training pictures")
    variants: int = Field(1, ge=1, description="randomly damaged versions of each training picture")
    balance: float = Field(
        0.5,
        ge=0,
        le=1,
        description="weight of a source or generator of n pictures is n to this power; 1 leaves the data as they are",
    )
    hidden_size: int = Field(0, ge=0, description="width of the head's hidden layer; 0 is a linear head")
    dropout: float = Field(0.0, ge=0, lt=1, description="on the head's input")
    epochs: int = Field(60, ge=1)
    batch_size: int = Field(64, ge=1)
    learning_rate: float = Field(1e-3, gt=0)
    penalty: float = Field(0.02, ge=0, description="times the sum of the squared weights, added to the mean loss")
    calibration_tiers: list[Tier] = Field(
        ["clean", "512_q40"],
        description="tiers of delivery in which validation pictures set temperature and thresholds",
    )
    calibration_most: int = Field(
        20, ge=1, description="validation pictures of one generator at most; more would let the largest decide"
    )
    real_error: float = Field(
        0.02, gt=0, lt=0.5, description="share of real validation pictures that `ai_above` may call AI"
    )
    ai_error: float = Field(
        0.10, gt=0, lt=0.5, description="share of AI validation pictures that `human_below` may call human"
    )
    threads: int = Field(2, ge=1, description="CPU threads of the worker")
    seed: int = 20260101


def version_name(picture: LabelledPicture, version: int | Tier) -> str:
    """Name of a picture's damaged version in the feature cache: ``id:3`` or ``id:768_q60``."""
    return f"{picture.id}:{version}"


def tower_features(
    config: DetectorConfig, pictures: Sequence[LabelledPicture], versions: Sequence[int | Tier]
) -> np.ndarray:
    """Features of every version of every picture, float32 ``(pictures, versions, F)``, from the cache or the tower.

    A version is a number (a random damage) or a tier of delivery. The tower and the pooling are the served model's own.
    """
    model_config = blocks_config(config.blocks, config.pools, len(config.view.views))
    settings = [config.view.model_dump(mode="json"), config.damage.model_dump(), config.blocks, config.pools]
    names = [version_name(picture, version) for picture in pictures for version in versions]
    key = hashlib.sha256(json.dumps([settings, names]).encode()).hexdigest()[:16]
    by_id = {picture.id: picture for picture in pictures}
    numbers = {str(version): version for version in versions}
    model = model_on_clip(model_config, BlocksHead(model_config).state_dict())
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    shape = (len(config.view.views), config.view.size_px, config.view.size_px, 3)

    def read(name: str) -> bytes:
        id_, text = name.split(":")
        image, version = open_rgb(by_id[id_].path), numbers[text]
        damaged = (
            random_damage(image, config.damage, id_, version) if isinstance(version, int) else deliver(image, version)
        )
        return render(damaged, config.view).tobytes()

    def encode(rendered: list[bytes]) -> np.ndarray:
        views = np.stack([np.frombuffer(data, dtype=np.uint8).reshape(shape) for data in rendered])
        pixels = (torch.from_numpy(views).permute(0, 1, 4, 2, 3) / 255 - mean) / std
        with torch.inference_mode():
            pooled = torch.stack(
                [pool_tokens(tokens, config.pools) for tokens in model.block_tokens(pixels.flatten(0, 1))], 1
            )
        return pooled.reshape(len(rendered), -1).numpy()

    features = cached_features(
        config.cache.expanduser() / f"detector-{key}", names, read, encode, (model_config.features,), 4
    )
    return np.asarray(features, dtype=np.float32).reshape(len(pictures), len(versions), -1)


def calibration_pictures(pictures: Sequence[LabelledPicture], most: int) -> list[LabelledPicture]:
    """The validation split with at most ``most`` pictures of one generator, the first by id; real photos all stay."""
    seen: Counter[str] = Counter()
    chosen = []
    for picture in sorted(pictures, key=lambda picture: picture.id):
        if picture.split == "val":
            seen[picture.generator] += 1
            if picture.label == 0 or seen[picture.generator] <= most:
                chosen.append(picture)
    return chosen


def balance_weights(pictures: Sequence[LabelledPicture], power: float) -> np.ndarray:
    """``balanced_weights`` by class and stratum."""
    labels = np.array([picture.label for picture in pictures])
    return balanced_weights(labels, [picture.stratum for picture in pictures], power)


class HeadModule(pl.LightningModule):
    """The head under training, on features of a frozen tower."""

    def __init__(self, config: DetectorConfig, features: torch.Tensor, total_steps: int) -> None:
        super().__init__()
        self.config, self.total_steps = config, total_steps
        views = len(config.view.views)
        self.head = BlocksHead(blocks_config(config.blocks, config.pools, views, config.hidden_size, config.dropout))
        # the floor keeps features that hardly vary in training from shouting when they do
        deviation = features.std(0)
        self.head.mean.copy_(features.mean(0))
        self.head.scale.copy_(1 / (deviation + 0.05 * deviation.median()))
        if not config.hidden_size:
            torch.nn.init.zeros_(self.head.out.weight)
            torch.nn.init.zeros_(self.head.out.bias)

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor, torch.Tensor], _: int) -> torch.Tensor:
        features, labels, weights = batch
        loss = (functional.cross_entropy(self.head(features), labels, reduction="none") * weights).mean()
        # in the loss, not as AdamW's decay: the optimum is then that of a penalised regression, whatever the step size
        matrices = [parameter for parameter in self.head.parameters() if parameter.ndim > 1]
        loss = loss + self.config.penalty * torch.stack([matrix.square().sum() for matrix in matrices]).sum()
        self.log("train_loss", loss, on_step=False, on_epoch=True, sync_dist=True)
        return loss

    def on_train_epoch_end(self) -> None:
        if self.current_epoch % 10 == 9:
            loss = float(self.trainer.callback_metrics["train_loss"])
            print(f"epoch {self.current_epoch + 1}/{self.config.epochs} loss {loss:.4f}", flush=True)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.head.parameters(), lr=self.config.learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.total_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def fit_head(
    config: DetectorConfig, features: np.ndarray, labels: np.ndarray, weights: np.ndarray, **trainer: Any
) -> dict[str, torch.Tensor]:
    """Train a head from nothing; the same input gives the same weights.

    Args:
        features: float32 ``(n, F)``.
        labels: 0 or 1, ``(n,)``.
        weights: of each row in the loss, ``(n,)``, mean 1.
        trainer: more arguments of Lightning's ``Trainer``, e.g. Ray's strategy.
    """
    pl.seed_everything(config.seed, workers=True, verbose=False)
    tensors = (torch.from_numpy(features), torch.from_numpy(labels).long(), torch.from_numpy(weights).float())
    data = torch.utils.data.TensorDataset(*tensors)
    order = torch.utils.data.RandomSampler(data, generator=torch.Generator().manual_seed(config.seed))
    # a batch is one indexing of the tensors: picking rows one by one takes longer than the step itself
    batches = torch.utils.data.BatchSampler(order, config.batch_size, drop_last=False)
    loader = torch.utils.data.DataLoader(data, sampler=batches, batch_size=None)
    module = HeadModule(config, tensors[0], config.epochs * len(loader))
    settings: dict[str, Any] = {
        "max_epochs": config.epochs,
        "accelerator": "cpu",
        "use_distributed_sampler": False,  # one worker: a head on cached features is not worth two
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    pl.Trainer(**settings | trainer).fit(module, loader)
    return {name: value.detach().clone() for name, value in module.head.state_dict().items()}


@torch.inference_mode()
def head_scores(config: DetectorConfig, state: dict[str, torch.Tensor], features: np.ndarray) -> np.ndarray:
    """Log-odds of AI, float64, for features ``(..., F)``."""
    head = BlocksHead(blocks_config(config.blocks, config.pools, len(config.view.views), config.hidden_size)).eval()
    head.load_state_dict(state)
    logits = head(torch.from_numpy(features).float())
    return (logits[..., 1] - logits[..., 0]).double().numpy()


def train_head(config: DetectorConfig, **trainer: Any) -> dict[str, float]:
    """Features, head, calibration and the written folder; returns the figures of the validation split.

    ``trainer`` holds more arguments of Lightning's ``Trainer``, e.g. Ray's strategy.
    """
    torch.set_num_threads(config.threads)
    pictures, rejects = read_pictures(config.data)
    print(f"{len(pictures)} pictures, {len(rejects)} rows left out", flush=True)
    train = [picture for picture in pictures if picture.split == "train"]
    val = calibration_pictures(pictures, config.calibration_most)
    features = tower_features(config, train, range(config.variants))
    val_features = tower_features(config, val, config.calibration_tiers)
    state = fit_head(
        config,
        features.reshape(-1, features.shape[-1]),
        np.array([picture.label for picture in train]).repeat(config.variants),
        balance_weights(train, config.balance).repeat(config.variants),
        **trainer,
    )
    return finish(config, pictures, val, val_features, state)


def finish(
    config: DetectorConfig,
    pictures: list[LabelledPicture],
    val: list[LabelledPicture],
    val_features: np.ndarray,
    state: dict[str, torch.Tensor],
) -> dict[str, float]:
    """Calibrate on the validation split (tiers together), write the folder, and return the card's figures."""
    from safetensors.torch import save_file

    tiers = len(config.calibration_tiers)
    labels = np.array([picture.label for picture in val]).repeat(tiers)
    weights = balance_weights(val, config.balance).repeat(tiers)
    scores = head_scores(config, state, val_features).reshape(-1)
    temperature, bias = calibrate(scores, labels, weights)
    state["out.bias"][1] += bias
    probabilities = sigmoid((scores + bias) / temperature)
    thresholds = choose_thresholds(probabilities, labels, config.real_error, config.ai_error)
    metrics = {
        "val_real_called_ai": float((probabilities[labels == 0] >= thresholds["ai_above"]).mean()),
        "val_ai_called_ai": float((probabilities[labels == 1] >= thresholds["ai_above"]).mean()),
        "val_ai_called_human": float((probabilities[labels == 1] < thresholds["human_below"]).mean()),
    }
    model_config = blocks_config(config.blocks, config.pools, len(config.view.views), config.hidden_size)
    config.output.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: value.contiguous() for name, value in state.items()},
        config.output / "head.safetensors",
        metadata={"format": "pt"},
    )
    (config.output / "config.json").write_text(json.dumps(model_config.to_diff_dict(), indent=2) + "\n")
    card = {
        "task": "detection",
        "architecture": "ClipBlocksForImageClassification",
        "labels": list(LABELS),
        "thresholds": thresholds,
        "temperature": temperature,
        "preprocessing": config.view.model_dump(mode="json"),
        "dataset": {"name": config.data.name, "version": dataset_version(pictures), "counts": counts(pictures)},
        "training": config.model_dump(mode="json", exclude={"data", "output", "cache", "threads", "view"}),
        "metrics": metrics,
        "code_commit": code_commit(),
        "created_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "licence": LICENCE,
    }
    (config.output / "card.json").write_text(json.dumps(card, indent=2) + "\n")
    return metrics


def code_commit() -> str | None:
    """The commit that this code stands at, or None outside a repository with commits."""
    result = subprocess.run(
        ["git", "rev-parse", "HEAD"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return result.stdout.strip() if result.returncode == 0 else None
