"""An untrained captioner: CLIP's image tower as BLIP's (``deployments.towers``), under a small text decoder over the
words of the training captions.

In: captions, sizes. Out: a checkpoint folder that ``train.captioner`` starts from (``--model new``). Knows no training.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, Field
from transformers import BertTokenizer, BlipConfig, BlipForConditionalGeneration, BlipTextConfig

from deployments.captioner_model import assemble_captioner
from deployments.checkpoints import publish, scratch_folder
from deployments.towers import blip_vision_config

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
#: Tied to the word embeddings, so not stored twice.
_TIED = {"cls.predictions.decoder.weight", "cls.predictions.decoder.bias"}


class NewDecoder(BaseModel):
    """Size of a new text decoder."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    hidden_size: int = Field(384, multiple_of=64)
    layers: int = Field(4, ge=1)
    min_word_count: int = Field(4, ge=1, description="rarer words of the training captions are unknown words")
    dropout: float = Field(0.15, ge=0, lt=1, description="while training; serving has none")


def write_new_captioner(captions: Sequence[str], decoder: NewDecoder, seed: int, target: Path) -> None:
    """The checkpoint folder of an untrained captioner; the same input gives the same weights."""
    build = scratch_folder(target)
    parts = build / "parts"
    parts.mkdir()
    tokenizer = build_tokenizer(captions, decoder.min_word_count, parts)
    torch.manual_seed(seed)
    config = captioner_config(len(tokenizer), decoder.hidden_size, decoder.layers)
    # on CPU and in float32: built whole, the tower's random weights are thrown away
    text = BlipForConditionalGeneration(config).text_decoder
    write_decoder(text, parts, {"task": "captioning", "architecture": "BlipForConditionalGeneration"}, torch.float32)
    assemble_captioner(parts, build)
    shutil.rmtree(parts)
    publish(build, target)


def write_decoder(text: torch.nn.Module, target: Path, card: dict[str, object], dtype: torch.dtype) -> None:
    """The trained half of a captioner as ``deployments.captioner_model`` reads it, vocabulary apart."""
    from safetensors.torch import save_file

    weights = {
        name: value.detach().to(dtype).contiguous() for name, value in text.state_dict().items() if name not in _TIED
    }
    save_file(weights, target / "decoder.safetensors", metadata={"format": "pt"})
    (target / "decoder.safetensors").chmod(0o644)
    settings = text.config.to_diff_dict() | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (target / "text_config.json").write_text(json.dumps(settings, indent=1) + "\n")
    (target / "card.json").write_text(json.dumps(card, indent=1) + "\n")


def build_tokenizer(captions: Sequence[str], min_count: int, folder: Path) -> BertTokenizer:
    """A BERT tokenizer whose vocabulary is the words of the (cleaned) training captions; ``[DEC]`` and ``[ENC]`` come
    last, as in BLIP.
    """
    counts = Counter(word for caption in captions for word in caption.split())
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
        bos_token="[DEC]",  # noqa: S106  # nosec B106 # a word of the vocabulary
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
