"""A captioner of BLIP's kind under training: its settings, its model, its two objectives, and its figures.

Knows no place where anything is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import ConfigDict, Field
from torch import nn
from torch.nn import functional
from transformers import LogitsProcessorList

from data.captions import score_captions
from deployments.blip import look
from deployments.captioner import Unsaid, prompted
from deployments.checkpoints import Checkpoint, resolve
from deployments.pixels import Normalisation
from train.cider import CiderReward
from train.stream import Batch
from train.words import IGNORED, Vocabulary, WordsModule, WordsTraining, choose, pack, pad


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
        self.unsaid = LogitsProcessorList([Unsaid(model, vocabulary.tokenizer)])
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
                logits_processor=self.unsaid,
                **settings,
            )

    def judge(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> list[str]:
        captioner: Any = model
        prompt = self.settings.prompt or ""
        if "features" in batch:
            ids = self.generate(captioner.text_decoder, batch["features"].float())
        else:
            given = prompted(captioner, self.vocabulary.tokenizer, prompt, len(batch["row"]))
            ids = captioner.generate(
                pixel_values=self.pixels(batch["pixels"], model),
                **given,
                logits_processor=self.unsaid,
                **self.generation,
            )
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
