"""Validation rules of a version: what must hold before it is published.

In: the pictures kept, the rejects, and the bounds. Out: a ``Check`` for each rule. Knows no files.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict, Field

from data.curate import Curated
from data.errors import DataError
from data.layouts import Reject
from data.versions import SPLITS, Check

_FULL_CAPTIONS = 5


class RuleSettings(BaseModel):
    """Bounds of the rules. A version that breaks one is not published."""

    model_config = ConfigDict(extra="forbid")

    min_pictures: int = Field(8, ge=1, description="pictures in all")
    max_rejected_share: float = Field(0.2, ge=0, le=1, description="of the rows, whatever the reason")
    max_contradictory_share: float = Field(0.02, ge=0, le=1, description="of the rows, rejected for their labels")
    min_class_share: float = Field(0.2, ge=0, le=0.5, description="pictures of the rarest label")
    max_group_share: float = Field(0.05, gt=0, le=1, description="of all pictures in one group; 16 are always allowed")
    min_five_captions_share: float = Field(0.9, ge=0, le=1, description="pictures with all five captions")
    allow_failed: list[str] = Field([], description="rules that may fail, by name: it is published with a warning")


def run_rules(
    pictures: Sequence[Curated],
    rejects: Sequence[Reject],
    listed: int,
    wanted: Sequence[str],
    rules: RuleSettings,
) -> dict[str, Check]:
    """Every rule that applies, by name.

    Args:
        pictures: those that are kept.
        rejects: those that are not; ``not_listed`` ones are no rows.
        listed: rows of the raw lists, and verified items.
        wanted: splits that must not be empty.
        rules: the bounds.
    """
    checks: dict[str, Check] = {}

    def check(name: str, passed: bool, detail: str) -> None:
        checks[name] = Check(passed=bool(passed), detail=detail)

    reasons = Counter(reject.reason for reject in rejects)
    rejected = sum(count for reason, count in reasons.items() if reason != "not_listed")
    check(
        "every_row_accounted_for",
        len(pictures) + rejected == listed,
        f"{listed} rows: {len(pictures)} kept, {rejected} rejected",
    )
    check("enough_pictures", len(pictures) >= rules.min_pictures, f"{len(pictures)}, at least {rules.min_pictures}")
    share = rejected / max(listed, 1)
    check(
        "few_rejects", share <= rules.max_rejected_share, f"{share:.2%} of rows, at most {rules.max_rejected_share:.2%}"
    )
    share = reasons["contradictory_labels"] / max(listed, 1)
    bound = rules.max_contradictory_share
    # two rows are the least that can contradict each other
    check("labels_agree", share <= bound or reasons["contradictory_labels"] <= 2, f"{share:.2%}, at most {bound:.2%}")
    ids = {picture.particulars.id for picture in pictures}
    check("ids_are_unique", len(ids) == len(pictures), f"{len(ids)} ids of {len(pictures)} pictures")

    counts = Counter(picture.split for picture in pictures)
    empty = [split for split in SPLITS if split in wanted and not counts[split]]
    check("no_split_is_empty", not empty, f"empty: {', '.join(empty) or 'none'}")
    sides: dict[str, set[str]] = defaultdict(set)
    sizes: Counter[str] = Counter()
    for picture in pictures:
        sides[picture.group].add(picture.split)
        sizes[picture.group] += 1
    torn = [group for group, splits in sides.items() if len(splits) > 1]
    check("no_group_on_two_sides", not torn, f"{len(torn)} of {len(sides)} groups")
    largest = max(sizes.values(), default=0)
    allowed = max(16, int(rules.max_group_share * len(pictures)))
    check("no_giant_group", largest <= allowed, f"the largest has {largest} pictures, at most {allowed}")

    labels = Counter(picture.row.label for picture in pictures if picture.row.label)
    if labels:
        rarest = min(labels.values()) / sum(labels.values()) if len(labels) > 1 else 0.0
        found = ", ".join(f"{count} {label}" for label, count in sorted(labels.items()))
        check(
            "classes_are_balanced",
            rarest >= rules.min_class_share,
            f"{found}; at least {rules.min_class_share:.0%} each",
        )
        lacking = [
            f"{split} has no {label}"
            for split in SPLITS
            if counts[split]
            for label in sorted(labels)
            if not any(p.split == split and p.row.label == label for p in pictures)
        ]
        check("every_split_has_every_label", not lacking, "; ".join(lacking) or "all there")
    elif pictures:
        listed_ones = [picture for picture in pictures if not picture.verified]  # a reviewer writes one caption
        full = sum(len(p.row.captions) >= _FULL_CAPTIONS for p in listed_ones) / max(1, len(listed_ones))
        check(
            "captions_are_complete",
            full >= rules.min_five_captions_share,
            f"{full:.1%} of the listed pictures have all five, at least {rules.min_five_captions_share:.1%}",
        )
    return checks


def enforce(checks: dict[str, Check], rules: RuleSettings) -> list[str]:
    """Names of rules that failed and were allowed to.

    Raises:
        DataError: a rule failed that was not.
    """
    failed = {name: check for name, check in checks.items() if not check.passed}
    stopping = [f"{name} ({check.detail})" for name, check in failed.items() if name not in rules.allow_failed]
    if stopping:
        raise DataError(
            f"not published, {len(stopping)} rule(s) failed: {'; '.join(stopping)}. Correct the input or the bounds, "
            "or accept it with --allow-failed NAME"
        )
    return sorted(failed)
