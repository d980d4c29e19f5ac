"""The steps by which the starter models are made again."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
from pydantic_settings import CliApp

from train.evaluate import EvaluateCommands
from train.starter import Starter, steps


def made(only: str = "detector,captioner") -> list[list[str]]:
    return list(steps(Starter(labelled="raw", captioned="raw", work=Path("work"), only=only)))


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


@pytest.mark.parametrize("name", sorted({step[0] for step in made()}))
def test_every_step_is_a_program(name: str) -> None:
    assert callable(importlib.import_module(name).main)
