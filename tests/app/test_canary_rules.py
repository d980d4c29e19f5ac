"""What a trial's evidence leads to: noise promotes nothing and rolls nothing back, and a bad candidate is found."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from app.canary_rules import AllRules, Rules, RulesError, decide, difference, judge, read_rules, wilson
from app.trials import Evidence, Side

RULES = Rules(window_s=100, give_up_s=1000, fewest=100)


def side(ai: int = 30, human: int = 60, uncertain: int = 10, failed: int = 0, seconds: float = 0.2) -> Side:
    answers = ai + human + uncertain
    return Side(
        revisions={"r"},
        seconds=[seconds * (1 + 0.1 * (number % 10)) for number in range(answers)],
        codes={"ok": answers, "failed": failed},
        said={"ai": ai, "human": human, "uncertain": uncertain},
    )


def evidence(candidate: Side, agreeing: float = 0.97, production: Side | None = None) -> Evidence:
    count = candidate.asked
    agreements = [1.0] * round(count * agreeing) + [0.0] * (count - round(count * agreeing))
    return Evidence(production or side(), candidate, agreements)


def state(found: Evidence, rule: str, rules: Rules = RULES) -> str:
    return next(finding.state for finding in judge(found, rules) if finding.rule == rule)


def test_one_as_good_as_production_is_promoted_when_its_window_is_over_and_not_before() -> None:
    good = evidence(side())
    assert decide(good, RULES, age_s=99).action == "go_on"
    decision = decide(good, RULES, age_s=100)
    assert decision.action == "promote" and decision.answers == 100
    assert {finding.state for finding in decision.findings} == {"holds", "silent"}


def test_too_few_answers_promote_nothing_and_are_given_up_in_the_end() -> None:
    few = evidence(side(ai=3, human=5, uncertain=1))
    assert decide(few, RULES, age_s=999).action == "go_on"
    given_up = decide(few, RULES, age_s=1000)
    assert given_up.action == "roll_back" and "9 answers, 100 are needed" in given_up.why


@pytest.mark.parametrize(
    ("rule", "bad"),
    [
        ("errors", evidence(side(failed=20))),
        ("latency", evidence(side(seconds=2.0))),
        ("agreement", evidence(side(), agreeing=0.5)),
        ("uncertain", evidence(side(ai=20, human=30, uncertain=50))),
        ("ai", evidence(side(ai=80, human=10))),
        ("ai", evidence(side(ai=0, human=90))),
    ],
)
def test_what_is_surely_worse_is_rolled_back_at_once_and_the_rule_is_named(rule: str, bad: Evidence) -> None:
    decision = decide(bad, RULES, age_s=1)
    assert decision.action == "roll_back"
    assert rule in decision.why and state(bad, rule) == "broken"


def test_flipped_labels_are_found_by_agreement_even_where_the_classes_are_balanced() -> None:
    flipped = evidence(side(ai=45, human=45), agreeing=0.1, production=side(ai=45, human=45))
    assert state(flipped, "ai") == "holds"
    assert decide(flipped, RULES, age_s=1).action == "roll_back"


def test_what_noise_may_explain_is_neither_promoted_nor_rolled_back() -> None:
    unsure = evidence(side(failed=2))
    assert state(unsure, "errors") == "unclear"
    assert decide(unsure, RULES, age_s=500).action == "go_on"
    assert "errors" in decide(unsure, RULES, age_s=1000).why


def test_complaints_count_against_the_share_of_production() -> None:
    candidate, production = side(), side()
    candidate.judged, candidate.wrong = 40, 30
    production.judged, production.wrong = 40, 4
    assert state(evidence(candidate, production=production), "feedback") == "broken"
    candidate.wrong = 5
    assert state(evidence(candidate, production=production), "feedback") == "holds"
    candidate.judged = 5
    assert state(evidence(candidate, production=production), "feedback") == "silent"


def test_rules_about_verdicts_are_silent_for_text() -> None:
    text = Side(revisions={"r"}, seconds=[0.1] * 50, codes={"ok": 50})
    assert {finding.rule for finding in judge(Evidence(text, text), RULES)} == {
        "errors",
        "latency",
        "agreement",
        "feedback",
    }


def test_intervals_are_those_of_the_literature() -> None:
    # Newcombe 1998, table II, example (a): 56/70 against 48/80, 95 %: 0.0524 to 0.3339
    from app import canary_rules

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(canary_rules, "_Z", 1.959964)
        assert difference((48, 80), (56, 70)) == pytest.approx((0.2, 0.0524, 0.3339), abs=1e-4)
        assert wilson(0, 10) == pytest.approx((0, 0.2775), abs=1e-4)


def test_a_percentile_without_answers_is_no_number() -> None:
    assert math.isnan(Side().quantile(0.95))
    assert Side(seconds=[3.0, 1.0, 2.0]).quantile(0.95) == 3.0


def test_rules_are_read_strictly(tmp_path: Path) -> None:
    file = tmp_path / "rules.yaml"
    file.write_text("detector: {window_s: 60}\n")
    assert read_rules(file).detector.window_s == 60
    assert read_rules(file).captioner == read_rules(None).captioner == AllRules().captioner
    file.write_text("detector: {windows_s: 60}\n")
    with pytest.raises(RulesError, match="windows_s"):
        read_rules(file)
    with pytest.raises(RulesError, match="leave --rules out"):
        read_rules(tmp_path / "none.yaml")
