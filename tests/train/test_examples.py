"""Test examples: what reading one after another keeps in memory."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest

from tests.train.small import traced, write_version
from train import examples
from train.examples import read_examples


def test_one_row_group_of_pictures_is_in_memory_whatever_their_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[weakref.ref[Any]] = []

    def images(*of: Any) -> Any:
        found = read_images(*of)
        held.append(weakref.ref(found))
        return found

    read_images = examples._images
    monkeypatch.setattr(examples, "_images", images)
    rows = [
        {"image": traced(number, number % 2), "label": ("human", "ai")[number % 2], "split": "test"}
        for number in range(12)
    ]
    found = read_examples(str(write_version(tmp_path, "aivshuman", rows, per_file=4)), "detector").examples
    assert [example.read() for example in found] == [row["image"] for row in rows]
    assert [group() is None for group in held] == [True, True, False]  # three files, each read once
