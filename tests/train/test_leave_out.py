"""Leave one generator out: which pictures are examined."""

from __future__ import annotations

from pathlib import Path

from train.aivshuman import LabelledPicture
from train.leave_out import LeaveOutConfig, baseline_pictures, examined_pictures


def settings(**changes: int) -> LeaveOutConfig:
    values: dict[str, object] = {"data": Path("d"), "head": Path("h"), "result": Path("r.json"), "resamples": 200}
    return LeaveOutConfig.model_validate(values | changes)


def picture(number: int, label: int, generator: str, split: str) -> LabelledPicture:
    return LabelledPicture(f"{number:04d}", Path("x"), label, "source", generator, number, split)


def test_rare_generators_are_examined_whole_and_common_ones_in_part() -> None:
    pictures = [picture(number, 1, "common", "test" if number % 2 else "train") for number in range(40)]
    pictures += [picture(100 + number, 1, "rare", ("train", "val", "test")[number % 3]) for number in range(6)]
    pictures += [picture(200 + number, 0, "photo", "test" if number % 2 else "train") for number in range(60)]
    chosen = examined_pictures(pictures, settings(many=20, most=5))
    assert sum(p.generator == "rare" for p in chosen) == 6
    assert [p.id for p in chosen if p.generator == "common"] == ["0001", "0003", "0005", "0007", "0009"]
    assert all(p.split == "test" for p in chosen if p.label == 0) and sum(p.label == 0 for p in chosen) == 30

    asked, rows = baseline_pictures(chosen, settings(baseline_most=3, baseline_photos=4))
    assert {name: int(row.sum()) for name, row in rows.items()} == {"common": 3, "rare": 3, "photo": 4}
    assert len(asked) == 10
