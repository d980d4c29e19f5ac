"""What the service does: requests, queues, stages, vLLM's engine."""

from __future__ import annotations

from monitoring.dashboards.board import Board, Panel, Query
from monitoring.dashboards.promql import APP, APPROXIMATE, RATE, mean, quantile, rate, rate_or_0, share_of_requests

_ERRORS, _ROUTE = 'status=~"4..|4xx|5xx"', "{{route}} {{status}}"
_TIMEOUT = 'code="timeout", revision!=""'
_REFUSED, _KEY = 'status=~"401|403|429"', "{{status}} {{key}}"

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
                    (Query(rate("ray_deeptrust_requests_total", "code"), "{{code}}"),),
                    "`ok`, or the code of the problem that was answered",
                    stacked=True,
                ),
                Panel(
                    "Time to answer",
                    "s",
                    tuple(
                        Query(quantile(share, "ray_deeptrust_request_seconds"), f"{share:.0%}")
                        for share in (0.5, 0.95, 0.99)
                    ),
                    f"{APPROXIMATE}; without what was refused with 429 or accepted for later",
                ),
                Panel(
                    "Time to answer, 95 %, by the models that they need",
                    "s",
                    (Query(quantile(0.95, "ray_deeptrust_request_seconds", "revision"), "{{revision}}"),),
                    f"{APPROXIMATE}; revisions as of the requests; none: refused before a model was asked",
                ),
                Panel(
                    "Share of requests that fail on our side",
                    "percentunit",
                    (
                        Query(share_of_requests('code=~"internal_error|unavailable"', _TIMEOUT), "failed"),
                        Query(share_of_requests('code="overloaded"'), "refused (429)"),
                    ),
                    "A timeout before a model was asked is a body that did not arrive, and not counted",
                ),
                Panel(
                    "Pictures by outcome",
                    "ops",
                    (Query(rate("ray_deeptrust_pictures_total", "outcome"), "{{outcome}}"),),
                    "`partial`: at least one stage gave no answer",
                    stacked=True,
                ),
                Panel(
                    "All routes by status",
                    "reqps",
                    (Query(rate("ray_deeptrust_http_requests_total", "status"), "{{status}}"),),
                    "Feedback, search, results, the page and health too",
                    stacked=True,
                ),
                Panel(
                    "Errors of each route",
                    "reqps",
                    (Query(rate_or_0("ray_deeptrust_http_requests_total", "route, status", _ERRORS), _ROUTE),),
                ),
                Panel(
                    "Refused, by key",
                    "reqps",
                    (Query(rate_or_0("ray_deeptrust_http_requests_total", "key, status", _REFUSED), _KEY),),
                    "401: no key in use; 403: a key without the scope; 429: too often, or no room",
                ),
                Panel(
                    "Requests by the models that they need",
                    "reqps",
                    (Query(rate("ray_deeptrust_requests_total", "revision, code"), "{{revision}} {{code}}"),),
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
                        Query(f"sum(ray_deeptrust_pictures_in_work{{{APP}}})", "in work"),
                        Query(f"sum(ray_deeptrust_pictures_limit{{{APP}}})", "limit"),
                        Query(f"sum(ray_deeptrust_requests_waiting{{{APP}}})", "waiting for a place"),
                        # every replica tells of the one queue
                        Query(f"max(ray_deeptrust_pictures_deferred{{{APP}}})", "deferred"),
                    ),
                    "The limit falls when pictures take longer than they should",
                ),
                Panel(
                    "Time that the oldest deferred picture has waited",
                    "s",
                    (Query(f"max(ray_deeptrust_deferred_age_seconds{{{APP}}})", "oldest"),),
                    "Since it was taken in",
                ),
                Panel(
                    "Room for deferred pictures that is taken",
                    "percentunit",
                    (Query(f"max(ray_deeptrust_deferred_room_used{{{APP}}})", "taken"),),
                    "By `max_deferred` or by `max_deferred_bytes`, whichever is more; when all is, senders get 429",
                ),
                Panel(
                    "Call-backs",
                    "ops",
                    (
                        Query(rate("ray_deeptrust_callbacks_total", "outcome"), "{{outcome}}"),
                        Query(f"max(ray_deeptrust_callbacks_due{{{APP}}})", "due (number)"),
                    ),
                    "`failed` is tried again; `gone`: the picture was deleted",
                ),
                Panel(
                    "Answers on their way into the store",
                    "short",
                    (
                        Query(f"sum(ray_deeptrust_store_queued{{{APP}}})", "queued"),
                        Query(f"sum by (what) (ray_deeptrust_store_dropped{{{APP}}})", "{{what}} dropped"),
                    ),
                    "Dropped since the replicas began: the database does not keep up, or cannot be reached",
                ),
                Panel(
                    "Replicas that can use the store",
                    "short",
                    (
                        Query(f"sum(ray_deeptrust_store_ready{{{APP}}})", "can"),
                        Query(f"count(ray_deeptrust_store_ready{{{APP}}})", "all"),
                    ),
                    "Of the ingress, where a store is wanted",
                ),
                Panel(
                    "Requests in the replicas",
                    "short",
                    (
                        Query(
                            f"sum by (deployment) (ray_serve_replica_processing_queries{{{APP}}})",
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
                    (Query(f"max by (stage) (ray_deeptrust_stage_ready{{{APP}}})", "{{stage}}"),),
                ),
                Panel(
                    "Stages that gave no answer",
                    "ops",
                    (
                        Query(
                            rate("ray_deeptrust_stage_errors_total", "stage, code, revision"),
                            "{{stage}} {{code}} {{revision}}",
                        ),
                    ),
                ),
                Panel(
                    "Time of a stage, median",
                    "s",
                    (Query(quantile(0.5, "ray_deeptrust_stage_seconds", "stage"), "{{stage}}"),),
                    APPROXIMATE,
                ),
                Panel(
                    "Time of a stage, 95 %, by revision",
                    "s",
                    (
                        Query(
                            quantile(0.95, "ray_deeptrust_stage_seconds", "stage, revision"),
                            "{{stage}} {{revision}}",
                        ),
                    ),
                    APPROXIMATE,
                ),
                Panel(
                    "Pictures in a batch, mean",
                    "short",
                    (Query(mean("ray_deeptrust_batch_pictures", "stage, revision"), "{{stage}} {{revision}}"),),
                    "Exact up to 8 and for 16, 32, 64 and 128; others approximate, by buckets",
                ),
                Panel(
                    "Time of a batch, mean",
                    "s",
                    (Query(mean("ray_deeptrust_batch_seconds", "stage, revision"), "{{stage}} {{revision}}"),),
                    APPROXIMATE,
                ),
                Panel(
                    "Revisions in service",
                    "short",
                    (
                        Query(
                            f"sum by (deployment, revision) (ray_deeptrust_model{{{APP}}}) > 0",
                            "{{deployment}} {{revision}}",
                        ),
                        Query(
                            f"sum by (deployment) (ray_deeptrust_revision_refused{{{APP}}})",
                            "{{deployment}} cannot serve another",
                        ),
                    ),
                    "Replicas that run each revision",
                ),
                Panel(
                    "Replicas that are well",
                    "short",
                    (Query(f"sum by (deployment) (ray_serve_deployment_replica_healthy{{{APP}}})", "{{deployment}}"),),
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
                        Query(f"sum(rate(ray_vllm_prompt_tokens_total{RATE}))", "prompt"),
                        Query(f"sum(rate(ray_vllm_generation_tokens_total{RATE}))", "generated"),
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
