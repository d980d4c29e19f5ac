"""What a trial's evidence says: rules in configuration, a finding for each, and one decision.

In: ``Evidence`` (``app.trials``), rules, the trial's age. Out: a decision with every figure that it rests on. A rule is
*broken* when even noise (99 % intervals) does not explain what was seen, *unclear* when the figure is beyond its limit
and noise may explain it, *silent* while there is too little. Any broken rule rolls back, at once; a trial is promoted
when it has lasted its window, has enough answers and no rule is broken or unclear. Pure functions: knows no store, no
Serve and no clock.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from app.config import ModelName
from app.trials import Evidence, Side

#: Of the normal distribution: a look every few seconds must not take chance for a fault.
_Z = 2.58

State = Literal["holds", "unclear", "broken", "silent"]
Action = Literal["promote", "roll_back", "go_on"]


class RulesError(ValueError):
    """The rules cannot be read; the message says where and why."""


class Rules(BaseModel):
    """Rules for one model's trial. An excess is the candidate's share minus production's."""

    model_config = ConfigDict(extra="forbid")

    window_s: float = Field(1800.0, gt=0, description="a trial lasts at least so long before it is promoted")
    give_up_s: float = Field(86400.0, gt=0, description="what has not been promoted by then is rolled back")
    fewest: int = Field(200, ge=1, description="answers of the candidate without which nothing is promoted")
    fewest_to_judge: int = Field(30, ge=2, description="answers of either, or comparisons, before a rule says anything")
    fewest_feedback: int = Field(10, ge=2, description="events of feedback on either before their rule says anything")
    error_excess: float = Field(0.01, ge=0, le=1, description="of answers that failed")
    uncertain_excess: float = Field(0.10, ge=0, le=1, description="of verdicts that are `uncertain`")
    ai_shift: float = Field(0.15, ge=0, le=1, description="of verdicts that are `ai`, in either direction")
    wrong_excess: float = Field(0.10, ge=0, le=1, description="of feedback that says wrong")
    latency_ratio: float = Field(1.5, gt=0, description="95th percentile of the time, against production's")
    latency_slack_s: float = Field(0.1, ge=0, description="added to what the ratio allows")
    agreement: float = Field(0.85, ge=0, le=1, description="least mean agreement with production's answers")


class AllRules(BaseModel):
    """A file of rules: what it does not say is as in ``Rules``."""

    model_config = ConfigDict(extra="forbid")

    detector: Rules = Field(Rules())
    captioner: Rules = Field(Rules(agreement=0.3))
    tagger: Rules = Field(Rules(agreement=0.3))

    def of(self, model: ModelName) -> Rules:
        """A model's rules."""
        rules: Rules = getattr(self, model)
        return rules


class Finding(BaseModel):
    """One rule and what was found."""

    rule: str
    state: State
    production: float | None = None
    candidate: float | None = None
    limit: float
    text: str

    def __str__(self) -> str:
        return f"{self.state:7} {self.rule}: {self.text}"


class Decision(BaseModel):
    """What to do about a trial, and why."""

    action: Action
    why: str
    age_s: float
    answers: int = Field(description="of the candidate, failed ones included")
    findings: list[Finding]


def read_rules(path: Path | None) -> AllRules:
    """The rules of a YAML file; the defaults without one.

    Raises:
        RulesError: it is missing or not understood.
    """
    if path is None:
        return AllRules()
    try:
        return AllRules.model_validate(yaml.safe_load(path.read_text()) or {})
    except OSError as error:
        raise RulesError(f"no rules at {path}: {error.strerror}; leave --rules out for the defaults") from error
    except (yaml.YAMLError, ValidationError) as error:
        raise RulesError(f"{path} holds no valid rules: {error}") from error


def decide(evidence: Evidence, rules: Rules, age_s: float) -> Decision:
    """What to do about a trial of that age."""
    findings = judge(evidence, rules)
    answers = evidence.candidate.asked
    broken = [finding for finding in findings if finding.state == "broken"]
    unclear = [finding for finding in findings if finding.state == "unclear"]
    action: Action = "go_on"
    if broken:
        action, why = "roll_back", "; ".join(f"{found.rule}: {found.text}" for found in broken)
    elif age_s >= rules.window_s and answers >= rules.fewest and not unclear:
        action, why = "promote", f"{answers} answers in {age_s:.0f} s, and no rule speaks against it"
    elif age_s >= rules.give_up_s:
        told = ", ".join(found.rule for found in unclear) or f"{answers} answers, {rules.fewest} are needed"
        action, why = "roll_back", f"not promoted after {age_s:.0f} s: {told}"
    elif unclear:
        why = "not sure yet: " + "; ".join(f"{found.rule}: {found.text}" for found in unclear)
    else:
        why = f"{answers} of {rules.fewest} answers, {age_s:.0f} of {rules.window_s:.0f} s"
    return Decision(action=action, why=why, age_s=round(age_s, 1), answers=answers, findings=findings)


def judge(evidence: Evidence, rules: Rules) -> list[Finding]:
    """A finding for each rule that is about this kind of model."""
    production, candidate = evidence.production, evidence.candidate
    least, errors = rules.fewest_to_judge, (production.errors, production.asked)
    findings = [
        _shares("errors", errors, (candidate.errors, candidate.asked), rules.error_excess, least),
        _latency(production, candidate, rules),
        _agreement(evidence.agreements, rules),
        _shares(
            "feedback",
            (production.wrong, production.judged),
            (candidate.wrong, candidate.judged),
            rules.wrong_excess,
            rules.fewest_feedback,
        ),
    ]
    if production.said or candidate.said:
        for name, verdict, limit in (("uncertain", "uncertain", rules.uncertain_excess), ("ai", "ai", rules.ai_shift)):
            ours, theirs = _verdicts(candidate, verdict), _verdicts(production, verdict)
            findings.append(_shares(name, theirs, ours, limit, least, both_ways=name == "ai"))
    return findings


def _verdicts(side: Side, verdict: str) -> tuple[int, int]:
    return side.said.get(verdict, 0), sum(side.said.values())


def wilson(hits: int, of: int) -> tuple[float, float]:
    """99 % interval of a share (Wilson 1927)."""
    if not of:
        return 0.0, 1.0
    share, square = hits / of, _Z**2
    centre = (share + square / (2 * of)) / (1 + square / of)
    half = _Z / (1 + square / of) * math.sqrt(share * (1 - share) / of + square / (4 * of * of))
    return max(0.0, centre - half), min(1.0, centre + half)


def difference(theirs: tuple[int, int], ours: tuple[int, int]) -> tuple[float, float, float]:
    """Our share minus theirs, each (hits, of), and its 99 % interval (Newcombe 1998, method 10)."""
    first, second = ours[0] / ours[1], theirs[0] / theirs[1]
    (low, high), (their_low, their_high) = wilson(*ours), wilson(*theirs)
    value = first - second
    return (
        value,
        value - math.hypot(first - low, their_high - second),
        value + math.hypot(high - first, second - their_low),
    )


def _shares(
    rule: str, theirs: tuple[int, int], ours: tuple[int, int], limit: float, least: int, both_ways: bool = False
) -> Finding:
    if min(theirs[1], ours[1]) < least:
        text = f"{ours[1]} and {theirs[1]} of at least {least}"
        return Finding(rule=rule, state="silent", limit=limit, text=text)
    value, low, high = difference(theirs, ours)
    surely = max(low, -high) if both_ways else low
    beyond = abs(value) if both_ways else value
    state: State = "broken" if surely > limit else "unclear" if beyond > limit else "holds"
    production, candidate = theirs[0] / theirs[1], ours[0] / ours[1]
    return Finding(
        rule=rule,
        state=state,
        production=round(production, 4),
        candidate=round(candidate, 4),
        limit=limit,
        text=f"{candidate:.1%} of {ours[1]} against {production:.1%} of {theirs[1]}, at most {limit:.1%} more allowed",
    )


def _latency(production: Side, candidate: Side, rules: Rules) -> Finding:
    counts = len(candidate.seconds), len(production.seconds)
    if min(counts) < rules.fewest_to_judge:
        text = f"{counts[0]} and {counts[1]} of at least {rules.fewest_to_judge}"
        return Finding(rule="latency", state="silent", limit=rules.latency_ratio, text=text)
    ours, theirs = candidate.quantile(0.95), production.quantile(0.95)
    limit = rules.latency_ratio * theirs + rules.latency_slack_s
    # the lower end of the percentile's interval, by the binomial distribution of ranks
    surely = candidate.quantile(max(0.0, 0.95 - _Z * math.sqrt(0.95 * 0.05 / counts[0])))
    state: State = "broken" if surely > limit else "unclear" if ours > limit else "holds"
    text = f"95th percentile {ours:.3f} s against {theirs:.3f} s, at most {limit:.3f} s allowed"
    found = {"production": round(theirs, 4), "candidate": round(ours, 4), "limit": round(limit, 4)}
    return Finding(rule="latency", state=state, text=text, **found)


def _agreement(values: list[float], rules: Rules) -> Finding:
    limit, count = rules.agreement, len(values)
    if count < rules.fewest_to_judge:
        text = f"{count} of at least {rules.fewest_to_judge} comparisons"
        return Finding(rule="agreement", state="silent", limit=limit, text=text)
    mean = sum(values) / count
    spread = math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1))
    # where all say the same the spread is nought and proves nothing: a share's interval is wider
    high = max(mean + _Z * spread / math.sqrt(count), wilson(round(mean * count), count)[1])
    state: State = "broken" if high < limit else "unclear" if mean < limit else "holds"
    text = f"{mean:.1%} in {count} comparisons, at least {limit:.1%} wanted"
    return Finding(rule="agreement", state=state, candidate=round(mean, 4), limit=limit, text=text)
