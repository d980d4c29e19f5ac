"""Captioners that this project did not write: loaded, given their pictures and their prompt, and read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, BlipForConditionalGeneration, BlipProcessor, GitConfig, GitForCausalLM

from deployments.captioner import CaptionerModel
from deployments.checkpoints import resolve
from tests.train.small_models import SIDE_PX, small_captioner


def small_git(folder: Path) -> Path:
    """A GIT of one layer with random weights, which begins each caption with `a`."""
    small_captioner(folder, generation={"prompt": "a", "num_beams": 1, "min_new_tokens": 2, "max_new_tokens": 4})
    words = len((folder / "vocab.txt").read_text().splitlines())
    layers = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    GitForCausalLM(
        GitConfig(
            vision_config=layers | {"image_size": SIDE_PX, "patch_size": 8},
            **layers,
            vocab_size=words,
            max_position_embeddings=64,
            bos_token_id=2,
            eos_token_id=3,
        )
    ).save_pretrained(folder)
    return folder


def test_a_git_writes_on_after_its_prompt_and_not_after_an_end_of_text(tmp_path: Path) -> None:
    folder = small_git(tmp_path / "git")
    model = CaptionerModel(resolve(str(folder)))
    views = np.random.default_rng(0).integers(0, 255, (2, *model.views.shape), dtype=np.uint8)
    vocabulary = (folder / "vocab.txt").read_text().splitlines()
    ids = model.write(views)
    assert ids[:, :2].tolist() == [[2, vocabulary.index("a")]] * 2
    assert 3 not in ids[:, 2:4], "there is an end of text between the prompt and what was written"


def test_a_blip_that_transformers_saved_is_served_as_it_is(tmp_path: Path) -> None:
    processors = pytest.importorskip("transformers.models.blip.image_processing_pil_blip")
    made, folder = small_captioner(tmp_path / "made"), tmp_path / "saved"
    BlipForConditionalGeneration.from_pretrained(made).save_pretrained(folder)
    side = {"height": SIDE_PX, "width": SIDE_PX}
    images = processors.BlipImageProcessorPil(size=side, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    BlipProcessor(images, AutoTokenizer.from_pretrained(made)).save_pretrained(folder)
    (folder / "card.json").write_bytes((made / "card.json").read_bytes())
    assert not (folder / "preprocessor_config.json").exists()
    ours, theirs = (CaptionerModel(resolve(str(place))) for place in (made, folder))
    views = np.random.default_rng(0).integers(0, 255, (2, *ours.views.shape), dtype=np.uint8)
    assert theirs.views == ours.views and theirs.caption(views) == ours.caption(views)


def captioner_with(folder: Path, words: list[str], likes: dict[str, float]) -> CaptionerModel:
    """A captioner of these words that likes to say some of them whatever it has said before."""
    small_captioner(folder, words=words, generation={"num_beams": 3, "min_new_tokens": 4, "max_new_tokens": 4})
    model = CaptionerModel(resolve(str(folder)))
    vocabulary = (folder / "vocab.txt").read_text().splitlines()
    with torch.no_grad():
        head = model.network.text_decoder.cls.predictions.decoder
        for word, liking in likes.items():
            head.bias[vocabulary.index(word)] += liking
    return model


@pytest.mark.parametrize("beams", [1, 3])
def test_a_captioner_is_kept_from_saying_where_people_come_from(tmp_path: Path, beams: int) -> None:
    words = ["african", "skin", "##ned", "dark", "man", "dog", "haired"]
    model = captioner_with(tmp_path / "model", words, {"african": 900, "skin": 800, "dark": 500, "man": 300})
    views = np.random.default_rng(0).integers(0, 255, (2, *model.views.shape), dtype=np.uint8)
    free = model.caption(views, num_beams=beams, logits_processor=None)
    assert all("african" in text for text in free), "it would not have said it anyway"
    for text in model.caption(views, num_beams=beams):
        assert set(text.split()) <= {"dark", "man", "dog", "haired"} and "dark" in text and "dark man" not in text


def test_a_colour_is_left_out_before_people_only(tmp_path: Path) -> None:
    words = ["dark", "red", "young", "man", "dog"]
    model = captioner_with(tmp_path / "model", words, {})
    at = (tmp_path / "model" / "vocab.txt").read_text().splitlines().index
    scores = torch.zeros(3, len(words) + 7)
    (unsaid,) = model.unsaid
    said = torch.tensor([[at("man"), at("dark")], [at("dark"), at("red")], [at("dark"), at("young")]])
    after = unsaid(said, scores)
    assert (after[[0, 2], at("man")] == -torch.inf).all() and (after[[0, 2], at("dog")] == 0).all()
    assert after[1].tolist() == scores[1].tolist()
    assert unsaid(said[:, 1:], scores)[2].tolist() == scores[2].tolist(), "one word alone has none before it"
