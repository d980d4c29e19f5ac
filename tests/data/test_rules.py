"""Each rule fails on what it is for, and a version that breaks one is not published unless that is allowed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from data.curate import Curated
from data.errors import DataError
from data.layouts import Reject
from data.rules import RuleSettings, enforce, run_rules
from data.versions import SPLITS, Check
from tests.data.test_curate import candidate


def pictures(count: int = 40, captions: int = 0) -> list[Curated]:
    made = []
    for n in range(count):
        one = candidate(f"{n}.jpg", None if captions else ("human", "ai")[n // 4 % 2])
        row = replace(one.row, captions=("a dog",) * captions)
        made.append(Curated(row, one.particulars, one.particulars.id, SPLITS[n % 4]))
    return made


def failed(kept: list[Curated], rejects: list[Reject] | None = None, listed: int | None = None) -> set[str]:
    rejects = rejects or []
    total = len(kept) + len([r for r in rejects if r.reason != "not_listed"]) if listed is None else listed
    return {name for name, check in run_rules(kept, rejects, total, SPLITS, RuleSettings()).items() if not check.passed}


def test_sound_data_pass() -> None:
    assert failed(pictures(), [Reject("a", "truncated"), Reject("b", "not_listed")]) == set()
    assert failed(pictures(captions=5)) == set()


@pytest.mark.parametrize(
    ("spoil", "rules"),
    [
        (lambda kept: kept[:7], {"enough_pictures", "every_split_has_every_label"}),
        (lambda kept: [replace(p, split="train") for p in kept], {"no_split_is_empty"}),
        (lambda kept: [replace(p, group="one") for p in kept], {"no_group_on_two_sides", "no_giant_group"}),
        (lambda kept: [*kept, kept[0]], {"ids_are_unique"}),
        (
            lambda kept: [p for p in kept if p.row.label == "human" or p.split == "test"][:24],
            {"every_split_has_every_label", "classes_are_balanced"},
        ),
    ],
)
def test_spoiled_data_fail(spoil: Callable[[list[Curated]], list[Curated]], rules: set[str]) -> None:
    assert failed(spoil(pictures())) == rules


def test_rejects_and_rows_are_counted() -> None:
    kept = pictures()
    assert failed(kept, [Reject(str(n), "truncated") for n in range(11)]) == {"few_rejects"}
    assert failed(kept, [Reject(str(n), "contradictory_labels") for n in range(3)]) == {"labels_agree"}
    assert failed(kept, listed=41) == {"every_row_accounted_for"}
    assert failed(pictures(captions=4)) == {"captions_are_complete"}


def test_a_failed_rule_stops_unless_it_is_allowed() -> None:
    checks = {"good": Check(passed=True, detail=""), "bad": Check(passed=False, detail="3 of 4")}
    with pytest.raises(DataError, match=r"not published, 1 rule\(s\) failed: bad \(3 of 4\).*--allow-failed NAME"):
        enforce(checks, RuleSettings())
    assert enforce(checks, RuleSettings(allow_failed=["bad"])) == ["bad"]
