"""Plots and tables of results, without measuring."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from benchmarks import draw, plots
from benchmarks.report import COMMITTED


def test_the_last_way_is_held_against_each_round_by_round(tmp_path: Path) -> None:
    rates = {"plain": [10.0, 20.0, 30.0], "half": [5.0, 10.0, 15.0], "ours": [9.0, 16.0, 33.0]}
    text = plots.compared("some", rates, "pictures/s", 0.85, tmp_path)
    header, _, *rows = (line.split() for line in text.splitlines())
    assert header == ["way", "pictures/s", "lowest", "highest", "ours", "to", "it"]
    assert rows == [
        ["plain", "20", "10", "30", "0.900"],
        ["half", "10", "5", "15", "1.800"],
        ["ours", "16", "9", "33", "1.000"],
    ]
    drawn = (tmp_path / "some.svg").read_text()
    for words in ("goal: 0.85 of plain", "16  [9, 33]", "half", "pictures/s"):
        assert words in drawn
    plots.compared("some", rates, "pictures/s", 0.85, tmp_path)
    assert (tmp_path / "some.svg").read_text() == drawn


def test_one_round_has_no_whiskers(tmp_path: Path) -> None:
    plots.compared("one", {"plain": [10.0], "ours": [9.0]}, "pictures/s", folder=tmp_path)
    drawn = (tmp_path / "one.svg").read_text()
    assert ">10<" in drawn and "[" not in drawn.split("</metadata>")[-1].split("<defs>")[0] and "goal" not in drawn


def test_costs_by_the_number_of_pictures_are_told_and_drawn_step_by_step(tmp_path: Path) -> None:
    costs = {20_000: {"read": 1.25, "write": 0.5}, 1_000: {"read": 1.0, "write": 0.25}}
    text = plots.growth("grown", costs, {"read": "reading", "write": "writing"}, tmp_path)
    _, _, *rows = (line.split() for line in text.splitlines())
    assert rows == [["1,000", "1.000", "0.250", "1.250"], ["20,000", "1.250", "0.500", "1.750"]]
    drawn = (tmp_path / "grown.svg").read_text()
    for words in ("reading", "writing", "1,000", "20,000", "seconds for each thousand"):
        assert words in drawn


@pytest.mark.parametrize("name", draw.PROGRAMS)
def test_a_committed_result_is_drawn_from_its_file_alone(name: str, tmp_path: Path) -> None:
    shutil.copy(COMMITTED / f"{name}.json", tmp_path)
    assert len(draw.draw(tmp_path / f"{name}.json").splitlines()) >= 4
    assert (tmp_path / f"{name}.svg").is_file() and (COMMITTED / f"{name}.svg").is_file()


def test_what_a_newer_program_measures_as_well_is_drawn_too(tmp_path: Path) -> None:
    def drawn(name: str, result: dict[str, Any]) -> str:
        (tmp_path / f"{name}.json").write_text(json.dumps(result))
        return draw.draw(tmp_path / f"{name}.json")

    seconds = {"back_to_back_s": 40.0, "as_many_in_work_s": 45.0, "served_s": 50.0}
    text = drawn("serving_ratio", {"rounds": [seconds], "clients": 16, "photos_a_round": 64})
    assert "back to back, 16 in work" in text and "0.900" in text
    # a round may have two loops around its runs
    text = drawn(
        "annotate_throughput", {"bare_per_s_by_round": [1.0, 1.2, 1.4, 1.6], "annotate_per_s_by_round": [1.1, 1.2]}
    )
    assert text.splitlines()[2].split() == ["bare", "models", "1.3", "1.1", "1.5", "0.900"]


def test_a_result_that_nothing_draws_is_an_error_that_says_what_is(tmp_path: Path) -> None:
    (tmp_path / "training.json").write_text(json.dumps({"workers": {}}))
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(SystemExit, match="no 'overhead'"):
        draw.main([str(tmp_path / "training.json")])
    with pytest.raises(SystemExit, match="no 'other'; there are annotate_growth"):
        draw.main([str(tmp_path / "other.json")])
