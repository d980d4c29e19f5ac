"""Whether a retrained detector may take the place of the one it was trained from.

In: probabilities of both on the same test pictures, those that the older version held out already and those that came
since, and their groups of near-duplicates: each says as much as one picture. Out: rules with what was found. *Not worse
on the old*: the paired difference is not below nought beyond noise, and its value not below what is tolerated. *Better
on the new*: the lower end of the paired difference's interval is above nought. Knows no model, no file and no MLflow;
the gate for every model is ``train.gate``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from train.statistics import Interval, auc, paired_difference


class RetrainRules(BaseModel):
    """What a retrained detector must show."""

    model_config = ConfigDict(extra="forbid")

    tolerated_loss: float = Field(0.02, ge=0, description="of ROC AUC on the old test, where noise may explain it")
    fewest_new: int = Field(
        10,
        ge=2,
        description="new AI pictures in the test split, near-duplicates counted once, without which nothing is shown",
    )
    must_be_better: bool = Field(True, description="on the new pictures; off: a model that is as good will do")
    resamples: int = Field(2000, ge=100)


class Shown(BaseModel):
    """A rule and what was found."""

    rule: str
    passed: bool
    text: str
    pictures: int
    difference: Interval | None = None


def compare(
    labels: Mapping[str, str],
    ours: Mapping[str, float],
    theirs: Mapping[str, float],
    old: set[str],
    groups: Mapping[str, str],
    rules: RetrainRules,
    seed: int = 0,
) -> list[Shown]:
    """Hold the candidate (``ours``) against production.

    Args:
        labels: id -> human or ai, of the whole test split.
        ours, theirs: id -> probability of AI.
        old: ids of pictures that the older version had.
        groups: id -> group of near-duplicates.
    """
    ids = sorted(labels)
    real = [each for each in ids if labels[each] == "human"]
    ai = [each for each in ids if labels[each] == "ai"]

    def difference(chosen_ai: Sequence[str], chosen_real: Sequence[str]) -> Interval:
        sides = [
            [np.array([chances[each] for each in part]) for part in (chosen_ai, chosen_real)]
            for chances in (ours, theirs)
        ]
        of = [np.array([groups[each] for each in part]) for part in (chosen_ai, chosen_real)]
        return paired_difference(auc, sides[0], sides[1], rules.resamples, seed, of)

    shown = []
    old_ai, old_real = [each for each in ai if each in old], [each for each in real if each in old]
    if old_ai and old_real:
        found = difference(old_ai, old_real)
        passed = found["high"] >= 0 and found["value"] >= -rules.tolerated_loss
        text = f"ROC AUC {_signed(found)}, at most {rules.tolerated_loss} less"
        count = len(old_ai) + len(old_real)
        shown.append(
            Shown(rule="not worse on the old test", passed=passed, text=text, pictures=count, difference=found)
        )
    else:
        text = "the older version has no test pictures of both classes in this one"
        shown.append(Shown(rule="not worse on the old test", passed=False, text=text, pictures=0))
    new_ai = [each for each in ai if each not in old]
    new = len({groups[each] for each in new_ai})
    if new >= rules.fewest_new:
        found = difference(new_ai, real)
        passed = found["low"] > 0 if rules.must_be_better else found["high"] >= 0
        text = f"ROC AUC of new AI pictures {_signed(found)}"
        shown.append(Shown(rule="better on the new", passed=passed, text=text, pictures=len(new_ai), difference=found))
    else:
        counted = f"{new} new AI pictures in the test split (near-duplicates counted once)"
        text = f"{counted}, {rules.fewest_new} are needed to show anything"
        passed = not rules.must_be_better
        shown.append(Shown(rule="better on the new", passed=passed, text=text, pictures=len(new_ai)))
    return shown


def _signed(found: Interval) -> str:
    return f"{found['value']:+.3f} [{found['low']:+.3f}, {found['high']:+.3f}]"
