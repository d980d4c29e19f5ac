"""From captions to what a text decoder reads and is taught.

In: the checkpoint's own tokenizer and configuration, cleaned captions, the settings of a ``WordsTraining``. Out: token
ids, batches of them as padded tensors, and a ``WordsModule`` with the loss of words, whose forward a task fills in.
Knows no picture.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch.nn import functional

from deployments.pixels import Normalisation
from train.module import TrainedModule
from train.new_captioner import NewDecoder
from train.settings import TrainCommand

#: Targets that are not learnt.
IGNORED = -100


class WordsTraining(TrainCommand):
    """Settings of whatever trains a text decoder."""

    new: NewDecoder = Field(NewDecoder(), description="the decoder of `--model new`")
    max_words: int = Field(30, ge=4, description="longer captions are cut")
    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="share of each word's probability that is left to the others"
    )
    dropout: float | None = Field(
        None, ge=0, lt=1, description="every dropout of the model; unset: as `new` or its configuration says"
    )


@dataclass(frozen=True)
class Vocabulary:
    """What turns captions into tokens as the checkpoint's own tokenizer and configuration have it."""

    tokenizer: Any
    words: dict[str, int]
    begin: int
    end: int
    pad: int
    unknown: int | None
    prompt: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: Any, model: Any, prompt: str) -> Vocabulary:
        text = getattr(model.config, "text_config", model.config)
        begin = text.bos_token_id
        end = getattr(text, "sep_token_id", None) or text.eos_token_id  # BLIP ends with [SEP]
        words = tokenizer(prompt, add_special_tokens=False)["input_ids"] if prompt else []
        return cls(
            tokenizer, tokenizer.get_vocab(), begin, end, text.pad_token_id or 0, tokenizer.unk_token_id, tuple(words)
        )

    def encode(self, caption: str, max_words: int) -> list[int]:
        """Tokens of a caption without begin, prompt and end."""
        found: list[int] = []
        for word in caption.split()[:max_words]:
            # the tokenizer would tear words with an apostrophe apart, known ones too
            known = self.words.get(word)
            found += [known] if known is not None else self.tokenizer(word, add_special_tokens=False)["input_ids"]
        return found

    def sequence(self, words: list[int]) -> tuple[list[int], list[int]]:
        """What is read and what is to be said next: the prompt is given, and an unknown word is read but never taught,
        or the model would learn to write it."""
        tokens = [self.begin, *self.prompt, *words]
        said = [IGNORED] * len(self.prompt) + [IGNORED if word == self.unknown else word for word in words] + [self.end]
        return tokens, said


def pad(sequences: Sequence[Sequence[float]], value: float) -> torch.Tensor:
    """Sequences filled up to the longest."""
    longest = max(map(len, sequences))
    return torch.tensor([[*sequence, *[value] * (longest - len(sequence))] for sequence in sequences])


def pack(captions: list[list[tuple[list[int], list[int]]]], padding: int) -> dict[str, torch.Tensor]:
    """All captions of each photo (what is read, and what is to be said next) as one sequence: ``tokens``, ``targets``,
    ``positions`` ``(n, length)`` and the additive ``mask`` ``(n, 1, length, length)``, 0 within a caption's past."""
    tokens: list[list[int]] = []
    targets: list[list[int]] = []
    positions: list[list[int]] = []
    segments: list[list[int]] = []
    for read_and_said in captions:
        tokens.append([token for read, _ in read_and_said for token in read])
        targets.append([token for _, said in read_and_said for token in said])
        positions.append([place for read, _ in read_and_said for place in range(len(read))])
        segments.append([number for number, (read, _) in enumerate(read_and_said) for _ in read])
    owner = pad(segments, -1)
    length = owner.shape[1]
    visible = (owner[:, :, None] == owner[:, None, :]) & torch.ones(length, length, dtype=torch.bool).tril()
    return {
        "tokens": pad(tokens, padding),
        "targets": pad(targets, IGNORED),
        "positions": pad(positions, 0),
        "mask": torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)[:, None],
    }


def choose(captions: list[list[int]], seed: int, row: int, epoch: int) -> list[int]:
    """The caption of a photo that an epoch shows: each in turn, in an order of the photo's own."""
    order = np.random.default_rng([seed, row, epoch // len(captions)]).permutation(len(captions))
    return captions[order[epoch % len(captions)]]


class WordsModule(TrainedModule):
    """A text decoder under training.

    Args:
        captions: cleaned ones of every training row.
        all_captions: a row teaches all its captions, and not one that is drawn.
    """

    def __init__(
        self,
        model: Any,
        normalisation: Normalisation,
        config: WordsTraining,
        total_steps: int,
        vocabulary: Vocabulary,
        captions: Sequence[Sequence[str]],
        *,
        all_captions: bool,
    ) -> None:
        super().__init__(model, normalisation, config, total_steps)
        self.words, self.vocabulary, self.all_captions = config, vocabulary, all_captions
        self.tokens = self.encoded(captions)

    def encoded(self, captions: Sequence[Sequence[str]]) -> list[list[list[int]]]:
        """Tokens of every row's captions, without begin and end."""
        return [[self.vocabulary.encode(text, self.words.max_words) for text in texts] for texts in captions]

    def packed(self, tokens: list[list[list[int]]], rows: Iterable[int]) -> dict[str, torch.Tensor]:
        """All captions of each of these rows as one sequence."""
        said = [[self.vocabulary.sequence(words) for words in tokens[row]] for row in rows]
        return pack(said, self.vocabulary.pad)

    def word_loss(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy of the words of a step, all workers together, from ``(n, length, vocabulary)`` and
        ``(n, length)``."""
        total = functional.cross_entropy(
            logits.float().flatten(0, 1),
            targets.flatten(),
            ignore_index=IGNORED,
            reduction="sum",
            label_smoothing=self.words.label_smoothing,
        )
        if self.words.accumulate > 1:  # what the step's other parts teach is not known here
            return total / (self.words_a_row * len(targets))
        return total / self.mean_over_workers((targets != IGNORED).sum().float())

    @cached_property
    def words_a_row(self) -> float:
        """Tokens that a row of the training captions teaches, in the mean: all its captions, or the drawn one."""
        taught = [
            [sum(token != IGNORED for token in self.vocabulary.sequence(words)[1]) for words in captions]
            for captions in self.tokens
        ]
        return max(1.0, float(np.mean([sum(each) if self.all_captions else np.mean(each) for each in taught])))

    def mean_over_workers(self, value: torch.Tensor) -> torch.Tensor:
        """Workers have different numbers of words; what is averaged later must be divided by the same number."""
        if (
            torch.distributed.is_available()
            and torch.distributed.is_initialized()
            and torch.distributed.get_world_size() > 1
        ):
            value = value.clone()
            torch.distributed.all_reduce(value)
            value = value / torch.distributed.get_world_size()
        return value.clamp(min=1)
