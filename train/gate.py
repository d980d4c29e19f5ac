"""The gate: which figures of an evaluation a model must reach before it may be promoted.

In: a report (``train.evaluate``) and rules in YAML, one list for each kind of model. Out: every rule with what was
found, and whether all hold. A figure is named by its path in the report, with dots:
``tiers.clean.roc_auc.low`` is the lower end of an interval. A figure that is not in the report is a failure, unless
the rule says ``optional`` and the whole part of the report is missing (there is no comparison before something is in
production; whether one may be missing is for ``train.registry`` to say, which knows what is; no tags where no tagger
runs): such a check is `absent`, and the report says why under ``not_measured``.

Knows no model and no MLflow.

    python -m train.gate REPORT.json [--rules train/gate.yaml]
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_settings import CliPositionalArg

RULES = Path(__file__).parent / "gate.yaml"

Kind = Literal["detector", "captioner"]
#: What reports are of: the registry's models, and the tagger, which is prompted and not trained.
Judged = Literal["detector", "captioner", "tagger"]


class GateError(ValueError):
    """The rules cannot be read; the message says where and why."""


class Rule(BaseModel):
    """One condition."""

    model_config = ConfigDict(extra="forbid")

    figure: str = Field(description="path of a number or truth value in the report, with dots")
    at_least: float | None = None
    at_most: float | None = None
    optional: bool = Field(False, description="holds when the report lacks the whole part, e.g. `comparison`")
    why: str = Field(description="for whoever is refused")

    @model_validator(mode="after")
    def _has_a_border(self) -> Rule:
        if self.at_least is None and self.at_most is None:
            raise ValueError(f"rule for {self.figure}: give at_least or at_most")
        return self


class Rules(BaseModel):
    """The rules of every kind of model."""

    model_config = ConfigDict(extra="forbid")

    detector: list[Rule] = Field(min_length=1)
    captioner: list[Rule] = Field(min_length=1)
    tagger: list[Rule] = Field([], description="not in the registry: without rules taggers are not evaluated")

    def of(self, kind: Any) -> list[Rule]:
        """The rules of a kind of model.

        Raises:
            GateError: there are none.
        """
        if kind not in type(self).model_fields:
            raise GateError(f"the report is of kind {kind!r}; there are rules for {', '.join(type(self).model_fields)}")
        found: list[Rule] = getattr(self, kind)
        if not found:
            raise GateError(f"the file of rules has none for a {kind}: add some, or name another with --rules")
        return found


class Check(BaseModel):
    """A rule and what was found."""

    rule: Rule
    found: float | None
    passed: bool

    def __str__(self) -> str:
        rule = self.rule
        borders = [f">= {rule.at_least}"] if rule.at_least is not None else []
        borders += [f"<= {rule.at_most}"] if rule.at_most is not None else []
        found = "not in the report" if self.found is None else f"{self.found:.4g}"
        verdict = "absent" if self.found is None and self.passed else "ok    " if self.passed else "FAILED"
        return f"{verdict} {rule.figure} {' and '.join(borders)}: {found} ({rule.why})"


class Judgement(BaseModel):
    """All checks of one report."""

    passed: bool
    checks: list[Check]

    @property
    def failures(self) -> list[str]:
        """What did not hold, for people."""
        return [str(check) for check in self.checks if not check.passed]


def read_rules(path: Path = RULES) -> Rules:
    """The rules of a YAML file.

    Raises:
        GateError: it is missing or not understood.
    """
    try:
        return Rules.model_validate(yaml.safe_load(path.read_text()))
    except FileNotFoundError as error:
        raise GateError(f"no gate rules at {path}; name another file with --rules") from error
    except (yaml.YAMLError, ValidationError) as error:
        raise GateError(f"{path} is not a valid gate: {error}") from error


def find(report: dict[str, Any], path: str) -> float | None:
    """The number at a dotted path; None where there is none. Keys may hold dots themselves."""
    if not isinstance(report, dict):
        return None
    for end in range(len(path), 0, -1):
        if end < len(path) and path[end] != ".":
            continue
        if path[:end] in report:
            value = report[path[:end]]
            if end == len(path):
                return float(value) if isinstance(value, (bool, int, float)) else None
            return find(value, path[end + 1 :])
    return None


def judge(report: dict[str, Any], rules: Rules) -> Judgement:
    """Hold a report against the rules of its kind.

    Raises:
        GateError: the report is of no known kind, or of one without rules.
    """
    checks = []
    for rule in rules.of(report.get("kind")):
        found = find(report, rule.figure)
        if found is None:
            passed = rule.optional and not any(rule.figure.startswith(f"{part}.") for part in report)
        else:
            passed = not math.isnan(found)
            passed &= rule.at_least is None or found >= rule.at_least
            passed &= rule.at_most is None or found <= rule.at_most
        checks.append(Check(rule=rule, found=found, passed=passed))
    return Judgement(passed=all(check.passed for check in checks), checks=checks)


class GateCommand(BaseModel):
    """Hold a report against the gate."""

    model_config = ConfigDict(extra="forbid")

    report: CliPositionalArg[Path] = Field(description="report.json of an evaluation")
    rules: Path = Field(RULES, description="YAML file with the rules")


def main(arguments: list[str] | None = None) -> None:
    """Print every check; exit status 1 when one fails."""
    from pydantic_settings import CliApp

    command = CliApp.run(GateCommand, cli_args=arguments)
    try:
        judgement = judge(json.loads(command.report.read_text()), read_rules(command.rules))
    except (GateError, OSError, ValueError) as error:
        sys.exit(f"{error}")
    print("\n".join(map(str, judgement.checks)))
    if not judgement.passed:
        sys.exit(f"{len(judgement.failures)} of {len(judgement.checks)} checks failed")


if __name__ == "__main__":
    main()
