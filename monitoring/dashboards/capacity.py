"""What the machines have left."""

from __future__ import annotations

from monitoring.dashboards.board import Board, Panel, Query
from monitoring.dashboards.promql import APP, rate
from monitoring.dashboards.training import GPUS_IN_USE

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
                            f"count by (deployment) (ray_serve_deployment_replica_healthy{{{APP}}} == 1)",
                            "{{deployment}}",
                        ),
                    ),
                ),
                Panel(
                    "Requests to each deployment",
                    "reqps",
                    (Query(rate("ray_serve_deployment_request_counter_total", "deployment"), "{{deployment}}"),),
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
                GPUS_IN_USE,
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
