"""What tests of training are made of: prepared versions of a few dozen small pictures, and tiny models."""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from data.captions import clean_caption
from data.versions import MANIFEST, SCHEMAS, SPLITS, DatasetName, Manifest

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 220), "white": (240, 240, 240)}


def jpeg(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


def traced(number: int, label: int) -> bytes:
    """A smooth blob; with a checkerboard on top, as transposed convolutions leave it, where the label is 1."""
    random = np.random.default_rng(number)
    small = Image.fromarray(random.integers(0, 256, (4, 5, 3), dtype=np.uint8))
    board = (np.indices((80, 100)).sum(0) // 4 % 2)[..., None] * 110.0
    return jpeg(np.asarray(small.resize((100, 80), Image.Resampling.BICUBIC)) * 0.5 + label * board)


def coloured(number: int) -> tuple[bytes, list[str]]:
    """A plain picture, a little noisy, and two captions that name its colour."""
    name, colour = list(COLOURS.items())[number % 4]
    random = np.random.default_rng(number)
    pixels = np.array(colour, dtype=float) + random.normal(0, 4, (48, 64, 3))
    return jpeg(pixels), [f"A plain {name} picture .", f"The picture is {name}"]


def write_version(folder: Path, name: DatasetName, rows: Sequence[dict[str, Any]], per_file: int = 8) -> Path:
    """A prepared version of the given rows (``image``, ``split``, ``label`` or ``captions``); returns its folder."""
    schema = SCHEMAS[name]
    full = []
    for number, row in enumerate(rows):
        image = Image.open(io.BytesIO(row["image"]))
        own = {
            "id": hashlib.sha256(row["image"]).hexdigest(),
            "file_name": f"{number}.jpg",
            "width": image.width,
            "height": image.height,
            "format": "JPEG",
            "mode": image.mode,
            "bytes": len(row["image"]),
            "declared": [],
            "phash": "0" * 16,
            "source": "test",
            "generator": {"ai": "board", "human": "photo"}.get(row.get("label", "")),
        }
        if "captions" in row:
            own |= {"raw_captions": row["captions"], "captions": [clean_caption(text) for text in row["captions"]]}
        given = ("image", "split", "label", "generator", "source", "file_name")
        full.append(own | {"group": own["id"]} | {key: row[key] for key in given if key in row})
    digest = hashlib.sha256(json.dumps([[row["id"], row["split"]] for row in full]).encode()).hexdigest()[:12]
    version = folder / name / digest
    files: dict[str, list[str]] = {}
    for split in SPLITS:
        own_rows = [row for row in full if row["split"] == split]
        for first in range(0, len(own_rows), per_file):
            part = f"{split}/{first // per_file:05d}.parquet"
            (version / split).mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.Table.from_pylist(own_rows[first : first + per_file], schema=schema), version / part)
            files.setdefault(split, []).append(part)
    count = {split: sum(row["split"] == split for row in full) for split in SPLITS}
    manifest = Manifest(
        name=name,
        version=digest,
        created_at="2026-01-01T00:00:00+00:00",
        settings={},
        seed=0,
        input="made by a test",
        input_fingerprint="0",
        input_rows=len(full),
        counts=count,
        image_bytes={split: sum(row["bytes"] for row in full if row["split"] == split) for split in SPLITS},
        class_balance={
            split: dict(Counter(row["label"] for row in full if row["split"] == split and "label" in row))
            for split in SPLITS
        },
        captions={},
        sources=dict(Counter(row["source"] for row in full)),
        generators=dict(Counter(row["generator"] or "unknown" for row in full)),
        groups={"groups": len(full), "larger_than_one": 0, "largest": 1},
        rejects={},
        checks={},
        files=files,
    )
    (version / MANIFEST).write_text(manifest.model_dump_json())
    return version


def labelled_version(
    folder: Path, train: int = 48, val: int = 16, labels: tuple[str, str] = ("human", "ai"), wrong_every: int = 0
) -> Path:
    """Smooth pictures against pictures with a trace; with ``wrong_every`` each such picture has the other's label, so
    that no model ranks them all and no two models alike."""
    rows = []
    for number in range(train + val):
        wrong = bool(wrong_every) and number % wrong_every == 0
        split = "train" if number < train else "val"
        rows.append({"image": traced(number, number % 2), "label": labels[(number + wrong) % 2], "split": split})
    return write_version(folder, "aivshuman" if "ai" in labels else "source", rows)


def captioned_version(folder: Path, train: int = 48, val: int = 8) -> Path:
    """Plain pictures with captions that name their colour."""
    rows = []
    for number in range(train + val):
        image, captions = coloured(number)
        rows.append({"image": image, "captions": captions, "split": "train" if number < train else "val"})
    return write_version(folder, "flickr30k", rows)


def tiny_vit(folder: Path, labels: Sequence[str] = ("cat", "dog", "bird")) -> Path:
    """A ViT of width 32 with random weights, in Hugging Face format."""
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=32,
        patch_size=8,
        id2label=dict(enumerate(labels)),
        label2id={label: index for index, label in enumerate(labels)},
    )
    ViTForImageClassification(config).save_pretrained(folder)
    processor = {
        "do_resize": True,
        "size": {"height": 32, "width": 32},
        "resample": 2,
        "image_mean": [0.4] * 3,
        "image_std": [0.3] * 3,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def tiny_blip(folder: Path) -> Path:
    """A BLIP of width 32 with random weights that knows the words of ``coloured``."""
    from transformers import BertTokenizer, BlipConfig, BlipForConditionalGeneration

    torch.manual_seed(0)
    folder.mkdir(parents=True)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = [*special, "a", "the", "is", "plain", "picture", *COLOURS, "[DEC]", "[ENC]"]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    tokenizer = BertTokenizer(
        vocab=str(folder / "vocab.txt"), do_lower_case=True, bos_token="[DEC]", additional_special_tokens=["[ENC]"]
    )
    width: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    text = {
        **width,
        "vocab_size": len(words),
        "encoder_hidden_size": 32,
        "num_hidden_layers": 2,
        "max_position_embeddings": 32,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "bos_token_id": len(words) - 2,
        "eos_token_id": 3,
        "sep_token_id": 3,
        "pad_token_id": 0,
    }
    # BLIP's own default of 1e-10 expects trained weights: all pictures would have the same tokens, and none in float16
    vision = {**width, "num_hidden_layers": 2, "image_size": 32, "patch_size": 8, "initializer_range": 0.02}
    BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=vision)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    processor = {
        "do_resize": True,
        "size": {"height": 32, "width": 32},
        "resample": 3,
        "image_mean": [0.5] * 3,
        "image_std": [0.3] * 3,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    card = {"task": "captioning", "generation": {"num_beams": 2, "max_new_tokens": 8, "min_new_tokens": 2}}
    (folder / "card.json").write_text(json.dumps(card))
    return folder


def flags(values: dict[str, Any]) -> list[str]:
    """Settings as a command line has them."""
    return [
        f"--{'' if value else 'no-'}{name}" if isinstance(value, bool) else f"--{name}={value}"
        for name, value in values.items()
    ]
