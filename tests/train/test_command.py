"""Before and after workers: a run's whole checkpoints are told from torn ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data.locations import Location
from deployments.checkpoints import open_checkpoint
from tests.train.small import tiny_vit
from train.command import TrainCommand, reported
from train.command import _finished as finished
from train.loop import Outcome
from train.module import TrainingError


def settings(folder: Path, **changes: object) -> TrainCommand:
    values = {"data": "d", "model": "m", "output": str(folder / "out"), "name": "run", "storage": str(folder / "runs")}
    return TrainCommand.model_validate(values | {"record": False} | changes)


def ended(folder: Path) -> Path:
    """A run's last checkpoint, whole, as a worker reports it."""
    tiny_vit(folder / "export", ("human", "ai"))
    (folder / "export/card.json").write_text('{"task": "detection"}')
    outcome = vars(Outcome("finished", 9, 9, {"val_auc": 0.75}))
    (folder / "progress.json").write_text(json.dumps({"step": 9, "best": 0.75, "bad": 0, "outcome": outcome}))
    return folder


def listed(run: Path, *names: str) -> None:
    """Ray's list of whole checkpoints, which it writes when all files of one are there."""
    results = [{"checkpoint_dir_name": name, "metrics": {}} for name in names]
    (run / "checkpoint_manager_snapshot.json").write_text(json.dumps({"checkpoint_results": results}))


def test_a_checkpoint_that_was_being_copied_is_not_taken_for_the_end(tmp_path: Path) -> None:
    run = tmp_path / "runs/run"
    torn = ended(run / "checkpoint_2")
    (run / "checkpoint_1").mkdir()
    listed(run, "checkpoint_1")
    for damage in ("model.safetensors", "progress.json"):
        if damage == "progress.json":
            (torn / damage).unlink()
        else:
            (torn / "export" / damage).write_bytes(b"half")
        assert finished(Location.of(run)) is None
    whole = ended(run / "checkpoint_3")
    listed(run, "checkpoint_1", "checkpoint_3")
    found = finished(Location.of(run))
    assert found is not None and found[0].steps == 9
    assert open_checkpoint(found[1].local_path, "test").folder == whole / "export"


def test_a_damaged_list_of_checkpoints_is_told(tmp_path: Path) -> None:
    (tmp_path / "checkpoint_manager_snapshot.json").write_text('{"checkpoint_res')
    with pytest.raises(TrainingError, match="is damaged"):
        reported(Location.of(tmp_path))
