"""Checkpoints of a few kilobytes, in the architectures that are served, and pictures for them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import (
    AutoModelForImageClassification,
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    PreTrainedConfig,
    RegNetConfig,
    SwinConfig,
    ViTConfig,
    ViTForImageClassification,
)

SIDE_PX = 32
WORDS = """
    a the dog cat car man woman boy girl ball street beach grass snow water red blue green black white runs running
    sitting jumps jumping leaps leaping bike bicycle big large little small on in with and guy lady bus horse
    """.split()  # noqa: SIM905


def write_processor(folder: Path) -> None:
    settings = {
        "do_resize": True,
        "size": {"height": SIDE_PX, "width": SIDE_PX},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))


def write_card(folder: Path, **card: Any) -> None:
    (folder / "card.json").write_text(json.dumps(card))


def small_detector(folder: Path, seed: int = 0, **card: Any) -> Path:
    """A ViT of two layers with weights drawn at random."""
    torch.manual_seed(seed)
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=SIDE_PX,
        patch_size=8,
        num_labels=2,
        id2label={0: "human", 1: "ai"},
        label2id={"human": 0, "ai": 1},
    )
    model = ViTForImageClassification(config)
    with torch.no_grad():  # drawn like this, probabilities differ between pictures
        model.classifier.weight.normal_(0, 2)
    model.save_pretrained(folder)
    write_processor(folder)
    write_card(
        folder,
        **{
            "task": "detection",
            "architecture": "ViTForImageClassification",
            "labels": ["human", "ai"],
            "thresholds": {"human_below": 0.4, "ai_above": 0.6},
            "temperature": 1.5,
            "dataset": {"name": "colours", "version": "1", "generators": ["old-generator"]},
        }
        | card,
    )
    return folder


#: Architectures that leave the type of their pixels as it is.
STRICT: dict[str, PreTrainedConfig] = {
    "swin": SwinConfig(image_size=SIDE_PX, embed_dim=8, depths=[1, 2], num_heads=[1, 2], window_size=4, patch_size=4),
    "regnet": RegNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], groups_width=8),
}


def small_classifier(folder: Path, config: PreTrainedConfig) -> Path:
    """A detector of this configuration with weights drawn at random, and no card."""
    torch.manual_seed(0)
    config.id2label = {0: "human", 1: "ai"}
    AutoModelForImageClassification.from_config(config).save_pretrained(folder)
    write_processor(folder)
    return folder


def small_captioner(folder: Path, seed: int = 0, words: Sequence[str] = WORDS, **card: Any) -> Path:
    """A BLIP of one layer with weights drawn at random."""
    torch.manual_seed(seed)
    folder.mkdir(parents=True)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words, "[DEC]", "[ENC]"]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    tokenizer = BertTokenizer(
        vocab=str(folder / "vocab.txt"),
        do_lower_case=True,
        bos_token="[DEC]",
        additional_special_tokens=["[ENC]"],
    )
    text = {
        "vocab_size": len(vocabulary),
        "hidden_size": 32,
        "encoder_hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 32,
        "bos_token_id": len(vocabulary) - 2,
        "eos_token_id": 3,
        "sep_token_id": 3,
        "pad_token_id": 0,
    }
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": SIDE_PX,
        "patch_size": 8,
    }
    model = BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=vision))
    with torch.no_grad():  # drawn like this, captions differ between pictures
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_processor(folder)
    write_card(
        folder,
        **{
            "task": "captioning",
            "architecture": "BlipForConditionalGeneration",
            "generation": {"num_beams": 1, "max_new_tokens": 8, "min_new_tokens": 3},
        }
        | card,
    )
    return folder


def noise(seed: int, size: tuple[int, int] = (96, 80)) -> Image.Image:
    """A picture that nothing else resembles."""
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256, size=(6, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def labelled_folder(folder: Path, pictures: int = 60) -> Path:
    """Pictures of both classes in the Kaggle layout, AI ones by two generators."""
    (folder / "train_data").mkdir(parents=True)
    rows, sources = ["file_name,label"], ["file_name,source,generator"]
    for number in range(pictures):
        name, label = f"train_data/{number:04d}.jpg", number % 2
        noise(number).save(folder / name, quality=80 + number % 15)
        rows.append(f"{name},{label}")
        generator = ("old-generator", "new-generator")[number // 2 % 2] if label else "photo"
        sources.append(f"{name},{'platform' if label == 0 else 'lab'},{generator}")
    (folder / "train.csv").write_text("\n".join(rows))
    (folder / "sources.csv").write_text("\n".join(sources))
    return folder


def captioned_folder(folder: Path, pictures: int = 24, captions: int = 2) -> Path:
    """Pictures with two captions each, or three, in the Kaggle layout of Flickr30k."""
    (folder / "Images").mkdir(parents=True)
    lines = ["image,caption"]
    things = ["dog", "man", "woman", "boy"]
    for number in range(pictures):
        noise(1000 + number).save(folder / "Images" / f"{number}_x.jpg")
        thing, place = things[number % 4], ("grass", "snow", "beach")[number % 3]
        said = [
            f"A big {thing} runs on the {place} .",
            f"The {thing} jumps with a red ball .",
            f"A {thing} on the {place} .",
        ]
        lines += [f"{number}_x.jpg,{text}" for text in said[:captions]]
    (folder / "captions.txt").write_text("\n".join(lines))
    return folder
