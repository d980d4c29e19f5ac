"""Queries of dashboards and alerts, and the metrics that they ask for."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from monitoring.dashboards import BOARDS

MONITORING = Path(__file__).parents[2] / "monitoring"
_CLAUSE = re.compile(r"\b(by|on|without|ignoring|group_left|group_right)\s*\([^)]*\)")
_IN_BRACES = re.compile(r"\{[^}]*\}")
_NAME = re.compile(r"\b(?:ray_\w+|up)\b")

#: What training exports of ours.
TRAINING = "ray_deeptrust_training_"
#: An application without a GPU that trains nothing exports none of these; Ray's own dashboards ask for all but ours.
ELSEWHERE = ("ray_train_", "ray_vllm_", "ray_node_gpus_", "ray_node_gram_", TRAINING)


def alerts() -> dict[str, str]:
    """Alert -> its expression."""
    groups = yaml.safe_load((MONITORING / "alerts.yaml").read_text())["groups"]
    return {rule["alert"]: rule["expr"] for group in groups for rule in group["rules"]}


def panels() -> list[str]:
    """Every query of every dashboard, Grafana's variables filled in."""
    return [
        expression.replace("$__rate_interval", "1m").replace("$application", ".*")
        for board in BOARDS
        for expression in board.expressions()
    ]


def names(expression: str) -> set[str]:
    """Metrics that an expression reads."""
    return set(_NAME.findall(_IN_BRACES.sub("", _CLAUSE.sub("", expression))))


def needed() -> set[str]:
    """Every metric that an alert or a panel reads."""
    return {name for expression in [*alerts().values(), *panels()] for name in names(expression)}
