"""Grafana dashboards as code: ``python -m monitoring.dashboards`` writes them to ``monitoring/grafana``.

Five dashboards: what the service does, what it says, whether pictures are what they were, how far training is, and what
the machines have left. The files are committed and put where Ray's own Grafana set-up looks
(``RAY_METRICS_GRAFANA_DASHBOARD_OUTPUT_DIR``), so that no machine that serves needs this program or its library. Knows
names of metrics and no data.
"""

from __future__ import annotations

from monitoring.dashboards.capacity import CAPACITY
from monitoring.dashboards.drift import DRIFT
from monitoring.dashboards.predictions import PREDICTIONS
from monitoring.dashboards.service import SERVICE
from monitoring.dashboards.training import TRAINING

BOARDS = (SERVICE, PREDICTIONS, DRIFT, TRAINING, CAPACITY)
