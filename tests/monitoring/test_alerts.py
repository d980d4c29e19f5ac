"""Alert rules: Prometheus takes them, each fires and keeps still as it should, and the runbook says what to do."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.monitoring.expressions import MONITORING, alerts

pytestmark = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool: apt-get install prometheus")


CASES = ("alerts_test.yaml", "alerts_day_test.yaml")


def promtool(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["promtool", *map(str, arguments)], capture_output=True, text=True, timeout=120, check=False)


def test_prometheus_takes_the_rules() -> None:
    checked = promtool("check", "rules", MONITORING / "alerts.yaml")
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_each_alert_fires_and_keeps_still_as_it_should() -> None:
    tested = promtool("test", "rules", *(MONITORING / name for name in CASES))
    assert tested.returncode == 0, tested.stdout + tested.stderr
    fires: set[str] = set()
    quiet: set[str] = set()
    for name in CASES:
        for case in yaml.safe_load((MONITORING / name).read_text())["tests"]:
            for expected in case["alert_rule_test"]:
                (fires if expected.get("exp_alerts") else quiet).add(expected["alertname"])
    assert fires == quiet == set(alerts())


@pytest.mark.parametrize(("name", "case"), [("VerdictsShifted", CASES[1]), ("NodeLost", CASES[0])])
def test_a_rule_that_never_fires_is_found_out(tmp_path: Path, name: str, case: str) -> None:
    rules = yaml.safe_load((MONITORING / "alerts.yaml").read_text())
    for group in rules["groups"]:
        for rule in group["rules"]:
            if rule["alert"] == name:
                rule["expr"] = f"({rule['expr']}) and on () vector(1) > 2"
    (tmp_path / "alerts.yaml").write_text(yaml.safe_dump(rules))
    # as text: promtool's `0x120` is no number
    cases = yaml.load((MONITORING / case).read_text(), yaml.BaseLoader)
    cases["tests"] = [
        one
        for one in cases["tests"]
        if any(expected["alertname"] == name and expected.get("exp_alerts") for expected in one["alert_rule_test"])
    ]
    (tmp_path / case).write_text(yaml.safe_dump(cases))
    tested = promtool("test", "rules", tmp_path / case)
    assert tested.returncode != 0 and name in tested.stdout + tested.stderr


def test_the_runbook_says_what_to_do_about_each() -> None:
    text = (MONITORING.parent / "docs" / "runbook.md").read_text()
    assert [name for name in alerts() if f"`{name}`" not in text] == []
