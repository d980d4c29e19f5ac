"""A decoder is taught to write without photos: what it reads, what it never may, and what comes of it."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.errors import DataError
from data.locations import Location
from data.versions import open_version
from deployments.checkpoints import resolve
from tests.train.small import coloured, write_version
from train import command
from train.captioning import load_captioner
from train.job import Outcome
from train.language import LanguageJob, LanguageModule, LanguageTraining, prepare_job, read_texts, train
from train.loop import export, fit_locally
from train.module import TrainingError

#: Colours follow shapes: what photos cannot say, for the list has none.
SENTENCES = ["a red picture is plain", "the plain picture is white"]


def listed(folder: Path, rows: list[tuple[str, str]], header: str = "image,caption") -> Path:
    path = folder / "captions.txt"
    path.write_text("\n".join([header, *(f'{name},"{text}"' for name, text in rows)]) + "\n")
    return path


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    return listed(tmp_path, [(f"{900 + number}.jpg", SENTENCES[number // 4 % 2]) for number in range(64)])


def job_of(photos: Path, model: Path | str, texts: Path, **changes: Any) -> LanguageJob:
    settings = {"epochs": 6, "batch_size": 8, "learning_rate": 5e-3, "threads": 1}
    given = {"data": str(photos), "model": str(model), "texts": str(texts), "output": "x"}
    return prepare_job(LanguageTraining(**(given | settings | changes)), open_version(photos))[0]


def test_what_validation_and_test_ask_for_is_read_by_nobody(tmp_path: Path) -> None:
    rows = [
        {"image": coloured(number)[0], "captions": coloured(number)[1], "split": split, "file_name": name}
        for number, (split, name) in enumerate(
            [("train", "Images/11_a.jpg"), ("val", "Images/22_b.jpg"), ("test", "Images/33_c.jpg")]
        )
    ]
    version = open_version(write_version(tmp_path, "flickr30k", rows))
    kept = [("44.jpg", "A dog, and a CAT."), ("44.jpg", "Two animals"), ("55.jpg", "...")]
    place = listed(tmp_path, [("11.jpg", "seen"), ("22.jpg", "held out"), ("33.jpg", "held out, too"), *kept])
    assert read_texts(str(place), version) == [["a dog and a cat", "two animals"]]
    packed = tmp_path / "captions.txt.gz"
    packed.write_bytes(gzip.compress(place.read_bytes()))
    assert read_texts(str(packed), version) == read_texts(str(place), version)


def test_a_decoder_learns_what_the_list_says_and_its_tower_stays(
    photos: Path, blip: Path, texts: Path, tmp_path: Path
) -> None:
    job = job_of(photos, blip, texts)
    outcome, module, watch = fit_locally(job, tmp_path, "here", say=lambda line: None)
    assert outcome.losses[-1][1] < 0.5 * outcome.losses[0][1]
    figures = export(job, module, watch, tmp_path / "writer")
    assert figures["val_perplexity"] == pytest.approx(np.exp(figures["val_loss"]))
    before, after = load_captioner(resolve(str(blip))), load_captioner(resolve(str(tmp_path / "writer")))
    changed = {
        name.split(".")[0] if "crossattention" not in name else "crossattention"
        for name, value in after.state_dict().items()
        if not torch.equal(value, before.state_dict()[name])
    }
    assert changed == {"text_decoder"}
    card = resolve(str(tmp_path / "writer")).card
    assert card.task == "captioning" and "texts" not in str(card.training)


@torch.no_grad()
def test_the_loss_is_that_of_the_decoder_without_a_picture(photos: Path, blip: Path, texts: Path) -> None:
    module = job_of(photos, blip, texts, dropout=0.0).module(10).eval()
    assert isinstance(module, LanguageModule)
    row = len(module.tokens) - 1  # of the list
    batch = module.prepare({"row": np.array([row]), "epoch": np.array([0])})
    model: Any = module.model
    read, said = module.vocabulary.sequence(module.tokens[row][0])
    logits = model.text_decoder(input_ids=torch.tensor([read]), use_cache=False).logits[0]
    alone = torch.nn.functional.cross_entropy(logits, torch.tensor(said), ignore_index=-100)
    assert module.loss(batch).item() == pytest.approx(alone.item(), rel=1e-4)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"image,caption\n", "no caption but"),
        (b"name,words\n1.jpg,a dog\n", "must have the columns"),
        (b"\x1f\x8b\x00broken", "no sound gzip"),
        (gzip.compress(b"image,caption\n1.jpg,a dog\n" * 9)[:-9], "no sound gzip"),
        (b"\xff\xfe\x00", "no UTF-8"),
    ],
)
def test_a_list_of_no_use_says_so(photos: Path, tmp_path: Path, content: bytes, said: str) -> None:
    place = tmp_path / ("list.gz" if content[:1] == b"\x1f" else "list.csv")
    place.write_bytes(content)
    with pytest.raises(DataError, match=said):
        read_texts(str(place), open_version(photos))


def test_settings_that_cannot_work_are_refused_before_anything_starts(photos: Path, blip: Path, texts: Path) -> None:
    with pytest.raises(DataError, match="is not there"):
        job_of(photos, blip, texts.with_name("missing.csv"))
    with pytest.raises(TrainingError, match="ddp"):
        job_of(photos, blip, texts, strategy="fsdp")


def test_a_run_goes_on_with_the_list_that_it_was_started_with_or_not_at_all(
    photos: Path, blip: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(config: LanguageTraining, _job: object, place: Location, _callbacks: object) -> Outcome:
        run = place.local_path / config.name
        (run / "checkpoint_1").mkdir(exist_ok=True)
        kept = {"checkpoint_results": [{"checkpoint_dir_name": "checkpoint_1"}]}
        (run / "checkpoint_manager_snapshot.json").write_text(json.dumps(kept))
        return Outcome("stopped", 1, 2, reason="time")

    monkeypatch.setattr(command, "_fit", stopped)
    config = LanguageTraining(
        data=str(photos),
        model=str(blip),
        texts=str(texts),
        output=str(tmp_path / "writer"),
        storage=str(tmp_path / "runs"),
        record=False,
    )
    assert train(config).status == train(config).status == "stopped"
    texts.write_text(texts.read_text() + '990.jpg,"one more"\n')
    with pytest.raises(TrainingError, match=f"another content of --texts {texts}.*give another --name"):
        train(config)
