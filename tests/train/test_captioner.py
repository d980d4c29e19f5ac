"""The captioner's trainer: packing changes nothing, the reward teaches what is rewarded, and what cannot be trained is
told."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file, save_file

from data.locations import Location
from data.versions import open_version
from deployments.captioner_model import assemble_captioner
from deployments.checkpoints import resolve
from tests.train.small import coloured, labelled_version
from train.captioner import PROMPT, CaptionerJob, generation_of, prepare_job, prompt_of, tokens_key
from train.captioning import CaptionerModule, CaptionerTraining, TowerTokens, load_captioner, some_patches
from train.extract import ExtractConfig, extract
from train.features import Encode, Features
from train.loop import fit_locally
from train.module import TrainingError
from train.stream import Deliver
from train.words import choose, pack


def job_of(photos: Path, blip: Path, **changes: Any) -> CaptionerJob:
    settings = {"epochs": 20, "batch_size": 8, "learning_rate": 5e-3, "augment": False, "threads": 1, "prompt": ""}
    config = CaptionerTraining(data=str(photos), model=str(blip), output="x", **(settings | changes))
    return prepare_job(config, open_version(photos))[0]


def module_of(job: CaptionerJob) -> CaptionerModule:
    torch.manual_seed(0)
    return job.module(10).eval()


def named(captions: list[str], numbers: range) -> int:
    """How many captions name the colour of their picture."""
    return sum(coloured(number)[1][1].split()[-1] in caption for number, caption in zip(numbers, captions, strict=True))


@torch.no_grad()
def test_captions_packed_together_have_the_loss_of_each_alone(photos: Path, blip: Path) -> None:
    module = module_of(job_of(photos, blip, prompt="a"))
    model: Any = module.model
    words = [module.vocabulary.encode(text, 30) for text in ("a red picture", "the picture is red", "plain")]
    batch = pack([[module.vocabulary.sequence(text) for text in words]], module.vocabulary.pad)
    image = torch.randn(1, 5, 32)
    packed = model.text_decoder(
        input_ids=batch["tokens"],
        attention_mask=batch["mask"],
        position_ids=batch["positions"],
        encoder_hidden_states=image,
        use_cache=False,
    ).logits[0]
    place = 0
    for text in words:
        read, said = module.vocabulary.sequence(text)
        alone = model.text_decoder(input_ids=torch.tensor([read]), encoder_hidden_states=image, use_cache=False).logits[
            0
        ]
        assert torch.allclose(packed[place : place + len(read)], alone, atol=1e-4)
        assert batch["targets"][0, place : place + len(read)].tolist() == said
        place += len(read)


def test_the_prompt_is_given_and_unknown_words_are_read_but_never_taught(photos: Path, blip: Path) -> None:
    vocabulary = module_of(job_of(photos, blip, prompt="the picture")).vocabulary
    the, picture = vocabulary.words["the"], vocabulary.words["picture"]
    read, said = vocabulary.sequence(vocabulary.encode("is zebra red", 2))
    assert read == [vocabulary.begin, the, picture, vocabulary.words["is"], vocabulary.unknown]
    assert said == [-100, -100, vocabulary.words["is"], -100, vocabulary.end]


def test_every_caption_has_its_turn() -> None:
    captions = [[number] for number in range(5)]
    for row in range(4):
        assert sorted(choose(captions, 1, row, epoch)[0] for epoch in range(5)) == list(range(5))
    assert len({choose(captions, 1, row, 0)[0] for row in range(30)}) > 1


def test_patches_are_dropped_but_never_the_class_token() -> None:
    features = torch.arange(2 * 11).float().view(2, 11, 1)
    kept = some_patches(features, 0.4)
    assert kept.shape == (2, 5, 1)
    assert kept[0, 0, 0] == 0 and kept[1, 0, 0] == 11
    assert all(row.diff(dim=0).min() > 0 for row in kept)


def test_the_loss_is_that_of_the_model_itself(photos: Path, blip: Path) -> None:
    job = job_of(photos, blip)
    module = module_of(job)
    batch = module.prepare(next(job.train_source().load(0, np.arange(6))))
    with torch.no_grad():
        own = module.loss(batch)
        logits = module.model(
            pixel_values=module.pixels(batch["pixels"]), input_ids=batch["tokens"], attention_mask=batch["mask"]
        ).logits
        each = -logits.log_softmax(-1).gather(-1, batch["targets"].clamp(min=0)[..., None])[..., 0]
    taught = batch["targets"] != -100
    assert own.item() == pytest.approx(each[taught].mean().item(), rel=1e-5)


@torch.no_grad()
def test_each_word_of_a_step_weighs_the_same_in_whichever_part_it_is(photos: Path, blip: Path) -> None:
    whole, parted = (module_of(job_of(photos, blip, accumulate=parts)) for parts in (1, 2))
    parted.tokens = whole.tokens = [[words[0][: 1 if row < 4 else 3]] for row, words in enumerate(whole.tokens)]
    source = job_of(photos, blip).train_source()
    batch = whole.prepare(next(source.load(0, np.arange(8))))
    words = int((batch["targets"] != -100).sum())
    halves = [{name: value[rows] for name, value in batch.items()} for rows in (slice(4), slice(4, 8))]
    counts = [int((half["targets"] != -100).sum()) for half in halves]
    assert counts[0] != counts[1]
    step = sum(parted.loss(half).item() for half in halves) / 2
    assert step * parted.words_a_row * 8 == pytest.approx(whole.loss(batch).item() * words, rel=1e-5)


@torch.no_grad()
def test_what_a_drawn_caption_teaches_is_its_worth_beside_the_others_of_its_photo(photos: Path, blip: Path) -> None:
    job = job_of(photos, blip, objective="cider", samples_per_photo=3, temperature=0.7, prompt="a")
    module, plain = module_of(job), load_captioner(resolve(job.checkpoint)).eval()
    batch = module.prepare(next(job.train_source().load(0, np.arange(4))))
    torch.manual_seed(1)
    loss = module.loss(batch)
    torch.manual_seed(1)
    said = module.sample(module.model.text_decoder, module.model.vision_model(module.pixels(batch["pixels"]))[0])
    image = plain.vision_model(module.pixels(batch["pixels"]))[0]
    assert module.reward is not None and len(said) == 12 and len({len(words) for words in said}) > 1
    begin, end = [module.vocabulary.begin, *module.vocabulary.prompt], module.vocabulary.end
    texts = module.vocabulary.tokenizer.batch_decode(said, skip_special_tokens=True)
    rows = batch["row"].repeat_interleave(3).tolist()
    rewards = [module.reward(row, text, end in words) for row, text, words in zip(rows, texts, said, strict=True)]
    expected = 0.0
    for number, words in enumerate(said):
        photo = number // 3
        others = [rewards[other] for other in range(3 * photo, 3 * photo + 3) if other != number]
        read = torch.tensor([[*begin, *words[:-1]]])
        logits = plain.text_decoder(
            input_ids=read, encoder_hidden_states=image[photo : photo + 1], use_cache=False
        ).logits[0, len(begin) - 1 :]
        chances = (logits / 0.7).log_softmax(1)[range(len(words)), words]
        expected -= (rewards[number] - np.mean(others)) * chances.sum().item()
    assert loss.item() == pytest.approx(expected / sum(map(len, said)), rel=1e-4)


@pytest.mark.proof
def test_rewarded_captions_become_likelier(photos: Path, blip: Path) -> None:
    job = job_of(photos, blip, objective="cider", samples_per_photo=8)
    module = module_of(job)
    batch = module.prepare(next(job.train_source().load(0, np.arange(8))))
    optimizer = torch.optim.Adam(module.model.parameters(), lr=3e-3)
    torch.manual_seed(0)

    def mean_reward() -> float:
        texts = [text for _ in range(6) for text in sampled(module, batch)]
        rows = batch["row"].tolist() * 6
        assert module.reward is not None
        return float(np.mean([module.reward(row, text) for row, text in zip(rows, texts, strict=True)]))

    before = mean_reward()
    for _ in range(60):
        optimizer.zero_grad()
        module.loss(batch).backward()
        optimizer.step()
    assert mean_reward() > 1.5 * before + 0.05


def sampled(module: CaptionerModule, batch: dict[str, torch.Tensor]) -> list[str]:
    model: Any = module.model
    with torch.no_grad():
        image = model.vision_model(module.pixels(batch["pixels"]))[0]
        ids = module.generate(model.text_decoder, image, {"num_beams": 1, "do_sample": True, "top_k": 0})
    return [text.strip() for text in module.vocabulary.tokenizer.batch_decode(ids, skip_special_tokens=True)]


@pytest.mark.proof
def test_training_learns_to_name_what_it_sees(photos: Path, blip: Path, tmp_path: Path) -> None:
    outcome, module, _ = fit_locally(
        job_of(photos, blip, epochs=40, validate_every=80), tmp_path, "here", say=lambda _: None
    )
    assert outcome.metrics["val_bleu4"] > 0.5
    assert named([module.judged[row] for row in range(8)], range(48, 56)) >= 7


def test_a_decoder_learns_from_tokens_of_the_frozen_tower_computed_once(
    photos: Path, blip: Path, tmp_path: Path
) -> None:
    """Tokens, captions and pictures must belong together all the way through the cache."""
    job = job_of(photos, blip, freeze="tower", epochs=12, learning_rate=1e-2)
    tokens = []
    for split, source in (("train", job.train_pictures(Deliver())), ("val", job.val_pictures())):
        features = Features(Location.of(str(tmp_path / split)), tuple(source.groups))
        features.location.ready()
        encode = Encode(source, features, TowerTokens(job.checkpoint), 8, 1)
        encode(pa.table({"variant": [0] * len(source.groups), "group": range(len(source.groups))}))
        tokens.append(features)
    job = replace(job, features=(tokens[0], tokens[1]))
    _, module, watch = fit_locally(job, tmp_path, "here", say=lambda _: None)
    assert watch.step == 72
    assert named([module.judged[row] for row in range(8)], range(48, 56)) >= 7


def test_tokens_are_kept_for_a_tower_and_how_it_reads_pixels_and_not_for_a_decoder(
    photos: Path, blip: Path, tmp_path: Path
) -> None:
    key = tokens_key(job_of(photos, blip))
    darker = Path(shutil.copytree(blip, tmp_path / "darker"))
    processor = json.loads((darker / "preprocessor_config.json").read_text())
    (darker / "preprocessor_config.json").write_text(json.dumps(processor | {"image_mean": [0.1, 0.1, 0.1]}))
    assert tokens_key(job_of(photos, darker)) != key
    whole = Path(shutil.copytree(blip, tmp_path / "whole"))  # as transformers saves a whole processor
    (whole / "preprocessor_config.json").unlink()
    (whole / "processor_config.json").write_text(json.dumps({"image_processor": processor}))
    assert tokens_key(job_of(photos, whole)) == key
    changed = {"vision_model.post_layernorm.bias": True, "text_decoder.cls.predictions.bias": False}
    for name, is_another in changed.items():
        folder = Path(shutil.copytree(blip, tmp_path / name))
        weights = load_file(folder / "model.safetensors")
        save_file(weights | {name: weights[name] + 1}, folder / "model.safetensors", {"format": "pt"})
        assert (tokens_key(job_of(photos, folder)) != key) == is_another, name


@pytest.mark.proof
def test_a_new_captioner_is_clips_tower_under_its_own_words_and_comes_apart_again(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEEPTRUST_CACHE", str(tmp_path / "cache"))
    config = CaptionerTraining(
        data=str(photos), model="new", output="x", new={"hidden_size": 64, "layers": 1, "min_word_count": 1}
    )
    job, parameters = prepare_job(config, open_version(photos))
    assert parameters > 86e6 and job.config.prompt == "" and job.config.dropout == 0.15
    assert prepare_job(config, open_version(photos))[0].checkpoint == job.checkpoint
    folder = Path(job.checkpoint)
    assert {"plain", "red", "picture", "[DEC]"} <= job.module(1).vocabulary.words.keys()
    extract(ExtractConfig(checkpoint=str(folder), target=tmp_path / "decoder"))
    assemble_captioner(tmp_path / "decoder", tmp_path / "again")
    one, other = (load_file(place / "model.safetensors") for place in (folder, tmp_path / "again"))
    assert one.keys() == other.keys()
    assert all(torch.allclose(value, other[name], atol=1e-3) for name, value in one.items())


def test_settings_of_the_checkpoints_card_hold_unless_told(photos: Path, blip: Path) -> None:
    config = CaptionerTraining(data="x", output="x")
    checkpoint = resolve(str(blip))
    known = replace(
        checkpoint,
        card=checkpoint.card.model_copy(
            update={"task": "captioning", "generation": {"num_beams": 2, "prompt": "look"}}
        ),
    )
    assert prompt_of(config, known) == "look"
    assert prompt_of(config, replace(checkpoint, card=checkpoint.card.model_copy(update={"task": "unknown"}))) == PROMPT
    assert prompt_of(config.model_copy(update={"prompt": ""}), known) == ""
    assert generation_of(config, known)["num_beams"] == 2 and "prompt" not in generation_of(config, known)
    assert generation_of(config.model_copy(update={"length_penalty": 0.3}), known)["length_penalty"] == 0.3


def test_what_cannot_be_trained_is_told(photos: Path, blip: Path, tmp_path: Path) -> None:
    config = CaptionerTraining(data="x", model=str(blip), output="x")
    labelled = open_version(labelled_version(tmp_path, 4, 2))
    with pytest.raises(TrainingError, match="no captions"):
        prepare_job(config, labelled)
    captioned = open_version(photos)
    with pytest.raises(TrainingError, match="--strategy ddp"):
        prepare_job(config.model_copy(update={"freeze": "tower", "strategy": "fsdp"}), captioned)
    with pytest.raises(TrainingError, match="--no-augment"):
        prepare_job(config.model_copy(update={"freeze": "tower", "variants": 2, "augment": False}), captioned)
    empty = replace(captioned, manifest=captioned.manifest.model_copy(update={"counts": {"train": 3, "val": 0}}))
    with pytest.raises(TrainingError, match=r"split val .* is empty"):
        prepare_job(config, empty)
