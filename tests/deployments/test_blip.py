"""BLIP made faster says what it said before: the same captions, likelihoods and parameters."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, BlipConfig, BlipForConditionalGeneration

from deployments import blip
from deployments.captioner import CaptionerModel
from deployments.checkpoints import resolve
from deployments.views import render
from tests.train.small_models import small_captioner

SAMPLES = Path(__file__).parents[2] / "samples"
WORDS = 40


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads wait for each other at every step of models as small as these, on a busy machine for long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def plain() -> BlipForConditionalGeneration:
    """Three layers with weights drawn so that captions differ between pictures and end early, some of them."""
    torch.manual_seed(3)
    width: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    ends = {"bos_token_id": WORDS - 1, "eos_token_id": 3, "sep_token_id": 3, "pad_token_id": 0}
    text = {**width, **ends, "encoder_hidden_size": 32, "num_hidden_layers": 3, "vocab_size": WORDS}
    vision = {**width, "num_hidden_layers": 3, "image_size": 32, "patch_size": 8}
    model = BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=vision)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3)
        model.text_decoder.cls.predictions.bias[3] = 2.0
    return model


@pytest.fixture(scope="module")
def quick(plain: BlipForConditionalGeneration) -> BlipForConditionalGeneration:
    model = copy.deepcopy(plain)
    blip.quicken(model)
    return model


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("count", [1, 2, 7])
@pytest.mark.parametrize("prompted", [False, True])
@torch.inference_mode()
def test_captions_are_those_of_the_librarys_generate(
    plain: BlipForConditionalGeneration, quick: BlipForConditionalGeneration, beams: int, count: int, prompted: bool
) -> None:
    pixels = torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(count))
    settings: dict[str, Any] = {"num_beams": beams, "max_new_tokens": 12, "min_new_tokens": 2, "length_penalty": 0.5}
    prompt = {}
    if prompted:  # as a tokenizer gives it: a first token, the words, the end
        ids = torch.tensor([[2, 7, 9, 3]]).repeat(count, 1)
        prompt = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    expected = plain.generate(pixel_values=pixels, **copy.deepcopy(prompt), **settings)
    found = blip.generate(quick, pixels, **prompt, **settings)
    assert found.tolist() == expected.tolist()
    assert count == 1 or len({tuple(row) for row in expected.tolist()}) > 1, (
        "pictures without a difference show nothing"
    )


@torch.inference_mode()
def test_all_else_that_the_model_computes_stays_as_it_was(
    plain: BlipForConditionalGeneration, quick: BlipForConditionalGeneration
) -> None:
    pixels = torch.randn(2, 3, 32, 32)
    tokens = torch.tensor([[WORDS - 1, 5, 6, 3], [WORDS - 1, 8, 3, 0]])
    given = {"pixel_values": pixels, "input_ids": tokens, "attention_mask": (tokens != 0).long()}
    torch.testing.assert_close(quick(**given).logits, plain(**given).logits)
    assert quick.generate(pixel_values=pixels, num_beams=2, max_new_tokens=6).tolist() == (
        plain.generate(pixel_values=pixels, num_beams=2, max_new_tokens=6).tolist()
    )


def test_parameters_keep_their_names_their_values_and_their_gradients(plain: BlipForConditionalGeneration) -> None:
    quick, trained = copy.deepcopy(plain), copy.deepcopy(plain)
    blip.quicken(quick)
    assert list(quick.state_dict()) == list(plain.state_dict())
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in quick.state_dict().items())
    tokens = torch.tensor([[WORDS - 1, 5, 6, 3]])
    pixels = torch.randn(1, 3, 32, 32)
    for model in (quick, trained):
        model.train()
        model(pixel_values=pixels, input_ids=tokens, labels=tokens).loss.backward()
    expected = dict(trained.named_parameters())
    for name, parameter in quick.named_parameters():
        if expected[name].grad is not None:
            torch.testing.assert_close(parameter.grad, expected[name].grad, msg=name)


def test_a_blip_is_served_quickened_and_its_pictures_have_one_row_each(tmp_path: Path) -> None:
    model = CaptionerModel(resolve(str(small_captioner(tmp_path / "captioner", generation={"num_beams": 3}))))
    rows: list[int] = []
    attention = model.network.text_decoder.bert.encoder.layer[0].crossattention.self
    assert isinstance(attention, blip.PictureAttention)
    attention.key.register_forward_hook(lambda _module, given, _answer: rows.append(len(given[0])))
    views = np.random.default_rng(0).integers(0, 255, (2, *model.views.shape), dtype=np.uint8)
    assert all(model.caption(views))
    assert rows == [2], "keys are computed once, and for pictures rather than beams"


@torch.inference_mode()
def test_packed_layers_write_the_same_captions_and_keep_their_parameters(plain: BlipForConditionalGeneration) -> None:
    packed = copy.deepcopy(plain)
    blip.quicken(packed)
    blip.pack(packed)
    output = packed.text_decoder.cls.predictions.decoder
    assert isinstance(output, blip.FewRows) and output.packed is not None
    assert output.weight is packed.text_decoder.bert.embeddings.word_embeddings.weight
    assert list(packed.state_dict()) == list(plain.state_dict())
    for count in (1, 2, 7):  # 3 and 6 rows a step, and more than are packed for
        pixels = torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(count))
        settings: dict[str, Any] = {"num_beams": 3, "max_new_tokens": 12, "min_new_tokens": 2}
        expected = plain.generate(pixel_values=pixels, **settings)
        assert blip.generate(packed, pixels, **settings).tolist() == expected.tolist()


@pytest.mark.proof
@pytest.mark.parametrize("beams", [1, 3])
@torch.inference_mode()
def test_the_starter_captioner_says_of_every_sample_what_plain_generate_says(beams: int) -> None:
    model = CaptionerModel(resolve("starter:captioner"))
    plain = AutoModelForImageTextToText.from_pretrained(
        model.checkpoint.folder, use_safetensors=True, dtype=torch.float32
    ).eval()
    photos = [Image.open(path).convert("RGB") for path in sorted(SAMPLES.glob("*.jpg"))]
    views = np.stack([render(photo, model.views) for photo in photos])
    settings = model.generation | {"num_beams": beams, "logits_processor": model.unsaid}
    pixels = model.pixels(views)
    for size in (1, 3, len(views)):
        for first in range(0, len(views), size):
            expected = plain.generate(pixel_values=pixels[first : first + size], **settings)
            assert model.write(views[first : first + size], num_beams=beams).tolist() == expected.tolist()
