"""The captioner: a checkpoint that ``AutoModelForImageTextToText`` loads (BLIP and its like), in batches, as a replica.

In: one uint8 view a picture. Out: one sentence a picture. The starter captioner is a BLIP too
(``deployments.captioner_model``). How a BLIP is made to write faster than by its own ``generate`` is
``deployments.blip``'s. Knows no HTTP.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoModelForImageTextToText,
    AutoTokenizer,
    BlipForConditionalGeneration,
    LogitsProcessor,
    LogitsProcessorList,
)

from deployments import blip
from deployments.checkpoints import Checkpoint
from deployments.health import known_picture
from deployments.people import is_between, is_origin, is_origin_of_people, of_people
from deployments.pixels import Normalisation, check_views
from deployments.replica import Replica
from deployments.views import ViewSpec

#: How captions are written unless the card says otherwise: the original system's settings.
GENERATION = {"num_beams": 3, "max_new_tokens": 20, "min_new_tokens": 4}


def prompted(network: Any, tokenizer: Any, prompt: str, count: int) -> dict[str, torch.Tensor]:
    """``input_ids`` and ``attention_mask`` ``(count, n)`` of the words that captions begin with, for ``generate``;
    empty when there are none.

    BLIP's own ``generate`` takes the tokenizer's end of text off; any other network would go on writing after it.
    """
    if not prompt:
        return {}
    given = tokenizer([prompt] * count, return_tensors="pt").to(network.device)
    kept = slice(None) if hasattr(network, "text_decoder") else slice(None, -1)
    return {name: given[name][:, kept] for name in ("input_ids", "attention_mask")}


class Unsaid(LogitsProcessor):
    """Keeps a decoder from saying of people what is not to be said of them (``deployments.people``).

    Goes by whole words of the vocabulary: what a tokenizer takes to pieces is left out where its first piece is such a
    word (``skin`` ``##ned``).
    """

    _masks: tuple[torch.Tensor, ...]

    def __init__(self, network: Any, tokenizer: Any) -> None:
        size = network.config.get_text_config().vocab_size
        never, before, between, people = (torch.zeros(size, dtype=torch.bool) for _ in range(4))
        for token, index in tokenizer.get_vocab().items():
            word = token.lstrip("\u2581\u0120").lower()  # what sentencepiece and byte-level BPE put for a space
            if index < size and word.isalpha():
                never[index] = is_origin(word)
                before[index] = is_origin_of_people(word)
                between[index] = is_between(word)
                people[index] = of_people(word)
        self._masks = never, before, between, people

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Scores ``(rows, vocabulary)`` of the next token after ``input_ids`` ``(rows, n)``."""
        if self._masks[0].device != scores.device:  # the network may have been moved since
            self._masks = tuple(mask.to(scores.device) for mask in self._masks)
        never, before, between, people = self._masks
        last, next_to_last = input_ids[:, -1], input_ids[:, -2:][:, 0]
        told = before[last] | (between[last] & before[next_to_last])
        unsaid = never | (told[:, None] & people)
        return scores.masked_fill(unsaid, -torch.inf)  # type: ignore[return-value]


class CaptionerModel:
    """A captioner loaded for inference."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.views = ViewSpec.from_processor(checkpoint.folder)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.in_parts = self.device == "cpu"
        self._normalise = Normalisation.from_processor(checkpoint.folder)
        self._tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder)  # nosec B615 # a folder on disk
        dtype = torch.bfloat16 if self.device == "cuda" else torch.float32
        # in float32, and converted afterwards: loading sets the default type of the whole process, in which another
        # revision may be computing
        self.network: Any = AutoModelForImageTextToText.from_pretrained(  # nosec B615 # a folder on disk
            checkpoint.folder, use_safetensors=True, trust_remote_code=False, dtype=torch.float32
        )
        self.network.to(self.device, dtype).eval()
        self._generate: Callable[..., torch.Tensor] = self.network.generate
        if isinstance(self.network, BlipForConditionalGeneration):
            blip.quicken(self.network)
            if self.device == "cpu":
                blip.pack(self.network)
            self._generate = partial(blip.generate, self.network)
        self.generation = GENERATION | checkpoint.card.generation
        self._prompt = str(self.generation.pop("prompt", ""))
        self.unsaid = LogitsProcessorList([Unsaid(self.network, self._tokenizer)])

    def pixels(self, views: np.ndarray) -> torch.Tensor:
        """What the network reads of uint8 views ``(n, 1, size, size, 3)``.

        Raises:
            ViewMismatch: another size than the checkpoint's.
        """
        check_views(views, (len(views), *self.views.shape))
        return self._normalise(views[:, 0]).to(self.device, self.network.dtype)

    def prompt(self, count: int) -> dict[str, torch.Tensor]:
        """What ``generate`` is given of the words that captions begin with, if they do."""
        return prompted(self.network, self._tokenizer, self._prompt, count)

    @torch.inference_mode()
    def write(self, views: np.ndarray, **settings: Any) -> torch.Tensor:
        """Token ids of captions of uint8 views ``(n, 1, size, size, 3)``, written as the card says, or as told.

        Raises:
            ViewMismatch: another size than the checkpoint's.
        """
        settings = {"logits_processor": self.unsaid} | self.generation | settings
        return self._generate(pixel_values=self.pixels(views), **self.prompt(len(views)), **settings)

    def caption(self, views: np.ndarray, **settings: Any) -> list[str]:
        """Captions of uint8 views ``(n, 1, size, size, 3)``, written as the card says, or as told.

        Raises:
            ViewMismatch: another size than the checkpoint's.
        """
        return self.text(self.write(views, **settings))

    def text(self, ids: torch.Tensor) -> list[str]:
        """Captions of token ids, without the words that all of them begin with."""
        texts = self._tokenizer.batch_decode(ids, skip_special_tokens=True)
        return [text.strip().removeprefix(self._prompt).strip()[:512] for text in texts]

    def knows(self, text: str) -> bool:
        """Whether every word of a text is in the vocabulary."""
        unknown = self._tokenizer.unk_token_id
        return unknown is None or unknown not in self._tokenizer(text, add_special_tokens=False)["input_ids"]

    @torch.inference_mode()
    def log_likelihood(self, views: np.ndarray, captions: list[str]) -> np.ndarray:
        """Log-probability of a given caption for each picture, in nats, float64 ``(n,)``: how well the model thinks a
        sentence fits, the words known to it taken as they are. Not the prompt, but the end of the sentence, counts.

        Raises:
            ViewMismatch: another size than the checkpoint's.
        """
        pixels = self.pixels(views)
        words = [self._tokenizer(text, add_special_tokens=False)["input_ids"] for text in (self._prompt, *captions)]
        config = getattr(self.network.config, "text_config", self.network.config)
        begin = config.bos_token_id
        end = getattr(config, "sep_token_id", None) or config.eos_token_id  # BLIP ends with [SEP]
        prompt, rows = words[0], [[begin, *words[0], *caption, end] for caption in words[1:]]
        longest = max(map(len, rows))
        tokens = torch.full((len(rows), longest), int(self._tokenizer.pad_token_id or 0))
        mask = torch.zeros_like(tokens)
        for index, row in enumerate(rows):
            tokens[index, : len(row)] = torch.tensor(row)
            mask[index, : len(row)] = 1
        tokens, mask = tokens.to(self.device), mask.to(self.device)
        logits = self.network(pixel_values=pixels, input_ids=tokens, attention_mask=mask).logits
        # some architectures (GIT) put the picture's tokens before the text's
        chances = logits[:, -longest:].float().log_softmax(-1)[:, len(prompt) : -1]
        said, counted = tokens[:, len(prompt) + 1 :], mask[:, len(prompt) + 1 :]
        return (chances.gather(-1, said[..., None])[..., 0] * counted).sum(-1).double().cpu().numpy()


class Captioner(Replica[CaptionerModel]):
    """A replica of the captioner."""

    stage = "captioner"

    def load(self, checkpoint: Checkpoint) -> CaptionerModel:
        return CaptionerModel(checkpoint)

    def answer(self, model: CaptionerModel, views: np.ndarray) -> list[dict[str, Any]]:
        return [{"text": text, "model": model.checkpoint.name} for text in model.caption(views)]

    def known_answer(self, model: CaptionerModel) -> dict[str, Any]:
        # with the beams of every picture, but drawn by chance it would be another each time
        (text,) = model.caption(known_picture(model.views.shape)[None], do_sample=False)
        return {"text": text}

    def difference(self, before: dict[str, Any], now: dict[str, Any]) -> str:
        # kernels that are chosen while a GPU warms up may turn one word for another that is about as likely
        was, is_now = set(before["text"].split()), set(now["text"].split())
        return "" if 2 * len(was & is_now) >= len(was | is_now) else super().difference(before, now)

    async def caption(self, views: np.ndarray, spec: ViewSpec, deadline: float) -> dict[str, Any]:
        """Caption one picture: views ``(1, size, size, 3)``, made by ``spec`` -> ``{"text", "model"}``.

        Raises: as ``Replica.batched``.
        """
        return await self.batched(views, spec, deadline)
