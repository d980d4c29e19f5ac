"""Fine-tune a captioner of BLIP's kind on a prepared data set.

In: a prepared version of ``flickr30k`` and a checkpoint that ``AutoModelForImageTextToText`` loads (BLIP, GIT, the
starter), or ``--model new``: CLIP's tower under a decoder of its own from nothing. Out: a checkpoint folder that
``deployments.captioner`` serves.

    python -m train.captioner --data ~/data/flickr30k --output ~/models/captioner [--model Salesforce/... ...]

A photo is augmented as in BLIP's fine-tuning; of its captions one is drawn in each epoch. ``--freeze tower`` computes
the tower's tokens once, of each photo and of ``--variants`` of it, and trains the decoder alone, on all captions of a
photo packed into one sequence with a block-diagonal causal mask, so that cross-attention projects the photo once.
``--objective cider`` goes on from a trained captioner and rewards sampled captions by their CIDEr (self-critical
training, Rennie et al. 2017, with the mean of the other samples as baseline, Luo 2020).

Validation generates as serving does; the checkpoint with the highest CIDEr + BLEU-4 is kept.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError

from data.locations import Location
from data.versions import DataVersion
from deployments.blip import quicken
from deployments.captioner import GENERATION
from deployments.checkpoints import Checkpoint, cache_root, resolve
from deployments.pixels import Normalisation, processor_settings
from deployments.views import ViewSpec
from train.augment import BlipAugment
from train.captioning import CaptionerModule, CaptionerTraining, TowerTokens, load_captioner
from train.card import Origin, write_checkpoint
from train.command import launch, run_command
from train.features import Features, features_of_run
from train.module import TrainedModule, TrainingError
from train.new_captioner import NewDecoder, write_new_captioner
from train.run_folder import absolute
from train.stream import Augment, Deliver, Pictures, Source, pictures_of
from train.tracking import RunReference
from train.words import Vocabulary

PROMPT = "a picture of"


@dataclass(frozen=True)
class Variants:
    """A photo as it is, and after that, in each epoch, an augmented one."""

    augment: Augment

    def __call__(self, image: Any, id_: str, epoch: int) -> Any:
        return self.augment(image, id_, epoch) if epoch else image


@dataclass(frozen=True)
class CaptionerJob:
    """What the loop needs of a captioner's run."""

    config: CaptionerTraining
    version: DataVersion
    checkpoint: str
    views: ViewSpec
    deadline: float
    run: RunReference | None
    features: tuple[Features, Features] | None = None

    def train_source(self) -> Source:
        if self.features:
            return self.features[0]
        return self.train_pictures(BlipAugment() if self.config.augment else Deliver())

    def train_pictures(self, augment: Augment) -> Pictures:
        pictures = Pictures.of(self.version, "train", self.views, augment)
        return pictures.first(self.config.training_photos) if self.config.training_photos else pictures

    def val_source(self) -> Source:
        return self.features[1] if self.features else self.val_pictures()

    def val_pictures(self) -> Pictures:
        pictures = Pictures.of(self.version, "val", self.views)
        return pictures.first(self.config.validation_photos) if self.config.validation_photos else pictures

    def in_process(self) -> bool:
        return self.features is not None

    def module(self, total_steps: int) -> CaptionerModule:
        from transformers import AutoTokenizer

        checkpoint = resolve(self.checkpoint)
        model = load_captioner(checkpoint, self.config.dropout)
        if self.features or self.config.objective == "cider":
            quicken(model)  # which `generate` of the module's needs
        prompt = prompt_of(self.config, checkpoint)
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder)  # nosec B615 # a folder on disk
        return CaptionerModule(
            model,
            Normalisation.from_processor(checkpoint.folder),
            total_steps,
            Vocabulary.of(tokenizer, model, prompt),
            self.version.table("train", ["captions"])["captions"].to_pylist(),
            self.version.table("val", ["captions"])["captions"].to_pylist(),
            generation_of(self.config, checkpoint),
            self.config.model_copy(update={"prompt": prompt}),
        )

    def example(self, module: TrainedModule) -> dict[str, torch.Tensor]:
        rows = np.arange(min(2, len(self.version.table("train", ["id"]))))
        if self.features:
            return module.prepare(next(iter(self.features[0].load(0, rows))))
        pixels = np.zeros((len(rows), *self.views.shape), dtype=np.uint8)
        return module.prepare({"pixels": pixels, "row": rows, "epoch": np.zeros(len(rows), dtype=np.int64)})

    def export(
        self, module: TrainedModule, model: Any, judged: dict[int, Any], folder: Path, metrics: dict[str, float]
    ) -> dict[str, float]:
        """Write the checkpoint folder."""
        assert isinstance(module, CaptionerModule)
        figures = {name: value for name, value in metrics.items() if name != "val_selection"}
        prompt = module.settings.prompt
        generation = module.generation | ({"prompt": prompt} if prompt else {})
        write_captioner(model, module.vocabulary.tokenizer, self, generation, figures, folder)
        return figures

    def samples(self, module: TrainedModule) -> list[tuple[Any, str]]:
        """The first validation photos and their captions."""
        chosen = sorted(module.judged)[:12]
        return (
            [(image, module.judged[row]) for row, image in pictures_of(self.version, chosen).items()] if chosen else []
        )


def write_captioner(
    model: Any, tokenizer: Any, origin: Origin, generation: dict[str, Any], figures: dict[str, float], folder: Path
) -> None:
    """Write a checkpoint folder with its card."""
    told, photos = {"generation": generation}, {"photos": origin.version.manifest.counts}
    write_checkpoint(folder, model, origin, "captioning", figures, told, photos, tokenizer)


def prompt_of(config: CaptionerTraining, checkpoint: Checkpoint) -> str:
    """The words that captions begin with: as told, as the card has it, or BLIP's for a checkpoint without a card."""
    if config.prompt is not None:
        return config.prompt
    return str(checkpoint.card.generation.get("prompt", "")) if checkpoint.card.task != "unknown" else PROMPT


def generation_of(config: CaptionerTraining, checkpoint: Checkpoint) -> dict[str, Any]:
    """How captions are decoded."""
    own = {name: value for name, value in checkpoint.card.generation.items() if name != "prompt"}
    told = {} if config.length_penalty is None else {"length_penalty": config.length_penalty}
    return GENERATION | own | told


def new_checkpoint(decoder: NewDecoder, seed: int, version: DataVersion) -> str:
    """The folder of the untrained captioner that ``--model new`` means, written if it is not there."""
    key = json.dumps([decoder.model_dump(), seed, version.manifest.version])
    target = cache_root() / "new" / hashlib.sha256(key.encode()).hexdigest()[:16]
    if not target.is_dir():
        captions = [text for texts in version.table("train", ["captions"])["captions"].to_pylist() for text in texts]
        write_new_captioner(captions, decoder, seed, target)
    return str(target)


def base_of(config: CaptionerTraining, version: DataVersion) -> str:
    """The URI of the checkpoint that training starts from."""
    uri = config.start_from()
    return new_checkpoint(config.new, config.seed, version) if uri == "new" else uri


def check_captions(version: DataVersion) -> None:
    """Refuse a version that no captioner can be trained on.

    Raises:
        TrainingError: it has no captions, or nothing to train or validate on.
    """
    manifest = version.manifest
    if manifest.name != "flickr30k":
        raise TrainingError(f"{version.location} is the data set {manifest.name}, which has no captions: use flickr30k")
    for split in ("train", "val"):
        if not manifest.counts.get(split):
            raise TrainingError(f"split {split} of {version.location} is empty: prepare it again with a share for it")


def trainable(checkpoint: Checkpoint) -> tuple[Any, ViewSpec]:
    """The model of a checkpoint and how it looks at a picture.

    Raises:
        TrainingError: it is no captioner.
    """
    try:
        return load_captioner(checkpoint), ViewSpec.from_processor(checkpoint.folder)
    except (ValueError, RuntimeError, OSError, SafetensorError) as error:
        raise TrainingError(f"{checkpoint.uri} cannot be trained as a captioner: {error}") from error


def prepare_job(
    config: CaptionerTraining, version: DataVersion, checkpoint: Checkpoint | None = None
) -> tuple[CaptionerJob, int]:
    """The job, without features and run, and how many parameters the model has.

    Args:
        checkpoint: that training starts from; None: what the settings name now.

    Raises:
        TrainingError, CheckpointError: model or data set are not fit for it.
    """
    check_captions(version)
    if config.start_from() == "new":
        if config.blend < 1:
            raise TrainingError("--blend mixes with the weights that training starts from, and --model new has none")
        checkpoint = checkpoint or resolve(base_of(config, version))
        if config.dropout is None:
            config = config.model_copy(update={"dropout": config.new.dropout})
        if config.prompt is None:
            config = config.model_copy(update={"prompt": ""})
    if config.objective == "cider" and config.precision == "bf16-true":
        raise TrainingError("--objective cider computes chances that bf16 cannot hold: use --precision bf16-mixed")
    checkpoint = checkpoint or resolve(base_of(config, version))
    model, views = trainable(checkpoint)
    apart = hasattr(model, "text_decoder") and hasattr(model, "vision_model")
    if (config.freeze == "tower" or config.objective == "cider") and not apart:
        raise TrainingError(
            f"{type(model).__name__} has no decoder of its own: use --freeze none and --objective likelihood"
        )
    if (config.freeze == "tower" or config.objective == "cider") and config.strategy != "ddp":
        raise TrainingError("--freeze tower and --objective cider go through the decoder alone: use --strategy ddp")
    if config.variants > 1 and not config.augment:
        raise TrainingError("--variants of a photo are augmented ones: leave --no-augment away")
    if config.freeze == "tower" and config.precision == "bf16-true":
        raise TrainingError("--freeze tower trains on float32 features: use --precision bf16-mixed")
    if config.gradient_checkpointing and not model.supports_gradient_checkpointing:
        raise TrainingError(
            f"{type(model).__name__} has no gradient checkpointing: leave --gradient-checkpointing away"
        )
    job = CaptionerJob(config, version, absolute(checkpoint.uri), views, float("inf"), None)
    return job, sum(parameter.numel() for parameter in model.parameters())


def tokens_key(job: CaptionerJob) -> str:
    """What the tower's tokens of a job's pictures depend on. Another decoder on the same tower has the same tokens."""
    checkpoint = resolve(job.checkpoint)
    digest = hashlib.sha256(json.dumps([job.version.manifest.version, job.views.model_dump(mode="json")]).encode())
    digest.update(job.config.features.encode())
    # mean and deviation of its pixels
    digest.update(json.dumps(processor_settings(checkpoint.folder), sort_keys=True).encode())
    tower = load_captioner(checkpoint).vision_model.state_dict()
    for name in sorted(tower):
        digest.update(name.encode() + tower[name].contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def with_features(job: CaptionerJob, give_way_s: float = 0.0) -> CaptionerJob:
    """The job on tokens of the frozen tower, computed if they are not there, as ``compute_features`` does; Ray must be
    there."""
    config, key = job.config, tokens_key(job)

    def placed(split: str, source: Source, variants: int) -> tuple[Source, Location, int]:
        return source, Location.of(config.cache) / f"captioner-{split}-{key}-{sum(source.groups)}", variants

    encoder = TowerTokens(job.checkpoint, config.features == "bf16")
    # the first variant is the photo itself: more of them are added to what is there
    train = placed("train", job.train_pictures(Variants(BlipAugment())), config.variants)
    val = placed("val", job.val_pictures(), 1)
    return replace(job, features=features_of_run(config, encoder, train, val, job.deadline, give_way_s))


def train(config: CaptionerTraining, callbacks: tuple[Any, ...] = (), parent: str | None = None) -> Any:
    """Train and publish; ``callbacks`` and ``parent`` are a sweep's.

    Raises:
        TrainingError, DataError, CheckpointError, TrackingError: see ``train.command``.
    """
    features = with_features if config.freeze == "tower" else None
    return launch(config, "captioner", base_of, prepare_job, features, callbacks, parent)


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    run_command(CaptionerTraining, train, arguments)


if __name__ == "__main__":
    # workers import this module by its name: classes of `__main__` would be pickled whole, with all that they refer to
    from train.captioner import main as run_by_name

    run_by_name()
