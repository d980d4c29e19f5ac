"""Train a BLIP captioner on a frozen image tower: Ray Train runs it, Lightning is the loop.

In: photos with captions (``train.captions``). Out: a checkpoint folder (``config.json``, ``model.safetensors``,
tokenizer and processor files, ``card.json``) that ``deployments.captioner`` serves as it serves
``Salesforce/blip-image-captioning-base``.

The tower never changes, so its features are computed once (``train.features``); an epoch then costs the text decoder
alone. All captions of a photo are packed into one sequence with a block-diagonal causal mask, so that cross-attention
projects the photo's 197 tokens once for its five captions and no padding is computed between them.

    python -m train.captioner --data DIR --output DIR [--epochs N ...]
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import subprocess
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch.nn import functional
from transformers import BertTokenizer, BlipConfig, BlipForConditionalGeneration, BlipTextConfig

from deployments.captioner import GENERATION
from deployments.towers import CLIP_MEAN, CLIP_STD, blip_vision_config, blip_vision_state, clip_state
from train.captions import CaptionedPhoto, Split, normalise, read_captions, score_captions, split_photos
from train.features import cached_features

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


class CaptionerConfig(BaseModel):
    """Settings of one training run."""

    model_config = ConfigDict(extra="forbid")

    data: Path = Field(description="folder with Images/ and captions.txt")
    output: Path = Field(description="where the checkpoint folder is written")
    cache: Path = Field(Path("~/.cache/deeptrust/features"), description="where features of the frozen tower are kept")
    storage: Path = Field(Path("~/.cache/deeptrust/runs"), description="where Ray Train keeps the run")
    name: str = Field("captioner", description="name of the run; the same name resumes it")
    epochs: int = Field(4, ge=1)
    photos_per_batch: int = Field(16, ge=1, description="photos in a step, each with all its captions")
    learning_rate: float = Field(6e-4, gt=0)
    weight_decay: float = Field(0.05, ge=0)
    warmup_steps: int = Field(200, ge=0)
    label_smoothing: float = Field(0.1, ge=0, lt=1)
    dropout: float = Field(0.15, ge=0, lt=1)
    keep_patches: float = Field(
        0.4, gt=0, le=1, description="share of image tokens a step sees: regularises, saves time"
    )
    length_penalty: float = Field(
        0.5, description="of the beams, written into the card; below 1 favours short captions, which score better"
    )
    hidden_size: int = Field(384, multiple_of=64)
    layers: int = Field(4, ge=1)
    min_word_count: int = Field(4, ge=1, description="rarer words of the training captions are unknown words")
    threads: int = Field(2, ge=1, description="CPU threads of the worker")
    test_photos: int = Field(1000, ge=1, description="photos held out for evaluation")
    validation_photos: int = Field(500, ge=1, description="photos held out and captioned after each epoch")
    seed: int = 20260101


def build_tokenizer(photos: list[CaptionedPhoto], min_count: int, folder: Path) -> BertTokenizer:
    """A BERT tokenizer whose vocabulary is the words of the training captions; ``[DEC]`` and ``[ENC]`` come last, as
    in BLIP.
    """
    counts = Counter(word for photo in photos for caption in photo.captions for word in normalise(caption).split())
    words = sorted(word for word, count in counts.items() if count >= min_count)
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join([*SPECIAL_TOKENS, *words, "[DEC]", "[ENC]"]) + "\n", encoding="utf-8")
    return load_tokenizer(folder)


def load_tokenizer(folder: Path) -> BertTokenizer:
    """The tokenizer of a ``vocab.txt``, with BLIP's two extra tokens registered."""
    return BertTokenizer(
        vocab=str(folder / "vocab.txt"),
        do_lower_case=True,
        bos_token="[DEC]",  # noqa: S106
        additional_special_tokens=["[ENC]"],
    )


def captioner_config(vocab_size: int, hidden_size: int, layers: int, dropout: float = 0.0) -> BlipConfig:
    """BLIP with CLIP ViT-B/16's tower (``deployments.towers``) and a small text decoder over an own vocabulary."""
    text = BlipTextConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // 64,
        max_position_embeddings=64,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        pad_token_id=0,
        bos_token_id=vocab_size - 2,
        eos_token_id=3,
        sep_token_id=3,
    )
    return BlipConfig(text_config=text.to_dict(), vision_config=blip_vision_config().to_dict())


class PackedCaptions(torch.utils.data.Dataset[dict[str, Any]]):
    """A photo's image tokens and all its captions as one token sequence."""

    def __init__(
        self,
        photos: list[CaptionedPhoto],
        rows: dict[str, int],
        features: np.ndarray,
        tokenizer: BertTokenizer,
        keep: float,
    ) -> None:
        self.photos, self.rows, self.features, self.keep = photos, rows, features, keep
        begin, end, unknown = tokenizer.bos_token_id, tokenizer.sep_token_id, tokenizer.unk_token_id
        self.sequences: list[tuple[list[int], list[int], list[int], list[int]]] = []
        for photo in photos:
            tokens: list[int] = []
            targets: list[int] = []
            positions: list[int] = []
            segments: list[int] = []
            for segment, caption in enumerate(photo.captions):
                words = tokenizer.convert_tokens_to_ids(normalise(caption).split())
                tokens += [begin, *words]
                # an unknown word is read but never taught: the model would learn to write [UNK]
                targets += [-100 if word == unknown else word for word in words] + [end]
                positions += range(len(words) + 1)
                segments += [segment] * (len(words) + 1)
            self.sequences.append((tokens, targets, positions, segments))

    def __len__(self) -> int:
        return len(self.photos)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = self.features[self.rows[self.photos[index].name]]
        if self.keep < 1:
            patches = random.sample(range(1, len(image)), int(self.keep * (len(image) - 1)))
            image = image[[0, *sorted(patches)]]
        tokens, targets, positions, segments = self.sequences[index]
        return {"image": image, "tokens": tokens, "targets": targets, "positions": positions, "segments": segments}


def collate(items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Pad packed captions to the longest; ``mask`` is additive, (n, 1, length, length), 0 within a caption's past."""
    length = max(len(item["tokens"]) for item in items)

    def pad(key: str, value: int) -> torch.Tensor:
        return torch.tensor([item[key] + [value] * (length - len(item[key])) for item in items])

    segments = pad("segments", -1)
    visible = (segments[:, :, None] == segments[:, None, :]) & torch.ones(length, length, dtype=torch.bool).tril()
    return {
        "image": torch.from_numpy(np.stack([item["image"] for item in items])).float(),
        "tokens": pad("tokens", 0),
        "targets": pad("targets", -100),
        "positions": pad("positions", 0),
        "mask": torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)[:, None],
    }


class CaptionerModule(pl.LightningModule):
    """The text decoder under training; validation captions photos with it as serving does."""

    def __init__(
        self,
        config: CaptionerConfig,
        vocab_size: int,
        total_steps: int,
        val_photos: list[CaptionedPhoto],
        val_features: np.ndarray,
        tokenizer: BertTokenizer,
    ) -> None:
        super().__init__()
        self.config, self.total_steps = config, total_steps
        self.val_photos, self.val_features, self.tokenizer = val_photos, val_features, tokenizer
        blip = captioner_config(vocab_size, config.hidden_size, config.layers, config.dropout)
        self.decoder = BlipForConditionalGeneration(blip).text_decoder

    def training_step(self, batch: dict[str, torch.Tensor], _: int) -> torch.Tensor:
        logits = self.decoder(
            input_ids=batch["tokens"],
            attention_mask=batch["mask"],
            position_ids=batch["positions"],
            encoder_hidden_states=batch["image"],
            use_cache=False,
        ).logits
        loss = functional.cross_entropy(
            logits.flatten(0, 1), batch["targets"].flatten(), label_smoothing=self.config.label_smoothing
        )
        self.log("train_loss", loss, prog_bar=True)
        if self.global_step % 50 == 0:
            print(f"step {self.global_step}/{self.total_steps} loss {loss.item():.3f}", flush=True)
        return loss

    def validation_step(self, *_: Any) -> None:
        """Captions are generated once an epoch, in ``on_validation_epoch_end``."""

    def on_validation_epoch_end(self) -> None:
        generated = caption_features(
            self.decoder, self.tokenizer, self.val_features, {"length_penalty": self.config.length_penalty}
        )
        names = [photo.name for photo in self.val_photos]
        scores = score_captions(
            dict(zip(names, generated, strict=True)), {photo.name: photo.captions for photo in self.val_photos}
        )
        self.log_dict({f"val_{name}": value for name, value in scores.items()})
        print(f"epoch {self.current_epoch}: {scores} e.g. {generated[:3]}", flush=True)

    def configure_optimizers(self) -> Any:
        decayed = [p for p in self.decoder.parameters() if p.requires_grad and p.ndim > 1]
        plain = [p for p in self.decoder.parameters() if p.requires_grad and p.ndim <= 1]
        optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": self.config.weight_decay}, {"params": plain, "weight_decay": 0.0}],
            lr=self.config.learning_rate,
            betas=(0.9, 0.98),
        )
        warmup, total = self.config.warmup_steps, self.total_steps

        def rate(step: int) -> float:
            if step < warmup:
                return (step + 1) / warmup
            return 0.02 + 0.98 * 0.5 * (1 + float(np.cos(np.pi * min(1.0, (step - warmup) / max(1, total - warmup)))))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@torch.inference_mode()
def caption_features(
    decoder: Any, tokenizer: BertTokenizer, features: np.ndarray, generation: dict[str, Any], batch_size: int = 50
) -> list[str]:
    """Captions of image tokens ``(n, tokens, width)`` as the served model writes them, the tower left out.

    ``generation`` changes settings of ``deployments.captioner.GENERATION``.
    """
    config, texts = decoder.config, []
    for first in range(0, len(features), batch_size):
        image = torch.from_numpy(np.asarray(features[first : first + batch_size])).float()
        ids = decoder.generate(
            input_ids=torch.full((len(image), 1), config.bos_token_id),
            encoder_hidden_states=image,
            encoder_attention_mask=torch.ones(image.shape[:-1], dtype=torch.long),
            eos_token_id=config.sep_token_id,
            pad_token_id=config.pad_token_id,
            **(GENERATION | generation),
        )
        texts += tokenizer.batch_decode(ids, skip_special_tokens=True)
    return [text.strip() for text in texts]


def tower_features(config: CaptionerConfig, names: list[str]) -> np.ndarray:
    """Image tokens of all photos, float16 (n, 197, 768), computed by the very tower that is served."""
    import io

    from PIL import Image
    from transformers import BlipVisionModel

    tower = BlipVisionModel(blip_vision_config()).eval()
    tower.load_state_dict(blip_vision_state(clip_state()))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))

    def encode(pictures: list[bytes]) -> np.ndarray:
        images = [
            Image.open(io.BytesIO(data)).convert("RGB").resize((224, 224), Image.Resampling.BICUBIC)
            for data in pictures
        ]
        pixels = torch.stack(
            [(torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 - mean) / std for image in images]
        )
        with torch.inference_mode():
            return tower(pixels).last_hidden_state.numpy()

    folder = config.cache.expanduser() / "blip-clip-vit-b16-224"
    return cached_features(folder, names, lambda name: (config.data / "Images" / name).read_bytes(), encode, (197, 768))


def train_worker(settings: dict[str, Any]) -> None:
    """What each Ray Train worker runs: features, loop, and the decoder written by rank 0."""
    import ray.train
    from ray.train.lightning import RayDDPStrategy, RayLightningEnvironment, RayTrainReportCallback, prepare_trainer

    config = CaptionerConfig.model_validate(settings)
    torch.set_num_threads(config.threads)
    pl.seed_everything(config.seed, workers=True)
    photos = read_captions(config.data)
    features = tower_features(config, [photo.name for photo in photos])
    rows = {photo.name: row for row, photo in enumerate(photos)}
    splits = split_photos(photos, config.test_photos, config.validation_photos)
    tokenizer = build_tokenizer(splits["train"], config.min_word_count, config.output)
    val = splits["val"]

    def loader(part: list[CaptionedPhoto], keep: float, shuffle: bool) -> torch.utils.data.DataLoader[Any]:
        data = PackedCaptions(part, rows, features, tokenizer, keep)
        return torch.utils.data.DataLoader(data, config.photos_per_batch, shuffle=shuffle, collate_fn=collate)

    train = loader(splits["train"], config.keep_patches, True)
    world = ray.train.get_context().get_world_size()
    module = CaptionerModule(
        config,
        len(tokenizer),
        config.epochs * len(train) // world,
        val,
        np.stack([features[rows[photo.name]] for photo in val]),
        tokenizer,
    )
    trainer = pl.Trainer(
        max_epochs=config.epochs,
        accelerator="cpu",
        devices="auto",
        strategy=RayDDPStrategy(find_unused_parameters=False),
        plugins=[RayLightningEnvironment()],
        callbacks=[RayTrainReportCallback()],
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        num_sanity_val_steps=0,
    )
    trainer = prepare_trainer(trainer)
    checkpoint = ray.train.get_checkpoint()
    with checkpoint.as_directory() if checkpoint else contextlib.nullcontext() as folder:
        resume = str(Path(folder) / RayTrainReportCallback.CHECKPOINT_NAME) if folder else None
        trainer.fit(module, train, loader(val[:1], 1.0, False), ckpt_path=resume, weights_only=True)
    if ray.train.get_context().get_world_rank() == 0:
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val_")}
        save_trained(module.decoder, config, splits, metrics)


def save_trained(
    decoder: Any, config: CaptionerConfig, splits: dict[Split, list[CaptionedPhoto]], metrics: dict[str, float]
) -> None:
    """Write the trained half of the captioner to ``config.output``: what ``deployments.captioner.assemble_captioner``
    reads.

    ``decoder.safetensors`` is float16 and leaves out the output weights, which are tied to the word embeddings.
    """
    from safetensors.torch import save_file

    tied = {"cls.predictions.decoder.weight", "cls.predictions.decoder.bias"}
    weights = {k: v.detach().half().contiguous() for k, v in decoder.state_dict().items() if k not in tied}
    folder = config.output
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "decoder.safetensors", metadata={"format": "pt"})
    (folder / "decoder.safetensors").chmod(0o644)
    text = decoder.config.to_diff_dict() | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (folder / "text_config.json").write_text(json.dumps(text, indent=1) + "\n")
    names = "\n".join(photo.name for part in ("train", "val", "test") for photo in splits[part])
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
        check=False,
    )
    card = {
        "task": "captioning",
        "architecture": "BlipForConditionalGeneration",
        "generation": GENERATION | {"length_penalty": config.length_penalty},
        "dataset": {
            "name": config.data.name,
            "version": hashlib.sha256(names.encode()).hexdigest()[:12],
            "photos": {part: len(photos) for part, photos in splits.items()},
        },
        "training": {key: value for key, value in config.model_dump(mode="json").items() if not isinstance(value, str)},
        "metrics": {name: round(value, 4) for name, value in metrics.items()},
        "code_commit": commit.stdout.strip() or None,
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "licence": "that of the training pictures applies to these weights",
    }
    (folder / "card.json").write_text(json.dumps(card, indent=1) + "\n")


def main(arguments: list[str] | None = None) -> None:
    """Command line: train, resuming a run of the same name."""
    import ray
    from pydantic_settings import CliApp
    from ray.train import CheckpointConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    config = CliApp.run(CaptionerConfig, cli_args=arguments)
    settings = config.model_dump()
    for key in ("data", "output", "cache", "storage"):
        settings[key] = settings[key].expanduser().absolute()
    ray.init(ignore_reinit_error=True, log_to_driver=True)
    trainer = TorchTrainer(
        train_worker,
        train_loop_config=settings,
        scaling_config=ScalingConfig(num_workers=1, resources_per_worker={"CPU": config.threads}),
        run_config=RunConfig(
            name=config.name,
            storage_path=str(settings["storage"]),
            checkpoint_config=CheckpointConfig(num_to_keep=1),
        ),
    )
    result = trainer.fit()
    print({name: value for name, value in (result.metrics or {}).items() if name.startswith("val_")})


if __name__ == "__main__":
    main()
