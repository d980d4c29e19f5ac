"""The gate: every rule is applied, what is missing fails, and a bad file of rules is named."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from train.detector_report import compare
from train.gate import GateError, Rules, find, judge, main, read_rules
from train.statistics import verdict_figures

REPORT = {
    "kind": "detector",
    "tiers": {"clean": {"roc_auc": {"value": 0.9, "low": 0.85}}, "768_q60": {"roc_auc": {"low": float("nan")}}},
    "scores": {"a.b": 3, "passed": True},
}


def rules(*detector: dict[str, object]) -> Rules:
    captioner = [{"figure": "scores.bleu4", "at_least": 0, "why": "x"}]
    return Rules.model_validate({"detector": [{"why": "so", **rule} for rule in detector], "captioner": captioner})


def test_the_projects_own_rules_are_valid() -> None:
    read = read_rules()
    assert {rule.figure for rule in read.detector} >= {"tiers.clean.roc_auc.low", "tiers.512_q40.roc_auc.low"}
    # every part of a report that may be missing has a rule, which then refuses nothing
    optional = {rule.figure.split(".")[0] for rule in read.detector + read.captioner if rule.optional}
    assert optional == {"unseen", "comparison", "templates", "made_up", "tags", "tags_add", "retrieval"}
    assert {rule.figure for rule in read.tagger if not rule.optional} >= {"tags.satisfy_rules", "tags.supported"}


def test_rules_ask_for_lower_ends_and_the_starter_models_have_them() -> None:
    read = read_rules()
    asked = {rule.figure for rule in read.detector + read.captioner}
    assert asked >= {"intervals.bleu4.low", "intervals.cider.low", "tiers.768_q60.real_accuracy.low"}
    assert not [figure for figure in asked if figure.endswith(".value") or figure.startswith("scores.")]
    results = Path(__file__).parents[2] / "benchmarks" / "results"
    detector = json.loads((results / "detector_quality.json").read_text())
    assert judge({"kind": "detector", "tiers": detector["test"]}, read).passed
    lower = {
        name: low
        for name, (low, _) in json.loads((results / "captioner_quality.json").read_text())["intervals_95"].items()
    }
    own = [rule for rule in read.captioner if rule.figure.startswith("intervals.")]
    report = {"kind": "captioner", "intervals": {name: {"low": low} for name, low in lower.items()}}
    assert judge(report, read.model_copy(update={"captioner": own})).passed


def test_a_handful_of_pictures_passes_by_no_luck() -> None:
    def failed(ai: int, real: int) -> set[str]:
        labels = np.repeat([1, 0], [ai, real])
        figures = verdict_figures(np.where(labels, 0.99, 0.01), labels, {"human_below": 0.3, "ai_above": 0.6}, 20, 0)
        report = {"kind": "detector", "tiers": dict.fromkeys(("clean", "768_q60", "512_q40"), figures)}
        return {check.rule.figure for check in judge(report, read_rules()).checks if not check.passed}

    shares = {"tiers.clean.real_accuracy.low", "tiers.768_q60.real_accuracy.low"}
    assert failed(3, 3) == shares | {"tiers.clean.ai", "tiers.clean.real"}
    assert failed(3, 116) == {"tiers.clean.ai"}
    assert failed(71, 50) == shares  # nothing wrong in fifty photos: one in twenty may be, and none of them shown
    assert failed(50, 116) == set()


def test_a_detector_that_hardly_ever_answers_ai_is_refused() -> None:
    random = np.random.default_rng(0)
    labels = np.repeat([1, 0], [80, 120])
    theirs = np.where(labels, 0.9, 0.05) + random.uniform(-0.04, 0.04, len(labels))
    worse = np.where(random.random(len(labels)) < 0.15, 1 - theirs, theirs)

    def failed(above: float, bad_delivery: np.ndarray = theirs) -> set[str]:
        tiers = {"clean": theirs, "768_q60": theirs, "512_q40": bad_delivery}
        borders, groups = {"human_below": 0.3, "ai_above": above}, np.arange(len(labels))
        report = {
            "kind": "detector",
            "tiers": {tier: verdict_figures(own, labels, borders, 20, 0) for tier, own in tiers.items()},
            "comparison": {
                tier: compare(own, theirs, labels, above, 0.5, groups, 20, 0) for tier, own in tiers.items()
            },
        }
        return {check.rule.figure for check in judge(report, read_rules()).checks if not check.passed}

    assert failed(above=0.5) == set()
    # one real photo that a machine made is enough for such a border
    assert failed(above=0.999) == {"tiers.clean.ai_recall.low", "comparison.clean.ai_recall.low"}
    assert failed(above=0.5, bad_delivery=worse) == {"comparison.512_q40.roc_auc.low"}


def test_what_was_not_measured_is_no_success_either() -> None:
    judgement = judge(REPORT, rules({"figure": "unseen.clean", "at_least": 0.5, "optional": True}))
    assert judgement.passed and str(judgement.checks[0]).startswith("absent unseen.clean >= 0.5: not in the report")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("tiers.clean.roc_auc.low", 0.85),
        ("scores.a.b", 3.0),
        ("scores.passed", 1.0),
        ("tiers.clean.roc_auc", None),
        ("tiers.clean.nothing", None),
        ("tiers.clean.roc_auc.low.deeper", None),
    ],
)
def test_a_figure_is_found_by_its_path(path: str, value: float | None) -> None:
    assert find(REPORT, path) == value


@pytest.mark.parametrize(
    ("rule", "passed"),
    [
        ({"figure": "tiers.clean.roc_auc.low", "at_least": 0.85}, True),
        ({"figure": "tiers.clean.roc_auc.low", "at_least": 0.86}, False),
        ({"figure": "tiers.clean.roc_auc.low", "at_most": 0.8}, False),
        ({"figure": "tiers.768_q60.roc_auc.low", "at_least": 0.1}, False),  # not a number
        ({"figure": "comparison.clean", "at_least": -1}, False),  # not there
        ({"figure": "comparison.clean", "at_least": -1, "optional": True}, True),
        ({"figure": "tiers.claen.roc_auc.low", "at_least": -1, "optional": True}, False),  # a slip of the pen
    ],
)
def test_a_rule_holds_or_fails(rule: dict[str, object], passed: bool) -> None:
    judgement = judge(REPORT, rules(rule))
    assert judgement.passed is passed
    assert len(judgement.failures) == (not passed)


def test_one_failure_is_enough() -> None:
    good = {"figure": "tiers.clean.roc_auc.low", "at_least": 0.5}
    assert not judge(REPORT, rules(good, {"figure": "scores.a.b", "at_most": 2})).passed


def test_a_report_of_no_kind_is_refused() -> None:
    with pytest.raises(GateError, match="of kind 'poet'"):
        judge({"kind": "poet"}, rules({"figure": "x", "at_least": 0}))
    with pytest.raises(GateError, match="none for a tagger"):
        judge({"kind": "tagger"}, rules({"figure": "x", "at_least": 0}))


@pytest.mark.parametrize(
    "text", ["", "detector: []", "detector: [{figure: a, why: b}]\ncaptioner: []", "{", "nonsense: 1"]
)
def test_bad_rules_are_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "gate.yaml").write_text(text)
    with pytest.raises(GateError, match=r"gate\.yaml"):
        read_rules(tmp_path / "gate.yaml")
    with pytest.raises(GateError, match="no gate"):
        read_rules(tmp_path / "other.yaml")


def test_the_command_ends_with_a_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "report.json").write_text(json.dumps(REPORT))
    with pytest.raises(SystemExit, match="checks failed"):
        main([str(tmp_path / "report.json")])
    assert "FAILED tiers.512_q40.roc_auc.low >= 0.65: not in the report" in capsys.readouterr().out
