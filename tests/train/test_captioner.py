"""The captioner's trainer: packing changes nothing, and a run through Ray Train gives a checkpoint that serves."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BlipForConditionalGeneration

from deployments.captioner import CaptionerModel, assemble_captioner
from deployments.checkpoints import open_checkpoint
from deployments.views import render
from train.captioner import PackedCaptions, build_tokenizer, captioner_config, collate, main
from train.captions import CaptionedPhoto

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 220), "white": (240, 240, 240)}


@pytest.fixture
def caption_data(tmp_path: Path) -> Path:
    """Plain pictures whose captions name their colour, in the Kaggle layout."""
    folder = tmp_path / "set"
    (folder / "Images").mkdir(parents=True)
    rows = ["image,caption"]
    for number in range(24):
        name, colour = list(COLOURS.items())[number % 4]
        Image.new("RGB", (96, 64), colour).save(folder / "Images" / f"{number}_x.jpg")
        rows += [f"{number}_x.jpg,A plain {name} picture .", f"{number}_x.jpg,The picture is {name}"]
    (folder / "captions.txt").write_text("\n".join(rows))
    return folder


@torch.inference_mode()
def test_captions_packed_together_score_as_each_alone(tmp_path: Path) -> None:
    photos = [CaptionedPhoto("1", ("a red dog runs", "the dog is red and runs", "a dog"))]
    tokenizer = build_tokenizer(photos, 1, tmp_path)
    decoder = BlipForConditionalGeneration(captioner_config(len(tokenizer), 64, 2)).text_decoder.eval()
    features = np.random.default_rng(0).normal(size=(1, 5, 768)).astype(np.float16)
    item = PackedCaptions(photos, {"1": 0}, features, tokenizer, keep=1.0)[0]
    batch = collate([item])
    packed = decoder(
        input_ids=batch["tokens"],
        attention_mask=batch["mask"],
        position_ids=batch["positions"],
        encoder_hidden_states=batch["image"],
        use_cache=False,
    ).logits[0]
    for segment in range(3):
        place = [index for index, value in enumerate(item["segments"]) if value == segment]
        alone = decoder(
            input_ids=batch["tokens"][:, place], encoder_hidden_states=batch["image"], use_cache=False
        ).logits[0]
        assert torch.allclose(packed[place], alone, atol=1e-4)


def test_unknown_words_are_read_but_never_taught(tmp_path: Path) -> None:
    known = [CaptionedPhoto("1", ("a dog",))]
    tokenizer = build_tokenizer(known, 1, tmp_path)
    data = PackedCaptions([CaptionedPhoto("1", ("a zebra",))], {"1": 0}, np.zeros((1, 2, 768)), tokenizer, 1.0)
    begin, a, unknown = data[0]["tokens"]
    assert (begin, unknown) == (tokenizer.bos_token_id, tokenizer.unk_token_id)
    assert data[0]["targets"] == [a, -100, tokenizer.sep_token_id]


@pytest.mark.slow
def test_a_run_through_ray_train_gives_a_captioner_that_serves(caption_data: Path, tmp_path: Path) -> None:
    output = tmp_path / "trained"
    main(
        [
            *("--data", str(caption_data), "--output", str(output), "--cache", str(tmp_path / "cache")),
            *("--storage", str(tmp_path / "runs"), "--epochs", "30", "--min-word-count", "1"),
            *("--photos-per-batch", "4", "--warmup-steps", "5", "--hidden-size", "64", "--layers", "1"),
            *("--test-photos", "4", "--validation-photos", "4", "--dropout", "0"),
        ]
    )
    checkpoint = tmp_path / "checkpoint"
    assemble_captioner(output, checkpoint)
    model = CaptionerModel(open_checkpoint(checkpoint, "test"))
    views = np.stack([render(Image.new("RGB", (64, 64), colour), model.views) for colour in COLOURS.values()])
    captions = model.caption(views)
    named = [name in caption for name, caption in zip(COLOURS, captions, strict=True)]
    assert sum(named) >= 3, captions
    assert json.loads((output / "card.json").read_text())["metrics"]["val_bleu4"] > 0
