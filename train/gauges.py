"""What a run tells operators while it trains: step, loss, speed and data set version, among Ray's own metrics.

In: what the loop's first worker says every second or two. Out: gauges that each node's agent exports for Prometheus, as
``ray_deeptrust_training_step`` and so on (``deployments.metrics`` has the list). Where Ray does not run, nothing. Knows
no Lightning.
"""

from __future__ import annotations

from typing import Any

from deployments.metrics import METRICS, PREFIX

_MADE = ("training_step", "training_loss", "training_samples_per_second", "training_data")


class Gauges:
    """Figures of one run.

    Args:
        run: its name.
        version: of the data set, with its name.
    """

    def __init__(self, run: str, version: str) -> None:
        self._run, self._version = run, version
        self._gauges: dict[str, Any] = {}
        import ray

        if not ray.is_initialized():
            return
        # not Serve's metrics: a training worker is no replica, and has no use for importing it
        from ray.util.metrics import Gauge

        for name in _MADE:
            definition = METRICS[name]
            self._gauges[name] = Gauge(PREFIX + name, definition.description, tag_keys=definition.labels)

    def tell(self, step: int, loss: float, samples_per_s: float) -> None:
        """Where the run stands. Said again and again: Ray forgets a gauge that is not set for a while."""
        if not self._gauges:
            return
        run = {"run": self._run}
        self._gauges["training_step"].set(step, run)
        self._gauges["training_loss"].set(loss, run)
        self._gauges["training_samples_per_second"].set(samples_per_s, run)
        self._gauges["training_data"].set(1, run | {"version": self._version})
