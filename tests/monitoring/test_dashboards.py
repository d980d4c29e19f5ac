"""Dashboards: what is committed is what the program writes, and every query is one that Prometheus understands."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import ray
import yaml

from deployments.metrics import METRICS
from monitoring.dashboards import BOARDS
from monitoring.dashboards.__main__ import FOLDER, main
from monitoring.dashboards.board import render
from tests.monitoring.expressions import ELSEWHERE, TRAINING, alerts, names, needed, panels


def test_the_committed_files_are_what_the_program_writes(tmp_path: Path) -> None:
    main(["--output", str(tmp_path)])
    written = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert written == {path.name: path.read_text() for path in FOLDER.iterdir()}, "run `make dashboards`"


@pytest.mark.parametrize("board", BOARDS, ids=lambda board: board.uid)
def test_a_dashboard_is_one_that_grafana_reads(board) -> None:
    made = json.loads(render(board))
    assert made["uid"] == board.uid and made["title"] == board.title
    lines = [panel for panel in made["panels"] if panel["type"] == "timeseries"]
    assert sorted(target["expr"] for panel in lines for target in panel["targets"]) == sorted(board.expressions())
    places = [tuple(panel["gridPos"].get(key, 0) for key in "xy") for panel in made["panels"]]
    assert len(set(places)) == len(places), "no panel lies on another"
    for panel in lines:
        assert panel["datasource"]["uid"] == "${datasource}"
        assert panel["title"] and panel["fieldConfig"]["defaults"]["unit"]
    assert {variable["name"] for variable in made["templating"]["list"]} == {"datasource", "application"}


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool: apt-get install prometheus")
def test_every_query_is_one_that_prometheus_understands(tmp_path: Path) -> None:
    rules = [{"record": f"panel:{number}", "expr": expression} for number, expression in enumerate(panels())]
    file = tmp_path / "rules.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    checked = subprocess.run(["promtool", "check", "rules", file], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_names_are_read_off_an_expression() -> None:
    expression = 'sum by (ray_label) (rate(ray_a_total{x="ray_value"}[1m])) / on (ray_other) group_left () ray_b == up'
    assert names(expression) == {"ray_a_total", "ray_b", "up"}


def test_our_own_metrics_exist_and_each_is_shown_somewhere() -> None:
    exported = {name for definition in METRICS.values() for name in definition.exported()}
    ours = {name for name in needed() if name.startswith("ray_deeptrust_")}
    assert ours - exported == set()
    shown = {
        definition.name
        for definition in METRICS.values()
        if set(definition.exported()) & {name for expression in panels() for name in names(expression)}
    }
    assert set(METRICS) - shown == set()
    assert {"ray_deeptrust_stage_ready", "ray_node_cpu_count"} <= {
        name for expression in alerts().values() for name in names(expression)
    }


def test_labels_in_our_queries_are_labels_of_the_metric() -> None:
    added = {"application", "deployment", "replica", "le"}
    for expression in [*alerts().values(), *panels()]:
        for metric, matchers in re.findall(r"ray_deeptrust_(\w+)\{([^}]*)\}", expression):
            base = re.sub(r"_(total|bucket|sum|count)$", "", metric)
            definition = METRICS[metric if metric in METRICS else base]
            used = set(re.findall(r"(\w+)\s*(?:=~|!=|!~|=)", matchers))
            assert used <= {*definition.labels, *added}, expression


def test_what_our_queries_sum_by_are_labels_of_the_metric() -> None:
    added, summed = {"application", "deployment", "replica", "le"}, 0
    for expression in [*alerts().values(), *panels()]:
        for labels, metric in re.findall(r"by \(([^)]*)\) \((?:rate\()?ray_deeptrust_(\w+)", expression):
            base = re.sub(r"_(total|bucket|sum|count)$", "", metric)
            definition = METRICS[metric if metric in METRICS else base]
            assert set(labels.split(", ")) <= {*definition.labels, *added}, expression
            summed += 1
    assert summed > 40


def test_what_the_small_application_cannot_export_is_what_rays_own_dashboards_ask_for() -> None:
    folder = Path(ray.__file__).parent / "dashboard" / "modules" / "metrics" / "dashboards"
    text = "\n".join(path.read_text() for path in folder.glob("*_panels.py"))
    elsewhere = {name for name in needed() if name.startswith(ELSEWHERE) and not name.startswith(TRAINING)}
    assert elsewhere, "training and the GPUs are shown"
    assert [name for name in elsewhere if not re.search(rf"\b{name}\b", text)] == []
