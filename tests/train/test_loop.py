"""The loop without Ray: a run that was stopped anywhere ends as an undisturbed one does, and a loss that is no number
ends it with a reason."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.fs
import pytest
import torch
from ray.train import Checkpoint

from data.versions import open_version
from train.beside import batches_beside
from train.detector import DetectorJob, DetectorTraining, prepare_job
from train.job import share_of_batch
from train.loop import export, fit_locally, train_steps, work
from train.module import NonFinite, TrainingError
from train.scratch import scratch_of
from train.strategies import local_strategy
from train.stream import Pictures, local_batches, rebatch
from train.watch import Watch


@pytest.fixture
def job(version: Path, vit: Path, tmp_path: Path) -> DetectorJob:
    config = DetectorTraining(
        data=str(version), model=str(vit), output=str(tmp_path / "out"), epochs=3, batch_size=8, learning_rate=1e-3,
        checkpoint_every=4, loaders=1, threads=1, damage={"min_long_side_px": 64},  # type: ignore[arg-type]
    )  # fmt: skip
    return prepare_job(config, open_version(version))[0]


def quiet(_: str) -> None:
    """Says nothing."""


class Kept:
    """Keeps the checkpoints that a watch reports."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.steps = folder, list[int]()

    def __call__(self, metrics: dict[str, Any], folder: Path | None, wait: bool) -> None:
        assert folder is not None
        self.steps.append(metrics["step"])
        shutil.move(folder, self.folder / str(metrics["step"]))


def weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def changed(job: DetectorJob, **settings: object) -> DetectorJob:
    return replace(job, config=DetectorTraining.model_validate(job.config.model_dump() | settings))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_resumed_run_ends_with_the_same_weights_and_steps(job: DetectorJob, tmp_path: Path, accumulate: int) -> None:
    job = changed(job, accumulate=accumulate)
    for name in ("kept", "whole"):
        (tmp_path / name).mkdir()
    kept = Kept(tmp_path / "kept")
    outcome, module, watch = fit_locally(job, tmp_path / "whole", "here", report=kept, say=quiet)
    assert outcome.steps == outcome.total_steps == 18
    assert [step for step, _ in outcome.losses] == list(range(1, 19))
    assert set(kept.steps) >= {4, 6, 8, 12, 16, 18}  # in the middle of epochs, and after each validation
    for stop in (4, 6, 8, 16):
        scratch = tmp_path / f"resumed{stop}"
        scratch.mkdir()
        again, resumed, watched = fit_locally(
            job, scratch, "here", resume=tmp_path / "kept" / str(stop), report=lambda *_: None, say=quiet
        )
        assert again.steps == 18 and again.losses[0][0] == stop + 1
        assert np.allclose([loss for _, loss in again.losses], [loss for _, loss in outcome.losses[stop:]], rtol=1e-5)
        assert all(torch.allclose(value, weights(resumed)[name], atol=1e-6) for name, value in weights(module).items())
        assert watched.best == pytest.approx(watch.best)
        assert watched.validations == watch.validations == 3


def test_a_finished_checkpoint_has_nothing_left_to_train(job: DetectorJob, tmp_path: Path) -> None:
    for name in ("kept", "whole", "again"):
        (tmp_path / name).mkdir()
    fit_locally(job, tmp_path / "whole", "here", report=Kept(tmp_path / "kept"), say=quiet)
    again, _, watch = fit_locally(job, tmp_path / "again", "here", resume=tmp_path / "kept" / "18", say=quiet)
    assert again.steps == 18 and not again.losses
    assert (tmp_path / "again" / "best.safetensors").is_file() and watch.best > 0


def test_the_best_weights_are_for_the_first_worker_alone(job: DetectorJob, tmp_path: Path) -> None:
    for name in ("kept", "whole", "first", "second"):
        (tmp_path / name).mkdir()
    job = changed(job, max_steps=1)
    _, _, before = fit_locally(job, tmp_path / "whole", "here", report=Kept(tmp_path / "kept"), say=quiet)
    first, second = (Watch(job.config, 6, tmp_path / name) for name in ("first", "second"))
    assert first.restore(tmp_path / "kept" / "1") == second.restore(tmp_path / "kept" / "1", first=False) == 1
    assert first.progress() == second.progress() == before.progress()
    assert {file.name for file in (tmp_path / "first").iterdir()} == {"best.safetensors", "judged.json"}
    assert not any((tmp_path / "second").iterdir())


@pytest.mark.parametrize("there", ["local", "elsewhere"])
def test_what_a_run_goes_on_from_is_not_kept_in_the_temporary_folder(
    job: DetectorJob, tmp_path: Path, there: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read where it lies; from elsewhere one copy is fetched, and gone when training begins."""
    for name in ("kept", "whole", "temporary"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    job = changed(job, max_steps=5)
    fit_locally(job, tmp_path / "whole", "here", report=Kept(tmp_path / "kept"), say=quiet)
    local, folder = pyarrow.fs.LocalFileSystem(), tmp_path / "kept" / "4"
    checkpoint = Checkpoint(str(folder), local)
    if there == "elsewhere":
        checkpoint = Checkpoint("4", pyarrow.fs.SubTreeFileSystem(str(tmp_path / "kept"), local))
    context = SimpleNamespace(get_world_rank=lambda: 0, get_world_size=lambda: 1, get_experiment_name=lambda: "a run")
    monkeypatch.setattr("ray.train.get_context", lambda: context)
    monkeypatch.setattr("ray.train.get_checkpoint", lambda: checkpoint)
    monkeypatch.setattr("ray.train.report", lambda *_, **__: None)
    found: list[tuple[str, bool]] = []
    step = Watch.on_train_batch_end

    def copies() -> bool:
        return any((tmp_path / "temporary").rglob("last.ckpt"))

    def steps(job: Any, watch: Watch, *parts: Any) -> Any:
        found.append(("begins", copies()))
        return train_steps(job, watch, local_strategy(), [], *parts[2:-1], "here")

    def ended(watch: Watch, *of_step: Any) -> None:
        step(watch, *of_step)
        found.append((f"step {watch.step}", copies()))

    monkeypatch.setattr("train.loop.train_steps", steps)
    monkeypatch.setattr(Watch, "on_train_batch_end", ended)
    answer = work({"job": job, "holds": None})
    assert answer["status"] == "finished" and (folder / "last.ckpt").is_file()
    assert found == [("begins", there == "elsewhere"), ("step 5", False)]


def test_a_checkpoint_on_its_way_outlives_the_run_that_wrote_it(job: DetectorJob, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    on_their_way: list[Path] = []
    last = changed(job, max_steps=4)
    fit_locally(last, tmp_path / "run", "here", report=lambda _, folder, __: on_their_way.append(folder), say=quiet)
    shutil.rmtree(tmp_path / "run")
    assert on_their_way and all((folder / "last.ckpt").is_file() for folder in on_their_way)


def test_what_a_killed_worker_left_is_removed_by_its_successor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name in ("training-a_run-rank0-dead", "training-a_run-rank1-dead", "training-other-rank0-dead"):
        (tmp_path / name / "checkpoint-1").mkdir(parents=True)
    with scratch_of("a/run", 0) as living:
        assert not (tmp_path / "training-a_run-rank0-dead").exists()
        with scratch_of("a/run", 0) as second:
            assert living.is_dir() and second.is_dir() and living.parent != second.parent
        assert not second.parent.exists()
        (living.parent / "checkpoint-2").mkdir()
    assert not living.exists() and (living.parent / "checkpoint-2").is_dir(), "it is on its way"
    names = {folder.name for folder in tmp_path.iterdir()}
    assert names == {"training-a_run-rank1-dead", "training-other-rank0-dead", living.parent.name}


def test_a_loss_that_is_no_number_is_a_reason_to_end(job: DetectorJob, tmp_path: Path) -> None:
    with pytest.raises(NonFinite, match="--learning-rate"):
        fit_locally(changed(job, learning_rate=1e30, gradient_clip=0, warmup=0), tmp_path, "here", say=quiet)


def test_the_deadline_ends_a_run_with_a_checkpoint(job: DetectorJob, tmp_path: Path) -> None:
    for name in ("kept", "whole"):
        (tmp_path / name).mkdir()
    kept = Kept(tmp_path / "kept")
    outcome, _, _ = fit_locally(replace(job, deadline=0.0), tmp_path / "whole", "here", report=kept, say=quiet)
    assert outcome.status == "stopped" and 1 <= outcome.steps < 18
    assert kept.steps == [outcome.steps] and not outcome.metrics
    (tmp_path / "again").mkdir()
    resume = tmp_path / "kept" / str(outcome.steps)
    again, _, _ = fit_locally(job, tmp_path / "again", "here", resume=resume, report=lambda *_: None, say=quiet)
    undisturbed, _, _ = fit_locally(job, tmp_path / "whole", "here", say=quiet)
    assert (again.status, again.steps) == ("finished", 18)
    end = undisturbed.losses[-len(again.losses) :]
    assert np.allclose([loss for _, loss in again.losses], [loss for _, loss in end], rtol=1e-5)
    assert again.metrics["val_loss"] == pytest.approx(undisturbed.metrics["val_loss"], rel=1e-4)


def test_the_deadline_on_the_last_step_ends_the_run_with_its_validation(job: DetectorJob, tmp_path: Path) -> None:
    late = replace(changed(job, max_steps=1, validate_every=100), deadline=0.0)
    outcome, module, watch = fit_locally(late, tmp_path, "here", say=quiet)
    assert (outcome.status, outcome.steps) == ("finished", 1) and 0 <= outcome.metrics["val_auc"] <= 1
    assert export(late, module, watch, tmp_path / "export")["val_auc"] == outcome.metrics["val_auc"]


def test_no_improvement_ends_a_run_early_and_the_best_weights_stay(job: DetectorJob, tmp_path: Path) -> None:
    outcome, _module, watch = fit_locally(
        changed(job, learning_rate=1e-12, weight_decay=0.0, patience=2, epochs=6), tmp_path, "here", say=quiet
    )
    assert watch.stopped == "patience" and outcome.status == "finished" and outcome.steps < 36
    assert (tmp_path / "best.safetensors").is_file()
    assert outcome.metrics["val_auc"] == watch.best


def test_a_run_that_patience_ended_is_not_trained_on_where_its_export_was_lost(
    job: DetectorJob, tmp_path: Path
) -> None:
    for name in ("kept", "whole", "again"):
        (tmp_path / name).mkdir()
    job = changed(job, learning_rate=1e-12, weight_decay=0.0, patience=1, validate_every=1)
    kept = Kept(tmp_path / "kept")
    ended, _, _ = fit_locally(job, tmp_path / "whole", "here", report=kept, say=quiet)
    resume = tmp_path / "kept" / str(ended.steps)
    again, module, watch = fit_locally(job, tmp_path / "again", "here", resume=resume, say=quiet)
    assert (again.status, again.reason, again.steps, again.losses) == ("finished", "patience", ended.steps, [])
    assert again.metrics == ended.metrics
    assert export(job, module, watch, tmp_path / "export")["val_auc"] == ended.metrics["val_auc"]


def test_batches_are_the_same_in_a_process_beside_and_of_any_block_size(version: Path, job: DetectorJob) -> None:
    source = job.train_source()
    pieces = [np.array([0, 5, 3, 1]), np.array([0, 2, 40, 7, 9]), np.array([1, 5])]
    here = list(local_batches(source, pieces, 3))
    assert [batch["row"].tolist() for batch in here] == [[5, 3, 1], [2, 40, 7], [9, 5]]
    assert [batch["epoch"].tolist() for batch in here] == [[0] * 3, [0] * 3, [0, 1]]
    assert not np.array_equal(here[0]["pixels"][0], here[2]["pixels"][1])  # the same picture, damaged anew
    for one, other in zip(here, batches_beside(source, pieces, 3), strict=True):
        assert all(np.array_equal(one[name], other[name]) for name in one)
    parts = [{"row": np.arange(first, first + 2)} for first in range(0, 10, 2)]
    assert [batch["row"].tolist() for batch in rebatch(iter(parts), 4)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    large = [{"row": np.arange(7)}, {"row": np.arange(7, 9)}]
    assert [batch["row"].tolist() for batch in rebatch(iter(large), 2)] == [[0, 1], [2, 3], [4, 5], [6, 7], [8]]


def test_the_first_rows_of_a_split_are_a_split(version: Path, job: DetectorJob) -> None:
    pictures = Pictures.of(open_version(version), "train", job.views)
    assert pictures.groups == (8,) * 6
    few = pictures.first(11)
    assert few.groups == (8, 3) and len(few.files) == 2
    assert np.array_equal(next(few.load(0, np.array([10])))["pixels"], next(pictures.load(0, np.array([10])))["pixels"])


def test_a_batch_that_does_not_divide_is_an_error(job: DetectorJob) -> None:
    with pytest.raises(TrainingError, match="--batch-size 8 does not divide"):
        share_of_batch(job.config, 3)


def test_a_run_ends_with_a_validation_whatever_its_interval(job: DetectorJob, tmp_path: Path) -> None:
    outcome, module, watch = fit_locally(changed(job, max_steps=5, validate_every=100), tmp_path, "here", say=quiet)
    assert outcome.steps == 5 and 0 <= outcome.metrics["val_auc"] <= 1
    figures = export(job, module, watch, tmp_path / "export")
    assert figures["val_auc"] == outcome.metrics["val_auc"]
    assert {"config.json", "model.safetensors", "card.json", "preprocessor_config.json"} <= {
        file.name for file in (tmp_path / "export").iterdir()
    }
