"""Whether pictures are what they were."""

from __future__ import annotations

from monitoring.dashboards.board import Board, Panel, Query
from monitoring.dashboards.promql import APP, APPROXIMATE, mean, rate

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
                            f"max by (channel, revision) (ray_deeptrust_drift_statistic{{{APP}}})",
                            "{{channel}} {{revision}}",
                        ),
                    ),
                    "Squared MMD of the latest window; above 1 is drift. `picture`: size, compression, light",
                ),
                Panel(
                    "Alarm",
                    "short",
                    (
                        Query(f"max by (revision) (ray_deeptrust_drift_alarm{{{APP}}})", "alarm {{revision}}"),
                        Query(
                            f"max by (revision) (ray_deeptrust_drift_reference{{{APP}}})",
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
                            rate("ray_deeptrust_drift_pictures_total", "outcome, revision"), "{{outcome}} {{revision}}"
                        ),
                    ),
                    "A bounded sample of what is answered; `repeated` ones are in the window already",
                ),
                Panel(
                    "Probability of AI, mean",
                    "percentunit",
                    (Query(mean("ray_deeptrust_ai_probability", "revision"), "{{revision}}"),),
                    APPROXIMATE,
                ),
            ),
        ),
    ),
)
