"""How far training is."""

from __future__ import annotations

from monitoring.dashboards.board import Board, Panel, Query

#: On two boards: training takes what serving leaves.
GPUS_IN_USE = Panel("GPUs in use", "percent", (Query("ray_node_gpus_utilization", "{{ip}} GPU {{GpuIndex}}"),))

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
                GPUS_IN_USE,
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
