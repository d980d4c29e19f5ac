"""The steps by which the starter models are made again."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from pydantic_settings import CliApp
from safetensors.torch import load_file, save_file

from deployments.checkpoints import Checkpoint, CheckpointError
from tests.train.small_models import small_captioner
from train import extract
from train.evaluate import EvaluateCommands
from train.starter import Starter, steps


def made(only: str = "detector,captioner") -> list[list[str]]:
    return list(steps(Starter(labelled="raw", captioned="raw", texts="list.csv", work=Path("work"), only=only)))


def test_the_repository_changes_after_the_last_training_only() -> None:
    """A card tells the commit; a changed file makes it dirty."""
    programs = [step[0] for step in made()]
    assert programs[-2:] == ["train.extract", "train.extract"] and programs.count("train.extract") == 2
    trainings = [place for place, name in enumerate(programs) if name in ("train.detector", "train.captioner")]
    assert len(trainings) == 3 and max(trainings) < len(programs) - 2
    assert [step[0] for step in made("captioner")].count("train.extract") == 1


def test_both_models_get_a_report_of_what_is_extracted() -> None:
    (leave_out,) = (step for step in made() if step[0] == "train.leave_out")
    (report,) = (step for step in made() if step[0] == "train.evaluate")
    extracted = [step[step.index("--checkpoint") + 1] for step in made() if step[0] == "train.extract"]
    assert [step[step.index("--checkpoint") + 1] for step in (leave_out, report)] == extracted
    commands = CliApp.run(EvaluateCommands, cli_args=report[1:])
    assert commands.captioner is not None and commands.captioner.output == Path.cwd() / "work/reports/captioner"


def test_what_is_committed_changes_when_all_of_it_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, target = tmp_path / "checkpoint", tmp_path / "starter" / "detector"
    for folder in (checkpoint, target):
        folder.mkdir(parents=True)
    save_file({"weight": torch.ones(1)}, checkpoint / "model.safetensors")
    (checkpoint / "config.json").write_text("{}")
    (checkpoint / "card.json").write_text('{"architecture": "ClipBlocksForImageClassification"}')
    for name in ("README.md", "config.json"):
        (target / name).write_text("before")
    config = extract.ExtractConfig(checkpoint=str(checkpoint), target=target)

    def held() -> dict[str, str]:
        assert list(target.parent.iterdir()) == [target]
        return {file.name: file.read_text() for file in target.iterdir()}

    with pytest.raises(CheckpointError, match="no reference for drift"):
        extract.extract(config)

    def half(_: Checkpoint, folder: Path) -> None:
        (folder / "config.json").write_text("after")
        raise CheckpointError("the disk is full")

    monkeypatch.setattr(extract, "_detector", half)
    with pytest.raises(CheckpointError, match="full"):
        extract.extract(config)
    assert held() == {"README.md": "before", "config.json": "before"}

    monkeypatch.setattr(extract, "_detector", lambda _, folder: (folder / "config.json").write_text("after"))
    extract.extract(config)
    assert held() == {"README.md": "before", "config.json": "after"}


def test_only_what_was_trained_on_the_packaged_tower_comes_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, target = small_captioner(tmp_path / "captioner"), tmp_path / "starter"
    target.mkdir()
    (target / "README.md").write_text("before")
    config = extract.ExtractConfig(checkpoint=str(checkpoint), target=target)
    tower = {
        name.removeprefix("vision_model."): value
        for name, value in load_file(checkpoint / "model.safetensors").items()
        if name.startswith("vision_model.")
    }
    monkeypatch.setattr(extract, "clip_state", dict)
    trained = tower | {"post_layernorm.bias": tower["post_layernorm.bias"] + 1e-3}
    deeper = tower | {"encoder.layers.1.layer_norm1.bias": torch.zeros(32)}
    for packaged in (trained, deeper, {}):
        monkeypatch.setattr(extract, "blip_vision_state", lambda _, packaged=packaged: packaged)
        with pytest.raises(CheckpointError, match="is not the packaged one"):
            extract.extract(config)
        assert [file.name for file in target.iterdir()] == ["README.md"]
    monkeypatch.setattr(extract, "blip_vision_state", lambda _: tower)
    card = json.loads((checkpoint / "card.json").read_text()) | {"training": {"model": f"{tmp_path}/base#0123"}}
    (checkpoint / "card.json").write_text(json.dumps(card))
    extract.extract(config)
    assert json.loads((target / "card.json").read_text())["training"]["model"] == "base#0123"
    assert {"decoder.safetensors", "text_config.json", "vocab.txt", "card.json"} < {
        file.name for file in target.iterdir()
    }


def test_a_captioner_is_not_made_of_other_things_than_the_committed_one() -> None:
    with pytest.raises(ValidationError, match="--texts must be given for detector and captioner"):
        Starter(labelled="raw", captioned="raw", work=Path("work"))
    with pytest.raises(ValidationError, match="--captioned and --texts must be given for captioner"):
        Starter(labelled="raw", work=Path("work"), only="captioner")
    assert Starter(labelled="raw", work=Path("work"), only="detector").texts == ""
    assert Starter(captioned="raw", texts="list.csv", work=Path("work"), only="captioner").labelled == ""


def test_a_name_that_is_none_of_the_two_is_told() -> None:
    with pytest.raises(ValidationError, match="captoner"):
        made("captoner")
    with pytest.raises(ValidationError, match="''"):
        made("")
    assert [step[0] for step in made("detector, captioner")] == [step[0] for step in made()]


@pytest.mark.parametrize("name", sorted({step[0] for step in made()}))
def test_every_step_is_a_program(name: str) -> None:
    assert callable(importlib.import_module(name).main)
