"""What a dashboard is made of, and how it becomes the JSON that Grafana reads."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Query:
    """One query of a panel; ``legend`` in Grafana's notation."""

    expression: str
    legend: str


@dataclass(frozen=True)
class Panel:
    """One panel: lines over time."""

    title: str
    unit: str
    queries: tuple[Query, ...]
    description: str = ""
    stacked: bool = False


@dataclass(frozen=True)
class Board:
    """One dashboard: rows of panels, two to a line."""

    uid: str
    title: str
    rows: tuple[tuple[str, tuple[Panel, ...]], ...]

    def expressions(self) -> Iterator[str]:
        """Every query of the dashboard."""
        for _, panels in self.rows:
            for panel in panels:
                for query in panel.queries:
                    yield query.expression


def render(board: Board) -> str:
    """A dashboard as the JSON that Grafana reads."""
    with warnings.catch_warnings():
        # the library would rather have Grafana's second schema, which Grafana reads from files since version 12 only
        warnings.simplefilter("ignore", DeprecationWarning)
        from grafana_foundation_sdk.builders import dashboard as dashboards
    from grafana_foundation_sdk.builders import common, prometheus, timeseries
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.models.common import DataSourceRef, StackingMode

    source = DataSourceRef(type_val="prometheus", uid="${datasource}")
    made = (
        dashboards.Dashboard(board.title)
        .uid(board.uid)
        .tags(["deeptrust"])
        .refresh("30s")
        .time("now-1h", "now")
        .with_variable(dashboards.DatasourceVariable("datasource").type("prometheus").label("Prometheus"))
        .with_variable(
            dashboards.QueryVariable("application")
            .label("Application")
            .datasource(source)
            .query("label_values(ray_deeptrust_stage_ready, application)")
            .include_all(True)
            .all_value(".*")
        )
    )
    for title, panels in board.rows:
        made.with_row(dashboards.Row(title))
        for panel in panels:
            lines: Any = (
                timeseries.Panel()
                .title(panel.title)
                .description(panel.description)
                .unit(panel.unit)
                .datasource(source)
                .min(0)
                .span(12)
                .height(8)
                .fill_opacity(30 if panel.stacked else 0)
                .stacking(
                    common.StackingConfig().mode(StackingMode.NORMAL if panel.stacked else StackingMode.NONE).group("A")
                )
            )
            for position, query in enumerate(panel.queries):
                lines.with_target(
                    prometheus.Dataquery()
                    .expr(query.expression)
                    .legend_format(query.legend)
                    .ref_id("ABCDEFGH"[position])
                    .datasource(source)
                    .range()
                )
            made.with_panel(lines)
    return json.dumps(made.build(), cls=JSONEncoder, indent=1, sort_keys=True) + "\n"
