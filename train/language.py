"""Teach the text decoder of a captioner to write captions before it is shown a photo.

In: a prepared version of ``flickr30k``, and a list of captions whose photos need not be at hand. Out: a checkpoint
folder that writes captions of no photo: what ``train.captioner --model FOLDER`` starts from.

    python -m train.language --data ~/data/flickr30k --texts captions.txt.gz --output ~/models/writer

Captions cost less to have than photos and less to learn: a decoder that knows which words go together needs its
captioned photos for what they show alone. Cross-attention is left out, as BLIP does for text without a picture, and
stays as it was made. Captions of the version's own photos in the list, by the number Flickr gave them, are left away:
whatever validation and test ask for was read by nobody.

What is kept is the checkpoint that is least surprised by the captions of the validation photos.
"""

from __future__ import annotations

import gzip
import io
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import ConfigDict, Field
from torch import nn
from torch.nn import functional

from data.captions import clean_caption, photo_number
from data.errors import DataError
from data.layouts import parse_captions
from data.locations import Location
from data.versions import DataVersion
from deployments.captioner import GENERATION
from deployments.checkpoints import Checkpoint, resolve
from deployments.pixels import Normalisation
from deployments.views import ViewSpec
from train.captioner import check_captions, new_checkpoint, trainable, write_captioner
from train.captioning import load_captioner
from train.command import launch, run_command
from train.module import TrainedModule, TrainingError
from train.run_folder import absolute
from train.stream import Batch
from train.tracking import RunReference
from train.words import IGNORED, Vocabulary, WordsModule, WordsTraining

#: A list of captions unpacked: a small file may hold any number of zeros.
_MOST_BYTES = 1 << 30


class LanguageTraining(WordsTraining):
    """Teach a captioner's decoder to write."""

    model_config = ConfigDict(extra="forbid")

    texts: str = Field(
        description="captions without photos: CSV with the columns image,caption, or Flickr30k's results.csv, as it is "
        "or as .gz; a path or s3://, seen by all nodes"
    )
    model: str = Field("new", description="captioner whose decoder is taught, or `new`")
    name: str = Field("language", description="name of the run; the same name in the same storage goes on with it")
    learning_rate: float = Field(1e-3, gt=0, description="at its highest")
    epochs: int = Field(2, ge=1, description="passes over all captions")

    def files(self) -> dict[str, str]:
        return {"texts": self.texts}


# ---------------------------------------------------------------------------------------------------------- captions


def read_texts(place: str, version: DataVersion) -> list[list[str]]:
    """Cleaned captions of a list, those of a photo together, without those of the version's photos.

    Raises:
        DataError: no such file, no such columns, or nothing is left.
    """
    location = Location.of(place)
    if not location.is_file():
        raise DataError(f"{location} is not there: --texts is a CSV of image,caption, as it is or as .gz")
    content = location.read_bytes()
    if location.name.endswith(".gz"):
        content = _decompressed(content, str(location))
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{location} is no UTF-8 text: {error}") from error
    known = {
        photo_number(name)
        for split in version.manifest.counts
        for name in version.table(split, ["file_name"])["file_name"].to_pylist()
    }
    photos: dict[str, list[str]] = {}
    for image, caption in parse_captions(text, str(location)):
        if (number := photo_number(image)) not in known and (cleaned := clean_caption(caption)):
            photos.setdefault(number, []).append(cleaned)
    if not photos:
        raise DataError(f"{location} has no caption but those of the photos of {version.location}")
    return list(photos.values())


def _decompressed(content: bytes, name: str) -> bytes:
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(content)) as packed:
            text = packed.read(_MOST_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{name} is no sound gzip file: {error}") from error
    if len(text) > _MOST_BYTES:
        raise DataError(f"{name} is longer than {_MOST_BYTES >> 30} GiB: split it")
    return text


@dataclass(frozen=True)
class Rows:
    """A source whose rows are numbers alone: what belongs to them the module has."""

    count: int
    window: int = 1 << 20

    @property
    def groups(self) -> tuple[int, ...]:
        return (self.count,)

    def load(self, epoch: int, rows: np.ndarray) -> Iterator[Batch]:
        yield {"row": rows, "epoch": np.full(len(rows), epoch)}


class LanguageModule(WordsModule):
    """A captioner's decoder that is taught to write; a row is all captions of a photo."""

    metric: ClassVar[str] = "val_selection"

    def __init__(self, *given: Any, val: list[list[str]]) -> None:
        super().__init__(*given, all_captions=True)
        self.val_tokens = self.encoded(val)

    def prepare(self, batch: Batch) -> dict[str, torch.Tensor]:
        return self.prepare_judged(batch) | self.packed(self.tokens, batch["row"].tolist())

    def loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.word_loss(self.next_words(self.model, batch), batch["targets"])

    def next_words(self, model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return model.text_decoder(
            input_ids=batch["tokens"], attention_mask=batch["mask"], position_ids=batch["positions"], use_cache=False
        ).logits

    def judge(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> list[tuple[float, int]]:
        """Of each row: how surprising its words are, in nats, and how many they are."""
        packed = self.packed(self.val_tokens, batch["row"].tolist())
        packed = {name: value.to(self.device) for name, value in packed.items()}
        logits, targets = self.next_words(model, packed), packed["targets"]
        surprise = functional.cross_entropy(
            logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none"
        ).view_as(targets)
        return list(zip(surprise.sum(1).tolist(), (targets != IGNORED).sum(1).tolist(), strict=True))

    def score(self, judged: dict[int, tuple[float, int]]) -> dict[str, float]:
        surprise, words = np.array(list(judged.values())).sum(0)
        loss = float(surprise / words)
        return {"val_loss": loss, "val_perplexity": math.exp(min(loss, 700)), "val_selection": -loss}


# ---------------------------------------------------------------------------------------------------------- the job


@dataclass(frozen=True)
class LanguageJob:
    """What the loop needs of a run."""

    config: LanguageTraining
    version: DataVersion
    checkpoint: str
    views: ViewSpec
    texts: int
    """Photos of the list, whose captions are read beside those of the training photos."""
    deadline: float = math.inf
    run: RunReference | None = None

    def train_source(self) -> Rows:
        return Rows(self.version.manifest.counts["train"] + self.texts)

    def val_source(self) -> Rows:
        return Rows(self.version.manifest.counts["val"])

    def in_process(self) -> bool:
        return True

    def module(self, total_steps: int) -> LanguageModule:
        from transformers import AutoTokenizer

        checkpoint, config = resolve(self.checkpoint), self.config
        model = load_captioner(checkpoint, config.dropout)
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder)  # nosec B615 # a folder on disk
        photos = self.version.table("train", ["captions"])["captions"].to_pylist()
        return LanguageModule(
            model,
            Normalisation.from_processor(checkpoint.folder),
            config,
            total_steps,
            Vocabulary.of(tokenizer, model, ""),
            [*photos, *read_texts(config.texts, self.version)],
            val=self.version.table("val", ["captions"])["captions"].to_pylist(),
        )

    def example(self, module: TrainedModule) -> dict[str, torch.Tensor]:
        return module.prepare(next(self.train_source().load(0, np.arange(1))))

    def export(
        self, module: TrainedModule, model: Any, judged: dict[int, Any], folder: Path, metrics: dict[str, float]
    ) -> dict[str, float]:
        """Write the checkpoint folder."""
        assert isinstance(module, LanguageModule)
        figures = {name: value for name, value in metrics.items() if name != "val_selection"}
        generation = GENERATION | resolve(self.checkpoint).card.generation
        write_captioner(model, module.vocabulary.tokenizer, self, generation, figures, folder)
        return figures

    def samples(self, module: TrainedModule) -> list[tuple[Any, str]]:
        return []  # it has seen no picture


def base_of(config: LanguageTraining, version: DataVersion) -> str:
    """The URI of the checkpoint that training starts from."""
    return new_checkpoint(config.new, config.seed, version) if config.model == "new" else config.model


def prepare_job(
    config: LanguageTraining, version: DataVersion, checkpoint: Checkpoint | None = None
) -> tuple[LanguageJob, int]:
    """The job, without its run, and how many parameters the model has.

    Raises:
        TrainingError, DataError, CheckpointError: model, texts or data set are not fit for it.
    """
    check_captions(version)
    if config.strategy != "ddp":
        raise TrainingError("the decoder is trained without the model around it: use --strategy ddp")
    if config.model == "new" and config.dropout is None:
        config = config.model_copy(update={"dropout": config.new.dropout})
    checkpoint = checkpoint or resolve(base_of(config, version))
    model, views = trainable(checkpoint)
    if not hasattr(model, "text_decoder"):
        raise TrainingError(f"{type(model).__name__} has no decoder of its own that could be taught without pictures")
    texts = read_texts(config.texts, version)
    job = LanguageJob(config, version, absolute(checkpoint.uri), views, len(texts))
    return job, sum(parameter.numel() for parameter in model.parameters())


def train(config: LanguageTraining) -> Any:
    """Train and publish.

    Raises:
        TrainingError, DataError, CheckpointError, TrackingError: see ``train.command``.
    """
    return launch(config, "captioner", base_of, prepare_job)


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    run_command(LanguageTraining, train, arguments)


if __name__ == "__main__":
    # workers import this module by its name: classes of `__main__` would be pickled whole, with all that they refer to
    from train.language import main as run_by_name

    run_by_name()
