"""Grafana dashboards as code: ``python -m monitoring.dashboards`` writes them to ``monitoring/grafana``.

Five dashboards: what the service does, what it says, whether pictures are what they were, how far training is, and what
the machines have left. The files
are committed and put where Ray's own Grafana set-up looks (``RAY_METRICS_GRAFANA_DASHBOARD_OUTPUT_DIR``), so that no
machine that serves needs this program or its library. Knows names of metrics and no data.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

FOLDER = Path(__file__).parent / "grafana"

_RATE = "[$__rate_interval]"
_APP = 'application=~"$application"'


_ERRORS, _ROUTE = 'status=~"4..|4xx|5xx"', "{{route}} {{status}}"
_TIMEOUT = 'code="timeout", revision!=""'
_REFUSED, _KEY = 'status=~"401|403|429"', "{{status}} {{key}}"

#: Ray's agent takes the middle of its bucket for every value, and a quantile is a guess within its bucket.
_APPROXIMATE = "Approximate, by buckets"


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


def _rate(metric: str, by: str, matchers: str = "") -> str:
    chosen = ", ".join(filter(None, (_APP, matchers)))
    return f"sum by ({by}) (rate({metric}{{{chosen}}}{_RATE}))"


def _quantile(quantile: float, metric: str, by: str = "", matchers: str = "") -> str:
    labels = f"le, {by}" if by else "le"
    return f"histogram_quantile({quantile}, {_rate(f'{metric}_bucket', labels, matchers)})"


def _mean(metric: str, by: str) -> str:
    return f"{_rate(f'{metric}_sum', by)} / {_rate(f'{metric}_count', by)}"


def _rate_or_0(metric: str, by: str, matchers: str) -> str:
    # 0 and not nothing, where there has been none
    return f"{_rate(metric, by, matchers)} or {_rate(metric, 'application')} * 0"


def _mean_so_far(metric: str, by: str) -> str:
    """What happens seldom has no rate worth a line."""
    return f"sum by ({by}) ({metric}_sum{{{_APP}}}) / sum by ({by}) ({metric}_count{{{_APP}}})"


def _share_so_far(metric: str, by: str, matchers: str) -> str:
    everything = f"sum by ({by}) ({metric}{{{_APP}}})"
    return f"(sum by ({by}) ({metric}{{{_APP}, {matchers}}}) or {everything} * 0) / {everything}"


def _share_of_requests(*matchers: str) -> str:
    """Share of those that one of ``matchers`` fits; no two of them fit the same."""
    requests = "ray_deeptrust_requests_total"
    chosen = " or ".join(f"rate({requests}{{{_APP}, {each}}}{_RATE})" for each in matchers)
    everything = _rate(requests, "application")
    # 0 and not nothing, where there has been none
    return f"(sum by (application) ({chosen}) or {everything} * 0) / {everything}"


SERVICE = Board(
    "deeptrust-service",
    "DeepTrust: service",
    (
        (
            "Requests",
            (
                Panel(
                    "Requests by answer",
                    "reqps",
                    (Query(_rate("ray_deeptrust_requests_total", "code"), "{{code}}"),),
                    "`ok`, or the code of the problem that was answered",
                    stacked=True,
                ),
                Panel(
                    "Time to answer",
                    "s",
                    tuple(
                        Query(_quantile(quantile, "ray_deeptrust_request_seconds"), f"{quantile:.0%}")
                        for quantile in (0.5, 0.95, 0.99)
                    ),
                    f"{_APPROXIMATE}; without what was refused with 429 or accepted for later",
                ),
                Panel(
                    "Time to answer, 95 %, by the models that they need",
                    "s",
                    (Query(_quantile(0.95, "ray_deeptrust_request_seconds", "revision"), "{{revision}}"),),
                    f"{_APPROXIMATE}; revisions as of the requests; none: refused before a model was asked",
                ),
                Panel(
                    "Share of requests that fail on our side",
                    "percentunit",
                    (
                        Query(_share_of_requests('code=~"internal_error|unavailable"', _TIMEOUT), "failed"),
                        Query(_share_of_requests('code="overloaded"'), "refused (429)"),
                    ),
                    "A timeout before a model was asked is a body that did not arrive, and not counted",
                ),
                Panel(
                    "Pictures by outcome",
                    "ops",
                    (Query(_rate("ray_deeptrust_pictures_total", "outcome"), "{{outcome}}"),),
                    "`partial`: at least one stage gave no answer",
                    stacked=True,
                ),
                Panel(
                    "All routes by status",
                    "reqps",
                    (Query(_rate("ray_deeptrust_http_requests_total", "status"), "{{status}}"),),
                    "Feedback, search, results, the page and health too",
                    stacked=True,
                ),
                Panel(
                    "Errors of each route",
                    "reqps",
                    (Query(_rate_or_0("ray_deeptrust_http_requests_total", "route, status", _ERRORS), _ROUTE),),
                ),
                Panel(
                    "Refused, by key",
                    "reqps",
                    (Query(_rate_or_0("ray_deeptrust_http_requests_total", "key, status", _REFUSED), _KEY),),
                    "401: no key in use; 403: a key without the scope; 429: too often, or no room",
                ),
                Panel(
                    "Requests by the models that they need",
                    "reqps",
                    (Query(_rate("ray_deeptrust_requests_total", "revision, code"), "{{revision}} {{code}}"),),
                    "Revisions of detector, captioner and tagger; none: refused before a model was asked",
                ),
            ),
        ),
        (
            "Queue",
            (
                Panel(
                    "Pictures in work, and how many are let in",
                    "short",
                    (
                        Query(f"sum(ray_deeptrust_pictures_in_work{{{_APP}}})", "in work"),
                        Query(f"sum(ray_deeptrust_pictures_limit{{{_APP}}})", "limit"),
                        Query(f"sum(ray_deeptrust_requests_waiting{{{_APP}}})", "waiting for a place"),
                        # every replica tells of the one queue
                        Query(f"max(ray_deeptrust_pictures_deferred{{{_APP}}})", "deferred"),
                    ),
                    "The limit falls when pictures take longer than they should",
                ),
                Panel(
                    "Time that the oldest deferred picture has waited",
                    "s",
                    (Query(f"max(ray_deeptrust_deferred_age_seconds{{{_APP}}})", "oldest"),),
                    "Since it was taken in",
                ),
                Panel(
                    "Room for deferred pictures that is taken",
                    "percentunit",
                    (Query(f"max(ray_deeptrust_deferred_room_used{{{_APP}}})", "taken"),),
                    "By `max_deferred` or by `max_deferred_bytes`, whichever is more; when all is, senders get 429",
                ),
                Panel(
                    "Call-backs",
                    "ops",
                    (
                        Query(_rate("ray_deeptrust_callbacks_total", "outcome"), "{{outcome}}"),
                        Query(f"max(ray_deeptrust_callbacks_due{{{_APP}}})", "due (number)"),
                    ),
                    "`failed` is tried again; `gone`: the picture was deleted",
                ),
                Panel(
                    "Answers on their way into the store",
                    "short",
                    (
                        Query(f"sum(ray_deeptrust_store_queued{{{_APP}}})", "queued"),
                        Query(f"sum by (what) (ray_deeptrust_store_dropped{{{_APP}}})", "{{what}} dropped"),
                    ),
                    "Dropped since the replicas began: the database does not keep up, or cannot be reached",
                ),
                Panel(
                    "Replicas that can use the store",
                    "short",
                    (
                        Query(f"sum(ray_deeptrust_store_ready{{{_APP}}})", "can"),
                        Query(f"count(ray_deeptrust_store_ready{{{_APP}}})", "all"),
                    ),
                    "Of the ingress, where a store is wanted",
                ),
                Panel(
                    "Requests in the replicas",
                    "short",
                    (
                        Query(
                            f"sum by (deployment) (ray_serve_replica_processing_queries{{{_APP}}})",
                            "{{deployment}}",
                        ),
                    ),
                ),
            ),
        ),
        (
            "Stages",
            (
                Panel(
                    "Stages that are ready",
                    "short",
                    (Query(f"max by (stage) (ray_deeptrust_stage_ready{{{_APP}}})", "{{stage}}"),),
                ),
                Panel(
                    "Stages that gave no answer",
                    "ops",
                    (
                        Query(
                            _rate("ray_deeptrust_stage_errors_total", "stage, code, revision"),
                            "{{stage}} {{code}} {{revision}}",
                        ),
                    ),
                ),
                Panel(
                    "Time of a stage, median",
                    "s",
                    (Query(_quantile(0.5, "ray_deeptrust_stage_seconds", "stage"), "{{stage}}"),),
                    _APPROXIMATE,
                ),
                Panel(
                    "Time of a stage, 95 %, by revision",
                    "s",
                    (
                        Query(
                            _quantile(0.95, "ray_deeptrust_stage_seconds", "stage, revision"),
                            "{{stage}} {{revision}}",
                        ),
                    ),
                    _APPROXIMATE,
                ),
                Panel(
                    "Pictures in a batch, mean",
                    "short",
                    (Query(_mean("ray_deeptrust_batch_pictures", "stage, revision"), "{{stage}} {{revision}}"),),
                    "Exact up to 8 and for 16, 32, 64 and 128; others approximate, by buckets",
                ),
                Panel(
                    "Time of a batch, mean",
                    "s",
                    (Query(_mean("ray_deeptrust_batch_seconds", "stage, revision"), "{{stage}} {{revision}}"),),
                    _APPROXIMATE,
                ),
                Panel(
                    "Revisions in service",
                    "short",
                    (
                        Query(
                            f"sum by (deployment, revision) (ray_deeptrust_model{{{_APP}}}) > 0",
                            "{{deployment}} {{revision}}",
                        ),
                        Query(
                            f"sum by (deployment) (ray_deeptrust_revision_refused{{{_APP}}})",
                            "{{deployment}} cannot serve another",
                        ),
                    ),
                    "Replicas that run each revision",
                ),
                Panel(
                    "Replicas that are well",
                    "short",
                    (Query(f"sum by (deployment) (ray_serve_deployment_replica_healthy{{{_APP}}})", "{{deployment}}"),),
                ),
            ),
        ),
        (
            "vLLM (where `log_engine_metrics` is on: on a GPU)",
            (
                Panel(
                    "Tokens",
                    "ops",
                    (
                        Query(f"sum(rate(ray_vllm_prompt_tokens_total{_RATE}))", "prompt"),
                        Query(f"sum(rate(ray_vllm_generation_tokens_total{_RATE}))", "generated"),
                    ),
                ),
                Panel(
                    "Requests in the engine, and its cache",
                    "short",
                    (
                        Query("sum(ray_vllm_num_requests_running)", "running"),
                        Query("sum(ray_vllm_num_requests_waiting)", "waiting"),
                        Query("max(ray_vllm_kv_cache_usage_perc)", "cache in use (0 to 1)"),
                    ),
                ),
            ),
        ),
    ),
)

PREDICTIONS = Board(
    "deeptrust-predictions",
    "DeepTrust: predictions",
    (
        (
            "Verdicts",
            (
                Panel(
                    "Verdicts by revision",
                    "ops",
                    (Query(_rate("ray_deeptrust_verdicts_total", "verdict, revision"), "{{verdict}} {{revision}}"),),
                    stacked=True,
                ),
                Panel(
                    "Share of each verdict",
                    "percentunit",
                    (
                        Query(
                            _rate("ray_deeptrust_verdicts_total", "verdict, revision")
                            + " / ignoring (verdict) group_left () "
                            + _rate("ray_deeptrust_verdicts_total", "revision"),
                            "{{verdict}} {{revision}}",
                        ),
                    ),
                    "Production and canary side by side, by revision",
                ),
                Panel(
                    "Probability of AI: pictures up to each bound",
                    "percentunit",
                    (
                        Query(
                            _rate("ray_deeptrust_ai_probability_bucket", "le")
                            + " / ignoring (le) group_left () "
                            + f"sum(rate(ray_deeptrust_ai_probability_count{{{_APP}}}{_RATE}))",
                            "≤ {{le}}",
                        ),
                    ),
                    "Cumulative; the distance between two lines is the share of the pictures between them",
                ),
                Panel(
                    "Probability of AI, mean",
                    "percentunit",
                    (Query(_mean("ray_deeptrust_ai_probability", "revision"), "{{revision}}"),),
                    _APPROXIMATE,
                ),
                Panel(
                    "What files declare",
                    "ops",
                    (Query(_rate("ray_deeptrust_provenance_total", "c2pa, declared"), "C2PA {{c2pa}}, {{declared}}"),),
                ),
                Panel(
                    "Share of the canaries",
                    "percentunit",
                    (Query(f"max by (stage) (ray_deeptrust_canary_share{{{_APP}}})", "{{stage}}"),),
                ),
                Panel(
                    "Answers of trials",
                    "ops",
                    (
                        Query(
                            _rate("ray_deeptrust_trial_answers_total", "stage, role, outcome"),
                            "{{stage}}: {{role}}, {{outcome}}",
                        ),
                    ),
                    "`dropped`: the other model was not asked, too many pictures were being compared",
                ),
                Panel(
                    "Agreement of candidate and production, mean",
                    "percentunit",
                    (
                        Query(
                            _mean_so_far("ray_deeptrust_trial_agreement", "stage, revision"), "{{stage}} {{revision}}"
                        ),
                    ),
                    "By the candidate's revision, over all that the replicas have compared; of captions and tags "
                    "approximate, by buckets",
                ),
            ),
        ),
        (
            "Feedback",
            (
                Panel(
                    "Feedback by part",
                    "short",
                    (Query(f"sum by (part, judged) (ray_deeptrust_feedback_total{{{_APP}}})", "{{part}} {{judged}}"),),
                    "Events that the replicas have taken since they began",
                ),
                Panel(
                    "Share of the judged answers that are called wrong",
                    "percentunit",
                    (
                        Query(
                            _share_so_far("ray_deeptrust_feedback_total", "part, answer, revision", 'judged="wrong"'),
                            "{{part}} {{answer}} {{revision}}",
                        ),
                    ),
                    "Who gives feedback has mostly something to complain of: compare revisions, not with nothing",
                ),
            ),
        ),
        (
            "Captions and tags",
            (
                Panel(
                    "Words of a caption, mean",
                    "short",
                    (Query(_mean("ray_deeptrust_caption_words", "revision"), "{{revision}}"),),
                    _APPROXIMATE,
                ),
                Panel(
                    "Words of a caption, longest twentieth",
                    "short",
                    (Query(_quantile(0.95, "ray_deeptrust_caption_words", "revision"), "{{revision}}"),),
                    _APPROXIMATE,
                ),
                Panel(
                    "Tags of a picture, mean",
                    "short",
                    (Query(_mean("ray_deeptrust_picture_tags", "revision"), "{{revision}}"),),
                ),
                Panel(
                    "Who proposed the tags",
                    "ops",
                    (Query(_rate("ray_deeptrust_tags_total", "origin, revision"), "{{origin}} {{revision}}"),),
                    "`rules` fill up what the model leaves open",
                    stacked=True,
                ),
            ),
        ),
    ),
)

DRIFT = Board(
    "deeptrust-drift",
    "DeepTrust: drift",
    (
        (
            "Pictures against the detector's training data",
            (
                Panel(
                    "Distance in units of the threshold",
                    "short",
                    (
                        Query(
                            f"max by (channel, revision) (ray_deeptrust_drift_statistic{{{_APP}}})",
                            "{{channel}} {{revision}}",
                        ),
                    ),
                    "Squared MMD of the latest window; above 1 is drift. `picture`: size, compression, light",
                ),
                Panel(
                    "Alarm",
                    "short",
                    (
                        Query(f"max by (revision) (ray_deeptrust_drift_alarm{{{_APP}}})", "alarm {{revision}}"),
                        Query(
                            f"max by (revision) (ray_deeptrust_drift_reference{{{_APP}}})",
                            "has a reference {{revision}}",
                        ),
                    ),
                    "A detector whose checkpoint has no reference is not watched",
                ),
                Panel(
                    "Pictures looked at",
                    "ops",
                    (
                        Query(
                            _rate("ray_deeptrust_drift_pictures_total", "outcome, revision"), "{{outcome}} {{revision}}"
                        ),
                    ),
                    "A bounded sample of what is answered; `repeated` ones are in the window already",
                ),
                Panel(
                    "Probability of AI, mean",
                    "percentunit",
                    (Query(_mean("ray_deeptrust_ai_probability", "revision"), "{{revision}}"),),
                    _APPROXIMATE,
                ),
            ),
        ),
    ),
)

#: On two boards: training takes what serving leaves.
_GPUS_IN_USE = Panel("GPUs in use", "percent", (Query("ray_node_gpus_utilization", "{{ip}} GPU {{GpuIndex}}"),))

TRAINING = Board(
    "deeptrust-training",
    "DeepTrust: training",
    (
        (
            "Runs (Ray Train)",
            (
                Panel("Step", "short", (Query("max by (run) (ray_deeptrust_training_step)", "{{run}}"),)),
                Panel(
                    "Loss of the latest step",
                    "short",
                    (Query("avg by (run) (ray_deeptrust_training_loss)", "{{run}}"),),
                ),
                Panel(
                    "Pictures a second",
                    "ops",
                    (Query("max by (run) (ray_deeptrust_training_samples_per_second)", "{{run}}"),),
                    "Without validation and without the wait for the first batch",
                ),
                Panel(
                    "Data set version",
                    "short",
                    (Query("max by (run, version) (ray_deeptrust_training_data)", "{{run}}: {{version}}"),),
                ),
                Panel(
                    "State of the controller",
                    "short",
                    (
                        Query(
                            "sum by (ray_train_run_name, ray_train_controller_state) (ray_train_controller_state)",
                            "{{ray_train_run_name}} {{ray_train_controller_state}}",
                        ),
                    ),
                ),
                Panel(
                    "Time that workers wait to report",
                    "s",
                    (
                        Query(
                            "sum by (ray_train_run_name) (ray_train_report_total_blocked_time_s)",
                            "{{ray_train_run_name}}",
                        ),
                    ),
                    "Time that checkpoints cost; it only ever grows",
                ),
                Panel(
                    "Time to start and to end a group of workers",
                    "s",
                    (
                        Query(
                            "sum by (ray_train_run_name) (ray_train_worker_group_start_total_time_s)",
                            "{{ray_train_run_name}} start",
                        ),
                        Query(
                            "sum by (ray_train_run_name) (ray_train_worker_group_shutdown_total_time_s)",
                            "{{ray_train_run_name}} end",
                        ),
                    ),
                    "A step up is a group started again after a failure",
                ),
            ),
        ),
        (
            "What they take",
            (
                _GPUS_IN_USE,
                Panel(
                    "Resources that are taken",
                    "short",
                    (Query('sum by (Name) (ray_resources{State="USED", Name=~"CPU|GPU"})', "{{Name}}"),),
                ),
                Panel(
                    "Tasks by state",
                    "short",
                    (Query('sum by (Name, State) (ray_tasks{State!~"FINISHED|FAILED"}) > 0', "{{Name}} {{State}}"),),
                ),
            ),
        ),
    ),
)

CAPACITY = Board(
    "deeptrust-capacity",
    "DeepTrust: capacity",
    (
        (
            "Replicas",
            (
                Panel(
                    "Replicas of each deployment",
                    "short",
                    (
                        Query(
                            f"count by (deployment) (ray_serve_deployment_replica_healthy{{{_APP}}} == 1)",
                            "{{deployment}}",
                        ),
                    ),
                ),
                Panel(
                    "Requests to each deployment",
                    "reqps",
                    (Query(_rate("ray_serve_deployment_request_counter_total", "deployment"), "{{deployment}}"),),
                ),
            ),
        ),
        (
            "Machines",
            (
                Panel("Processors in use", "percent", (Query("ray_node_cpu_utilization", "{{ip}}"),)),
                Panel(
                    "Memory in use",
                    "percentunit",
                    (Query("ray_node_mem_used / ray_node_mem_total", "{{ip}}"),),
                    "Ray ends workers at 95 %",
                ),
                _GPUS_IN_USE,
                Panel(
                    "GPU memory left",
                    "decmbytes",
                    (Query("ray_node_gram_available", "{{ip}} GPU {{GpuIndex}}"),),
                ),
                Panel(
                    "CPUs and GPUs that Ray may hand out",
                    "short",
                    (Query('sum by (Name, State) (ray_resources{Name=~"CPU|GPU"})', "{{Name}} {{State}}"),),
                ),
                Panel(
                    "Object store in use",
                    "bytes",
                    (Query("sum by (Location) (ray_object_store_memory)", "{{Location}}"),),
                    "`SPILLED` is on disk",
                ),
                Panel(
                    "Root disk left",
                    "percentunit",
                    (Query("ray_node_disk_free / (ray_node_disk_free + ray_node_disk_usage)", "{{ip}}"),),
                    "Ray of `cluster.yaml` stores no more objects at 10 %; a spill folder on another disk is not seen",
                ),
                Panel(
                    "Memory of each kind of process",
                    "bytes",
                    (Query("sum by (Component) (ray_component_rss_bytes)", "{{Component}}"),),
                    "What grows from day to day leaks",
                ),
            ),
        ),
    ),
)

BOARDS = (SERVICE, PREDICTIONS, DRIFT, TRAINING, CAPACITY)


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


class DashboardSettings(BaseModel):
    """Command line of ``python -m monitoring.dashboards``."""

    model_config = ConfigDict(extra="forbid")

    output: Path = Field(FOLDER, description="folder to write the dashboards to")


def main(arguments: list[str] | None = None) -> None:
    """Write every dashboard."""
    from pydantic_settings import CliApp

    settings = CliApp.run(DashboardSettings, cli_args=arguments)
    settings.output.mkdir(parents=True, exist_ok=True)
    for board in BOARDS:
        path = settings.output / f"{board.uid}.json"
        path.write_text(render(board))
        print(path)


if __name__ == "__main__":
    main()
