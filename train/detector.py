"""Fine-tune a detector, or any two-way classifier of pictures, on a prepared data set.

In: a prepared version with labels (``aivshuman``: human, ai; ``source``: stock, platform) and a checkpoint that
``AutoModelForImageClassification`` loads (ViT, CLIP, Swin, DINOv2, RegNet, the starter's own class). Out: a checkpoint
folder with temperature and thresholds fitted on validation data in its card.

    python -m train.detector --data ~/data/aivshuman --output ~/models/detector [--model google/vit-base-patch16-224
    ...]

Pictures are damaged as delivery damages them, both classes alike (``train.damage``), and normalised by the model's own
processor. ``--freeze tower`` computes the tower's features once and trains the head alone.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import ConfigDict, Field
from safetensors import SafetensorError
from torch import nn

from data.locations import Location
from data.versions import DataVersion
from deployments.checkpoints import Checkpoint, resolve
from deployments.pixels import Normalisation
from deployments.views import ViewSpec
from train.aivshuman import family
from train.calibration import calibrate, choose_thresholds, sigmoid
from train.card import write_checkpoint
from train.classifier import DetectorModule, HeadInputs, head_of, load_classifier, output_layer
from train.command import launch, run_command
from train.damage import Damage, Tier
from train.features import Features, features_of_run
from train.labels import LABELS, Annotations, InTiers, few_of_each, read_annotations
from train.module import TrainedModule, TrainingError
from train.run_folder import absolute
from train.settings import TrainCommand
from train.stream import Deliver, Pictures, RandomDamage, Source, pictures_of
from train.tracking import RunReference


class DetectorTraining(TrainCommand):
    """Fine-tune a detector."""

    model_config = ConfigDict(extra="forbid")

    model: str = Field(
        "",
        description="checkpoint to start from: folder, s3://, models:/, starter:detector, hub id; unset: "
        "google/vit-base-patch16-224 where this command itself sees a GPU for its workers, starter:detector elsewhere; "
        "to a cluster elsewhere name it",
    )
    name: str = Field("detector", description="name of the run; the same name in the same storage goes on with it")
    head: Literal["auto", "keep", "new"] = Field(
        "auto",
        description="keep: train the checkpoint's head on; new: start with another; auto: keep it if its labels fit",
    )
    freeze: Literal["none", "tower"] = Field(
        "none", description="tower: train the head alone, on features computed once"
    )
    cache: str = Field(
        "~/.cache/deeptrust/features", description="where features of a frozen tower are kept; seen by all nodes"
    )
    variants: int = Field(1, ge=1, description="damaged versions of each picture that a frozen tower sees")
    augment: bool = Field(True, description="damage training pictures at random; off: they are as they were uploaded")
    damage: Damage = Field(Damage(), description="how training pictures are damaged")
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    dropout: float | None = Field(
        None, ge=0, lt=1, description="every dropout of the model; unset: as its configuration says"
    )
    penalty: float = Field(0.0, ge=0, description="times the sum of the head's squared weights, added to the loss")
    balance: float = Field(
        0.5,
        ge=0,
        le=1,
        description="weight of a source or generator of n pictures is n to this power; 1: as the data are",
    )
    without: list[str] = Field(
        [],
        description="generators (each with its relatives) and sources whose pictures are left out of training and "
        "calibration: to ask how it does on what it never saw",
    )
    calibration_tiers: list[Tier] = Field(
        ["clean", "512_q40"], description="tiers of delivery in which validation pictures are judged"
    )
    calibration_most: int = Field(
        20, ge=1, description="validation pictures of one generator at most that fit thresholds"
    )
    real_error: float = Field(
        0.02, gt=0, lt=0.5, description="share of the first label that `ai_above` may call the second"
    )
    ai_error: float = Field(
        0.10, gt=0, lt=0.5, description="share of the second label that `human_below` may call the first"
    )

    def start_from(self) -> str:
        gpu = self.gpus_per_worker != 0 and torch.cuda.is_available()
        return self.model or ("google/vit-base-patch16-224" if gpu else "starter:detector")


def wants_new_head(config: DetectorTraining, checkpoint: Checkpoint, labels: tuple[str, str]) -> bool:
    """Whether the checkpoint's head is replaced.

    Raises:
        TrainingError: its labels are others, and nothing was said about it.
    """
    known = [label.lower() for label in checkpoint.card.labels]
    if not known:
        settings = json.loads((checkpoint.folder / "config.json").read_text())
        known = [str(name).lower() for _, name in sorted((settings.get("id2label") or {}).items())]
    fits = tuple(known) == labels
    if config.head == "keep" and not fits:
        raise TrainingError(
            f"{checkpoint.uri} tells {', '.join(known[:4]) or 'nothing'} apart and the data set's labels "
            f"are {' and '.join(labels)}: --head new replaces its head"
        )
    if config.head == "auto" and not fits and checkpoint.card.labels:
        raise TrainingError(
            f"the labels of {checkpoint.uri} are {', '.join(known)} and those of the data set "
            f"{', '.join(labels)}: give --head new to replace its head, or the data set that it was made for"
        )
    return config.head == "new" or not fits


@dataclass(frozen=True)
class DetectorJob:
    """What the loop needs of a detector's run."""

    config: DetectorTraining
    version: DataVersion
    checkpoint: str
    labels: tuple[str, str]
    new_head: bool
    views: ViewSpec
    deadline: float
    run: RunReference | None
    features: tuple[Features, Features] | None = None
    statistics: tuple[np.ndarray, np.ndarray] | None = field(default=None, repr=False)
    """Mean and scale of the frozen tower's training features, for a head that standardises them."""

    def annotations(self, split: Literal["train", "val"]) -> Annotations:
        return read_annotations(self.version, split, self.labels, self.config.balance, self.config.without)

    def train_source(self) -> Source:
        if self.features:
            return self.features[0]
        augment = RandomDamage(self.config.damage) if self.config.augment else Deliver()
        return Pictures.of(self.version, "train", self.views, augment)

    def val_source(self) -> Source:
        if self.features:
            return self.features[1]
        return InTiers(Pictures.of(self.version, "val", self.views), tuple(self.config.calibration_tiers))

    def in_process(self) -> bool:
        return self.features is not None

    def module(self, total_steps: int) -> DetectorModule:
        checkpoint = resolve(self.checkpoint)
        model = load_classifier(checkpoint, self.labels, self.new_head, self.config.dropout)
        if self.statistics is not None:
            head: Any = head_of(model)
            head.mean.copy_(torch.from_numpy(self.statistics[0]))
            head.scale.copy_(torch.from_numpy(self.statistics[1]))
            nn.init.zeros_(output_layer(model).weight)
        return DetectorModule(
            model,
            Normalisation.from_processor(checkpoint.folder),
            self.config,
            total_steps,
            self.annotations("train"),
            self.annotations("val"),
            self.config.label_smoothing,
            self.config.penalty,
        )

    def example(self, module: TrainedModule) -> dict[str, torch.Tensor]:
        source: Source = self.train_source() if self.features else replace(self._blank(), groups=(2,))
        rows = np.arange(2)
        batch = (
            next(iter(source.load(0, rows)))
            if self.features
            else {"pixels": np.zeros((2, *self.views.shape), dtype=np.uint8), "row": rows}
        )
        return module.prepare(batch)

    def _blank(self) -> Pictures:
        return Pictures(self.version.location, (), (), self.views)

    def export(
        self, module: TrainedModule, model: Any, judged: dict[int, Any], folder: Path, metrics: dict[str, float]
    ) -> dict[str, float]:
        """Fit temperature and thresholds on what was judged, and write the checkpoint folder."""
        assert isinstance(module, DetectorModule)
        config, checkpoint = self.config, resolve(self.checkpoint)
        rows, scores = scores_of(judged)
        labels, weights = module.val_rows.of(rows)
        chosen = np.isin(rows % len(module.val_rows.labels), few_of_each(module.val_rows, config.calibration_most))
        chosen &= weights > 0
        rows, scores, labels, weights = rows[chosen], scores[chosen], labels[chosen], weights[chosen]
        out = output_layer(model)
        temperature, bias = calibrate(scores, labels, weights / weights.mean())
        if out.bias is None:
            bias = 0.0
        else:
            with torch.no_grad():
                out.bias[1] += bias
        module.calibration = temperature, bias
        probabilities = sigmoid((scores + bias) / temperature)
        thresholds = choose_thresholds(probabilities, labels, config.real_error, config.ai_error)
        first, second = self.labels
        figures = {
            **metrics,
            f"val_{first}_called_{second}": float((probabilities[labels == 0] >= thresholds["ai_above"]).mean()),
            f"val_{second}_called_{second}": float((probabilities[labels == 1] >= thresholds["ai_above"]).mean()),
            f"val_{second}_called_{first}": float((probabilities[labels == 1] < thresholds["human_below"]).mean()),
        }
        told = {"labels": list(self.labels), "thresholds": thresholds, "temperature": temperature}
        dataset = {
            "generators": generators_seen(module.train_rows, checkpoint, self.new_head),
            "counts": {
                split: dict(sorted(rows.counts().items()))
                for split, rows in (("train", module.train_rows), ("val", module.val_rows))
            },
        }
        task = "detection" if self.version.manifest.name == "aivshuman" else "classification"
        write_checkpoint(folder, model, self, task, figures, told, dataset, new_head=self.new_head)
        return figures

    def samples(self, module: TrainedModule) -> list[tuple[Any, str]]:
        """The validation pictures that it is surest and most wrong about."""
        assert isinstance(module, DetectorModule)
        temperature, bias = module.calibration
        scores = {
            row: (values[1] - values[0] + bias) / temperature
            for row, values in module.judged.items()
            if row < len(module.val_rows.labels)
        }
        if not scores:
            return []
        ordered = sorted(scores, key=lambda row: scores[row] * (1 if module.val_rows.labels[row] == 0 else -1))
        chosen = ordered[:4] + ordered[-8:]
        shown = []
        for row, image in pictures_of(self.version, chosen).items():
            label = self.labels[module.val_rows.labels[row]]
            shown.append((image, f"{label}: {self.labels[1]} {sigmoid(np.array(scores[row])):.2f}"))
        return shown


def scores_of(judged: dict[int, list[float]]) -> tuple[np.ndarray, np.ndarray]:
    """Rows and log-odds of the second label."""
    logits = np.array(list(judged.values()), dtype=np.float64)
    return np.array(list(judged)), logits[:, 1] - logits[:, 0]


def generators_seen(rows: Annotations, checkpoint: Checkpoint, new_head: bool) -> list[str] | None:
    """Families of the generators that a detector's weights know: those of its training pictures, and those of the
    checkpoint that it started from; None: that is a detector whose card does not say.

    Under a new head the tower stays, and with it what it was taught; a starter model's tower was taught nothing.
    """
    from train.detector_report import trained_on  # which loads what serves

    own = set(rows.counts()) - {"photo", "unknown"}
    if new_head and checkpoint.uri.startswith("starter:"):
        return sorted(own)
    before = trained_on(checkpoint)
    if before is None and (checkpoint.card.task == "detection" or not new_head):
        return None
    return sorted(own | (before or set()))


def base_of(config: DetectorTraining, _: DataVersion) -> str:
    """The URI of the checkpoint that training starts from."""
    return config.start_from()


def prepare_job(
    config: DetectorTraining, version: DataVersion, checkpoint: Checkpoint | None = None
) -> tuple[DetectorJob, int]:
    """The job, without features and run, and how many parameters the model has.

    Args:
        checkpoint: that training starts from; None: what the settings name now.

    Raises:
        TrainingError, DataError, CheckpointError: model or data set are not fit for it.
    """
    manifest = version.manifest
    labels = LABELS.get(manifest.name)
    if labels is None:
        raise TrainingError(
            f"{version.location} is the data set {manifest.name}, which has no labels: use {' or '.join(LABELS)}"
        )
    for split in ("train", "val"):
        found = {label for label, count in manifest.class_balance.get(split, {}).items() if count}
        if found != set(labels):
            raise TrainingError(
                f"split {split} of {version.location} has the labels {sorted(found) or 'none'}, not "
                f"{' and '.join(labels)}: prepare it again with pictures of both"
            )
    names = {*manifest.sources, *manifest.generators, *map(family, manifest.generators)} - {"photo"}
    if unknown := sorted(set(config.without) - names):
        raise TrainingError(
            f"--without {', '.join(unknown)}: no such generator or source; there are {', '.join(sorted(names))}"
        )
    if config.without:
        sides: tuple[Literal["train", "val"], ...] = ("train", "val")
        for side in sides:
            read_annotations(version, side, labels, config.balance, config.without)
    checkpoint = checkpoint or resolve(base_of(config, version))
    new_head = wants_new_head(config, checkpoint, labels)
    if config.blend < 1 and new_head:
        raise TrainingError("--blend mixes with the head that training starts from, and this one is new: --head keep")
    try:
        model = load_classifier(checkpoint, labels, new_head)
        views = ViewSpec.from_processor(checkpoint.folder)
    except (ValueError, RuntimeError, OSError, SafetensorError) as error:
        raise TrainingError(f"{checkpoint.uri} cannot be trained as a classifier of pictures: {error}") from error
    if config.gradient_checkpointing and not model.supports_gradient_checkpointing:
        raise TrainingError(
            f"{type(model).__name__} has no gradient checkpointing: leave --gradient-checkpointing away"
        )
    if config.freeze == "tower":
        head_of(model)
        if config.strategy != "ddp" or config.ema:
            raise TrainingError("--freeze tower trains a small head: use --strategy ddp and no --ema")
        if config.precision == "bf16-true":
            raise TrainingError("--freeze tower trains a small head on float32 features: leave --precision away")
    job = DetectorJob(config, version, absolute(checkpoint.uri), labels, new_head, views, float("inf"), None)
    return job, sum(parameter.numel() for parameter in model.parameters())


def with_features(job: DetectorJob, give_way_s: float = 0.0) -> DetectorJob:
    """The job on features of the frozen tower, computed if they are not there, as ``compute_features`` does; Ray must
    be there."""
    config, checkpoint = job.config, resolve(job.checkpoint)
    key = [checkpoint.revision, job.version.manifest.version, job.views.model_dump(mode="json")]

    def place(split: str, *depends_on: Any) -> Location:
        digest = hashlib.sha256(json.dumps([key, [split, *depends_on]]).encode()).hexdigest()[:16]
        return Location.of(config.cache) / f"detector-{split}-{digest}"

    augment = RandomDamage(config.damage, config.variants) if config.augment else Deliver()
    train = (
        Pictures.of(job.version, "train", job.views, augment),
        place("train", config.damage.model_dump() if config.augment else None),
        config.variants if config.augment else 1,
    )
    val = (
        InTiers(Pictures.of(job.version, "val", job.views), tuple(config.calibration_tiers)),
        place("val", config.calibration_tiers),
        1,
    )
    encoder = HeadInputs(job.checkpoint, job.labels)
    found = features_of_run(config, encoder, train, val, job.deadline, give_way_s)
    return with_statistics(replace(job, features=found))


def with_statistics(job: DetectorJob) -> DetectorJob:
    """A job on features whose new head, if it standardises them, knows their mean and scale in training."""
    if not job.new_head or not hasattr(head_of(load_classifier(resolve(job.checkpoint), job.labels, True)), "scale"):
        return job
    assert job.features
    rows = np.flatnonzero(job.annotations("train").weights)
    values = np.concatenate([block["features"].astype(np.float32) for block in job.features[0].load(0, rows)])
    deviation = values.std(0)
    # the floor keeps features that hardly vary in training from shouting when they do
    return replace(job, statistics=(values.mean(0), (1 / (deviation + 0.05 * np.median(deviation))).astype(np.float32)))


def train(config: DetectorTraining, callbacks: tuple[Any, ...] = (), parent: str | None = None) -> Any:
    """Train and publish; ``callbacks`` and ``parent`` are a sweep's.

    Raises:
        TrainingError, DataError, CheckpointError, TrackingError: see ``train.command``.
    """
    features = with_features if config.freeze == "tower" else None
    return launch(config, "detector", base_of, prepare_job, features, callbacks, parent)


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    run_command(DetectorTraining, train, arguments)


if __name__ == "__main__":
    # workers import this module by its name: classes of `__main__` would be pickled whole, with all that they refer to
    from train.detector import main as run_by_name

    run_by_name()
