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
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import ConfigDict, Field
from safetensors import SafetensorError
from torch import nn
from torch.nn import functional

from data.captions import score_captions
from data.locations import Location
from data.versions import DataVersion
from deployments.blip import look, quicken
from deployments.captioner import GENERATION, prompted
from deployments.checkpoints import Checkpoint, cache_root, resolve
from deployments.pixels import Normalisation, processor_settings
from deployments.views import ViewSpec
from train.augment import BlipAugment
from train.card import Origin, write_checkpoint
from train.cider import CiderReward
from train.command import launch, run_command
from train.features import Features, features_of_run
from train.module import TrainedModule, TrainingError
from train.new_captioner import NewDecoder, write_new_captioner
from train.run_folder import absolute
from train.stream import Augment, Batch, Deliver, Pictures, Source, pictures_of
from train.tracking import RunReference
from train.words import IGNORED, Vocabulary, WordsModule, WordsTraining, choose, pack, pad

PROMPT = "a picture of"


class CaptionerTraining(WordsTraining):
    """Fine-tune a captioner."""

    model_config = ConfigDict(extra="forbid")

    model: str = Field(
        "",
        description="checkpoint to start from, or `new`; unset: Salesforce/blip-image-captioning-base where this "
        "command itself sees a GPU for its workers, starter:captioner elsewhere; to a cluster elsewhere name it",
    )
    name: str = Field("captioner", description="name of the run; the same name in the same storage goes on with it")
    learning_rate: float = Field(1e-5, gt=0, description="at its highest")
    objective: Literal["likelihood", "cider"] = Field(
        "likelihood",
        description="likelihood of the human captions, or the CIDEr of sampled ones (for a trained captioner)",
    )
    freeze: Literal["none", "tower"] = Field(
        "none", description="tower: train the decoder alone, on tokens computed once"
    )
    cache: str = Field(
        "~/.cache/deeptrust/features", description="where tokens of a frozen tower are kept; seen by all nodes"
    )
    features: Literal["32", "bf16"] = Field("32", description="precision in which a frozen tower computes")
    keep_patches: float = Field(
        1.0, gt=0, le=1, description="share of a frozen tower's patch tokens that a step sees: regularises, saves time"
    )
    augment: bool = Field(True, description="random crop, flip and RandAugment; under a frozen tower see --variants")
    variants: int = Field(
        1,
        ge=1,
        le=100,
        description="versions of each photo under a frozen tower, one an epoch in turn: the photo itself, then "
        "augmented ones; each takes as long to compute and as much space",
    )
    prompt: str | None = Field(
        None, description="words that every caption begins with; unset: the checkpoint's, or BLIP's `a picture of`"
    )
    temperature: float = Field(
        0.5, gt=0, le=2, description="of the captions that --objective cider draws: at 1 most have a stray word"
    )
    samples_per_photo: int = Field(5, ge=2, description="captions that --objective cider draws for each photo")
    distinct: float = Field(
        0.5,
        ge=0,
        le=2,
        description="how much of a drawn caption's CIDEr against the five photos that are most alike is taken off",
    )
    training_photos: int = Field(0, ge=0, description="training photos at most, the first by id; 0: all")
    validation_photos: int = Field(
        500, ge=0, description="validation photos that are captioned, the first by id; 0: all"
    )
    length_penalty: float | None = Field(
        None, description="of the beams, written into the card; below 1 favours short captions; unset: the checkpoint's"
    )

    def start_from(self) -> str:
        gpu = self.gpus_per_worker != 0 and torch.cuda.is_available()
        return self.model or ("Salesforce/blip-image-captioning-base" if gpu else "starter:captioner")


def load_captioner(checkpoint: Checkpoint, dropout: float | None = None) -> Any:
    """The model in float32."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    config = AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=False)  # nosec B615 # a folder on disk
    if dropout is not None:
        for part in (config, getattr(config, "text_config", None), getattr(config, "vision_config", None)):
            for name in vars(part) if part is not None else ():
                if name.endswith(("dropout", "dropout_prob")):
                    setattr(part, name, dropout)
    return AutoModelForImageTextToText.from_pretrained(  # nosec B615 # a folder on disk
        checkpoint.folder, config=config, use_safetensors=True, trust_remote_code=False, dtype=torch.float32
    )


class CaptionerModule(WordsModule):
    """A captioner under training."""

    metric: ClassVar[str] = "val_selection"

    def __init__(
        self,
        model: Any,
        normalisation: Normalisation,
        total_steps: int,
        vocabulary: Vocabulary,
        train: list[list[str]],
        val: list[list[str]],
        generation: dict[str, Any],
        settings: CaptionerTraining,
    ) -> None:
        super().__init__(
            model, normalisation, settings, total_steps, vocabulary, train, all_captions=settings.freeze == "tower"
        )
        self.generation, self.settings = generation, settings
        self.train_captions, self.val_captions = train, val
        self.reward = (
            CiderReward(train, with_ends=True, distinct=settings.distinct) if settings.objective == "cider" else None
        )

    # ------------------------------------------------------------------------------------------------- batches

    def prepare(self, batch: Batch) -> dict[str, torch.Tensor]:
        prepared = self.prepare_judged(batch)
        rows, epochs = batch["row"].tolist(), batch["epoch"].tolist()
        if "features" in batch:
            if self.settings.keep_patches < 1:
                prepared["features"] = some_patches(prepared["features"], self.settings.keep_patches)
            prepared["features"] = prepared["features"].float()
            if self.reward is None:
                prepared |= self.packed(self.tokens, rows)
        elif self.reward is None:
            drawn = [
                self.vocabulary.sequence(choose(self.tokens[row], self.settings.seed, row, epoch))
                for row, epoch in zip(rows, epochs, strict=True)
            ]
            prepared["tokens"] = pad([read for read, _ in drawn], self.vocabulary.pad)
            prepared["targets"] = pad([said for _, said in drawn], IGNORED)
            prepared["mask"] = pad([[1] * len(read) for read, _ in drawn], 0)
        return prepared

    # --------------------------------------------------------------------------------------------------- losses

    def loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        if self.reward is not None:
            return self.self_critical(batch)
        if "features" in batch:
            model: Any = self.model
            logits = model.text_decoder(
                input_ids=batch["tokens"],
                attention_mask=batch["mask"],
                position_ids=batch["positions"],
                encoder_hidden_states=batch["features"],
                use_cache=False,
            ).logits
        else:
            logits = self.model(
                pixel_values=self.pixels(batch["pixels"]), input_ids=batch["tokens"], attention_mask=batch["mask"]
            ).logits
        # some architectures (GIT) put the picture's tokens before the text's
        logits = logits[:, -batch["tokens"].shape[1] :]
        return self.word_loss(logits, batch["targets"])

    def self_critical(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Minus the advantage of sampled captions over the others of their photo, times their log-likelihood, both at
        ``temperature`` (Rennie et al. 2017, with the baseline of Luo 2020).
        """
        assert self.reward is not None
        model: Any = self.model
        image = batch["features"] if "features" in batch else model.vision_model(self.pixels(batch["pixels"]))[0]
        count, prompt = self.settings.samples_per_photo, self.settings.prompt or ""
        said = self.sample(model.text_decoder, image.detach())
        texts = self.vocabulary.tokenizer.batch_decode(said, skip_special_tokens=True)
        rewards = torch.tensor(
            [
                self.reward(row, text.strip().removeprefix(prompt).strip(), words[-1] == self.vocabulary.end)
                for row, text, words in zip(batch["row"].repeat_interleave(count).tolist(), texts, said, strict=True)
            ]
        ).view(-1, count)
        advantage = (rewards - (rewards.sum(1, keepdim=True) - rewards) / (count - 1)).flatten().tolist()
        # with gradients, all captions of a photo in a row, as in `loss`: the photo is looked at once
        begin = [self.vocabulary.begin, *self.vocabulary.prompt]
        spoken = [([*begin, *words[:-1]], [IGNORED] * (len(begin) - 1) + words) for words in said]
        photos = [slice(first, first + count) for first in range(0, len(said), count)]
        packed = pack([spoken[photo] for photo in photos], self.vocabulary.pad)
        worth = [
            [value for value, (read, _) in zip(advantage[photo], spoken[photo], strict=True) for _ in read]
            for photo in photos
        ]
        logits = model.text_decoder(
            input_ids=packed["tokens"].to(self.device),
            attention_mask=packed["mask"].to(self.device),
            position_ids=packed["positions"].to(self.device),
            encoder_hidden_states=image,
            use_cache=False,
        ).logits
        targets, weights = packed["targets"].to(self.device), pad(worth, 0.0).to(self.device)
        chances = -functional.cross_entropy(
            logits.float().flatten(0, 1) / self.settings.temperature,
            targets.flatten(),
            ignore_index=IGNORED,
            reduction="none",
        ).view_as(targets)
        return -(weights * chances).sum() / self.mean_over_workers((targets != IGNORED).sum().float())

    def sample(self, decoder: Any, image: torch.Tensor) -> list[list[int]]:
        """``samples_per_photo`` captions of each photo, drawn: token ids after the prompt, up to the end."""
        drawn = {"num_beams": 1, "do_sample": True, "top_k": 0, "temperature": self.settings.temperature}
        ids = self.generate(
            decoder, image, drawn | {"num_return_sequences": self.settings.samples_per_photo, "length_penalty": None}
        )
        end, rows = self.vocabulary.end, ids[:, 1 + len(self.vocabulary.prompt) :].tolist()
        return [row[: row.index(end) + 1] if end in row else row for row in rows]

    # ----------------------------------------------------------------------------------------------- validation

    def generate(self, decoder: Any, image: torch.Tensor, changes: dict[str, Any] | None = None) -> torch.Tensor:
        """Token ids that a BLIP decoder writes for image tokens, as the whole model does in serving."""
        given = torch.tensor([[self.vocabulary.begin, *self.vocabulary.prompt]], device=image.device)
        settings = {name: value for name, value in (self.generation | (changes or {})).items() if value is not None}
        with torch.no_grad():
            return decoder.generate(
                input_ids=given.expand(len(image), -1),
                attention_mask=torch.ones(len(image), given.shape[1], dtype=torch.long, device=image.device),
                encoder_hidden_states=image[:, :1],
                past_key_values=look(decoder, image),
                eos_token_id=self.vocabulary.end,
                pad_token_id=self.vocabulary.pad,
                **settings,
            )

    def judge(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> list[str]:
        captioner: Any = model
        prompt = self.settings.prompt or ""
        if "features" in batch:
            ids = self.generate(captioner.text_decoder, batch["features"].float())
        else:
            given = prompted(captioner, self.vocabulary.tokenizer, prompt, len(batch["row"]))
            ids = captioner.generate(pixel_values=self.pixels(batch["pixels"], model), **given, **self.generation)
        texts = self.vocabulary.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return [text.strip().removeprefix(prompt).strip() for text in texts]

    def score(self, judged: dict[int, str]) -> dict[str, float]:
        scores = score_captions(
            {str(row): text for row, text in judged.items()}, {str(row): self.val_captions[row] for row in judged}
        )
        return {f"val_{name}": value for name, value in scores.items()} | {
            "val_selection": scores["bleu4"] + scores["cider"]
        }


def some_patches(features: torch.Tensor, keep: float) -> torch.Tensor:
    """The class token and a random share of each photo's patch tokens."""
    count, length = features.shape[:2]
    chosen = torch.rand(count, length - 1).argsort(1)[:, : max(1, int(keep * (length - 1)))].sort(1).values + 1
    chosen = torch.cat([torch.zeros(count, 1, dtype=torch.long), chosen], 1)
    return features.gather(1, chosen[..., None].expand(-1, -1, features.shape[2]))


# ---------------------------------------------------------------------------------------------------------- the job


@dataclass(frozen=True)
class Variants:
    """A photo as it is, and after that, in each epoch, an augmented one."""

    augment: Augment

    def __call__(self, image: Any, id_: str, epoch: int) -> Any:
        return self.augment(image, id_, epoch) if epoch else image


@dataclass(frozen=True)
class TowerTokens:
    """What a BLIP decoder is given: all tokens of its image tower."""

    model: str
    bf16: bool = False

    def load(self) -> Callable[[np.ndarray], np.ndarray]:
        checkpoint = resolve(self.model)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        tower = load_captioner(checkpoint).vision_model.to(device).eval()
        normalise = Normalisation.from_processor(checkpoint.folder)

        def encode(views: np.ndarray) -> np.ndarray:
            with torch.inference_mode(), torch.autocast(device, torch.bfloat16, enabled=self.bf16):
                return tower(normalise(views[:, 0]).to(device)).last_hidden_state.float().cpu().numpy()

        return encode


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
